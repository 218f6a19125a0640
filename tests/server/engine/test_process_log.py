"""What an engine process says reaches the API process's log, in whole lines."""

import asyncio
import logging
import sys
from pathlib import Path

import pytest
from bitwatt.engine.process_log import EngineLog

_SAYS = """if True:
    import faulthandler, logging, os, sys, warnings
    from bitwatt.engine.process_log import log_to_parent
    log_to_parent()
"""


def records_of(caplog: pytest.LogCaptureFixture, program: str) -> list[logging.LogRecord]:
    """Return what is logged of an engine that runs the program."""

    async def scenario() -> None:
        with EngineLog("tiny") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _SAYS + program), stderr=log.writable
            )
            log.close_writable()
            await process.wait()

    asyncio.run(scenario())
    return caplog.records


def test_a_record_arrives_with_its_logger_level_and_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    [record] = records_of(
        caplog,
        """
    try:
        raise ValueError("wör\\ud800d\\nof two lines")
    except ValueError:
        logging.getLogger("bitwatt.engine.core").exception("a step of %d", 3)
    logging.getLogger("bitwatt").info("unseen")
    """,
    )
    assert (record.name, record.levelname) == ("bitwatt.engine.core", "ERROR")
    assert record.getMessage() == "the engine of tiny: a step of 3"
    assert record.exc_text is not None
    assert record.exc_text.startswith("Traceback (most recent call last):\n")
    assert "ValueError: wör\\ud800d" in record.exc_text


def test_what_nobody_catches_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    [record] = records_of(caplog, "import bitwatt.no_such_module\n")
    assert record.levelname == "CRITICAL"
    assert "no_such_module" in record.getMessage()
    assert "Traceback" in (record.exc_text or "")


def test_what_is_printed_and_warned_arrives_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    records = records_of(
        caplog,
        """
    print("[" * 100_000, file=sys.stderr)
    os.write(2, b"one\\n\\n{}\\ntwo \\xff\\n" + b"x" * 300_000 + b"\\nthree")
    """,
    )
    said = [record.getMessage().removeprefix("the engine of tiny: ") for record in records]
    assert said == ["[" * 100_000, "one", "{}", "two \ufffd", "x" * 300_000, "three"]
    assert {record.levelname for record in records} == {"WARNING"}


def test_an_interpreter_that_crashes_says_where(caplog: pytest.LogCaptureFixture) -> None:
    records = records_of(caplog, "faulthandler._sigsegv()\n")
    said = "\n".join(record.getMessage() for record in records)
    assert "Fatal Python error: Segmentation fault" in said


def test_the_pipe_is_closed_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    records_of(caplog, "pass\n")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
