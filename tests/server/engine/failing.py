"""A step of the model runner that is lost."""

import pytest
from bitwatt.model.runner import ModelRunner
from bitwatt.model.runner_protocol import StepResult, StepResultHandle
from bitwatt.scheduling.plan import Plan

__all__ = ["fail_step"]


class _Lost:
    """A launched step whose result never comes."""

    def __init__(self, handle: StepResultHandle) -> None:
        self._handle = handle

    def wait(self) -> StepResult:
        self._handle.wait()
        raise RuntimeError("lost")


def fail_step(monkeypatch: pytest.MonkeyPatch, index: int, *, is_launched: bool) -> None:
    """Have the step of this index fail: once it was launched, or before."""
    launch, num_launched = ModelRunner.launch, 0

    def fail_once(self: ModelRunner, plan: Plan) -> StepResultHandle:
        nonlocal num_launched
        num_launched += 1
        if num_launched != index + 1:
            return launch(self, plan)
        if not is_launched:
            raise RuntimeError("lost")
        return _Lost(launch(self, plan))

    monkeypatch.setattr(ModelRunner, "launch", fail_once)
