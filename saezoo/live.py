"""What a training run shows on stderr: a picture that is redrawn in place, or plain lines where nobody looks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from saezoo.results import sparkline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class LayerStatus:
    """One SAE as of its last step."""

    name: str
    loss: float
    """mse + l1 + ghost, in the units of the recipe's objective."""
    mse: float
    l1: float
    ghost: float
    l0: float
    """Features that fire on a token, mean over the batch."""
    explained_variance: float
    """Of the batch, uncentred."""
    dead: int
    """Features that have not fired for more than the recipe's `dead_after_steps`."""
    histogram: tuple[int, ...]
    """Features by log10 of their frequency, in bins of equal width from 1e-6 to 1; empty if not known yet."""


@dataclass(frozen=True)
class TrainingStatus:
    """A training run at one moment."""

    done: int
    """Tokens trained on."""
    total: int
    """Tokens to train on."""
    tokens_per_second: float
    peak_fraction: float | None
    """Share of the machine's measured matrix-product speed that is used; None if that was not measured."""
    checkpoint: str | None
    """A few words about the last checkpoint."""
    layers: tuple[LayerStatus, ...]


class TrainingView:
    """Shows `TrainingStatus` on stderr, from the first call on: a picture on a terminal, else a line now and then.

    A context manager: on leaving, also by Ctrl-C, the last picture stays and the terminal is as it was.
    """

    def __init__(self, console: Console | None = None, *, every: float = 10.0) -> None:
        """`console` is made for stderr by default; `every` is the number of seconds between plain lines."""
        self._console = console or _stderr_console()
        self._every = every
        self._next_line: float | None = None
        self._live: Live | None = None
        self._width = 0

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, status: TrainingStatus) -> None:
        """Show `status`; meant to be called a few times per second at most. The last one ends the picture."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._draw(status)
        else:
            self._line(status)
        if status.done >= status.total:
            self._stop()

    def note(self, message: str) -> None:
        """Print one line of talk on stderr, above the picture."""
        from rich.text import Text

        # Without a picture the terminal may wrap as it likes: a path stays in one piece.
        self._console.print(Text(message), soft_wrap=self._live is None)

    def _draw(self, status: TrainingStatus) -> None:
        from rich.live import Live

        width = self._console.width
        if self._live is None:
            # No thread redraws it, so nothing is drawn while a step's numbers are half read.
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        elif width < self._width:
            self._console.clear()  # the terminal has wrapped the old picture, so nobody knows its height
        self._width = width
        self._live.update(_picture(status, self._console), refresh=True)

    def _line(self, status: TrainingStatus) -> None:
        now = time.monotonic()
        if self._next_line is None:
            self._next_line = now + self._every
        if now >= self._next_line:
            self._next_line = now + self._every
            self.note(_plain(status))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _stderr_console() -> Console:
    from rich.console import Console

    # rich alone would also take FORCE_COLOR for a terminal, and move a cursor in a log file.
    return Console(stderr=True, force_terminal=sys.stderr.isatty(), markup=False, emoji=False, highlight=False)


def _plain(status: TrainingStatus) -> str:
    first = status.layers[0]
    return (
        f"training {_percent(status)}, {_pace(status)}, layer {first.name}: loss {_short(first.loss)}"
        f" mse {_short(first.mse)} l1 {_short(first.l1)} L0 {first.l0:,.1f} dead {first.dead:,}"
    )


def _picture(status: TrainingStatus, console: Console) -> RenderableType:
    """Progress, pace, the last checkpoint, and one row per layer."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    progress = Table.grid(padding=(0, 1), expand=True)
    progress.add_column(no_wrap=True, overflow="crop")
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True, overflow="crop")
    progress.add_column(no_wrap=True, overflow="crop")
    bar = ProgressBar(total=status.total, completed=status.done)
    progress.add_row("training", bar, _percent(status), f"{status.done:,} of {status.total:,} tokens")
    pace = _pace(status)
    if status.peak_fraction is not None:
        pace += f", {status.peak_fraction:.0%} of the matrix-product peak"
    lines = [pace] if status.checkpoint is None else [pace, status.checkpoint]
    return Group(progress, *map(_cropped, lines), _layer_table(status.layers, console))


class _Column(NamedTuple):
    title: str
    width: int
    """Wide enough for any usual number, so that the columns stand still."""
    cell: Callable[[LayerStatus], str]


_BARS = 16
_COLUMNS = (
    _Column("loss", 8, lambda layer: _short(layer.loss)),
    _Column("mse", 8, lambda layer: _short(layer.mse)),
    _Column("l1", 8, lambda layer: _short(layer.l1)),
    _Column("ghost", 8, lambda layer: _short(layer.ghost)),
    _Column("L0", 7, lambda layer: f"{layer.l0:,.1f}"),
    _Column("EV", 7, lambda layer: f"{layer.explained_variance:.4f}"),
    _Column("dead", 6, lambda layer: f"{layer.dead:,}"),
    _Column("density (linear)", _BARS, lambda layer: sparkline(_merged(layer.histogram))),
)
_BY_IMPORTANCE = ("loss", "L0", "EV", "dead", "mse", "l1", "density (linear)", "ghost")


def _layer_table(layers: tuple[LayerStatus, ...], console: Console) -> Table:
    """As many columns as fit, the most important first."""
    from rich.table import Table

    room = console.width - max(len("layer"), *(len(layer.name) for layer in layers))
    titles = set()
    for column in sorted(_COLUMNS, key=lambda column: _BY_IMPORTANCE.index(column.title)):
        room -= column.width + 1
        if room >= 0:
            titles.add(column.title)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True, style="cyan")
    shown = [column for column in _COLUMNS if column.title in titles]
    for column in shown:
        is_density = column.width == _BARS
        title = f"{column.title}\n{_axis(layers)}" if is_density else column.title
        table.add_column(title, justify="left" if is_density else "right", min_width=column.width, no_wrap=True)
    for layer in layers:
        cells = [column.cell(layer) for column in shown]
        table.add_row(_cropped(layer.name), *(_ascii(cell) if console.options.ascii_only else cell for cell in cells))
    return table


def _merged(histogram: tuple[int, ...]) -> list[int]:
    """The histogram with as many neighbouring bins added up as it takes to fit the column."""
    size = max(1, math.ceil(len(histogram) / _BARS))
    return [sum(histogram[i : i + size]) for i in range(0, len(histogram), size)]


def _axis(layers: tuple[LayerStatus, ...]) -> str:
    """What the first and the last bar stand for, written above them."""
    bars = max(len(_merged(layer.histogram)) for layer in layers)
    return "1e-6" + "1".rjust(bars - 4) if bars > 5 else ""


def _ascii(bars: str) -> str:
    return bars.translate(str.maketrans("▁▂▃▄▅▆▇█", "_.:-=+*#"))


def _cropped(line: str) -> Text:
    from rich.text import Text

    return Text(line, no_wrap=True, overflow="crop")


def _percent(status: TrainingStatus) -> str:
    return f"{100 * status.done // status.total}%"  # rounded down: 100% only at the end


def _pace(status: TrainingStatus) -> str:
    speed = f"{status.tokens_per_second:,.0f} tokens/s"
    if status.tokens_per_second <= 0:
        return speed
    return f"{speed}, {duration((status.total - status.done) / status.tokens_per_second)} left"


def duration(seconds: float) -> str:
    """In the unit in which one plans."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def _short(value: float) -> str:
    """Three digits in at most eight characters, if positive."""
    return f"{value:.3g}"
