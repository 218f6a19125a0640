"""The native kernels' own tests, on a build with the address and undefined-behaviour sanitizers.

The build has the AMX kernels too, over plain loops: their tiles are tested on every machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import bitwatt_kernels.cpu
import pytest

SOURCE = Path(bitwatt_kernels.cpu.__file__).parent
TESTS = Path(__file__).parent


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.skipif(
    os.environ.get("BITWATT_TEST_ALL") != "1", reason="takes minutes: BITWATT_TEST_ALL=1 runs it"
)
@pytest.mark.needs_program("cmake")
@pytest.mark.needs_program("g++")
@pytest.mark.timeout(900)
def test_no_kernel_reads_or_writes_where_it_must_not(tmp_path: Path) -> None:
    options = ["-DBITWATT_SANITIZE=ON", "-DBITWATT_EMULATE_AMX=ON", "-DCMAKE_CXX_COMPILER=g++"]
    run(["cmake", "-S", str(SOURCE), "-B", str(tmp_path), *options])
    run(["cmake", "--build", str(tmp_path), "--parallel", "2"])
    kinds = ("linear", "elementwise", "attention", "layers")
    files = [f"test_native_{kind}.py" for kind in kinds]
    pytest_options = [
        "-q",
        "-x",
        "-p",
        "no:faulthandler",
        "-k",
        "not torch.float16 and not 2560 and not 6912",
    ]
    out = run(
        [sys.executable, "-m", "pytest", *pytest_options, *(str(TESTS / name) for name in files)],
        BITWATT_TEST_CPU_LIBRARY=str(tmp_path / "bitwatt_cpu.so"),
        BITWATT_TEST_ALL="0",
        LD_PRELOAD=run(["g++", "-print-file-name=libasan.so"]).strip(),
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps what it has
        OMP_NUM_THREADS="1",
    )
    assert "passed" in out
