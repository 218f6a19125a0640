"""The errors of this package.

ClientError
├── ServerError      the server answered with an error
├── StreamError      a stream broke off or made no sense
└── ComparisonError  the measurements leave nothing to compare
"""

__all__ = ["ClientError", "ComparisonError", "ServerError", "StreamError"]


class ClientError(Exception):
    """Anything this package raises."""


class ServerError(ClientError):
    """The server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class StreamError(ClientError):
    """A stream broke off or made no sense."""


class ComparisonError(ClientError):
    """The measurements leave nothing to compare."""
