"""What a benchmark asks of a server: prompts of chosen lengths, or one's own from a file."""

import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwatt_client.errors import ClientError, ServerError
from bitwatt_client.lengths import MAX_TOKENS, Lengths
from bitwatt_client.server import Message

__all__ = ["Asked", "PromptWriter", "draw_asked", "read_asked"]

_WORD_LIST = """
time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work
government number night point home water room mother area money story fact month lot
right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war
history party result change
"""
_WORDS = _WORD_LIST.split()
_FEW = 8  # words of the shorter of two texts from which a word's tokens are learnt
_MANY = (256, 64, 24)  # of the longer, the most that the context has room for


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to be sent: a prompt or the messages of a conversation.

    max_tokens  of its answer; None where the plan says
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    max_tokens: int | None = None

    def as_messages(self) -> list[Message]:
        """Return it as a conversation."""
        if self.messages is not None:
            return list(self.messages)
        return [{"role": "user", "content": self.prompt or ""}]


class PromptWriter:
    """Writes prompts of about so many tokens, whatever the server's tokenizer.

    Two short requests tell what a word of a fixed list takes, and what the template adds. What
    counts in the end is the server's own count of each prompt.
    """

    def __init__(self, few: tuple[int, int], many: tuple[int, int]) -> None:
        """Begin, by the words of two texts and the tokens of their prompts.

        Raises  ClientError where the counts don't grow with the text
        """
        self._tokens_a_word = (many[1] - few[1]) / (many[0] - few[0])
        self._num_added = few[1] - few[0] * self._tokens_a_word
        if self._tokens_a_word <= 0:
            raise ClientError(
                f"the server counts {few[1]} prompt tokens of {few[0]} words and {many[1]} of "
                f"{many[0]}: prompts can't be written to a length"
            )

    @classmethod
    async def learn(cls, count: Callable[[str], Awaitable[int]]) -> "PromptWriter":
        """Return one for the tokenizer by which count tells the tokens of a prompt.

        Raises  ClientError, and what count raises
        """
        few = await count(_text_of(_FEW))
        for num_words in _MANY:
            try:
                return cls((_FEW, few), (num_words, await count(_text_of(num_words))))
            except ServerError as error:
                if error.status != 400 or num_words == _MANY[-1]:
                    raise
        raise AssertionError("the shortest text raises")

    def write(self, num_tokens: int, chance: random.Random) -> str:
        """Return a text that makes a prompt of about so many tokens, the template's among them."""
        num_words = round((num_tokens - self._num_added) / self._tokens_a_word)
        return " ".join(chance.choices(_WORDS, k=max(1, num_words)))


def _text_of(num_words: int) -> str:
    """Return a text of so many words, each as often as any other."""
    return " ".join(_WORDS[i % len(_WORDS)] for i in range(num_words))


def draw_asked(
    writer: PromptWriter, prompts: Lengths, answers: Lengths, num_requests: int, seed: int
) -> list[Asked]:
    """Return so many requests whose lengths and words are drawn by the seed."""
    chance = random.Random(seed)  # noqa: S311 - a workload, no secret
    return [
        Asked(writer.write(prompts.draw(chance), chance), max_tokens=answers.draw(chance))
        for _ in range(num_requests)
    ]


def read_asked(path: Path) -> tuple[Asked, ...]:
    """Return a JSONL file's requests: a line has "prompt" or "messages", and may have "max_tokens".

    "output_tokens" is another name of the last.

    Raises  ValueError naming the line that is none, or the file that has no line
    """
    asked = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            asked.append(_read_line(json.loads(line)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not asked:
        raise ValueError(f"{path} has no prompts")
    return tuple(asked)


def _read_line(entry: object) -> Asked:
    if not isinstance(entry, dict):
        raise ValueError("is no object")
    prompt, messages = entry.get("prompt"), entry.get("messages")
    max_tokens = entry.get("max_tokens", entry.get("output_tokens"))
    if (prompt is None) == (messages is None):
        raise ValueError('has "prompt" or "messages", one of them')
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise ValueError('"prompt" is a string with text')
    if messages is not None and not _are_messages(messages):
        raise ValueError('"messages" is a list of objects that have a "role"')
    if any("\ud800" <= char <= "\udfff" for char in json.dumps(entry, ensure_ascii=False)):
        raise ValueError("has half a character (\\ud800 to \\udfff)")
    is_count = isinstance(max_tokens, int) and not isinstance(max_tokens, bool)
    if max_tokens is not None and not (is_count and 1 <= max_tokens <= MAX_TOKENS):
        raise ValueError(f'"max_tokens" is a number of 1 to {MAX_TOKENS} tokens')
    return Asked(prompt, messages, max_tokens)


def _are_messages(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and "role" in message for message in messages)
    )
