"""Reading Prometheus's text format."""

import math

from bitwatt.telemetry.declarations import MEMORY
from bitwatt.telemetry.metrics import Metrics
from bitwatt_client.exposition import parse_samples

TEXT = r"""# HELP a_total Things.
# TYPE a_total counter
a_total{model_name="x",kind="k"} 3.0
a_total{model_name="y",kind="k"} 4 1700000000
b 1e-3
c{text="quote \" slash \\ line \n{},="} +Inf # {trace="1"} 2
nonsense
d{x="1"} many
"""


def test_samples_are_found_by_name_and_labels():
    samples = parse_samples(TEXT)
    assert samples.total("a_total") == 7
    assert samples.total("a_total", model_name="y") == 4
    assert samples.total("a_total", model_name="z") is None
    assert samples.total("b") == 0.001
    assert samples.total("d") is None


def test_labels_are_unescaped():
    [sample] = parse_samples(TEXT).find("c")
    assert sample.labels == {"text": 'quote " slash \\ line \n{},='}
    assert sample.value == math.inf


def test_what_the_server_exposes_is_read():
    metrics = Metrics()
    metrics[MEMORY].labels('odd "name"', "packed_weights").set(12)
    body, _ = metrics.render()
    samples = parse_samples(body.decode())
    assert samples.total("bitwatt_memory_bytes", model_name='odd "name"') == 12
