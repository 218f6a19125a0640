"""One request's times, and the series they end in."""

from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.request_metrics import ChoiceTimes, RequestMetrics, head_arrived_s

MODEL = {"model_name": "tiny", "engine": "0"}


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, MODEL | labels)


def test_a_requests_times_are_measured_from_its_arrival():
    metrics = Metrics()
    now = 100.0
    request = RequestMetrics(metrics.model("tiny"), clock=lambda: now)

    def output(num_tokens, **last):
        request.on_output(result := TokenOutput(request_id="a", token_ids=[1] * num_tokens, **last))
        return result

    now = 100.5
    output(1)
    now = 101.5
    output(2)
    now = 102.0
    last = output(1, queue_s=0.1, prefill_s=0.4, decode_s=1.5)
    sampling = ResolvedSampling(max_tokens=20)
    submit = Submit(request_id="a", prompt_token_ids=[1] * 7, sampling=sampling)
    times = request.on_end("stop", submit, last, num_tokens=3, energy=RequestEnergy())
    expected = ChoiceTimes(time_to_first_token_s=0.5, queue_s=0.1, prefill_s=0.4, decode_s=1.5)
    assert times == expected
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 3
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 1.5
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 2.0
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 1.9
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == 0.5
    # The engine drew a fourth behind a stop string: the answer doesn't have it.
    assert value(metrics, "vllm:request_generation_tokens_sum") == 3
    assert value(metrics, "vllm:request_prompt_tokens_sum") == 7
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1


def test_a_choices_times_are_the_engines_however_late_its_outputs_are_read():
    now = 100.0
    arrived = head_arrived_s.set(99.0)
    request = RequestMetrics(Metrics().model("tiny"), clock=lambda: now)
    head_arrived_s.reset(arrived)
    now = 150.0
    last = TokenOutput(
        request_id="a", token_ids=[1, 2], queue_s=0.25, prefill_s=0.5, decode_s=0.125
    )
    request.on_output(last)
    submit = Submit(request_id="a", prompt_token_ids=[1], sampling=ResolvedSampling(max_tokens=2))
    times = request.on_end("length", submit, last, num_tokens=2, energy=RequestEnergy())
    assert times == ChoiceTimes(
        time_to_first_token_s=1.75, queue_s=0.25, prefill_s=0.5, decode_s=0.125
    )
    aborted = request.on_end("abort", submit, None, num_tokens=0, energy=RequestEnergy())
    assert aborted is None
