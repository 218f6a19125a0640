"""Text from tokens as they come, never splitting a character."""

import codecs
from collections.abc import Iterable

from bitwatt.text.vocabulary import Vocabulary

__all__ = ["Detokenizer"]

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one stream of tokens.

    The pieces returned by push and finish, joined, are the text of all tokens, however they were
    split. At most three bytes are held back, so a token costs O(its bytes).
    """

    __slots__ = ("_bytes", "_decode", "_strips_space")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes = vocabulary.token_bytes
        self._decode = _new_utf8_decoder("replace").decode
        self._strips_space = vocabulary.strips_space

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the characters these tokens complete; bytes of an open one wait."""
        table, size = self._bytes, len(self._bytes)
        data = b"".join([table[i] for i in token_ids if i < size])
        if self._strips_space and data:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._decode(data)

    def finish(self) -> str:
        """Return what is left: U+FFFD where the last character never completed."""
        return self._decode(b"", True)
