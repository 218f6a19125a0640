"""Work beside an event loop, and a process that ends all the same."""

import asyncio
import subprocess
import sys
import threading

import pytest
from bitwatt.text.lanes import Lane

pytestmark = pytest.mark.anyio


async def test_work_is_done_in_threads_and_its_errors_are_the_callers():
    lane = Lane("lane", 2)
    assert await lane.run(lambda: threading.current_thread().name) in ("lane-0", "lane-1")
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 / 0)
    assert await asyncio.gather(*(lane.run(lambda i=i: i) for i in range(20))) == list(range(20))
    lane.close()


async def test_work_whose_caller_has_gone_is_passed_over():
    lane, gate, done = Lane("lane", 1), threading.Event(), []
    first = asyncio.create_task(lane.run(gate.wait))
    gone = asyncio.create_task(lane.run(lambda: done.append("gone")))
    last = asyncio.create_task(lane.run(lambda: done.append("last")))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, last)
    assert done == ["last"]
    lane.close()


async def test_a_caller_that_goes_while_its_work_runs_leaves_the_lane_as_it_was():
    lane, gate = Lane("lane", 1), threading.Event()
    task = asyncio.create_task(lane.run(gate.wait))
    await asyncio.sleep(0.05)
    task.cancel()
    gate.set()
    assert await lane.run(lambda: 5) == 5
    lane.close()


async def test_a_closed_lane_lets_its_threads_go_and_begins_anew_when_it_is_used():
    lane = Lane("closing", 2)
    assert await lane.run(lambda: 1) == 1
    threads = [t for t in threading.enumerate() if t.name.startswith("closing")]
    lane.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert await lane.run(lambda: 2) == 2
    lane.close()


def test_a_process_ends_though_a_thread_is_held_up():
    program = """
import asyncio, threading
from bitwatt.text.lanes import Lane

async def main():
    lane = Lane("lane", 1)
    task = asyncio.create_task(lane.run(threading.Event().wait))
    await asyncio.sleep(0.1)
    task.cancel()

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
