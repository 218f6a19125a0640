"""Everything a model needs of text, in the calling thread: encode, render, decode."""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitwatt.checkpoints.gguf_file import is_gguf
from bitwatt.errors import CheckpointError, InvalidRequestError
from bitwatt.text.answers.formats import ReasoningParser, ToolCallParser
from bitwatt.text.answers.forms import forms_of
from bitwatt.text.chat_template import ChatTemplate, checked_kwargs
from bitwatt.text.control_tokens import ControlTokens, texts_within
from bitwatt.text.detokenizer import Detokenizer
from bitwatt.text.encoding import encode
from bitwatt.text.gguf_tokenizer import read_gguf_text
from bitwatt.text.output import OutputText
from bitwatt.text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["TEMPLATE_TIME_LIMIT_S", "TextCodec"]

logger = logging.getLogger(__name__)

TEMPLATE_TIME_LIMIT_S = 2.0  # of processor time

_PROBE = "a"
_PRIVATE_USE = range(0xE000, 0xF8FF)

Written = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]
"""What callers wrote: messages and tools."""


class TextCodec:
    """The tokenizer and the chat templates of one model. Safe in any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | CheckpointError | None = None,
        tool_template: ChatTemplate | CheckpointError | None = None,
        *,
        control_tokens: Sequence[str] | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
        allow_control_tokens: bool = False,
        call_format: ToolCallParser = "auto",
        thinking_format: ReasoningParser = "auto",
        description: bytes = b"{}",
    ) -> None:
        """Take the tokenizer and what was made of the model's templates.

        template, tool_template  an error is what each conversation is refused with; tools have a
                                 template of their own in some models
        control_tokens, sampling_defaults  see TokenizerFiles
        allow_control_tokens     whether control tokens in messages are taken as such, so that
                                 whoever writes a message can write turns, too
        call_format, thinking_format  see forms_of
        description              see TokenizerFiles.describe
        """
        self.sampling_defaults = sampling_defaults or {}
        tokenizer.no_truncation()  # a folder's own setting would cut prompts in silence
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._tool_template = tool_template or template
        self._control_tokens = {
            template: ControlTokens(tokenizer, template.literals, control_tokens)
            for template in (template, tool_template)
            if isinstance(template, ChatTemplate) and not allow_control_tokens
        }
        usable = [t for t in (template, tool_template) if isinstance(t, ChatTemplate)]
        self.forms = forms_of(
            "\0".join(one.literals for one in usable),
            takes_tools=any(one.takes_tools for one in usable),
            call_format=call_format,
            thinking_format=thinking_format,
        )
        self.vocabulary = Vocabulary(tokenizer, self.forms.marks)
        self.description = description
        self._around = self._find_around()

    @classmethod
    def from_folder(cls, folder: Path, **options: Any) -> "TextCodec":
        """Return the text side of a Hugging Face folder, or of a GGUF file.

        options  as TextCodec has them, but for what the model's files say

        tokenizer_files.py and gguf_tokenizer.py say what is read.

        A template that doesn't compile is logged, and refuses conversations, not texts.

        Raises  CheckpointError if a file is missing or not what it should be
        """
        is_file = is_gguf(folder)
        files = read_gguf_text(folder) if is_file else read_tokenizer_files(folder)
        default = _compile(files, "default", folder)
        tool_use = _compile(files, "tool_use", folder) if "tool_use" in files.templates else None
        try:
            return cls(
                files.tokenizer,
                default,
                tool_use,
                control_tokens=files.control_tokens,
                sampling_defaults=files.sampling_defaults,
                description=files.describe(),
                **options,
            )
        except InvalidRequestError as error:  # of the probe
            path = folder if is_file else folder / "tokenizer.json"
            raise CheckpointError(f"{path} can't be used: {error}") from error

    def output(
        self, stops: Sequence[str] = (), *, min_tokens: int = 0, spelled: Sequence[str] = ()
    ) -> OutputText:
        """Return a new choice's text; the arguments are OutputText's."""
        return OutputText(self.vocabulary, stops, min_tokens=min_tokens, spelled=spelled)

    def encode(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
        param: str = "prompt",
    ) -> list[int]:
        """Return the text's tokens.

        max_tokens  a text that is certain to have more is refused before it is encoded
        param       the request's field that an error names

        Raises  InvalidRequestError with context_length_exceeded
        """
        if max_tokens is not None:
            self._refuse_hopeless(text, max_tokens, param)
        token_ids = encode(self._tokenizer, text, add_special_tokens=add_special_tokens)
        bos = self._around[0][0] if self._around[0] else None
        if add_special_tokens and bos is not None and token_ids[:2] == [bos, bos]:
            del token_ids[0]  # the text began with one
        return token_ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of the messages as the model's template puts them.

        Developers speak as the system, which templates know. Control tokens in messages are text,
        unless the codec was told to allow them.

        tools               as OpenAI has them
        continue_final_message  ends the prompt with the last message's content, for the model to go
                            on with; it excludes add_generation_prompt
        add_special_tokens  whether to put around them what the tokenizer puts around a text, though
                            the template has the like
        max_tokens          as encode has it

        Raises  InvalidRequestError if there is no template or it can't be used, if it refuses the
                messages or takes more than TEMPLATE_TIME_LIMIT_S, for kwargs that a caller may
                not set, or with context_length_exceeded
        """
        template = self._tool_template if tools is not None else self._template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or LLM.generate",
                param="messages",
            )
        if isinstance(template, CheckpointError):
            raise InvalidRequestError(
                f"this model's chat template can't be used: {template}; use /v1/completions, or "
                "LLM.generate",
                param="messages",
            )
        render = partial(
            _render,
            template,
            kwargs={
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                **checked_kwargs(kwargs or {}),
            },
            now=datetime.now(),
        )
        if continue_final_message:
            render = partial(_render_open, render)
        written = [_as_template_input(message) for message in messages], tools
        guard = self._control_tokens.get(template)
        text = render(written)
        if max_tokens is not None:
            self._refuse_hopeless(text, max_tokens, "messages")
        if guard is None:
            token_ids = encode(self._tokenizer, text, add_special_tokens=False)
        else:
            token_ids = guard.encode(text, guard.written_in(text, render, written))
        before, after = self._around if add_special_tokens else ([], [])
        return [*before, *token_ids, *after]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens' text, special tokens spelled out."""
        detokenizer = Detokenizer(self.vocabulary, literal=True)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def _find_around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after a text."""
        with_special, without = (
            encode(self._tokenizer, _PROBE, add_special_tokens=add) for add in (True, False)
        )
        num_special = len(with_special) - len(without)
        starts = (at for at in range(num_special) if with_special[at:][: len(without)] == without)
        start = next(starts, num_special)
        return with_special[:start], with_special[start + len(without) :]

    def _refuse_hopeless(self, text: str, max_tokens: int, param: str) -> None:
        at_least = -(-len(text) // self.vocabulary.max_bytes)
        if at_least > max_tokens:
            raise InvalidRequestError(
                f"prompt has at least {at_least} tokens; the limit is {max_tokens} "
                "(--max-model-len)",
                param=param,
                code="context_length_exceeded",
            )


def _compile(
    files: TokenizerFiles, name: str, folder: Path
) -> ChatTemplate | CheckpointError | None:
    """Return the template of that name, or why it can't be used, or None if there are none."""
    templates = files.templates
    if not templates:
        return None
    try:
        if name not in templates:
            raise CheckpointError(
                f"the chat templates are named {', '.join(sorted(templates))}, and none {name}"
            )
        return ChatTemplate(templates[name], files.special_tokens)
    except CheckpointError as error:
        logger.warning("conversations are refused by the model in %s: %s", folder, error)
        return error


def _render(
    template: ChatTemplate,
    written: Written,
    *,
    kwargs: Mapping[str, Any],
    now: datetime,
) -> str:
    messages, tools = written
    return template.render(
        messages, tools=tools, kwargs=kwargs, time_limit_s=TEMPLATE_TIME_LIMIT_S, now=now
    )


def _render_open(
    render: Callable[[Written], str],
    written: Written,
) -> str:
    """Return the text up to the end of the last message's content, wherever it stands in it."""
    [*before, last], tools = written
    taken = "".join(texts_within(written))
    end = next(char for char in map(chr, _PRIVATE_USE) if char not in taken)
    text = render(([*before, {**last, "content": f"{last['content']}{end}"}], tools))
    if text.count(end) != 1:
        raise InvalidRequestError(
            "the model's chat template doesn't put the last message as it is; it can't be "
            "continued",
            param="continue_final_message",
        )
    return text[: text.index(end)]


def _as_template_input(message: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    return {**given, "role": "system"} if given.get("role") == "developer" else given
