"""What a request used, as its answer says it."""

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict

from bitwatt.telemetry.energy.ledger import RequestEnergy

__all__ = [
    "CompletionTokensDetails",
    "EmbeddingUsage",
    "FallbackUsage",
    "PromptTokensDetails",
    "Usage",
    "told_energy",
]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What the prompt's tokens were."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the answer's tokens were."""

    reasoning_tokens: int


class FallbackUsage(RequestEnergy, frozen=True, kw_only=True):
    """What a request took where a slower backend ran than could.

    fallback  as in EngineInfo
    """

    fallback: str


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost, in tokens; `bitwatt` is an extension."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    bitwatt: RequestEnergy


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What embeddings cost, in tokens; `bitwatt` is an extension."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    bitwatt: RequestEnergy


def told_energy(energy: RequestEnergy, fallback: str | None) -> RequestEnergy:
    """Return the energy as usage has it: with the fallback, where a slower backend runs."""
    return energy if fallback is None else FallbackUsage(**asdict(energy), fallback=fallback)
