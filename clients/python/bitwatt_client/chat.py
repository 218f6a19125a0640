"""A conversation at the terminal."""

from collections.abc import Callable
from contextlib import aclosing
from typing import TextIO

import httpx

from bitwatt_client.errors import ClientError
from bitwatt_client.server import Message, Server

__all__ = ["converse"]


async def converse(
    server: Server,
    *,
    read: Callable[[], str | None],
    out: TextIO,
    max_tokens: int | None = None,
) -> None:
    """Answer each line that read brings, with all before it in mind, until it brings None."""
    options = {} if max_tokens is None else {"max_tokens": max_tokens}
    messages: list[Message] = []
    while (line := read()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            async with aclosing(server.stream_chat(messages, **options)) as chunks:
                async for chunk in chunks:
                    answer += chunk.text
                    out.write(chunk.text)
                    out.flush()
        except (ClientError, httpx.HTTPError) as error:
            messages.pop()
            out.write(f"\n[{error}]")
        else:
            messages.append({"role": "assistant", "content": answer})
        out.write("\n")
