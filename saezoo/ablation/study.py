"""A study: what is varied, in which folder, how much disk that takes, and what its complete cells give.

The folder:

    study.json               what is varied, and everything that the cells depend on
    cells/CELL/              a run folder for each cell, as `reproduce` leaves it; complete as soon as it is there
    streams/CELL+N/          checkpoints of the cells that are being trained side by side: CELL and N more
    results.csv, variants.csv, effects.csv, report.md and its pictures
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from saezoo import files, reproduction
from saezoo import results as forms
from saezoo.ablation.effects import Row
from saezoo.ablation.grid import Cell, cells_of, read_factors
from saezoo.entries import Entry
from saezoo.errors import TrainingError, UsageError
from saezoo.reproduction import Means
from saezoo.spreadsheets import original
from saezoo.trainers.plan import weights
from saezoo.trainers.train import Job
from saezoo.transfers import size_words
from saezoo.workflows import EVAL_TOKENS, Options

FORMAT = 1
DIVERGED = "diverged"
"""Key in run.json of a cell whose training came to nothing: why."""
SEEDS = 3
_AT_ONCE, _STATE_AT_ONCE = 48, 20_000_000_000
"""How many SAEs are trained side by side at most, and bytes of their weights and moments. With so many the language
model's forward no longer counts."""
_PER_SAE = 120_000
"""Bytes besides the weights, at most: log.csv (500 rows of up to 200 bytes), eval.csv, configuration."""
_ROOM = 1.02
"""Of the disk: file systems need some for themselves."""
METRICS = {
    "ce_delta": "ΔCE",
    "explained_variance": "expl. var.",
    "mse": "MSE",
    "l0": "L0",
    "alive_fraction": "alive",
    "dead": "never fired",
    "dead_at_end": "dead at end",
    "dense_100": ">1/100",
    "dense_10": ">1/10",
    "gm_distance_b_dec": "b_dec to median",
    "mean_distance_b_dec": "b_dec to mean",
}
"""What a study compares, and how it is called in tables. Those of docs/metrics.md, on text that training does not read,
and `dead_at_end`: features that had not fired for more than `dead_after_steps` when training ended (log.csv)."""


@dataclass(frozen=True)
class Study:
    """What is to be trained."""

    job: Job
    recipe: str
    factors: dict[str, list[str]]
    cells: list[Cell]
    eval_tokens: int

    def streams(self, ranks: int = 1) -> list[list[Cell]]:
        """The cells that are trained side by side: as many as can be, but at least one group for each rank."""
        state = 12 * max(weights(self.entries_of(cell)) for cell in self.cells)
        most = min(_AT_ONCE // len(self.job.entries), _STATE_AT_ONCE // state, math.ceil(len(self.cells) / ranks))
        groups: dict[tuple[int, str], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.stream, []).append(cell)
        found = []
        for group in groups.values():
            parts = math.ceil(len(group) / max(1, most))
            found += [group[len(group) * i // parts : len(group) * (i + 1) // parts] for i in range(parts)]
        return found

    @property
    def seeds(self) -> int:
        """How many."""
        return len({cell.seed for cell in self.cells})

    def entries_of(self, cell: Cell) -> list[Entry]:
        """The SAEs of one cell; nothing is published about them."""
        return [dataclasses.replace(entry, d_sae=cell.d_sae or entry.d_sae, published={}) for entry in self.job.entries]

    def job_of(self, cell: Cell) -> Job:
        """By which `reproduce` would train this cell alone."""
        entries = tuple(self.entries_of(cell))
        return dataclasses.replace(self.job, entries=entries, recipe=cell.recipe, seed=cell.seed)

    def facts(self) -> dict[str, Any]:
        """What makes one study another than the next, as plain values."""
        facts = {key: value for key, value in self.job.facts().items() if key != "seed"}
        return {
            "format": FORMAT,
            "factors": self.factors,
            "seeds": self.seeds,
            "eval_tokens": self.eval_tokens,
            **({"first_seed": self.job.seed} if self.job.seed else {}),
            **facts,
        }


def plan_study(
    name: str,
    layers: str | int,
    *,
    vary: Sequence[str],
    seeds: int = SEEDS,
    tokens: int | None = None,
    recipe: str | None = None,
    eval_tokens: int = EVAL_TOKENS,
    means: Means | None = None,
    options: Options | None = None,
) -> Study:
    """What `ablate` with the same arguments would train."""
    job, recipe_name = reproduction.job_of(name, layers, tokens, recipe, means or Means(), options or Options())
    factors = read_factors(vary)
    return Study(
        job,
        recipe_name,
        factors,
        cells_of(job.recipe, factors, range(job.seed, job.seed + seeds), job.tokens),
        eval_tokens,
    )


def check_folder(out: Path, study: Study, resume: bool) -> None:
    """Refuse a folder with other things in it, and one of another study; begin a new one."""
    known, facts = out / "study.json", json.loads(json.dumps(study.facts()))
    if not resume:
        if not holds_nothing(out):
            raise UsageError(f"{out} is not empty; choose another --out, or --resume the study in it")
        files.check_folder(out)
        forms.write_text(known, json.dumps(facts, indent=2) + "\n")
        return
    if not known.is_file():
        raise TrainingError(f"nothing to resume: {out} holds no study")
    try:
        theirs = dict(json.loads(known.read_text(encoding="utf-8")))
    except ValueError:
        raise TrainingError(f"{known} is damaged; choose another --out") from None
    for key in (*facts, *theirs):
        if facts.get(key) != theirs.get(key):
            raise TrainingError(
                f"{out} is another study: its {key} is {theirs.get(key)}, now {facts.get(key)}; choose another --out"
            )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Have the study's folder to oneself, and clear away the half-written cells of a process that was killed; for as
    long as this process lives. TrainingError if another one has it: two would cut each other's logs."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(out / ".lock", timeout=0))
        except filelock.Timeout:
            raise TrainingError(f"another process is at work in {out}; wait for it, or choose another --out") from None
        except (OSError, NotImplementedError):
            pass  # a file system without locks
        for half in out.glob("cells/.*"):
            shutil.rmtree(half, ignore_errors=True)
        yield


def holds_nothing(out: Path) -> bool:
    """Whether the folder is not there or empty."""
    return not out.is_dir() or not any(out.glob("[!.]*"))


def is_complete(out: Path, cell: Cell) -> bool:
    """run.json is in a cell's folder from the beginning: the folder itself appears when everything is in it."""
    return (out / "cells" / cell.name / "run.json").is_file()


def incomplete(out: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those of `cells` that are not complete in `out`."""
    return [cell for cell in cells if not is_complete(out, cell)]


def disk_of(study: Study, out: Path, ranks: int = 1) -> int:
    """Bytes that the cells that are left will need in `out`, with two checkpoints of what each rank trains."""
    left = incomplete(out, study.cells)
    if not left:
        return 0
    saved = sum(4 * weights(study.entries_of(cell)) + _PER_SAE * len(study.job.entries) for cell in left)
    entries = study.job.entries
    buffer = study.job.recipe.buffer_batches // 2 * study.job.recipe.store_rows * entries[0].known_context
    half_buffer = 4 * buffer * entries[0].d_in * len(entries)
    states = [12 * sum(weights(study.entries_of(cell)) for cell in cells) for cells in study.streams(ranks)]
    return saved + 2 * sum(state + half_buffer for state in sorted(states)[-ranks:])


def check_disk(study: Study, out: Path, ranks: int = 1) -> None:
    """Raise UsageError unless what is left of the study fits on the disk of `out`."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    need, free = disk_of(study, out, ranks), shutil.disk_usage(there).free
    if need * _ROOM > free:
        raise UsageError(
            f"{len(study.cells):,} cells need {size_words(need)} on the disk, {size_words(free)} are free at {there};"
            " fewer factors, levels, seeds or layers, or another --out"
        )


def failures(study: Study, out: Path) -> list[tuple[Cell, str]]:
    """The cells that have diverged, and how."""
    found = []
    for cell in study.cells:
        if is_complete(out, cell):
            run = json.loads((out / "cells" / cell.name / "run.json").read_text(encoding="utf-8"))
            found += [(cell, run[DIVERGED])] if DIVERGED in run else []
    return found


def measured(study: Study, out: Path) -> list[Row]:
    """What the complete cells in the folder of a study give; every SAE of every cell that has not diverged."""
    found = []
    for cell in study.cells:
        folder = out / "cells" / cell.name
        if not (folder / "eval.csv").is_file():
            continue
        ends = {line["layer"]: line for line in lines_of(out, cell, "log.csv")}
        for line in lines_of(out, cell, "eval.csv"):
            values = {**line, "dead_at_end": ends[line["layer"]]["dead"]}
            known = {name: values[name] for name in METRICS if values.get(name, "") not in ("", forms.UNDEFINED)}
            metrics = {name: float(value) for name, value in known.items()}
            found.append(Row(cell, original(line["layer"]), metrics))
    return found


def lines_of(out: Path, cell: Cell, name: str) -> list[dict[str, str]]:
    """The rows of a CSV in the folder of a cell."""
    with (out / "cells" / cell.name / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
