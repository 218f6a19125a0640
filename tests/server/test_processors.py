"""What the processor is called."""

import platform
from pathlib import Path

import pytest
from bitwatt import processors


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: One CPU @ 2:1 GHz\nmodel name\t: Two\n",
            "One CPU @ 2:1 GHz",
        ),
        ("model name\t:\nflags\t: fpu\n", platform.machine()),
        ("CPU implementer\t: 0x41\n", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_a_processor_is_named_or_else_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, name: str
) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "cpuinfo")
    assert processors.cpu_name() == name
