"""Everything a served model needs of text: encode, render, decode."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from bitwatt.errors import CheckpointError, InvalidRequestError
from bitwatt.text.chat_template import ChatTemplate
from bitwatt.text.output import OutputText
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["TextProcessor"]

T = TypeVar("T")

_INLINE_CHARS = 2000  # encoded on the event loop in well under a millisecond (AMD Zen 4)
_TEMPLATE_TIME_LIMIT_S = 2.0
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TextProcessor:
    """The tokenizer and the chat template of one model. Used from one event loop.

    Long inputs are encoded, and templates rendered, in two threads of its own.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        tokenizer.no_truncation()  # a folder's own setting would cut prompts in silence
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self.vocabulary = Vocabulary(tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextProcessor":
        """Return the text side of a Hugging Face folder.

        Reads tokenizer.json and, where they are, tokenizer_config.json and chat_template.jinja.
        Raises  CheckpointError if a file is missing or not what it should be
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a model folder needs its tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise CheckpointError(f"{path} can't be read: {error}") from error
        return cls(tokenizer, _read_template(folder))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def output(self, stops: Sequence[str] = ()) -> OutputText:
        """Return a new choice's text."""
        return OutputText(self.vocabulary, stops)

    async def encode(
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
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await self._in_thread(partial(self._encode, text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of the messages as the model's template puts them.

        Raises  InvalidRequestError if there is no template, if it refuses the messages or takes
                too long, or with context_length_exceeded
        """
        template = self._template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions", param="messages"
            )

        def render() -> str:
            return template.render(
                messages, kwargs=kwargs or {}, time_limit_s=_TEMPLATE_TIME_LIMIT_S
            )

        try:
            # The template watches the clock between its outputs; this watches it in between.
            text = await asyncio.wait_for(self._in_thread(render), 5 * _TEMPLATE_TIME_LIMIT_S)
        except TimeoutError:
            raise InvalidRequestError(
                "the model's chat template takes too long for these messages", param="messages"
            ) from None
        return await self.encode(
            text, max_tokens=max_tokens, add_special_tokens=False, param="messages"
        )

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens' text, special tokens spelled out."""
        return await self._in_thread(
            partial(self._tokenizer.decode, list(token_ids), skip_special_tokens=False)
        )

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call lets go of the interpreter while it works; encode() does not.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        token_ids: list[int] = encoding.ids
        return token_ids

    def _refuse_hopeless(self, text: str, max_tokens: int, param: str) -> None:
        at_least = -(-len(text) // self.vocabulary.max_bytes)
        if at_least > max_tokens:
            raise InvalidRequestError(
                f"prompt has at least {at_least} tokens; the limit is {max_tokens} "
                "(--max-model-len)",
                param=param,
                code="context_length_exceeded",
            )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _read_template(folder: Path) -> ChatTemplate | None:
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    path = folder / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens
