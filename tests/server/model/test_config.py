"""A model read from config.json: what it reads, and that nothing it can't honour passes."""

from typing import Any

import pytest
from bitwatt.errors import CheckpointError
from bitwatt.model.config import Llama3RopeScaling, ModelConfig
from bitwatt.model.families import family_of, notices_of, with_generation_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 320,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = LLAMA | changes
    return with_generation_config(family_of(config).read_config(config), generation or {})


def test_a_llama_config_is_read_field_by_field() -> None:
    assert read() == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=320,
        hidden_size=128,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_model_len=256,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        activation="silu",
        has_sub_norms=False,
        is_tied=False,
    )


def test_bitnet_has_sub_norms_and_relu2() -> None:
    config = read(architectures=["BitNetForCausalLM"], hidden_act="relu2")
    assert (config.has_sub_norms, config.activation) == (True, "relu2")
    assert read(architectures=["BitNetForCausalLM"], hidden_act=None).activation == "relu2"


def test_end_tokens_are_those_of_both_files() -> None:
    config = read({"eos_token_id": [7, 2], "bos_token_id": 1}, eos_token_id=2)
    assert config.eos_token_ids == (2, 7)
    assert config.bos_token_id == 1
    assert read().eos_token_ids == ()


def test_rope_is_read_from_the_older_and_the_newer_field() -> None:
    newer = read(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert newer.rope_theta == 1e6
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_model_len=64
    )
    assert read(rope_scaling=LLAMA3_ROPE).rope_scaling == scaling
    assert read(rope_parameters=LLAMA3_ROPE).rope_scaling == scaling


def test_of_two_ropes_that_differ_the_older_field_is_served_and_the_newer_named() -> None:
    newer = {"rope_type": "default", "rope_theta": 1e6}
    both = {"rope_scaling": LLAMA3_ROPE, "rope_parameters": newer}
    assert read(**both) == read(rope_scaling=LLAMA3_ROPE)
    assert read(**both | {"rope_scaling": None}).rope_theta == 1e6
    [notice] = notices_of(both)
    assert notice.startswith("rope_parameters is passed over for rope_scaling")
    assert notices_of({"rope_scaling": newer, "rope_parameters": newer}) == []
    assert notices_of({"rope_scaling": None, "rope_parameters": newer}) == []


@pytest.mark.parametrize("token_id", [-1, 320, 10**30])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_a_token_outside_the_vocabulary_is_refused_in_either_file(name: str, token_id: int) -> None:
    message = f"{name} is {token_id}; the vocabulary has 320 tokens"
    with pytest.raises(CheckpointError, match=message):
        read(**{name: token_id})
    with pytest.raises(CheckpointError, match=message):
        read({name: [token_id] if name == "eos_token_id" else token_id})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"mlp_bias": "yes"}, "mlp_bias is 'yes'"),
        ({"sliding_window": 255}, "sliding_window=255, for a context of 256 tokens"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"input_bits": 4}, "input_bits=4"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}}, "beta_fast 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": "llama3"}, "expected an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"hidden_size": 128.0}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3"),
        ({"head_dim": 33}, "even"),
        ({"max_position_embeddings": 10**12}, "max_model_len is 1000000000000; at most"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps 1e-60"),
        ({"rms_norm_eps": int("9" * 401)}, "rms_norm_eps is 9{80}…; expected float"),
        ({"vocab_size": 10**30}, "vocab_size is 10{30}; at most 2147483648"),
        ({"max_position_embeddings": 1}, "max_model_len is 1; it must be at least 2"),
        ({"num_hidden_layers": -(10**400)}, "num_layers is -10{78}…; it must be at least 1"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 1e-30}}, "factor 1e-30"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": float("nan")}}, "low_freq_factor nan"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings 10{79}…; it must be 1 to",
        ),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)
