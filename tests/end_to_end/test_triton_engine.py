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

from tests.server.training.factories import make_training_config

SCRIPT = """
import json, sys
from bitwatt import LLM, SamplingParams

path, backend = sys.argv[1:]
prompts = [[(7 * i + j) % 270 + 5 for j in range(n)] for i, n in enumerate((1, 30, 19))]
sampling = SamplingParams(max_tokens=5, temperature=0.0, logprobs=0)
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
            "scored": [[entry.logprob for entry in g.prompt_logprobs[-5:]] for g in scored],
        }
    )
)
"""


def make_folder(folder: Path) -> Path:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(60)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    config = make_training_config(hidden_size=64, intermediate_size=128, head_dim=16)
    export(LanguageModel(config), tokenizer, folder)
    return folder


def generate(folder: Path, backend: str, **environment: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, str(folder), backend],
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
    assert [len(tokens) for tokens in expected["tokens"]] == [5, 5, 5]
    assert expected["decoded"] == expected["scored"]
    answer = generate(folder, "triton", TRITON_INTERPRET="1")
    assert answer["tokens"] == expected["tokens"]
    assert answer["decoded"] == answer["scored"]
