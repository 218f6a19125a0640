"""A served model's steps, measured from outside."""

import pytest
from bitwatt.simulation.measure import measure_server
from bitwatt_client.server import Server, new_http_client

from tests.fakes import FakeEngine, make_app, run_server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("chunk_size", [1, 1000])
async def test_a_decode_whose_answers_came_in_one_piece_is_left_out_and_said(chunk_size):
    """A server that was held up brings them so; it ended the plan in a traceback."""
    told = []
    engine = FakeEngine(chunk_size=chunk_size, delay_s=0.001)
    async with run_server(make_app(engine)) as url, new_http_client(max_connections=8) as http:
        server = Server(http, url, "tiny")
        measured = await measure_server(
            http,
            server,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            lengths=[(8, 8)],
            seconds=2.0,
            report=told.append,
        )
    decodes = [line for line in told if line.startswith("decode ")]
    assert len(decodes) >= 3  # of one and two requests, at a short and a long prompt
    at_once = [line for line in decodes if line.endswith("every answer came at once")]
    assert len(at_once) == (0 if chunk_size == 1 else len(decodes))
    assert measured.name == "tiny"
