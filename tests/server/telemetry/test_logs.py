"""Log lines: whole JSON objects that name the request and keep its words to themselves."""

import json
import logging

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
def test_the_log_goes_to_standard_error(capsys, style):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("warning", style)
        logging.getLogger("bitwatt.x").info("unseen")
        logging.getLogger("bitwatt.x").warning("seen")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert out == ""
    assert "unseen" not in err
    if style == "text":
        assert "WARNING bitwatt.x: seen" in err
    else:
        assert json.loads(err)["message"] == "seen"
