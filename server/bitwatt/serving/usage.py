"""What a request used, as its answer says it."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.request_metrics import ChoiceTimes

__all__ = [
    "CompletionTokensDetails",
    "EmbeddingUsage",
    "PromptTokensDetails",
    "Took",
    "Usage",
    "took",
]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What the prompt's tokens were."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the answer's tokens were."""

    reasoning_tokens: int


class Took(RequestEnergy, frozen=True, kw_only=True):
    """What a request took: its energy, its times, and the fallback where a slower backend ran.

    times     of each choice, in order, once all have ended; embeddings have none
    fallback  as in EngineInfo
    """

    times: list[ChoiceTimes] | UnsetType = UNSET
    fallback: str | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost, in tokens; `bitwatt` is an extension."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    bitwatt: Took


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What embeddings cost, in tokens; `bitwatt` is an extension."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    bitwatt: Took


def took(
    energy: RequestEnergy, fallback: str | None, times: Sequence[ChoiceTimes | None] = ()
) -> Took:
    """Return what a request took. Of choices one of which has no times, none are told."""
    known = [choice for choice in times if choice is not None]
    return Took(
        **{name: getattr(energy, name) for name in RequestEnergy.__struct_fields__},
        times=known if known and len(known) == len(times) else UNSET,
        fallback=UNSET if fallback is None else fallback,
    )
