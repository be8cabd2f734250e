"""The picture of a running training, read off real pseudo-terminals, and the plain lines in a pipe."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from saezoo.live import LayerStatus, TrainingStatus, TrainingView

LAYER = LayerStatus("0", 0.0123, 0.0098, 0.0025, 1.2e-5, 11.3, 0.9876, 3, (0, 0, 1, 0, 2, 2, 49, 532, 407, 27, 0, 0))
CHECKPOINT = "last checkpoint 2 min ago, 1.2 GB in 0.8 s"

SCREEN_80 = """\
filling the shuffle buffer
training ━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 12% 960,000 of 8,000,000 tokens
20,134 tokens/s, 6 min left, 41% of the matrix-product peak
last checkpoint 2 min ago, 1.2 GB in 0.8 s
                                                          density (linear)
  layer     loss      mse       l1      L0      EV   dead 1e-6       1
      0   0.0123   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      1    0.024   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      2   0.0357   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      3   0.0474   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      4   0.0591   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      5   0.0708   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      6   0.0825   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      7   0.0942   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      8    0.106   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
      9    0.118   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
     10    0.129   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
     11    0.141   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁
11-post    0.153   0.0098   0.0025    11.3  0.9876      3   ▁ ▁▁▁█▇▁"""

SCREEN_120 = """\
filling the shuffle buffer
training ━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 12% 960,000 of 8,000,000 tokens
20,134 tokens/s, 6 min left, 41% of the matrix-product peak
last checkpoint 2 min ago, 1.2 GB in 0.8 s
                                                                 density (linear)
layer     loss      mse       l1    ghost      L0      EV   dead 1e-6       1
    0   0.0123   0.0098   0.0025  1.2e-05    11.3  0.9876      3   ▁ ▁▁▁█▇▁
    1    0.024   0.0098   0.0025  1.2e-05    11.3  0.9876      3   ▁ ▁▁▁█▇▁"""

SCREEN_ASCII = """\
filling the shuffle buffer
training - ------------- 12% 960,000 of 8,000,000 tokens
20,134 tokens/s, 6 min left, 41% of the matrix-product p
last checkpoint 2 min ago, 1.2 GB in 0.8 s
layer     loss      mse       l1      L0      EV   dead
    0   0.0123   0.0098   0.0025    11.3  0.9876      3"""

PROGRAM = """
import signal
import sys
from test_live import status
from saezoo.live import TrainingView
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
with TrainingView() as view:
    view.note("filling the shuffle buffer")
    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "view":
            view(status(int(rest[0]), layers=int(rest[1])))
        elif word == "note":
            view.note(" ".join(rest))
        elif word == "stray":
            print(" ".join(rest), file=sys.stderr)
        print("done", flush=True)
"""


def status(done: int = 960_000, *, layers: int = 1, speed: float = 20_134.2, **changes: Any) -> TrainingStatus:
    names = [*map(str, range(12)), "11-post"]
    rows = [dataclasses.replace(LAYER, name=names[i], loss=0.0123 + i * 0.0117, **changes) for i in range(layers)]
    return TrainingStatus(done, 8_000_000, speed, 0.414, CHECKPOINT, tuple(rows))


class Terminal:
    """A process with a `TrainingView` on a pseudo-terminal, and a terminal's idea of what it wrote."""

    def __init__(self, columns: int, lines: int = 24, **environment: str) -> None:
        pyte = pytest.importorskip("pyte", reason="pyte is missing")
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines)
        unset = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONIOENCODING", "TTY_COMPATIBLE"}
        clean = {key: value for key, value in os.environ.items() if key not in unset}
        clean |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
        command = [sys.executable, "-c", PROGRAM]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": theirs}
        self.process = subprocess.Popen(command, env=clean | environment, text=True, bufsize=1, **pipes)
        os.close(theirs)
        self.written = b""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def send(self, command: str) -> str:
        """Have a command done; returns the screen, without what is blank at its ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        assert self.process.stdout.readline() == "done\n"
        return self.shown()

    def shown(self) -> str:
        """The screen, after everything written so far."""
        try:
            while select.select([self._ours], [], [], 0.2)[0]:
                written = os.read(self._ours, 65_536)
                self.written += written
                self._stream.feed(written)
        except OSError:  # the process is gone, and with it the other end
            pass
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def end(self) -> str:
        """Close its stdin, wait, and return the screen."""
        self.process.communicate(timeout=60)
        return self.shown()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(columns: int = 80, lines: int = 24, **environment: str) -> Terminal:
        opened.append(Terminal(columns, lines, **environment))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("columns", "layers", "environment", "expected"),
    [
        (80, 13, {}, SCREEN_80),
        (120, 2, {}, SCREEN_120),
        (56, 1, {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, SCREEN_ASCII),
    ],
)
def test_every_line_of_the_screen(
    terminal: Callable[..., Terminal], columns: int, layers: int, environment: dict[str, str], expected: str
) -> None:
    there = terminal(columns, **environment)
    assert there.send(f"view 400000 {layers}") != expected
    assert there.send(f"view 960000 {layers}") == expected
    assert there.end() == expected, "the last picture stays"


def bars_in(picture: str) -> str:
    """The density bars of its one layer."""
    found = re.search(r" 0\.9876      3 ?(.*)$", picture, re.MULTILINE)
    assert found
    return found[1].rstrip()


def test_bars_without_utf_8() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, force_terminal=True, color_system=None, legacy_windows=False, _environ={})
    with TrainingView(console) as view:
        view(status())
    file.seek(0)
    assert bars_in(file.read()) == "  _ ___#*_"


def test_notes_appear_above_the_picture(terminal: Callable[..., Terminal]) -> None:
    """Also what another library writes to stderr."""
    there = terminal()
    picture = there.send("view 960000 2").split("\n", 1)[1]
    there.send("note end of the text; epoch 2 begins")
    shown = there.send("stray a warning")
    assert shown == f"filling the shuffle buffer\nend of the text; epoch 2 begins\na warning\n{picture}"
    assert there.send("view 960000 2") == shown


def test_a_long_note_is_wrapped_above_the_picture(terminal: Callable[..., Terminal]) -> None:
    there = terminal()
    lines = there.send("view 960000 2").split("\n")
    assert there.send(f"note {'x' * 100}").split("\n") == [lines[0], "x" * 80, "x" * 20, *lines[1:]]


def test_the_terminal_changes_its_size(terminal: Callable[..., Terminal]) -> None:
    there = terminal()
    there.send("view 960000 13")
    there.resize(120, 30)
    assert there.send("view 960000 2").split("\n")[1:] == SCREEN_120.split("\n")[1:]
    there.resize(80, 24)
    assert there.send("view 960000 13") == SCREEN_80.split("\n", 1)[1]


def test_a_terminal_lower_than_the_picture(terminal: Callable[..., Terminal]) -> None:
    """What does not fit is left out, until the end."""
    there = terminal(lines=10)
    for done in (400_000, 800_000, 960_000):
        shown = there.send(f"view {done} 13").split("\n")
    assert shown[:-1] == SCREEN_80.split("\n")[1:10]
    assert shown[-1].strip() == "..."
    assert there.end().split("\n") == SCREEN_80.split("\n")[-9:]


@pytest.mark.parametrize("start", ["view 960000 2", "note nothing drawn yet"])
def test_ctrl_c_leaves_the_terminal_in_order(terminal: Callable[..., Terminal], start: str) -> None:
    there = terminal()
    before = there.send(start)
    assert there.screen.cursor.hidden == start.startswith("view")
    there.process.send_signal(signal.SIGINT)
    after = there.end()
    assert there.process.returncode == -signal.SIGINT
    assert after.startswith(f"{before}\nTraceback")
    assert not there.screen.cursor.hidden


def test_the_last_status_ends_the_picture(terminal: Callable[..., Terminal]) -> None:
    there = terminal()
    picture = there.send("view 8000000 2")
    assert "100% 8,000,000 of 8,000,000 tokens\n20,134 tokens/s, 0 s left" in picture
    assert not there.screen.cursor.hidden
    assert there.send("note evaluating") == f"{picture}\nevaluating"


def test_no_colour_if_unwanted(terminal: Callable[..., Terminal]) -> None:
    there = terminal(NO_COLOR="1")
    there.send("view 960000 2")
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", there.written)
    assert there.written.count(b"\x1b[1m") > 0


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {}])
def test_a_pipe_gets_no_escape_codes(environment: dict[str, str]) -> None:
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    commands = f"view 960000 2\nnote {'x' * 100}\nview 8000000 2\n"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=settings, input=commands, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"filling the shuffle buffer\n{'x' * 100}\n")


def lines_of(*statuses: TrainingStatus, every: float = 0, **settings: Any) -> list[str]:
    """What a view writes where no terminal is."""
    file = io.StringIO()
    with TrainingView(Console(file=file, **settings), every=every) as view:
        for each in statuses:
            view(each)
    return file.getvalue().splitlines()


def test_plain_lines() -> None:
    line = "20,134 tokens/s, 6 min left, layer 0: loss 0.0123 mse 0.0098 l1 0.0025 L0 11.3 dead 3"
    assert lines_of(status(), status(8_000_000 - 1, layers=2, speed=0.0)) == [
        f"training 12%, {line}",
        "training 99%, 0 tokens/s, layer 0: loss 0.0123 mse 0.0098 l1 0.0025 L0 11.3 dead 3",
    ]
    assert lines_of(status(), status(), every=10) == []


def test_a_dumb_terminal_gets_plain_lines() -> None:
    (line,) = lines_of(status(), force_terminal=True, _environ={"TERM": "dumb"})
    assert line.startswith("training 12%, 20,134 tokens/s")


@pytest.mark.parametrize(
    ("speed", "left"),
    [(1e7, "1 s"), (80_000, "88 s"), (7e4, "2 min"), (2e3, "59 min"), (1e3, "1 h 57 min"), (1.0, "81.5 days")],
)
def test_the_time_left(speed: float, left: str) -> None:
    assert f", {left} left," in lines_of(status(speed=speed))[0]


@pytest.mark.parametrize(("bins", "bars"), [(0, ""), (12, "█" * 12), (24, "█" * 12), (60, "█" * 15), (1, "█")])
def test_any_number_of_bins(bins: int, bars: str) -> None:
    shown = lines_of(status(histogram=(9,) * bins), width=80, height=24, force_terminal=True, color_system=None)
    assert bars_in("\n".join(shown)) == bars
