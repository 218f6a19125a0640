"""Cards of 8.x are given one PTX, on which machine_code.py relies."""

import re
from collections.abc import Callable

import pytest

from tests.extent import TEST_ALL
from tests.kernels.gpu import machine_code
from tests.kernels.gpu import test_attention_machine_code as attention
from tests.kernels.gpu import test_dense_machine_code as dense
from tests.kernels.gpu import test_drawing_machine_code as drawing
from tests.kernels.gpu import test_linear_machine_code as linear
from tests.kernels.gpu.machine_code import MachineCode

CONFIG = linear.CONFIGS_OF[80][0]
# Together they have what differs from generation to generation: copies that don't wait, tensor
# cores of every type, reductions, atomics and fences.
KINDS: dict[str, Callable[[int], MachineCode]] = {
    "dense": lambda capability: dense.compile_dense(dense.CONFIGS[0], False, capability),
    "attention over codes": lambda capability: attention.compile_over_codes(capability, True),
    "queue": lambda capability: linear.compile_linear(CONFIG, capability, is_raw=True),
    "draw": lambda capability: drawing.compile_draw(capability, True),
}


@pytest.mark.slow(15)
@pytest.mark.parametrize("kind", KINDS if TEST_ALL else ["dense"])
def test_cards_of_8_x_have_one_ptx(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compiled from its source: nothing of the others is there."""
    found = set()
    for capability in (80, 86, 89):
        monkeypatch.setattr(machine_code, "_COMPILED", {})
        monkeypatch.setattr(machine_code, "_PTX", {})
        KINDS[kind](capability)
        [(ptx, shared_bytes)] = machine_code._PTX.values()
        assert f".target sm_{capability}" in ptx
        code = ptx.partition("\t.file\t")[0]  # behind it: where sources were when it was compiled
        found.add((re.sub(r"\.target sm_\d+", "", code), shared_bytes))
    assert len(found) == 1
