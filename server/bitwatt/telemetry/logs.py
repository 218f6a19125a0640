"""The server's log: one line an event, on standard error."""

import logging
import sys

__all__ = ["configure_logging"]


def configure_logging(level: str) -> None:
    """Log from this level on. Prompts and answers are never logged."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
