"""A conversation at the terminal, and the command."""

import asyncio
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from bitwatt.scheduling.request import FinishReason
from bitwatt_client.chat import Conversation
from bitwatt_client.errors import ServerError
from bitwatt_client.events import Chunk
from bitwatt_client.server import Server
from bitwatt_client.terminal import printable

from tests.command_line import run_command
from tests.fakes import FakeEngine, make_app, make_client, make_served_app, run_server


class Script:
    """Brings lines, raises what is no text, and ends."""

    def __init__(self, *lines):
        self._lines = list(lines)

    def __call__(self):
        line = self._lines.pop(0) if self._lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def converse(server, *lines, **options):
    """Return the conversation that these lines made, what was answered and what was noticed."""
    out, notices = io.StringIO(), io.StringIO()
    servers = server if isinstance(server, list) else [server]
    with asyncio.Runner() as runner:
        conversation = Conversation(servers, runner, out=out, notices=notices, **options)
        conversation.run(Script(*lines))
    return conversation, out.getvalue(), notices.getvalue()


def converse_with(engine, *lines, **options):
    server = Server(make_client(make_app(engine)), "http://localhost", "tiny")
    return converse(server, *lines, **options)


class FakeServer:
    """Streams replies, and has no room for more messages than so many.

    sent  the messages of every request that was answered
    """

    def __init__(
        self, *replies, most_messages=1000, finish_reason="stop", energy=None, model="tiny"
    ):
        self.model = model
        self._replies = list(replies)
        self._most_messages = most_messages
        self._finish_reason = finish_reason
        self._energy = energy or {}
        self.sent = []

    async def stream_chat(self, messages, **options):
        if len(messages) > self._most_messages:
            raise ServerError(400, "prompt has 9 tokens", "context_length_exceeded")
        self.sent.append([message["content"] for message in messages])
        reply = self._replies.pop(0) if self._replies else "yes"
        for text in [reply] if isinstance(reply, str) else reply:
            if isinstance(text, BaseException):
                raise text
            yield Chunk(text=text)
        yield Chunk(text="", finish_reason=self._finish_reason)
        yield Chunk(text="", num_prompt_tokens=3, num_tokens=4, **self._energy)


def test_a_conversation_keeps_what_was_said_and_survives_an_error():
    engine = FakeEngine(reply="the fox")
    _, said, noticed = converse_with(engine, "hi", "", "again", max_tokens=16)
    assert said == "the foxthe fox"
    assert noticed.count(" tokens, ") == 2
    first, second = engine.submitted
    assert len(second.prompt_token_ids) > 2 * len(first.prompt_token_ids)
    engine.ends_with, engine.error = FinishReason.ERROR, "out of luck"
    conversation, _, noticed = converse_with(engine, "hi")
    assert "(out of luck)" in noticed
    assert conversation.num_failed == 1


def test_commands_are_obeyed_and_do_not_reach_the_model():
    server = FakeServer()
    _, _, noticed = converse(server, "a", "/help", "/clear", "b", "/sing", "/usr/bin", "/exit", "c")
    assert server.sent == [["a"], ["b"], ["b", "yes", "/usr/bin"]]
    assert "/clear        begin anew" in noticed
    assert "(/sing is no command; /help lists them)" in noticed


def test_both_models_keep_what_they_said_themselves_and_one_that_fails_leaves_the_other():
    left = FakeServer("l1", [ServerError(500, "no luck")], "l3", model="left")
    right = FakeServer("r1", "r2", "r3", model="right")
    conversation, said, noticed = converse([left, right], "a", "b", "c")
    assert said == "left: l1\n\nright: r1" + "left: \n\nright: r2" + "left: l3\n\nright: r3"
    assert left.sent[-1] == ["a", "l1", "c"]
    assert right.sent[-1] == ["a", "r1", "b", "r2", "c"]
    assert conversation.num_failed == 1
    assert "(left: 500: no luck)" in noticed
    assert noticed.count("(right: 4 tokens") == 3


def test_a_system_message_holds_until_it_is_taken_back():
    server = FakeServer()
    _, _, noticed = converse(
        server, "a", "/system Be brief.", "b", "/clear", "c", "/system", "d", "/system", system="Hm"
    )
    assert server.sent[0] == ["Hm", "a"]
    assert server.sent[1] == ["Be brief.", "a", "yes", "b"]
    assert server.sent[2] == ["Be brief.", "c"]
    assert server.sent[3] == ["c", "yes", "d"]
    assert "(it was: Be brief.; there is none any more)" in noticed
    assert "(there was none: /system TEXT sets one)" in noticed


def test_a_question_is_asked_again_in_place_of_its_answer():
    server = FakeServer("one", "two", "three")
    _, _, noticed = converse(server, "/retry", "a", "/retry", "b")
    assert server.sent == [["a"], ["a"], ["a", "two", "b"]]
    assert "(nothing was asked yet)" in noticed
    server = FakeServer("one", [ServerError(500, "no luck")], "two")
    converse(server, "a", "b", "/retry", "/clear", "/retry")
    assert server.sent == [["a"], ["a", "one", "b"], ["a", "one", "b"]]


def test_what_was_said_is_saved(tmp_path):
    path = tmp_path / "said.json"
    away = tmp_path / "no" / "said.json"
    _, _, noticed = converse(FakeServer(), "é", f"/save {path}", f"/save {away}", "/save")
    assert json.loads(path.read_text()) == {
        "tiny": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "yes"}]
    }
    assert f"({away} can't be written: No such file or directory)" in noticed
    assert "(/save FILE names a file)" in noticed


def test_a_full_context_forgets_the_oldest_turns_and_says_so():
    server = FakeServer(most_messages=5)
    _, _, noticed = converse(server, "a", "b", "c", "d")
    assert server.sent[-2:] == [["a", "yes", "b", "yes", "c"], ["c", "yes", "d"]]
    assert "(the context is full: the 2 oldest turns are forgotten)" in noticed


def test_a_question_that_fits_no_context_is_refused_and_the_next_is_answered():
    server = FakeServer(most_messages=0)
    conversation, _, noticed = converse(server, "a" * 1000)
    assert conversation.num_failed == 1
    assert "(400: prompt has 9 tokens)" in noticed


def test_an_answer_that_fills_the_context_is_said_to_be_cut_off():
    server = FakeServer(finish_reason="length")
    _, _, noticed = converse(server, "a", "b", "c")
    assert noticed.count("(the context is full, so the answer was cut off)") == 3
    assert server.sent == [["a"], ["a", "yes", "b"], ["b", "yes", "c"]]
    _, _, noticed = converse(FakeServer(finish_reason="length"), "a", max_tokens=4)
    assert "cut off" not in noticed


def test_an_interrupt_ends_an_answer_alone_and_keeps_what_it_said():
    server = FakeServer(["so ", "far", KeyboardInterrupt()])
    _, said, noticed = converse(server, "a", KeyboardInterrupt(), "b")
    assert said == "so faryes"
    assert "(interrupted)" in noticed
    assert "(/exit or Ctrl-D leaves)" in noticed
    assert server.sent[-1] == ["a", "so far", "b"]


def test_tokens_a_second_and_joules_follow_an_answer():
    _, _, noticed = converse(FakeServer(["a", "b"], energy={"energy_joules": 1.2345}), "hi")
    assert noticed.startswith("\n(4 tokens, first after ")
    assert noticed.endswith(" tok/s, 1.23 J)\n")
    unmeasured = {"energy_reason": "no counter here"}
    _, _, noticed = converse(FakeServer(energy=unmeasured), "hi", "hi")
    first, second = noticed.split("tok/s")[1:]
    assert ", joules unavailable: no counter here)" in first
    assert ", joules unavailable)" in second


def test_the_pace_of_an_answer_that_was_read_at_once_is_that_of_the_whole():
    """It was once 34,712 tok/s: the time it took to read what had waited."""
    _, _, noticed = converse_with(FakeEngine(reply="the quick fox", delay_s=0.005), "hi")
    assert " tok/s with the prompt's time, joules unavailable" in noticed


def test_a_models_text_can_not_command_the_terminal():
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\r\b\x7fok\n\té🙂"
    _, said, _ = converse(FakeServer(list(evil)), "hi")
    assert said == r"\x1b]52;c;ZXZpbA==\x07\x9b2J\x0d\x08\x7fok" + "\n\té🙂"
    _, _, noticed = converse(FakeServer([ServerError(500, "\x1b[2J")]), "hi")
    assert "\x1b" not in noticed
    kept = {char for char in map(chr, range(160)) if printable(char) == char}
    assert {char for char in kept if not char.isprintable()} == {"\n", "\t"}


def test_other_servers_words_for_a_full_context_are_understood():
    full = ServerError(400, "This model's maximum context length is 9 tokens.")
    _, _, noticed = converse(FakeServer("yes", [full], "no"), "a", "b")
    assert "the oldest turn is forgotten" in noticed


COMMAND = [sys.executable, "-m", "bitwatt", "chat"]


@pytest.mark.anyio
async def test_the_command_says_who_answers_and_what_may_be_typed():
    async with run_server(make_app()) as url:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, url, stdin=-1, stdout=-1, stderr=-1
        )
        out, error = await process.communicate(b"hi\n\xff\n/exit\nnot sent\n")
    assert process.returncode == 0
    assert out == b"the quick brown fox" * 2
    banner = f"tiny at {url}, ternary weights, a context of 256 tokens.\nType a message. /help"
    assert error.decode().startswith(banner)


@pytest.mark.anyio
async def test_the_command_has_both_twins_answer_one_pipe(capsys):
    app = make_served_app({"a": FakeEngine(reply="one"), "b": FakeEngine(reply="two")})
    async with run_server(app) as url:
        both = url, "--both", "--system", "be brief"
        status, out, error = await run_command(capsys, "chat", *both, typed=b"hi\n")
        alone = url, "--both", "--twin", "a"
        refused, _, told = await run_command(capsys, "chat", *alone, typed=b"hi\n")
    assert (status, refused) == (0, 1)
    assert out == "a: one\n\nb: two"
    assert error.count("joules unavailable") == 2
    assert "has no second model beside a for --both (--twin)" in told


@pytest.mark.anyio
async def test_the_command_refuses_a_wrong_model_before_the_first_question(capsys):
    async with run_server(make_app()) as url:
        wrong = url, "--model", "tinny"
        status, out, error = await run_command(capsys, "chat", *wrong, typed=b"hi\n")
    assert status == 1
    assert out == ""
    assert error == f"bitwatt chat: {url} serves no tinny; its models are tiny\n"


@pytest.mark.anyio
async def test_the_command_fails_where_a_piped_question_fails(capsys):
    async with run_server(make_app(FakeEngine(dies_after=1))) as url:
        status, _, _ = await run_command(capsys, "chat", url, typed=b"hi\n")
    assert status == 1


@pytest.mark.anyio
async def test_ctrl_c_during_an_answer_ends_that_answer_alone():
    engine = FakeEngine(gate=asyncio.Event())
    async with run_server(make_app(engine)) as url:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, url, stdin=-1, stdout=-1, stderr=-1
        )
        process.stdin.write(b"hi\n")
        while not engine.running:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        while engine.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        engine.gate.set()
        out, error = await process.communicate(b"again\n")
    assert process.returncode == 0
    assert out == b"the quick brown fox"
    assert "(interrupted)" in error.decode()
    assert "Traceback" not in error.decode()


def test_the_command_on_a_terminal_renders_markdown_and_remembers_lines(tmp_path):
    """Through a pseudo-terminal, as a person sees it."""
    code = """
import sys
from bitwatt import chat_command
from bitwatt_client.chat import Conversation
from tests.clients.test_chat import FakeServer
import asyncio
chat_command._keep_history(chat_command._HISTORY)
with asyncio.Runner() as runner:
    conversation = Conversation(
        [FakeServer("**bold**\\n\\n- one")], runner, out=sys.stdout, notices=sys.stderr
    )
    conversation.run(chat_command._read_line)
"""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "60"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    said, num_read = b"", 0
    for awaited, typed in ((b"> ", b"hello\r"), (b"tok/s", b""), (b"> ", b"/exit\r")):
        while (found := said.find(awaited, num_read)) < 0:
            said += os.read(ours, 4096)
        num_read = found + len(awaited)
        os.write(ours, typed)
    status = process.wait(timeout=30)
    os.close(ours)
    assert status == 0
    assert b"\x1b[1mbold\x1b[0m" in said
    assert "• one" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    kept = tmp_path / "bitwatt/chat_history"
    assert kept.read_text().splitlines() == ["hello", "/exit"]
    assert kept.stat().st_mode & 0o077 == 0
