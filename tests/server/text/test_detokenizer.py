"""Text from tokens, whatever the split."""

from itertools import pairwise

import pytest
from bitwatt.errors import CheckpointError
from bitwatt.text.detokenizer import Detokenizer, TextOffsets
from bitwatt.text.vocabulary import Vocabulary
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from tests.fakes import make_tokenizer

VOCABULARY = Vocabulary(make_tokenizer())
NUM_TOKENS = len(VOCABULARY)


def make_sentencepiece_tokenizer() -> Tokenizer:
    """Return a tokenizer like Llama 2's: pieces with ▁ for a space, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "a", "b", "▁qu", "ick", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def cut(items, cuts):
    """Return the items in pieces that end at these places."""
    edges = [0, *sorted(c % (len(items) + 1) for c in cuts), len(items)]
    return [items[start:end] for start, end in pairwise(edges)]


def stream(vocabulary, token_ids, cuts=()):
    detokenizer = Detokenizer(vocabulary)
    pieces = [detokenizer.push(part) for part in cut(token_ids, cuts)]
    return [*pieces, detokenizer.finish()]


@given(
    st.lists(st.integers(0, NUM_TOKENS - 1), max_size=60), st.lists(st.integers(0, 60), max_size=20)
)
def test_any_tokens_in_any_pieces_give_the_tokenizers_own_text(token_ids, cuts):
    text = "".join(stream(VOCABULARY, token_ids, cuts))
    assert text == make_tokenizer().decode(token_ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_a_text_comes_back_token_by_token_and_no_piece_splits_a_character(text):
    token_ids = make_tokenizer().encode(text.replace("<", "")).ids
    pieces = stream(VOCABULARY, token_ids, range(60))
    assert "".join(pieces) == text.replace("<", "")
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_an_emoji_of_four_byte_tokens_comes_whole():
    token_ids = [make_tokenizer().token_to_id(char) for char in "ðŁĴ¡"]  # the bytes of 💡
    assert stream(VOCABULARY, token_ids, [1, 2, 3]) == ["", "", "", "💡", ""]


def test_a_character_that_never_completes_ends_as_a_replacement():
    token_ids = [make_tokenizer().token_to_id(char) for char in "aðŁ"]
    assert stream(VOCABULARY, token_ids, [1, 2]) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_no_text_but_added_ones_are():
    added = make_tokenizer().token_to_id("<added>")
    assert "".join(stream(VOCABULARY, [0, added, 1])) == "<added>"
    assert VOCABULARY.literal(0) == b"<|end|>"


@pytest.mark.parametrize("word", ["đem", "čistý", "Ġa", "ĠĊ", "Âµ", "naïve", "ł", "名"])
@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_is_its_own_text_whatever_its_letters_stand_for(word, special):
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken(word, special=special, normalized=False)])
    [token_id] = tokenizer.encode(word).ids
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.literal(token_id) == word.encode()
    assert "".join(stream(vocabulary, [token_id])) == ("" if special else word)


@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=60))
def test_special_tokens_may_be_spelled_out(token_ids):
    detokenizer = Detokenizer(VOCABULARY, literal=True)
    text = detokenizer.push(token_ids) + detokenizer.finish()
    assert text == make_tokenizer().decode(token_ids, skip_special_tokens=False)


@given(st.text(alphabet="the qué你🙂<|end|>", max_size=30), st.integers(0, 9))
def test_a_token_begins_where_its_first_character_does(text, start):
    token_ids = make_tokenizer().encode(text).ids
    offsets = TextOffsets(VOCABULARY, start)
    before = b""
    for token_id in token_ids:
        whole = before.decode("utf-8", "ignore")  # an open character isn't counted yet
        assert offsets.push(token_id) == start + len(whole)
        before += VOCABULARY.token_bytes[token_id]


def test_a_character_of_four_tokens_has_one_offset_and_the_next_token_comes_after_it():
    offsets = TextOffsets(VOCABULARY)
    tokens = [make_tokenizer().token_to_id(char) for char in ["a", *"ðŁĴ¡", "b"]]  # a💡b
    assert [offsets.push(token) for token in tokens] == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("token_id", [1 << 32 - 1, 5_000_000])
def test_a_token_far_beyond_the_others_takes_no_memory(token_id):
    vocabulary = {"a": 0, "b": token_id}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(CheckpointError, match=rf"2 tokens, one of them with the id {token_id}"):
        Vocabulary(tokenizer)


def test_ids_beyond_the_vocabulary_are_no_text():
    assert "".join(stream(VOCABULARY, [NUM_TOKENS + 5])) == ""
    assert VOCABULARY.literal(NUM_TOKENS + 5) == b""


@given(
    st.lists(st.sampled_from(["▁", "▁the", "a", "b", "▁qu", "ick", "é", "</s>"]), max_size=20),
    st.lists(st.integers(0, 20), max_size=8),
)
def test_sentencepiece_tokens_give_the_tokenizers_own_text(pieces, cuts):
    tokenizer = make_sentencepiece_tokenizer()
    token_ids = [tokenizer.token_to_id(piece) for piece in pieces]
    text = "".join(stream(Vocabulary(tokenizer), token_ids, cuts))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True)


@given(st.text(alphabet="abé 你🙂", max_size=12), st.lists(st.integers(0, 40), max_size=8))
def test_sentencepiece_bytes_make_characters(text, cuts):
    tokenizer = make_sentencepiece_tokenizer()
    token_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    text_of_all = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(Vocabulary(tokenizer), token_ids, cuts)) == text_of_all


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), None])
def test_other_kinds_of_tokenizer_are_refused_by_name(decoder):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(CheckpointError, match="WordPiece" if decoder is not None else "none"):
        Vocabulary(tokenizer)
