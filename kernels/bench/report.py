"""The figures in plain words, beside what they should be."""

from collections.abc import Iterable
from typing import Any

__all__ = ["goals", "headline", "tables"]

# Set for an H200 before anything was measured: speed-ups over 16 bits, and shares of the roofline.
MATMUL_GOALS = {
    "2B4T": {1: 2.5, 8: 2.5, 32: 2.2, 128: 1.6, 1024: 1.5, 4096: 1.7},
    "8192²": {1: 5.0, 8: 4.5, 32: 3.5, 128: 1.8, 1024: 1.6, 4096: 1.8},
}
DECODE_GOALS = {1: 2.5, 8: 2.3, 32: 1.8, 128: 1.3}
PREFILL_GOAL = 1.4
ROOFLINE_GOALS = {"2B4T": 0.45, "7B": 0.60}

_END_TO_END = ("model", "weights", "phase", "batch", "new", "ms", "tok/s", "of roofline")


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with what was measured; goals of what didn't run are left out."""
    found: list[tuple[str, float, float]] = []
    for row in results.get("matmul_summary", []):
        goal = MATMUL_GOALS.get(row["model"], {}).get(row["num_tokens"])
        if goal is not None:
            what = f"matmuls of {row['model']}, {row['num_tokens']} tokens: × bf16"
            found.append((what, goal, row["speedup_over_bf16"]))
    for row in results.get("speedups", []):
        if row["model"] != "2B4T":
            continue
        if row["phase"] == "decode" and row["num_sequences"] in DECODE_GOALS:
            what = f"2B4T decode, batch {row['num_sequences']}: × bf16"
            found.append((what, DECODE_GOALS[row["num_sequences"]], row["speedup"]))
        if row["phase"] == "prefill" and "speedup_launched" in row:
            what = f"2B4T prefill of {row['new_tokens']}, as launched: × bf16"
            found.append((what, PREFILL_GOAL, row["speedup_launched"]))
    for row in results.get("end_to_end", []):
        is_single = row["phase"] == "decode" and row["num_sequences"] == 1
        is_single &= not (row["pdl"] or row["persistent_step"])
        goal = ROOFLINE_GOALS.get(row["model"])
        if is_single and row["weights"] == "ternary" and goal and "roofline_share" in row:
            what = f"{row['model']} decode, batch 1: share of the byte roofline"
            found.append((what, goal, row["roofline_share"]))
    return [
        {"what": what, "goal": goal, "measured": measured, "met": measured >= goal}
        for what, goal, measured in found
    ]


def headline(results: dict[str, Any]) -> str:
    """Return one sentence: one sequence decoded, ternary beside 16 bits, as far as it was measured.

    The models are those that were measured first.
    """
    rows = [
        row
        for row in results.get("end_to_end", [])
        if row["phase"] == "decode" and row["num_sequences"] in (1, 2) and "step" in row
    ]
    if not rows:
        return "No model's step has been measured."
    first = rows[0]
    told = [
        f"{row['weights']} {row['tokens_per_s']:.0f} tok/s ({row['step']['median_s'] * 1e3:.3f} ms)"
        for row in rows
        if row["model"] == first["model"]
        and row["num_sequences"] == first["num_sequences"]
        and not (row["pdl"] or row["persistent_step"])
    ]
    ratio = [
        f"{row['speedup']:.2f}×"
        for row in results.get("speedups", [])
        if row["phase"] == "decode"
        and (row["model"], row["num_sequences"]) == (first["model"], first["num_sequences"])
    ]
    return f"{first['model']} decode, batch {first['num_sequences']}: {', '.join([*told, *ratio])}"


def tables(results: dict[str, Any]) -> str:
    """Return every figure as text, a table a question, the headline first."""
    parts = [_machine(results), headline(results)]
    if "serving_check" in results:
        check = results["serving_check"]
        parts.append(
            f"Serving: {check['num_equal']} of {check['num_tokens']} tokens of "
            f"{check['num_requests']} requests are those of the model run eagerly"
        )
    if "serving" in results:
        parts.append(
            _table(
                "Decode as it is served, scheduler to tokens on the host: milliseconds",
                ["model", "batch", "sampling", "step", "launching it", "tok/s"],
                (
                    [
                        row["model"],
                        row["num_sequences"],
                        ", ".join(f"{k} {v}" for k, v in row["sampling"].items()),
                        f"{row['step']['median_s'] * 1e3:.3f}",
                        f"{row['launch_s'] * 1e3:.3f}",
                        f"{row['tokens_per_s']:.0f}",
                    ]
                    for row in results["serving"]
                ),
            )
        )
    if "matmul_summary" in results:
        parts.append(
            _table(
                "Matmuls of one layer (of one matrix for 8192²), weights cold: microseconds",
                ["model", "tokens", "ternary", "bf16, its best", "speed-up", "of roofline"],
                (
                    [
                        row["model"],
                        row["num_tokens"],
                        f"{row['ternary_s'] * 1e6:.1f}",
                        f"{row['bf16_s'] * 1e6:.1f}",
                        f"{row['speedup_over_bf16']:.2f}×",
                        f"{row['ternary_roofline_share']:.0%}",
                    ]
                    for row in results["matmul_summary"]
                ),
            )
        )
    if "layer_ops" in results:
        parts.append(
            _table(
                "Operations of one ternary layer, and the head, each on its own: microseconds",
                ["operation", "tokens", "µs"],
                (
                    [row["op"], row["num_tokens"], f"{row['median_s'] * 1e6:.1f}"]
                    for row in results["layer_ops"]
                ),
            )
        )
    if "end_to_end" in results:
        parts.append(
            _table(
                "Whole models: a step in milliseconds",
                [*_END_TO_END, "mJ/token", "weights GB", "peak GB", "W", "SM MHz"],
                (_end_to_end_row(row) for row in results["end_to_end"]),
            )
        )
    if results.get("speedups"):
        ratios = ("weight_bytes_ratio", "peak_bytes_ratio", "joules_per_token_ratio")
        parts.append(
            _table(
                "How many times less a ternary model takes than a dense one in bf16",
                ["model", "phase", "batch", "new", "time", "weights", "peak memory", "energy"],
                (
                    [
                        *(row[key] for key in ("model", "phase", "num_sequences", "new_tokens")),
                        f"{row['speedup']:.2f}×",
                        *("" if row[key] is None else f"{row[key]:.2f}×" for key in ratios),
                    ]
                    for row in results["speedups"]
                ),
            )
        )
    if results.get("goals"):
        parts.append(
            _table(
                "Goals, set for an H200",
                ["goal", "wanted", "measured", ""],
                (
                    [
                        row["what"],
                        f"{row['goal']:.2f}",
                        f"{row['measured']:.2f}",
                        "met" if row["met"] else "missed",
                    ]
                    for row in results["goals"]
                ),
            )
        )
    for stage, reason in results.get("skipped", {}).items():
        parts.append(f"Not run: {stage}: {reason}")
    return "\n\n".join(parts)


def _machine(results: dict[str, Any]) -> str:
    machine, rates = results.get("machine", {}), results.get("rates", {})
    lines = [f"{machine.get('gpu', 'no GPU: a rehearsal, whose figures mean nothing')}"]
    units = (
        ("bandwidth_bytes_s", 1e-12, ".2f", "TB/s"),
        ("bf16_ops_s", 1e-12, ".0f", "TFLOP/s in bf16"),
        ("int8_ops_s", 1e-12, ".0f", "TOP/s in int8"),
        ("kernel_s", 1e6, ".2f", "µs an empty kernel in a graph"),
    )
    told = [f"{rates[key] * by:{form}} {unit}" for key, by, form, unit in units if key in rates]
    if told:
        lines.append(f"it sustains {', '.join(told)}")
    if "tests" in results:
        tests = results["tests"]
        lines.append(f"tests: {tests['passed']} passed, {len(tests['failed'])} failed")
        if tests["unfinished"]:
            lines[-1] += f", no end of {', '.join(tests['unfinished'])}"
    return "\n".join(lines)


def _end_to_end_row(row: dict[str, Any]) -> list[object]:
    name = f"{row['weights']}{' + pdl' if row['pdl'] else ''}"
    name += " in one kernel" if row["persistent_step"] else ""
    start: list[object] = [row["model"], name, row["phase"], row["num_sequences"]]
    start.append(row["new_tokens"])
    if "skipped" in row:
        return [*start, row["skipped"], "", "", "", f"{row['weight_bytes'] / 1e9:.2f}", *[""] * 3]
    joules, peak, board = row["joules_per_token"], row["peak_bytes"], row["board"]
    return [
        *start,
        f"{row['step']['median_s'] * 1e3:.3f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['roofline_share']:.0%}",
        "" if joules is None else f"{joules * 1e3:.1f}",
        f"{row['weight_bytes'] / 1e9:.2f}",
        "" if peak is None else f"{peak / 1e9:.2f}",
        *(f"{board[key]:.0f}" if key in board else "" for key in ("watts", "sm_mhz")),
    ]


def _table(title: str, header: list[str], rows: Iterable[list[object]]) -> str:
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells
    ]
    return "\n".join([title, *lines])
