"""How far a comparison is, on a terminal and in a file."""

import io

from bitwatt_client.load import Window
from bitwatt_client.progress import Progress

WINDOW = Window(answers=(), failures=("500: no",), num_cut=0, wall_s=1.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_a_window():
    out = io.StringIO()
    progress = Progress(2, 4, out)
    progress.add("m", -1, WINDOW)
    progress.add("m", 0, WINDOW)
    assert out.getvalue() == "m, warm-up: no answer, 1 failed\nm, window 1: no answer, 1 failed\n"


def test_a_terminal_gets_a_bar_a_count_and_the_time_left():
    out, now_s = Terminal(), [0.0]
    with Progress(4, 4, out, clock=lambda: now_s[0]) as progress:
        progress.add("a", -1, WINDOW)
        assert out.getvalue().endswith("·" * 18 + " 1 of 4 windows")  # b may be slower
        progress.add("b", -1, WINDOW)
        now_s[0] = 150.0
        progress.add_request()
        progress.add_request()
        *_, shown = out.getvalue().split("\r")
        assert shown == "\x1b[K" + "█" * 15 + "·" * 9 + " 2 of 4 windows, 1 min 30 s left"
    assert out.getvalue().endswith("\r\x1b[K")
