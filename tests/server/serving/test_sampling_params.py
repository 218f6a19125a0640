"""What a caller may ask: the same limits, in the same words, through both doors."""

import asyncio

import pytest
from bitwatt import SamplingParams
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.planning import plan_choices, seed_of

from tests.fakes import make_app, make_client, make_info

BEYOND = [
    ({"n": 0}, "n is 0; it must be from 1 to 128"),
    ({"n": 129}, "n is 129; it must be from 1 to 128"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 2147483647"),
    ({"min_tokens": -1}, "min_tokens is -1; it must be from 0 to 2147483647"),
    ({"temperature": 2.5}, "temperature is 2.5; it must be from 0 to 2"),
    ({"top_p": -0.1}, "top_p is -0.1; it must be from 0 to 1"),
    ({"top_k": -2}, "top_k is -2; it must be from -1 to 2147483647"),
    ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
    ({"presence_penalty": 3.0}, "presence_penalty is 3.0; it must be from -2 to 2"),
    ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0; it must be from -2 to 2"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.01 to 10"),
    ({"repetition_penalty": 1e-39}, "repetition_penalty is 1e-39; it must be from 0.01 to 10"),
    ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21; it must be from 0 to 20"),
    ({"priority": 2**31}, "priority is 2147483648; it must be from -2147483647 to 2147483647"),
    ({"stop": [""]}, "a stop string must not be empty"),
    ({"stop": ["a"] * 65}, "stop has 65 strings; the limit is 64"),
    ({"stop": ["a" * 512] * 5}, "the stop strings have 2560 characters in all; the limit is 2048"),
    ({"stop": "a" * 513}, "a stop string has 513 characters; the limit is 512"),
    ({"stop": 5}, "stop must be a string or a list of strings"),
    ({"logit_bias": {7: 101}}, "logit_bias of token 7 is 101; it must be a number from -100 to"),
]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ignore_eos": None}, "ignore_eos is None; it must be True or False"),
        ({"stop_token_ids": {1}}, "stop_token_ids is {1}; it must be a list of token ids"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; it must be a list of token ids"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must be a mapping from token ids to numbers"),
        ({"cache_salt": None}, "cache_salt is None; it must be a string"),
    ],
)
def test_a_value_of_another_type_is_refused_where_no_body_types_it(asked, said):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**asked)
    assert str(error.value) == said


@pytest.mark.parametrize(("asked", "said"), BEYOND, ids=[said for _, said in BEYOND])
def test_both_doors_refuse_what_is_beyond_a_limit_in_the_same_words(asked, said):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**asked)
    assert said in str(error.value)
    [name] = asked
    assert error.value.param == name

    async def post():
        async with make_client(make_app()) as client:
            return await client.post(
                "/v1/completions", json={"model": "tiny", "prompt": "a", **asked}
            )

    response = asyncio.run(post())
    assert response.status_code == 400
    assert response.json()["error"]["message"] == str(error.value)
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": None},
        {"temperature": float("nan")},
        {"top_p": float("inf")},
        {"n": 1.0},
        {"seed": 2**63},
        {"seed": "1"},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": range(65)},
        {"logit_bias": {"1": 1}},
        {"logit_bias": {1: "1"}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": dict.fromkeys(range(301), 0)},
        {"cache_salt": "a" * 257},
    ],
)
def test_what_json_would_not_let_in_is_refused_too(asked):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**asked)
    assert str(error.value).startswith(next(iter(asked)))


def plan(prompts=([5, 6],), *, seed=0, default_max_tokens=None, **asked):
    return plan_choices(
        SamplingParams(**asked),
        make_info(),
        prompts,
        request_id="r",
        seed=seed,
        default_max_tokens=default_max_tokens,
    )


def test_each_prompt_has_its_choices_by_seeds_that_count_on():
    submits = plan([[5], [6]], seed=2**63 - 1, n=2)
    assert [submit.prompt_token_ids for submit in submits] == [[5], [5], [6], [6]]
    assert [submit.sampling.seed for submit in submits] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert [submit.request_id for submit in submits] == ["r-0", "r-1", "r-2", "r-3"]


def test_nothing_is_left_open_to_the_engine():
    [submit] = plan(top_k=-1, temperature=1e-6, stop_token_ids=[9, 0], max_tokens=None)
    sampling = submit.sampling
    assert (sampling.top_k, sampling.temperature) == (0, 0.0)
    assert sampling.stop_token_ids == (0, 9)
    assert sampling.max_tokens == 254
    assert plan(ignore_eos=True)[0].sampling.stop_token_ids == ()


def test_the_default_gives_way_to_the_context_and_what_was_asked_for_does_not():
    prompt = [5] * 250
    [submit] = plan([prompt], max_tokens=None, default_max_tokens=16)
    assert submit.sampling.max_tokens == 6
    with pytest.raises(InvalidRequestError, match="together 266; the limit is 256"):
        plan([prompt])


def test_a_seed_is_kept_and_a_missing_one_drawn():
    assert seed_of(SamplingParams(seed=0)) == 0
    drawn = {seed_of(SamplingParams()) for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**63 for seed in drawn)
