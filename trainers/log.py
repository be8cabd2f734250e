"""log.csv: what a run showed, one row per SAE at about every 1/500 of it; and the watch over its loss."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from saezoo import files
from saezoo.errors import DivergedError
from saezoo.ranks import Ranks
from saezoo.spreadsheets import inert_rows
from saezoo.trainers.trainee import StepLog, Trainee

_ROWS = 500
_EXPLODED = 1e3
"""Times the lowest loss so far. A judgement, not a measurement: wide, so that a spike which passes ends no run."""


@dataclass(frozen=True)
class Row:
    """One row of log.csv: one SAE as of one step."""

    tokens: int
    layer: str
    seconds: float
    """Since the process began or went on with the training, set-up left out."""
    loss: float
    mse: float
    l1: float
    ghost: float
    l0: float
    explained_variance_uncentred: float
    dead: int
    """Features that had not fired for more than `dead_after_steps` steps."""
    tokens_per_second: float
    """Since the row before."""


class Log:
    """Appends to log.csv in a folder, on rank 0, keeping what an interrupted run wrote up to its checkpoint."""

    def __init__(self, folder: Path, total: int, names: Sequence[str], done: int, ranks: Ranks) -> None:
        """`total`: tokens of the whole run; `done`: those of the checkpoint it goes on from, 0 for a new run."""
        self.path = folder / "log.csv"
        self._ranks = ranks
        self._names, self._total, self._interval = names, total, total / _ROWS
        self._last = self._last_row = done
        self._begin = self._then = time.monotonic()
        self._lowest = dict.fromkeys(names, math.inf)
        if ranks.rank == 0:
            self._keep(done)

    def _keep(self, done: int) -> None:
        rows: list[list[str]] = []
        if done and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                whole = (row for row in csv.reader(file) if len(row) == len(fields(Row)))  # the last may be cut off
                rows = [row for row in whole if row[0].isdigit() and int(row[0]) <= done]
        with files.replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[field.name for field in fields(Row)], *rows])

    def rows(self, done: int, steps: Sequence[StepLog], trainees: Sequence[Trainee]) -> list[Row]:
        """Write and return the rows of the step that ended at `done` tokens, of all ranks, if any are due.

        Raises DivergedError if a loss is not finite or has exploded.
        """
        due = done // self._interval > self._last // self._interval or self._last == 0 or done >= self._total
        self._last = done
        if not due:
            return []
        now = time.monotonic()
        seconds, speed = round(now - self._begin, 3), round((done - self._last_row) / max(now - self._then, 1e-9), 1)
        self._last_row, self._then = done, now
        settled = [t.settle().get(t.steps, step) for t, step in zip(trainees, steps, strict=True)]
        mine = [self._row(done, name, step, seconds, speed) for name, step in zip(self._names, settled, strict=True)]
        gathered = self._ranks.gather(mine)
        if gathered is None:
            return []
        rows = mine if self._ranks.shares_features else [row for part in gathered for row in part]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(inert_rows(asdict(row).values() for row in rows))
        except OSError as error:
            raise files.cannot_write(self.path, error) from None
        return rows

    def _row(self, done: int, name: str, step: StepLog, seconds: float, speed: float) -> Row:
        loss, mse, l1, ghost = (float(loss) for loss in step.losses)
        self._watch(name, loss, done)
        explained = float(step.explained_variance_uncentred)
        return Row(done, name, seconds, loss, mse, l1, ghost, float(step.l0), explained, int(step.dead), speed)

    def _watch(self, name: str, loss: float, done: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(name, f"the loss is {loss} at {done:,} tokens")
        lowest = self._lowest[name] = min(loss, self._lowest[name])
        if loss > _EXPLODED * lowest:
            raise DivergedError(name, f"the loss has exploded from {lowest:.4g} to {loss:.4g} at {done:,} tokens")
