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
import numpy as np
from bitwatt.engine import build
from bitwatt.engine.messages import EngineConfig, Submit
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt_kernels.gpu.persistent import PersistentLayers

if os.environ.get("BITWATT_TEST_ALL") != "1":
    build.warm_up = lambda *_: None  # interpreted, it takes as long as the rest
limits = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "max_model_len": 48}
memory = {"kv_cache_bytes": 4 * 4096, "prefix_caching": False}
persistent_steps = []
run_persistent = PersistentLayers.run


def counted(*arguments):
    persistent_steps.append(1)
    return run_persistent(*arguments)


PersistentLayers.run = counted


def run(core, requests, dropped=None):
    tokens = {name: [] for name in requests}
    logprobs = {name: [] for name in requests}
    for name, (prompt, sampling) in requests.items():
        core.submit(
            Submit(request_id=name, prompt_token_ids=prompt, sampling=ResolvedSampling(**sampling))
        )
    while core.has_work:
        for output in core.step():
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += [entry.sampled for entry in output.logprobs]
            if output.prompt_logprobs is not None:
                values = np.frombuffer(output.prompt_logprobs.values, np.float32)
                logprobs[output.request_id] += values.tolist()
        if dropped in tokens and len(tokens[dropped]) == 2:
            core.abort([dropped])
    core.check_integrity()
    return tokens, logprobs


greedy = {"temperature": 0.0, "max_tokens": 3, "logprobs": 0}
# Of two tokens alone, far apart: a draw hangs on no near tie.
drawn = greedy | {"temperature": 0.8, "top_k": 2, "seed": 3, "logit_bias": {50: 8.0, 100: 7.5}}
# In chunks of 12 tokens, and all but one go on into a second block, of which there are four.
lengths = {"short": 1, "long": 15, "drawn": 14, "dropped": 15}
prompts = {
    name: [(7 * i + j) % 270 + 5 for j in range(length)]
    for i, (name, length) in enumerate(lengths.items())
}
scoring = {"max_tokens": 0, "prompt_logprobs": 0}


def answer(**settings):
    persistent_steps.clear()
    core, _ = build.build_engine(
        EngineConfig(model_path=sys.argv[1], device="cpu", **settings, **limits, **memory)
    )
    tokens, decoded = run(
        core,
        {name: (prompt, drawn if name == "drawn" else greedy) for name, prompt in prompts.items()},
        dropped="dropped",
    )
    num_preemptions = core.stats().num_preemptions
    whole = {name: prompts[name] + tokens[name] for name in ("short", "long", "drawn")}
    _, scored = run(core, {name: (prompt, scoring) for name, prompt in whole.items()})
    scored = {name: values[-len(tokens[name]) :] for name, values in scored.items()}
    core.close()
    return {
        "tokens": tokens,
        "decoded": decoded,
        "scored": scored,
        "num_preemptions": num_preemptions,
        "num_persistent_steps": len(persistent_steps),
    }


print(json.dumps([answer(**settings) for settings in json.loads(sys.argv[2])]))
"""


def make_folder(folder: Path) -> Path:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(60)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    config = make_training_config(hidden_size=64, intermediate_size=128, head_dim=16)
    export(LanguageModel(config), tokenizer, folder)
    return folder


def generate(folder: Path, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what engines of these settings answer, their kernels interpreted."""
    arguments = [str(folder), json.dumps(settings)]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    answers: list[dict[str, Any]] = json.loads(ran.stdout)
    return answers


@pytest.mark.slow(60 if TEST_ALL else 20)
def test_engine_on_triton_kernels_gives_the_references_tokens(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    persistent = [{"backend": "triton", "persistent_step": True}] if TEST_ALL else []
    expected, *answers = generate(
        folder, {"backend": "reference"}, {"backend": "triton"}, *persistent
    )
    sizes = {name: len(tokens) for name, tokens in expected["tokens"].items()}
    assert sizes == {"short": 3, "long": 3, "drawn": 3, "dropped": 2}
    for ran in (expected, *answers):
        assert ran["scored"] == {name: ran["decoded"][name] for name in ran["scored"]}
        assert ran["num_preemptions"] > 0
    for answer in answers:
        assert answer["tokens"] == expected["tokens"]
        for name, logprobs in expected["decoded"].items():
            assert answer["decoded"][name] == pytest.approx(logprobs, abs=0.05)
    assert [answer["num_persistent_steps"] > 0 for answer in answers] == [False, True][
        : len(answers)
    ]
