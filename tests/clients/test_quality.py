"""Quality on one's own texts: figures worked out by hand, errors by line, the command."""

import asyncio
import json
import math

import httpx
import pytest
from bitwatt.cli import main
from bitwatt_client import ComparisonError, compare_quality, quality_as_table
from bitwatt_client.errors import StreamError
from bitwatt_client.prompts import Line
from bitwatt_client.server import Server

from tests.clients.test_compare import make_pair_app
from tests.fakes import make_client, make_tokenizer, run_server

TEXTS = ("the quick brown fox", "héllo wörld")


def make_lines(*texts):
    return [Line(number, text) for number, text in enumerate(texts, start=1)]


def answering(score):
    """Return a client of a server that answers a prompt's body with what `score` returns."""

    def answer(request):
        return httpx.Response(200, json=score(json.loads(request.content)))

    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


def scored(*places, offsets):
    """Return a completion whose prompt has these (token, logprob, likeliest, its logprob)."""
    entries = [
        {str(token): {"logprob": value}, str(best): {"logprob": best_value}}
        for token, value, best, best_value in places
    ]
    choice = {"prompt_logprobs": [None, *entries], "logprobs": {"text_offset": offsets}}
    return {"choices": [choice]}


@pytest.mark.anyio
async def test_figures_are_what_they_are_by_hand():
    """Of "äbc" after BOS: 4 bytes; after its own first token, 2."""

    def score(body):
        assert (body["max_tokens"], body["echo"], body["prompt_logprobs"]) == (0, True, 1)
        if body["model"] == "a":
            return scored((5, -1.0, 7, -0.5), (6, -3.0, 8, -0.1), offsets=[0, 0, 1])
        return scored((5, -1.0, 7, -0.5), (6, -1.0, 6, -1.0), offsets=[0, 1, 2])

    async with answering(score) as http:
        a, b = (Server(http, "http://x", name) for name in "ab")
        found = await compare_quality(a, b, make_lines("äbc", "äbc"))
    assert found.a.bits_per_byte == pytest.approx(4 / 4 / math.log(2))
    assert found.b.bits_per_byte == pytest.approx(2 / 2 / math.log(2))
    assert found.b.perplexity == pytest.approx(math.e)
    assert found.agreement == 0.5
    assert "in 50.00% of places" in quality_as_table(found)


@pytest.mark.anyio
async def test_other_tokens_have_bits_a_byte_and_no_agreement():
    def score(body):
        token = 5 if body["model"] == "a" else 6
        return scored((token, -1.0, 7, -0.5), offsets=[0, 0])

    async with answering(score) as http:
        a, b = (Server(http, "http://x", name) for name in "ab")
        found = await compare_quality(a, b, make_lines("abc"))
    assert found.agreement is None
    assert found.a.bits_per_byte == pytest.approx(1 / 3 / math.log(2))
    assert "Their tokens differ" in quality_as_table(found)


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [{}, {"choices": [{"text": "x"}]}, {"choices": []}])
async def test_a_server_that_scores_no_prompts_is_told(answer):
    async with answering(lambda _: answer) as http:
        server = Server(http, "http://x", "a")
        with pytest.raises(StreamError, match="http://x tells no log-probabilities of a prompt"):
            await compare_quality(server, server, make_lines("abc"))


@pytest.mark.anyio
async def test_the_lines_that_a_server_refuses_are_told_together():
    app, _ = make_pair_app()
    async with make_client(app) as http:
        a, b = (Server(http, "http://localhost", name) for name in ("tiny", "tiny-fp16"))
        lines = [Line(2, "fox " * 300), Line(3, "fox"), Line(9, "dog " * 300)]
        with pytest.raises(ComparisonError) as refused:
            await compare_quality(a, b, lines)
    first, second = str(refused.value).splitlines()
    assert first.startswith("line 2: tiny: 400: ")
    assert "256" in first
    assert second.startswith("line 9: ")


@pytest.mark.anyio
async def test_the_command_prints_the_table_and_writes_json(tmp_path, capsys):
    app, _ = make_pair_app()
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    async with run_server(app) as url:

        def run(*args):
            with pytest.raises(SystemExit) as exit_:
                main(["compare", url, url, "--quality", str(path), *args])
            return exit_.value.code

        assert await asyncio.to_thread(run, "--json", str(tmp_path / "q.json")) == 0
        captured = capsys.readouterr()
        path.write_text(json.dumps({"prompt": "fox"}) + "\n" + json.dumps({"text": "fox " * 300}))
        assert await asyncio.to_thread(run) == 1
    assert "tiny against tiny-fp16: 2 texts" in captured.out
    saved = json.loads((tmp_path / "q.json").read_text())
    assert (saved["a"], saved["b"]) == ("tiny", "tiny-fp16")
    # A prompt's token at place i has -i/4, and there is no BOS: the first token isn't predicted.
    ids = [make_tokenizer().encode(text).ids for text in TEXTS]
    nats = sum(0.25 * place for one in ids for place in range(1, len(one)))
    num_bytes = sum(
        len(text.encode()) - len(make_tokenizer().decode(one[:1]).encode())
        for text, one in zip(TEXTS, ids, strict=True)
    )
    of_a = saved["quality"]["a"]
    assert of_a["num_tokens"] == sum(len(one) - 1 for one in ids)
    assert of_a["num_bytes"] == num_bytes
    assert of_a["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2))
    assert saved["quality"]["top_1_agreement"] == 1
    assert f"bitwatt compare: {path}, line 2: tiny: 400: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["--png", "x.png"], 2, "--png draws windows, which --quality has none of"),
        ([], 1, 'texts.jsonl, line 2: no "prompt" or "text"'),
    ],
)
def test_what_is_wrong_is_told_before_a_server_is_called(tmp_path, capsys, args, status, said):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"texts": "b"}\n')
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "http://127.0.0.1:1", "http://127.0.0.1:1", "--quality", str(path), *args])
    assert exit_.value.code == status
    assert said in capsys.readouterr().err
