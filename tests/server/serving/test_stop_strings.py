"""1,000 generated answers with stop strings: streamed or not the same; nothing leaks or is lost.

Tokens end within characters, stop strings within tokens, and an answer may be no whole UTF-8. What
must come out is worked out from the bytes, by Python's own decoder.
"""

import asyncio
import codecs
import json
import random
from dataclasses import dataclass, field
from functools import cache

import httpx
import pytest
from bitwatt import builtin
from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.serving.choice import ChoiceReader
from bitwatt.text.output import OutputText
from bitwatt.text.vocabulary import Vocabulary
from tokenizers import Tokenizer

from tests.extent import TEST_ALL
from tests.fakes import FakeEngine, make_app, make_client, make_tokenizer, run_server
from tests.server.text.test_stops import before_first_stop

pytestmark = pytest.mark.anyio

NUM_CASES = 1000
NUM_REQUESTS = NUM_CASES if TEST_ALL else 80  # of them asked of a server, in each way
PIECES = [
    *"aab \n.#",
    "the ",
    "</s>",
    "\r\n",
    "é",
    "e\u0301",  # the same, of a letter and a combining mark
    "o\u0302\u0323",  # two marks
    "ß",
    "漢字",
    "नि",  # a vowel sign
    "🙂",
    "👍🏽",  # a modifier
    "👩‍👩‍👧",  # joined by U+200D
    "🇨🇭",
    "\u200d",
    "\ufe0f",
    "\ufffd",
    "\x00",
]
BROKEN = [b"\xff", b"\xf0\x9f", b"\xe6\xbc", b"\xc3", b"\x99", b"\xed\xa0\x80"]


@dataclass(frozen=True)
class Case:
    """An answer in the groups of tokens in which it comes, and what ends it.

    ends_by_token  whether its last token is one that ends it
    """

    groups: list[list[int]]
    stops: list[str]
    text: str
    num_tokens: int
    is_stopped: bool
    ends_by_token: bool

    @property
    def finish_reason(self):
        return "stop" if self.is_stopped or self.ends_by_token else "length"


def make_cases(tokenizer, num_cases=NUM_CASES):
    chance = random.Random(16)
    vocabulary = Vocabulary(tokenizer)
    id_of = {data: i for i, data in reversed(list(enumerate(vocabulary.token_bytes))) if data}
    return [make_case(chance, tokenizer, vocabulary.token_bytes, id_of) for _ in range(num_cases)]


def make_case(chance, tokenizer, token_bytes, id_of):
    text = "".join(chance.choices(PIECES, k=chance.randint(0, 20)))
    stops = [
        stop for stop in (draw_stop(chance, text) for _ in range(chance.randint(1, 4))) if stop
    ]
    token_ids = []
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        is_split = chance.random() < 0.3  # a model may spell what the tokenizer has in one
        spelled = [id_of[bytes([byte])] for byte in token_bytes[token_id]]
        token_ids += spelled if is_split else [token_id]
    if chance.random() < 0.25:
        where = chance.randint(0, len(token_ids))
        token_ids[where:where] = [id_of[bytes([byte])] for byte in chance.choice(BROKEN)]
    token_ids = token_ids[: chance.randint(60, 120)]
    said, num_tokens, is_stopped = expected(token_ids, stops, token_bytes)
    ends_by_token = chance.random() < 0.5
    token_ids = [*token_ids, 0] if ends_by_token or not token_ids else token_ids
    return Case(
        groups=list(groups(chance, token_ids)),
        stops=stops or ["never"],
        text=said,
        num_tokens=num_tokens if is_stopped else len(token_ids),
        is_stopped=is_stopped,
        ends_by_token=ends_by_token or token_ids == [0],
    )


def draw_stop(chance, text):
    """Return a part of the text, one that nearly is, or some other text."""
    start = chance.randint(0, max(0, len(text) - 1))
    part = text[start : start + chance.choice([1, 2, 3, 5, 9])]
    kind = chance.random()
    if kind < 0.3:
        return part
    return part + chance.choice("b🙂\u0301") if kind < 0.8 else chance.choice(PIECES)


def groups(chance, token_ids):
    while token_ids:
        size = chance.choice([1, 1, 1, 2, 5])
        yield token_ids[:size]
        token_ids = token_ids[size:]


def expected(token_ids, stops, token_bytes):
    """Return the text, the tokens it took, and whether a stop string ended it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for number, token_id in enumerate(token_ids, start=1):
        text += decoder.decode(token_bytes[token_id])
        said, is_stopped = before_first_stop(text, stops)
        if is_stopped:
            return said, number, True
    text += decoder.decode(b"", final=True)
    said, is_stopped = before_first_stop(text, stops)
    return said, len(token_ids), is_stopped


@cache
def fake_cases():
    return make_cases(make_tokenizer())


async def test_the_cases_are_of_every_kind():
    cases = fake_cases()
    assert sum(case.is_stopped for case in cases) > 300
    assert sum(not case.is_stopped for case in cases) > 300
    assert sum("\ufffd" in case.text for case in cases) > 50
    assert sum(len(case.groups) == 1 for case in cases) > 10


@pytest.mark.parametrize("is_real", [False, True], ids=["of 320 tokens", "the embedded model's"])
async def test_a_choice_says_what_stands_before_the_first_stop_and_not_a_character_more(is_real):
    tokenizer = make_tokenizer()
    if is_real:
        tokenizer = Tokenizer.from_file(str(builtin.TERNARY / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer)
    for case in make_cases(tokenizer) if is_real else fake_cases():
        sampling = ResolvedSampling(max_tokens=200, stop_token_ids=(0,), seed=0)
        submit = Submit(request_id="r", prompt_token_ids=[5], sampling=sampling)
        reader = ChoiceReader(0, submit, OutputText(vocabulary, case.stops))
        said, reason = "", None
        for number, token_ids in enumerate(case.groups, start=1):
            ends = FinishReason.STOP if case.ends_by_token else FinishReason.LENGTH
            last = ends if number == len(case.groups) else None
            output = TokenOutput(request_id="r", token_ids=token_ids, finish_reason=last)
            delta = reader.read(output)
            if delta is not None:
                said, reason = said + delta.text, delta.finish_reason
            assert case.text.startswith(said), case  # nothing that is taken back
            if reason is not None:
                break
        assert (said, reason) == (case.text, case.finish_reason), case
        assert reader.num_tokens == case.num_tokens, case


@dataclass(kw_only=True)
class ReplayingEngine(FakeEngine):
    """Says the case that the request's seed names."""

    cases: list[Case] = field(default_factory=list)

    def _outputs(self, request):
        case = self.cases[request.sampling.seed]
        ends = FinishReason.STOP if case.ends_by_token else FinishReason.LENGTH
        return [
            self._output(request, ids, ends if ids is case.groups[-1] else None, is_first=False)
            for ids in case.groups
        ]


def body_of(number, case, *, stream, is_chat):
    asked = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    body = {"model": "tiny", "max_tokens": 200, "seed": number, "stop": case.stops, **asked}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


def read_stream(text):
    """Return the pieces of a stream's answer, why it ended, and its tokens."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    choices = [event["choices"][0] for event in events if event["choices"]]
    deltas = [choice.get("delta", choice) for choice in choices]
    pieces = [delta.get("content", delta.get("text")) or "" for delta in deltas]
    [usage] = [event["usage"] for event in events if event.get("usage")]
    return pieces, choices[-1]["finish_reason"], usage["completion_tokens"]


def read_whole(answer):
    [choice] = answer["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text or "", choice["finish_reason"], answer["usage"]["completion_tokens"]


async def check(client, number, case, *, is_chat):
    """Hold one case's answer, streamed and not, to what it must be."""
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    bodies = [body_of(number, case, stream=stream, is_chat=is_chat) for stream in (False, True)]
    whole, streamed = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
    right = (case.text, case.finish_reason, case.num_tokens)
    assert read_whole(whole.json()) == right, case
    pieces, *told = read_stream(streamed.text)
    assert ("".join(pieces), *told) == right, case


@pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
async def test_the_api_says_the_same_streamed_and_not(is_chat):
    app = make_app(ReplayingEngine(cases=fake_cases()))
    async with make_client(app) as client:
        for number, case in enumerate(fake_cases()[:NUM_REQUESTS]):
            await check(client, number, case, is_chat=is_chat)


async def test_a_server_says_the_same_to_many_at_once():
    app = make_app(ReplayingEngine(cases=fake_cases()))
    async with run_server(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        chosen = list(enumerate(fake_cases()))[-16:]
        await asyncio.gather(
            *(check(client, number, case, is_chat=True) for number, case in chosen)
        )
