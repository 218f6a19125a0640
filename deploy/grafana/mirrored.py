"""A row of the comparison: the same requests on both twins, which --shadow-percent mirrors."""

from deploy.grafana.panels import Panel, Query, Row
from deploy.grafana.promql import gauge, quantile, rate, ratio

__all__ = ["MIRRORED"]

_PAIR = 'job=~"$job",instance=~"$instance",model_name=~"$ternary|$baseline"'
_BY_SIDE = "model_name, mirror_name, side"


def _quantiles(title: str, histogram: str, description: str) -> Panel:
    return Panel(
        title=title,
        unit="s",
        queries=[
            Query(
                quantile(q, histogram, _PAIR, _BY_SIDE),
                f"{{{{model_name}}}} {{{{side}}}} p{q * 100:g}",
                "absent",
            )
            for q in (0.5, 0.95)
        ],
        description=description,
    )


MIRRORED = Row(
    "Mirrored requests, where --shadow-percent asks for them",
    [
        Panel(
            title="Mirrored, by what came of it",
            unit="reqps",
            queries=[
                Query(
                    rate("bitwatt_shadow_requests_total", _PAIR, "model_name, outcome"),
                    "{{model_name}} {{outcome}}",
                    "absent",
                )
            ],
            description="Requests to one twin that were to be sent to the other, too.",
        ),
        Panel(
            title="Mirrors waiting",
            unit="none",
            queries=[
                Query(gauge("bitwatt_shadow_waiting", scope=_PAIR), "{{model_name}}", "absent")
            ],
            description="For the twin's device to be idle. Beyond 16 the oldest is dropped.",
        ),
        Panel(
            title="Agreement of greedy answers",
            unit="percentunit",
            queries=[
                Query(
                    ratio(
                        rate("bitwatt_shadow_text_agreement_sum", _PAIR),
                        rate("bitwatt_shadow_text_agreement_count", _PAIR),
                    ),
                    "{{model_name}}",
                    "absent",
                )
            ],
            description="Mean share of the longer text before the two part; all of it: equal.",
        ),
        Panel(
            title="Tokens of mirrored pairs",
            unit="none",
            queries=[
                Query(
                    rate("bitwatt_shadow_tokens_total", _PAIR, f"{_BY_SIDE}, kind"),
                    "{{model_name}} {{side}} {{kind}}",
                    "absent",
                )
            ],
            description="A second. The mirror's are in its engine's counters, and in no usage.",
        ),
        Panel(
            title="Energy a token of mirrored pairs",
            unit="joule",
            queries=[
                Query(
                    ratio(
                        rate("bitwatt_shadow_energy_joules_total", _PAIR, _BY_SIDE),
                        rate(
                            "bitwatt_shadow_tokens_total",
                            f'{_PAIR},kind="generation"',
                            _BY_SIDE,
                        ),
                    ),
                    "{{model_name}} {{side}}",
                    "absent",
                )
            ],
            description="Measured, of the same requests on both twins; absent where none is.",
        ),
        _quantiles(
            "Time to first token, pair by pair",
            "bitwatt_shadow_time_to_first_token_seconds",
            "The same requests on both twins.",
        ),
        _quantiles(
            "Whole request, pair by pair",
            "bitwatt_shadow_latency_seconds",
            "The same requests on both twins.",
        ),
    ],
    is_collapsed=True,
)
