"""The BitNet papers' estimate of energy: what the multiply-adds alone would take at 7 nm.

An estimate of arithmetic, nothing else: it leaves out memory, which takes most of the energy, so
a measured figure is tens of times higher. It is never added to a measured one and never priced.
"""

from dataclasses import dataclass

from bitwatt.engine.messages import EngineInfo
from bitwatt.model.config import Weights

__all__ = ["ModelShape", "arithmetic_joules_per_token", "estimate_of"]

_FLOAT16_ADD_J = 0.16e-12
_FLOAT16_MULTIPLY_J = 0.34e-12
_INT8_ADD_J = 0.007e-12
_FLOAT16_MULTIPLY_ADD_J = _FLOAT16_ADD_J + _FLOAT16_MULTIPLY_J


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes the estimate asks for.

    num_linear_parameters  of all layers' linears: embedding, head and norms are left out
    attention_width        heads times their dimension
    """

    num_linear_parameters: int
    num_layers: int
    attention_width: int


def arithmetic_joules_per_token(shape: ModelShape, weights: Weights, context: int) -> float:
    """Return estimated joules of a token that attends to this many.

    A ternary weight costs an int8 addition, a dense one a multiply-add in 16 bits; attention,
    which stays in 16 bits, costs two multiply-adds a token, layer and channel.
    Source  arXiv:2402.17764, with the energies a 7 nm operation takes in arXiv:2310.11453; 512
            tokens with a context of 512 give the energy column of arXiv:2504.12285, table 1
    """
    linear_j = _INT8_ADD_J if weights == "ternary" else _FLOAT16_MULTIPLY_ADD_J
    attention = shape.num_layers * 2 * context * shape.attention_width
    return shape.num_linear_parameters * linear_j + attention * _FLOAT16_MULTIPLY_ADD_J


def estimate_of(info: EngineInfo, context: int) -> float | None:
    """Return the estimate for an engine's model; None where its shape is unknown."""
    if not info.num_linear_parameters:
        return None
    shape = ModelShape(
        num_linear_parameters=info.num_linear_parameters,
        num_layers=info.num_layers,
        attention_width=info.attention_width,
    )
    return arithmetic_joules_per_token(shape, info.weights, context)
