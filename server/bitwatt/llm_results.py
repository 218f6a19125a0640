"""What LLM returns, and a choice of it while it runs."""

from dataclasses import dataclass, field

from bitwatt.engine.messages import PromptLogprobs, Submit, TokenLogprobs, TokenOutput, merged
from bitwatt.serving.answers import AnswerPlan, new_reader
from bitwatt.serving.choice import ChatFinishReason, FinishReasonName, chat_reason
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.text.answers.pieces import AnswerPiece, Call, whole_answer
from bitwatt.text.codec import TextCodec

__all__ = ["Answer", "Choice", "PendingChoice", "PromptTokenLogprobs"]


@dataclass(frozen=True, slots=True)
class PromptTokenLogprobs:
    """A prompt's token by its natural-log probability, given those before it.

    rank  1 for the likeliest
    top   the likeliest tokens, best first
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt.

    text        of the tokens, special tokens and the stop string left out; of a conversation's
                answer its content
    token_ids   with the stop token that ended it, if one did
    finish_reason  tool_calls where the caller is to run calls
    logprobs    as many as token_ids where they were asked for, else empty
    reasoning   what a conversation's answer was thought by, before its content
    tool_calls  of a conversation's answer
    """

    text: str
    token_ids: list[int]
    finish_reason: ChatFinishReason
    logprobs: list[TokenLogprobs]
    reasoning: str = ""
    tool_calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt or conversation brought: SamplingParams.n choices, the first one's at hand.

    num_cached_tokens  of the prompt's, found in the prefix cache
    prompt_logprobs    as many as prompt_token_ids where they were asked for, the first one None;
                       else empty
    """

    prompt_token_ids: list[int]
    choices: list[Choice]
    num_cached_tokens: int
    prompt_logprobs: list[PromptTokenLogprobs | None]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> ChatFinishReason:
        return self.choices[0].finish_reason

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> list[Call]:
        return self.choices[0].tool_calls

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self.choices[0].logprobs


class PendingChoice:
    """A choice while it runs."""

    def __init__(
        self, submit: Submit, codec: TextCodec, params: SamplingParams, plan: AnswerPlan | None
    ) -> None:
        """Begin; without a plan all of the choice is text."""
        self.submit = submit
        self.num_cached_tokens = 0
        self._reader = new_reader(0, submit, codec, params.stop_strings, plan)
        self._pieces: list[AnswerPiece] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReasonName | None = None
        self._prompt_logprobs: PromptLogprobs | None = None
        # Only what ends a choice before the engine does must be seen at once, as a stop string; all
        # else is read when the engine has ended it, for the next step would wait for this thread's
        # Python.
        is_limited = plan is not None and plan.max_calls is not None
        self._reads_at_once = bool(params.stop_strings) or is_limited
        self._unread: list[TokenOutput] = []

    def read(self, output: TokenOutput) -> bool:
        """Take what is new; return whether that was the last. Raises RequestFailedError."""
        if not self._reads_at_once:
            self._unread.append(output)
            if output.finish_reason is None:
                return False
            output = merged(self._unread)
        before = self._reader.num_tokens
        delta = self._reader.read(output)
        num_new = self._reader.num_tokens - before
        self._token_ids += output.token_ids[:num_new]
        self._logprobs += output.logprobs[:num_new]
        self.num_cached_tokens = output.num_cached_tokens
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        if delta is None:
            return False
        self._pieces += delta.told
        self._finish_reason = delta.finish_reason
        return delta.finish_reason is not None

    def prompt_logprobs(self) -> list[PromptTokenLogprobs | None]:
        """Return them as Answer has them."""
        if self.submit.sampling.prompt_logprobs is None:
            return []
        packed = self._prompt_logprobs
        scored = [] if packed is None else packed.unpacked()
        return [None, *(PromptTokenLogprobs(*entry) for entry in scored)]

    def settled(self) -> Choice:
        """Return the choice, once it has ended."""
        assert self._finish_reason is not None
        answer = whole_answer(self._pieces)
        return Choice(
            answer.content,
            self._token_ids,
            chat_reason(self._finish_reason, has_called=answer.has_called),
            self._logprobs,
            answer.reasoning,
            answer.calls,
        )
