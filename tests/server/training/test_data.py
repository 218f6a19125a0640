import numpy as np
import pytest
import torch
from bitwatt.training.data import (
    IGNORED,
    REPLAY,
    Batches,
    Curriculum,
    TokenDocument,
    encode_text,
    pack,
)
from bitwatt.training.tokenizer import train_tokenizer

from tests.server.training.factories import make_training_data


def make_documents(sizes: list[int]) -> list[TokenDocument]:
    return [
        TokenDocument(list(range(index * 300, index * 300 + size)), [True] * size)
        for index, size in enumerate(sizes)
    ]


def make_batches(num_documents: int = 64, seed: int = 0) -> Batches:
    return Batches(pack(make_documents([32] * num_documents)), batch_tokens=256, seed=seed)


def test_packed_windows_hold_every_document_whole_in_the_shortest_length_that_fits():
    documents = make_documents([64, 20, 40, 65, 256, 3, 2])
    short, long = pack(documents)
    assert short.tokens.shape[1] == 64
    assert long.tokens.shape[1] == 256
    for document in documents:
        windows = short if len(document.tokens) <= 64 else long
        found = np.argwhere(windows.tokens == document.tokens[0] + 1)
        row, column = next(
            (row, column - 1) for row, column in found if windows.positions[row, column] == 1
        )
        end = column + len(document.tokens)
        assert windows.tokens[row, column:end].tolist() == document.tokens
        assert windows.positions[row, column:end].tolist() == list(range(len(document.tokens)))


def test_targets_are_the_next_tokens_and_a_document_ends_without_one():
    (windows,) = pack([TokenDocument([5, 6, 7, 8], [False, False, True, True])])
    assert windows.targets[0, :5].tolist() == [IGNORED, 7, 8, IGNORED, IGNORED]


def test_padding_has_no_target_and_looks_at_nothing():
    (windows,) = pack(make_documents([10]))
    assert (windows.targets[0, 9:] == IGNORED).all()
    assert (windows.positions[0, 10:] == 0).all()


def test_a_long_document_is_cut_and_loses_no_token():
    (document,) = make_documents([600])
    windows = pack([document])
    pieces = [piece for one in windows for piece in one.tokens.ravel().tolist() if piece]
    assert sorted(pieces) == document.tokens[1:]


def test_packing_short_documents_leaves_little_room():
    sizes = [5 + index * 7 % 40 for index in range(2000)]
    (windows,) = pack([TokenDocument([9] * size, [True] * size) for size in sizes])
    assert sum(sizes) > 0.97 * windows.tokens.size


def test_an_epoch_takes_every_window_once():
    batches = make_batches()
    firsts = [
        int(row[0]) for step in range(batches.steps_per_epoch) for row in batches.at(step).tokens
    ]
    assert len(set(firsts)) == len(firsts) == 32


@pytest.mark.parametrize("step", [0, 7, 100])
def test_a_batch_depends_on_the_seed_and_the_step_alone(step: int):
    first, again = make_batches().at(step), make_batches().at(step)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, make_batches(seed=1).at(step).tokens)


def test_epochs_differ():
    batches = make_batches()
    assert not torch.equal(batches.at(0).tokens, batches.at(batches.steps_per_epoch).tokens)


def test_text_comes_first_and_now_and_then_among_the_instructions():
    curriculum = Curriculum(make_training_data(), batch_tokens=256, text_tokens=5 * 256, seed=0)
    is_text = [curriculum.at(step).tokens.shape[1] == 256 for step in range(20)]
    assert is_text == [step < 5 or step % REPLAY == 0 for step in range(20)]


def test_text_stands_between_bos_and_eos_and_all_of_it_counts():
    tokenizer = train_tokenizer(["x = 1\n", "y = 'é'\n"], vocab_size=262)
    document = encode_text("y = 'é'\n", tokenizer)
    text = tokenizer.decode(list(document.tokens), skip_special_tokens=False)
    assert text == "<|begin_of_text|>y = 'é'\n<|end_of_text|>"
    assert all(document.is_counted)
