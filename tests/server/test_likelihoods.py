"""What lm-evaluation-harness's `local-completions` counts on, and the same from LLM.

It sends token ids, a context and a continuation in one, with `echo`, `logprobs: 1` and
`max_tokens: 1`. Of a choice's columns it takes what lies behind the context and before the last
entry: the sum of `token_logprobs` is the continuation's log-likelihood, and the continuation is
greedy where each value is the highest of its `top_logprobs`.
"""

import math

import pytest
from bitwatt import SamplingParams

from tests.server.test_llm import MESSAGES, PROMPT, llm, served

__all__ = ["llm"]

HARNESS = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def likelihoods(answer, context_lens):
    """Return each choice's log-likelihood of its continuation, and whether that is greedy."""
    found = []
    for choice, context_len in zip(answer["choices"], context_lens, strict=True):
        values = choice["logprobs"]["token_logprobs"][context_len:-1]
        tops = choice["logprobs"]["top_logprobs"][context_len:-1]
        is_greedy = all(v == max(top.values()) for v, top in zip(values, tops, strict=True))
        found.append((sum(values), is_greedy))
    return found


def decode(llm, prompt, **options):
    """Return the tokens that follow a prompt, and the log-probability of each."""
    [answer] = llm.generate([prompt], SamplingParams(logprobs=0, **options))
    return answer.token_ids, [entry.sampled for entry in answer.logprobs]


def test_continuations_have_the_likelihoods_that_decoding_them_gives(llm):
    """In one batch, as the harness sends them; the likeliest continuation is the greedy one."""
    context = llm._codec.encode(PROMPT)
    greedy, greedy_values = decode(llm, context, temperature=0, max_tokens=12)
    drawn, drawn_values = decode(llm, context, temperature=1.5, seed=1, max_tokens=9)
    assert drawn != greedy[:9]
    answer = served(llm, "/v1/completions", prompt=[context + greedy, context + drawn], **HARNESS)
    assert likelihoods(answer, [len(context)] * 2) == [
        (sum(greedy_values), True),
        (sum(drawn_values), False),
    ]
    assert answer["usage"]["prompt_tokens"] == 2 * len(context) + 12 + 9
    assert answer["usage"]["completion_tokens"] == 2


def test_a_continuation_that_ends_the_text_keeps_its_last_token(llm):
    """The token drawn behind it is the end of the text, which has an entry all the same."""
    context = llm._codec.encode(PROMPT)
    tokens, values = decode(llm, context, temperature=0, max_tokens=8)
    ends = {str(llm.info.eos_token_ids[0]): 100}
    answer = served(llm, "/v1/completions", prompt=[context + tokens], logit_bias=ends, **HARNESS)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert likelihoods(answer, [len(context)]) == [(sum(values), True)]


def test_a_text_s_rolling_likelihood_is_that_of_all_its_tokens(llm):
    """Behind one token that stands for the text's beginning."""
    text = llm._codec.encode("import os\n\n\ndef main() -> None:\n")
    prompt = [llm.info.eos_token_ids[0], *text]
    [(in_all, is_greedy)] = likelihoods(
        served(llm, "/v1/completions", prompt=[prompt], **HARNESS), [1]
    )
    forced = 0.0
    for i in range(1, len(prompt)):
        [answer] = llm.generate(
            [prompt[:i]], SamplingParams(logprobs=0, max_tokens=1, logit_bias={prompt[i]: 100})
        )
        forced += answer.logprobs[0].sampled
    assert in_all == pytest.approx(forced)
    assert not is_greedy


def test_without_a_token_to_draw_there_is_no_last_entry(llm):
    prompt = llm._codec.encode(PROMPT)
    one = served(llm, "/v1/completions", prompt=[prompt], **HARNESS)["choices"][0]["logprobs"]
    none = served(llm, "/v1/completions", prompt=[prompt], **HARNESS | {"max_tokens": 0})
    assert none["choices"][0]["logprobs"] == {name: column[:-1] for name, column in one.items()}


def test_llm_gives_a_prompt_s_scores_as_the_server_does(llm):
    params = SamplingParams(max_tokens=0, prompt_logprobs=3, n=2)
    [answer, single] = llm.generate([PROMPT, [5]], params)
    [choice, _] = served(
        llm, "/v1/completions", prompt=PROMPT, max_tokens=0, prompt_logprobs=3, n=2
    )["choices"]
    assert single.prompt_logprobs == answer.prompt_logprobs[:1] == [None]
    assert [choice.text for choice in answer.choices] == ["", ""]
    assert answer.finish_reason == "length"
    for token_id, entry, theirs in zip(
        answer.prompt_token_ids[1:],
        answer.prompt_logprobs[1:],
        choice["prompt_logprobs"][1:],
        strict=True,
    ):
        own = theirs[str(token_id)]
        assert entry.logprob == pytest.approx(own["logprob"], abs=1e-6)
        assert entry.rank == own["rank"]
        assert [str(i) for i, _ in entry.top if i != token_id] == list(theirs)[1:]
        assert entry.rank > 3 or entry.top[entry.rank - 1] == (token_id, entry.logprob)
        assert sum(math.exp(value) for _, value in entry.top) <= 1


def test_without_prompt_logprobs_llm_gives_none_and_draws_at_least_a_token(llm):
    [answer] = llm.generate(PROMPT, SamplingParams(max_tokens=1))
    assert answer.prompt_logprobs == []
    [conversation] = llm.chat(MESSAGES, SamplingParams(max_tokens=2, prompt_logprobs=0))
    assert len(conversation.prompt_logprobs) == len(conversation.prompt_token_ids)
    assert len(conversation.token_ids) == 2
