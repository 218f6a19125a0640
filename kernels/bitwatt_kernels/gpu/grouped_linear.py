"""ternary_linear in Triton where a row has a scale to each group of its weights.

Float sums run over the groups of a row in order, one program from the first to the last: so that
the batch never shows, and no split of the reduction is possible.

Codes are packed by chunks of four groups: a byte has one code of each, so that the four planes of
a chunk's bytes are its four groups, and each is one product on tensor cores.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.linear import check_layout, unpack_in_place
from bitwatt_kernels.gpu.tiles import tile_indices
from bitwatt_kernels.packing import TernaryWeight, times_scales, unpack

__all__ = ["GROUPS", "GroupedTile", "GroupedWeight", "grouped_linear", "grouped_linear_kernel"]

GROUPS = (64, 128)  # weights of a group: a block of the kernel's loop


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """A tile of the output, chosen from the machine code of three generations; not measured.

    max_registers  of a thread; None leaves it to the assembler
    """

    max_tokens: int | None
    block_out: int
    block_tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


TILES = (
    GroupedTile(8, 64, 8, 4, 4),
    # Left to itself the assembler stops at 128 registers on sm_103, and spills; it then takes 148.
    GroupedTile(16, 64, 16, 4, 4, 255),
    GroupedTile(None, 64, 32, 4, 2),  # larger ones spill: sums are kept beside their products
)


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A packed ternary matrix with its scales by groups, as the kernel reads it.

    codes   [out_features, chunks * group] uint8; byte j of a chunk has the codes of weight j of its
            first group to its fourth, from the lowest bits up
    scales  [groups, out_features] float32 or float16
    bias    [out_features] float32, or None
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    group: int

    @classmethod
    def of(cls, weight: TernaryWeight, device: torch.device) -> "GroupedWeight":
        """Return the weight on device; ShapeError if its groups are of another size."""
        group = weight.group
        if group not in GROUPS:
            raise ShapeError(
                f"a scale goes with {group} weights; the Triton kernels take groups of "
                f"{' and '.join(map(str, GROUPS))}"
            )
        values = unpack(weight.codes.to(device)) + 1
        values = F.pad(values, (0, -weight.in_features % (4 * group)), value=1).to(torch.uint8)
        planes = values.view(weight.out_features, -1, 4, group)
        codes = planes[:, :, 0] | planes[:, :, 1] << 2
        codes |= planes[:, :, 2] << 4 | planes[:, :, 3] << 6
        bias = None if weight.bias is None else weight.bias.to(device)
        scales = weight.scales.to(device).T.contiguous()
        return cls(codes.flatten(1).contiguous(), scales, bias, group)

    def rows(self, indexes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix as floats, [len(indexes), in_features]; see unpack_rows."""
        chunks = self.codes[indexes].view(len(indexes), -1, self.group)
        planes = [(chunks >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)]
        values = torch.stack(planes, dim=2).flatten(1)[:, : self.in_features].contiguous()
        return times_scales(values, self.scales.T[indexes]).to(dtype)

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def in_features(self) -> int:
        return len(self.scales) * self.group

    @property
    def nbytes(self) -> int:
        tensors = [self.codes, self.scales, self.bias]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@triton.jit
def _add_group(
    y,
    w,
    group,
    n,
    m,
    x_ptrs,
    x_scales_ptr,
    x_sums_ptr,
    w_scales_ptr,
    out_features,
    num_groups,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """Return y and the products of one group; w holds its codes, times 2 to the power of SHIFT."""
    of_token = m * num_groups + group
    of_row = group * out_features + n
    if HAS_TAIL:  # past the last group: zeros
        is_there = group < num_groups
        x = tl.load(x_ptrs + group * GROUP, mask=is_there, other=0)
        x_scales = tl.load(x_scales_ptr + of_token, mask=is_there, other=1.0)
        x_sums = tl.load(x_sums_ptr + of_token, mask=is_there, other=0)
        w_scales = tl.load(w_scales_ptr + of_row, mask=is_there, other=0.0)
    else:
        x = tl.load(x_ptrs + group * GROUP)
        x_scales = tl.load(x_scales_ptr + of_token)
        x_sums = tl.load(x_sums_ptr + of_token)
        w_scales = tl.load(w_scales_ptr + of_row)
    sums = (tl.dot(w, x, out_dtype=tl.int32) >> SHIFT) - x_sums[None, :]
    scaled = sums.to(tl.float32) * tl.div_rn(1.0, x_scales)[None, :]
    return y + scaled * w_scales.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def grouped_linear_kernel(
    x_ptr,  # [num_tokens, num_groups * GROUP] int8
    x_scales_ptr,  # [num_tokens, num_groups] float32
    x_sums_ptr,  # [num_tokens, num_groups] int32
    w_ptr,  # [out_features, chunks * GROUP] uint8
    w_scales_ptr,  # [num_groups, out_features] float32 or float16
    bias_ptr,  # [out_features] float32
    residual_ptr,  # [num_tokens, out_features]
    y_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    row_bytes,
    num_groups,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[m, n] = Σ_g (Σ_k x[m, k] · code[n, k] − x_sums[m, g]) / x_scales[m, g] · w_scales[g, n].

    With bias and residual, rounded once. Grid (tiles,).
    """
    n, m = tile_indices(
        tl.program_id(0), num_tokens, out_features, BLOCK_OUT, BLOCK_TOKENS, GROUP_TOKENS
    )
    # Rows past the edge read the last one; their results are not stored.
    n_read = tl.minimum(n, out_features - 1)
    m_read = tl.minimum(m, num_tokens - 1)
    j = tl.arange(0, GROUP)
    w_ptrs = w_ptr + n_read[:, None].to(tl.int64) * row_bytes + j[None, :]
    x_ptrs = x_ptr + m_read[None, :].to(tl.int64) * (num_groups * GROUP) + j[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()

    y = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for first in range(0, num_groups, 4):
        w0, w1, w2, w3 = unpack_in_place(tl.load(w_ptrs), INLINE_ASM)
        y = _add_group(
            y, w0, first, n_read, m_read, x_ptrs, x_scales_ptr, x_sums_ptr, w_scales_ptr,
            out_features, num_groups, GROUP, 0, HAS_TAIL,
        )  # fmt: skip
        y = _add_group(
            y, w1, first + 1, n_read, m_read, x_ptrs, x_scales_ptr, x_sums_ptr, w_scales_ptr,
            out_features, num_groups, GROUP, 2, HAS_TAIL,
        )  # fmt: skip
        y = _add_group(
            y, w2, first + 2, n_read, m_read, x_ptrs, x_scales_ptr, x_sums_ptr, w_scales_ptr,
            out_features, num_groups, GROUP, 0, HAS_TAIL,
        )  # fmt: skip
        y = _add_group(
            y, w3, first + 3, n_read, m_read, x_ptrs, x_scales_ptr, x_sums_ptr, w_scales_ptr,
            out_features, num_groups, GROUP, 2, HAS_TAIL,
        )  # fmt: skip
        w_ptrs += GROUP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    if HAS_BIAS:
        y += tl.load(bias_ptr + n_read)[:, None]
    offsets = m[None, :].to(tl.int64) * out_features + n[:, None]
    inside = (m < num_tokens)[None, :] & (n < out_features)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def grouped_linear(
    x: QuantizedActivations,
    weight: GroupedWeight,
    residual: Tensor | None,
    dtype: torch.dtype,
    gpu: Gpu,
    tile: GroupedTile | None = None,
) -> Tensor:
    """Return Backend.ternary_linear of scales by groups, [T, out_features] dtype.

    tile    overrides the one for this number of tokens; none changes the result
    Raises  ShapeError or DtypeError if the arguments don't fit together
    """
    x.check_fit(weight.in_features, weight.group)
    num_tokens, out_features = len(x.codes), weight.out_features
    check_layout(x, weight.codes, out_features, residual, dtype)
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=x.codes.device)
    if y.numel() == 0:
        return y
    if tile is None:
        tile = next(t for t in TILES if t.max_tokens is None or num_tokens <= t.max_tokens)
    num_groups, row_bytes = len(weight.scales), weight.codes.shape[1]
    grid = triton.cdiv(out_features, tile.block_out) * triton.cdiv(num_tokens, tile.block_tokens)
    grouped_linear_kernel[(grid,)](
        x.codes,
        x.scales,
        x.sums,
        weight.codes,
        weight.scales,
        weight.scales if weight.bias is None else weight.bias,
        y if residual is None else residual,
        y,
        num_tokens,
        out_features,
        row_bytes,
        num_groups,
        BLOCK_OUT=tile.block_out,
        BLOCK_TOKENS=tile.block_tokens,
        GROUP=weight.group,
        GROUP_TOKENS=8,
        HAS_TAIL=num_groups % 4 != 0,
        HAS_BIAS=weight.bias is not None,
        HAS_RESIDUAL=residual is not None,
        INLINE_ASM=gpu.inline_asm,
        PDL=gpu.pdl,
        **gpu.launch_options(tile.num_warps, tile.num_stages, tile.max_registers),
    )
    return y
