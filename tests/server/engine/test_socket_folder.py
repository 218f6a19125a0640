"""An engine's socket gets a folder wherever one can be had, and none stays behind."""

import fcntl
import os
import stat
import time
from pathlib import Path

import pytest
from bitwatt.engine.environment import runtime_folders
from bitwatt.engine.socket_folder import socket_folder


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_the_folder_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with socket_folder([tmp_path]) as folder:
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "engine").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_parent_too_long_for_a_socket_or_gone_is_passed_over(tmp_path: Path) -> None:
    """A TMPDIR of 134 characters once stopped the server without a reason."""
    long = tmp_path / ("x" * 134)
    long.mkdir()
    with socket_folder([long, tmp_path / "gone", tmp_path]) as folder:
        assert folder.parent == tmp_path


def test_where_no_parent_will_do_each_is_named_with_its_reason(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 134)
    with (
        pytest.raises(OSError, match=r"x is too long a path.*gone: No such file.*TMPDIR"),
        socket_folder([long, Path("/gone")]),
    ):
        pass


def test_folders_left_by_a_process_that_was_killed_are_removed(tmp_path: Path) -> None:
    stale, young, locked = (tmp_path / f"bitwatt-engine-{i}" for i in range(3))
    other = tmp_path / "engine"
    for folder in (stale, young, locked, other):
        folder.mkdir()
        (folder / "engine").touch()
        if folder is not young:
            age(folder, 3600)
    lock = os.open(locked, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket_folder([tmp_path]):
            assert not stale.exists()
            assert young.exists()
            assert locked.exists()
            assert other.exists()
    finally:
        os.close(lock)


def test_the_user_s_choice_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/chosen")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert runtime_folders()[:2] == [Path("/chosen"), Path("/tmp")]
