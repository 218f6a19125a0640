"""A soak in small: `python -m tests.soak` runs it for hours."""

import json

import pytest

from tests.extent import TEST_ALL
from tests.soak.run import soak
from tests.soak.table import PAGE, slope_mib_per_hour, written

MACHINE = {"cpu": "a processor", "num_cpus": 2, "commit": "0000000"}


@pytest.mark.slow(90 if TEST_ALL else 20)
def test_mixed_traffic_drops_kills_and_restarts_leave_everything_accounted_for() -> None:
    found = soak(
        60 if TEST_ALL else 6, epoch_s=6, epochs_per_server=6 if TEST_ALL else 1, num_callers=4
    )
    assert found.faults == []
    assert found.engine_kills > 0
    assert found.server_stops > 0
    assert {"answered", "refused"} <= found.ends["builtin-twin"].keys()
    assert {"answered", "dropped"} <= found.ends["builtin"].keys()
    assert (
        found.counted["builtin-twin"]["tokens"] >= found.counted["builtin-twin"]["tokens_read"] > 0
    )
    page = PAGE.read_text()
    told = written(page, json.loads(json.dumps(found.as_json() | {"machine": MACHINE})))
    twin = sum(found.ends["builtin-twin"].values())
    assert f"| requests | {sum(found.ends['builtin'].values()):,} | {twin:,} |" in told
    assert f"{found.engine_kills} engines killed" in told
    assert written(told, found.as_json() | {"machine": MACHINE}) == told
    assert told.endswith(page.partition("<!-- end of table -->")[2])


def test_the_slope_of_memory_is_by_the_hour_and_untold_of_too_few_epochs() -> None:
    at_s = [0.0, 20.0, 40.0, 60.0]
    assert slope_mib_per_hour(at_s, [100.0, 101.0, 102.0, 103.0]) == pytest.approx(180)
    assert slope_mib_per_hour(at_s[:2], [100.0, 101.0]) is None
