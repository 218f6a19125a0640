"""The instruction phase: questions with short answers, every kind in many phrasings.

All of it comes from the committed names and from seeded generators, so every version of Python
makes the same. What the evaluation asks is left out: its phrasings, and its sums.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bitwatt.evaluation.arithmetic import is_held_out_sum
from bitwatt.evaluation.names import load_names
from bitwatt.evaluation.questions import PHRASINGS, Topic, answer, subject
from bitwatt.training.phrases import (
    IDIOM_PHRASINGS,
    IDIOMS,
    OUTSIDE_QUESTIONS,
    OUTSIDE_TOPICS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    THIRD_PARTY,
    WORDS,
)

Turn = tuple[str, str]

# How often a fact is in one pass. A purpose is the longest answer, and arbitrary.
_VARIANTS: dict[Topic, int] = {"purpose": 32, "signature": 24, "module": 14, "members": 24}
_SYSTEM_SHARE = 0.06
_TWO_TURN_SHARE = 0.06
_DECORATED_SHARE = 0.2
_UNKNOWN = "I don't know that. I know only Python's standard library."


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's, whose answer is trained on."""

    messages: tuple[Message, ...]


def conversations(seed: int = 0) -> list[Conversation]:
    """Return the whole of the instruction phase, the same for the same seed."""
    rng = random.Random(seed)
    turns = [
        *_name_turns(rng),
        *_arithmetic_turns(rng),
        *_word_turns(rng),
        *_idiom_turns(),
        *_refusals(rng),
        *(SMALL_TALK * 24),
    ]
    return [_conversation(turn, turns, rng) for turn in turns]


def _conversation(turn: Turn, turns: list[Turn], rng: random.Random) -> Conversation:
    messages: list[Message] = []
    if rng.random() < _SYSTEM_SHARE:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    asked = [rng.choice(turns), turn] if rng.random() < _TWO_TURN_SHARE else [turn]
    for question, reply in asked:
        messages += [Message("user", question), Message("assistant", reply)]
    return Conversation(tuple(messages))


def _name_turns(rng: random.Random) -> Iterator[Turn]:
    for name in load_names():
        for topic, phrasings in PHRASINGS.items():
            reply = answer(name, topic)
            if reply is None:
                continue
            # Each phrasing as evenly as the number allows, in backticks three times of four.
            count = _VARIANTS[topic]
            chosen = [*phrasings * (count // len(phrasings))]
            chosen += rng.sample(phrasings, count - len(chosen))
            for phrasing in chosen:
                bare = subject(name, topic)
                called = f"`{bare}`" if rng.random() < 0.75 else bare
                yield _decorated(phrasing.format(called), rng), reply


def _decorated(question: str, rng: random.Random) -> str:
    if rng.random() > _DECORATED_SHARE:
        return question
    lowered = question[0].lower() + question[1:]
    forms = (
        f"In Python, {lowered}",
        f"Please: {lowered}",
        f"Hi! {question}",
        f"{question} Please be brief.",
        lowered,
        question.rstrip("?."),
        f"Question: {question}",
    )
    return rng.choice(forms)


_SUMS = (
    "What is {} + {}?",
    "What is {} + {}?",
    "{} + {}",
    "{} + {} =",
    "{}+{}?",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "What is {} plus {}?",
    "Calculate {} + {}.",
    "Compute {} + {}.",
    "Add {} and {}.",
    "What is the sum of {} and {}?",
)
_DIFFERENCES = (
    "What is {} - {}?",
    "How much is {} - {}?",
    "{} - {}",
    "Calculate {} - {}.",
    "What is {} minus {}?",
)
_PRODUCTS = (
    "What is {} * {}?",
    "What is {} times {}?",
    "{} * {}",
    "Multiply {} by {}.",
    "Calculate {} * {}.",
)


def _arithmetic_turns(rng: random.Random) -> Iterator[Turn]:
    for a in range(100):
        for b in range(100):
            if is_held_out_sum(a, b):
                continue
            for phrasing in rng.sample(_SUMS, 2):
                yield phrasing.format(a, b), f"{a} + {b} = {a + b}"
            if b <= a and rng.random() < 0.5:
                yield rng.choice(_DIFFERENCES).format(a, b), f"{a} - {b} = {a - b}"
    for a in range(11):
        for b in range(11):
            for phrasing in _PRODUCTS:
                yield phrasing.format(a, b), f"{a} * {b} = {a * b}"


def _word_turns(rng: random.Random) -> Iterator[Turn]:
    for word in WORDS:
        yield f"Write `{word}` in capitals.", f"`{word.upper()}`"
        yield f"What is `{word}`.upper()?", f"`{word.upper()}`"
        yield f"What is the first letter of `{word}`?", f"`{word[0]}`"
        yield f"What is the last letter of `{word}`?", f"`{word[-1]}`"
        yield f"How many letters has `{word}`?", f"`{word}` has {len(word)} letters."
        yield f"What is len('{word}')?", f"{len(word)}"
        yield f"Spell `{word}`.", "-".join(word)
        yield f"Reverse `{word}`.", f"`{word[::-1]}`"
        others = rng.sample(WORDS, 2)
        given = ", ".join([word, *others])
        yield f"Sort these words: {given}", ", ".join(sorted([word, *others]))
        yield f"Join {given.replace(', ', ' and ')} with a dash.", "-".join([word, *others])


def _idiom_turns() -> Iterator[Turn]:
    for task, code in IDIOMS:
        for phrasing in IDIOM_PHRASINGS:
            question = phrasing.format(task)
            yield question[0].upper() + question[1:], f"```python\n{code}\n```"


def _refusals(rng: random.Random) -> Iterator[Turn]:
    for question in OUTSIDE_QUESTIONS:
        yield from [(question, _UNKNOWN)] * 6
    for topic in OUTSIDE_TOPICS:
        for phrasing in ("What is {}?", "Tell me about {}.", "Explain {}.", "Who knows {}?"):
            yield phrasing.format(topic), _UNKNOWN
    for name in THIRD_PARTY:
        for phrasing in rng.sample(PHRASINGS["purpose"], 8):
            yield phrasing.format(f"`{name}`"), f"`{name}` isn't in the standard library."
    for _ in range(1500):
        name = _invented(rng)
        topic = rng.choice(tuple(PHRASINGS))
        question = rng.choice(PHRASINGS[topic]).format(f"`{name}`")
        yield question, f"I don't know `{name}`."


def _invented(rng: random.Random) -> str:
    syllables = ("ba", "dro", "fle", "gor", "ki", "lum", "mep", "nux", "pli", "qua", "sto", "vex")
    made = "".join(rng.choices(syllables, k=rng.randint(2, 4)))
    return made if rng.random() < 0.5 else f"{made}.{''.join(rng.choices(syllables, k=2))}"
