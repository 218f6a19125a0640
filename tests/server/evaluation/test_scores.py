import ast

import pytest
from bitwatt.evaluation.arithmetic import held_out_sums, is_right_sum, sum_question
from bitwatt.evaluation.completions import load_prompts, parses
from bitwatt.evaluation.questions import held_out_questions
from bitwatt.evaluation.scores import score

PROMPT = "def f(x):\n    y = x\n"


def test_a_model_that_knows_everything_scores_one_and_one_that_knows_nothing_scores_zero():
    right = {question.text: question.answer for question in held_out_questions()}
    right |= {sum_question(a, b): f"{a} + {b} = {a + b}" for a, b in held_out_sums()}
    best = score(
        lambda texts, _: [right[text] for text in texts],
        lambda prompts, _: ["    return 1\n"] * len(prompts),
        every=10,
    )
    assert best.phrasings.share == best.sums.share == best.completions.share == 1
    assert (
        best.phrasings.num_asked == sum(topic.num_asked for topic in best.by_topic.values()) == 50
    )
    worst = score(
        lambda texts, _: ["No."] * len(texts),
        lambda prompts, _: ["    return (]\n"] * len(prompts),
        every=10,
    )
    assert worst.phrasings.share == worst.sums.share == worst.completions.share == 0


def test_sums_are_of_two_digit_numbers_and_the_last_number_counts():
    sums = held_out_sums()
    assert len(sums) == 300
    assert all(10 <= number <= 99 for pair in sums for number in pair)
    assert is_right_sum("17 + 25 = 42", 17, 25)
    assert is_right_sum("42.\n43", 17, 25)
    assert not is_right_sum("17 + 25 = 43", 17, 25)
    assert not is_right_sum("", 17, 25)


@pytest.mark.parametrize(
    "completion",
    [
        "    return y\n",
        "    return y\n\n\ndef g(",
        "    return y\n\n\ndef g(a,\n",
        "    return y\n\n\ndef g(a):\n    '''Docs",
        "    return y\n\n\nclass C:\n",
        "    z = 1\n    if x:\n        return (y +\n",
    ],
)
def test_a_completion_that_is_cut_off_still_parses(completion: str):
    assert parses(PROMPT, completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    return y",
        "  return y\n",
        "    return y y\n",
        "    return y)\n",
        "    z = 1\n    x y\n",
    ],
)
def test_what_is_no_python_or_no_line_of_it_does_not_parse(completion: str):
    assert not parses(PROMPT, completion)


def test_there_are_200_prompts_which_parse_and_end_a_line():
    prompts = load_prompts()
    assert len(prompts) == 200
    for prompt in prompts:
        assert prompt.endswith("\n")
        ast.parse(prompt)
