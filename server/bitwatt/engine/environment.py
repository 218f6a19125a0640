"""What this process's environment says of engine processes: what they inherit, and where."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["engine_environment", "runtime_folders"]

# OpenMP's threads spin for milliseconds after each of torch's parallel regions and so keep the
# kernels' own threads off the cores: a step of 8 tokens through 10 layers of the 2B4T shape and its
# head took 30 ms instead of 23 on two Zen 5 cores, its 16-bit twin's 57 to 64 instead of 54. Beside
# two busy programs `bitwatt inspect` took 9.2 s instead of 3.4. It is read when torch is loaded.
_OPENMP = {
    "GOMP_SPINCOUNT": "20000",  # GCC's library, which torch's wheels for Linux bring: some 50 µs
    "OMP_WAIT_POLICY": "passive",  # any other
}


def engine_environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of a process that computes with torch; what the user has set stands.

    inherited  None takes this process's own
    """
    inherited = os.environ if inherited is None else inherited
    has_policy = any(name in inherited for name in _OPENMP)
    return ({} if has_policy else _OPENMP) | dict(inherited)


def runtime_folders() -> list[Path]:
    """Return where short-lived files may go, best first: the user's choice, then the system's."""
    chosen = [os.environ.get(name) for name in ("TMPDIR", "XDG_RUNTIME_DIR")]
    common = ["/tmp", "/var/tmp", "/dev/shm"]  # noqa: S108 - what is made there is private
    return [Path(folder) for folder in (*chosen, *common) if folder]
