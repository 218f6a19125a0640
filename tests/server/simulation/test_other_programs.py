"""What others take of the processors is told apart from what this process and its children take."""

import os
import subprocess
import sys
import time

import pytest
from bitwatt.simulation.other_programs import OtherPrograms

_WORK = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
_NOBODY = -1


def test_what_a_child_takes_is_not_others():
    all_but_ours, all_of_all = OtherPrograms(), OtherPrograms(root=_NOBODY)
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        others, everybody = all_but_ours.share(), all_of_all.share()
        took_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
        child.communicate(b"\n")
    if others is None or everybody is None:
        pytest.skip("this system doesn't tell what its processors did")
    assert 0 <= others <= everybody - 0.15 / took_s
    assert everybody <= 1
