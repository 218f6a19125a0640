"""A model's text codec beside an event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bitwatt.errors import InvalidRequestError
from bitwatt.text.codec import TEMPLATE_TIME_LIMIT_S, TextCodec
from bitwatt.text.output import OutputText
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["TextProcessor"]

T = TypeVar("T")

_INLINE_CHARS = 2000  # encoded on the event loop in well under a millisecond (AMD Zen 4)


class TextProcessor:
    """Runs a codec without holding up the event loop that it is used from.

    Long inputs are encoded, and templates rendered, in two threads of its own. Arguments and
    errors are the codec's.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")

    @classmethod
    def from_folder(cls, folder: Path) -> "TextProcessor":
        """Return the text side of a Hugging Face folder; see TextCodec.from_folder."""
        return cls(TextCodec.from_folder(folder))

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token."""
        return self.codec.vocabulary

    def output(self, stops: Sequence[str] = ()) -> OutputText:
        """Return a new choice's text."""
        return self.codec.output(stops)

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
        return encode() if len(text) <= _INLINE_CHARS else await self._in_thread(encode)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of the messages as the model's template puts them."""
        render = partial(
            self.codec.render,
            messages,
            kwargs=kwargs,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            # A template's own time limit is looked at whenever it outputs something. One that
            # computes for long between two outputs is only ended by this longer limit.
            text = await asyncio.wait_for(self._in_thread(render), 5 * TEMPLATE_TIME_LIMIT_S)
        except TimeoutError:
            raise InvalidRequestError(
                "the model's chat template takes too long for these messages", param="messages"
            ) from None
        return await self.encode(
            text, max_tokens=max_tokens, add_special_tokens=False, param="messages"
        )

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens' text, special tokens spelled out."""
        return await self._in_thread(partial(self.codec.decode, token_ids))

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
