"""What the terminal shows besides the data: progress on stderr, and tables printed so that they stay data.

Tables go to stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from saezoo.entries import Entry


def note(message: str) -> None:
    """One line of talk, on stderr."""
    click.echo(message, err=True)


class Progress:
    """Progress on stderr that appears with the first call: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, label: str, unit: str = "tokens") -> None:
        """`unit`: what is counted."""
        self._label, self._unit = label, unit
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        self._next_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, status: str = "") -> None:
        if not sys.stderr.isatty():
            self._line(done, total, status)
            return
        if self._bar is None:
            self._bar = _new_bar(self._unit)
            self._task = self._bar.add_task(self._label, total=total, status="")
            self._bar.start()
        self._bar.update(self._task, completed=done, status=status)
        if done >= total:
            self._bar.stop()

    def _line(self, done: int, total: int, status: str) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._next_line = (now, done), now + 10
        if now < self._next_line:
            return
        self._next_line = now + 10
        speed = (done - self._first[1]) / (now - self._first[0])
        left = (total - done) / max(speed, 1e-9)
        note(f"{self._label} {done / total:.0%}, {speed:,.0f} {self._unit}/s, {left:,.0f} s left  {status}".rstrip())


def _new_bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} {unit}/s")

    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"), Speed())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
        transient=True,
    )


def width() -> int:
    """Columns that a table on stdout may have: the terminal's, or 100 in a pipe or a file."""
    console = _stdout()
    return console.width if console.is_terminal else 100


def print_table(*tables: Any) -> None:
    """Print rich tables on stdout, `width()` columns wide at most; no colours or boldness where it is no terminal."""
    console = _stdout()
    console.width = width()
    for table in tables:
        console.print(table)
    sys.stdout.flush()


def _stdout() -> Any:
    from rich.console import Console

    # Names come from registry files and folders: none of their text is markup.
    return Console(markup=False, emoji=False, highlight=False)


def ranges(names: list[str]) -> str:
    """0, 1, 2, 11-post -> 0-2, 11-post; of more than three such pieces the first and the last."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name.isdigit() and runs[-1][-1].isdigit() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    pieces = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(pieces) if len(pieces) < 4 else f"{pieces[0]} … {pieces[-1]}"


def info_table(entry: Entry, sources: Mapping[str, str]) -> Any:
    """A rich table of what the registry knows about one SAE, and from where (`sources`: key -> words)."""
    from rich.table import Table

    table = Table(title=f"{entry.collection} {entry.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("what", entry.title)
    table.add_row("model", f"{entry.model_name} ({entry.model.repo or entry.model.folder})")
    table.add_row("hook", entry.hook)
    table.add_row("shape", f"d_in {entry.d_in}, d_sae {entry.d_sae}, {entry.dtype}")
    centred = "residual minus its mean over d_in" if entry.centre else "residual as it is"
    bos = "begin with BOS" if entry.prepend_bos else "no BOS"
    rows = "rows of unknown length" if entry.context_size is None else f"rows of {entry.context_size} tokens"
    table.add_row("input", f"{centred}; {rows}, {bos}")
    for name, layout in entry.layouts.items():
        where = f"{layout.repo}@{layout.revision}" if layout.repo else str(layout.folder)
        facts = layout.facts.get("weights")
        table.add_row(f"files: {name}", f"{where}\n{layout.weights}\nsha256 {(facts and facts.sha256) or 'unknown'}")
    table.add_row("licence", entry.licence or "unknown")
    if entry.neuronpedia:
        table.add_row("neuronpedia", f"https://www.neuronpedia.org/{entry.neuronpedia}")
    for name, value in entry.published.items():
        table.add_row(f"published: {name}", f"{value}   ({entry.definitions.definitions[name]})")
    table.add_row("published how", f"{entry.definitions.protocol} protocol; {entry.definitions.sample}")
    table.add_row(*_recipe_row(entry))
    for key, words in sources.items():
        table.add_row(f"source: {key}", words)
    table.add_row("from", entry.origin)
    return table


def _recipe_row(entry: Entry) -> tuple[str, str]:
    if entry.recipe is None:
        return "recipe", "unknown"
    values = {key: value for key, value in dataclasses.asdict(entry.recipe).items() if key != "source"}
    return f"recipe: {entry.recipe_name}", ", ".join(f"{key} {value}" for key, value in values.items())
