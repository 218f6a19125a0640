"""What each token id stands for, in bytes."""

import json
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from bitwatt.constraints.compiling import TokenBytes
from bitwatt.errors import CheckpointError

__all__ = ["Vocabulary"]

_SPACE_MARK = "▁"
_MAX_SPARSENESS = 4  # ids for each token, beyond so many
_MAX_GAP = 1 << 20


class Vocabulary:
    """The bytes of every token, so that text is the concatenation of its tokens' bytes.

    token_bytes    by token id; empty for ids without a token and for special tokens
    literal_bytes  the same, with special tokens spelled out
    strips_space   whether the first space of a text is the tokenizer's own and not the text's
    max_bytes      of the longest token
    mark_ids       ids of the marks that are tokens

    Covers byte-level BPE and SentencePiece BPE with byte fallback, which is what the BitNet
    b1.58 checkpoints use. Raises CheckpointError for another kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Collection[str] = ()) -> None:
        """Read them; marks are texts whose tokens, where they have one each, end all else.

        A grammar knows such a token by its id alone, as it does a special token.
        """
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        size = max(tokens.values(), default=-1) + 1
        if size > _MAX_SPARSENESS * len(tokens) + _MAX_GAP:
            raise CheckpointError(
                f"tokenizer.json has {len(tokens)} tokens, one of them with the id {size - 1}"
            )
        decoder = json.loads(tokenizer.to_str())["decoder"]  # goes through every id to the highest
        kinds = _decoder_types(decoder)
        if "ByteLevel" in kinds:
            spell = _spell_byte_level
        elif "ByteFallback" in kinds:
            spell = _spell_sentencepiece
        else:
            raise CheckpointError(
                f"tokenizer.json has a decoder of kind {'+'.join(kinds) or 'none'}; "
                "byte-level and byte-fallback decoders are supported"
            )
        self.strips_space = "Strip" in kinds
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        self.literal_bytes = [b""] * size
        for token, token_id in tokens.items():
            self.literal_bytes[token_id] = spell(token)
        if spell is _spell_byte_level:
            for token_id, text in added.items():  # which is never bytes written as letters
                self.literal_bytes[token_id] = text.content.encode()
        self.token_bytes = [
            b"" if token_id in special else data for token_id, data in enumerate(self.literal_bytes)
        ]
        self._special_ids = {added[token_id].content: token_id for token_id in special}
        self.mark_ids = {
            token.content: token_id for token_id, token in added.items() if token.content in marks
        }
        self._spelled: dict[frozenset[int], list[bytes]] = {frozenset(): self.token_bytes}
        self.max_bytes = max(map(len, self.literal_bytes), default=1) or 1

    def __len__(self) -> int:
        return len(self.token_bytes)

    def notices_for(self, vocab_size: int) -> list[str]:
        """Return what an operator should know where these aren't the tokens of a model.

        vocab_size  rows of its head, some of which may be padding
        """
        size = len(self)
        if size > vocab_size:
            fault = f"texts with tokens from {vocab_size} on are refused"
        elif 2 * size < vocab_size:
            fault = "most of the model's have no text, so that the two may not belong together"
        else:
            return []
        return [f"the tokenizer has {size} token ids and the model {vocab_size}: {fault}"]

    def for_grammars(self) -> TokenBytes:
        """Return the tokens as grammars know them: text by its bytes, special tokens by name."""
        marks = set(self.mark_ids.values())
        special = [i for i, data in enumerate(self.token_bytes) if not data or i in marks]
        return TokenBytes(self.literal_bytes, special)

    def spelling(self, texts: Iterable[str]) -> list[bytes]:
        """Return token_bytes with the special tokens among the texts spelled out."""
        ids = self.special_ids(texts)
        if ids not in self._spelled:
            self._spelled[ids] = [
                self.literal_bytes[i] if i in ids else data
                for i, data in enumerate(self.token_bytes)
            ]
        return self._spelled[ids]

    def literal(self, token_id: int) -> bytes:
        """Return the token's bytes, special tokens spelled out; empty for an id without token."""
        return self.literal_bytes[token_id] if token_id < len(self.literal_bytes) else b""

    def special_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the special tokens among the texts."""
        ids = self._special_ids
        return frozenset(ids[text] for text in texts if text in ids)

    def spell(self, token_id: int) -> str:
        """Return literal's text; U+FFFD stands for bytes that are no whole character."""
        return self.literal(token_id).decode("utf-8", "replace")


def _decoder_types(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _decoder_types(part)]
    return [decoder["type"]]


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(shifted)}


def _spell_byte_level(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes(table[char] for char in token)
    except KeyError:
        return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPACE_MARK, " ").encode()
