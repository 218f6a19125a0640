"""Requests that go by a grammar: the same tokens whatever else runs, and each failure its own."""

import json
import random
import re

import pytest
from bitwatt.constraints.answer_shapes import AnswerShape, ThinkingShape
from bitwatt.constraints.compiling import written_for_matcher
from bitwatt.constraints.structured_outputs import StructuredOutputsParams
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.model.fake_runner import FakeRunner
from bitwatt.model.sampler import LEAST_LOGPROB
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

from tests.server.constraints.tokens import VOCAB_SIZE, VOCABULARY, written
from tests.server.engine.test_exactness import Limits, make_core, make_model
from tests.server.engine.test_isolation import run_all
from tests.server.model.steps import CPU_BACKENDS

pytestmark = pytest.mark.slow

EOS = 0
REGEX = "[a-f]{3,9}(-[0-9]{2,4})?"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"enum": [1, 22, 333]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
GRAMMARS = [
    written(regex=REGEX),
    None,
    written(json=SCHEMA, disable_any_whitespace=True),
    written(choice=["yes", "no", "never"]),
]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.2, "top_k": 20, "logprobs": 4},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.0, "repetition_penalty": 1.2, "logit_bias": {7: 2.0}},
]


def ready(core):
    core.learn_tokens(VOCABULARY.for_grammars())
    return core


def make_requests(count):
    chance = random.Random(0)
    shared = [chance.randrange(VOCAB_SIZE) for _ in range(40)]
    return [
        Submit(
            request_id=str(i),
            prompt_token_ids=shared[: chance.choice([0, 16, 40])]
            + [chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(1, 20))],
            sampling=ResolvedSampling(
                max_tokens=60,
                seed=i,
                stop_token_ids=(EOS,),
                grammar=GRAMMARS[i % len(GRAMMARS)],
                **SETTINGS[i % len(SETTINGS)],
            ),
        )
        for i in range(count)
    ]


def tokens_of(outputs):
    return {name: [t for o in some for t in o.token_ids] for name, some in outputs.items()}


def text_of(outputs):
    ids = [token for output in outputs for token in output.token_ids]
    return b"".join(VOCABULARY.token_bytes[i] for i in ids).decode()


def check_text(index, outputs):
    if GRAMMARS[index % len(GRAMMARS)] is None:
        return
    assert outputs[-1].finish_reason is FinishReason.STOP, outputs[-1]
    text = text_of(outputs)
    match index % len(GRAMMARS):
        case 0:
            assert re.fullmatch(REGEX, text)
        case 2:
            answer = json.loads(text)
            assert list(answer) == ["name", "n"]
            assert len(answer["name"]) <= 6
            assert answer["n"] in (1, 22, 333)
        case 3:
            assert text in ("yes", "no", "never")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_grammars_tokens_are_the_same_in_a_batch_after_preemption_and_alone(backend):
    """Blocks for a few at once: most are preempted, and share what the prefix cache has."""
    model = make_model(backend)
    requests = make_requests(24 if backend == "native" else 8)
    core = ready(make_core(model, Limits(num_blocks=24, max_num_seqs=16)))
    together = run_all(core, requests)
    assert core.stats().num_preemptions > 0 or backend != "native"
    assert core.stats().num_prefix_cache_hits > 0
    core.close()
    for index, outputs in enumerate(together.values()):
        check_text(index, outputs)
    core = ready(make_core(model, Limits(prefix_caching=False)))
    alone = {}
    for request in requests:
        alone |= run_all(core, [request])
    core.close()
    assert tokens_of(together) == tokens_of(alone)


@pytest.fixture(scope="module")
def core():
    core = ready(make_core(make_model("torch"), Limits()))
    yield core
    core.close()


def submit(name, grammar, **settings):
    given = {"max_tokens": 20, "stop_token_ids": (EOS,), "seed": 1} | settings
    sampling = ResolvedSampling(grammar=grammar, **given)
    return Submit(request_id=name, prompt_token_ids=[5, 6, 7], sampling=sampling)


def test_max_tokens_cuts_an_answer_that_its_grammar_would_go_on_with(core):
    [outputs] = run_all(core, [submit("x", written(regex="[a-z]{90}"))]).values()
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[a-z]+", text_of(outputs))


def test_log_probabilities_are_of_the_tokens_that_the_grammar_allows(core):
    [outputs] = run_all(core, [submit("x", written(choice=["b", "q"]), logprobs=6)]).values()
    [first, end] = [entry for output in outputs for entry in output.logprobs]
    values = [value for _, value in first.top]
    assert sum(2.718281828**value for value in values[:2]) == pytest.approx(1.0, abs=1e-5)
    assert values[2:] == [LEAST_LOGPROB] * 4
    assert end.top[0] == (EOS, pytest.approx(0.0))


def test_a_grammar_that_ends_before_min_tokens_ends_its_answer(core):
    # It was an error, of the server's by its status, though the caller's wishes exclude each other.
    requests = [
        submit("short", written(choice=["b"]), min_tokens=9),
        submit("empty", written(regex=""), min_tokens=9),
        submit("long", written(regex="b*"), min_tokens=9, logit_bias={EOS: 100.0}),
        submit("endless", written(regex=""), min_tokens=9, stop_token_ids=()),
        submit("fine", written(choice=["b"])),
        submit("free", None, stop_token_ids=()),
    ]
    outputs = run_all(core, requests)
    for name, text in {"short": "b", "empty": "", "long": "b" * 9, "fine": "b"}.items():
        assert outputs[name][-1].finish_reason is FinishReason.STOP
        assert text_of(outputs[name]) == text
    assert outputs["endless"][-1].finish_reason is FinishReason.LENGTH
    assert sum(len(o.token_ids) for o in outputs["free"]) == 20


def test_without_a_stop_token_an_ended_grammar_adds_no_text(core):
    [outputs] = run_all(core, [submit("x", written(choice=["b"]), stop_token_ids=())]).values()
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(output.token_ids) for output in outputs) == 20
    assert text_of(outputs) == "b"


def test_what_cant_be_compiled_ends_its_request_alone(core):
    bad = written(regex="b").replace("/b/", "/(b/")
    outputs = run_all(core, [submit("bad", bad), submit("fine", written(regex="b"))])
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "its grammar can't be followed" in outputs["bad"][-1].error
    assert text_of(outputs["fine"]) == "b"


def test_a_request_can_be_aborted_while_its_grammar_is_compiled(core):
    assert core.submit(submit("gone", written(regex="x{2}"))) is None
    assert core.has_work
    assert core.stats().num_waiting == 1
    [output] = core.abort(["gone"])
    assert output.finish_reason is FinishReason.ABORT
    assert not core.has_work


def test_steps_that_end_by_a_stop_string_leave_a_grammars_row_to_the_next(core):
    for name in "abc":
        core.submit(submit(name, written(regex="[a-z]{40}"), max_tokens=60))
        for _ in range(4):
            core.step()
        core.abort([name])
    [outputs] = run_all(core, [submit("x", written(regex="[0-9]{3}"))]).values()
    assert re.fullmatch("[0-9]{3}", text_of(outputs))


def test_the_fake_backend_goes_by_a_grammar_too():
    scheduler = Scheduler(
        BlockAllocator(24, 16), max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256
    )
    core = ready(EngineCore(scheduler, FakeRunner(VOCAB_SIZE), eos_token_ids=[EOS]))
    outputs = run_all(core, make_requests(24))
    core.close()
    for index, some in enumerate(outputs.values()):
        check_text(index, some)


def test_a_grammar_without_its_tokens_is_refused():
    core = make_core(make_model("torch"), Limits())
    refused = core.submit(submit("x", written(regex="a")))
    assert refused is not None
    assert "was not told the tokens" in str(refused.error)
    core.close()


@pytest.mark.parametrize("is_open", [True, False])
def test_thinking_ends_at_its_budget_and_the_answer_goes_by_its_grammar(core, is_open):
    opening, closing = VOCABULARY.special_ids(["<|user|>"]), VOCABULARY.special_ids(["<|system|>"])
    [opening_id], [closing_id] = opening, closing

    def bound(budget):
        shape = AnswerShape(
            thinking=ThinkingShape(
                opening_id=opening_id, closing_id=closing_id, is_open=is_open, max_tokens=budget
            ),
            answer=StructuredOutputsParams(choice=["yes", "no"]).source(),
        )
        return written_for_matcher(shape.source("thinking_token_budget"))

    settings = {"temperature": 1.0, "logit_bias": {} if is_open else {opening_id: 50.0}}
    requests = [
        submit(f"{budget} {seed}", bound(budget), seed=seed, max_tokens=80, **settings)
        for budget in (1, 4, 20)
        for seed in range(3)
    ]
    for name, tokens in tokens_of(run_all(core, requests)).items():
        budget = int(name.split()[0])
        assert tokens[-1] == EOS
        end = tokens.index(closing_id)
        assert tokens[0] == opening_id or is_open
        assert end - (not is_open) <= budget
        answer = b"".join(VOCABULARY.token_bytes[token] for token in tokens[end:]).decode()
        assert answer.lstrip("\n") in ("yes", "no")
