"""A client of OpenAI-compatible servers that measures them and compares two models.

It stands alone: it needs httpx, and matplotlib for pictures.
"""

from bitwatt_client.compare import Comparison, LoadPlan, compare
from bitwatt_client.errors import ClientError, ComparisonError, ServerError, StreamError
from bitwatt_client.figures import Figure
from bitwatt_client.load import Window, Work, run_window
from bitwatt_client.report import as_json, as_table
from bitwatt_client.server import Answer, Server, new_http_client

__all__ = [
    "Answer",
    "ClientError",
    "Comparison",
    "ComparisonError",
    "Figure",
    "LoadPlan",
    "Server",
    "ServerError",
    "StreamError",
    "Window",
    "Work",
    "as_json",
    "as_table",
    "compare",
    "new_http_client",
    "run_window",
]
