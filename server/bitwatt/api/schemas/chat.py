"""/v1/chat/completions."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from bitwatt.api.schemas.common import (
    Body,
    Bounded,
    GenerationBody,
    excludes,
    needs,
    whole,
    zero_needs,
)
from bitwatt.api.schemas.parameters import CHAT, CONTENT_PART, MESSAGE, refuse
from bitwatt.api.schemas.tools import (
    MAX_CALLS,
    ToolCallBody,
    ToolChoice,
    Tools,
    unknown_in_tools,
)
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.answers import ToolUse
from bitwatt.serving.message_content import text_of_content
from bitwatt.serving.sampling_params import BOUNDS, SamplingParams, check_max_tokens
from bitwatt.serving.tools import template_tools, tool_use_of
from bitwatt.text.chat_template import EFFORT, SWITCHES, checked_kwargs, effort_kwargs

__all__ = [
    "ChatBody",
    "Message",
    "check_continued",
]

MAX_MESSAGES = 1024

Content = Annotated[
    str,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


def _check_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    try:
        checked_kwargs(given)
    except InvalidRequestError as error:
        raise refuse(str(error)) from None
    return given


ChatTemplateKwargs = Annotated[
    dict[str, Any],
    AfterValidator(_check_kwargs),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                **{name: {"type": "boolean"} for name in sorted(SWITCHES)},
                EFFORT: {"type": "string"},
            },
            "additionalProperties": False,
        }
    ),
]


class Message(Body):
    """A turn of the conversation."""

    parameters: ClassVar = MESSAGE
    nested: ClassVar[tuple[str, ...]] = ("tool_calls",)

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks. A developer speaks as the system; a tool gives its result."
    )
    content: Content = Field(
        description="What is said: a string, or a list of text parts, which become its lines. May "
        "be null beside a `refusal` or `tool_calls`."
    )
    refusal: str | None = Field(
        None, description="What an assistant's earlier turn said instead of content."
    )
    reasoning_content: str | None = Field(
        None,
        description="What an assistant's earlier turn was reasoned by, for templates that use it. "
        "As in vLLM.",
    )
    reasoning: str | None = Field(None, description="The same, under vLLM's newer name.")
    name: str | None = Field(
        None, max_length=256, description="The speaker's name, for templates that use it."
    )
    tool_calls: Annotated[list[ToolCallBody], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_CALLS,
        description="What an assistant's earlier turn called: each with `id`, `type` and "
        "`function`, a `name` and `arguments`.",
    )
    tool_call_id: str | None = Field(
        None, max_length=256, description="The call that a tool's message has the result of."
    )

    @model_validator(mode="before")
    @classmethod
    def _settle_content(cls, data: Any) -> Any:
        """Make one text of content: parts are lines of it, and so is a refusal."""
        if not isinstance(data, dict):
            return data
        given = data.get("content")
        try:
            content = text_of_content(given, data.get("refusal"))
        except InvalidRequestError as error:
            raise refuse(str(error), "content") from None
        if content is None and data.get("tool_calls"):
            content = ""
        if content is given:
            return data
        parts = given if isinstance(given, list) else []
        unknown = [name for part in parts for name in part if name not in CONTENT_PART]
        return {**data, "content": content} | {f"content[].{name}": None for name in unknown}

    @model_validator(mode="after")
    def _calls_and_results_are_whose_they_are(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise refuse(f"tool_calls are an assistant's; the role is {self.role}", "tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            told = "a tool's message needs" if self.role == "tool" else "only a tool's message has"
            raise refuse(f"{told} a tool_call_id", "tool_call_id")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """Return the message as templates know it."""
        reasoning = self.reasoning_content if self.reasoning is None else self.reasoning
        calls = [call.as_template_input() for call in self.tool_calls or ()]
        given = {
            "name": self.name,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
        }
        known = {name: value for name, value in given.items() if value is not None}
        return {"role": self.role, "content": self.content, **known}


def check_continued(messages: Sequence[Message], add_generation_prompt: bool | None) -> None:
    """Raise the error of a last message that can't be gone on with."""
    if add_generation_prompt:
        raise refuse(
            "continue_final_message excludes add_generation_prompt", "continue_final_message"
        )
    last = messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise refuse(
            "continue_final_message needs a last message of an assistant, without tool_calls",
            "continue_final_message",
        )


class ChatBody(GenerationBody):
    """A request to continue a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                needs("stream_options", "stream"),
                needs("top_logprobs", "logprobs"),
                excludes("max_tokens", "max_completion_tokens"),
                excludes("stream", "prompt_logprobs"),
                zero_needs("max_tokens", "prompt_logprobs"),
                zero_needs("max_completion_tokens", "prompt_logprobs"),
            ],
            "example": {
                "model": "builtin",
                "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
                "max_completion_tokens": 24,
                "temperature": 0,
            },
        }
    )
    parameters: ClassVar = CHAT
    nested: ClassVar[tuple[str, ...]] = (*GenerationBody.nested, "messages")

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far, in order."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Adds what the tokenizer puts around a text, beside what the model's template "
        "puts there. As in vLLM.",
    )
    chat_template_kwargs: ChatTemplateKwargs | None = Field(
        None,
        description="What the model's template may be told: `enable_thinking`, `thinking`, "
        "`reasoning_effort`. vLLM passes anything on.",
    )
    tools: Tools | None = Field(
        None,
        description="Up to 128 functions that the model may call, each with a `name`, a "
        "`description`, `parameters`, a JSON schema, and `strict`.",
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="`none`; `auto`, the default with tools: the model decides; `required`: it "
        "calls at least one; an object that names a function: it calls that one, once; or "
        "`allowed_tools`. What must be called is forced by a grammar of the tools' schemas.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may have several calls, unless false."
    )
    reasoning_effort: str | None = Field(
        None,
        max_length=64,
        description="`none` has the template turn thinking off, where it can; others turn it on, "
        "and are put to the template as `low`, `medium` or `high`. One that isn't known leaves the "
        "template to its default.",
    )
    thinking_token_budget: (
        Annotated[int, Field(ge=-1, le=2**31 - 1), BeforeValidator(whole)] | None
    ) = Field(
        None,
        description="Tokens of thinking at most, after which it is ended; -1 for any number. As in "
        "vLLM.",
    )
    include_reasoning: bool | None = Field(
        None, description="Returns the thinking as `reasoning_content`, unless false. As in vLLM."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Opens the model's turn, unless false. As in vLLM."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Has the model go on with the last message, an assistant's, which the answer "
        "doesn't repeat. As in vLLM.",
    )
    max_tokens: Annotated[int, Bounded("max_tokens")] | None = Field(
        None, description="The same as `max_completion_tokens`, under its former name."
    )
    max_completion_tokens: Annotated[int, Bounded("max_tokens")] | None = Field(
        None,
        description="Tokens of each choice at most; all that the context has room for unless "
        "given; 0 with `prompt_logprobs` alone.",
    )
    logprobs: bool | None = Field(
        None, description="Returns the natural-log probability of each token of the answer."
    )
    top_logprobs: Annotated[int, Bounded("logprobs")] | None = Field(
        None, description="Likeliest tokens to return at each position; needs `logprobs`."
    )

    @model_validator(mode="after")
    def _settle(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs needs logprobs: true", "top_logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise refuse("max_tokens and max_completion_tokens differ", "max_completion_tokens")
        if self.continue_final_message:
            check_continued(self.messages, self.add_generation_prompt)
        return self

    @property
    def unknown_fields(self) -> list[str]:
        """Those within tools besides."""
        return [*super().unknown_fields, *unknown_in_tools(self.tools)]

    @property
    def told_to_template(self) -> dict[str, Any]:
        """What the body tells the template besides messages and tools."""
        effort = {} if self.reasoning_effort is None else effort_kwargs(self.reasoning_effort)
        return {**effort, **(self.chat_template_kwargs or {})}

    def tool_use(self) -> ToolUse | None:
        """Return which tools may or must be called; raises InvalidRequestError."""
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def template_tools(self, use: ToolUse | None) -> list[dict[str, Any]] | None:
        """Return the tools in use as templates know them."""
        return template_tools(self.tools, use)

    @property
    def max_tokens_param(self) -> str:
        """The field that limits each choice's tokens, under the name that was used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling_params(self) -> SamplingParams:
        """Return what is asked; raises InvalidRequestError beyond a limit."""
        for name, bounds in (("max_completion_tokens", "max_tokens"), ("top_logprobs", "logprobs")):
            if (value := getattr(self, name)) is not None:
                BOUNDS[bounds].check(name, value)
        max_tokens = getattr(self, self.max_tokens_param)
        check_max_tokens(self.max_tokens_param, max_tokens, self.prompt_logprobs)
        return self._sampling_params(
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
