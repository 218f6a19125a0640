"""The tokenizers library's work, with errors of ours.

The library raises no type of its own, and where its Rust panics a BaseException, which passes by
all that answers a request with its error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from bitwatt.errors import BitwattError, InvalidRequestError, shorten

__all__ = ["encode", "raised_as"]


@contextmanager
def raised_as(error_of: Callable[[str], BitwattError]) -> Iterator[None]:
    """Raise, in place of what the library raises in the block, the error made of its one line."""
    try:
        yield
    except (BitwattError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise error_of(cause) from error


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the text's tokens; other threads run meanwhile.

    Raises  InvalidRequestError where the tokenizer fails on it
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a UTF-16 pair, which is no character
        raise InvalidRequestError(
            f"the text {shorten(text)} is not Unicode: it has a lone surrogate"
        ) from None
    with raised_as(_refusal):
        # The batch call lets go of the interpreter while it works; encode() does not.
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    token_ids: list[int] = encoding.ids
    return token_ids


def _refusal(cause: str) -> InvalidRequestError:
    return InvalidRequestError(f"this model's tokenizer fails on a text: {cause}")
