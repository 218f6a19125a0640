"""Memory while a model loads, and what inspect foretold of it beside what the engine reports.

A model of random weights in the paper's 700M shape is written as a packed Hugging Face folder, as
one in bfloat16, and as GGUF files; each is loaded in a process of its own, which is asked for its
anonymous memory all along. Pages of the mapped files are not in that: the system takes them back.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from bitwatt_kernels.packing import VALID_BYTES
from safetensors.torch import save_file
from torch import Tensor

from bitwatt import builtin
from bitwatt.checkpoints.conversion import convert, convert_to_gguf
from bitwatt.checkpoints.registry import open_checkpoint
from bitwatt.checkpoints.survey import Survey
from bitwatt.engine.build import build_engine
from bitwatt.engine.forecast import forecast
from bitwatt.engine.messages import EngineConfig, MemoryUse
from bitwatt.engine.process_memory import rss_anon_bytes
from bitwatt.model.config import Weights, weights_named
from bitwatt.model.presets import PRESETS
from bitwatt.text.gguf_vocabulary import check_gguf_text, gguf_text

__all__ = ["Loading", "bench_loading"]

_PRESET = "700M"
_KV_CACHE_BYTES = 20 << 20
_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """One model's memory, bytes.

    payload_bytes   weights as the engine holds them
    peak_bytes      most of the process's own while it built the engine, its start's taken off; a
                    small KV cache is in it
    reported_bytes  weights and KV cache, as the engine reports
    forecast_bytes  the same, as inspect foretells
    """

    source: str
    weights: Weights
    payload_bytes: int
    peak_bytes: int
    peak_ratio: float
    reported_bytes: int
    forecast_bytes: int


def bench_loading() -> list[dict[str, Any]]:
    """Return what each file and kind of weights took."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = _write(Path(scratch))
        return [
            asdict(_measure(name, path, weights))
            for name, (path, kinds) in sources.items()
            for weights in kinds
        ]


def _measure(name: str, path: Path, weights: Weights) -> Loading:
    command = [sys.executable, "-m", "bitwatt.bench.loading", str(path), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    told = json.loads(done.stdout.splitlines()[-1])
    use = msgspec.convert(told["memory"], MemoryUse)
    payload = _bytes_of(use) - use.kv_cache_bytes
    foretold, _ = forecast(Survey(open_checkpoint(path)), _config(path, weights, told["backend"]))
    return Loading(
        source=name,
        weights=weights,
        payload_bytes=payload,
        peak_bytes=told["peak_bytes"],
        peak_ratio=told["peak_bytes"] / payload,
        reported_bytes=_bytes_of(use),
        forecast_bytes=_bytes_of(foretold),
    )


def _bytes_of(use: MemoryUse) -> int:
    weights = use.packed_weights_bytes + use.embedding_bytes + use.other_weights_bytes
    return weights + use.kv_cache_bytes


def _config(path: Path, weights: Weights, backend: str | None = None) -> EngineConfig:
    return EngineConfig(
        model_path=str(path),
        weights=weights,
        device="cpu",
        backend=backend,
        kv_cache_bytes=_KV_CACHE_BYTES,
        max_model_len=128,
    )


def _load(path: Path, weights: Weights) -> dict[str, Any]:
    """Return the peak of this process's memory while it loads, and what the engine then reports."""
    start = peak = rss_anon_bytes() or 0
    is_done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not is_done.wait(_POLL_S):
            peak = max(peak, rss_anon_bytes() or 0)

    poller = threading.Thread(target=poll)
    poller.start()
    core, info = build_engine(_config(path, weights))
    is_done.set()
    poller.join()
    core.close()
    return {
        "peak_bytes": peak - start,
        "memory": msgspec.to_builtins(info.memory),
        "backend": info.backend,
    }


def _write(folder: Path) -> dict[str, tuple[Path, tuple[Weights, ...]]]:
    """Write the model in each form; return where it is, and by which weights to serve it."""
    packed, dense, tq2_0 = folder / "packed", folder / "bfloat16", folder / "tq2_0.gguf"
    packed.mkdir()
    save_file(dict(_tensors()), packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(_config_json()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(builtin.TERNARY / name, packed / name)
    convert(packed, dense, "bf16")
    convert_to_gguf(
        packed,
        tq2_0,
        "gguf-tq2_0",
        texts=partial(gguf_text, packed),
        check_texts=partial(check_gguf_text, packed),
    )
    both: tuple[Weights, ...] = ("ternary", "dense")
    return {
        "Hugging Face, packed": (packed, both),
        "Hugging Face, bfloat16, exactly ternary": (dense, both),
        "GGUF, TQ2_0": (tq2_0, both),
    }


def _tensors() -> Iterator[tuple[str, Tensor]]:
    config = PRESETS[_PRESET]
    hidden, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    codes = torch.tensor(VALID_BYTES, dtype=torch.uint8)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values = torch.randn(config.vocab_size, hidden, generator=generator)
        yield name, (values * 0.02).bfloat16()
    yield "model.norm.weight", torch.ones(hidden)
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", torch.ones(hidden)
        yield f"{name}.post_attention_layernorm.weight", torch.ones(hidden)
        for linear, rows, columns in (
            *((f"self_attn.{kind}_proj", hidden, hidden) for kind in "qkvo"),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            drawn = torch.randint(len(codes), (rows // 4, columns), generator=generator)
            yield f"{name}.{linear}.weight", codes[drawn]
            yield f"{name}.{linear}.weight_scale", torch.tensor([2.0**-5])


def _config_json() -> dict[str, Any]:
    config = PRESETS[_PRESET]
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_model_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


if __name__ == "__main__":
    print(json.dumps(_load(Path(sys.argv[1]), weights_named(sys.argv[2]))))
