"""A benchmark's figures, named as in what `vllm bench serve` writes, as JSON and as a table."""

import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from bitwatt_client.bench import BenchPlan, BenchRun, Failure, Slo
from bitwatt_client.cost import usd_of_rent_per_million_tokens
from bitwatt_client.statistics import quantile
from bitwatt_client.terminal import plural, printable

__all__ = ["bench_as_json", "bench_as_table"]

_LABEL = 38  # columns
_LATE_S = 0.1  # to send a request, beyond which the client can't keep the rate
_PERCENTILES = (90, 95, 99)
_HEADS = tuple(f"p{percent}" for percent in _PERCENTILES)
_METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between chunks",
    "e2el": "end to end",
}


def bench_as_json(
    model: str,
    plan: BenchPlan,
    run: BenchRun,
    slo: Slo,
    *,
    usd_per_hour: float | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """Return every figure. Times of requests in milliseconds, others in seconds.

    usd_per_hour  the machine's rent, where it is known
    details       whether to add what each request took, in the order they were sent
    """
    answers = run.answers
    num_input = sum(answer.num_prompt_tokens for answer in answers)
    num_output = sum(answer.num_tokens for answer in answers)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if plan.api == "chat" else "openai",
        "model_id": model,
        "num_prompts": len(plan.asked),
        "request_rate": "inf" if plan.rate is None else plan.rate,
        "burstiness": plan.burstiness,
        "max_concurrency": plan.concurrency,
        "seed": plan.seed,
        "duration": run.wall_s,
        "completed": len(answers),
        "failed": len(run.failures),
        "cut": run.num_cut,
        "errors_by_kind": _by_kind(run),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(answers) / run.wall_s,
        "request_goodput": None,
        "output_throughput": num_output / run.wall_s,
        "total_token_throughput": (num_input + num_output) / run.wall_s,
        "max_concurrent_requests": run.most_open,
        "max_send_delay_ms": 1e3 * run.send_delay_s,
    }
    if slo.promises_anything:
        num_good = sum(slo.is_met(answer) for answer in answers)
        result["request_goodput"] = num_good / run.wall_s
        limits = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "e2el": slo.e2e_s}
        result["goodput_slo_ms"] = {k: 1e3 * v for k, v in limits.items() if v is not None}
        result["goodput_share"] = num_good / len(plan.asked)
    values = {
        "ttft": [answer.ttft_s for answer in answers],
        "tpot": [answer.tpot_s for answer in answers if answer.tpot_s is not None],
        "itl": [gap_s for answer in answers for gap_s in answer.itl_s],
        "e2el": [answer.e2e_s for answer in answers],
    }
    for name, seconds in values.items():
        result |= _spread_ms(name, seconds)
    result |= _energy_and_cost(run, num_output, usd_per_hour)
    return result | (_details(run) if details else {})


def _spread_ms(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Return mean, median, standard deviation and percentiles; None of what wasn't measured."""
    keys = ["mean", "median", "std", *_HEADS]
    found: list[float | None] = [None] * len(keys)
    if seconds:
        found = [
            statistics.fmean(seconds),
            statistics.median(seconds),
            statistics.pstdev(seconds),
            *(quantile(seconds, percent / 100) for percent in _PERCENTILES),
        ]
    pairs = zip(keys, found, strict=True)
    return {f"{key}_{name}_ms": None if value is None else 1e3 * value for key, value in pairs}


def _by_kind(run: BenchRun) -> dict[str, dict[str, Any]]:
    """Return how many requests failed in each way, with the message of one."""
    counts = Counter(failure.kind for failure in run.failures)
    examples = {failure.kind: failure.message for failure in reversed(run.failures)}
    return {kind: {"count": n, "example": examples[kind]} for kind, n in counts.most_common()}


def _energy_and_cost(
    run: BenchRun, num_output: int, usd_per_hour: float | None
) -> dict[str, float | str | None]:
    answers = run.answers
    joules = [answer.energy_joules for answer in answers if answer.energy_joules is not None]
    costs = [answer.cost_usd for answer in answers if answer.cost_usd is not None]
    has_joules = bool(answers) and len(joules) == len(answers)
    unavailable = None
    if not has_joules:
        reasons = (answer.energy_reason for answer in answers if answer.energy_reason)
        told_of = f"the server told joules of {len(joules)} of {len(answers)} answers"
        unavailable = next(reasons, told_of)
    total = sum(joules) if has_joules else None
    rate = num_output / run.wall_s
    return {
        "total_energy_joules": total,
        "joules_per_output_token": total / num_output if total is not None and num_output else None,
        "energy_unavailable": unavailable,
        "total_cost_usd": sum(costs) if costs and len(costs) == len(answers) else None,
        "usd_per_hour": usd_per_hour,
        "usd_per_million_output_tokens": usd_of_rent_per_million_tokens(usd_per_hour, rate),
    }


def _details(run: BenchRun) -> dict[str, list[Any]]:
    """Return lists by request, as `vllm bench serve --save-detailed` has them: times in seconds."""
    rows: list[tuple[Any, ...]] = []
    for outcome in run.outcomes:
        match outcome:
            case Failure():
                rows.append((0, 0, 0.0, [], "", outcome.message))
            case None:
                rows.append((0, 0, 0.0, [], "", "cut: the time was up"))
            case _:
                lengths = (outcome.num_prompt_tokens, outcome.num_tokens)
                rows.append((*lengths, outcome.ttft_s, list(outcome.itl_s), outcome.text, ""))
    names = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def bench_as_table(result: dict[str, Any]) -> str:
    """Return the figures of `bench_as_json` as lines of text for a terminal."""
    rate, concurrency = result["request_rate"], result["max_concurrency"]
    load = "any number at once" if concurrency is None else f"{concurrency} at once"
    if rate != "inf":
        load = f"{rate:g} a second" + ("" if concurrency is None else f", at most {load}")
    lines = [f"{result['model_id']}: {plural(result['num_prompts'], 'request')}, {load}", ""]

    def add(label: str, value: float | None, unit: str = "", why: str | None = None) -> None:
        shown = f"unavailable: {why}" if value is None else f"{_shown(value)}{unit}"
        lines.append(label.ljust(_LABEL) + shown)

    add("duration", result["duration"], " s")
    add("completed", result["completed"])
    if result["failed"] or result["cut"]:
        add("failed", result["failed"])
        add("cut off by the time limit", result["cut"])
    add("requests", result["request_throughput"], "/s")
    if "goodput_slo_ms" in result:
        limits = ", ".join(f"{name} ≤ {ms:g} ms" for name, ms in result["goodput_slo_ms"].items())
        share = f"{100 * result['goodput_share']:.1f}%"
        add("goodput", result["request_goodput"], f"/s, {share} with {limits}")
    add("prompt tokens", result["total_input_tokens"])
    add("output tokens", result["total_output_tokens"])
    add("output", result["output_throughput"], " tok/s")
    add("output and prompts", result["total_token_throughput"], " tok/s")
    add("open at once, at most", result["max_concurrent_requests"])
    joules, usd = result["joules_per_output_token"], result["usd_per_million_output_tokens"]
    add("energy an output token", joules, " J", result["energy_unavailable"])
    add("rent a million output tokens", usd, " $", "no rent is set (--usd-per-hour)")
    if result["total_cost_usd"] is not None:
        add("cost, as the server says", result["total_cost_usd"], " $")
    columns = ("mean", "median", *_HEADS)
    lines += ["", "milliseconds".ljust(_LABEL) + "".join(head.rjust(10) for head in columns)]
    for name, label in _METRICS.items():
        cells = [result[f"{column}_{name}_ms"] for column in columns]
        shown = ["–" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(label.ljust(_LABEL) + "".join(cell.rjust(10) for cell in shown))
    for kind, told in result["errors_by_kind"].items():
        lines += ["", f"{plural(told['count'], 'request')} failed, {kind}: {told['example']}"]
    if result["max_send_delay_ms"] > 1e3 * _LATE_S:
        late = f"{result['max_send_delay_ms']:.0f} ms"
        lines += ["", f"The client itself sent up to {late} late, which counts in the times above."]
    return printable("\n".join(lines))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.4g}"
