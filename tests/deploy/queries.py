"""Every PromQL expression of the repository, by where it stands."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from bitwatt.telemetry.declarations import DECLARATIONS

from deploy.grafana.generate import DASHBOARDS

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

_NAME = re.compile(r"\b(?:up\b|vllm:\w+|bitwatt[_:][\w:]+|DCGM_\w+|http_\w+|process_\w+)")
PROCESS_SERIES = {
    f"process_{what}"
    for what in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds")
}
"""Of prometheus-client's collector, which no declaration has."""


@dataclass(frozen=True)
class PanelQuery:
    """A panel's expression, as the generator has it."""

    dashboard: str
    panel: str
    legend: str
    expr: str
    idle: str

    @property
    def id(self):
        return f"{self.dashboard}: {self.panel}"


def panel_queries():
    return [
        PanelQuery(dashboard.uid, panel.title, query.legend, query.expr, query.idle)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
    ]


def rules(file):
    groups = yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(expr):
    """Return the metrics the expression names."""
    return set(_NAME.findall(re.sub(r"\{[^}]*\}", "", expr)))


def series_names():
    """Return every series the server can have, by the metric it belongs to."""
    return {series: metric.name for metric in DECLARATIONS for series in metric.series}
