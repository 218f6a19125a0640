"""What "The Era of 1-bit LLMs" (arXiv:2402.17764) reports, to stand beside what is measured here.

Its memory and latency are of one GPU (section 3), its throughput of two A100 with 80 GB each.
"""

from dataclasses import dataclass

__all__ = ["PAPER_SIZES", "PAPER_THROUGHPUT", "PaperSize", "PaperThroughput"]


@dataclass(frozen=True, slots=True)
class PaperSize:
    """A row of its table 1: gigabytes and milliseconds a token, ternary and of the LLaMA beside it.

    dense_size   the size of that LLaMA
    nats         by how much the ternary model's cross-entropy was above that LLaMA's
    """

    ternary_gb: float
    ternary_ms: float
    dense_size: str
    dense_gb: float
    dense_ms: float
    nats: float

    @property
    def memory_gain(self) -> float:
        return self.dense_gb / self.ternary_gb

    @property
    def latency_gain(self) -> float:
        return self.dense_ms / self.ternary_ms


@dataclass(frozen=True, slots=True)
class PaperThroughput:
    """Its table 3: the largest batch of 512 tokens each, and tokens a second, at 70B."""

    memory_gb: float
    context_tokens: int
    latency_gain: float
    ternary_batch: int
    ternary_tokens_per_s: float
    dense_batch: int
    dense_tokens_per_s: float


PAPER_SIZES = {
    "700M": PaperSize(0.80, 0.96, "700M", 2.08, 1.18, 0.043),
    "1.3B": PaperSize(1.14, 0.97, "1.3B", 3.34, 1.62, 0.004),
    "3B": PaperSize(2.22, 1.87, "3B", 7.89, 5.07, -0.013),
    "3.9B": PaperSize(2.38, 2.11, "3B", 7.89, 5.07, -0.043),
}
PAPER_THROUGHPUT = PaperThroughput(
    memory_gb=160,
    context_tokens=512,
    latency_gain=4.1,
    ternary_batch=176,
    ternary_tokens_per_s=2977,
    dense_batch=16,
    dense_tokens_per_s=333,
)
