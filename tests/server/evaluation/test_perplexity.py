"""Texts are scored in documented windows, each token once, as the trainer's own model has them."""

import math
from pathlib import Path

import pytest
import torch
from bitwatt import LLM
from bitwatt.evaluation.perplexity import Likelihood, agreement, score_texts, windows
from bitwatt.evaluation.report import Work, as_markdown, evaluate
from bitwatt.training.export import export, round_as_exported
from bitwatt.training.model import LanguageModel
from bitwatt.training.tokenizer import train_tokenizer

from tests.server.training.factories import make_training_config

TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(60)]


def make_exported(folder: Path, architecture="ternary") -> LanguageModel:
    config = make_training_config(
        architecture, hidden_size=64, intermediate_size=128, head_dim=16, max_position=1024
    )
    model = LanguageModel(config, seed=5)
    export(model, train_tokenizer(TEXTS, vocab_size=280), folder)
    round_as_exported(model)
    return model


def test_every_token_is_predicted_once_from_what_fills_its_window():
    assert list(windows([1, 2, 3, 4, 5, 6, 7], prefix=9, length=3)) == [
        ([9, 1, 2, 3], 3),
        ([3, 4, 5, 6], 3),
        ([4, 5, 6, 7], 1),
    ]
    assert list(windows([1, 2], prefix=9, length=3)) == [([9, 1, 2], 2)]
    assert list(windows([], prefix=9, length=3)) == []


def test_agreement_counts_places_and_needs_the_same_tokens():
    one = Likelihood(4, [1, 2, 3, 4], [-1.0] * 4, [1, 1, 1, 1])
    other = Likelihood(4, [1, 2, 3, 4], [-1.0] * 4, [1, 1, 1, 2])
    assert agreement(one, other) == 0.75
    assert agreement(one, Likelihood(1, [1], [-1.0], [1])) == 1
    assert agreement(one, Likelihood(1, [2], [-1.0], [1])) is None
    assert one.perplexity == pytest.approx(math.e)
    assert one.bits_per_byte == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize("architecture", ["ternary", "binary"])
def test_the_likelihood_of_a_text_is_the_trainers(architecture, tmp_path):
    """The same windows through the trainer's float32 model and through the served weights."""
    model = make_exported(tmp_path, architecture)
    with LLM(tmp_path, dtype="float32") as llm:
        served = score_texts(llm, tmp_path, TEXTS[:3], length=16)
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    expected = []
    for text in TEXTS[:3]:
        [bos, *ids] = tokenizer.encode(text).ids
        for given, num_scored in windows(ids, bos, 16):
            with torch.no_grad():
                logits = model(torch.tensor([given[:-1]]))[0]
            odds = logits.log_softmax(-1)[range(len(given) - 1), given[1:]]
            expected += odds[-num_scored:].tolist()
    assert served.num_bytes == sum(len(text.encode()) for text in TEXTS[:3])
    assert len(expected) == len(served.logprobs)
    assert served.logprobs == pytest.approx(expected, abs=2e-2)
    assert -sum(expected) / len(expected) == pytest.approx(served.nats_per_token, rel=1e-3)


@pytest.mark.slow
def test_the_table_has_the_model_its_weights_in_16_bits_its_twin_and_their_agreement(tmp_path):
    make_exported(tmp_path / "ternary")
    make_exported(tmp_path / "twin", "llama")
    work = Work(texts=TEXTS[:4], window_tokens=32, every=100, num_threads=1)
    tables = evaluate(tmp_path / "ternary", tmp_path / "twin", work, lambda _: None)
    rows = tables["models"]
    assert list(rows) == [
        "ternary",
        "ternary weights in 16 bits",
        "ternary, int8 KV cache",
        "16-bit twin",
        "16-bit twin, int8 KV cache",
    ]
    assert [row["kv_cache_dtype"] for row in rows.values()] == [
        *("bfloat16", "bfloat16", "int8", "bfloat16", "int8")
    ]
    assert rows["ternary"]["weights_bytes"] < rows["16-bit twin"]["weights_bytes"]
    for row in rows.values():
        assert 100 < row["perplexity"] < 1000  # of 280 tokens, untrained
        assert row["answers"]["phrasings"] == {"num_right": 0, "num_asked": 5, "share": 0.0}
        assert row["tokens_per_s"]["1"]["n"] == 1  # of a quick look
    by_pair = {(row["of"], row["with"]): row["top_1"] for row in tables["agreement"]}
    assert by_pair["ternary", "ternary weights in 16 bits"] > 0.8
    assert by_pair["ternary", "16-bit twin"] < 0.5
    for name in ("ternary", "16-bit twin"):
        assert by_pair[name, f"{name}, int8 KV cache"] > 0.8
    assert by_pair[rows["ternary"]["backend"], "reference"] > 0.95
    text = as_markdown(tables)
    assert "| ternary (" in text
    assert "in windows of 32" in text


@pytest.mark.slow
def test_a_model_of_dense_weights_is_evaluated_as_such(tmp_path):
    make_exported(tmp_path, "llama")
    work = Work(texts=TEXTS[:2], window_tokens=32, every=100, num_threads=1)
    tables = evaluate(tmp_path, None, work, lambda _: None)
    assert list(tables["models"]) == ["16-bit", "16-bit, int8 KV cache"]
    [pair] = tables["agreement"]
    assert (pair["of"], pair["with"]) == ("16-bit", "16-bit, int8 KV cache")
