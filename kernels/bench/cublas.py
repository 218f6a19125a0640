"""The best that cuBLAS makes of a 16-bit matmul: the baseline that ternary kernels are held to.

torch's own choice, cuBLAS's heuristic for x · Wᵀ, is not always its fastest: a matrix-vector
product has kernels of its own, cuBLASLt has other ones, and W · Xᵀ lays the result out differently.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bitwatt_kernels.gpu.timing import Timer, Timing
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from torch import Tensor

__all__ = ["CublasBackend", "best_way", "ways"]

Way = Callable[[Tensor, Tensor], Tensor]

CHOICE_BUDGET_S = 0.05  # of timing each way, once a shape and number of tokens
ROTATED_BYTES = 256 << 20  # of copies of a small weight, so that none is found in L2


def _by_library(library: str) -> Way:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return F.linear(x, weight)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return run


def _vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x[0])[None]


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.T).T.contiguous()


def ways(num_tokens: int, device: torch.device) -> dict[str, Way]:
    """Return ways to compute x · Wᵀ, [T, N] contiguous, of T tokens, by name."""
    found: dict[str, Way] = {"x·Wᵀ": F.linear}
    if device.type == "cuda":
        found = {f"x·Wᵀ by {name}": _by_library(name) for name in ("cublas", "cublaslt")}
    if num_tokens == 1:
        return found | {"W·x": _vector}
    return found | {"W·xᵀ": _transposed}


def best_way(
    x: Tensor, weights: Sequence[Tensor], timer: Timer, *, budget_s: float
) -> tuple[str, Timing]:
    """Return the fastest way and its time, the weights taken in turn.

    A way that this torch or card refuses is passed over. Raises what the last one raised where
    all do.
    """
    found: dict[str, Timing] = {}
    refusal: Exception | None = None
    for name, way in ways(len(x), x.device).items():
        try:
            calls = [lambda w=w, way=way: way(x, w) for w in weights]
            found[name] = timer.measure(calls, budget_s=budget_s)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            refusal = error
    if not found:
        assert refusal is not None
        raise refusal
    best = min(found, key=lambda name: found[name].median_s)
    return best, found[best]


class CublasBackend(TritonBackend):
    """Dense matmuls by cuBLAS, each shape and number of tokens in the way that is fastest there.

    ways  the way taken, by (tokens, out_features, in_features)
    """

    def __init__(self, device: torch.device, timer: Timer) -> None:
        super().__init__(device, batch_invariant=False)
        self.ways: dict[tuple[int, int, int], str] = {}
        self._timer = timer

    def dense_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        key = (len(x), *weight.shape)
        if key not in self.ways:  # at a call before the capture, which may not time anything
            count = max(2, -(-ROTATED_BYTES // weight.nbytes)) if x.is_cuda else 1
            copies = [weight, *(weight.clone() for _ in range(count - 1))]
            self.ways[key], _ = best_way(x, copies, self._timer, budget_s=CHOICE_BUDGET_S)
        name = self.ways[key]
        if residual is not None and name.startswith("x·Wᵀ"):  # fused, as torch does it
            y = torch.addmm(residual, x, weight.T)
        else:
            y = ways(len(x), x.device)[name](x, weight)
            if residual is not None:
                y += residual
        return y if bias is None else y.add_(bias)
