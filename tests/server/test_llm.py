"""The engine without a server: the embedded model answers as it does behind the API."""

import asyncio
import inspect
import json
import shutil
from collections import defaultdict, deque

import msgspec
import pytest
from bitwatt import LLM, SamplingParams, builtin
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineConfig
from bitwatt.errors import (
    BitwattError,
    CheckpointError,
    ConfigurationError,
    EngineUnavailableError,
    InvalidRequestError,
    RequestFailedError,
)
from bitwatt.scheduling.request import FinishReason
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.processor import TextProcessor
from tokenizers import Tokenizer

from tests.fakes import make_client, make_settings

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = "def main("
MESSAGES = [{"role": "user", "content": "What does textwrap.dedent do?"}]


@pytest.fixture(scope="module")
def llm():
    with LLM(builtin.TERNARY, max_num_seqs=8, kv_cache_bytes=2**26) as llm:
        yield llm


class CoreAsEngine:
    """Serves an LLM's own core to the API, one step at a time."""

    is_ready = is_healthy = True
    failure = None
    capacity = 1000

    def __init__(self, llm):
        self.info = llm.info
        self._core = llm._core
        self._outputs = defaultdict(deque)

    async def submit(self, request):
        mine = self._outputs[request.request_id]
        assert self._core.submit(request) is None
        try:
            while True:
                while not mine:
                    for output in self._core.step():
                        self._outputs[output.request_id].append(output)
                    await asyncio.sleep(0)
                yield mine.popleft()
        finally:
            self._core.abort([request.request_id])


def served(llm, path, **body):
    """Return the response's body for the model behind the API."""

    async def ask():
        metrics = Metrics()
        model = ServedModel(
            name="tiny",
            engine=CoreAsEngine(llm),
            text=TextProcessor.from_folder(builtin.TERNARY),
            metrics=metrics.model("tiny"),
        )
        async with make_client(create_app({"tiny": model}, make_settings(), metrics)) as client:
            return await client.post(path, json={"model": "tiny", **body})

    return asyncio.run(ask()).json()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 7, "n": 3},
        {"temperature": 0, "stop": ["(self"]},
        {"temperature": 0, "stop": "elf", "logprobs": 2},
        {"temperature": 0, "stop": "elf", "min_tokens": 20},
        {"temperature": 0.5, "seed": 1, "top_k": 9, "min_tokens": 24, "repetition_penalty": 1.2},
    ],
)
def test_a_prompt_is_answered_as_the_server_answers_it(llm, options):
    [answer] = llm.generate([PROMPT], SamplingParams(max_tokens=24, **options))
    expected = served(llm, "/v1/completions", prompt=PROMPT, max_tokens=24, **options)
    choices = expected["choices"]
    assert [choice.text for choice in answer.choices] == [choice["text"] for choice in choices]
    assert [c.finish_reason for c in answer.choices] == [c["finish_reason"] for c in choices]
    num_tokens = sum(len(choice.token_ids) for choice in answer.choices)
    assert num_tokens == expected["usage"]["completion_tokens"]
    if "logprobs" in options:
        values = choices[0]["logprobs"]["token_logprobs"]
        assert [entry.sampled for entry in answer.logprobs] == pytest.approx(values)
        assert all(len(entry.top) == 2 for entry in answer.logprobs)


def test_a_conversation_is_answered_as_the_server_answers_it(llm):
    messages = [{"role": "developer", "content": "Be brief."}, *MESSAGES]
    [answer] = llm.chat(messages, GREEDY)
    expected = served(llm, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=24)
    assert answer.text == expected["choices"][0]["message"]["content"]
    assert len(answer.prompt_token_ids) == expected["usage"]["prompt_tokens"]


def test_several_conversations_run_as_one_batch_in_order(llm):
    other = [{"role": "user", "content": "Why?"}]
    both = llm.chat([MESSAGES, other], GREEDY)
    alone = [*llm.chat(MESSAGES, GREEDY), *llm.chat(other, GREEDY)]
    assert [answer.text for answer in both] == [answer.text for answer in alone]


def test_prompts_are_texts_or_tokens_each_with_parameters_of_its_own(llm):
    [text] = llm.generate(PROMPT, GREEDY)
    short, same = llm.generate(
        [PROMPT, text.prompt_token_ids], [SamplingParams(temperature=0, max_tokens=2), GREEDY]
    )
    assert same.token_ids == text.token_ids
    assert short.token_ids == text.token_ids[:2]
    assert short.finish_reason == "length"


def test_sixteen_tokens_are_the_default_and_none_is_all_that_the_context_leaves():
    with LLM(builtin.TERNARY, max_model_len=64, max_num_seqs=1) as llm:
        prompt = [5, 6, 7]
        [answer] = llm.generate([prompt], SamplingParams(ignore_eos=True))
        assert len(answer.token_ids) == 16
        [answer] = llm.generate([prompt], SamplingParams(ignore_eos=True, max_tokens=None))
        assert len(answer.token_ids) == 61


def test_without_a_seed_each_prompt_draws_its_own(llm):
    first, second = llm.generate([PROMPT] * 2, SamplingParams(max_tokens=40))
    assert first.token_ids != second.token_ids


def test_a_stop_token_is_among_the_tokens_and_not_in_the_text(llm):
    [whole] = llm.generate([PROMPT], GREEDY)
    third = whole.token_ids[2]
    stopping = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[third], logprobs=0)
    [answer] = llm.generate([PROMPT], stopping)
    end = whole.token_ids.index(third) + 1
    assert answer.token_ids == whole.token_ids[:end]
    assert len(answer.logprobs) == end
    assert answer.finish_reason == "stop"
    assert whole.text.startswith(answer.text)


def test_a_folder_that_asks_to_truncate_or_pad_is_not_heard(llm, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(builtin.TERNARY, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(folder / "tokenizer.json"))
    [expected] = llm.generate(["import textwrap, os, sys"], GREEDY)
    with LLM(folder, max_num_seqs=1, kv_cache_bytes=2**26) as cutting:
        [answer] = cutting.generate(["import textwrap, os, sys"], GREEDY)
    assert answer.prompt_token_ids == expected.prompt_token_ids
    assert answer.text == expected.text


@pytest.mark.parametrize(
    ("prompts", "said", "param"),
    [
        ([[]], "prompt has no tokens", "prompts"),
        ([[10**6]], "the model has", "prompts"),
        ([[-1]], r"not \[-1\]", "prompts"),
        ([5], "not 5", "prompts"),
        ([[True]], r"not \[True\]", "prompts"),
        ([b"abc"], "not b'abc'", "prompts"),
        (["\ud800"], "lone surrogate", None),
        ([[5] * 5000], r"prompt has 5000 tokens; the limit is .*--max-model-len", "prompts"),
        (["word " * 50_000], r"prompt has at least .*--max-model-len", "prompts"),
    ],
)
def test_a_prompt_that_is_wrong_is_refused_before_anything_runs(llm, prompts, said, param):
    with pytest.raises(InvalidRequestError, match=said) as error:
        llm.generate([PROMPT, *prompts], GREEDY)
    assert error.value.param == param
    stats = llm._core.stats()
    assert stats.num_running == stats.num_waiting == 0


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0]"),
        ([*MESSAGES, {"role": "user", "content": 5}], "messages[1]"),
    ],
)
def test_a_conversation_that_is_wrong_is_named(llm, messages, param):
    with pytest.raises(InvalidRequestError) as error:
        llm.chat(messages, GREEDY)
    assert error.value.param == param


def test_a_template_is_told_nothing_that_it_may_not_be(llm):
    with pytest.raises(InvalidRequestError, match="enable_thinking, thinking"):
        llm.chat(MESSAGES, GREEDY, chat_template_kwargs={"messages": True})


@pytest.mark.parametrize("wrong", [None, 3, {"a": 1}, {"a", "b"}, b"abc"])
def test_prompts_and_messages_are_lists(llm, wrong):
    with pytest.raises(InvalidRequestError, match=r"prompts is .*; it must be a text, or a list"):
        llm.generate(wrong, GREEDY)
    with pytest.raises(InvalidRequestError, match=r"messages is .*; it must be a list"):
        llm.chat(wrong, GREEDY)


@pytest.mark.parametrize("wrong", [3, "x", {"seed": 1}, [None], [{}]])
def test_sampling_parameters_of_another_type_are_named(llm, wrong):
    with pytest.raises(InvalidRequestError, match="it must be SamplingParams"):
        llm.generate([PROMPT], wrong)


@pytest.mark.parametrize("wrong", [3, ["enable_thinking"]])
def test_what_a_template_is_told_is_a_mapping(llm, wrong):
    with pytest.raises(InvalidRequestError, match=r"chat_template_kwargs is .* a mapping"):
        llm.chat(MESSAGES, GREEDY, chat_template_kwargs=wrong)


@pytest.mark.parametrize("model", [None, 3])
def test_a_model_is_a_path(model):
    with pytest.raises(ConfigurationError, match="it must be a folder's path"):
        LLM(model)


def test_as_many_parameters_as_prompts_are_needed(llm):
    with pytest.raises(InvalidRequestError, match="2 prompts and 1 sampling parameters"):
        llm.generate([PROMPT, PROMPT], [GREEDY])


def test_an_interrupted_batch_leaves_nothing_in_the_engine(llm, monkeypatch):
    step, num_steps = llm._core.step, 0

    def interrupted():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY)
    monkeypatch.undo()
    [answer] = llm.generate([PROMPT], GREEDY)
    assert len(answer.token_ids) == 24
    assert llm._core.stats().num_blocks_used == 0


def test_a_request_that_the_engine_gives_up_is_an_error_of_ours(llm, monkeypatch):
    outputs = llm._core.step

    def failing():
        return [
            msgspec.structs.replace(output, finish_reason=FinishReason.ERROR, error="out of luck")
            for output in outputs()
        ]

    monkeypatch.setattr(llm._core, "step", failing)
    with pytest.raises(RequestFailedError, match="out of luck"):
        llm.generate([PROMPT], GREEDY)
    monkeypatch.undo()
    assert llm.generate([PROMPT], GREEDY)[0].text


def test_a_folder_that_is_no_model_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="is an empty folder"):
        LLM(tmp_path)
    with pytest.raises(CheckpointError, match="`hf download`"):
        LLM("microsoft/bitnet-b1.58-2B-4T")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        LLM(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(BitwattError, match=r"tokenizer\.json can't be read"):
        LLM(tmp_path)


def test_the_knobs_are_the_engines_by_name_and_default():
    knobs = {
        name: parameter.default
        for name, parameter in inspect.signature(LLM).parameters.items()
        if name != "model"
    }
    defaults = EngineConfig(model_path="")
    assert knobs == {
        name: getattr(defaults, name)
        for name in EngineConfig.__struct_fields__
        if name != "model_path"
    }


def test_a_knob_that_is_not_there_is_refused():
    with pytest.raises(TypeError, match="max_num_seq"):
        LLM(builtin.TERNARY, max_num_seq=1)


def test_a_model_that_was_released_answers_nothing_and_says_so():
    """The call once waited for ever."""
    with LLM(builtin.TERNARY, backend="torch", max_num_seqs=1) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1))
    with pytest.raises(EngineUnavailableError, match=r"close\(\)"):
        llm.generate("a")
    with pytest.raises(EngineUnavailableError):
        llm.chat([{"role": "user", "content": "a"}])
    llm.close()


def test_a_bad_prompt_leaves_the_next_call_as_it_was():
    with LLM(builtin.TERNARY, backend="torch", max_num_seqs=4) as llm:
        params = SamplingParams(max_tokens=4, seed=3)
        [before] = llm.generate([[5, 6, 7]], params)
        for bad in ([5, 10**6], [-1], [2**70]):
            with pytest.raises(InvalidRequestError):
                llm.generate([[5, 6, 7], bad], params)
            [after] = llm.generate([[5, 6, 7]], params)
            assert after.token_ids == before.token_ids
