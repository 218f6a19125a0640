"""Token streams and the batches cut from them, the same for every model trained with one seed."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from tokenizers import Tokenizer

from bitwatt.training.conversations import Conversation, Message
from bitwatt.training.corpus import Split, in_fixed_shuffle
from bitwatt.training.tokenizer import EOS, EOT, token_id


@dataclass(frozen=True, slots=True)
class TokenStream:
    """A side of the corpus in tokens.

    tokens       [num_tokens] int64, documents one after another, each from BOS to EOS or EOT
    num_bytes    UTF-8 bytes of the text they stand for, special tokens not counted
    """

    tokens: torch.Tensor
    num_bytes: int


def tokenize(split: Split, tokenizer: Tokenizer) -> TokenStream:
    """Return all documents and conversations of `split`, mixed in an order their names decide."""
    texts = tokenizer.encode_batch([document.text for document in split.documents])
    eos = token_id(tokenizer, EOS)
    pieces = [[*encoding.ids, eos] for encoding in texts]
    num_bytes = sum(len(document.text.encode()) for document in split.documents)
    for conversation in split.conversations:
        pieces.append(encode_conversation(conversation, tokenizer))
        num_bytes += sum(len(_rendered(message).encode()) for message in conversation.messages)
    names = [document.name for document in split.documents]
    names += [conversation.name for conversation in split.conversations]
    order = in_fixed_shuffle(names)
    ids = chain.from_iterable(pieces[index] for index in order)
    return TokenStream(torch.from_numpy(np.fromiter(ids, dtype=np.int64)), num_bytes)


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the conversation in the tokens a server would see it in.

    The last answer is encoded apart from its prompt, since generation begins at a token boundary
    there; the turns before it are encoded as one text, as a prompt with a history is.
    """
    *history, answer = conversation.messages
    prompt = EOT.join([*map(_rendered, history), "Assistant: "])
    prompt_ids: list[int] = tokenizer.encode(prompt).ids
    answer_ids: list[int] = tokenizer.encode(answer.content, add_special_tokens=False).ids
    return [*prompt_ids, *answer_ids, token_id(tokenizer, EOT)]


def _rendered(message: Message) -> str:
    return f"{message.role.capitalize()}: {message.content.strip()}"


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of a stream as a pure function of the step, so that a run resumes where it stopped.

    Every epoch cuts the stream into windows at a new offset and takes each window once.
    """

    stream: TokenStream
    batch_size: int
    sequence_length: int
    seed: int

    @property
    def num_tokens(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.sequence_length

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the stream."""
        windows = len(self.stream.tokens) // self.sequence_length - 1
        return max(windows // self.batch_size, 1)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of `step`, each [batch_size, sequence_length] int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        offset = int(rng.integers(self.sequence_length))
        windows = rng.permutation(self.steps_per_epoch * self.batch_size)
        chosen = windows[index * self.batch_size : (index + 1) * self.batch_size]
        starts = torch.from_numpy(chosen * self.sequence_length + offset)
        positions = starts[:, None] + torch.arange(self.sequence_length + 1)
        window = self.stream.tokens[positions]  # [batch_size, sequence_length + 1]
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()
