"""How many threads there may be: cores, within the quotas of every control group above."""

from pathlib import Path

import pytest
import torch
from bitwatt_kernels.cpu import threads
from bitwatt_kernels.cpu.threads import available_threads
from bitwatt_kernels.registry import choose_backend


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of a machine of 64 cores."""
    monkeypatch.setattr(threads, "_ROOT", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/system.slice/bitwatt.service\n",
                "sys/fs/cgroup/system.slice/bitwatt.service/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n0::/\n",
                f"{V1}/docker/1/cpu.cfs_quota_us": "600000\n",
                f"{V1}/docker/1/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (  # in a container that sees its own group as the root
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/1\n",
                f"{V1}/cpu.cfs_quota_us": "500000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "garbage"}, 64),
    ],
    ids=[
        "no-groups",
        "v2-max",
        "v2-root",
        "v2-half-a-core",
        "v2-below-the-root",
        "v2-of-the-parent",
        "v1",
        "v1-in-a-container",
        "v1-none",
        "garbage",
    ],
)
def test_threads_are_the_cores_within_the_narrowest_quota(
    root: Path, files: dict[str, str], expected: int
) -> None:
    write(root, files)
    assert available_threads() == expected


def test_torch_keeps_to_the_quota_too(root: Path) -> None:
    """Torch by itself takes a thread for each core that it sees."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        choose_backend(torch.device("cpu"), "torch")
        assert torch.get_num_threads() == 4
        write(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"})
        choose_backend(torch.device("cpu"), "torch")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
