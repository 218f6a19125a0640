"""Draws a token a row in Triton, from what top-k, top-p and min-p leave: exact, and without a sort.

Weights are integers, 2⁴⁰ · exp(x − max): their sums are exact in any order. Ranked by falling
logit, what each filter leaves is the beginning of the row, and its weight one number. So is what
precedes the token drawn. Where the sum of the largest comes to a given number is found by bisection
over the bits of the logits. That takes 32 looks at every logit; so those near the largest, at most
MAX_CANDIDATES, are first copied to where a look is one load, and only a row whose filters leave
more is looked at whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import DRAW_SETTINGS
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.best import best_in_tile, float_of, index_of, key_of
from bitwatt_kernels.gpu.device import Gpu

__all__ = ["MAX_CANDIDATES", "NUM_BINS", "NUM_WARPS", "draw", "draw_kernel", "mask"]

_NUM_SETTINGS = tl.constexpr(len(DRAW_SETTINGS))
MAX_CANDIDATES = 4096
NUM_WARPS = 16
NUM_BINS = 512  # of the distance to the largest logit, each BIN_WIDTH wide
_BIN_WIDTH = tl.constexpr(0.125)
_ONE = tl.constexpr(2.0**40)  # the largest weight
_UNIFORM_STEPS = tl.constexpr(2.0**53)
_NO_TOKEN = tl.constexpr(-1)
_KEY_OF_NAN = tl.constexpr(0x7FFFFFFF)  # as best_in_tile has it
_LEAST = tl.constexpr(-(2**63) + 1)


@triton.jit
def _scaled(x_ptr, first, n, temperature, BLOCK: tl.constexpr):
    """Return indexes first … of a row, and its logits over the temperature; -inf behind its end."""
    i = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=float("-inf"))
    return i, tl.div_rn(x, temperature)


@triton.jit
def _weights(x, top):
    return (tl.exp(x - top) * _ONE).to(tl.int64)


@triton.jit
def _keys(x):
    """Return integers in the order of the floats."""
    return key_of(x).to(tl.int64)


@triton.jit
def _sum_from(x_ptr, n, temperature, top, key, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weight, or number, of the logits whose key is at least key."""
    total = tl.full([], 0, tl.int64)
    for first in range(0, n, BLOCK):
        i, x = _scaled(x_ptr, first, n, temperature, BLOCK)
        values = tl.full([BLOCK], 1, tl.int64) if COUNT else _weights(x, top)
        total += tl.sum(tl.where((_keys(x) >= key) & (i < n), values, 0))
    return total


@triton.jit
def _bisect(x_ptr, n, temperature, top, need, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest key from which on there is at least need, and what is above it."""
    low = tl.full([], -2147483648, tl.int64)
    high = tl.max(_keys(tl.full([1], 0.0, tl.float32) + top))
    above = tl.full([], 0, tl.int64)  # the sum from high + 1 on
    while low < high:
        middle = low + (high - low + 1) // 2
        total = _sum_from(x_ptr, n, temperature, top, middle, COUNT, BLOCK)
        if total >= need:
            low = middle
        else:
            high = middle - 1
            above = total
    return low, above


@triton.jit
def _weight_of(key, top):
    return tl.max(_weights(tl.zeros([1], tl.float32) + float_of(key), top))


@triton.jit
def _share(uniform, total):
    """Return ⌊uniform · total / 2⁵³⌋ exactly."""
    return tl.umulhi(uniform << 11, total.to(tl.uint64)).to(tl.int64)


@triton.jit(do_not_specialize=["num_tiles"])
def draw_kernel(
    logits_ptr,  # [R, vocab_size] float32
    best_ptr,  # [R, num_tiles] int64, as best_in_tile returns; read if HAS_BEST
    settings_ptr,  # [R, NUM_SETTINGS] float64, as draw takes them
    candidates_ptr,  # [R, MAX_CANDIDATES] float32, scratch
    ids_ptr,  # [R, MAX_CANDIDATES] int32, scratch
    tokens_ptr,  # [R] int64
    vocab_size,
    num_tiles,
    HAS_BEST: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tokens[r] = the token at which the weights, in order, come to a row's number of their sum.

    In order of falling logit, equal ones by rising id, where top-k or top-p is set, and else by
    rising id. The largest, or the first of those, where the temperature is 0. NO_TOKEN in a row
    with a NaN, or whose largest logit is not finite. Grid (R,).
    """
    r = tl.program_id(0)
    x_ptr = logits_ptr + r.to(tl.int64) * vocab_size
    settings_ptr += r * _NUM_SETTINGS
    temperature = tl.load(settings_ptr).to(tl.float32)
    is_greedy = temperature == 0.0
    temperature = tl.where(is_greedy, 1.0, temperature)
    top_k = tl.load(settings_ptr + 1).to(tl.int64)
    top_p = tl.load(settings_ptr + 2).to(tl.float32)
    min_p = tl.load(settings_ptr + 3).to(tl.float32)
    has_top_k = (top_k > 0) & (top_k < vocab_size)

    # The best is of the logits as they are: divided by the temperature, two may become equal.
    best = tl.full([], _LEAST, tl.int64)
    if HAS_BEST:
        for first in range(0, num_tiles, NUM_BINS):
            tile = first + tl.arange(0, NUM_BINS)
            place = best_ptr + r.to(tl.int64) * num_tiles + tile
            best = tl.maximum(best, tl.max(tl.load(place, mask=tile < num_tiles, other=_LEAST)))
    else:
        for first in range(0, vocab_size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < vocab_size, other=float("-inf"))
            best = tl.maximum(best, tl.max(best_in_tile(x[:, None], i, vocab_size)))
    has_nan = (best >> 32) == _KEY_OF_NAN
    top = float_of(tl.where(has_nan, 0, best >> 32))
    top = tl.max(tl.div_rn(tl.zeros([1], tl.float32) + top, temperature))
    if has_nan | (tl.abs(top) == float("inf")):
        tl.store(tokens_ptr + r, _NO_TOKEN)
        return
    if is_greedy:
        tl.store(tokens_ptr + r, index_of(best).to(tl.int64))
        return

    # All weight, what min-p leaves of it, and how many logits are how near to the largest.
    # By half blocks, and summed up at the end: a whole one's takes more registers than there are.
    whole = tl.zeros([BLOCK // 2], tl.int64)
    left = tl.zeros([BLOCK // 2], tl.int64)
    near = tl.zeros([NUM_BINS], tl.int32)
    for first in range(0, vocab_size, BLOCK // 2):
        i, x = _scaled(x_ptr, first, vocab_size, temperature, BLOCK // 2)
        weights = tl.where(i < vocab_size, _weights(x, top), 0)
        whole += weights
        left += tl.where(tl.exp(x - top) >= min_p, weights, 0)
        bins = tl.minimum((top - x) / _BIN_WIDTH, NUM_BINS - 1.0).to(tl.int32)
        near += tl.histogram(bins, NUM_BINS)
    whole = tl.sum(whole)
    left = tl.sum(left)
    uniform = (tl.load(settings_ptr + 4) * _UNIFORM_STEPS).to(tl.uint64)  # exact

    if (top_k == 0) & (top_p >= 1.0):
        target = _share(uniform, left)
        token = tl.full([], -1, tl.int32)
        before = tl.full([], 0, tl.int64)
        for first in range(0, vocab_size, BLOCK):
            i, x = _scaled(x_ptr, first, vocab_size, temperature, BLOCK)
            weights = tl.where((i < vocab_size) & (tl.exp(x - top) >= min_p), _weights(x, top), 0)
            come = before + tl.cumsum(weights, axis=0)
            is_it = (come - weights <= target) & (target < come)
            token = tl.maximum(token, tl.max(tl.where(is_it, i, -1)))
            before += tl.sum(weights)
        tl.store(tokens_ptr + r, token.to(tl.int64))
        return

    # The candidates, by rising id: all whose bin is one of the first, as many as have room. The
    # last bin has all that is further away and is none of them.
    bin_index = tl.arange(0, NUM_BINS)
    has_room = (tl.cumsum(near, axis=0) <= MAX_CANDIDATES) & (bin_index < NUM_BINS - 1)
    num_bins = tl.sum(has_room.to(tl.int32))
    candidates_ptr += r.to(tl.int64) * MAX_CANDIDATES
    ids_ptr += r.to(tl.int64) * MAX_CANDIDATES
    num_candidates = 0
    come = tl.zeros([BLOCK // 2], tl.int64)
    for first in range(0, vocab_size, BLOCK // 2):
        i = first + tl.arange(0, BLOCK // 2)
        logits = tl.load(x_ptr + i, mask=i < vocab_size, other=float("-inf"))
        x = tl.div_rn(logits, temperature)
        bins = tl.minimum((top - x) / _BIN_WIDTH, NUM_BINS - 1.0).to(tl.int32)
        is_near = (bins < num_bins) & (i < vocab_size)
        place = num_candidates + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
        tl.store(candidates_ptr + place, logits, mask=is_near)
        tl.store(ids_ptr + place, i, mask=is_near)
        num_candidates += tl.sum(is_near.to(tl.int32))
        come += tl.where(is_near, _weights(x, top), 0)
    come = tl.sum(come)
    tl.debug_barrier()  # every thread's candidates, before others read them

    share = tl.minimum(tl.maximum(top_p, 0.0), 1.0).to(tl.float64)
    is_enough = come.to(tl.float64) >= share * whole.to(tl.float64)
    if has_top_k:
        is_enough = num_candidates >= top_k
    n = vocab_size
    source = x_ptr
    if is_enough & (num_candidates > 0):
        n = num_candidates
        source = candidates_ptr

    if has_top_k:
        key, above = _bisect(source, n, temperature, top, top_k, True, BLOCK)
        rest = top_k - above
        whole = _sum_from(source, n, temperature, top, key + 1, False, BLOCK)
        whole += rest * _weight_of(key, top)
    if top_p < 1.0:
        need = tl.maximum(tl.ceil(share * whole.to(tl.float64)).to(tl.int64), 1)
        key, above = _bisect(source, n, temperature, top, need, False, BLOCK)
        weight = tl.maximum(_weight_of(key, top), 1)
        whole = tl.minimum(whole, above + (need - above + weight - 1) // weight * weight)
    left = tl.minimum(left, whole)
    target = _share(uniform, left)
    key, above = _bisect(source, n, temperature, top, target + 1, False, BLOCK)
    rank = (target - above) // tl.maximum(_weight_of(key, top), 1)  # among those equal
    place = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int64)
    for first in range(0, n, BLOCK):
        i, x = _scaled(source, first, n, temperature, BLOCK)
        is_equal = ((_keys(x) == key) & (i < n)).to(tl.int64)
        at = before + tl.cumsum(is_equal, axis=0) - 1
        place = tl.maximum(place, tl.max(tl.where((is_equal > 0) & (at == rank), i, -1)))
        before += tl.sum(is_equal)
    token = place
    if is_enough & (num_candidates > 0):
        token = tl.load(ids_ptr + place)
    tl.store(tokens_ptr + r, token.to(tl.int64))


def draw(logits: Tensor, settings: Tensor, gpu: Gpu, best: Tensor | None = None) -> Tensor:
    """Return a token for each row, [R] int64; -1 where a row has no distribution.

    logits    [R, vocab_size] float32, contiguous
    settings  [R, 6] float64, contiguous: temperature, of which 0 takes the largest logit, and of
              equal ones the first; top_k, 0 keeps every token; top_p in (0, 1]; min_p in [0, 1]; a
              number in [0, 1), a multiple of 2⁻⁵³, that picks the token; and one not read here
    best      [R, tiles] int64, what the head has found of these logits: saves a look at all
    Raises    ShapeError or DtypeError if the arguments don't fit together
    """
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ShapeError(f"logits have shape {list(logits.shape)}; expected contiguous [R, V]")
    num_rows, vocab_size = logits.shape
    if settings.shape != (num_rows, _NUM_SETTINGS.value) or not settings.is_contiguous():
        raise ShapeError(
            f"settings have shape {list(settings.shape)} and strides {settings.stride()}; "
            f"expected contiguous [{num_rows}, {_NUM_SETTINGS.value}]"
        )
    if (logits.dtype, settings.dtype) != (torch.float32, torch.float64):
        raise DtypeError(
            f"logits are {logits.dtype} and settings {settings.dtype}; expected float32 and float64"
        )
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    scratch = (num_rows, MAX_CANDIDATES)
    draw_kernel[(num_rows,)](
        logits,
        tokens if best is None else best,
        settings,
        torch.empty(scratch, dtype=torch.float32, device=logits.device),
        torch.empty(scratch, dtype=torch.int32, device=logits.device),
        tokens,
        vocab_size,
        0 if best is None else best.shape[1],
        HAS_BEST=best is not None,
        MAX_CANDIDATES=MAX_CANDIDATES,
        NUM_BINS=NUM_BINS,
        BLOCK=MAX_CANDIDATES,
        **gpu.launch_options(NUM_WARPS),
    )
    return tokens


def mask(logits: Tensor, mask_of: Tensor, bits: Tensor) -> None:
    """Give the tokens that a row's mask lacks a logit of -inf, in place, by torch.

    logits   [R, vocab_size] float32
    mask_of  [R] int64, which mask is a row's, or -1
    bits     [M, words] int32: a bit a token, the lowest first, for vocab_size at least
    """
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    denied = (~bits[:, :, None] >> shifts).bitwise_and_(1).bool()
    denied = denied.flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(denied[mask_of.clamp(min=0)] & (mask_of >= 0)[:, None], -torch.inf)
