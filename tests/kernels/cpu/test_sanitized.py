"""The native kernels' own tests, on a build with the address and undefined-behaviour sanitizers.

The build has the AMX kernels too, over plain loops: their tiles are tested on every machine.
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


@pytest.mark.slow(200)
@pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.needs_program("cmake")
@pytest.mark.needs_program("g++")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("instruction_sets", "kinds"),
    [(available(), KINDS), ([EMULATED], KINDS_EMULATED)],
    ids=["of this machine", EMULATED],
)
def test_no_kernel_reads_or_writes_where_it_must_not(
    instruction_sets: list[str], kinds: tuple[str, ...]
) -> None:
    """One process for a machine's instruction sets: each would load torch again, sanitized."""
    options = ["-DBITWATT_SANITIZE=ON", "-DBITWATT_EMULATE_AMX=ON"]
    library = build_library("sanitized", "g++", options)
    pytest_options = [
        *("-q", "-x", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-o", "addopts="),
        *("-k", "not torch.float16 and not 2560 and not 6912"),
    ]
    files = [str(TESTS / f"test_native_{kind}.py") for kind in kinds]
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
