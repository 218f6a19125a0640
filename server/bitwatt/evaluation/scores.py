"""The scores of a model that answers: it is given as a function, in process or over HTTP."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bitwatt.evaluation.arithmetic import held_out_sums, is_right_sum, sum_question
from bitwatt.evaluation.completions import MAX_TOKENS, load_prompts, parses
from bitwatt.evaluation.questions import Topic, held_out_questions, is_right

MAX_ANSWER_TOKENS = 64
MAX_SUM_TOKENS = 24

Answers = Callable[[list[str], int], list[str]]
"""Returns a text of at most so many greedy tokens for every question, or after every prompt."""


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the tasks were done right."""

    num_right: int
    num_asked: int

    @property
    def share(self) -> float:
        """The share that was right, 0 to 1."""
        return self.num_right / self.num_asked


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score` found."""

    phrasings: Score
    by_topic: dict[Topic, Score]
    sums: Score
    completions: Score


def score(ask: Answers, complete: Answers, every: int = 1) -> Scores:
    """Return the scores of a model over the held-out tasks.

    ask        answers the questions of users, each through the chat template
    complete   continues texts
    every      take one task of so many, for a quick look
    """
    questions = held_out_questions()[::every]
    given = ask([question.text for question in questions], MAX_ANSWER_TOKENS)
    asked = Counter(question.topic for question in questions)
    right = Counter(
        question.topic
        for question, text in zip(questions, given, strict=True)
        if is_right(text, question.answer)
    )
    pairs = held_out_sums()[::every]
    sums = ask([sum_question(*pair) for pair in pairs], MAX_SUM_TOKENS)
    prompts = list(load_prompts()[::every])
    completions = complete(prompts, MAX_TOKENS)
    return Scores(
        phrasings=Score(right.total(), len(questions)),
        by_topic={topic: Score(right[topic], count) for topic, count in asked.items()},
        sums=Score(sum(map(_is_right_sum, sums, pairs)), len(pairs)),
        completions=Score(sum(map(parses, prompts, completions)), len(prompts)),
    )


def _is_right_sum(given: str, pair: tuple[int, int]) -> bool:
    return is_right_sum(given, *pair)
