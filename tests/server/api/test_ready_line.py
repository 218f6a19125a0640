"""What the log says of an engine that has started."""

import logging

import pytest

from tests.fakes import FakeEngine, make_app, make_info, run_server

pytestmark = pytest.mark.anyio


async def test_a_size_is_information_and_a_notice_is_a_warning(caplog):
    caplog.set_level(logging.INFO, "bitwatt")
    engine = FakeEngine(info=make_info(notices=["backend native was passed over: not built"]))
    async with run_server(make_app(engine)):
        pass
    said = [(r.levelname, r.message) for r in caplog.records if r.name.startswith("bitwatt.")]
    [ready] = [message for level, message in said if level == "INFO" and "is ready" in message]
    assert "ternary weights" in ready
    assert "KV cache of 0 MiB for 1024 tokens in bfloat16" in ready
    assert [message for level, message in said if level == "WARNING"] == [
        "tiny: backend native was passed over: not built"
    ]
