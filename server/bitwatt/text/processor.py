"""A model's text codec beside an event loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bitwatt.text.answers.forms import AnswerForms
from bitwatt.text.codec import TextCodec
from bitwatt.text.lanes import Lane
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["TextProcessor"]

T = TypeVar("T")

_INLINE_CHARS = 2000  # encoded on the event loop in well under a millisecond (AMD Zen 4)
_SHORT_CHARS = 64 * 1024  # encoded in 30 ms (AMD Zen 4), where 2 MB take a second
_INLINE_TOKENS = 2000
_SHORT_TOKENS = 64 * 1024


class TextProcessor:
    """Runs a codec without holding up the event loop that it is used from.

    Long inputs are encoded, and templates rendered, in threads of its own: what is short doesn't
    wait for what is long. Arguments and errors are the codec's.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self._short_work = Lane("text-short", 2)
        self._long_work = Lane("text-long", 2)

    @classmethod
    def from_folder(cls, folder: Path, **options: Any) -> "TextProcessor":
        """Return the text side of a Hugging Face folder; see TextCodec."""
        return cls(TextCodec.from_folder(folder, **options))

    @property
    def forms(self) -> AnswerForms:
        """How the model's answers are written."""
        return self.codec.forms

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token."""
        return self.codec.vocabulary

    @property
    def description(self) -> bytes:
        """The tokenizer's settings, as JSON."""
        return self.codec.description

    async def encode(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
        param: str = "prompt",
    ) -> list[int]:
        """Return the text's tokens."""
        encode = partial(
            self.codec.encode,
            text,
            max_tokens=max_tokens,
            add_special_tokens=add_special_tokens,
            param=param,
        )
        if len(text) <= _INLINE_CHARS:
            return encode()
        return await self._lane(len(text) <= _SHORT_CHARS).run(encode)

    async def encode_chat(
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
        """Return the tokens of the messages as the model's template puts them."""
        encode = partial(
            self.codec.encode_chat,
            messages,
            tools=tools,
            kwargs=kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            add_special_tokens=add_special_tokens,
            max_tokens=max_tokens,
        )
        return await self._lane(_is_short([messages, tools], _SHORT_CHARS)).run(encode)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens' text, special tokens spelled out."""
        return await self.run(partial(self.codec.decode, token_ids), len(token_ids))

    async def run(self, work: Callable[[], T], num_tokens: int) -> T:
        """Return what the work returns, which takes no longer than to decode so many tokens."""
        if num_tokens <= _INLINE_TOKENS:
            return work()
        return await self._lane(num_tokens <= _SHORT_TOKENS).run(work)

    def close(self) -> None:
        """Let the threads go."""
        self._short_work.close()
        self._long_work.close()

    def _lane(self, is_short: bool) -> Lane:
        return self._short_work if is_short else self._long_work


def _is_short(value: Any, max_chars: int) -> bool:
    """Return whether the texts within mappings and sequences have no more characters together."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            max_chars -= len(value)
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        if max_chars < len(waiting):
            return False
    return True
