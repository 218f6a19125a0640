"""The wheel, built and installed where no compiler is."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from tests.end_to_end.conftest import start_server, stop_server
from tests.extent import TEST_ALL

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow(60),
    pytest.mark.skipif(not TEST_ALL, reason="takes a minute: BITWATT_TEST_ALL=1 runs it"),
    pytest.mark.needs_program("g++"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """What `make wheel` leaves in dist/."""
    folder = tmp_path_factory.mktemp("wheel")
    scripts = sysconfig.get_path("scripts")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", folder / "built"]
    subprocess.run([*command, REPOSITORY], check=True)
    [built] = (folder / "built").iterdir()
    subprocess.run(
        [Path(scripts, "auditwheel"), "repair", "-w", folder / "dist", built],
        check=True,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
    )
    [repaired] = (folder / "dist").iterdir()
    return repaired


def test_a_wheel_runs_on_any_python_and_an_old_glibc_and_is_small(wheel):
    assert "-py3-none-manylinux_2_" in wheel.name
    names = ZipFile(wheel).namelist()
    assert "bitwatt_kernels/cpu/bitwatt_cpu.so" in names
    assert "bitwatt/builtin/ternary/model.safetensors" in names
    assert not [name for name in names if "builtin/fp16" in name or "csrc" in name]
    assert wheel.stat().st_size < 9e6


def test_an_installed_wheel_serves_with_the_native_kernels(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").iterdir()) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True, env={**os.environ, "PATH": "/nonexistent"})
    # The dependencies are this environment's, without its .pth files: they'd lead to the sources.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    server = start_server(python=str(python))
    try:
        models = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        assert [model["id"] for model in models] == ["builtin", "builtin-fp16"]
        state = httpx.get(f"{server.url}/bitwatt/v1/comparison", timeout=60).json()
        assert {model["engine"]["backend"] for model in state["models"]} == {"native"}
    finally:
        assert stop_server(server) == 0
