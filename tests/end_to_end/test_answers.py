"""What the embedded pair answers over HTTP, on what neither model was trained on."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from bitwatt.evaluation.scores import score

from tests.end_to_end.conftest import Server
from tests.extent import TEST_ALL

_EVERY = 1 if TEST_ALL else 5


@pytest.mark.slow(70 if TEST_ALL else 6)
@pytest.mark.parametrize("model", ["builtin", "builtin-twin"])
def test_each_twin_answers_held_out_questions_and_goes_on_with_python(
    server: Server, model: str
) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)

    def answer(question: str, max_tokens: int) -> str:
        completion = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
        )
        return completion.choices[0].message.content or ""

    def go_on(prompt: str, max_tokens: int) -> str:
        completion = client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0
        )
        return completion.choices[0].text

    with ThreadPoolExecutor(16) as threads:
        found = score(
            lambda questions, n: list(threads.map(lambda text: answer(text, n), questions)),
            lambda prompts, n: list(threads.map(lambda text: go_on(text, n), prompts)),
            every=_EVERY,
        )
    assert found.phrasings.num_asked * _EVERY == 500
    assert found.phrasings.share >= 0.8
    assert found.sums.share >= 0.95
    assert found.completions.share >= 0.7
