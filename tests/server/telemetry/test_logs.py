"""Log lines: whole JSON objects that name the request and keep its words to themselves."""

import json
import logging
import re
import subprocess
import sys

import pytest
from bitwatt.telemetry.logs import (
    JsonFormatter,
    TextFormatter,
    configure_logging,
    current_request_id,
)

from tests.fakes import FakeEngine, make_app, make_client


@pytest.fixture
def lines(monkeypatch):
    """Lines the server logs while the test runs, from debug on."""
    found = []
    handler = logging.Handler()
    formatter = JsonFormatter()
    handler.emit = lambda record: found.append(formatter.format(record))
    log = logging.getLogger("bitwatt")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield found
    log.removeHandler(handler)
    log.setLevel(level)


def make_record(**changes):
    return logging.makeLogRecord(
        {"name": "bitwatt.x", "levelname": "INFO", "created": 0, **changes}
    )


def test_a_line_is_one_json_object():
    record = make_record(msg="two\nlines, %s", args=("ünïcode",), num_tokens=3)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "bitwatt.x",
        "message": "two\nlines, ünïcode",
        "num_tokens": 3,
    }


def test_an_exception_is_part_of_its_line():
    try:
        raise ValueError("why")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(make_record(msg="failed", exc_info=info))
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: why")


def test_another_process_s_exception_is_part_of_its_line():
    line = JsonFormatter().format(make_record(msg="failed", exc_text="Traceback:\nwhy"))
    assert "\n" not in line
    assert json.loads(line)["exception"] == "Traceback:\nwhy"


def test_a_line_has_the_id_of_the_request_it_belongs_to():
    token = current_request_id.set("abc")
    try:
        assert json.loads(JsonFormatter().format(make_record(msg="x")))["request_id"] == "abc"
        assert TextFormatter().format(make_record(msg="x")).endswith("bitwatt.x: [abc] x")
    finally:
        current_request_id.reset(token)


@pytest.mark.anyio
async def test_a_request_is_one_line_without_its_prompt(lines):
    body = {"model": "tiny", "prompt": "a secret between us"}
    async with make_client(make_app(FakeEngine(reply="the quick brown fox"))) as client:
        answer = await client.post("/v1/completions", json=body, headers={"x-request-id": "call-1"})
        await client.post("/v1/completions", json={"model": "tiny", "prompt": ["a secret", 3]})
    first, second = (json.loads(line) for line in lines)
    assert answer.headers["x-request-id"] == first["request_id"] == "call-1"
    assert (first["method"], first["route"]) == ("POST", "/v1/completions")
    assert (first["status"], second["status"]) == (200, 400)
    assert first["duration_s"] > 0
    assert first["level"] == "info"
    text = "".join(lines)
    assert "secret" not in text
    assert "quick" not in text


@pytest.mark.anyio
async def test_polls_and_pages_are_logged_for_debugging_alone(lines):
    async with make_client(make_app(FakeEngine(is_ready=False, is_healthy=False))) as client:
        for path in ("/health", "/ready", "/metrics", "/version", "/nowhere"):
            await client.get(path)
    levels = {json.loads(line)["route"]: json.loads(line)["level"] for line in lines}
    assert levels.pop("unmatched") == "info"
    assert levels == dict.fromkeys(("/health", "/ready", "/metrics", "/version"), "debug")


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_log_goes_to_standard_error(capfd, style):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("warning", style)
        logging.getLogger("bitwatt.x").info("unseen")
        logging.getLogger("bitwatt.x").warning("seen")
        root.handlers[0].flush()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, err = capfd.readouterr()
    assert out == ""
    assert "unseen" not in err
    if style == "text":
        assert "WARNING bitwatt.x: seen" in err
    else:
        assert json.loads(err)["message"] == "seen"


def test_a_log_that_nobody_reads_holds_nothing_up():
    """A pipe takes 64 KiB, and the write after them would wait for its reader."""
    program = """if True:
        import logging
        from bitwatt.telemetry.logs import configure_logging
        configure_logging("info")
        for i in range(30_000):
            logging.info("%d %s", i, "x" * 100)
        print("done", flush=True)
        input()
        logging.shutdown()
        logging.info("the last")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "done\n"
    lines = process.communicate("go on\n")[1].splitlines()
    assert lines[0].endswith(" 0 " + "x" * 100)
    # Told whenever a line finds room again, which may be before the pipe is full.
    told = [re.search(r" (\d+) lines before this were not read in time", line) for line in lines]
    notices = [int(notice[1]) for notice in told if notice]
    assert notices
    assert lines[-1].endswith("the last")
    assert len(lines) - len(notices) - 1 + sum(notices) == 30_000
