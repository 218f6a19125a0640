"""The engine, unchanged, on the Triton kernels under interpretation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bitwatt.training.export import export
from bitwatt.training.model import LanguageModel
from bitwatt.training.tokenizer import train_tokenizer

from tests.extent import TEST_ALL
from tests.server.training.factories import make_training_config

SCRIPT = """
import json, os, sys
from bitwatt import LLM, SamplingParams
from bitwatt.engine import build

if os.environ.get("BITWATT_TEST_ALL") != "1":
    build.warm_up = lambda *_: None  # interpreted, it takes as long as the rest
path, backend = sys.argv[1:3]
num_tokens, *lengths = map(int, sys.argv[3:])
prompts = [[(7 * i + j) % 270 + 5 for j in range(n)] for i, n in enumerate(lengths)]
sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=0)
scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
with LLM(path, backend=backend, device="cpu", **limits) as llm:
    generations = llm.generate(prompts, sampling)
    scored = llm.generate([g.prompt_token_ids + g.token_ids for g in generations], scoring)
print(
    json.dumps(
        {
            "tokens": [g.token_ids for g in generations],
            "decoded": [[entry.sampled for entry in g.logprobs] for g in generations],
            "scored": [
                [entry.logprob for entry in g.prompt_logprobs[-num_tokens:]] for g in scored
            ],
        }
    )
)
"""

# The interpreter takes half a minute for the longer. Of either a prompt comes in several chunks,
# beside tokens that others draw.
NUM_TOKENS, *LENGTHS = (5, 1, 30, 19) if TEST_ALL else (3, 1, 18, 11)


def make_folder(folder: Path) -> Path:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(60)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    config = make_training_config(hidden_size=64, intermediate_size=128, head_dim=16)
    export(LanguageModel(config), tokenizer, folder)
    return folder


def generate(folder: Path, backend: str, **environment: str) -> dict[str, Any]:
    script = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    ran = subprocess.run(
        [*script, str(folder), backend, *map(str, (NUM_TOKENS, *LENGTHS))],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


@pytest.mark.slow
def test_engine_on_triton_kernels_gives_the_references_tokens(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    expected = generate(folder, "reference")
    assert [len(tokens) for tokens in expected["tokens"]] == [NUM_TOKENS] * 3
    assert expected["decoded"] == expected["scored"]
    answer = generate(folder, "triton", TRITON_INTERPRET="1")
    assert answer["tokens"] == expected["tokens"]
    assert answer["decoded"] == answer["scored"]
