"""The few PromQL phrases that the dashboards' queries are made of."""

from deploy.grafana.panels import Variable

__all__ = [
    "SCOPE",
    "STANDARD_VARIABLES",
    "TARGET",
    "gauge",
    "increase",
    "quantile",
    "rate",
    "ratio",
]

SCOPE = 'job=~"$job",model_name=~"$model_name",instance=~"$instance"'
"""Labels of the models that the variables choose."""

TARGET = 'job=~"$job",instance=~"$instance"'
"""Labels of the servers that the variables choose, for series that no model has."""

STANDARD_VARIABLES = (
    Variable(name="job", label="Job", query="label_values(bitwatt_engine_up, job)"),
    Variable(
        name="model_name",
        label="Model",
        query='label_values(bitwatt_engine_up{job=~"$job"}, model_name)',
    ),
    Variable(
        name="instance",
        label="Instance",
        query='label_values(bitwatt_engine_up{job=~"$job",model_name=~"$model_name"}, instance)',
    ),
)


def gauge(metric: str, aggregate: str = "sum", scope: str = SCOPE) -> str:
    """Return a model's value now, over all servers: their sum, max, min or avg."""
    return f"{aggregate} by (model_name) ({metric}{{{scope}}})"


def rate(metric: str, scope: str = SCOPE, by: str = "model_name") -> str:
    """Return the counter's sum a second."""
    return f"sum by ({by}) (rate({metric}{{{scope}}}[$__rate_interval]))"


def increase(metric: str, scope: str = SCOPE, by: str = "model_name") -> str:
    """Return by how much the counter's sum grew in the time that the dashboard shows."""
    return f"sum by ({by}) (increase({metric}{{{scope}}}[$__range]))"


def ratio(numerator: str, denominator: str) -> str:
    """Return the quotient, with no value where the denominator is not above zero."""
    return f"{numerator} / ({denominator} > 0)"


def quantile(q: float, histogram: str, scope: str = SCOPE, by: str = "model_name") -> str:
    """Return a quantile of a histogram; NaN where nothing was observed."""
    buckets = rate(f"{histogram}_bucket", scope, f"le, {by}")
    return f"histogram_quantile({q}, {buckets})"
