"""Text from tokens as they come, never splitting a character."""

import codecs
from collections.abc import Iterable

from bitwatt.text.vocabulary import Vocabulary

__all__ = ["Detokenizer", "TextOffsets"]

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one stream of tokens.

    The pieces returned by push and finish, joined, are the text of all tokens, however they were
    split. At most three bytes are held back, so a token costs O(its bytes).
    """

    __slots__ = ("_bytes", "_decode", "_decoder", "_strips_space")

    def __init__(
        self, vocabulary: Vocabulary, *, literal: bool = False, spelled: Iterable[str] = ()
    ) -> None:
        """Begin a text; literal spells special tokens out, spelled those among these texts."""
        self._bytes = vocabulary.literal_bytes if literal else vocabulary.spelling(spelled)
        self._decoder = _new_utf8_decoder("replace")
        self._decode = self._decoder.decode
        self._strips_space = vocabulary.strips_space

    @property
    def holds_back(self) -> bool:
        """Whether bytes of an open character wait."""
        return bool(self._decoder.getstate()[0])

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


class TextOffsets:
    """Where each token of a stream begins in its text, in characters.

    A token that goes on with a character begins where that character does. So no offset is past
    the text, and each is at least the one before.
    """

    __slots__ = ("_detokenizer", "_num_chars")

    def __init__(self, vocabulary: Vocabulary, start: int = 0, *, literal: bool = False) -> None:
        """Begin at an offset: so many characters come before the first token.

        literal  as Detokenizer has it
        """
        self._detokenizer = Detokenizer(vocabulary, literal=literal)
        self._num_chars = start

    def push(self, token_id: int) -> int:
        """Return the token's offset."""
        offset = self._num_chars
        self._num_chars += len(self._detokenizer.push((token_id,)))
        return offset
