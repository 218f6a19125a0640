"""What a Grafana dashboard is made of, and its JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DATASOURCE", "Dashboard", "Panel", "Query", "Row", "Variable"]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_SCHEMA_VERSION = 39

Kind = Literal["timeseries", "stat", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the name of what it gives.

    idle  what the tests expect of it: "data" always; "empty" until the server is called, because
          it divides by load; "absent" always, because it shows what is off by default
    """

    expr: str
    legend: str
    idle: Literal["data", "empty", "absent"] = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A titled picture of some queries. The unit is one of Grafana's, and always said.

    if_absent  what stands there where no query has a value
    """

    title: str
    unit: str
    queries: Sequence[Query]
    description: str
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    is_stacked: bool = False
    is_saving: bool = False  # below zero is a loss, and red
    if_absent: str = "no data"

    def as_json(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        """Return the panel at this place of the grid."""
        is_instant = self.kind != "timeseries"
        targets = [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": is_instant,
                "range": not is_instant,
                "format": "table" if self.kind == "table" else "time_series",
            }
            for index, query in enumerate(self.queries)
        ]
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
            "targets": targets,
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "noValue": self.if_absent}
        if self.is_saving:
            defaults["color"] = {"mode": "thresholds"}
            defaults["thresholds"] = {
                "mode": "absolute",
                "steps": [{"color": "red", "value": None}, {"color": "green", "value": 0}],
            }
        if self.kind == "timeseries":
            stacking = {"mode": "normal" if self.is_stacked else "none", "group": "A"}
            custom = {"fillOpacity": 20 if self.is_stacked else 5, "stacking": stacking}
            if self.is_saving:
                custom["thresholdsStyle"] = {"mode": "line"}
            else:
                custom["axisSoftMin"] = 0
            defaults["custom"] = custom
        return defaults

    def _options(self) -> dict[str, Any]:
        match self.kind:
            case "timeseries":
                return {
                    "legend": {
                        "displayMode": "table",
                        "placement": "bottom",
                        "calcs": ["lastNotNull"],
                    },
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }
            case "stat":
                return {
                    "reduceOptions": {"calcs": ["lastNotNull"]},
                    "colorMode": "value",
                    "textMode": "value_and_name",  # one value alone would lose its name
                }
            case "table":
                return {"showHeader": True}


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it, laid out left to right.

    is_collapsed  only the heading is seen, and no query runs, until someone opens it
    """

    title: str
    panels: Sequence[Panel]
    is_collapsed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A choice at the top of a dashboard, of a label's values."""

    name: str
    label: str
    query: str
    is_multi: bool = True

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": self.query, "refId": self.name},
            "refresh": 2,
            "sort": 1,
            "multi": self.is_multi,
            "includeAll": self.is_multi,
            **(
                {"allValue": ".*", "current": {"text": "All", "value": "$__all"}}
                if self.is_multi
                else {}
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Rows of panels under a title."""

    uid: str
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Sequence[Row] = field(default_factory=list)

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]

    def as_json(self) -> dict[str, Any]:
        """Return the whole, as Grafana's provisioning reads it."""
        datasource = {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
        }
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["bitwatt"],
            "schemaVersion": _SCHEMA_VERSION,
            "version": 1,
            "editable": False,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": [datasource, *(v.as_json() for v in self.variables)]},
            "panels": self._laid_out(),
        }

    def _laid_out(self) -> list[dict[str, Any]]:
        placed: list[dict[str, Any]] = []
        panel_id = y = 0
        for row in self.rows:
            panel_id += 1
            heading = {
                "id": panel_id,
                "type": "row",
                "title": row.title,
                "collapsed": row.is_collapsed,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
            }
            y += 1
            under: list[dict[str, Any]] = []
            x = height = 0
            top = y
            for panel in row.panels:
                if x + panel.width > _COLUMNS:
                    x, top, height = 0, top + height, 0
                panel_id += 1
                under.append(panel.as_json(panel_id, x, top))
                x += panel.width
                height = max(height, panel.height)
            if row.is_collapsed:
                placed.append(heading | {"panels": under})
            else:
                placed += [heading | {"panels": []}, *under]
                y = top + height
        return placed
