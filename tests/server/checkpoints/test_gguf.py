"""Models of GGUF files, against transformers' arithmetic on the same weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from bitwatt.checkpoints.gguf import GgufCheckpoint
from bitwatt.checkpoints.survey import Survey
from bitwatt.errors import CheckpointError
from bitwatt.inspection import inspect
from bitwatt_kernels.packing import unpack
from numpy.typing import NDArray

from tests.server.checkpoints.against_transformers import (
    DENSE_TOLERANCE,
    assert_near_16_bit_model,
    assert_same_model,
    assert_same_model_by_groups,
    assert_same_ternary_model,
    expected_logits,
    load,
    logits_of,
)
from tests.server.checkpoints.gguf_writer import (
    Raw,
    Stored,
    draw_floats,
    store,
    store_ternary,
    write_gguf,
)
from tests.server.checkpoints.writers import Family, random_model, with_ternary_linears
from tests.server.model.steps import CPU_BACKENDS
from tests.server.test_inspection import check_forecast

pytestmark = pytest.mark.slow


# Heads of 64 and rows of whole blocks of 256.
SIZES = {"hidden_size": 256, "intermediate_size": 512}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def metadata_of(model: Any, architecture: str, **changes: Any) -> dict[str, Any]:
    """Return what a converter writes of a model; None among the changes leaves a key out."""
    config = model.config
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": getattr(config, "head_dim", 64),
        "vocab_size": config.vocab_size,
        **{key.replace("__", "."): value for key, value in changes.items() if "general" not in key},
    }
    general = {
        "general.architecture": architecture,
        "general.name": "tiny",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return general | {f"{architecture}.{k}": v for k, v in keys.items() if v is not None}


def in_pairs(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Return rows of q or k in the order of llama.cpp's rotation of neighbours."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


Store = Callable[[str, NDArray[Any]], Stored]


def tensors_of(model: Any, stored: Store, *, is_paired: bool) -> dict[str, Stored]:
    """Return the model's tensors as stored() makes them, and set the model to what they say."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.named_parameters():
        theirs = gguf_name(name)
        num_heads = heads.get(theirs.split(".")[-2]) if is_paired else None
        weight = parameter.data.numpy()
        tensor = stored(theirs, in_pairs(weight, num_heads) if num_heads else weight)
        tensors[theirs] = tensor
        values = tensor.values
        if num_heads:
            values = values.reshape(num_heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2)
        parameter.data = torch.from_numpy(values.reshape(weight.shape).copy())
    return tensors


def is_linear(name: str) -> bool:
    return name.startswith("blk.") and "norm" not in name and not name.endswith(".bias")


def as_floats(fmt: str) -> Store:
    """Return what stores linears in a float format, blocks drawn at random, the rest as float32.

    Blocks from a format's whole range hold weights up to a thousand times a model's. The layers'
    norms take that back, or the softmax would choose single tokens and magnify every rounding.
    """
    is_float = fmt in {"F32", "F16", "BF16"}

    def draw(*shape: int) -> Stored:
        return draw_floats(fmt, np.random.default_rng(math.prod(shape)), shape)

    gain = 1.0 if is_float else 0.0625 / draw(1 << 14).values.std()

    def stored(name: str, weight: NDArray[Any]) -> Stored:
        if name.startswith("blk.") and "norm" in name:
            return store(weight * np.float32(gain))
        if not is_linear(name):
            return store(weight, "F32" if "norm" in name else "F16")
        if is_float:
            return store(weight, fmt)
        return draw(*weight.shape)

    return stored


def as_ternary(
    fmt: str,
    *,
    scale_to: Literal["matrix", "row", "group"] = "matrix",
    also: tuple[str, ...] = (),
) -> Store:
    """Return what ternarizes linears, with one scale to each of the named.

    also  tensors besides them
    """
    group = {"TQ1_0": 256, "TQ2_0": 256, "I2_S": None, "Q2_0": 64}.get(fmt, 128)

    def stored(name: str, weight: NDArray[Any]) -> Stored:
        if not (is_linear(name) or name in also):
            return store(weight)
        scale = np.abs(weight).mean()
        codes = np.clip(np.round(weight / scale), -1, 1).astype(np.int64)
        codes = codes | 1 if fmt == "Q1_0" else codes
        if fmt == "I2_S":
            return store_ternary(fmt, codes, np.full((1, 1), scale))
        assert group is not None
        scales = np.full((weight.shape[0], weight.shape[1] // group), scale)
        if scale_to != "matrix":
            width = 1 if scale_to == "row" else scales.shape[1]
            random = np.random.default_rng(weight.size)
            scales = scales * random.uniform(0.5, 1.5, (len(scales), width))
        return store_ternary(fmt, codes, scales)

    return stored


def write(
    path: Path,
    family: Family,
    stored: Store,
    *,
    architecture: str | None = None,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Write a model of random weights; return transformers' of the very same."""
    model = random_model(family, seed, **(SIZES | changes))
    architecture = architecture or {"llama": "llama", "bitnet": "bitnet-b1.58"}[family]
    tensors = tensors_of(model, stored, is_paired=family == "llama")
    more = metadata or {}
    write_gguf(path, metadata_of(model, architecture, **more), tensors)
    return model


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q6_K"])
def test_a_dense_llama_computes_what_transformers_does(tmp_path: Path, fmt: str) -> None:
    theirs = write(tmp_path / "x.gguf", "llama", as_floats(fmt))
    assert_same_model(load(tmp_path / "x.gguf", "dense"), theirs)


def rope_divisors(head_dim: int, theta: float, rope: dict[str, Any]) -> NDArray[np.float64]:
    """Return what Llama 3.1's stretching divides each frequency by, as converters write it."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        turns = original / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0), 1)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


def test_a_stretched_rope_is_read_from_its_tensor(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_floats("F32"), rope_parameters=rope)
    plain = logits_of(load(path, "dense"))
    tensors = tensors_of(theirs, as_floats("F32"), is_paired=True)
    divisors = rope_divisors(64, 10000.0, rope)
    assert 1 == divisors[0] < divisors[4] < divisors[-1] == 8
    write_gguf(path, metadata_of(theirs, "llama"), tensors | {"rope_freqs.weight": store(divisors)})
    assert_same_model(load(path, "dense"), theirs)
    assert not torch.allclose(plain, expected_logits(theirs), atol=10 * DENSE_TOLERANCE)
    wrong = tensors | {"rope_freqs.weight": store(divisors * 0)}
    write_gguf(path, metadata_of(theirs, "llama"), wrong)
    with pytest.raises(CheckpointError, match="a rotary frequency is divided by 0"):
        load(path, "dense")


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"head_dim": 128, "num_key_value_heads": 1}],
    ids=["tied", "wide-heads"],
)
def test_a_tied_head_and_heads_of_their_own_width_are_read(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "x.gguf"
    lengths = {} if "head_dim" not in changes else {"attention.key_length": 128}
    theirs = write(path, "llama", as_floats("F32"), metadata=lengths, **changes)
    ours = load(path, "dense")
    assert ours.config.is_tied is ("tie_word_embeddings" in changes)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(
    ("family", "changes", "metadata"),
    [
        (
            "qwen3",
            {"head_dim": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        ),
        ("qwen2", {}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
    ],
    ids=["qwen3-yarn", "qwen2", "llama-biases", "linear"],
)
def test_other_families_compute_what_transformers_does(
    tmp_path: Path, family: Family, changes: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """104 positions, of which the stretched models first knew 24."""
    path = tmp_path / "x.gguf"
    if "rope_parameters" in changes:
        rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
        changes = changes | {"rope_parameters": changes["rope_parameters"] | rope}
        metadata = metadata | {"rope.scaling.original_context_length": 24}
    theirs = write(
        path, family, as_floats("F32"), architecture=family, metadata=metadata, **changes
    )
    assert_same_model(load(path, "dense"), theirs)


TERNARY = [
    ("qwen3", "qwen3", {"head_dim": 64}, "TQ2_0"),
    ("qwen2", "qwen2", {}, "Q2_0"),
    ("bitnet", "bitnet-b1.58", {}, "TQ2_0"),
    ("bitnet", "bitnet-b1.58", {}, "I2_S"),
    ("bitnet", "bitnet-25", {}, "TQ1_0"),
    ("bitnet", "bitnet", {"hidden_act": "silu"}, "PTQ1_0"),
    ("llama", "llama", {}, "Q2_0"),
    ("llama", "llama", {}, "TQ2_0"),
]


@pytest.fixture(scope="module", params=TERNARY, ids=lambda case: f"{case[1]}-{case[3]}")
def ternary_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A file, written once for all backends, and transformers' model of it."""
    family, architecture, changes, fmt = request.param
    folder = tmp_path_factory.mktemp("ternary")
    path = folder / "x.gguf"
    theirs = write(path, family, as_ternary(fmt), architecture=architecture, seed=1, **changes)
    return path, with_ternary_linears(theirs, folder)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_ternary_model_computes_what_transformers_does(
    ternary_model: tuple[Path, Any], backend: str
) -> None:
    path, theirs = ternary_model
    ours = load(path, "ternary", backend)
    assert_same_ternary_model(ours, theirs)
    assert ours.memory().packed_weights_bytes > 0


@pytest.mark.parametrize("fmt", ["TQ2_0", "Q2_0", "PTQ1_0"])
def test_rows_keep_scales_of_their_own_and_the_order_of_their_heads(
    tmp_path: Path, fmt: str
) -> None:
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_ternary(fmt, scale_to="row"))
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.is_ternary
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{name}"
        weight = theirs.get_parameter(f"{name}.weight").data
        packed = checkpoint.ternary(name, *weight.shape, fits=torch.float32)
        assert len(packed.scales.unique()) > 100
        assert torch.equal(unpack(packed.codes) * packed.scales[:, None], weight)


def test_an_mlp_that_is_no_multiple_of_64_wide_is_filled_with_zeros(tmp_path: Path) -> None:
    """Blocks of I2_S, which are of 128, and of Q2_0 are all whole: the fill is for none of them."""
    path = tmp_path / "x.gguf"
    theirs = write(path, "bitnet", as_ternary("Q2_0"), seed=1, intermediate_size=192)
    theirs = with_ternary_linears(theirs, tmp_path)
    ours = load(path, "ternary")
    assert_same_ternary_model(ours, theirs)


@pytest.mark.parametrize(
    "fmt", ["TQ2_0", "TQ1_0", "Q2_0", "Q2_0 of 128", "PQ2_0", "PTQ1_0", "Q1_0"]
)
def test_scales_to_groups_are_served_as_ternary_weights(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_ternary(fmt, scale_to="group"))
    assert_same_model(load(path, "dense"), theirs)
    ours = load(path, "ternary")
    if fmt != "Q1_0":  # no zeros: sums twice as large, and a softmax that magnifies all
        assert_near_16_bit_model(ours, theirs)

    def group(in_features: int) -> int:
        if fmt.startswith("TQ"):  # of 256: all of a row, or two of 128
            return 256 if in_features == 256 else 128
        return 64 if fmt == "Q2_0" else 128

    assert_same_model_by_groups(ours, theirs, group)


def test_groups_of_64_that_are_halves_of_128_are_served_as_those(tmp_path: Path) -> None:
    """A matrix whose neighbours differ keeps its own, and so does what it is fused with."""
    halves, wholes = tmp_path / "64.gguf", tmp_path / "128.gguf"
    own = ("blk.0.attn_output.weight", "blk.1.attn_k.weight")

    def written_by(width: int) -> Store:
        def stored(name: str, weight: NDArray[Any]) -> Stored:
            if not is_linear(name):
                return store(weight)
            random = np.random.default_rng(weight.size)
            codes = random.integers(-1, 2, weight.shape)
            scales = random.uniform(0.05, 0.1, (len(weight), weight.shape[1] // 64))
            if name in own:
                return store_ternary("Q2_0", codes, scales)
            if width == 128:
                return store_ternary("PQ2_0", codes, scales[:, ::2])
            return store_ternary("Q2_0", codes, scales[:, ::2].repeat(2, axis=1))

        return stored

    write(halves, "llama", written_by(64))
    write(wholes, "llama", written_by(128))
    checkpoint = GgufCheckpoint(halves)
    for name, shape, group in [
        ("0.self_attn.o_proj", (256, 256), 64),
        ("1.self_attn.k_proj", (128, 256), 64),
        ("1.self_attn.v_proj", (128, 256), 128),
        ("1.mlp.down_proj", (256, 512), 128),
    ]:
        weight = checkpoint.ternary(f"model.layers.{name}", *shape, fits=torch.float32)
        assert (weight.group, weight.scales.dtype) == (group, torch.float16)
    assert torch.equal(logits_of(load(halves, "ternary")), logits_of(load(wholes, "ternary")))


def test_every_backend_serves_scales_to_groups(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_ternary("PQ2_0", scale_to="group"))
    parameters = sum(p.numel() for name, p in theirs.named_parameters() if "_proj" in name)
    for backend in (name for name in CPU_BACKENDS if name != "reference"):
        ours = load(path, "ternary", backend)
        assert_same_model_by_groups(ours, theirs, lambda _: 128)
        most = parameters // (1 if backend == "torch" else 4) * 1.2
        assert parameters / 4 <= ours.memory().packed_weights_bytes <= most


BOTH = ("token_embd.weight", "output.weight")


@pytest.mark.parametrize(
    ("fmt", "family", "changes", "also"),
    [
        ("PQ2_0", "qwen3", {"head_dim": 64}, BOTH),
        ("Q2_0", "qwen3", {"head_dim": 64, "tie_word_embeddings": True}, BOTH[:1]),
        ("TQ2_0", "llama", {}, BOTH[:1]),
        ("PTQ1_0", "llama", {}, BOTH[1:]),
    ],
    ids=["both", "tied", "embedding", "head"],
)
def test_a_ternary_embedding_and_head_stay_packed(
    tmp_path: Path, fmt: str, family: Family, changes: dict[str, Any], also: tuple[str, ...]
) -> None:
    path = tmp_path / "x.gguf"
    stored = as_ternary(fmt, scale_to="group", also=also)
    theirs = write(path, family, stored, architecture=family, **changes)
    is_tied = "tie_word_embeddings" in changes
    has_head = BOTH[1] in also or is_tied
    group = 64 if fmt == "Q2_0" else 128
    one = theirs.lm_head.weight.numel()
    for backend in CPU_BACKENDS:
        ours = load(path, "ternary", backend)
        assert_near_16_bit_model(ours, theirs)
        assert_same_model_by_groups(
            ours,
            theirs,
            lambda columns: 256 if fmt == "TQ2_0" and columns == 256 else group,
            of=("_proj", "lm_head") if has_head else ("_proj",),
        )
        packed = one // (1 if backend == "torch" else 4) + one // group * 2
        expected = packed if is_tied else 2 * packed if also == BOTH else packed + 4 * one
        if fmt == "TQ2_0":  # of 256: a row has but one scale, in float32
            expected += 320 * 4 - one // group * 2
        assert ours.memory().embedding_bytes == expected
    check_forecast(path)


def test_eight_bits_of_a_ternary_head_are_told_to_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, "llama", as_ternary("PQ2_0", scale_to="group", also=BOTH))
    ours, same = load(path, "ternary", head_bits=8), load(path, "ternary")
    assert ours.notices[-1] == "head_bits 8 changes nothing: the head is ternary"
    assert torch.equal(logits_of(ours), logits_of(same))


@pytest.mark.parametrize(
    ("scale_to", "told"), [("matrix", "tensor"), ("row", "row"), ("group", "128 weights")]
)
def test_a_survey_says_what_shares_a_scale(
    tmp_path: Path, scale_to: Literal["matrix", "row", "group"], told: str
) -> None:
    path = tmp_path / "x.gguf"
    write(path, "llama", as_ternary("PQ2_0", scale_to=scale_to))
    survey = Survey(GgufCheckpoint(path))
    survey.ternary("model.layers.1.mlp.down_proj", 256, 512, fits=torch.float32)
    assert [matrix.scales for matrix in survey.matrices] == [told]


def test_a_ternary_embedding_is_surveyed_once(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_ternary("PQ2_0", scale_to="group", also=BOTH))
    found = inspect(path)
    matrices = {matrix["name"]: matrix["scales"] for matrix in found["matrices"]}
    assert matrices["model.embed_tokens"] == matrices["lm_head"] == "128 weights"
    assert found["parameters"]["all"] == sum(p.numel() for p in theirs.parameters())
    assert found["parameters"]["head"] == found["parameters"]["embedding"] == 320 * 256


def test_one_matrix_of_scales_to_groups_leaves_the_others_theirs(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    by_matrix, by_group = (as_ternary("PQ2_0", scale_to=each) for each in ("matrix", "group"))
    theirs = write(
        path, "llama", lambda name, w: (by_group if "ffn_down" in name else by_matrix)(name, w)
    )
    ours = load(path, "ternary")
    assert_same_model_by_groups(ours, theirs, lambda columns: 128 if columns == 512 else columns)


def test_ternary_weights_are_served_as_dense_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    theirs = write(path, "llama", as_ternary("TQ2_0"))
    assert_same_model(load(path, "dense"), theirs)


def test_dense_linears_are_not_served_as_ternary(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, "llama", as_floats("Q8_0"))
    with pytest.raises(CheckpointError, match=r"x\.gguf: the linears are Q8_0, not ternary"):
        load(path, "ternary")
    ternary, dense = as_ternary("TQ2_0"), as_floats("Q6_K")
    write(path, "llama", lambda name, w: (dense if "1.ffn_up" in name else ternary)(name, w))
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.1\.ffn_up\.weight' is Q6_K, not tern"):
        load(path, "ternary")
    assert load(path, "dense").memory().packed_weights_bytes == 0


def altered(name: str, change: Callable[[Stored], Stored | None]) -> Callable[[Path], None]:
    """Return what writes a file with another tensor, or without it."""

    def write_to(path: Path) -> None:
        model = random_model("llama", 0, **SIZES)
        tensors = tensors_of(model, as_ternary("TQ2_0"), is_paired=True)
        changed = change(tensors.pop(name) if name in tensors else store(np.ones(4)))
        tensors |= {} if changed is None else {name: changed}
        write_gguf(path, metadata_of(model, "llama"), tensors)

    return write_to


def with_metadata(**changes: Any) -> Callable[[Path], None]:
    def write_to(path: Path) -> None:
        model = random_model("llama", 0, **SIZES)
        tensors = tensors_of(model, as_ternary("TQ2_0"), is_paired=True)
        metadata = metadata_of(model, "llama")
        given = {key.replace("__", "."): value for key, value in changes.items()}
        metadata = {k: v for k, v in (metadata | given).items() if v is not None}
        write_gguf(path, metadata, tensors)

    return write_to


def filled_with(value: float) -> Callable[[Stored], Stored]:
    return lambda tensor: store(np.full(tensor.shape, value))


def with_bytes(data: bytes) -> Callable[[Stored], Stored]:
    """Return what writes over a tensor's last bytes."""
    return lambda t: Stored(t.type_id, t.shape, t.data[: -len(data)] + data, t.values)


ATTENTION, NORM = "blk.1.attn_k.weight", "blk.0.ffn_norm.weight"

REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no architecture": (with_metadata(general__architecture=None), "key 'general.architecture' is"),
    "another architecture": (
        with_metadata(general__architecture="qwen35"),
        "architecture 'qwen35' is not supported: its gated delta net, and the rotated basis",
    ),
    "maple": (
        with_metadata(general__architecture="maple"),
        "architecture 'maple' is not supported: its layers are a mixture of experts",
    ),
    "a rotated basis": (
        with_metadata(prism__hadamard__version=1),
        "key 'prism.hadamard.version' is not supported: the weights are in a rotated basis",
    ),
    "no sizes": (with_metadata(llama__embedding_length=None), "key 'llama.embedding_length' is mi"),
    "sizes of text": (with_metadata(llama__block_count="2"), "key 'llama.block_count' is '2'; exp"),
    "sizes by layer": (
        with_metadata(llama__attention__head_count=[4, 4]),
        "key 'llama.attention.head_count' is an array of 2 int; expected int",
    ),
    "no head": (with_metadata(llama__attention__head_count=0), "num_attention_heads is 0"),
    "many layers": (with_metadata(llama__block_count=1 << 30), "block_count is 1073741824"),
    "an epsilon of 0": (
        with_metadata(llama__attention__layer_norm_rms_epsilon=0.0),
        "rms_norm_eps 0.0",
    ),
    "experts": (with_metadata(llama__expert_count=8), "key 'llama.expert_count' is 8, which is no"),
    "a sliding window": (
        with_metadata(llama__attention__sliding_window=4096),
        "key 'llama.attention.sliding_window' is 4096, which is not supported",
    ),
    "a rope scaled": (
        with_metadata(llama__rope__scaling__type="longrope"),
        "key 'llama.rope.scaling.type' is 'longrope', which is not supported",
    ),
    "a rope scaled by a factor": (
        with_metadata(llama__rope__scaling__type="linear", llama__rope__scaling__attn_factor=2.0),
        "key 'llama.rope.scaling.attn_factor' is 2.0, which is not supported",
    ),
    "a rope in part": (
        with_metadata(llama__rope__dimension_count=32),
        "key 'llama.rope.dimension_count' is 32; heads of 64 want it the same",
    ),
    "an unknown key": (
        with_metadata(llama__logit_scale=0.5),
        "key 'llama.logit_scale' is 0.5, which is not supported",
    ),
    "a token beyond the vocabulary": (
        with_metadata(tokenizer__ggml__eos_token_id=320),
        "eos_token_id is 320; the vocabulary has 320 tokens",
    ),
    "no embedding": (altered("token_embd.weight", lambda _: None), "has no tensor 'token_embd.wei"),
    "no linear": (altered(ATTENTION, lambda _: None), f"has no tensor '{ATTENTION}'"),
    "another tensor": (
        altered("blk.1.attn_q.bias", lambda tensor: tensor),
        "tensor 'blk.1.attn_q.bias' has no place in this model (and 0 others)",
    ),
    "a linear of another shape": (
        altered(ATTENTION, lambda _: as_ternary("TQ2_0")(ATTENTION, np.ones((64, 256)))),
        f"tensor '{ATTENTION}' has shape [64, 256]; expected [128, 256]",
    ),
    "a norm of another shape": (
        altered(NORM, lambda _: store(np.ones(255))),
        f"tensor '{NORM}' has shape [255]; expected [256]",
    ),
    "a norm not finite": (altered(NORM, filled_with(np.nan)), f"tensor '{NORM}' has values that"),
    "a code of 3": (
        altered(ATTENTION, with_bytes(b"\xff" * 64 + b"\0\x3c")),
        f"tensor '{ATTENTION}' has a code of 3",
    ),
    "a scale of infinity": (
        altered(ATTENTION, with_bytes(b"\0\x7c")),
        f"tensor '{ATTENTION}' has a scale that is not finite",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_file_that_can_not_be_served_is_refused_by_key_or_tensor(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "x.gguf"
    write_to, reason = REFUSALS[what]
    write_to(path)
    with pytest.raises(CheckpointError) as caught:
        load(path, "ternary")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert reason in message
    assert "\n" not in message


def test_keys_that_change_nothing_are_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with_metadata(
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=1.0,
        llama__expert_count=0,
        llama__attention__value_length=64,
        tokenizer__ggml__eot_token_id=3,
        general__quantization_version=2,
    )(path)
    assert load(path, "ternary").config.eos_token_ids == (2, 3)


def test_control_tokens_that_end_a_turn_end_text_where_no_key_names_them(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tokens = [f"t{i}" for i in range(320)]
    tokens[7], tokens[8], tokens[9] = "<|eot_id|>", "<|im_end|>", "<|endoftext|>"
    types = [3 if i in {7, 9} else 1 for i in range(320)]
    as_int32 = [Raw(5, int(kind).to_bytes(4, "little")) for kind in types]
    with_metadata(tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=as_int32)(path)
    config = load(path, "ternary").config
    assert config.eos_token_ids == (2, 7, 9)
    assert config.bos_token_id == 1


def test_a_tensor_of_zeros_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    altered(NORM, filled_with(0.0))(path)
    assert f"{path}: tensor '{NORM}' is all zeros" in load(path, "ternary").notices
