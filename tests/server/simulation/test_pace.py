"""How fast the machine is, by what the same arithmetic takes on each of its processors."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from bitwatt.simulation.pace import RECORD, STEADY, PaceMeter, Paces, _Probe

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="no process can be tied to a processor here"
)


def test_a_pace_is_its_windows_and_the_outermost_beyond():
    paces = Paces(100.0, (1.0, 2.0, 4.0, 1.0))
    pace = paces.since(100.1)
    assert [pace(time_s) for time_s in (-5.0, 0.0, 0.15, 0.35, 0.55, 9.0)] == [1, 1, 2, 4, 1, 1]
    assert paces.mean(100.0, 100.8) == 2.0
    assert paces.mean(100.2, 100.6) == 3.0
    assert paces.mean(100.5, 100.5) == 4.0
    assert paces.median(100.0, 100.6) == 2.0
    assert paces.over(2.0) == Paces(100.0, (0.5, 1.0, 2.0, 0.5))
    assert STEADY.since(7.0)(1e9) == STEADY.mean(1.0, 2.0) == 1.0


@pytest.fixture
def with_probes():
    """Return what makes a meter that began at 100 s, whose probes have written these records."""
    with ExitStack() as stack:

        def make(*of_probes):
            meter = PaceMeter()
            meter._began_s = 100.0
            for records in of_probes:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(b"".join(RECORD.pack(*record) for record in records))
                file.flush()
                meter._probes.append(_Probe(file))
            return meter

        yield make


def test_a_window_is_the_median_of_its_samples_and_the_mean_of_the_processors(with_probes):
    meter = with_probes(
        [(100.05, 1.0), (100.1, 9.0), (100.15, 2.0), (100.45, 4.0)],
        [(100.1, 4.0), (100.3, 5.0), (100.7, 6.0)],
    )
    assert meter.paces() == Paces(100.0, (3.0, 3.5, 4.5, 5.0))
    _, second = meter._probes
    second.file.write(RECORD.pack(100.9, 8.0) + b"half")
    second.file.flush()
    assert meter.paces() == Paces(100.0, (3.0, 3.5, 4.5, 5.0, 6.0)), "half a record is left"
    second.file.truncate(4 * RECORD.size)
    second.file.seek(0, os.SEEK_END)
    second.file.write(RECORD.pack(100.95, 10.0))
    second.file.flush()
    assert meter.paces() == Paces(100.0, (3.0, 3.5, 4.5, 5.0, 6.5))


def test_a_machine_without_probes_is_steady(with_probes):
    assert with_probes().paces() == STEADY
    assert with_probes([], []).paces() == STEADY


def children():
    """Return the probes that this process has started."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    processes = [pid for task in tasks for pid in task.read_text().split()]
    told = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes}
    return [pid for pid, command in told.items() if b"processor_probe" in command]


@needs_affinity
def test_a_probe_runs_on_each_processor_and_ends_with_the_meter():
    cpus = os.sched_getaffinity(0)
    with PaceMeter() as meter:
        while meter.paces() == STEADY or not all(probe.samples for probe in meter._probes):
            time.sleep(0.05)
        probes = children()
        assert all(os.getpgid(pid) == pid for pid in probes), "Ctrl-C would reach it"
        tied = sorted(min(os.sched_getaffinity(pid)) for pid in probes)
        paces = meter.paces()
    assert tied == sorted(cpus)
    assert all(0 < seconds < 1 for seconds in paces.values)
    assert not children()


@pytest.mark.parametrize(("number", "cpus"), [(1, 1), (8, 8), (9, 5), (16, 8), (128, 8)])
def test_a_large_machine_has_eight_probes_spread_over_its_processors(number, cpus, monkeypatch):
    started = []

    class Process:
        def __init__(self, command, **_):
            started.append(int(command[-2]))

        def terminate(self):
            pass

        wait = terminate

    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(number)), raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    with PaceMeter():
        assert len(started) == cpus
        assert started[-1] >= number * (1 - 1 / cpus)


@needs_affinity
def test_a_probe_ends_when_what_started_it_is_gone():
    """Even of one that is gone before the probe has begun."""
    code = """if True:
        import os
        from bitwatt.simulation.pace import PaceMeter
        with PaceMeter():
            print(*open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split())
            os.kill(os.getpid(), 9)
    """
    with tempfile.TemporaryFile("w+") as told:
        run = subprocess.run([sys.executable, "-uc", code], stdout=told, check=False)
        told.seek(0)
        probes = list(map(int, told.read().split()))
    assert run.returncode == -signal.SIGKILL
    assert len(probes) == len(os.sched_getaffinity(0))
    ends_s = time.monotonic() + 20
    while any(is_running(pid) for pid in probes):
        assert time.monotonic() < ends_s
        time.sleep(0.05)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
