"""The errors of this package.

ClientError
├── ServerError      the server answered with an error
├── StreamError      a stream broke off or made no sense
└── ComparisonError  the measurements leave nothing to compare
"""

import httpx

__all__ = ["ClientError", "ComparisonError", "ServerError", "StreamError", "told"]


class ClientError(Exception):
    """Anything this package raises."""


class ServerError(ClientError):
    """The server answered with an error.

    code  what the server calls it, as OpenAI does; None where it doesn't say
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.code = code


class StreamError(ClientError):
    """A stream broke off or made no sense."""


class ComparisonError(ClientError):
    """The measurements leave nothing to compare."""


def told(error: Exception) -> str:
    """Return the error in words; one of the connection with the server's address."""
    words = str(error) or type(error).__name__
    if isinstance(error, httpx.RequestError):
        url = error.request.url
        return f"{url.scheme}://{url.netloc.decode()} can't be reached: {words}"
    return words
