"""Damaged GGUF files end in one typed line, in little memory, whatever is damaged in them."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.errors import CheckpointError
from bitwatt.model.config import Weights
from bitwatt.text.codec import TextCodec
from bitwatt_kernels.registry import choose_backend

from tests.extent import TEST_ALL
from tests.server.checkpoints.corruption import BYTE_CHANGES, VALUES, peak_bytes, reset_peak
from tests.server.checkpoints.gguf_writer import (
    FLOAT_FORMATS,
    TYPE_IDS,
    Raw,
    Stored,
    draw_floats,
    encoded,
    gguf_bytes,
    store,
    store_ternary,
)

NUM_MUTATIONS = 20_000 if TEST_ALL else 400
SPARE_BYTES = 64 << 20
BACKEND = choose_backend(torch.device("cpu"), "torch").backend

VOCABULARY, HIDDEN = 300, 256
_NUMBERS = (0, 1, 3, 255, 1 << 15, 1 << 31, (1 << 32) - 1)
_BIG_NUMBERS = (0, 1, 31, 1 << 20, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1)


@dataclass(frozen=True)
class Parts:
    """What a file is written from, and the weights it is served with."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    weights: Weights

    def data(self) -> bytes:
        return gguf_bytes(self.metadata, self.tensors)


def make_parts(linears: str, tokens: str) -> Parts:
    """Return a model of one layer, its linears in a format, with a vocabulary of a kind."""
    random = np.random.default_rng(0)
    architecture = "bitnet-25" if linears == "TQ2_0" else "llama"
    is_ternary = linears in {"TQ2_0", "I2_S"}

    def linear(rows: int) -> Stored:
        if linears in FLOAT_FORMATS:
            return draw_floats(linears, random, (rows, HIDDEN))
        codes = random.integers(-1, 2, (rows, HIDDEN))
        return store_ternary(
            linears, codes, np.full((1, 1) if linears == "I2_S" else (rows, 1), 0.5)
        )

    norm = store(np.ones(HIDDEN))
    layer = {f"attn_{x}": linear(64 if x in "kv" else HIDDEN) for x in ("q", "k", "v", "output")}
    layer |= {f"ffn_{name}": linear(HIDDEN) for name in ("gate", "up", "down")}
    layer |= {"attn_norm": norm, "ffn_norm": norm}
    if architecture != "llama":
        layer |= {"attn_sub_norm": norm, "ffn_sub_norm": norm}
    embedding = store(random.normal(size=(VOCABULARY, HIDDEN)), "F16")
    tensors = {"token_embd.weight": embedding, "output_norm.weight": norm}
    tensors |= {f"blk.0.{name}.weight": tensor for name, tensor in layer.items()}
    sizes = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": HIDDEN,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 64,
    }
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        **text_of(tokens),
    }
    once = {key: encoded(value) for key, value in metadata.items()}
    return Parts(once, tensors, "ternary" if is_ternary else "dense")


def text_of(kind: str) -> dict[str, Any]:
    types = [3, 3, 3] + [1] * (VOCABULARY - 3)
    common = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.token_type": [Raw(5, kind.to_bytes(4, "little")) for kind in types],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    singles = [chr(0x100 + i) for i in range(VOCABULARY - 13)]
    pairs = [first + second for first, second in zip(singles[:10], singles[10:20], strict=True)]
    tokens = ["<unk>", "<s>", "</s>", *singles, *pairs]
    if kind == "llama":
        scores = [-float(i) for i in range(VOCABULARY)]
        return common | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    merges = [" ".join(pair) for pair in pairs]
    more = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": merges}
    return common | {"tokenizer.ggml.tokens": tokens} | more


@pytest.fixture(scope="module")
def models() -> list[Parts]:
    return [make_parts("TQ2_0", "gpt2"), make_parts("Q6_K", "llama"), make_parts("I2_S", "gpt2")]


def load_within_limits(path: Path, data: bytes, weights: Weights) -> str | None:
    """Return why the file is refused, by the engine or for its text, or None where it's served."""
    path.unlink(missing_ok=True)  # a mapping of what it held may still be there
    path.write_bytes(data)
    reset_peak()
    before = peak_bytes()
    model_bytes = 0
    refusal = None
    try:
        model = load_model(path, weights=weights, backend=BACKEND, dtype=torch.bfloat16)
        memory = model.memory()
        model_bytes = memory.other_weights_bytes + memory.embedding_bytes  # the rotary table's too
        TextCodec.from_folder(path)
    except CheckpointError as error:
        refusal = str(error)
        assert refusal.startswith(str(path))
        assert "\n" not in refusal
        assert len(refusal) < len(str(path)) + 400
    assert peak_bytes() - before <= len(data) + SPARE_BYTES + 2 * model_bytes
    return refusal


def test_the_undamaged_files_are_served(tmp_path: Path, models: list[Parts]) -> None:
    for parts in models:
        assert load_within_limits(tmp_path / "x.gguf", parts.data(), parts.weights) is None


def mutate(random: Random, parts: Parts) -> bytes:
    """Return a file with one to three random changes, of what it's written from or of its bytes."""
    for _ in range(random.randint(0, 2)):
        parts = random.choice((_with_value, _with_tensor))(random, parts)
    data = parts.data()
    for _ in range(random.randint(0, 2)):
        data = random.choice(BYTE_CHANGES)(random, data)
    return data


def _with_value(random: Random, parts: Parts) -> Parts:
    key = random.choice(list(parts.metadata))
    metadata = dict(parts.metadata)
    drawn = random.choice(VALUES)
    match random.randrange(5):
        case 0:
            del metadata[key]
        case 1:
            metadata[key] = random.choice(_NUMBERS)
        case 2 if isinstance(drawn, str | bool) or drawn == []:
            metadata[key] = drawn
        case 3:
            count = random.choice(_BIG_NUMBERS)
            header = struct.pack("<IQ", random.randrange(14), count)
            metadata[key] = Raw(9, header + random.randbytes(random.choice((0, 16, 400))))
        case _:
            metadata[key] = Raw(
                random.randrange(14), random.randbytes(random.choice((1, 4, 8, 60)))
            )
    return replace(parts, metadata=metadata)


def _with_tensor(random: Random, parts: Parts) -> Parts:
    name = random.choice(list(parts.tensors))
    tensors = dict(parts.tensors)
    tensor = tensors[name]
    match random.randrange(4):
        case 0:
            del tensors[name]
        case 1:
            shape = list(tensor.shape)
            shape[random.randrange(len(shape))] = random.choice(_BIG_NUMBERS)
            tensors[name] = replace(tensor, shape=tuple(shape))
        case 2:
            tensors[name] = replace(tensor, type_id=random.choice([*TYPE_IDS.values(), 10, 99]))
        case _:
            tensors[f"{name}x" if random.random() < 0.5 else name[:-1]] = tensors.pop(name)
    return replace(parts, tensors=tensors)


@pytest.mark.slow(150)
@pytest.mark.timeout(900)
def test_mutated_files_are_refused_in_one_typed_line_or_served(
    tmp_path: Path, models: list[Parts]
) -> None:
    random = Random(1)
    num_refused = 0
    for i in range(NUM_MUTATIONS):
        parts = models[i % len(models)]
        data = mutate(random, parts)
        try:
            refusal = load_within_limits(tmp_path / "x.gguf", data, parts.weights)
            num_refused += refusal is not None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            (tmp_path / "failed.gguf").write_bytes(data)
            raise AssertionError(f"mutation {i}: {error!r}") from error
    assert NUM_MUTATIONS // 3 < num_refused < NUM_MUTATIONS
