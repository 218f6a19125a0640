"""What a decode step reads, and memory's rate, against which decoding is held."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bitwatt import builtin
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig
from bitwatt.engine.roofline import MemoryTimer, roofline_of
from bitwatt.model.transformer import Transformer

EMBEDDED = str(builtin.TERNARY)


@dataclass
class TimedBackend:
    """Reads memory at the next of these rates."""

    rates: list[float]
    name: str = "timed"
    read: list[int] = field(default_factory=list)

    def measure_read_bandwidth(
        self,
        num_bytes: int = 1 << 28,
        *,
        num_passes: int = 8,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        check()
        self.read.append(num_bytes)
        return self.rates[len(self.read) - 1]


def make_model(backend: object) -> Transformer:
    memory = SimpleNamespace(step_bytes=7)
    return cast(Transformer, SimpleNamespace(backend=backend, memory=lambda: memory))


def test_memorys_rate_is_the_best_of_looks_that_lie_apart() -> None:
    """While two engines load, one look found a tenth of the rate."""
    backend = TimedBackend([1e9, 3e9, 9e9, 2e9])
    model = make_model(backend)
    roofline = roofline_of(model, speculates=False)
    assert (roofline.step_bytes, roofline.unavailable) == (7, None)
    timer = MemoryTimer(model, roofline)
    for _ in backend.rates:
        assert timer.read_bytes_per_s is None
        timer.look()
    assert timer.read_bytes_per_s == 9e9
    timer.look()
    assert backend.read == [1 << 28] * len(backend.rates)


def test_a_look_at_memory_gives_way_to_a_request_and_is_done_another_time() -> None:
    """The first request after a start waited a tenth of a second for it."""
    backend = TimedBackend([1e9] * 4)
    model = make_model(backend)
    timer = MemoryTimer(model, roofline_of(model, speculates=False))
    for wanted in (False, True, True, False, False, False):
        assert timer.read_bytes_per_s is None
        timer.look(lambda wanted=wanted: wanted)  # type: ignore[misc]
    assert timer.read_bytes_per_s == 1e9
    assert len(backend.read) == 4


@pytest.mark.parametrize(
    ("backend", "speculates", "said"),
    [
        (TimedBackend([]), True, "drafts bring several tokens a step (--speculate)"),
        (SimpleNamespace(name="torch"), False, "the backend torch doesn't time"),
    ],
)
def test_memory_that_is_not_timed_is_unavailable_with_the_reason(
    backend: Any, speculates: bool, said: str
) -> None:
    model = make_model(backend)
    roofline = roofline_of(model, speculates=speculates)
    assert roofline.unavailable is not None
    assert said in roofline.unavailable
    timer = MemoryTimer(model, roofline)
    timer.look()
    assert timer.read_bytes_per_s is None


@pytest.mark.parametrize("weights", ["ternary", "dense"])
def test_a_step_reads_all_weights_but_the_rotary_table(weights: Any) -> None:
    core, info = build_engine(
        EngineConfig(model_path=EMBEDDED, weights=weights, backend="torch", max_num_seqs=1)
    )
    core.time_memory()
    assert core.stats().read_bytes_per_s is None
    core.close()
    memory, roofline = info.memory, info.roofline
    assert roofline is not None
    rope_bytes = 2 * info.max_model_len * 64 // 2 * 4  # cosines and sines of heads of 64, float32
    held = memory.packed_weights_bytes + memory.embedding_bytes + memory.other_weights_bytes
    assert roofline.step_bytes == held - rope_bytes
