"""Documents packed into windows without padding, and batches of them as a function of the step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitwatt.training.conversations import Conversation, Message
from bitwatt.training.tokenizer import EOS, EOT, token_id

WINDOW_LENGTHS = (64, 256)
"""Attention costs as much as the linears at 256 tokens, and most conversations fit in 64."""

REPLAY = 6

IGNORED = -100
"""The target of a position that has none: the end of a document, or a question's token."""


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """One document in tokens.

    tokens       from BOS to EOS or EOT
    is_counted   for each token, whether the loss asks for it
    """

    tokens: Sequence[int]
    is_counted: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents, each [rows, length] int64.

    positions   each token's place in its document, which begins where it is 0
    targets     the token that follows, or IGNORED
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Packed documents, all windows of one length; arrays are [num_windows, length] int16."""

    tokens: NDArray[np.int16]
    positions: NDArray[np.int16]
    targets: NDArray[np.int16]

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.tokens.shape[1])

    def batch(self, rows: NDArray[np.int64] | slice) -> Batch:
        """Return those windows as tensors."""
        arrays = (self.tokens[rows], self.positions[rows], self.targets[rows])
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))


def encode_text(text: str, tokenizer: Tokenizer) -> TokenDocument:
    """Return the text from BOS to EOS; every token counts."""
    tokens = [*tokenizer.encode(text).ids, token_id(tokenizer, EOS)]
    return TokenDocument(tokens, [True] * len(tokens))


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> TokenDocument:
    """Return the conversation in the tokens a server would see it in; the answers alone count.

    The last answer is encoded apart from its prompt, since generation begins at a token boundary
    there; the turns before it are encoded as one text, as a prompt with a history is.
    """
    *history, answer = conversation.messages
    prompt = EOT.join([*map(_rendered, history), "Assistant: "])
    prompt_ids: list[int] = tokenizer.encode(prompt).ids
    answer_ids: list[int] = tokenizer.encode(answer.content, add_special_tokens=False).ids
    tokens = [*prompt_ids, *answer_ids, token_id(tokenizer, EOT)]
    return TokenDocument(tokens, [False] * len(prompt_ids) + [True] * (len(answer_ids) + 1))


def _rendered(message: Message) -> str:
    return f"{message.role.capitalize()}: {message.content.strip()}"


def pack(documents: Iterable[TokenDocument]) -> tuple[Windows, ...]:
    """Return every document in the shortest of WINDOW_LENGTHS that holds it, one set a length.

    A document longer than the longest is cut; the tokens after a cut don't see those before it.
    Longest first, each goes where it leaves the least room.
    """
    by_length: dict[int, list[TokenDocument]] = {length: [] for length in WINDOW_LENGTHS}
    longest = WINDOW_LENGTHS[-1]
    for document in documents:
        for start in range(0, len(document.tokens), longest):
            piece = TokenDocument(
                document.tokens[start : start + longest],
                document.is_counted[start : start + longest],
            )
            if len(piece.tokens) > 1:
                fitting = next(n for n in WINDOW_LENGTHS if n >= len(piece.tokens))
                by_length[fitting].append(piece)
    return tuple(_packed(found, length) for length, found in by_length.items() if found)


def _packed(documents: list[TokenDocument], length: int) -> Windows:
    bins: list[list[TokenDocument]] = []
    bins_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for document in sorted(documents, key=lambda one: -len(one.tokens)):
        size = len(document.tokens)
        room = next((room for room in range(size, length + 1) if bins_by_room[room]), None)
        if room is None:
            room = length
            bins_by_room[room].append(len(bins))
            bins.append([])
        index = bins_by_room[room].pop()
        bins[index].append(document)
        bins_by_room[room - size].append(index)
    shape = (len(bins), length)
    tokens, positions = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    targets = np.full(shape, IGNORED, np.int16)
    for row, chosen in enumerate(bins):
        start = 0
        for document in chosen:
            ids = np.asarray(document.tokens, np.int16)
            counted = np.asarray(document.is_counted, np.bool_)
            end = start + len(ids)
            tokens[row, start:end] = ids
            positions[row, start:end] = np.arange(len(ids))
            targets[row, start : end - 1] = np.where(counted[1:], ids[1:], IGNORED)
            start = end
    return Windows(tokens, positions, targets)


class Batches:
    """Batches of a pool as a pure function of the step, so that a run resumes where it stopped.

    Every epoch takes each window once, in another order, but for those that fill no whole batch.
    The rows of a batch are of one length, so a compiled model sees few shapes.
    """

    def __init__(self, pool: tuple[Windows, ...], batch_tokens: int, seed: int) -> None:
        self.pool = pool
        self.batch_tokens = batch_tokens
        self.seed = seed
        self._epoch: int | None = None
        self._order: list[tuple[int, NDArray[np.int64]]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the pool."""
        return sum(len(windows.tokens) // self._num_rows(windows) for windows in self.pool)

    def at(self, step: int) -> Batch:
        """Return the batch of `step`: `batch_tokens` tokens, or all of a length if there are fewer.

        An epoch's order is kept, so steps are best asked for one after another.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        which, rows = self._order[index]
        return self.pool[which].batch(rows)

    def _num_rows(self, windows: Windows) -> int:
        return min(max(self.batch_tokens // windows.length, 1), len(windows.tokens))

    def _ordered(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches: list[tuple[int, NDArray[np.int64]]] = []
        for which, windows in enumerate(self.pool):
            num_rows = self._num_rows(windows)
            count = len(windows.tokens) // num_rows
            chosen = rng.permutation(len(windows.tokens))[: count * num_rows]
            batches += [(which, rows) for rows in np.split(chosen, count)]
        return [batches[index] for index in rng.permutation(len(batches))]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains on and is tried on.

    text, instructions        the pools of the two phases
    held_out_text             windows of files that aren't trained on
    held_out_answers          questions in phrasings that aren't trained on
    tokens_per_byte           of the held-out text, special tokens not counted as bytes
    """

    text: tuple[Windows, ...]
    instructions: tuple[Windows, ...]
    held_out_text: tuple[Windows, ...]
    held_out_answers: tuple[Windows, ...]
    tokens_per_byte: float


class Curriculum:
    """Text first, then instructions with one step in REPLAY of text, so that it isn't forgotten."""

    def __init__(self, data: TrainingData, batch_tokens: int, text_tokens: int, seed: int) -> None:
        self._text = Batches(data.text, batch_tokens, seed)
        self._instructions = Batches(data.instructions, batch_tokens, seed)
        self._num_text_steps = text_tokens // batch_tokens

    def at(self, step: int) -> Batch:
        """Return the batch of `step`, the same for every model trained with one seed."""
        is_text = step < self._num_text_steps or step % REPLAY == 0
        return (self._text if is_text else self._instructions).at(step)
