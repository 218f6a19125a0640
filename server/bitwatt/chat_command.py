"""The command chat."""

import asyncio
import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import httpx
from bitwatt_client import ClientError, Server, new_http_client
from bitwatt_client.chat import Conversation
from bitwatt_client.command_line import INTERRUPTED, say, wait_while_it_loads
from bitwatt_client.errors import told
from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from bitwatt.addresses import checked_url
from bitwatt.knobs import Settings, Shown
from bitwatt.quantities import read_count

__all__ = ["ChatSettings", "run_chat"]

_STATE = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
_HISTORY = _STATE / "bitwatt/chat_history"
_MAX_HISTORY_LINES = 1000


class ChatSettings(Settings):
    """Talk to a model."""

    model_config = SettingsConfigDict(env_prefix="BITWATT_CLIENT_", cli_prog_name="bitwatt chat")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="The model's server")
    model: Annotated[str | None, Shown("NAME", "the server's first")] = Field(
        None, description="The model"
    )
    both: bool = Field(
        False, description="Have the model and its twin answer, side by side on a terminal"
    )
    twin: Annotated[str | None, Shown("NAME", "the server's last")] = Field(
        None, description="The other model of --both"
    )
    system: Annotated[str | None, Shown("TEXT")] = Field(
        None, description="How the model is to answer"
    )
    markdown: bool = Field(
        True, description="Show Markdown as it is meant, on a terminal where Rich is installed"
    )
    max_tokens: Annotated[
        int | None, BeforeValidator(read_count), Shown("TOKENS", "as the context has room for")
    ] = Field(None, ge=1, description="Tokens of an answer at most")
    api_key: Annotated[str | None, Shown("KEY")] = Field(
        None, description="The server's key", repr=False
    )

    check_url = field_validator("url")(checked_url)


def run_chat(settings: ChatSettings) -> int:
    """Converse until the end of the input; return the exit status.

    1 where the server or the model isn't there, or, without a person at the terminal to see it,
    where an answer failed
    """
    if sys.stdin.isatty():
        _keep_history(_HISTORY)
    try:
        with asyncio.Runner() as runner:
            http = new_http_client(max_connections=2)
            try:
                servers = runner.run(_open_chat(settings, http))
                conversation = Conversation(
                    servers,
                    runner,
                    out=sys.stdout,
                    notices=sys.stderr,
                    max_tokens=settings.max_tokens,
                    system=settings.system,
                    markdown=settings.markdown,
                )
                conversation.run(_read_line)
            finally:
                runner.run(http.aclose())
    except (ClientError, httpx.HTTPError) as error:
        say(f"bitwatt chat: {told(error)}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 1 if conversation.num_failed and not sys.stdin.isatty() else 0


def _keep_history(path: Path) -> None:
    """Give input() keys to edit with, and the lines typed in earlier chats; keep this one's."""
    try:
        import readline
    except ImportError:  # a Python built without it
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # what a person asks is theirs
        readline.read_history_file(path)
    readline.set_history_length(_MAX_HISTORY_LINES)

    def write() -> None:
        with suppress(OSError):
            readline.write_history_file(path)

    atexit.register(write)


def _read_line() -> str:
    # Bytes that are no UTF-8 come as lone surrogates, which no request can carry.
    line = input("> " if sys.stdin.isatty() else "")
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


async def _open_chat(settings: ChatSettings, http: httpx.AsyncClient) -> list[Server]:
    """Choose the models, wait for them, and say who answers and what may be typed.

    Raises  ClientError where one is not there, or --both has but one
    """
    names = [settings.model or "", settings.twin or ""][: 1 + settings.both]
    servers = [Server(http, settings.url, name, api_key=settings.api_key) for name in names]
    for number, server in enumerate(servers):
        await server.choose_model(first=number == 0)
    if len({server.model for server in servers}) < len(servers):
        raise ClientError(
            f"{servers[0].url} has no second model beside {servers[0].model} for --both (--twin)"
        )
    for server in servers:
        await wait_while_it_loads(server)
        card = next(card for card in await server.list_cards() if card.name == server.model)
        told = [f"{card.name} at {server.url}"]
        if card.weights is not None:
            told.append(f"{card.weights} weights")
        if card.max_model_len is not None:
            told.append(f"a context of {card.max_model_len} tokens")
        say(", ".join(told) + ".")
    say("Type a message. /help lists commands; /exit or Ctrl-D leaves; Ctrl-C ends an answer.")
    return servers
