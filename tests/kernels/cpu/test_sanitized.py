"""The native kernels' own tests, on a build with the address and undefined-behaviour sanitizers.

The build has what runs here of the instruction sets, and the AMX kernels over plain loops: their
tiles are tested on every machine.
"""

import sys
from pathlib import Path

import pytest

from tests.extent import TEST_ALL
from tests.kernels.cpu.builds import build_library, run
from tests.kernels.cpu.conftest import available

TESTS = Path(__file__).parent
EMULATED = "amx_emulated"
KINDS = ("linear", "elementwise", "attention", "int8_attention", "layers", "masking", "drawing")
# What it multiplies by tiles; the rest of it is the portable set's, compiled once more.
KINDS_EMULATED = ("linear", "layers")


@pytest.mark.slow(150)
@pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.needs_program("cmake")
@pytest.mark.needs_program("g++")
@pytest.mark.timeout(900)
def test_no_kernel_reads_or_writes_where_it_must_not() -> None:
    """One process for all instruction sets: each would load torch again, sanitized."""
    instruction_sets = [EMULATED, *available()]
    options = [
        *("-DBITWATT_SANITIZE=ON", "-DBITWATT_EMULATE_AMX=ON"),
        f"-DBITWATT_ONLY={';'.join(instruction_sets)}",
    ]
    library = build_library("sanitized", "g++", options)
    emulated = " or ".join(f"test_native_{kind}" for kind in KINDS_EMULATED)
    pytest_options = [
        *("-q", "-x", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-o", "addopts="),
        *("-k", f"not torch.float16 and not 2560 and not 6912 and (not {EMULATED} or {emulated})"),
    ]
    files = [str(TESTS / f"test_native_{kind}.py") for kind in KINDS]
    out = run(
        [sys.executable, "-m", "pytest", *pytest_options, *files],
        BITWATT_TEST_CPU_LIBRARY=str(library),
        BITWATT_TEST_CPU_ISAS=" ".join(instruction_sets),
        BITWATT_TEST_ALL="0",
        LD_PRELOAD=run(["g++", "-print-file-name=libasan.so"]).strip(),
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps what it has
        OMP_NUM_THREADS="1",
    )
    assert "passed" in out
