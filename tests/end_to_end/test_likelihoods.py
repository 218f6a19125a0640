"""The embedded pair scores texts over HTTP as `bitwatt eval` does in its own process."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from bitwatt import LLM
from bitwatt.builtin import TERNARY
from bitwatt.evaluation.perplexity import score_texts
from tokenizers import Tokenizer

from tests.end_to_end.conftest import Server

pytestmark = pytest.mark.slow

LONG = (Path(json.__file__).parent / "decoder.py").read_text()[:3000]
TEXTS = [LONG, "def main():\n    return 0\n", "Größe, 你好 🙂\n"]


def compare_quality(url: str, path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitwatt", "compare", url, url, "--quality", str(path)]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)


def test_compare_finds_the_bits_a_byte_that_eval_does(server: Server, tmp_path: Path):
    """A text shorter than a window is scored whole by both, after BOS."""
    path = tmp_path / "texts.jsonl"
    texts = [LONG[:300], *TEXTS[1:]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = compare_quality(server.url, path, "--json", str(tmp_path / "q.json"))
    assert done.returncode == 0, done.stderr
    assert "builtin against builtin-twin: 3 texts" in done.stdout
    quality = json.loads((tmp_path / "q.json").read_text())["quality"]
    with LLM(TERNARY) as llm:
        scored = score_texts(llm, TERNARY, texts, length=256)
    assert quality["a"]["num_tokens"] == quality["b"]["num_tokens"] == len(scored.token_ids)
    assert quality["a"]["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert quality["a"]["bits_per_byte"] == pytest.approx(scored.bits_per_byte, rel=1e-6)
    assert quality["b"]["bits_per_byte"] != quality["a"]["bits_per_byte"]
    assert 0 < quality["top_1_agreement"] < 1


def test_compare_names_the_line_that_is_longer_than_the_context(server: Server, tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("short\n" + "import os, sys; " * 500 + "\n")
    done = compare_quality(server.url, path)
    assert done.returncode == 1
    assert f"bitwatt compare: {path}, line 2: builtin: 400: " in done.stderr
    assert "--max-model-len" in done.stderr


def harness_windows(
    token_ids: list[int], prefix: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield context and continuation of each of a text's requests.

    As lm-evaluation-harness has them for API models with `max_length` (0.4.13,
    `loglikelihood_rolling`, `get_rolling_token_windows`, `make_disjoint_window`): a token of
    max_length is left for generation and one for the context, every token is predicted once, and
    the context is what its window has room for before the tokens to predict.
    """
    size = max_length - 2
    yield [prefix], token_ids[:size]
    for start in range(size, len(token_ids), size):
        end = min(start + size, len(token_ids))
        given = token_ids[max(end - size - 1, 0) : end - 1]
        predicted = token_ids[start:end]
        yield given[: len(given) - len(predicted) + 1], predicted


def test_a_harness_finds_the_perplexity_that_eval_does(server: Server):
    """Requests and sums as those of lm-evaluation-harness's `local-completions`."""
    tokenizer = Tokenizer.from_file(str(TERNARY / "tokenizer.json"))
    bos = tokenizer.encode("").ids[0]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    windows = [pair for ids in encoded for pair in harness_windows(ids, bos, max_length=258)]
    assert [len(predicted) for _, predicted in windows[:2]] == [256, 256]
    total = 0.0
    for start in range(0, len(windows), 8):
        batch = windows[start : start + 8]
        body = {
            "model": "builtin",
            "prompt": [[*context, *predicted] for context, predicted in batch],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        for choice, (context, predicted) in zip(choices, batch, strict=True):
            logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
            assert len(logprobs) == len(predicted)
            total += sum(logprobs)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    bits_per_byte = -total / num_bytes / math.log(2)
    with LLM(TERNARY) as llm:
        scored = score_texts(llm, TERNARY, TEXTS, length=256)
    assert len(scored.token_ids) == sum(map(len, encoded))
    assert scored.bits_per_byte == pytest.approx(bits_per_byte, rel=0.005)
    assert scored.perplexity == pytest.approx(math.exp(-total / sum(map(len, encoded))), rel=0.005)
