"""Choosing and starting the native backend: what it honours and what it refuses."""

import ctypes
import threading
from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from bitwatt_kernels.cpu import abi, library
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.cpu.threads import available_threads
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.registry import choose_backend

from tests.kernels.cpu.conftest import CPU, available, make_native
from tests.kernels.cpu.factories import make_ternary


def test_the_cpu_is_served_by_the_native_backend() -> None:
    choice = choose_backend(CPU)
    assert choice.backend.name == "native"
    assert choice.passed_over == {}


def test_the_fastest_instruction_set_is_the_default() -> None:
    assert NativeBackend(CPU).instruction_set == available()[0]


def test_choosing_passes_the_instruction_set_on() -> None:
    backend = choose_backend(CPU, instruction_set="portable").backend
    assert isinstance(backend, NativeBackend)
    assert backend.instruction_set == "portable"


def test_an_instruction_set_that_does_not_run_here_is_refused() -> None:
    """With its name, those that run and the knob; no other backend takes its place."""
    names = ", ".join(available())
    with pytest.raises(BackendError, match=f"'sve9' does not run here.*{names} \\(--cpu-isa"):
        choose_backend(CPU, instruction_set="sve9")


def test_an_instruction_set_is_refused_where_the_backend_has_none_to_choose() -> None:
    with pytest.raises(BackendError, match="'portable' is for the native backend"):
        choose_backend(CPU, "torch", instruction_set="portable")


def test_a_number_of_threads_is_at_least_one() -> None:
    with pytest.raises(BackendError, match="0 threads; expected at least 1 \\(--num-threads"):
        choose_backend(CPU, num_threads=0)
    with pytest.raises(BackendError, match="expected at least 1"):
        NativeBackend(CPU, num_threads=0)


def test_the_environment_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are the settings' to read."""
    monkeypatch.setenv("BITWATT_CPU_ISA", "portable")
    monkeypatch.setenv("BITWATT_NUM_THREADS", "77")
    backend = NativeBackend(CPU)
    assert backend.instruction_set == available()[0]
    assert backend.num_threads == available_threads()


def test_choosing_sets_the_threads_of_the_kernels_and_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        backend = choose_backend(CPU, "native", num_threads=1).backend
        assert isinstance(backend, NativeBackend)
        assert backend.num_threads == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_threads_are_those_the_process_may_use() -> None:
    assert NativeBackend(CPU).num_threads == available_threads() >= 1


def test_without_the_library_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_candidates", lambda: [tmp_path / library.LIBRARY_NAME])
    library.load_library.cache_clear()
    with pytest.raises(BackendError, match="install a C\\+\\+20 compiler"):
        NativeBackend(CPU)


def doctor_an_offset(monkeypatch: pytest.MonkeyPatch) -> str:
    fields = [("num_rows", c_int64), ("rows", c_void_p)]
    doctored = type("RopeTable", (Structure,), {"_fields_": fields})
    monkeypatch.setattr(abi, "RopeTable", doctored)
    return "RopeTable.num_rows is 8, expected 0"


def doctor_a_size(monkeypatch: pytest.MonkeyPatch) -> str:
    fields = [*abi.StepCall._fields_, ("extra", c_void_p)]
    monkeypatch.setattr(abi, "StepCall", type("StepCall", (Structure,), {"_fields_": fields}))
    return "StepCall is 56, expected 64"


def doctor_a_number(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(abi.ACTIVATIONS, "silu", 2)
    return "kSilu is 1, expected 2"


@pytest.mark.parametrize("doctor", [doctor_an_offset, doctor_a_size, doctor_a_number])
def test_a_library_built_from_other_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch, doctor: Callable[[pytest.MonkeyPatch], str]
) -> None:
    """An editable install keeps its library when the sources change under it."""
    difference = doctor(monkeypatch)
    library.load_library.cache_clear()
    with pytest.raises(BackendError, match=r"other sources .* install bitwatt again") as refusal:
        NativeBackend(CPU)
    assert difference in str(refusal.value)


def test_a_library_that_tells_nothing_of_its_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As were those built before there was such a check."""
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: libc)
    library.load_library.cache_clear()
    with pytest.raises(BackendError, match="other sources"):
        NativeBackend(CPU)


def test_a_gpu_is_refused() -> None:
    with pytest.raises(BackendError, match="not on cuda"):
        NativeBackend(torch.device("cuda"))


def test_python_threads_may_share_a_backend(native: NativeBackend) -> None:
    """The pool runs one call at a time: two callers take turns, and neither sees the other's."""
    weight = native.prepare_ternary(make_ternary(2048, 512))
    inputs = [torch.randn(3, 512) for _ in range(4)]
    expected = [
        native.ternary_linear(native.quantize(x), weight, None, torch.float32) for x in inputs
    ]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(50):
            y = native.ternary_linear(native.quantize(inputs[i]), weight, None, torch.float32)
            if not torch.equal(y, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_timing_memory_asks_between_its_parts_whether_to_go_on() -> None:
    backend = make_native()
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        backend.measure_read_bandwidth(3 << 24, num_passes=2, check=check)
    assert num_checks == 2
    assert backend.measure_read_bandwidth(3 << 24, num_passes=2, check=check) > 0
    assert num_checks == 2 + 3 + 2


def test_memory_is_timed_beside_weights_that_were_prepared_for_inference() -> None:
    backend = make_native()
    with torch.inference_mode():
        prepared = backend.prepare_ternary(make_ternary(64, 64))
    before = prepared.blocks.clone()
    assert backend.measure_read_bandwidth(1 << 20, num_passes=1) > 0
    assert torch.equal(prepared.blocks, before)


def test_weights_lie_side_by_side() -> None:
    backend = make_native()
    first, second = (backend.prepare_ternary(make_ternary(64, 128)) for _ in range(2))
    apart = second.blocks.data_ptr() - first.blocks.data_ptr()
    assert 0 < apart <= 2 * (first.nbytes + 64)
    assert first.blocks.data_ptr() % 64 == second.blocks.data_ptr() % 64 == 0
