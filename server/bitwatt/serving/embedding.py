"""Embeds the prompts of one request: an engine's hidden states in, vectors out."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from bitwatt.engine.messages import EngineInfo, Submit
from bitwatt.errors import InvalidRequestError, RequestFailedError
from bitwatt.serving.generation import Generation
from bitwatt.serving.models import ServedModel
from bitwatt.serving.planning import plan_embeddings
from bitwatt.serving.request import Encode
from bitwatt.serving.sampling_params import BOUNDS
from bitwatt.serving.usage import EmbeddingUsage, PromptTokensDetails, took
from bitwatt.telemetry.energy.ledger import RequestEnergy, total_energy

__all__ = ["EmbeddingRequest", "Embeddings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """What is asked.

    encode      makes the prompts
    dimensions  numbers of a vector; None for the model's own
    key_salt, cache_salt, priority  as planning.plan_embeddings has them
    """

    request_id: str
    encode: Encode
    dimensions: int | None = None
    key_salt: str = ""
    cache_salt: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        """Raise InvalidRequestError where the priority is none."""
        BOUNDS["priority"].check("priority", self.priority)

    async def for_model(self, model: ServedModel) -> "Embeddings":
        """Return the prompts that the model is to embed.

        Raises  EngineUnavailableError, InvalidRequestError
        """
        info = model.require_info()
        if self.dimensions not in (None, info.hidden_size):
            raise InvalidRequestError(
                f"dimensions is {self.dimensions}; the embeddings of {model.name} have "
                f"{info.hidden_size}, and say nothing when cut: it wasn't trained to be "
                "(Matryoshka)",
                param="dimensions",
            )
        prompts = await self.encode(model.text, info)
        submits = plan_embeddings(
            info,
            prompts,
            request_id=self.request_id,
            cache_salt=f"{self.key_salt}{self.cache_salt}",
            priority=self.priority,
        )
        return Embeddings(model, info, submits)


@dataclass(slots=True)
class Embeddings:
    """Prompts of one request, to be embedded once."""

    model: ServedModel
    info: EngineInfo
    submits: Sequence[Submit]
    _ended: list[Generation] = field(default_factory=list)

    async def stream(
        self, charge: Callable[[Generation], AbstractContextManager[None]]
    ) -> AsyncGenerator[bytes, None]:
        """Yield each prompt's vector in order: float32, of length 1, in the machine's byte order.

        As many prompts run at once as the engine runs, so that one request leaves the queue to
        others. Closing it aborts what runs.

        charge  lets a key pay for what a generation uses

        Raises  QueueFullError, EngineUnavailableError, RequestFailedError
        """
        size = max(1, min(self.info.max_num_seqs, self.model.engine.capacity))
        for start in range(0, len(self.submits), size):
            submits = list(self.submits[start : start + size])
            generation = Generation(model=self.model, submits=submits, stops=(), num_choices=1)
            self._ended.append(generation)
            with charge(generation):
                await generation.collect()
            for index in range(len(submits)):
                embedding = generation.embedding(index)
                if embedding is None:
                    raise RequestFailedError("the engine ended the request without an embedding")
                yield embedding

    @property
    def energy(self) -> RequestEnergy:
        """What all of them took."""
        return total_energy([generation.usage.bitwatt for generation in self._ended])

    @property
    def usage(self) -> EmbeddingUsage:
        """The tokens used so far."""
        usages = [generation.usage for generation in self._ended]
        prompt_tokens = sum(usage.prompt_tokens for usage in usages)
        return EmbeddingUsage(
            prompt_tokens=prompt_tokens,
            total_tokens=prompt_tokens,
            prompt_tokens_details=PromptTokensDetails(
                sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
            ),
            bitwatt=took(self.energy, self.info.fallback),
        )
