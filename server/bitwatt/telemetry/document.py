"""Tells every declared metric as a page."""

from itertools import groupby
from typing import Any

from bitwatt.telemetry.declarations import DECLARATIONS, LABELS, Declaration

__all__ = ["as_markdown"]

_HEAD = """\
# Metrics

`GET /metrics` answers in Prometheus's text format. `vllm:*` have vLLM's names, labels and meanings,
so that what was made for it reads this server unchanged; `DCGM_*` have NVIDIA DCGM's. A scrape
changes nothing. A model's counters and histograms begin at zero and go on across its engine's
restarts. What was never set has no series, as a price that isn't given or energy that isn't
measured; nor has a combination of further labels that never occurred.

A request's times count from when its head came, those between tokens from the token before. A
histogram of times tells a quantile to within the bucket it lies in, of all traffic. `bitwatt
compare` and the page give medians of the requests that they make themselves, warm-up left out:
`compare` as it reads them, the page by the server's clock (`times` in an answer's `usage.bitwatt`).

`http_requests_total` has the class of the status in `status`, as vLLM's has, and the code beside
it. As there, requests that only watch the server are not in it. `process_*` are the API process's
processor time, memory, open files and start, where the system is Linux.

`deploy/prometheus/rules.yml` records what dashboards and alerts share; `energy-and-cost.md` says
how joules are measured and what the formulas are.

*Written by `python -m bitwatt.documentation` from the declarations, and not by hand.*
"""


_NOT_HERE = """\
## Of vLLM's, not here

- `vllm:lora_requests_info`, `vllm:mm_cache_*`: there are no adapters and no images.
- `vllm:spec_decode_num_accepted_tokens_per_pos`: how long a draft is follows from its match.
- `vllm:external_prefix_cache_*`, `vllm:nixl_*`, and `external_kv_transfer` among the sources of
  prompt tokens: no keys and values come from other servers.
- `vllm:prompt_tokens_recomputed`: the block with a prompt's last token is never taken from the
  cache.
- `vllm:corrupted_requests`: a request whose logits aren't finite ends with the reason `error`.
- `vllm:kv_block_*_seconds` and `vllm:estimated_*_per_gpu`, which vLLM has on demand.
- `http_request_duration_highr_seconds`, `http_request_size_bytes`, `http_response_size_bytes` and
  `python_*`, which none of its dashboards asks for.
"""


def as_markdown() -> str:
    """Return the page: a table a group, and what the labels say."""
    parts = [_HEAD]
    for group, declarations in groupby(DECLARATIONS, key=lambda declaration: declaration.group):
        parts.append(f"## {group}\n")
        parts.append("| Metric | Kind | Labels | What |\n|---|---|---|---|")
        parts += [_row(declaration) for declaration in declarations]
        parts.append("")
    parts.append(_NOT_HERE)
    parts.append("## Labels\n")
    parts.append("| Label | What it says |\n|---|---|")
    parts += [f"| `{label}` | {text} |" for label, text in LABELS.items()]
    return "\n".join(parts) + "\n"


def _row(declaration: Declaration[Any]) -> str:
    kind = declaration.kind.__name__.lower()
    name = declaration.name
    if kind == "histogram":
        low, high = declaration.buckets[0], declaration.buckets[-1]
        kind += f", {len(declaration.buckets)} buckets from {low:g} to {high:g}"
    else:
        [name] = declaration.series
    labels = ", ".join(f"`{label}`" for label in declaration.labels)
    return f"| `{name}` | {kind} | {labels} | {declaration.help} |"
