"""A generation request: what was asked for, and how far it has come."""

from dataclasses import dataclass, field
from enum import StrEnum

from bitwatt.constraints.matching import Grammar
from bitwatt.scheduling.drafting import Drafter

__all__ = ["FinishReason", "Request", "ResolvedSampling"]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or the caller's stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # the engine could not go on; the output carries a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """How a request's tokens are drawn, with nothing left open.

    What a caller asks is serving.sampling_params.SamplingParams, checked there.

    temperature          0 is greedy
    top_k                0 keeps every token
    seed                 with the token's position, keys the generator: same seed, same tokens
    max_tokens           0 scores or embeds the prompt, and draws nothing
    logprobs             how many top log-probabilities to return a token; None returns none
    prompt_logprobs      the same of the prompt's tokens
    embeds               whether the hidden state of the prompt's last token is wanted, and nothing
                         else
    stop_token_ids       end the request and are part of no text; the model's own included
    min_tokens           before so many tokens no stop token is drawn
    grammar              what the answer must be, as constraints.compiling writes it; None for
                         anything
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    embeds: bool = False
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    grammar: str | None = None

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request inside the engine, changed by the scheduler alone.

    tokens        prompt, then every token sampled and committed
    max_len       tokens of the request when it has all it may have
    num_needed    tokens of those that must be computed: all but the last, of which nothing follows;
                  of a prompt that is embedded all
    num_planned   tokens whose keys and values are computed once all planned steps have run
    num_pending   tokens that planned steps will sample and that are not committed yet; of a step
                  that verifies drafts, the one it samples in any case
    num_drafted   drafts that a planned step verifies: until it is committed, nobody knows how many
                  tokens it brings, and the request is in no other step
    row           index of the runner's per-request buffers while running, else None
    blocks        KV-cache blocks, in order; the runner knows the first num_sent_blocks
    prefixes      identities of the prefixes that end with each full block, from the prefix cache
    num_cached_tokens  prompt tokens found in the prefix cache when it was first admitted
    num_preemptions  how often it was put back to wait
    num_scored    tokens of the prompt from whose hidden states nothing is wanted any more: planned
                  steps score what follows each, or embed by the last; of a request without
                  prompt_logprobs, all but the last
    num_to_score  what num_scored becomes
    grammar       sampling.grammar, compiled
    drafter       guesses its next tokens, where the scheduler speculates
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: ResolvedSampling
    priority: int = 0  # lower is sooner
    cache_salt: str = ""
    grammar: Grammar | None = None
    tokens: list[int] = field(init=False)
    max_len: int = field(init=False)
    num_needed: int = field(init=False)
    num_planned: int = 0
    num_pending: int = 0
    num_drafted: int = 0
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0
    prefixes: list[int] = field(default_factory=list)
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    num_scored: int = field(init=False)
    num_to_score: int = field(init=False)
    finish_reason: FinishReason | None = None
    drafter: Drafter | None = None

    @property
    def is_waiting(self) -> bool:
        return self.row is None and self.finish_reason is None

    @property
    def is_scored(self) -> bool:
        """Whether nothing is wanted of the prompt any more but its next token."""
        return self.num_scored == self.num_to_score

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_token_ids)
        self.max_len = len(self.tokens) + self.sampling.max_tokens
        embeds = self.sampling.embeds
        self.num_needed = self.max_len - 1 + embeds
        self.num_to_score = len(self.tokens) - 1 + embeds
        self.num_scored = len(self.tokens) - 1 if self.sampling.prompt_logprobs is None else 0
