"""The few PromQL phrases that the dashboards' queries are made of."""

from deploy.grafana.panels import Variable

__all__ = ["SCOPE", "STANDARD_VARIABLES", "quantile", "rate", "ratio"]

SCOPE = 'job=~"$job",model_name=~"$model_name",instance=~"$instance"'
"""Labels of what the variables choose."""

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


def rate(metric: str, scope: str = SCOPE, by: str = "model_name") -> str:
    """Return the counter's sum a second."""
    return f"sum by ({by}) (rate({metric}{{{scope}}}[$__rate_interval]))"


def ratio(numerator: str, denominator: str) -> str:
    """Return the quotient, with no value where the denominator is not above zero."""
    return f"{numerator} / ({denominator} > 0)"


def quantile(q: float, histogram: str, scope: str = SCOPE, by: str = "model_name") -> str:
    """Return a quantile of a histogram; NaN where nothing was observed."""
    buckets = rate(f"{histogram}_bucket", scope, f"le, {by}")
    return f"histogram_quantile({q}, {buckets})"
