"""A client of OpenAI-compatible servers that measures them and compares two models.

It stands alone: it needs httpx, and matplotlib for pictures.
"""

from bitwatt_client.bench import BenchPlan, BenchRun, Slo, run_bench
from bitwatt_client.bench_report import bench_as_json, bench_as_table
from bitwatt_client.compare import Comparison, LoadPlan, compare
from bitwatt_client.errors import ClientError, ComparisonError, ServerError, StreamError
from bitwatt_client.figures import Figure
from bitwatt_client.load import Window, Work, run_window
from bitwatt_client.quality import (
    QualityComparison,
    compare_quality,
    quality_as_json,
    quality_as_table,
)
from bitwatt_client.report import as_json, as_table
from bitwatt_client.server import Answer, ModelCard, Server, new_http_client

__all__ = [
    "Answer",
    "BenchPlan",
    "BenchRun",
    "ClientError",
    "Comparison",
    "ComparisonError",
    "Figure",
    "LoadPlan",
    "ModelCard",
    "QualityComparison",
    "Server",
    "ServerError",
    "Slo",
    "StreamError",
    "Window",
    "Work",
    "as_json",
    "as_table",
    "bench_as_json",
    "bench_as_table",
    "compare",
    "compare_quality",
    "new_http_client",
    "quality_as_json",
    "quality_as_table",
    "run_bench",
    "run_window",
]
