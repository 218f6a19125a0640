"""The tuner's search ends in configurations that load again and serve every number of tokens."""

import pytest
import torch
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.configs import LinearConfig, TunedConfigs
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.timing import Call, Timing
from bitwatt_kernels.gpu.tune import REGIMES, candidates, tune


class ScriptedTimer:
    """Runs each call once and gives the times it was told, in turn."""

    def __init__(self, times: list[float]) -> None:
        self._times = iter(times)

    def measure(self, calls: list[Call], *, budget_s: float = 0.0) -> Timing:
        calls[0]()
        return Timing.of([next(self._times)])

    def measure_launched(self, call: Call, *, num_samples: int = 1) -> Timing:
        raise NotImplementedError

    def repeat(self, call: Call, *, seconds: float) -> int:
        raise NotImplementedError


def two_choices(max_tokens: int | None) -> list[LinearConfig]:
    return [LinearConfig(max_tokens, 64, 8, 64, 4, 3), LinearConfig(max_tokens, 128, 8, 64, 4, 3)]


def test_the_best_mean_serves_all_and_a_shape_that_gains_has_its_own(device: torch.device) -> None:
    times = [1.0, 2.0, 1.0, 1.01, 3.0, 1.0, 1.0, 2.0]
    tuned = tune(
        Gpu(device),
        [(64, 64), (128, 64)],
        ScriptedTimer(times),
        regimes=[(8, 1), (None, 9)],
        choices=two_choices,
        rotated_bytes=1,
        report=lambda line: None,
    )
    assert [entry.block_out for entry in tuned.linear] == [64, 128]
    assert {name: [c.block_out for c in own] for name, own in tuned.shapes.items()} == {
        "128x64": [64, 64]
    }
    assert TunedConfigs.from_json(tuned.to_json()) == tuned
    assert tuned.for_linear(5000, 128, 64).block_out == 64
    assert tuned.for_linear(5000, 64, 64).block_out == 128


def test_every_regime_has_candidates_and_the_last_is_open() -> None:
    assert REGIMES[-1][0] is None
    for max_tokens, _ in REGIMES:
        assert 8 <= len(candidates(max_tokens)) <= 80


def test_configurations_that_stop_at_some_number_of_tokens_are_refused(
    device: torch.device,
) -> None:
    configs = Gpu(device).configs
    text = configs.to_json().replace('"max_tokens": null', '"max_tokens": 128')
    with pytest.raises(BackendError, match="the last entry of a list must have max_tokens null"):
        TunedConfigs.from_json(text)
