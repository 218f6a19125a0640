import pytest
import torch
from bitwatt.training.conversations import Conversation, Message
from bitwatt.training.corpus import Document, Split
from bitwatt.training.data import Batches, TokenStream, tokenize
from bitwatt.training.tokenizer import train_tokenizer


def make_batches(num_tokens: int = 1000, batch_size: int = 3, seed: int = 0) -> Batches:
    stream = TokenStream(torch.arange(num_tokens), num_bytes=num_tokens)
    return Batches(stream, batch_size, sequence_length=16, seed=seed)


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = make_batches().at(5)
    assert inputs.shape == targets.shape == (3, 16)
    assert torch.equal(targets, inputs + 1)


def test_an_epoch_takes_every_window_once():
    batches = make_batches()
    starts = [int(row[0]) for step in range(batches.steps_per_epoch) for row in batches.at(step)[0]]
    assert len(set(starts)) == len(starts) == batches.steps_per_epoch * 3
    assert {start % 16 for start in starts} == {starts[0] % 16}
    assert max(starts) + 16 < 1000


@pytest.mark.parametrize("step", [0, 7, 100])
def test_a_batch_depends_on_the_seed_and_the_step_alone(step: int):
    assert torch.equal(make_batches().at(step)[0], make_batches().at(step)[0])
    assert not torch.equal(make_batches().at(step)[0], make_batches(seed=1).at(step)[0])


def test_epochs_differ():
    batches = make_batches()
    assert not torch.equal(batches.at(0)[0], batches.at(batches.steps_per_epoch)[0])


def test_stream_holds_every_document_between_bos_and_an_end():
    documents = (Document("a.py", "x = 1\n"), Document("b.py", "y = 'é'\n"))
    talk = Conversation("a.py:0", (Message("user", "x?"), Message("assistant", "1")))
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=262)
    stream = tokenize(Split(documents, (talk,)), tokenizer)
    text = tokenizer.decode(stream.tokens.tolist(), skip_special_tokens=False)
    assert text.count("<|begin_of_text|>") == 3
    assert text.count("<|end_of_text|>") == text.count("<|eot_id|>") == 2
    assert "<|begin_of_text|>User: x?<|eot_id|>Assistant: 1<|eot_id|>" in text
    assert stream.num_bytes == len("x = 1\n" + "y = 'é'\n" + "User: x?" + "Assistant: 1") + 1
