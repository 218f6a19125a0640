"""A GPU whose compiler, driver or cache folder fails is refused in one sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu import device
from bitwatt_kernels.gpu.configs import load

PROPERTIES = SimpleNamespace(name="NVIDIA A", multi_processor_count=108, major=8, minor=0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC\nmore\nlines"),
        PermissionError(13, "Permission denied", "/models/triton"),
        OSError("libcuda.so.1: cannot open shared object file"),
    ],
)
def test_trouble_with_the_first_kernel_is_one_sentence_that_names_the_knobs(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[torch.device] = []

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise error

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: PROPERTIES)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device, "_zero_kernel", Broken())
    with pytest.raises(BackendError) as refused:
        device.Gpu(torch.device("cuda:1"))
    told = str(refused.value)
    assert type(error).__name__ in told
    assert "(CC)" in told
    assert "(TRITON_CACHE_DIR)" in told
    assert "\n" not in told
    assert made == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("architecture", "is_taken"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", False)]
)
def test_of_amds_gpus_those_are_taken_whose_machine_code_has_been_checked(
    architecture: str, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lines of PTX, dependent launch and deep pipelines."""
    properties = SimpleNamespace(
        name="AMD", multi_processor_count=304, major=9, minor=4, gcnArchName=architecture
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device.Gpu, "_launch_something", lambda _: None)
    monkeypatch.setattr(device.Gpu, "add_scratch", lambda _: None)
    if not is_taken:
        with pytest.raises(BackendError, match=r"AMD is gfx90a; .* for gfx942"):
            device.Gpu(torch.device("cuda"))
        return
    gpu = device.Gpu(torch.device("cuda"))
    assert gpu.configs == load("", (8, 0))
    assert not gpu.pdl
    assert not gpu.inline_asm
    options = gpu.launch_options(4, 4, max_registers=168)
    assert options["num_stages"] == 2
    assert "maxnreg" not in options, "an option of NVIDIA's that AMD's refuses"
    assert gpu.dot_precision(torch.bfloat16) == "ieee"


def test_a_cache_folder_that_cannot_be_written_gives_way_to_a_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    device._choose_cache_folder()
    chosen = Path(triton.knobs.cache.dir)
    assert chosen.is_dir()
    chosen.rmdir()


def test_a_desktop_generation_does_not_get_the_tiles_of_a_larger_shared_memory() -> None:
    assert load("unknown", (12, 0)) == load("unknown", (8, 6)) != load("unknown", (9, 0))
