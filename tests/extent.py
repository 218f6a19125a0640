"""How much of the tests runs: all of it under BITWATT_TEST_ALL=1, as in CI."""

import os

__all__ = ["TEST_ALL"]

TEST_ALL = os.environ.get("BITWATT_TEST_ALL") == "1"
