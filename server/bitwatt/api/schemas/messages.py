"""/v1/messages, Anthropic's: what a caller sends."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)

from bitwatt.api.schemas.chat import MAX_MESSAGES, ChatTemplateKwargs
from bitwatt.api.schemas.common import Body, Bounded, ModelName, SamplingBody, StopStrings, whole
from bitwatt.api.schemas.message_turns import (
    MessagesToolChoice,
    MessagesTools,
    System,
    Turns,
    chat_messages,
    chat_tool,
    chat_tool_choice,
    check_tools,
    text_of,
)
from bitwatt.api.schemas.parameters import (
    MESSAGES,
    MESSAGES_COUNT,
    OUTPUT_CONFIG,
    THINKING,
    refuse,
)
from bitwatt.api.schemas.tools import MAX_TOOLS
from bitwatt.errors import shorten
from bitwatt.serving.sampling_params import check_max_tokens
from bitwatt.text.chat_template import EFFORT, SWITCHES

__all__ = ["CountTokensBody", "MessagesBody", "OutputConfig", "Thinking"]


def _check_format(given: dict[str, Any]) -> dict[str, Any]:
    kind, schema = given.get("type"), given.get("schema")
    if kind != "json_schema":
        told = f"output_config.format type is {shorten(kind)}; it is json_schema"
        raise refuse(told, "output_config.format")
    if not isinstance(schema, dict):
        told = f"output_config.format schema is {shorten(schema)}; it is an object"
        raise refuse(told, "output_config.format")
    return given


OutputFormat = Annotated[
    dict[str, Any],
    AfterValidator(_check_format),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
            "required": ["type", "schema"],
        }
    ),
]


class Thinking(Body):
    """Whether a model that reasons does so."""

    parameters: ClassVar = THINKING

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="`enabled` and `disabled` are told to the template; `adaptive` leaves it be."
    )
    budget_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)] | None = Field(
        None,
        description="Tokens of thinking at most, after which it is ended. Anthropic has 1024 at "
        "least.",
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="`omitted` leaves the text of thinking blocks out."
    )


class OutputConfig(Body):
    """What an answer must be."""

    parameters: ClassVar = OUTPUT_CONFIG

    format: OutputFormat | None = Field(
        None, description="`json_schema`, JSON by `schema`; any text unless given."
    )
    effort: str | None = Field(
        None,
        max_length=64,
        description="What templates that know a `reasoning_effort` are told, as `low`, `medium` or "
        "`high`.",
    )


def _settle(data: Any) -> Any:
    """Make chat's messages of the turns and one text of the system's, and look at the tools."""
    if not isinstance(data, dict):
        return data
    unknown: list[str] = []
    settled = dict(data)
    if isinstance(data.get("system"), list):
        settled["system"] = text_of(data["system"], "system", unknown)
    if isinstance(data.get("messages"), list):
        settled["messages"] = chat_messages(data["messages"], unknown)
    check_tools(data.get("tools"), data.get("tool_choice"), unknown)
    return {**settled, **dict.fromkeys(unknown)}


_EXAMPLE: dict[str, JsonValue] = {
    "model": "builtin",
    "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
}


class _Conversation:
    """What both routes have; a mixin, for one of them draws no tokens."""

    system: str | None
    messages: list[dict[str, Any]]
    thinking: Thinking | None
    output_config: OutputConfig | None
    tools: list[dict[str, Any]] | None
    tool_choice: dict[str, Any] | None
    chat_template_kwargs: dict[str, Any] | None

    def _as_chat(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        kind = None if self.thinking is None else self.thinking.type
        effort = None if self.output_config is None else self.output_config.effort
        kwargs: dict[str, Any] = {} if effort is None else {EFFORT: effort}
        if kind in ("enabled", "disabled"):
            kwargs |= dict.fromkeys(SWITCHES, kind == "enabled")
        is_begun = self.messages[-1]["role"] == "assistant"
        return {
            "messages": [*system, *self.messages],
            "continue_final_message": True if is_begun else None,
            "add_generation_prompt": False if is_begun else None,
            "chat_template_kwargs": (kwargs | (self.chat_template_kwargs or {})) or None,
            "tools": self.tools and [chat_tool(tool) for tool in self.tools],
            **chat_tool_choice(self.tool_choice),
        }


_TURNS = Field(
    min_length=1,
    max_length=MAX_MESSAGES,
    description="The conversation so far. Where it ends with the assistant, the model goes on with "
    "that. Content is a string or blocks: `text`; a user's `tool_result`; an assistant's "
    "`thinking` and `tool_use`.",
)
_SYSTEM = Field(None, description="What the system says: a string or text blocks.")
_THINKING = Field(None, description="Whether a model that reasons does so.")
_OUTPUT = Field(None, description="What the answer must be, and how hard the model tries.")
_TOOLS = Field(
    None,
    max_length=MAX_TOOLS,
    description="Up to 128 tools that the model may call, each with a `name`, a `description`, an "
    "`input_schema`, and `strict`.",
)
_CHOICE = Field(
    None,
    description="By `type`: `auto`, the default; `any`: it calls at least one; `tool`: the one "
    "that is named, once; `none`. `disable_parallel_tool_use` has it call one at most.",
)
_KWARGS = Field(None, description="What the model's template may be told. As in vLLM.")


class MessagesBody(_Conversation, SamplingBody):
    """A request for the next message of a conversation."""

    model_config = ConfigDict(json_schema_extra={"example": {**_EXAMPLE, "max_tokens": 24}})
    parameters: ClassVar = MESSAGES
    nested: ClassVar[tuple[str, ...]] = ("thinking", "output_config")

    messages: Turns = _TURNS
    max_tokens: Annotated[int, Bounded("max_tokens", lowest=1)] = Field(
        description="Tokens of the answer at most."
    )
    system: System | None = _SYSTEM
    stop_sequences: StopStrings | None = Field(
        None, description="Strings that end the answer, as completions have them in `stop`."
    )
    thinking: Thinking | None = _THINKING
    output_config: OutputConfig | None = _OUTPUT
    tools: MessagesTools | None = _TOOLS
    tool_choice: MessagesToolChoice | None = _CHOICE
    chat_template_kwargs: ChatTemplateKwargs | None = _KWARGS

    _settle_turns = model_validator(mode="before")(_settle)

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat completion that asks for the same.

        Raises  InvalidRequestError where nothing is to be generated
        """
        check_max_tokens("max_tokens", self.max_tokens, None)
        form = None if self.output_config is None else self.output_config.format
        return {
            **self.sampling(),
            **self._as_chat(),
            "stop": self.stop_sequences,
            "max_completion_tokens": self.max_tokens,
            "thinking_token_budget": self.thinking and self.thinking.budget_tokens,
            "response_format": form and _response_format(form),
        }


class CountTokensBody(_Conversation, Body):
    """A conversation whose tokens are to be counted."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    parameters: ClassVar = MESSAGES_COUNT
    nested: ClassVar[tuple[str, ...]] = ("thinking", "output_config")

    model: ModelName
    messages: Turns = _TURNS
    system: System | None = _SYSTEM
    thinking: Thinking | None = _THINKING
    output_config: OutputConfig | None = _OUTPUT
    tools: MessagesTools | None = _TOOLS
    tool_choice: MessagesToolChoice | None = _CHOICE
    chat_template_kwargs: ChatTemplateKwargs | None = _KWARGS

    _settle_turns = model_validator(mode="before")(_settle)

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat completion that has the same prompt."""
        return {"model": self.model, **self._as_chat()}


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return chat's word for the format."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": given["schema"]},
    }
