"""Strategies of requests that a caller could send: likely, extreme and absurd ones, to every route.

Routes come from the server's own description and fields from the bodies' own classes, so that new
ones are tried without a word here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitwatt.api.schemas.chat import Message
from bitwatt.api.schemas.common import Body
from bitwatt.serving.sampling_params import BOUNDS
from hypothesis import strategies as st

from tests.bodies import BODY_TYPES

__all__ = ["RandomRequest", "random_requests"]

_MODELS = ["builtin", "builtin", "builtin", "builtin-twin"]

# Spellings of JSON, or nearly, that json.dumps doesn't write: they stand as strings until the end.
_MARK = "\u0000as it stands: "
_SPELLINGS = [
    *("1e999", "-1e999", "1e-999", "NaN", "-Infinity", "1E400", "-0", "-0.0", "01", "1.", "nul"),
    "9" * 5000,
    "[" * 2000 + "]" * 2000,
    '{"a":' * 500 + "1" + "}" * 500,
    r'"\ud800"',
    r'"\u0000"',
    '"\x01"',
    '{"a": 1, "a": 2}',
]

ABSURD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", [], {}, 0, -1, 1, 2, 0.5, "1", "null", [None], [[]]]),
    st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**70, 10**400]),
    st.sampled_from([1e-320, 1e-39, 1e-5, 1e30, 1e308, -1e308, 0.1 + 0.2]),
    st.sampled_from([_MARK + spelling for spelling in _SPELLINGS]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 70) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=8,
    ),
    st.integers(1, 3000).map(lambda n: "x" * n),
    st.integers(1, 300).map(lambda n: [n] * n),
    st.integers(1, 400).map(lambda n: {str(i): 1 for i in range(n)}),
)
_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "def main(",
            "import ",
            "🙂" * 9,
            "<|end|>",
            "<|user|>",
            "\u0000",
            "a" * 3000,
            "word " * 900,
        ]
    ),
)
_TOKEN_IDS = st.lists(
    st.integers(0, 4095) | st.sampled_from([0, 4095, 4096, 2**31 - 1]), min_size=1, max_size=60
)
_MESSAGE = st.tuples(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "root"]),
            "content": _TEXT
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}), max_size=3),
        }
    ),
    st.dictionaries(
        st.sampled_from([*Message.model_fields, *Message.parameters, "weight"]), ABSURD, max_size=1
    ),
).map(lambda parts: parts[0] | parts[1])
_TOOL = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["function", "function", "custom"]),
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "g", "", "a b"])},
            optional={
                "description": _TEXT,
                "strict": st.booleans(),
                "parameters": st.sampled_from(
                    [
                        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}},
                        {"properties": {"a": {"$ref": "#/$defs/none"}}},
                        {"type": "colour"},
                        {},
                        [],
                    ]
                ),
            },
        ),
    }
)
_CHANCE = st.booleans()
_FLAT_TOOL = _TOOL.map(lambda tool: {"type": tool["type"], **tool["function"]})
_ANTHROPIC_TOOL = _TOOL.map(
    lambda tool: {
        "name": tool["function"]["name"],
        "input_schema": tool["function"].get("parameters", {}),
    }
)
_ID = st.sampled_from(["a", "b", "", "x" * 300])
_ITEM = st.one_of(
    _MESSAGE,
    st.fixed_dictionaries(
        {
            "type": st.just("function_call"),
            "call_id": _ID,
            "name": st.just("f"),
            "arguments": st.sampled_from(["{}", "{", '{"a": 1}']) | _TEXT,
        }
    ),
    st.fixed_dictionaries(
        {"type": st.just("function_call_output"), "call_id": _ID, "output": _TEXT}
    ),
    st.fixed_dictionaries(
        {"type": st.just("reasoning"), "summary": st.just([])},
        optional={"content": st.just([{"type": "reasoning_text", "text": "hm"}])},
    ),
    st.fixed_dictionaries({"type": st.just("item_reference"), "id": _ID}),
)
_BLOCK = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": _TEXT}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": _ID, "name": st.just("f"), "input": st.just({"a": 1})}
    ),
    st.fixed_dictionaries(
        {"type": st.just("tool_result"), "tool_use_id": _ID}, optional={"content": _TEXT}
    ),
)
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(_BLOCK, max_size=3)}
)


@st.composite
def _mostly(
    draw: st.DrawFn, likely: st.SearchStrategy[Any], other: st.SearchStrategy[Any], parts: int
) -> Any:
    """Return the other once in so many parts; one_of would count each strategy's alternatives."""
    return draw(other if draw(st.integers(1, parts)) == parts else likely)


def _extremes(name: str) -> st.SearchStrategy[Any]:
    low, high = BOUNDS[name].lowest, BOUNDS[name].highest
    values = [low, high, (low + high) / 2, 0, 1, 2, 0.7, low - 1, high + 1, low + 1e-9, -0.0]
    return st.sampled_from([int(value) for value in values] if BOUNDS[name].is_whole else values)


_LIKELY: dict[str, st.SearchStrategy[Any]] = {
    **{name: _extremes(name) for name in BOUNDS},
    "top_logprobs": _extremes("logprobs"),
    "max_tokens": st.integers(0, 24) | st.sampled_from([1, 200, 1023, 2**31 - 1]),
    "max_completion_tokens": st.integers(1, 24),
    "min_tokens": st.integers(0, 30),
    "n": st.sampled_from([1, 1, 2, 3, 16, 17]),
    "model": st.sampled_from([*_MODELS, "gpt-4", "builtin/", "", "x" * 300]),
    "prompt": _TEXT | _TOKEN_IDS | st.lists(_TEXT | _TOKEN_IDS, max_size=5),
    "messages": st.lists(_MESSAGE, max_size=4) | st.lists(_TURN, max_size=4),
    "tokens": _TOKEN_IDS,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=5),
    "stop_token_ids": _TOKEN_IDS,
    "logit_bias": st.dictionaries(
        st.integers(-1, 4096).map(str),
        st.sampled_from([-100, 100, 0, -1.5, 99.99, 101]),
        max_size=5,
    ),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": _CHANCE}),
    "cache_salt": st.text(max_size=300),
    "tools": st.one_of(
        *(st.lists(tool, max_size=3) for tool in (_TOOL, _FLAT_TOOL, _ANTHROPIC_TOOL))
    ),
    "tool_choice": st.sampled_from(
        [
            *("none", "auto", "required", "sometimes"),
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "name": "f"},
            *({"type": kind, "name": "f"} for kind in ("auto", "any", "tool", "none", "some")),
        ]
    ),
    "thinking": st.fixed_dictionaries(
        {"type": st.sampled_from(["enabled", "disabled", "adaptive"])},
        optional={"budget_tokens": st.sampled_from([0, 1, 1024, 2**31, -1])},
    ),
    "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["none", "low", "colossal"])}),
    "output_config": st.fixed_dictionaries({"effort": st.sampled_from(["max", "colossal"])}),
    "reasoning_effort": st.sampled_from(["none", "low", "high", "colossal"]) | st.text(max_size=9),
    "thinking_token_budget": st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, -2]),
}
_NEEDED = {
    "input": _TEXT | st.lists(_ITEM, max_size=4),
    "model": st.sampled_from(_MODELS),
    "prompt": _TEXT | _TOKEN_IDS,
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.just("user"), "content": _TEXT}), min_size=1, max_size=3
    ),
    "tokens": _TOKEN_IDS,
}


@dataclass(frozen=True, slots=True)
class RandomRequest:
    """A request as it goes over the wire.

    is_dropped  whether the caller goes away once it is sent
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_dropped: bool

    def encode(self) -> bytes:
        """Return its bytes; the connection is to be closed after the answer."""
        lines = [f"{self.method} {self.target} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body or self.method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + self.body


def _fields_of(body: type[Body]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a few fields of the body, as they should be or anything else."""

    def fields(names: Iterable[str]) -> st.SearchStrategy[tuple[str, Any]]:
        return st.sampled_from(sorted(names)).flatmap(
            lambda name: st.tuples(st.just(name), _mostly(likely[name], ABSURD, 6))
        )

    neutral = {
        name: st.sampled_from([*(parameter.neutral or (True, False)), None])
        for name, parameter in body.parameters.items()
    }
    likely = neutral | _LIKELY
    unknown = st.tuples(st.text(max_size=80), ABSURD)
    others = fields(neutral) | fields(neutral) | unknown
    return st.lists(_mostly(fields(body.model_fields), others, 8), max_size=5).map(dict)


def _bodies_of(body: type[Body]) -> st.SearchStrategy[bytes]:
    needed = {
        name: likely
        for name, likely in _NEEDED.items()
        if name in body.model_fields and (name != "messages" or "prompt" not in body.model_fields)
    }
    limits = {"max_tokens", "max_output_tokens"} & body.model_fields.keys()
    limited = {name: st.integers(1, 12) for name in limits}
    objects = st.tuples(
        st.fixed_dictionaries({**needed, **limited}), _fields_of(body), _CHANCE
    ).map(lambda parts: parts[0] | parts[1] | ({"stream": True} if parts[2] and limited else {}))
    return _mostly(_mostly(objects, ABSURD, 12).map(_as_json), st.binary(max_size=60), 12)


def _as_json(value: Any) -> bytes:
    text = json.dumps(value)
    for spelling in _SPELLINGS:
        text = text.replace(json.dumps(_MARK + spelling), spelling)
    return text.encode("utf-8", "surrogatepass")


_HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just("X-Bitwatt-Shadow"), st.sampled_from(["0", "1", "1", "2", ""])),
        st.tuples(st.just("X-Request-Id"), st.sampled_from(["a-b/c", "x" * 129, "é", ""])),
        st.tuples(st.just("Accept"), st.sampled_from(["text/event-stream", "a/b;q=x", "*"])),
        st.tuples(st.just("Authorization"), st.sampled_from(["Bearer ", "Bearer x", "Basic =="])),
        st.tuples(st.just("Accept-Encoding"), st.sampled_from(["gzip, br", "identity;q=0"])),
        st.tuples(st.just("Expect"), st.sampled_from(["100-continue", "200-maybe"])),
        st.tuples(st.just("Traceparent"), st.text("0123456789abcdef-", max_size=60)),
        st.tuples(st.just("Cookie"), st.text(st.characters(codec="latin-1"), max_size=40)),
    ),
    max_size=2,
)
_CONTENT_TYPES = st.sampled_from(
    [*["application/json"] * 20, "application/json; charset=utf-8", "text/plain", "application/xml"]
)
_QUERIES = st.one_of(
    st.just(""),
    st.tuples(
        st.sampled_from(["since", "limit", "x"]),
        st.sampled_from(["0", "1e9", "-1", "nan", "inf", "1e999", "", "a", "%00", "9" * 400]),
    ).map(lambda pair: f"?{pair[0]}={pair[1]}"),
    st.text("abc=&%;+[]1", max_size=20).map("?".__add__),
)
_NAMES = st.sampled_from(
    ["builtin", "builtin-twin", "gpt-4", "%2e%2e%2f", "a/b/c", "%00", "%ff", "..", "x" * 2000]
)


def random_requests(paths: Mapping[str, Mapping[str, Any]]) -> st.SearchStrategy[RandomRequest]:
    """Return requests to these routes and some others.

    paths  of the server's OpenAPI document: what each method of each does
    """
    wanted = [
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if method in ("get", "post")
    ]
    assert {path for method, path in wanted if method == "POST"} == set(BODY_TYPES)
    posts = [
        st.builds(
            lambda path, kind, headers, body, is_dropped: RandomRequest(
                "POST", path, (("Content-Type", kind), *headers), body, is_dropped
            ),
            st.just(path),
            _CONTENT_TYPES,
            _HEADERS,
            _bodies_of(BODY_TYPES[path]),
            st.sampled_from([False] * 9 + [True]),
        )
        for method, path in wanted
        if method == "POST"
    ]
    targets = [path for method, path in wanted if method == "GET"]
    gets = st.builds(
        lambda target, name, query, headers: RandomRequest(
            "GET", target.split("{")[0] + name * ("{" in target) + query, tuple(headers), b"", False
        ),
        st.sampled_from([*targets, "/", "/docs", "//v1/models", "/v1", "/%2e%2e/etc", "/a" * 999]),
        _NAMES,
        _QUERIES,
        _HEADERS,
    )
    others = st.builds(
        lambda method, target, headers, body: RandomRequest(
            method, target, tuple(headers), body, False
        ),
        st.sampled_from(["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "POST", "BREW", "get"]),
        st.sampled_from([path for _, path in wanted]),
        _HEADERS,
        st.binary(max_size=20),
    )
    return st.one_of(*posts, *posts[:2], *posts[:2], gets, others)
