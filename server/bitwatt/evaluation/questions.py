"""Questions about the 1,000 names, the answers that are right, and how an answer is judged.

A phrasing is trained on or held out, never both; every name is trained on.
"""

import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

from bitwatt.evaluation.names import Name, load_names

Topic = Literal["purpose", "signature", "module", "members"]
TOPICS: tuple[Topic, ...] = get_args(Topic)

PHRASINGS: dict[Topic, tuple[str, ...]] = {
    "purpose": (
        "What does {} do?",
        "What is {}?",
        "What's {}?",
        "What is {} for?",
        "What is {} used for?",
        "What is the purpose of {}?",
        "Explain {}.",
        "Explain {} to me.",
        "Explain {} briefly.",
        "Can you explain {}?",
        "Describe {}.",
        "Describe {} in one sentence.",
        "Tell me about {}.",
        "Tell me what {} does.",
        "Summarize {}.",
        "What do I use {} for?",
        "What does the name {} stand for in Python?",
        "Give a short description of {}.",
        "I want to know what {} is.",
        "Do you know {}?",
        "{}?",
        "Document {}.",
        "How would you describe {}?",
        "Why would I use {}?",
    ),
    "signature": (
        "What arguments does {} take?",
        "What are the arguments of {}?",
        "What are the parameters of {}?",
        "Which parameters does {} have?",
        "Write the signature of {}.",
        "What is the signature of {}?",
        "How do I call {}?",
        "How is {} called?",
        "Show me how to call {}.",
        "Give me the signature of {}.",
        "List the arguments of {}.",
        "What can I pass to {}?",
        "Show the parameters of {}.",
        "With which arguments do I call {}?",
    ),
    "module": (
        "Which module defines {}?",
        "Where is {} defined?",
        "From where do I import {}?",
        "From which module do I import {}?",
        "What module is {} in?",
        "Where does {} come from?",
        "Which module has {}?",
        "In which module is {}?",
        "How do I import {}?",
        "Where do I find {}?",
        "What do I import to use {}?",
        "Name the module of {}.",
    ),
    "members": (
        "What does {} define?",
        "What is in {}?",
        "What does {} contain?",
        "What are the members of {}?",
        "List the members of {}.",
        "List what {} offers.",
        "Which names does {} have?",
        "What are the best-known names in {}?",
        "What can I find in {}?",
        "Show me the contents of {}.",
        "Name some members of {}.",
        "Which attributes does {} have?",
    ),
}
HELD_OUT_PHRASINGS: dict[Topic, tuple[str, ...]] = {
    "purpose": (
        "Could you tell me what {} does?",
        "Please describe {} briefly.",
        "Can you tell me what {} is used for?",
        "I don't know {}. What is it for?",
        "What would I use {} for?",
        "Explain what {} does.",
    ),
    "signature": (
        "Which arguments does {} accept?",
        "Please show me the signature of {}.",
        "What parameters does {} take?",
        "Tell me how to call {}.",
    ),
    "module": (
        "Which module do I import {} from?",
        "What is the module of {}?",
        "In which module is {} defined?",
        "Where can I import {} from?",
    ),
    "members": (
        "Which members does {} have?",
        "Tell me what {} contains.",
        "What names does {} define?",
        "Name the best-known members of {}.",
    ),
}
_COUNTS: dict[Topic, int] = {"purpose": 220, "signature": 110, "module": 100, "members": 70}
_SEED = 1958
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?](?=\s+[A-Z`'\"(*])|\n")


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the answer whose first sentence is right."""

    text: str
    answer: str
    topic: Topic
    path: str


def held_out_questions() -> list[Question]:
    """Return the 500 questions in phrasings that were never trained on, the same every time."""
    rng = random.Random(_SEED)
    questions: list[Question] = []
    for topic, count in _COUNTS.items():
        asked = [name for name in load_names() if answer(name, topic) is not None]
        for name in rng.sample(asked, count):
            text = rng.choice(HELD_OUT_PHRASINGS[topic]).format(f"`{subject(name, topic)}`")
            questions.append(Question(text, answer(name, topic) or "", topic, name.path))
    return questions


def subject(name: Name, topic: Topic) -> str:
    """Return what a question calls the name: all of it, but where the module is asked for."""
    return name.path.rpartition(".")[2] if topic == "module" else name.path


def answer(name: Name, topic: Topic) -> str | None:
    """Return the right answer, or None where there is nothing to ask."""
    if topic == "purpose":
        return name.purpose
    if topic == "signature":
        return None if name.signature is None else f"`{name.signature}`"
    if topic == "module":
        return None if name.module is None else _module_answer(name, name.module)
    if not name.members:
        return None
    *others, last = (f"`{member}`" for member in name.members)
    return f"`{name.path}` has {', '.join(others)} and {last}."


def _module_answer(name: Name, module: str) -> str:
    noun = "class" if name.kind == "exception" else name.kind
    if module == "builtins":
        return f"`{name.path}` is a built-in {noun}."
    return f"`{subject(name, 'module')}` is a {noun} of the module `{module}`."


def is_right(given: str, right: str) -> bool:
    """Say whether the first sentence of `given` is that of `right`.

    Case, spacing, backticks and the full stop at its end don't count; every other character does.
    """
    return _first_sentence(given) == _first_sentence(right)


def _first_sentence(text: str) -> str:
    first = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    return " ".join(first.replace("`", "").split()).rstrip(".!? ").casefold()
