"""Steps of known cost, and engines to simulate."""

from bitwatt.simulation.replica import Engine
from bitwatt.simulation.step_times import StepPoint, StepTimes, StepWork

__all__ = ["make_engine", "make_step_times", "step_seconds"]


def step_seconds(work: StepWork, factor: float = 1.0) -> float:
    """A millisecond, 120 µs a decode but the first, 20 µs a prompt's token, 20 ns a key."""
    decodes = 1.2e-4 * max(0, work.num_decodes - 1)
    return factor * (1e-3 + decodes + 2e-5 * sum(work.prompts) + 2e-8 * work.num_keys)


def make_step_times(factor: float = 1.0, overhead_s: float = 0.0) -> StepTimes:
    """Return times fitted to such steps, measured without error."""
    points = []
    for context in (16, 600):
        for batch in (1, 2, 4, 8, 16, 32, 64):
            work = StepWork.decode(batch, context)
            points.append(StepPoint(work, step_seconds(work, factor)))
    for prompt in (16, 64, 256, 512):
        work = StepWork.prefill(prompt)
        points.append(
            StepPoint(work, step_seconds(work, factor) + overhead_s, is_whole_request=True)
        )
    return StepTimes.fit(points)


def make_engine(**changes) -> Engine:
    """Return an engine of 64 rows and a context of 1024."""
    return Engine(**({"max_model_len": 1024, "num_blocks": 4096} | changes))
