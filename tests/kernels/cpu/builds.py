"""Other builds of the native kernels than the installed one, made once for a state of the source.

They lie in build/ of the checkout. Several test processes may ask at once: one builds, the others
wait for it.
"""

import fcntl
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import bitwatt_kernels.cpu
from bitwatt_kernels.cpu.library import LIBRARY_NAME

SOURCE = Path(bitwatt_kernels.cpu.__file__).parent
_BUILDS = Path(__file__).parents[3] / "build" / "tests"


def run(command: list[str], **environment: str) -> str:
    """Return what the command prints; its failure is the test's."""
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def build_library(name: str, compiler: str, options: list[str]) -> Path:
    """Return the library that compiler makes of the source as it is now."""
    digest = sha256(repr((str(SOURCE), options, run([compiler, "--version"]))).encode())
    for path in sorted([SOURCE / "CMakeLists.txt", *(SOURCE / "csrc").iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = _BUILDS / f"{name}-{digest.hexdigest()[:16]}"
    _BUILDS.mkdir(parents=True, exist_ok=True)
    with (_BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LIBRARY_NAME).exists():  # linked last, once all else is there
            return folder / LIBRARY_NAME
        for old in _BUILDS.glob(f"{name}-*"):
            shutil.rmtree(old)
        compile_with = f"-DCMAKE_CXX_COMPILER={compiler}"
        run(["cmake", "-S", str(SOURCE), "-B", str(folder), compile_with, *options])
        run(["cmake", "--build", str(folder), "--parallel", "2"])
        return folder / LIBRARY_NAME
