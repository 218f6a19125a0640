"""A conversation at the terminal, with one model or with two at once."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TextIO

import httpx

from bitwatt_client.chat_views import AnswerView, new_view
from bitwatt_client.errors import ClientError, ServerError, told
from bitwatt_client.events import Chunk
from bitwatt_client.server import Message, Server, mean_tpot_s
from bitwatt_client.terminal import plural, printable

__all__ = ["Conversation"]

_HELP = """\
/clear        begin anew
/system TEXT  how the model is to answer; without a TEXT, what holds and that it holds no more
/retry        ask the last question again
/save FILE    write what was said, as JSON
/exit         leave, as Ctrl-D does
/help         this list
Ctrl-C ends an answer; what it has said is kept."""


class Conversation:
    """Answers lines with all before them in mind.

    answers go to out, all else to notices; neither lets a model's text command the terminal.

    runner  runs a line's answer; Ctrl-C meanwhile ends that answer alone
    """

    def __init__(
        self,
        servers: Sequence[Server],
        runner: asyncio.Runner,
        *,
        out: TextIO,
        notices: TextIO,
        max_tokens: int | None = None,
        system: str | None = None,
        markdown: bool = True,
    ) -> None:
        """Begin.

        servers   of the model that answers, or of two that both do, each with its own history
        system    how they are to answer
        markdown  whether a terminal is shown Markdown as it is meant
        """
        self._sides = [_Side(server) for server in servers]
        self._runner = runner
        self._out = out
        self._notices = notices
        self._max_tokens = max_tokens
        self._system = system
        self._markdown = markdown
        self._last_line: str | None = None
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
            command, _, rest = line.partition(" ")
            match command:
                case "":
                    pass
                case "/exit" | "/quit" | "/bye":
                    return
                case "/system":
                    self._set_system(rest.strip())
                case "/save":
                    self._save(rest.strip())
                case "/clear" if not rest:
                    for side in self._sides:
                        side.turns.clear()
                    self._last_line = None
                    self._notice("(all forgotten)")
                case "/retry" if not rest:
                    self._retry()
                case "/help" | "/?":
                    self._notice(_HELP)
                case _ if line.startswith("/") and line[1:].isalpha():
                    self._notice(f"({line} is no command; /help lists them)")
                case _:
                    self._answer(line)

    def _set_system(self, text: str) -> None:
        before, self._system = self._system, text or None
        if text:
            self._notice("(it holds from the next answer on)")
        elif before is None:
            self._notice("(there was none: /system TEXT sets one)")
        else:
            self._notice(f"(it was: {before}; there is none any more)")

    def _save(self, name: str) -> None:
        if not name:
            self._notice("(/save FILE names a file)")
            return
        said = {side.server.model: side.messages(self._system) for side in self._sides}
        try:
            Path(name).expanduser().write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            self._notice(f"({name} can't be written: {error.strerror})")
        else:
            self._notice(f"(written to {name})")

    def _retry(self) -> None:
        if self._last_line is None:
            self._notice("(nothing was asked yet)")
            return
        for side in self._sides:  # where it was answered; the answer may have failed
            if side.turns and side.turns[-1][0]["content"] == self._last_line:
                side.turns.pop()
        self._answer(self._last_line)

    def _answer(self, line: str) -> None:
        self._last_line = line
        question = {"role": "user", "content": line}
        view = new_view(
            self._out,
            [side.server.model for side in self._sides],
            is_terminal=self._out.isatty(),
            markdown=self._markdown,
        )
        is_interrupted = False
        for side in self._sides:
            side.begin()
        try:
            self._runner.run(self._ask_all(question, view))
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            view.end()
        for side in self._sides:
            self._conclude(side, question, is_interrupted=is_interrupted)

    async def _ask_all(self, question: Message, view: AnswerView) -> None:
        async def ask(number: int, side: "_Side") -> None:
            try:
                while not await self._fits(side, question, lambda text: view.push(number, text)):
                    self._drop_older_half(side)
            except (ClientError, httpx.HTTPError) as error:
                side.error = error

        first, *others = [ask(number, side) for number, side in enumerate(self._sides)]
        tasks = [asyncio.ensure_future(other) for other in others]
        try:
            await first
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _conclude(self, side: "_Side", question: Message, *, is_interrupted: bool) -> None:
        """Say how an answer went, and keep it."""
        answer, error = side.answer, side.error
        name = f"{side.server.model}: " if len(self._sides) > 1 else ""
        if error is not None:
            self.num_failed += 1
            self._notice(("\n" if answer.text else "") + f"({name}{told(error)})")
            return
        if is_interrupted and answer.last is None:
            self._notice(f"\n({name}interrupted)")
        else:
            self._notice(f"\n({name}{side.measured()})")
        if answer.text:
            side.turns.append((question, {"role": "assistant", "content": answer.text}))
        if answer.finish_reason == "length" and self._max_tokens is None:
            self._notice("(the context is full, so the answer was cut off)")
            if len(side.turns) > 1:
                self._drop_older_half(side)

    async def _fits(self, side: "_Side", question: Message, push: Callable[[str], None]) -> bool:
        """Answer the question; return False if the context has no room for all that was said."""
        messages = [*side.messages(self._system), question]
        options = {} if self._max_tokens is None else {"max_tokens": self._max_tokens}
        try:
            await side.answer.take(side.server, messages, options, push)
        except ServerError as error:
            if not side.turns or not _is_context_full(error):
                raise
            return False
        return True

    def _drop_older_half(self, side: "_Side") -> None:
        num_dropped = (len(side.turns) + 1) // 2
        del side.turns[:num_dropped]
        turns = "oldest turn is" if num_dropped == 1 else f"{num_dropped} oldest turns are"
        self._notice(f"(the context is full: the {turns} forgotten)")

    def _notice(self, text: str) -> None:
        self._out.flush()
        self._notices.write(printable(text) + "\n")
        self._notices.flush()


class _Side:
    """A model that answers, what was said with it, and the answer under way."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.turns: list[tuple[Message, Message]] = []
        self._told_why_no_joules = False
        self.begin()

    def begin(self) -> None:
        """Make room for the next answer."""
        self.answer = _Answer()
        self.error: ClientError | httpx.HTTPError | None = None

    def messages(self, system: str | None) -> list[Message]:
        """Return all that was said, behind how it is to be answered."""
        said = [message for turn in self.turns for message in turn]
        return said if system is None else [{"role": "system", "content": system}, *said]

    def measured(self) -> str:
        """Return the answer's tokens, pace and joules."""
        answer, last = self.answer, self.answer.last
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


class _Answer:
    """An answer as it comes.

    started_s     when it was asked for
    text_times_s  when each chunk that has text, thinking or the end was read
    last          the chunk with the usage
    """

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.started_s = 0.0
        self.text_times_s: list[float] = []
        self.last: Chunk | None = None

    async def take(
        self,
        server: Server,
        messages: list[Message],
        options: dict[str, int],
        push: Callable[[str], None],
    ) -> None:
        self.started_s = time.perf_counter()
        async with aclosing(server.stream_chat(messages, **options)) as chunks:
            async for chunk in chunks:
                if chunk.is_output:
                    self.text_times_s.append(chunk.read_s)
                self.text += chunk.text
                self.finish_reason = chunk.finish_reason or self.finish_reason
                if chunk.num_tokens is not None:
                    self.last = chunk
                if chunk.text:
                    push(chunk.text)


def _is_context_full(error: ServerError) -> bool:
    # Other servers have no code, but say so: "maximum context length", "context size".
    is_said = re.search(r"context (length|size|window)", str(error), re.IGNORECASE)
    return error.code == "context_length_exceeded" or (error.status == 400 and is_said is not None)
