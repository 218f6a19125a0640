"""Every kernel equals the reference in Triton's interpreter, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extent import TEST_ALL

OPS = Path(__file__).parent / "ops"
MODULES = sorted(set(OPS.glob("test_*.py")) - {OPS / "test_on_device.py"})
TRITON_3_6 = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"


@pytest.mark.slow(120)
@pytest.mark.skipif(not TEST_ALL, reason="takes half a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.timeout(600)
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    """All in one process: each would load torch and Triton again, for 3 s."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", TRITON_3_6, *map(str, MODULES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
