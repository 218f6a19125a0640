"""The decoder-only transformer: embedding, layers, norm, head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from bitwatt_kernels.backend import Backend, StepLayout
from torch import Tensor

from bitwatt.model.config import ModelConfig
from bitwatt.model.kv_cache import KVCache

__all__ = ["FindsBest", "ModelMemory", "RunLayers", "Transformer"]

RunLayers = Callable[[Tensor, Tensor, Tensor, StepLayout], Tensor]
"""Backend.ternary_layers or dense_layers of a model's weights, called with all its other arguments.

h, rope, kv_caches, layout: returns the residual stream after the layers.
"""


@runtime_checkable
class FindsBest(Protocol):
    """A backend whose head finds each row's best logit beside the logits."""

    def head_and_best(self, x: Tensor, weight: object, out: Tensor) -> Tensor | None:
        """Write head's logits to out, [T, vocab_size] float32; return what draw takes as best."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """Bytes a model's weights take on its device, and how many parameters they stand for.

    packed_weights_bytes  ternary linears in their backend's form
    embedding_bytes       embedding and head; a head that shares the embedding's memory is free
    other_weights_bytes   norms and dense linears
    linear_bytes          of packed and other weights, those of the layers' matrices
    step_bytes            what one decode step reads of them: all but the embedding's other rows
    """

    packed_weights_bytes: int
    embedding_bytes: int
    other_weights_bytes: int
    linear_bytes: int
    step_bytes: int
    num_parameters: int


class Transformer:
    """A model on one device; forward changes nothing but the KV cache it is given.

    embedding  what backend.embed takes; the head itself where a model ties the two
    notices    what an operator should know once, found while loading
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        *,
        embedding: object,
        run_layers: RunLayers,
        norm: Tensor,
        head: object,
        rope: Tensor,
        memory: ModelMemory,
        notices: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.backend = backend
        self.dtype = dtype
        self.notices = tuple(notices)
        self._embedding = embedding
        self._run_layers = run_layers
        self._norm = norm
        self._head = head
        self._rope = rope
        self._memory = memory

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        layout: StepLayout,
        kv_cache: KVCache,
        logit_tokens: Tensor | None,
    ) -> Tensor:
        """Return the logits of the chosen tokens, [R, vocab_size] float32.

        token_ids     [T] int64, as layout lays them out
        kv_cache      takes the tokens' keys and values at layout.slots
        logit_tokens  [R] int64, indexes into the step's tokens; None for all of them
        """
        return self.logits(self.hidden_states(token_ids, layout, kv_cache), logit_tokens)

    @torch.inference_mode()
    def hidden_states(
        self,
        token_ids: Tensor,
        layout: StepLayout,
        kv_cache: KVCache,
        *,
        before_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return what the layers make of each token, [T, hidden_size]; see forward."""
        h = self.backend.embed(token_ids, self._embedding)
        if before_layers is not None:
            before_layers()
        return self._run_layers(h, self._rope, kv_cache.layers, layout)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor, logit_tokens: Tensor | None) -> Tensor:
        """Return the logits of the chosen tokens, [R, vocab_size] float32; see forward."""
        x = hidden_states if logit_tokens is None else hidden_states[logit_tokens]
        if not len(x):
            shape = (0, self.config.vocab_size)
            return hidden_states.new_empty(shape, dtype=torch.float32)
        return self.backend.head(self.normed(x), self._head)

    @torch.inference_mode()
    def logits_into(self, hidden_states: Tensor, out: Tensor) -> Tensor | None:
        """Write the logits of all tokens to out, [T, vocab_size] float32.

        Returns  what the backend's draw takes as best of them, where its head finds it
        """
        x = self.normed(hidden_states)
        if isinstance(self.backend, FindsBest):
            return self.backend.head_and_best(x, self._head, out)
        out.copy_(self.backend.head(x, self._head))
        return None

    @torch.inference_mode()
    def normed(self, hidden_states: Tensor) -> Tensor:
        """Return the rows behind the final norm, as the head reads them."""
        return self.backend.rms_norm(hidden_states, self._norm, self.config.rms_norm_eps)

    def memory(self) -> ModelMemory:
        """Return what the weights take."""
        return self._memory
