"""What a request used, as its answer says it."""

import msgspec

from bitwatt.telemetry.energy.ledger import RequestEnergy

__all__ = ["FallbackUsage", "PromptTokensDetails", "Usage"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """What the prompt's tokens were."""

    cached_tokens: int


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
    bitwatt: RequestEnergy
