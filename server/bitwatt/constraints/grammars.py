"""The grammars an engine's requests go by, compiled beside its steps and kept for those to come."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING

from llguidance import LLTokenizer

from bitwatt.constraints.compiling import TokenBytes, compile_grammar, new_tokenizer
from bitwatt.constraints.matching import Grammar

if TYPE_CHECKING:
    from bitwatt.constraints.native import NativeTokenizer

__all__ = ["Grammar", "Grammars"]

MAX_KEPT = 256
MAX_KEPT_CHARS = 4 * 1024 * 1024  # of their texts: a compiled one has a size that nobody tells
_STACK_BYTES = 64 * 1024 * 1024  # four times the checker's: what it has compiled fits


class Grammars:
    """Compiles grammars one after the other in a thread of its own. Safe in any thread.

    Keeps those used last: MAX_KEPT, with MAX_KEPT_CHARS of text together.
    """

    def __init__(self, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._token_bytes: TokenBytes | None = None
        self._tokenizer: LLTokenizer | NativeTokenizer | None = None  # the thread's
        self._kept: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[str, Future[Grammar]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def knows_tokens(self) -> bool:
        """Whether learn was called."""
        return self._token_bytes is not None

    def learn(self, token_bytes: TokenBytes) -> None:
        """Take the tokens' bytes, before the first grammar."""
        self._token_bytes = token_bytes

    def compile(self, text: str) -> Future[Grammar]:
        """Return the grammar, now or later; it raises ValueError where it can't be compiled.

        text  as compiling.written_for_matcher gives it
        """
        assert self.knows_tokens, "a grammar is of tokens"
        with self._lock:
            future = self._kept.pop(text, None)
            if future is None:
                future = Future()
                self._num_chars += len(text)
                self._start_thread()
                self._queue.put((text, future))
            self._kept[text] = future
            while len(self._kept) > 1 and (
                len(self._kept) > MAX_KEPT or self._num_chars > MAX_KEPT_CHARS
            ):
                oldest, _ = self._kept.popitem(last=False)
                self._num_chars -= len(oldest)
        return future

    def close(self) -> None:
        """Let the thread go."""
        with self._lock:
            if self._thread is not None:
                self._queue.put(None)
                self._thread = None

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._serve, name="grammars", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)

    def _serve(self) -> None:
        while (asked := self._queue.get()) is not None:
            text, future = asked
            try:
                future.set_result(self._compile(text))
            except BaseException as error:  # a panic of the library's is one too
                future.set_exception(ValueError(str(error) or type(error).__name__))

    def _compile(self, text: str) -> Grammar:
        assert self._token_bytes is not None
        if self._tokenizer is None:
            self._tokenizer = _tokenizer_for(self._token_bytes, self._vocab_size)
        ends = self._end_token_ids or self._token_bytes.special
        ends = [i for i in ends if i < self._vocab_size]
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, LLTokenizer):
            if "\0" not in text:
                return tokenizer.compile(text, ends)
            # C would read no further than that.
            tokenizer = new_tokenizer(self._token_bytes, self._vocab_size)
        return Grammar(compile_grammar(text, tokenizer), self._vocab_size, ends)


def _tokenizer_for(token_bytes: TokenBytes, vocab_size: int) -> "LLTokenizer | NativeTokenizer":
    """Return the tokens for native matchers, or where those can't be for Python's."""
    try:
        from bitwatt.constraints.native import native_tokenizer
    except ImportError:  # without torch, whose tensors the kernels take
        return new_tokenizer(token_bytes, vocab_size)
    return native_tokenizer(token_bytes, vocab_size) or new_tokenizer(token_bytes, vocab_size)
