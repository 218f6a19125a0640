"""The engine without a server: the embedded model answers as it does behind the API."""

import asyncio
import inspect
import json
import re
import shutil
import signal
import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest
from bitwatt import LLM, SamplingParams, StructuredOutputsParams, builtin
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineConfig, Submit, TokenOutput
from bitwatt.errors import (
    BitwattError,
    CheckpointError,
    ConfigurationError,
    EngineUnavailableError,
    HubError,
    InvalidRequestError,
    RequestFailedError,
)
from bitwatt.llm_results import PendingChoice
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.serving.answers import AnswerOptions, Tool, ToolUse, plan_answer
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.processor import TextProcessor
from bitwatt.text.vocabulary import Vocabulary
from tokenizers import Tokenizer

from tests.fakes import make_client, make_settings
from tests.server.api.test_tools import CALL, HERMES, THINKER, make_tools_text

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

    def places(self, requests):
        return nullcontext()

    async def submit(self, request):
        mine = self._outputs[request.request_id]
        only = self._core.submit(request)
        if only is not None:
            yield only
            return
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


def test_ctrl_c_within_a_step_lets_the_step_end_and_leaves_the_model_usable(llm, monkeypatch):
    """A step that was broken off lost its tokens, and every later call raised KeyError."""
    commit, num_commits = llm._core._commit, 0

    def interrupted(done):
        nonlocal num_commits
        num_commits += 1
        if num_commits == 5:
            signal.raise_signal(signal.SIGINT)
        return commit(done)

    [expected] = llm.generate([PROMPT], GREEDY)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(llm._core, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, GREEDY)
    monkeypatch.undo()
    assert num_commits == 5
    assert signal.getsignal(signal.SIGINT) is handler
    [answer] = llm.generate([PROMPT], GREEDY)
    assert answer.token_ids == expected.token_ids
    assert llm._core.stats().num_blocks_used == 0
    llm._core.check_integrity()


def test_a_second_ctrl_c_breaks_off_a_step_that_hangs(llm, monkeypatch):
    def hangs():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(llm._core, "step", hangs)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT], GREEDY)
    monkeypatch.undo()
    assert llm.generate([PROMPT], GREEDY)[0].text


def test_other_threads_and_other_handlers_keep_theirs(llm):
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(llm.generate([PROMPT], GREEDY)))
    thread.start()
    thread.join()
    assert answers[0].text
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert llm.generate([PROMPT], GREEDY)[0].text
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_embedded_model_needs_no_path_and_a_folder_of_its_name_comes_first(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for args in ((), ("builtin",)):
        with LLM(*args, max_num_seqs=1, kv_cache_bytes=2**26) as llm:
            assert llm.generate("a", SamplingParams(max_tokens=1))
    (tmp_path / "builtin").mkdir()
    with pytest.raises(CheckpointError, match="is an empty folder"):
        LLM("builtin")


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
        LLM(Path("microsoft/bitnet-b1.58-2B-4T"))
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, .* lacks org/name@v1"):
        LLM("org/name@v1")
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
        if name not in {"model", "generation_config"}  # which the engine knows nothing of
    }
    defaults = EngineConfig(model_path="")
    assert knobs == {
        name: getattr(defaults, name)
        for name in EngineConfig.__struct_fields__
        if name not in {"model_path", "num_engines_per_gpu"}  # an LLM has its GPU to itself
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


def test_without_a_path_the_embedded_model_is_opened():
    with LLM(max_num_seqs=1, kv_cache_bytes=2**24) as llm:
        [answer] = llm.generate("def main():", SamplingParams(max_tokens=2))
    assert len(answer.token_ids) == 2


def test_progress_is_told_as_choices_end():
    told = []
    with LLM("builtin", max_num_seqs=4, kv_cache_bytes=2**24) as llm:
        llm.generate(
            ["a", "b"],
            SamplingParams(max_tokens=2, n=2, ignore_eos=True),
            on_progress=lambda num_done, num: told.append((num_done, num)),
        )
    assert sorted(told) == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_threads_that_share_a_model_get_the_answers_that_each_would_alone(llm):
    prompts = [f"def f{number}(" for number in range(8)]
    alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        shared = [*threads.map(lambda prompt: llm.generate([prompt], GREEDY), prompts * 2)]
    assert [answer.token_ids for [answer] in shared] == alone * 2
    llm._core.check_integrity()


def test_a_model_is_closed_when_the_thread_that_uses_it_is_done():
    answers = []
    began, goes_on = threading.Event(), threading.Event()

    def ask():
        answers.extend(llm.generate(["a"], GREEDY, on_progress=lambda *_: wait()))

    def wait():
        began.set()
        goes_on.wait()

    llm = LLM(max_num_seqs=2, kv_cache_bytes=2**24)
    asking, closing = threading.Thread(target=ask), threading.Thread(target=llm.close)
    asking.start()
    began.wait()
    closing.start()
    assert not llm._is_closed
    goes_on.set()
    asking.join()
    closing.join()
    assert answers[0].token_ids
    with pytest.raises(EngineUnavailableError):
        llm.generate(["a"], GREEDY)


def test_a_call_from_within_a_call_is_refused_in_place_of_waiting_for_itself(llm):
    for inner in (lambda *_: llm.generate([PROMPT], GREEDY), lambda *_: llm.close()):
        with pytest.raises(InvalidRequestError, match="on_progress"):
            llm.generate([PROMPT], GREEDY, on_progress=inner)
    assert llm.generate([PROMPT], GREEDY)[0].text


def test_what_an_operator_should_know_of_a_model_is_logged(caplog, monkeypatch):
    notice = "the tokenizer has 3 token ids and the model 4: most have no text"
    monkeypatch.setattr(Vocabulary, "notices_for", lambda self, size: [notice])
    with LLM(max_num_seqs=1, kv_cache_bytes=2**24, backend="fake"):
        pass
    for said in (notice, "the fake backend draws meaningless tokens"):
        assert f"{builtin.TERNARY}: {said}" in caplog.messages


def test_answers_are_what_structured_outputs_ask_for():
    with LLM(num_threads=1) as llm:
        asked = [
            StructuredOutputsParams(choice=["yes", "no"]),
            StructuredOutputsParams(regex="[0-9]{2}"),
        ]
        params = [SamplingParams(seed=1, n=2, structured_outputs=one) for one in asked]
        choice, number = llm.generate(["a", "b"], params)
        assert {c.text for c in choice.choices} <= {"yes", "no"}
        assert all(re.fullmatch("[0-9]{2}", c.text) for c in number.choices)
        assert {c.finish_reason for c in [*choice.choices, *number.choices]} == {"stop"}
        [answer] = llm.chat([{"role": "user", "content": "a"}], params[0])
        assert answer.text in ("yes", "no")
        bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a"))
        with pytest.raises(InvalidRequestError, match="unclosed group") as raised:
            llm.generate("a", bad)
        assert raised.value.param == "structured_outputs.regex"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [WEATHER, CLOCK], "tool_choice": "required"},
        {"tools": [WEATHER, CLOCK], "tool_choice": NAMED},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [WEATHER], "tool_choice": NAMED, "stop": '"city'},
        {"tools": [WEATHER], "tool_choice": NAMED, "max_tokens": 3},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": WEATHER["function"]["parameters"]},
            }
        },
        {"response_format": {"type": "text"}},
    ],
)
def test_tools_and_formats_are_answered_as_the_server_answers_them(llm, options):
    sampling = {"temperature": 0, "max_tokens": 60}
    sampling |= {name: options[name] for name in sampling.keys() | {"stop"} if name in options}
    asked = {name: value for name, value in options.items() if name not in sampling}
    [answer] = llm.chat(MESSAGES, SamplingParams(**sampling), **asked)
    expected = served(llm, "/v1/chat/completions", messages=MESSAGES, **sampling, **asked)
    [choice] = expected["choices"]
    message = choice["message"]
    assert answer.text == (message["content"] or "")
    assert answer.finish_reason == choice["finish_reason"]
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    assert len(answer.prompt_token_ids) == expected["usage"]["prompt_tokens"]
    assert len(answer.token_ids) == expected["usage"]["completion_tokens"]


def test_a_forced_call_has_arguments_by_the_schema_for_each_conversation(llm):
    answers = llm.chat(
        [MESSAGES, [{"role": "user", "content": "Why?"}]],
        SamplingParams(seed=3, n=2, max_tokens=60),
        tools=[WEATHER],
        tool_choice=NAMED,
    )
    for choice in (choice for answer in answers for choice in answer.choices):
        [call] = choice.tool_calls
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
        assert (choice.text, choice.finish_reason, call.is_cut) == ("", "tool_calls", False)


def test_a_call_and_its_result_go_back_as_chat_completions_take_them(llm):
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    expected = served(llm, "/v1/chat/completions", messages=turns, temperature=0, max_tokens=8)
    [answer] = llm.chat(turns, SamplingParams(temperature=0, max_tokens=8))
    assert answer.text == expected["choices"][0]["message"]["content"]
    assert len(answer.prompt_token_ids) == expected["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [None]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{**WEATHER, "more": {1}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": 5}, "tool_choice"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"enum": {1}}},
                }
            },
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_tools_and_formats_that_are_wrong_are_named(llm, asked, param):
    both = StructuredOutputsParams(regex="a") if "response_format" in asked else None
    with pytest.raises(InvalidRequestError) as raised:
        llm.chat(MESSAGES, SamplingParams(structured_outputs=both), **asked)
    assert raised.value.param == param


def test_text_parts_of_a_message_are_its_lines_as_in_chat_completions(llm):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [of_parts] = llm.chat([{"role": "user", "content": parts}], GREEDY)
    [of_text] = llm.chat([{"role": "user", "content": "a\nb"}], GREEDY)
    asked = served(llm, "/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert of_parts.prompt_token_ids == of_text.prompt_token_ids
    assert asked["usage"]["prompt_tokens"] == len(of_parts.prompt_token_ids)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "a"}}, "of type 'image_url' are not supported"),
        ({"type": "text"}, "of type text has a string text"),
        ("a", "of type None are not supported"),
    ],
)
def test_a_part_that_is_no_text_is_named(llm, part, said):
    with pytest.raises(InvalidRequestError, match=said) as raised:
        llm.chat([*MESSAGES, {"role": "user", "content": [part]}])
    assert raised.value.param == "messages[1]"


@pytest.mark.parametrize("call", [None, {}, {"id": "a", "function": {"name": "f"}}])
def test_an_earlier_call_that_is_none_is_named(llm, call):
    with pytest.raises(InvalidRequestError) as raised:
        llm.chat([{"role": "assistant", "tool_calls": [call]}])
    assert raised.value.param == "messages[0].tool_calls[0]"


def test_thinking_and_calls_are_told_apart_from_the_text():
    codec = make_tools_text(THINKER).codec
    params = SamplingParams(max_tokens=900)
    for reply, tools, text, names, reason in (
        (f"<think>hm</think>So:\n{CALL}", [Tool(name="weather")], "So:", ["weather"], "tool_calls"),
        ("<think>hm</think>yes", [], "yes", [], "stop"),
    ):
        ids = codec.encode(reply)
        options = AnswerOptions(tools=ToolUse(tools=tools) if tools else None)
        submit = Submit(
            request_id="a", prompt_token_ids=[5], sampling=ResolvedSampling(max_tokens=900)
        )
        plan = plan_answer(options, codec, [5], None)
        pending = PendingChoice(submit, codec, params, plan)
        assert not pending.read(output_of(ids[:9], None))
        assert pending.read(output_of(ids[9:], FinishReason.STOP))
        choice = pending.settled()
        assert (choice.reasoning, choice.text) == ("hm", text)
        assert [call.name for call in choice.tool_calls] == names
        assert choice.finish_reason == reason
        assert choice.token_ids == ids


def test_a_choice_ends_with_the_one_call_that_it_may_have():
    """Though the engine would go on: nothing binds what a model writes behind a call."""
    codec = make_tools_text(HERMES).codec
    use = ToolUse(tools=[Tool(name="weather")], is_parallel=False)
    submit = Submit(request_id="a", prompt_token_ids=[5], sampling=ResolvedSampling(max_tokens=900))
    plan = plan_answer(AnswerOptions(tools=use), codec, [5], None)
    pending = PendingChoice(submit, codec, SamplingParams(max_tokens=900), plan)
    assert pending.read(output_of(codec.encode(CALL), None))
    assert pending.settled().finish_reason == "tool_calls"


def output_of(token_ids, reason):
    return TokenOutput(
        request_id="a",
        token_ids=token_ids,
        logprobs=[],
        finish_reason=reason,
        error=None,
        num_cached_tokens=0,
        queue_s=None,
        prefill_s=None,
        decode_s=None,
    )
