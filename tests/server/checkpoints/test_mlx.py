"""Folders of MLX with ternary groups of 2 bits, against transformers on the same weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitwatt.checkpoints.groups import Groups, largest_sums, pack_groups
from bitwatt.checkpoints.registry import load_model, open_checkpoint
from bitwatt.errors import CheckpointError
from bitwatt.model.config import Weights
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.packing import times_scales, unpack
from bitwatt_kernels.registry import choose_backend
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.server.checkpoints.against_transformers import (
    assert_near_16_bit_model,
    assert_same_model,
    assert_same_model_by_groups,
    assert_same_ternary_model,
    with_inputs_quantized,
)
from tests.server.checkpoints.writers import (
    Family,
    edit_config,
    random_model,
    with_ternary_linears,
)

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 256, "intermediate_size": 512}
NAME = "model.layers.1.self_attn.k_proj"


def mlx_groups(values: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return ternary values and their groups' scales as MLX stores them."""
    codes = (values + 1).long().view(len(values), -1, 16)
    words = (codes << 2 * torch.arange(16)).sum(dim=2)
    return {
        "weight": words.to(torch.uint32),
        "scales": scales,
        "biases": -scales,
    }


def write_mlx(
    folder: Path,
    family: Family = "llama",
    *,
    group: int = 128,
    scale_to: Literal["matrix", "group"] = "group",
    seed: int = 0,
) -> Any:
    """Write a model whose linears, embedding and head are ternary; return transformers' of it."""
    model = random_model(family, seed, **SIZES)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if weight.dim() == 1:
            tensors[name] = weight.half()
            parameter.data = tensors[name].float()
            continue
        scale = weight.abs().mean()
        values = (weight / scale).round().clamp(-1, 1)
        scales = scale.expand(len(weight), weight.shape[1] // group)
        if scale_to == "group" or "_proj" not in name:
            scales = scales * (0.5 + torch.rand(scales.shape, generator=generator))
        stored = mlx_groups(values, scales.half())
        tensors |= {f"{name.removesuffix('weight')}{part}": t for part, t in stored.items()}
        parameter.data = values * stored["scales"].float().repeat_interleave(group, dim=1)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    quantization = {"group_size": group, "bits": 2, "mode": "affine"}
    edit_config(folder, quantization=quantization, quantization_config=quantization)
    return model


def load(path: Path, weights: Weights) -> Transformer:
    backend = choose_backend(torch.device("cpu"), "reference").backend
    return load_model(path, weights=weights, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("group", [64, 128])
def test_groups_are_served_as_ternary_weights(tmp_path: Path, group: int) -> None:
    theirs = write_mlx(tmp_path, group=group)
    assert_same_model(load(tmp_path, "dense"), theirs)
    ours = load(tmp_path, "ternary")
    assert_near_16_bit_model(ours, theirs)
    assert_same_model_by_groups(ours, theirs, lambda _: group, of=("_proj", "lm_head"))
    values = theirs.model.embed_tokens.weight.numel() + theirs.lm_head.weight.numel()
    assert ours.memory().embedding_bytes == values // 4 + values // group * 2


def test_groups_of_32_are_served_as_dense_weights_and_else_refused(tmp_path: Path) -> None:
    theirs = write_mlx(tmp_path, group=32)
    assert_same_model(load(tmp_path, "dense"), theirs)
    with pytest.raises(CheckpointError, match=r"group of 32 weights.*multiples of 64.*s dense"):
        load(tmp_path, "ternary")


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_linears_of_one_scale_are_served_as_ternary_ones(tmp_path: Path, family: Family) -> None:
    # Of seeds 1 to 6 half move a code early that a near tie among the tokens hangs on: not 6.
    theirs = write_mlx(tmp_path / "mlx", family, scale_to="matrix", seed=6)
    theirs = with_ternary_linears(theirs, tmp_path / "packed")
    theirs = with_inputs_quantized(theirs, lambda _: 128, of=("lm_head",))
    ours = load(tmp_path / "mlx", "ternary")
    assert_same_ternary_model(ours, theirs)
    assert open_checkpoint(tmp_path / "mlx").stored_as.startswith("MLX's groups")


def with_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name))
        tensors |= {} if changed is None else {name: changed}
        save_file(tensors, folder / "model.safetensors")

    return edit


def with_quantization(**fields: Any) -> Callable[[Path], None]:
    quantization = {"group_size": 128, "bits": 2} | fields
    return lambda folder: edit_config(folder, quantization=quantization)


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other biases": (
        with_tensor(f"{NAME}.biases", lambda biases: biases * 1.5),
        f"tensor '{NAME}.weight' has biases that are not its scales' negatives",
    ),
    "no biases": (with_tensor(f"{NAME}.biases", lambda _: None), f"has no tensor '{NAME}.biases'"),
    "no weight": (with_tensor(f"{NAME}.weight", lambda _: None), f"has no tensor '{NAME}.weight'"),
    "a code of 3": (
        with_tensor(f"{NAME}.weight", lambda words: (words.long() | 3).to(torch.uint32)),
        f"tensor '{NAME}.weight' has a code of 3",
    ),
    "fewer scales": (
        with_tensor(f"{NAME}.scales", lambda scales: scales[:, :1].clone()),
        f"tensor '{NAME}.weight' has scales or biases of torch.float16 [128, 1]; expected 16",
    ),
    "scales of 8 bits": (
        with_tensor(f"{NAME}.scales", lambda scales: scales.to(torch.float8_e4m3fn)),
        f"tensor '{NAME}.weight' has scales or biases of torch.float8_e4m3fn [128, 2]",
    ),
    "biases of 64 bits": (
        with_tensor(f"{NAME}.biases", lambda biases: biases.double()),
        f"tensor '{NAME}.weight' has scales or biases of torch.float64 [128, 2]",
    ),
    "one word": (
        with_tensor(f"{NAME}.weight", lambda _: torch.tensor(1, dtype=torch.uint32)),
        f"tensor '{NAME}.weight' has shape []; expected [128, 256]",
    ),
    "words of another type": (
        with_tensor(f"{NAME}.weight", lambda words: words.to(torch.int64)),
        f"tensor '{NAME}.weight' is torch.int64 [128, 16]; expected uint32 words",
    ),
    "fewer rows": (
        with_tensor(f"{NAME}.weight", lambda words: words[:64]),
        f"tensor '{NAME}.weight' has shape [64, 256]; expected [128, 256]",
    ),
    "4 bits": (with_quantization(bits=4), "quantization has bits=4 and mode='affine'; 2 and 'aff"),
    "another mode": (with_quantization(mode="mxfp4"), "bits=2 and mode='mxfp4'"),
    "groups of 100": (with_quantization(group_size=100), "group_size 100; 32, 64, 128 are"),
    "groups by layer": (
        with_quantization(**{"model.embed_tokens": {"bits": 4}}),
        "not supported: quantization of 'model.embed_tokens'",
    ),
    "no object": (lambda f: edit_config(f, quantization="2 bits"), "quantization is '2 bits'; exp"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_folder_that_is_not_ternary_is_refused_by_tensor_or_field(
    tmp_path: Path, what: str
) -> None:
    write_mlx(tmp_path)
    edit, reason = REFUSALS[what]
    edit(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, "dense")
    assert str(caught.value).startswith(str(tmp_path))
    assert reason in str(caught.value)


@pytest.mark.parametrize("shape", [(), (16,), (0, 16), (128, 0)], ids=str)
def test_groups_of_32_that_are_no_matrix_are_refused_by_tensor(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """The first row of each is looked at before any shape is asked for."""
    write_mlx(tmp_path, group=32, scale_to="matrix")
    with_tensor(f"{NAME}.weight", lambda _: torch.ones(shape, dtype=torch.uint32))(tmp_path)
    reason = f"tensor '{NAME}.weight' is torch.uint32 {list(shape)}; expected uint32 words"
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load(tmp_path, "ternary")


def test_groups_of_256_are_packed_as_two_of_128() -> None:
    codes = torch.randint(-1, 2, (2, 512), dtype=torch.int8)
    scales = torch.tensor([[0.5, 0.0], [-0.25, 2.0]])
    first, second = (Groups(codes[i : i + 1], scales[i : i + 1]) for i in (0, 1))
    packed = pack_groups([first, second], 2, 512)
    assert packed.group == 128
    assert packed.scales.tolist() == [[0.5, 0.5, 0, 0], [-0.25, -0.25, 2, 2]]
    values = times_scales(unpack(packed.codes).float(), packed.scales)
    expected = torch.cat([first.dequantized(), second.dequantized()])
    assert torch.equal(values, expected)
    assert torch.equal(largest_sums(packed, 512), torch.tensor([128.0, 576.0]))


def test_a_row_of_zeros_takes_the_scale_of_the_others() -> None:
    codes = torch.tensor([[1, -1] * 32, [0] * 64, [-1, 0] * 32], dtype=torch.int8)
    packed = pack_groups([Groups(codes, torch.tensor([[0.5], [0.0], [0.5]]))], 3, 64)
    assert packed.scales.tolist() == [0.5] * 3
    assert torch.equal(unpack(packed.codes), codes)
    zeros = pack_groups([Groups(codes * 0, torch.zeros(3, 1))], 3, 64)
    assert zeros.scales.tolist() == [1.0] * 3
