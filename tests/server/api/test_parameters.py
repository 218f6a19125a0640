"""Every parameter of OpenAI's APIs and of those that add to them: works, passes, or is a 400."""

from pkgutil import resolve_name

import pytest
from bitwatt.api.schemas import parameters
from bitwatt.api.schemas.chat import ChatBody, Message
from bitwatt.api.schemas.common import StreamOptions
from bitwatt.api.schemas.completions import CompletionBody
from bitwatt.api.schemas.embeddings import EmbeddingBody
from bitwatt.api.schemas.messages import CountTokensBody, MessagesBody, OutputConfig, Thinking
from bitwatt.api.schemas.responses import (
    Reasoning,
    ResponsesBody,
    ResponsesStreamOptions,
    TextConfig,
)
from bitwatt.api.schemas.tokenize import DetokenizeBody, TokenizeBody
from bitwatt.api.schemas.tools import CalledFunction, ToolCallBody
from bitwatt_client.exposition import parse_samples
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    chat_completion_assistant_message_param,
    chat_completion_content_part_text_param,
    chat_completion_function_tool_param,
    chat_completion_message_function_tool_call_param,
    chat_completion_stream_options_param,
    chat_completion_tool_message_param,
    chat_completion_user_message_param,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.responses import function_tool_param, response_create_params
from openai.types.shared_params import function_definition

from tests.bodies import BODY_TYPES, REQUESTS
from tests.fakes import make_app, make_client

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]
MORE = {
    "/v1/messages": {"max_tokens": 9, "tool_choice": {"type": "auto"}},
    "/v1/messages/count_tokens": {"tool_choice": {"type": "auto"}},
}
ROUTES = {
    path: (body.parameters, {"model": "tiny"} | REQUESTS[path] | MORE.get(path, {}))
    for path, body in BODY_TYPES.items()
}
WORKING = {
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "temperature": 0.5,
    "top_p": 0,
    "presence_penalty": 1,
    "frequency_penalty": -1.5,
    "logit_bias": {"5": -100},
    "logprobs": True,
    "top_logprobs": 0,
    "prompt_logprobs": 2,
    "seed": 7,
    "n": 128,
    "stop": [f"stop {i}" for i in range(64)],
    "stream": True,
    "stream_options": None,
    "echo": True,
    "min_tokens": 1,
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [7],
    "ignore_eos": True,
    "priority": 0,
    "cache_salt": "mine",
    "add_special_tokens": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "high",
    "thinking_token_budget": 9,
    "include_reasoning": False,
    "return_token_strs": True,
    "instructions": "be brief",
    "max_output_tokens": 3,
    "metadata": {"a": "b"},
    "reasoning": {"effort": "none"},
    "text": {"format": {"type": "text"}},
    "stop_sequences": ["zebra"],
    "system": [{"type": "text", "text": "be brief"}],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"format": None, "effort": "low"},
    "encoding_format": "base64",
    "dimensions": 4,
}
ASKS = {"for": ["something"]}
NAMED = "colour, thinking.mood"
IGNORED = "x-bitwatt-ignored-fields"


def named_by(*kinds):
    return {name for kind in kinds for name in kind.__annotations__}


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        (
            parameters.CHAT,
            [
                chat_create_params.CompletionCreateParamsBase,
                chat_create_params.CompletionCreateParamsStreaming,
            ],
        ),
        (
            parameters.COMPLETIONS,
            [
                completion_create_params.CompletionCreateParamsBase,
                completion_create_params.CompletionCreateParamsStreaming,
            ],
        ),
        (
            parameters.MESSAGE,
            [
                chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam,
                chat_completion_user_message_param.ChatCompletionUserMessageParam,
                chat_completion_tool_message_param.ChatCompletionToolMessageParam,
            ],
        ),
        (
            parameters.CONTENT_PART,
            [chat_completion_content_part_text_param.ChatCompletionContentPartTextParam],
        ),
        (
            parameters.RESPONSES,
            [
                response_create_params.ResponseCreateParamsBase,
                response_create_params.ResponseCreateParamsStreaming,
            ],
        ),
        (parameters.EMBEDDINGS, [embedding_create_params.EmbeddingCreateParams]),
        (parameters.TOOL, [chat_completion_function_tool_param.ChatCompletionFunctionToolParam]),
        (parameters.FUNCTION, [function_definition.FunctionDefinition]),
        (parameters.RESPONSES_TOOL, [function_tool_param.FunctionToolParam]),
        (
            parameters.TOOL_CALL,
            [
                chat_completion_message_function_tool_call_param.ChatCompletionMessageFunctionToolCallParam
            ],
        ),
        (
            parameters.CALLED_FUNCTION,
            [chat_completion_message_function_tool_call_param.Function],
        ),
        (
            parameters.STREAM_OPTIONS,
            [chat_completion_stream_options_param.ChatCompletionStreamOptionsParam],
        ),
    ],
)
def test_every_parameter_that_openais_client_sends_is_in_the_table(table, kinds):
    assert named_by(*kinds) <= table.keys()


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        (
            parameters.MESSAGES,
            [
                "message_create_params.MessageCreateParamsBase",
                "message_create_params.MessageCreateParamsStreaming",
            ],
        ),
        (parameters.MESSAGES_COUNT, ["message_count_tokens_params.MessageCountTokensParams"]),
        (parameters.MESSAGES_TOOL, ["tool_param.ToolParam"]),
    ],
)
def test_every_parameter_that_anthropics_client_sends_is_in_the_table(table, kinds):
    """By name: its import takes every worker that collects the tests over a second."""
    assert named_by(*(resolve_name(f"anthropic.types.{kind}") for kind in kinds)) <= table.keys()


@pytest.mark.parametrize(
    "body",
    [
        ChatBody,
        CompletionBody,
        EmbeddingBody,
        Message,
        StreamOptions,
        TokenizeBody,
        DetokenizeBody,
        ToolCallBody,
        CalledFunction,
        ResponsesBody,
        ResponsesStreamOptions,
        TextConfig,
        Reasoning,
        MessagesBody,
        CountTokensBody,
        Thinking,
        OutputConfig,
    ],
)
def test_what_the_table_says_works_is_a_field(body):
    works = {name for name, parameter in body.parameters.items() if parameter.works}
    assert works == body.model_fields.keys()


@pytest.mark.parametrize("path", ROUTES)
async def test_every_parameter_works_asks_for_nothing_or_is_refused_by_its_name(path):
    table, valid = ROUTES[path]
    async with make_client(make_app()) as client:

        async def post(**change):
            response = await client.post(path, json=valid | change)
            assert IGNORED not in response.headers
            return response

        nulls = await post(**dict.fromkeys(table.keys() - valid.keys()))
        assert nulls.status_code == 200, nulls.text
        for name, parameter in table.items():
            if parameter.works:
                value = 2 if (path, name) == ("/v1/completions", "logprobs") else WORKING.get(name)
                assert name in valid or name in WORKING or name == "prompt"
                answer = await post(**{name: valid.get(name, value)})
                assert answer.status_code == 200, (name, answer.text)
                continue
            neutral = [ASKS, 1, ""] if parameter.neutral is None else parameter.neutral
            for value in neutral:
                passed = await post(**{name: value})
                assert passed.status_code == 200, (name, value, passed.text)
            if parameter.unless is not None:
                passed = await post(**{name: [ASKS]}, **dict([parameter.unless]))
                assert passed.status_code == 200, (name, passed.text)
            if parameter.neutral is not None:
                refused = await post(**{name: ASKS})
                assert refused.status_code == 400, name
                if not path.startswith("/v1/messages"):  # Anthropic's errors have no param
                    assert refused.json()["error"]["param"] == name
                assert refused.json()["error"]["message"].startswith(f"{name} is not supported")


async def test_every_parameter_of_a_message_and_its_parts_passes_or_is_refused_by_its_name():
    async with make_client(make_app()) as client:

        async def post(message):
            return await client.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": [*HELLO, message]}
            )

        said = {"role": "assistant", "content": "a"}
        for name, parameter in parameters.MESSAGE.items():
            value = said.get(name, "x" if parameter.works else ASKS)
            message = said | {name: [] if name == "tool_calls" else value}
            response = await post(message | ({"role": "tool"} if name == "tool_call_id" else {}))
            passes = parameter.works or parameter.neutral is None
            assert response.status_code == (200 if passes else 400), (name, response.text)
            if not passes:
                assert response.json()["error"]["param"] == f"messages[1].{name}"
            assert IGNORED not in response.headers
        for name, parameter in parameters.CONTENT_PART.items():
            part = {"type": "text", "text": "a", "refusal": "no"}
            response = await post(said | {"content": [part | {name: part.get(name, ASKS)}]})
            assert response.status_code == 200, (name, response.text)
            assert parameter.works or parameter.neutral is None
            assert IGNORED not in response.headers


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("/v1/completions", {"colour": 1, "mood": None}, "colour, mood"),
        ("/v1/completions", {"colour": 1, "stream": True}, "colour"),
        ("/tokenize", {"colour": 1}, "colour"),
        ("/detokenize", {"colour": 1}, "colour"),
        ("/v1/embeddings", {"colour": 1, "mood": None}, "colour, mood"),
        ("/v1/responses", {"colour": 1, "text": {"mood": 2}}, "colour, text.mood"),
        ("/v1/responses", {"colour": 1, "stream": True}, "colour"),
        ("/v1/messages", {"colour": 1, "thinking": {"type": "disabled", "mood": 1}}, NAMED),
        ("/v1/messages", {"colour": 1, "stream": True}, "colour"),
        ("/v1/messages/count_tokens", {"colour": 1}, "colour"),
        (
            "/v1/chat/completions",
            {
                "stream": True,
                "stream_options": {"colour": 1},
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "size": 1}]},
                    {"role": "assistant", "content": "b", "mood": 1},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "f", "arguments": "{", "x": 1}}
                        ],
                    },
                    {"role": "user", "content": "c", "mood": 2},
                ],
                "tools": [{"type": "function", "size": 1, "function": {"name": "f", "x": 1}}],
                "tool_choice": "none",
            },
            (
                "stream_options.colour, messages[].content[].size, messages[].mood, "
                "messages[].tool_calls[].function.x, tools[].size, tools[].function.x"
            ),
        ),
    ],
)
async def test_a_field_that_no_api_has_is_passed_over_named_and_counted(path, change, named):
    async with make_client(make_app()) as client:
        response = await client.post(path, json=ROUTES[path][1] | change)
        samples = parse_samples((await client.get("/metrics")).text)
    assert response.status_code == 200, response.text
    assert response.headers[IGNORED] == named
    num_named = len(named.split(", "))
    assert samples.total("bitwatt_ignored_fields_total", handler=path) == num_named


async def test_every_route_that_takes_a_body_is_held_to_its_table():
    async with make_client(make_app()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == ROUTES.keys()


async def test_the_header_is_bounded_and_holds_no_more_than_letters_of_a_header():
    names = ["line\r\nset-cookie: a=b", "naïve ☃", "%41,", "x" * 5000, *map(str, range(9000))]
    async with make_client(make_app()) as client:
        body = ROUTES["/v1/completions"][1] | dict.fromkeys(names, 1)
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    first, *others = response.headers[IGNORED].split(", ")
    assert first == "line%0D%0Aset-cookie%3A%20a%3Db"
    assert others[:3] == ["na%C3%AFve%20%E2%98%83", "%2541%2C", "x" * 64]
    assert others[-1] == "and 8988 more"
    assert len(others) == 16


@pytest.mark.parametrize("path", ROUTES)
async def test_strict_fields_are_refused_by_name(path):
    async with make_client(make_app(strict_fields=True)) as client:
        body = ROUTES[path][1]
        assert (await client.post(path, json=body)).status_code == 200
        response = await client.post(path, json=body | {"c\n" + "o" * 5000: 1})
    error = response.json()["error"]
    assert response.status_code == 400
    assert "--strict-fields" in error["message"]
    assert error.get("param", "c%0Aooo").startswith("c%0Aooo")
    assert len(response.content) < 500
