"""A quality twin and a model that was ternarized while loading, served for real."""

from typing import Any

import httpx
import pytest
from bitwatt import LLM, SamplingParams, builtin

from tests.end_to_end.conftest import start_server, stop_server

pytestmark = pytest.mark.slow

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
    "max_tokens": 24,
    "temperature": 0,
}


def test_a_quantized_model_is_served_beside_what_it_was_made_of() -> None:
    flags = ("--quantize", "--twin", str(builtin.FP16), "--served-model-name", "x")
    started = start_server(
        str(builtin.FP16), *flags, "--kv-cache-bytes", "64M", "--batch-invariant"
    )
    dense = LLM(builtin.FP16, weights="dense", batch_invariant=True, kv_cache_bytes=2**26)

    def answer(model: str, **headers: str) -> str:
        url = f"{started.url}/v1/chat/completions"
        reply = httpx.post(url, json=BODY | {"model": model}, headers=headers, timeout=60)
        content: str = reply.raise_for_status().json()["choices"][0]["message"]["content"]
        return content

    try:
        cards = httpx.get(f"{started.url}/v1/models", timeout=60).json()["data"]
        assert [(c["id"], c["root"], c["weights"]) for c in cards] == [
            ("x", "fp16", "ternary"),
            ("x-twin", "fp16", "dense"),
        ]
        assert cards[0]["quantized"].endswith("quality is not that of a trained ternary model")
        assert cards[1]["quantized"] is None
        state = httpx.get(f"{started.url}/bitwatt/v1/comparison", timeout=60).json()
        assert [model["name"] for model in state["models"]] == ["x", "x-twin"]
        assert state["models"][0]["engine"]["quantized"] == cards[0]["quantized"]
        with dense:
            [expected] = dense.chat(BODY["messages"], SamplingParams(max_tokens=24, temperature=0))
        assert answer("x-twin") == expected.text
        assert answer("x", **{"X-Bitwatt-Shadow": "1"}) != expected.text
        assert started.logged("quality is not that of a trained ternary model") == 1
    finally:
        assert stop_server(started) == 0
