"""Muon for the matrices of the layers, AdamW for the embedding and the norms."""

from collections.abc import Iterable

import torch

from bitwatt.training.model import LanguageModel
from bitwatt.training.schedule import Rates

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_RMS_OF_ADAMW = 0.2
"""About the size of an AdamW update at a learning rate of 1, so that one rate does for both."""


def orthogonalized(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return about U @ V.T of the decomposition matrix = U @ S @ V.T, in `dtype`.

    Singular values come out between 0.7 and 1.2, which does as well as 1.
    Source   Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024)
    """
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal, at the size AdamW's would have.

    Source   as `orthogonalized`; the size from Liu et al., "Muon is Scalable for LLM Training"
    """

    def __init__(self, parameters: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, _closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                update = orthogonalized(gradient.lerp(momentum, MOMENTUM), self.dtype)
                size = _RMS_OF_ADAMW * max(weight.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * size)


class Optimizers:
    """Both optimizers of a model, stepped as one; `state` is theirs by the parameter's name."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        named = list(model.named_parameters())
        self._names = {id(weight): name for name, weight in named}
        layers = [weight for name, weight in named if ".layers." in name and weight.dim() == 2]
        others = [weight for _, weight in named if id(weight) not in set(map(id, layers))]
        self._muon = Muon(layers, dtype)
        self._adamw = torch.optim.AdamW(
            [{"params": [weight], "decays": weight.dim() == 2} for weight in others],
            betas=BETAS,
            fused=True,
        )

    def step(self) -> None:
        """Update every parameter from its gradient, and forget the gradients."""
        for optimizer in (self._muon, self._adamw):
            optimizer.step()
            optimizer.zero_grad()

    def set_rates(self, rates: Rates) -> None:
        """Take the learning rate and the weight decay for the steps to come."""
        for group in (*self._muon.param_groups, *self._adamw.param_groups):
            group["lr"] = rates.learning_rate
            group["weight_decay"] = rates.weight_decay if group.get("decays", True) else 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the state under `key/parameter`."""
        return {
            f"{key}/{self._names[id(weight)]}": tensor
            for optimizer in (self._muon, self._adamw)
            for weight, values in optimizer.state.items()
            for key, tensor in values.items()
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned."""
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    suffix = f"/{self._names[id(weight)]}"
                    optimizer.state[weight] = {
                        key.removesuffix(suffix): tensor.clone()
                        for key, tensor in tensors.items()
                        if key.partition("/")[2] == suffix[1:]
                    }
