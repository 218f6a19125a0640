"""A conversation at the terminal."""

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TextIO

import httpx

from bitwatt_client.errors import ClientError, ServerError, told
from bitwatt_client.events import Chunk
from bitwatt_client.server import Message, Server, mean_tpot_s
from bitwatt_client.terminal import plural, printable

__all__ = ["Conversation"]

_HELP = """\
/clear  begin anew
/exit   leave, as Ctrl-D does
/help   this list
Ctrl-C ends an answer; what it has said is kept."""


class Conversation:
    """Answers lines with all before them in mind.

    answers go to out, all else to notices; neither lets a model's text command the terminal.

    runner  runs a line's answer; Ctrl-C meanwhile ends that answer alone
    """

    def __init__(
        self,
        server: Server,
        runner: asyncio.Runner,
        *,
        out: TextIO,
        notices: TextIO,
        max_tokens: int | None = None,
    ) -> None:
        self._server = server
        self._runner = runner
        self._out = out
        self._notices = notices
        self._max_tokens = max_tokens
        self._turns: list[tuple[Message, Message]] = []
        self._told_why_no_joules = False
        self.num_failed = 0

    def run(self, read: Callable[[], str]) -> None:
        """Answer what read brings, until /exit or its EOFError."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._notice("\n(/exit or Ctrl-D leaves)")
                continue
            match line:
                case "":
                    pass
                case "/exit" | "/quit" | "/bye":
                    return
                case "/clear":
                    self._turns.clear()
                    self._notice("(all forgotten)")
                case "/help" | "/?":
                    self._notice(_HELP)
                case _ if line.startswith("/") and line[1:].isalpha():
                    self._notice(f"({line} is no command; /help lists them)")
                case _:
                    self._answer(line)

    def _answer(self, line: str) -> None:
        answer = _Answer(self._out)
        question = {"role": "user", "content": line}
        try:
            while not self._fits(question, answer):
                self._drop_older_half()
        except KeyboardInterrupt:
            self._notice("\n(interrupted)")
        except (ClientError, httpx.HTTPError) as error:
            self.num_failed += 1
            self._notice(("\n" if answer.text else "") + f"({told(error)})")
            return
        else:
            self._notice(f"\n({self._measured(answer)})")
        if answer.text:
            self._turns.append((question, {"role": "assistant", "content": answer.text}))
        if answer.finish_reason == "length" and self._max_tokens is None:
            self._notice("(the context is full, so the answer was cut off)")
            if len(self._turns) > 1:
                self._drop_older_half()

    def _fits(self, question: Message, answer: "_Answer") -> bool:
        """Answer the question; return False if the context has no room for all that was said."""
        messages = [*(message for turn in self._turns for message in turn), question]
        options = {} if self._max_tokens is None else {"max_tokens": self._max_tokens}
        try:
            self._runner.run(answer.take(self._server, messages, options))
        except ServerError as error:
            if not self._turns or not _is_context_full(error):
                raise
            return False
        return True

    def _drop_older_half(self) -> None:
        num_dropped = (len(self._turns) + 1) // 2
        del self._turns[:num_dropped]
        turns = "oldest turn is" if num_dropped == 1 else f"{num_dropped} oldest turns are"
        self._notice(f"(the context is full: the {turns} forgotten)")

    def _measured(self, answer: "_Answer") -> str:
        """Return an answer's tokens, pace and joules."""
        last = answer.last
        if last is None or last.num_tokens is None:
            return "no usage was told"
        parts = [plural(last.num_tokens, "token")]
        if answer.text_times_s:
            ttft_s = answer.text_times_s[0] - answer.started_s
            parts.append(f"first after {1e3 * ttft_s:.0f} ms")
            tpot_s = mean_tpot_s(answer.text_times_s, last.num_tokens)
            if tpot_s is not None:
                parts.append(f"{1 / tpot_s:.1f} tok/s")
            else:  # one token, or all read at once
                e2e_s = answer.text_times_s[-1] - answer.started_s
                parts.append(f"{last.num_tokens / e2e_s:.1f} tok/s with the prompt's time")
        if last.energy_joules is not None:
            parts.append(f"{last.energy_joules:.3g} J")
        elif last.energy_reason and not self._told_why_no_joules:
            self._told_why_no_joules = True
            parts.append(f"joules unavailable: {last.energy_reason}")
        else:
            parts.append("joules unavailable")
        return ", ".join(parts)

    def _notice(self, text: str) -> None:
        self._out.flush()
        self._notices.write(printable(text) + "\n")
        self._notices.flush()


class _Answer:
    """An answer as it comes.

    started_s     when it was asked for
    text_times_s  when each chunk that has text or the end was read
    last          the chunk with the usage
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.text = ""
        self.finish_reason: str | None = None
        self.started_s = 0.0
        self.text_times_s: list[float] = []
        self.last: Chunk | None = None

    async def take(self, server: Server, messages: list[Message], options: dict[str, int]) -> None:
        self.started_s = time.perf_counter()
        async with aclosing(server.stream_chat(messages, **options)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.finish_reason:
                    self.text_times_s.append(chunk.read_s)
                self.text += chunk.text
                self.finish_reason = chunk.finish_reason or self.finish_reason
                if chunk.num_tokens is not None:
                    self.last = chunk
                self._out.write(printable(chunk.text))
                self._out.flush()


def _is_context_full(error: ServerError) -> bool:
    # Other servers have no code, but say so: "maximum context length", "context size".
    is_said = re.search(r"context (length|size|window)", str(error), re.IGNORECASE)
    return error.code == "context_length_exceeded" or (error.status == 400 and is_said is not None)
