"""Several downloads at once: the threads, how they are stopped, and what they show on stderr.

On a terminal a bar for each file and one for all, elsewhere a line every ten seconds. Nothing is shown before the first
byte arrives.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

THREADS = 4
"""Files that are downloaded at the same time."""
_EVERY = 10.0
"""Seconds between plain lines."""
_T = TypeVar("_T")


class Stopped(Exception):
    """The user pressed Ctrl-C, so the other downloads end too."""


class Transfers:
    """Bytes of each file and of all; a context manager, which leaves the terminal as it was."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._files: dict[str, tuple[int, int | None]] = {}
        self._labels: dict[str, str] = {}
        self._before: dict[str, int] = {}
        """Bytes of each file that an earlier process had brought: no part of the speed."""
        self._started: float | None = None
        self._next_line = 0.0
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Transfers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    def run(self, jobs: Sequence[Callable[[], _T]]) -> list[_T]:
        """The results of all jobs, in their order, `THREADS` at a time.

        After a failure no new job begins and those under way finish, so that nothing is downloaded for nothing; then
        the failure of the first job is raised. After Ctrl-C they stop at the next bytes.
        """
        results: dict[int, _T] = {}
        failures: dict[int, BaseException] = {}
        waiting = iter(enumerate(jobs))

        def work() -> None:
            while not failures:
                with self._lock:
                    index, job = next(waiting, (-1, None))
                if job is None:
                    return
                try:
                    results[index] = job()
                except BaseException as error:
                    failures[index] = error

        # Daemons: a process that was told to stop does not wait for a server that is silent.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(THREADS, len(jobs)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop.set()
            raise
        if failures:
            raise failures[min(failures)]
        return [results[index] for index in range(len(jobs))]

    def check_stopped(self) -> None:
        """Raise Stopped after Ctrl-C."""
        if self._stop.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Pause, but for Ctrl-C."""
        self._stop.wait(seconds)

    def done(self, name: str) -> int:
        """Bytes of that file so far."""
        return self._files.get(name, (0, None))[0]

    def expect(self, name: str, before: int, total: int | None, *, label: str) -> None:
        """That file is to come, of so many bytes if that is known; `before` of them are here; `label` is its bar's."""
        with self._lock:
            self._labels[name] = label
            self._files[name] = (before, total)
            self._before.setdefault(name, before)

    def update(self, name: str, done: int, total: int | None) -> None:
        """So many bytes of that file are here."""
        with self._lock:
            self._files[name] = (done, total)
            if self._started is None:
                self._started = time.monotonic()
                self._next_line = self._started + _EVERY
            if sys.stderr.isatty():
                self._draw(name, done, total)
            elif time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + _EVERY
                self.note(self._line())

    def note(self, message: str) -> None:
        """One line of talk on stderr, above the bars."""
        with self._lock:
            if self._bars is None:
                click.echo(message, err=True)
            else:
                self._bars.console.print(message, soft_wrap=True, markup=False, highlight=False)

    def _draw(self, name: str, done: int, total: int | None) -> None:
        if self._bars is None:
            self._bars = _new_bars()
            self._tasks["all files"] = self._bars.add_task("all files", total=None)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(_short(self._labels.get(name, name)), total=total)
        self._bars.update(self._tasks[name], completed=done, total=total, visible=done != total)
        whole = sum(size or 0 for _, size in self._files.values())
        self._bars.update(self._tasks["all files"], completed=self._done(), total=whole)

    def _done(self) -> int:
        return sum(done for done, _ in self._files.values())

    def _line(self) -> str:
        assert self._started is not None
        done, whole = self._done(), sum(size or 0 for _, size in self._files.values())
        speed = (done - sum(self._before.values())) / max(time.monotonic() - self._started, 1e-3)
        finished = sum(here == size for here, size in self._files.values())
        left = max(whole - done, 0) / max(speed, 1e-9)
        return (
            f"downloading {size_words(done)} of {size_words(whole)}, {finished} of {len(self._files)} files,"
            f" {speed / 1e6:,.1f} MB/s, {left:,.0f} s left"
        )


def _new_bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, markup=False, emoji=False),
        transient=True,
        redirect_stdout=False,
    )


def _short(label: str, width: int = 48) -> str:
    """Both ends of a long path: which layer, and which file."""
    return label if len(label) <= width else f"{label[: width // 2]}…{label[1 - width // 2 :]}"


def size_words(size: int) -> str:
    """Bytes in the unit that one reads: 1,274 B, 151.0 MB, 2.4 GB."""
    if size < 10_000:
        return f"{size:,} B"
    for unit, factor in (("kB", 1e3), ("MB", 1e6)):
        if size < 1000 * factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e9:,.1f} GB"
