"""The paper's tables as Markdown, a row a size, each figure beside the paper's own."""

from typing import Any

__all__ = ["paper_as_markdown"]

_SIZES_HEAD = (
    "| size | layers run | weights, GB | memory, GB | paper, GB | ms a token | of the floor "
    "| paper, ms |\n|---|--:|--:|--:|--:|--:|--:|--:|"
)
_KEY = (
    "Memory is the process's, with the libraries' and a KV cache. *: fewer layers were run, and "
    "the figure is the line through two depths, continued to all layers. The floor is the time "
    "that reading the weights takes at the rate measured here."
)
_GAINS_HEAD = (
    "| size | beside | weights | memory | paper | latency | paper | energy, measured "
    "| energy, arithmetic | paper |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def paper_as_markdown(tables: dict[str, Any]) -> str:
    """Return what `bench_paper` returned, to read. A * marks what is extrapolated."""
    machine = tables["machine"]
    ran = (
        f"{machine['num_cpus']} processors of {machine['cpu']}, bfloat16 activations, random "
        f"weights, the best of {tables['effort']['repeats']} rounds; bitwatt "
        f"{machine['versions']['bitwatt']}, commit {machine['commit'] or 'unknown'}. The paper "
        "(arXiv:2402.17764) ran on GPUs: compare gains, not figures."
    )
    parts = [
        "# The paper's tables on this machine",
        ran,
        "## Memory and latency (its table 1)",
        _sizes(tables["sizes"]),
        _KEY,
        "## Gains",
        _gains(tables),
        _energy(tables["energy"]),
        "## Batch and throughput (its table 3)",
        _throughput(tables["throughput"]),
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(rows: dict[str, Any]) -> str:
    lines = [_SIZES_HEAD]
    told: set[str] = set()
    for name, row in rows.items():
        paper = row["paper"]
        kinds = [("dense", f"LLaMA {paper['dense_size']}"), ("ternary", f"b1.58 {name}")]
        for kind, label in kinds:
            if label in told:
                continue
            told.add(label)
            papers = f"{paper[f'{kind}_gb']:.2f}", f"{paper[f'{kind}_ms']:.2f}"
            if "unavailable" in row:
                cells = [label, row["unavailable"], "", "", papers[0], "", "", papers[1]]
            else:
                one = row[kind]
                star = "*" if one["is_extrapolated"] else ""
                memory = one["memory_gb"]
                step_ms = one["decode_ms"]["1"]
                cells = [
                    label,
                    f"{one['num_layers_run']} of {one['num_layers']}",
                    f"{one['weights_gb']:.2f}",
                    "unknown" if memory is None else f"{memory:.2f}{star}",
                    papers[0],
                    f"{_number(step_ms)}{star}",
                    "" if step_ms is None else f"{100 * one['floor_ms'] / step_ms:.0f}%",
                    papers[1],
                ]
            lines.append(_line(cells))
    return "\n".join(lines)


def _gains(tables: dict[str, Any]) -> str:
    lines = [_GAINS_HEAD]
    for name, row in tables["sizes"].items():
        paper, gain = row["paper"], row.get("gain", {})
        is_exact = not any(row.get(k, {}).get("is_extrapolated") for k in ("ternary", "dense"))
        star = "" if is_exact else "*"
        lines.append(
            _line(
                [
                    f"b1.58 {name}",
                    f"LLaMA {paper['dense_size']}",
                    _times(gain.get("weights")),
                    _times(gain.get("memory"), star),
                    _times(paper["memory_gain"]),
                    _times(gain.get("latency"), star),
                    _times(paper["latency_gain"]),
                    _times(gain.get("energy"), star),
                    _times(tables["energy"]["arithmetic"][name]["linears"], digits=1),
                    _times(tables["energy"]["paper"]["arithmetic"], digits=1),
                ]
            )
        )
    return "\n".join(lines)


def _energy(energy: dict[str, Any]) -> str:
    measured = (
        f"Energy was not measured: {energy['unavailable']}."
        if "unavailable" in energy
        else f"Energy is {energy['device']}'s, read from {energy['source']}."
    )
    with_attention = [one["with_attention_at_512"] for one in energy["arithmetic"].values()]
    return (
        f"{measured} The paper's 71.4× is arithmetic: a 16-bit multiplication and addition, 0.34 + "
        "0.16 pJ, over an int8 addition, 0.007 pJ, at 7 nm. With attention over 512 tokens, which "
        f"stays in 16 bits, the same arithmetic gives {min(with_attention):.0f} to "
        f"{max(with_attention):.0f}×; neither counts what moving the weights takes."
    )


def _throughput(table: dict[str, Any]) -> str:
    paper, largest = table["paper"], table["largest_batch"]
    size, batch = table["size"], table["batch"]
    lines = [f"| {size} | LLaMA | b1.58 | gain | paper's |", "|---|--:|--:|--:|--:|"]
    if "unavailable" in table:
        lines.append(_line([f"tokens/s at batch {batch}", table["unavailable"], "", "", ""]))
    else:
        dense, ternary, gain = table["dense"], table["ternary"], table["gain"]
        rates = table["tokens_per_s"]
        layers = [f"{one['num_layers_run']} of {one['num_layers']}" for one in (dense, ternary)]
        lines += [
            _line(["layers run", *layers, "", ""]),
            _line(
                [
                    "weights, GB",
                    f"{dense['weights_gb']:.1f}",
                    f"{ternary['weights_gb']:.1f}",
                    _times(dense["weights_gb"] / ternary["weights_gb"]),
                    "",
                ]
            ),
            _line(
                [
                    "ms a token, batch 1",
                    _starred(dense, _number(dense["decode_ms"]["1"])),
                    _starred(ternary, _number(ternary["decode_ms"]["1"])),
                    _times(gain["latency"]),
                    _times(paper["latency_gain"]),
                ]
            ),
            _line(
                [
                    f"tokens/s, batch {batch} of both",
                    _starred(dense, _number(rates["dense"])),
                    _starred(ternary, _number(rates["ternary"])),
                    _times(gain["throughput"]),
                    "",
                ]
            ),
        ]
    papers_rate = paper["ternary_tokens_per_s"] / paper["dense_tokens_per_s"]
    lines += [
        _line(
            [
                "tokens/s at its largest batch, paper",
                f"{paper['dense_tokens_per_s']:.0f}",
                f"{paper['ternary_tokens_per_s']:.0f}",
                "",
                _times(papers_rate),
            ]
        ),
        _batches("largest batch in this machine's memory, computed", largest["here"], ""),
        _batches(
            f"largest batch in {paper['memory_gb']:.0f} GB, computed",
            largest["paper"],
            f"{paper['dense_batch']} → {paper['ternary_batch']}",
        ),
    ]
    return "\n".join(lines) + (
        f"\n\nDecode steps have {table['context_tokens']} tokens of context here, the paper's "
        f"{paper['context_tokens']}. A largest batch is what the weights leave of the memory, over "
        f"the KV cache of {paper['context_tokens']} tokens with {table['num_kv_heads']} heads of "
        "keys and values; the paper doesn't say how many its model has."
    )


def _batches(label: str, largest: dict[str, int], papers: str) -> str:
    shown = [str(largest[kind] or "doesn't fit") for kind in ("dense", "ternary")]
    gain = _times(largest["ternary"] / largest["dense"]) if largest["dense"] else ""
    return _line([label, *shown, gain, papers])


def _starred(figures: dict[str, Any], shown: str) -> str:
    return f"{shown}*" if figures["is_extrapolated"] else shown


def _number(value: float | None) -> str:
    if value is None:
        return "rounds too uneven"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(ratio: float | None, star: str = "", digits: int = 2) -> str:
    return "unavailable" if ratio is None else f"{ratio:.{digits}f}×{star}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
