"""Block formats of GGUF, against a writer of their layouts and against the gguf gguf_package."""

from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from bitwatt.checkpoints import gguf_blocks
from bitwatt.checkpoints.gguf_blocks import decode_floats, decode_groups
from bitwatt.checkpoints.gguf_file import Gguf, open_gguf
from numpy.typing import NDArray
from torch import Tensor

from tests.server.checkpoints.gguf_writer import (
    FLOAT_FORMATS,
    TERNARY_FORMATS,
    Stored,
    draw_floats,
    store,
    store_ternary,
    write_gguf,
)

ROWS, COLUMNS = 5, 512
# Lengths that no block divides, so that chunks end within the tensor, and one that takes it whole.
CHUNKS = (1, 2 * COLUMNS, 1 << 20)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture(params=CHUNKS)
def chunk_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK_WEIGHTS", request.param)


def file_with(path: Path, stored: Stored) -> Gguf:
    """Return the file of one tensor named x and one behind it."""
    write_gguf(path / "x.gguf", {}, {"x": stored, "y": store(np.ones(8))})
    return open_gguf(path / "x.gguf")


def floats_of(gguf: Gguf) -> NDArray[np.float32]:
    parts = [part.float() for part in decode_floats(gguf.tensors["x"], gguf.data("x"))]
    return torch.cat(parts).numpy()


def groups_of(gguf: Gguf) -> tuple[Tensor, Tensor]:
    parts = list(decode_groups(gguf.tensors["x"], gguf.data("x")))
    return torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])


def ternary(random: np.random.Generator, fmt: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return codes and scales, each group with its own."""
    codes = random.integers(-1, 2, (ROWS, COLUMNS))
    if fmt == "Q1_0":
        codes = codes | 1
    if fmt == "I2_S":
        return codes, random.uniform(0.01, 0.1, (1, 1))
    return codes, random.uniform(0.01, 0.1, (ROWS, COLUMNS // TERNARY_FORMATS[fmt][0]))


@pytest.mark.usefixtures("chunk_weights")
@pytest.mark.parametrize("fmt", [*TERNARY_FORMATS, "I2_S"])
def test_a_ternary_format_is_read_as_codes_and_scales(
    tmp_path: Path, random: np.random.Generator, fmt: str
) -> None:
    codes, scales = ternary(random, fmt)
    stored = store_ternary(fmt, codes, scales)
    gguf = file_with(tmp_path, stored)
    read_codes, read_scales = groups_of(gguf)
    assert read_codes.dtype == torch.int8
    np.testing.assert_array_equal(read_codes.numpy(), codes)
    expected = scales.astype(np.float32 if fmt == "I2_S" else np.float16).astype(np.float32)
    np.testing.assert_array_equal(read_scales.numpy(), np.broadcast_to(expected, read_scales.shape))
    np.testing.assert_array_equal(floats_of(gguf), stored.values)


@pytest.mark.usefixtures("chunk_weights")
@pytest.mark.parametrize("fmt", FLOAT_FORMATS)
def test_a_format_of_floats_is_dequantized(
    tmp_path: Path, random: np.random.Generator, fmt: str
) -> None:
    stored = draw_floats(fmt, random, (ROWS, COLUMNS))
    np.testing.assert_array_equal(floats_of(file_with(tmp_path, stored)), stored.values)


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_floats_are_read_as_they_are_stored(
    tmp_path: Path, random: np.random.Generator, fmt: str
) -> None:
    stored = store(random.normal(size=(ROWS, 33)), fmt)
    gguf = file_with(tmp_path, stored)
    [read] = decode_floats(gguf.tensors["x"], gguf.data("x"))
    assert read.dtype == {"F32": torch.float32, "F16": torch.float16}.get(fmt, torch.bfloat16)
    np.testing.assert_array_equal(read.float().numpy(), stored.values)


@pytest.mark.parametrize("fmt", [*FLOAT_FORMATS, "TQ1_0", "TQ2_0"])
def test_random_blocks_are_dequantized_as_the_gguf_package_does(
    tmp_path: Path, random: np.random.Generator, fmt: str
) -> None:
    """Bytes that no quantizer writes too, but for codes of 3 and scales that are no numbers."""
    kind = gguf_package.GGMLQuantizationType[fmt]
    weights, num_bytes = gguf_package.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (ROWS * COLUMNS // weights, num_bytes), dtype=np.uint8)
    if fmt == "TQ2_0":
        blocks &= 0b10101010 | (blocks >> 1 & 0b01010101 ^ 0b01010101)
    halves = {"TQ1_0": [52], "TQ2_0": [64], "Q6_K": [208]}.get(fmt, [0])
    for at in [*halves, *([2] if fmt in {"Q4_1", "Q5_1", "Q4_K", "Q5_K"} else [])]:
        scales = random.uniform(-2, 2, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    raw = blocks.reshape(ROWS, -1)
    expected = gguf_package.quants.dequantize(raw, kind)
    gguf = file_with(tmp_path, Stored(int(kind), (ROWS, COLUMNS), raw.tobytes(), expected))
    np.testing.assert_array_equal(floats_of(gguf), expected)


@pytest.mark.parametrize("fmt", ["Q2_0", "Q2_0 of 128", "PQ2_0", "TQ2_0", "I2_S"])
def test_a_code_of_3_is_refused(tmp_path: Path, random: np.random.Generator, fmt: str) -> None:
    codes, scales = ternary(random, fmt)
    codes[3, 77] = 2
    gguf = file_with(tmp_path, store_ternary(fmt, codes, scales))
    with pytest.raises(ValueError, match="has a code of 3"):
        groups_of(gguf)


@pytest.mark.parametrize("scale", [np.inf, np.nan])
@pytest.mark.parametrize("fmt", TERNARY_FORMATS)
def test_a_scale_that_is_no_number_is_refused(
    tmp_path: Path, random: np.random.Generator, fmt: str, scale: float
) -> None:
    codes, scales = ternary(random, fmt)
    scales[-1, -1] = scale
    with pytest.raises(ValueError, match="has a scale that is not finite"):
        groups_of(file_with(tmp_path, store_ternary(fmt, codes, scales)))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_i2_s_would_not_have_tells_of_another_layout(
    tmp_path: Path, random: np.random.Generator, scale: float
) -> None:
    codes, scales = ternary(random, "I2_S")
    scales[:] = scale
    with pytest.raises(ValueError, match="I2_S is in another layout"):
        groups_of(file_with(tmp_path, store_ternary("I2_S", codes, scales)))


@pytest.mark.parametrize("fmt", TERNARY_FORMATS)
def test_rows_of_one_scale_each_are_told_from_groups_with_scales_of_their_own(
    tmp_path: Path, random: np.random.Generator, fmt: str
) -> None:
    """A quantizer gives a group of zeros a scale of 0, and any other does too."""
    codes, scales = ternary(random, fmt)
    scales[:] = scales[:, :1]
    group = TERNARY_FORMATS[fmt][0]
    if fmt != "Q1_0":
        codes[1, :group] = codes[2] = 0
        scales[1, 0] = scales[2] = 0
    gguf = file_with(tmp_path, store_ternary(fmt, codes, scales))
    [groups] = decode_groups(gguf.tensors["x"], gguf.data("x"))
    by_row = groups.by_row()
    assert by_row is not None
    np.testing.assert_array_equal(by_row[0].numpy(), codes)
    used = codes.any(axis=1)
    expected = scales[:, -1].astype(np.float16)[used]
    np.testing.assert_array_equal(by_row[1].numpy()[used], expected)

    scales[0, 0] *= 1.5
    gguf = file_with(tmp_path, store_ternary(fmt, codes, scales))
    [groups] = decode_groups(gguf.tensors["x"], gguf.data("x"))
    assert groups.by_row() is None


def test_weights_of_a_scale_of_0_are_zeros_of_the_row(
    tmp_path: Path, random: np.random.Generator
) -> None:
    codes, scales = ternary(random, "TQ2_0")
    scales[:] = 0.5
    scales[0, 1] = 0
    gguf = file_with(tmp_path, store_ternary("TQ2_0", codes, scales))
    [groups] = decode_groups(gguf.tensors["x"], gguf.data("x"))
    by_row = groups.by_row()
    assert by_row is not None
    assert not by_row[0][0, 256:].any()
    assert by_row[1].tolist() == [0.5] * ROWS
