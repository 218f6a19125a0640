"""A quality twin and a model that was ternarized while loading, served for real."""

import httpx
import pytest
from bitwatt import builtin

from tests.end_to_end.conftest import Server, start_server, stop_server

pytestmark = pytest.mark.slow

BODY = {
    "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
    "max_tokens": 24,
    "temperature": 0,
}


def test_a_quantized_model_is_served_beside_what_it_was_made_of(server: Server) -> None:
    flags = ("--quantize", "--twin", str(builtin.FP16), "--served-model-name", "x")
    started = start_server(str(builtin.FP16), *flags, "--kv-cache-bytes", "64M")

    def answer(url: str, model: str, **headers: str) -> object:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=BODY | {"model": model}, headers=headers, timeout=60
        )
        return reply.raise_for_status().json()["choices"]

    try:
        cards = httpx.get(f"{started.url}/v1/models").json()["data"]
        assert [(c["id"], c["root"], c["weights"]) for c in cards] == [
            ("x", "fp16", "ternary"),
            ("x-twin", "fp16", "dense"),
        ]
        assert cards[0]["quantized"].endswith("quality is not that of a trained ternary model")
        assert cards[1]["quantized"] is None
        state = httpx.get(f"{started.url}/bitwatt/v1/comparison").json()
        assert [model["name"] for model in state["models"]] == ["x", "x-twin"]
        assert state["models"][0]["engine"]["quantized"] == cards[0]["quantized"]
        assert answer(started.url, "x-twin") == answer(server.url, "builtin-twin")
        assert answer(started.url, "x", **{"X-Bitwatt-Shadow": "1"})
        assert started.logged("quality is not that of a trained ternary model") == 1
    finally:
        assert stop_server(started) == 0
