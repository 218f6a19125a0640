"""The kernels of another architecture, compiled across and run in an emulator."""

from pathlib import Path

import pytest

from tests.extent import TEST_ALL
from tests.kernels.cpu.builds import build_library, run

COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow(100)
@pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.needs_program("cmake")
@pytest.mark.needs_program(COMPILER)
@pytest.mark.needs_program("qemu-aarch64")
@pytest.mark.timeout(600)
def test_the_neon_kernels_equal_plain_arithmetic(tmp_path: Path) -> None:
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    library = build_library("aarch64", COMPILER, target)
    program = tmp_path / "cross_check"
    source = str(Path(__file__).parent / "cross_check.cpp")
    rpath = f"-Wl,-rpath,{library.parent}"
    run([COMPILER, "-std=c++20", "-O1", source, str(library), "-o", str(program), rpath])
    out = run(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(program)])
    assert "neon_dotprod" in out
    assert "all equal" in out
