"""An engine's configuration is checked where it is made, and building says why it can't."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bitwatt import LLM, builtin
from bitwatt.engine import build
from bitwatt.engine.build import build_engine, kv_cache_dtype, plan_kv_cache
from bitwatt.engine.messages import _ACCEPTED, EngineConfig, decode_to_engine, encode
from bitwatt.errors import BitwattError, ConfigurationError, EngineStartError
from bitwatt.model.random_weights import random_model
from bitwatt_kernels.cpu import native_backend
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.reference.reference_backend import ReferenceBackend
from bitwatt_kernels.registry import BackendChoice

from tests.factories import make_model_config


def test_weights_of_a_misspelt_name_are_refused_and_not_served_dense() -> None:
    """`weights="ternay"` once served 16 bits without a word."""
    with pytest.raises(ConfigurationError) as error:
        LLM(builtin.TERNARY, weights="ternay")
    assert str(error.value) == (
        "weights is 'ternay'; it is one of ternary, dense, fp16 (--weights)"
    )


def test_every_field_but_the_weights_has_bounds() -> None:
    """Nothing else checks what LLM's callers give."""
    assert _ACCEPTED.keys() == set(EngineConfig.__struct_fields__) - {"weights"}


def test_fp16_is_another_name_of_dense_weights() -> None:
    config = EngineConfig(model_path="m", weights="fp16")
    assert config.weights == "dense"
    assert decode_to_engine(encode(config)) == EngineConfig(model_path="m", weights="dense")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("dtype", "float8", "'float8'; it must be one of bfloat16, float16, float32 (--dtype)"),
        ("head_bits", 4, "4; it must be 8 or 16 (--head-bits)"),
        ("head_bits", 8.0, "8.0; it must be 8 or 16"),
        ("max_num_seqs", 0, "0; it must be a whole number from 1 to 4096 (--max-num-seqs)"),
        ("max_num_seqs", None, "None; it must be a whole number"),
        ("max_num_batched_tokens", "512", "'512'; it must be a whole number"),
        ("max_model_len", True, "True; it must be a whole number of at least 2, or None"),
        ("num_threads", -1, "-1; it must be a whole number from 1 to 1024, or None"),
        ("num_threads", 1_000_000, "1000000; it must be a whole number from 1 to 1024, or None"),
        ("max_num_batched_tokens", 2**62, f"{2**62}; it must be a whole number from 1 to 1048576"),
        ("max_model_len", 1, "1; it must be a whole number of at least 2, or None"),
        ("device", "mps", "'mps'; it must be auto, cpu, cuda or cuda:N (--device)"),
        ("device", "cpu:3", "'cpu:3'; it must be auto, cpu, cuda or cuda:N (--device)"),
        ("cpu_isa", 2, "2; it must be text or None (--cpu-isa)"),
        ("kv_cache_bytes", 1.5, "1.5; it must be a whole number of at least 1, or None"),
        ("kv_cache_dtype", "fp8", "'fp8'; it must be one of auto, bfloat16, float16, int8 (--kv-"),
        ("gpu_memory_utilization", 0, "0; it must be a number above 0, at most 1"),
        ("gpu_memory_utilization", 1.01, "1.01; it must be a number above 0, at most 1"),
        ("gpu_memory_utilization", float("nan"), "nan; it must be a number above 0, at most 1"),
        ("speculate", "medusa", "'medusa'; it must be ngram or off (--speculate)"),
        ("prefix_caching", "no", "'no'; it must be True or False (--prefix-caching)"),
        ("batch_invariant", 1, "1; it must be True or False"),
        ("persistent_step", 1, "1; it must be True or False"),
        ("device", None, "None; it must be auto, cpu, cuda or cuda:N (--device)"),
        ("backend", 3, "3; it must be text or None (--backend)"),
        ("weights", ["ternary"], "['ternary']; it is one of ternary, dense, fp16 (--weights)"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_what_is_accepted_and_the_knob(
    field: str, value: object, accepted: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        EngineConfig(model_path="m", **{field: value})
    assert str(error.value).startswith(f"{field} is {accepted}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_isa": "abacus"}, "instruction set 'abacus'"),
        ({"device": "cuda:99"}, "torch sees [0-9]+ GPUs .--device."),
        ({"backend": "triton", "device": "cpu"}, "triton"),
        ({"kv_cache_bytes": 1}, "--kv-cache-bytes"),
    ],
)
def test_what_the_machine_or_the_kernels_refuse_is_an_error_of_the_start(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineStartError, match=message):
        build_engine(EngineConfig(model_path=str(builtin.TERNARY), **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu9000"}, "--device"),
        ({"backend": "abacus"}, "backend is 'abacus'; it is one of reference.* fake .--backend."),
        ({"max_model_len": 10**9}, "max_model_len is 1000000000; the model takes 2 to 1024"),
        ({"max_num_batched_tokens": 3}, "--max-num-batched-tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_errors_of_the_configuration(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_engine(EngineConfig(model_path=str(builtin.TERNARY), **settings))


def test_a_kv_cache_in_int8_holds_about_twice_the_tokens() -> None:
    config = EngineConfig(
        model_path=str(builtin.TERNARY), kv_cache_bytes=2**22, kv_cache_dtype="int8"
    )
    core, info = build_engine(config)
    core.close()
    core, in_16_bits = build_engine(msgspec.structs.replace(config, kv_cache_dtype="auto"))
    core.close()
    assert (info.kv_cache_dtype, in_16_bits.kv_cache_dtype) == ("int8", "bfloat16")
    assert info.memory.kv_cache_bytes <= 2**22
    assert info.num_blocks > 1.8 * in_16_bits.num_blocks
    assert kv_cache_dtype(config, "triton") == torch.int8
    with pytest.raises(ConfigurationError, match=r"'float16'; the triton .*--kv-cache-dtype"):
        kv_cache_dtype(msgspec.structs.replace(config, kv_cache_dtype="float16"), "triton")
    same = msgspec.structs.replace(config, dtype="float16", kv_cache_dtype="float16")
    assert kv_cache_dtype(same, "triton") == torch.float16


def test_a_head_dim_that_int8_does_not_take_is_refused_with_the_knob(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EngineConfig(
        model_path="", max_model_len=64, max_num_seqs=1, kv_cache_dtype="int8", backend="reference"
    )
    model = random_model(
        make_model_config(head_dim=30, max_model_len=64),
        weights="dense",
        backend=ReferenceBackend(torch.device("cpu")),
        dtype=torch.float32,
        seed=0,
    )
    with pytest.raises(EngineStartError, match=r"head_dim is 30; .* of 4 \(--kv-cache-dtype\)"):
        plan_kv_cache(config, model, torch.int8, None)


def test_all_errors_of_building_are_of_one_tree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for settings in ({"backend": "abacus"}, {"device": "tpu9000"}, {"backend": "fake"}, {}):
        with pytest.raises(BitwattError):
            build_engine(EngineConfig(model_path=str(tmp_path), **settings))


def test_an_engine_that_is_well_has_nothing_to_notice() -> None:
    """The KV cache's size once was a notice, and so logged as a warning at every start."""
    config = EngineConfig(model_path=str(builtin.TERNARY), backend="torch", max_num_seqs=1)
    core, info = build_engine(config)
    core.close()
    assert info.notices == []
    assert info.fallback is None
    assert info.weights == "ternary"
    assert info.memory.kv_cache_bytes > 0


def test_a_backend_that_runs_in_place_of_a_faster_one_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a compiler plain torch once served, and nothing but a line of the log told."""

    def without_library(*_: object, **__: object) -> None:
        raise BackendError("the native CPU kernels were not built: install a C++20 compiler")

    monkeypatch.setattr(native_backend, "NativeBackend", without_library)
    core, info = build_engine(EngineConfig(model_path=str(builtin.TERNARY), max_num_seqs=1))
    core.close()
    assert info.backend == "torch"
    assert info.fallback is not None
    assert info.fallback.startswith("the backend torch runs, and shows nothing of the speed")
    assert info.fallback.endswith(
        "native: the native CPU kernels were not built: install a C++20 compiler"
    )
    assert info.notices == [info.fallback]


def test_a_context_that_the_default_kv_cache_cannot_hold_is_shortened_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model of 32k tokens was once refused on a CPU with default flags."""
    folder = tmp_path / "model"
    shutil.copytree(builtin.TERNARY, folder)
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | {"max_position_embeddings": 32768}
    path.write_text(json.dumps(changed))
    config = EngineConfig(model_path=str(folder), backend="torch", max_num_seqs=1)
    core, info = build_engine(config)
    core.close()
    bytes_per_token = info.memory.kv_cache_bytes // (info.num_blocks * info.block_size)
    monkeypatch.setattr(build, "DEFAULT_CPU_KV_CACHE_BYTES", 4096 * bytes_per_token)
    core, info = build_engine(config)
    core.close()
    assert info.max_model_len == info.num_blocks * info.block_size == 4096
    [notice] = info.notices
    assert notice.startswith("the context is 4096 tokens of the model's 32768, as many as the KV")
    for asked in ({"max_model_len": 8192}, {"kv_cache_bytes": 4096 * bytes_per_token}):
        with pytest.raises(EngineStartError, match="the KV cache holds 4096 tokens"):
            build_engine(msgspec.structs.replace(config, **asked))
    monkeypatch.setattr(build, "DEFAULT_CPU_KV_CACHE_BYTES", 1024 * bytes_per_token)
    with pytest.raises(EngineStartError, match="the KV cache holds 1024 tokens"):
        build_engine(config)


def test_a_gpu_that_no_backend_can_use_gives_way_to_the_cpu_with_a_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    choose = build.choose_backend

    def choose_without_gpu(device: torch.device, **options: Any) -> BackendChoice:
        if device.type == "cuda":
            raise BackendError("Tesla T4 has compute capability 7.5")
        return choose(device, **options)

    monkeypatch.setattr(build, "choose_backend", choose_without_gpu)
    core, info = build.build_engine(EngineConfig(model_path=str(builtin.TERNARY)))
    core.close()
    assert info.device == "cpu"
    assert info.fallback is not None
    assert "cuda: Tesla T4 has compute capability 7.5" in info.fallback
    assert current == [torch.device("cuda", 0)]
    with pytest.raises(EngineStartError, match="Tesla T4"):
        build.build_engine(EngineConfig(model_path=str(builtin.TERNARY), device="cuda:1"))
    assert current[-1] == torch.device("cuda", 1)
