"""The command `bitwatt` within the tests' process: one of its own takes a second to start."""

import asyncio
import io

import pytest
from bitwatt.cli import main

__all__ = ["run_command"]


async def run_command(
    capsys: pytest.CaptureFixture[str], *arguments: str, typed: bytes = b""
) -> tuple[int, str, str]:
    """Return the exit status, standard output and standard error of `bitwatt` and the arguments.

    Runs in a thread, so that a server of the test's own answers it meanwhile.

    typed  what comes by standard input, no terminal
    """

    def run() -> int:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        status = exit_.value.code
        assert isinstance(status, int)
        return status

    with pytest.MonkeyPatch.context() as patch, io.TextIOWrapper(io.BytesIO(typed)) as stdin:
        patch.setattr("sys.stdin", stdin)
        status = await asyncio.to_thread(run)
    return (status, *capsys.readouterr())
