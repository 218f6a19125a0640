"""The scores of a loaded model, its answers made in this process."""

from bitwatt.evaluation.scores import Scores, score
from bitwatt.llm import LLM
from bitwatt.serving.sampling_params import SamplingParams

__all__ = ["score_answers"]


def score_answers(llm: LLM, every: int = 1) -> Scores:
    """Return the scores of the model, greedily decoded; of one task of so many."""

    def greedy(max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=max_tokens)

    def ask(questions: list[str], max_tokens: int) -> list[str]:
        talks = [[{"role": "user", "content": question}] for question in questions]
        return [answer.text for answer in llm.chat(talks, greedy(max_tokens))]

    def complete(prompts: list[str], max_tokens: int) -> list[str]:
        return [answer.text for answer in llm.generate(prompts, greedy(max_tokens))]

    return score(ask, complete, every)
