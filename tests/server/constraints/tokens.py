"""Grammars of the small tokenizer's tokens."""

import pytest
from bitwatt.constraints.compiling import compile_grammar, new_tokenizer, written_for_matcher
from bitwatt.constraints.grammars import Grammar
from bitwatt.constraints.native import native_tokenizer
from bitwatt.constraints.structured_outputs import StructuredOutputsParams
from bitwatt.text.vocabulary import Vocabulary

from tests.fakes import make_tokenizer

__all__ = [
    "VOCABULARY",
    "VOCAB_SIZE",
    "allowed",
    "make_grammar",
    "make_native_grammar",
    "token_ids",
    "written",
]

VOCABULARY = Vocabulary(make_tokenizer())
VOCAB_SIZE = len(VOCABULARY)


def written(**asked: object) -> str:
    """Return the grammar of StructuredOutputsParams as matchers take it."""
    return written_for_matcher(StructuredOutputsParams(**asked).source())  # type: ignore[arg-type]


def make_grammar(vocab_size: int = VOCAB_SIZE, **asked: object) -> Grammar:
    tokenizer = new_tokenizer(VOCABULARY.for_grammars(), vocab_size)
    return Grammar(compile_grammar(written(**asked), tokenizer), vocab_size, [0])


def make_native_grammar(vocab_size: int = VOCAB_SIZE, **asked: object) -> Grammar:
    tokenizer = native_tokenizer(VOCABULARY.for_grammars(), vocab_size)
    if tokenizer is None:
        pytest.skip("the native kernels were not built")
    return tokenizer.compile(written(**asked), [0])


def token_ids(text: str) -> list[int]:
    """Return the ids of the text's single bytes."""
    return [VOCABULARY.token_bytes.index(bytes([byte])) for byte in text.encode()]


def allowed(mask: bytes) -> set[int]:
    bits = int.from_bytes(mask, "little")
    return {token for token in range(8 * len(mask)) if bits >> token & 1}
