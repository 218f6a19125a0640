"""Embeds prompts: the hidden state of the last token behind the final norm, of length 1.

It is what the head would read to draw the next token, and the same bits whatever else the step
computes wherever the norm's and the layers' are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitwatt.model.streams import upload
from bitwatt.model.transformer import Transformer

__all__ = ["embed", "packed_embeddings"]

_LEAST_NORM = 1e-12  # of what is divided by it: zeros stay zeros


def embed(model: Transformer, hidden_states: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the rows as the head reads them, [R, hidden_size] float32.

    hidden_states  [T, hidden_size], what the layers made of the step's tokens
    """
    chosen = upload(rows, torch.int64, hidden_states.device)
    return model.normed(hidden_states[chosen]).float()


def packed_embeddings(states: Tensor) -> list[bytes | None]:
    """Return each row divided by its length, float32 in the machine's byte order.

    None where it isn't finite. Reads the tensor on the host.

    states  [R, hidden_size] float32, as embed returns them
    """
    return [_packed(row) for row in states.double()]


def _packed(row: Tensor) -> bytes | None:
    if not row.isfinite().all():
        return None
    length = torch.linalg.vector_norm(row).clamp(min=_LEAST_NORM)
    data: bytes = (row / length).float().numpy().tobytes()
    return data
