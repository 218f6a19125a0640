"""A soak in small: `python -m tests.soak` runs it for hours."""

import pytest

from tests.extent import TEST_ALL
from tests.soak.run import soak


@pytest.mark.slow
def test_mixed_traffic_drops_kills_and_restarts_leave_everything_accounted_for() -> None:
    found = soak(
        60 if TEST_ALL else 6, epoch_s=6, epochs_per_server=6 if TEST_ALL else 1, num_callers=4
    )
    assert found.faults == []
    assert found.engine_kills > 0
    assert found.server_stops > 0
    assert {"answered", "refused"} <= found.ends["builtin-twin"].keys()
    assert {"answered", "dropped"} <= found.ends["builtin"].keys()
