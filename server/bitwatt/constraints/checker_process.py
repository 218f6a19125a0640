"""A process that tries grammars: `python -m bitwatt.constraints.checker_process`, by checker.py.

Reads a model's tokens and then grammars from standard input, each answered on standard output
before the next; a message is 4 bytes of its length, lowest first, and msgpack. It may be killed at
any moment, and ends by itself where a grammar takes more stack or memory than there is.
"""

import random
import resource
import sys
import threading
import time
from pathlib import Path

import msgspec
from llguidance import LLMatcher, LLTokenizer

from bitwatt.constraints.compiling import (
    TokenBytes,
    compile_grammar,
    new_tokenizer,
    written_for_matcher,
)
from bitwatt.constraints.matching import why_unusable
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.errors import InvalidRequestError

__all__ = ["MAX_MEMORY_BYTES", "Verdict", "main"]

MAX_MEMORY_BYTES = 512 * 1024 * 1024  # beyond what the process has at its start
MAX_MASK_S = 0.02  # of processor time
_STACK_BYTES = 16 * 1024 * 1024
_NUM_WALKS = 3
_WALK_TOKENS = 64


class Verdict(msgspec.Struct, frozen=True):
    """What became of a grammar: its text for matchers, or why it can't be used."""

    grammar: str | None = None
    refusal: str | None = None


def main() -> None:
    """Answer until standard input ends."""
    _limit_memory()
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + _STACK_BYTES + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve() -> None:
    tokens = msgspec.msgpack.decode(_read(), type=TokenBytes)
    tokenizer = new_tokenizer(tokens, len(tokens.tokens))
    del tokens
    _write(b"")
    while data := _read():
        source = msgspec.msgpack.decode(data, type=GrammarSource)
        _write(msgspec.msgpack.encode(_try(source, tokenizer)))


def _read() -> bytes:
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    return sys.stdin.buffer.read(size)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(4, "little") + data)
    sys.stdout.buffer.flush()


def _try(source: GrammarSource, tokenizer: LLTokenizer) -> Verdict:
    try:
        grammar = written_for_matcher(source)
        _walk(compile_grammar(grammar, tokenizer))
    except InvalidRequestError as error:
        return Verdict(refusal=str(error))
    except BaseException as error:  # a panic of the library's is one too
        return Verdict(refusal=f"{source.param} can't be followed: {error}")
    return Verdict(grammar=grammar)


def _walk(start: LLMatcher) -> None:
    """Go through some texts of the grammar, to see what its masks cost.

    Raises  ValueError where it can't go on, or a mask takes too long
    """
    for seed in range(_NUM_WALKS):
        matcher = start.deep_copy()
        chance = random.Random(seed)  # noqa: S311
        for _ in range(_WALK_TOKENS):
            began = time.process_time()
            mask = matcher.compute_bitmask()
            if reason := why_unusable(matcher):
                raise ValueError(reason)
            matcher.consume_token(_some_token(mask, chance))
            spent_s = time.process_time() - began
            if spent_s > MAX_MASK_S:
                raise ValueError(
                    f"a token's mask takes {1000 * spent_s:.0f} ms; "
                    f"the limit is {1000 * MAX_MASK_S:.0f}"
                )
            if matcher.is_stopped():
                break


def _some_token(mask: bytes, chance: random.Random) -> int:
    """Return one of the tokens that the mask allows."""
    begin = chance.randrange(len(mask))
    at: int = next(at for at in (*range(begin, len(mask)), *range(begin)) if mask[at])
    bit: int = chance.choice([bit for bit in range(8) if mask[at] >> bit & 1])
    return 8 * at + bit


if __name__ == "__main__":
    main()
