"""The cells of a study: trained side by side, measured, written; by several ranks if there are."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saezoo import checkpoint, files, reproduction
from saezoo import results as forms
from saezoo.ablation.effects import Row
from saezoo.ablation.grid import Cell
from saezoo.ablation.report import write_study_report
from saezoo.ablation.study import (
    DIVERGED,
    SEEDS,
    Study,
    alone_in,
    check_disk,
    check_folder,
    failures,
    holds_nothing,
    incomplete,
    is_complete,
    measured,
    plan_study,
)
from saezoo.errors import DivergedError, TrainingError
from saezoo.lm import LanguageModel
from saezoo.overlay import overlay
from saezoo.ranks import Ranks, join, leave, may_be_restarted
from saezoo.reproduction import Means
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.spreadsheets import inert
from saezoo.trainers.train import Hooks, Progress, Variant, train
from saezoo.workflows import EVAL_TOKENS, Options

_ALONE = Ranks()
_POLL = 1.0
"""Seconds between two looks at whether the other ranks have finished."""


@dataclass(frozen=True)
class Seen:
    """Where a study is; of this rank's streams only."""

    stream: int
    """1 for the first."""
    streams: int
    cells: int
    """That are trained side by side in this stream."""
    progress: Progress

    @property
    def done(self) -> int:
        """Tokens of all streams."""
        return (self.stream - 1) * self.progress.total + min(self.progress.done, self.progress.total)

    @property
    def total(self) -> int:
        return self.streams * self.progress.total


def ablate(
    name: str,
    layers: str | int = "all",
    *,
    vary: Sequence[str],
    out: Path,
    seeds: int = SEEDS,
    tokens: int | None = None,
    recipe: str | None = None,
    resume: bool = False,
    eval_tokens: int = EVAL_TOKENS,
    on_step: Callable[[Seen], None] = lambda seen: None,
    means: Means | None = None,
    options: Options | None = None,
) -> tuple[Study, list[Row]]:
    """Train every combination of the levels of `vary`, with `seeds` seeds of each, and measure all of them.

    Args:
        name, layers: which entries; every cell trains all of them.
        vary: factors and levels, `ghost=off,fixed`; `saezoo.ablation.grid.FACTORS` has those that there are. The first
            level is what the others are compared with.
        out: folder of the study; must be empty unless `resume`.
        tokens, recipe, eval_tokens, means, options: as for `reproduce`.
        resume: go on; cells that are complete are not run again. Under `torchrun --max-restarts`, where the same
            command starts the study and goes on with it, also start if there is nothing to go on with.
        on_step: called after each step, on rank 0.

    `out` then holds results.csv, variants.csv, effects.csv, report.md and its pictures (docs/ablation.md).

    Under torchrun the streams are divided among the ranks, which need one file system; rank 0 gets the rows, when all
    cells are complete, the others get none.
    Raises UsageError for a factor or level that is none, and for too little disk; TrainingError for a folder of another
    study or one in which another process is at work, if stopped by a signal (after a checkpoint), and if every cell has
    diverged. A cell that diverges is left out, and those beside it are trained again without it.
    """
    means, options = means or Means(), options or Options()
    chosen: dict[str, Any] = {"seeds": seeds, "tokens": tokens, "recipe": recipe, "eval_tokens": eval_tokens}
    study = plan_study(name, layers, vary=vary, means=means, options=options, **chosen)
    with _place(study, out, resume, options) as (ranks, options):
        mine = [g for g in study.streams(ranks.size)[ranks.rank :: ranks.size] if incomplete(out, g)]
        if mine:
            lm = reproduction.language_model(study.job, means, options)
            rows = reproduction.unseen_rows(study.job, lm, eval_tokens)
            for number, group in enumerate(mine, 1):
                while cells := _left(out, group):  # again without one that diverged
                    seen = _watch(on_step if ranks.rank == 0 else _ignore, number, len(mine), len(cells))
                    _run(study, cells, lm, rows, out, seen, options)
        if ranks.rank > 0:
            return study, []
        while incomplete(out, study.cells):
            time.sleep(_POLL)  # torchrun ends this rank too when another fails
        shutil.rmtree(out / "streams", ignore_errors=True)
        results = measured(study, out)
        if not results:
            raise TrainingError(f"every cell has diverged; {failures(study, out)[0][1]}")
        write_study_report(study, results, out)
        return study, results


@contextmanager
def _place(study: Study, out: Path, resume: bool, options: Options) -> Iterator[tuple[Ranks, Options]]:
    """This process's place under torchrun, and its options; rank 0 has checked the folder, and has it to itself."""
    ranks, device = join(options.device, "entries")
    note = options.note if ranks.rank == 0 else lambda message: None
    with contextlib.ExitStack() as held:
        try:
            if ranks.rank == 0:
                check_disk(study, out, ranks.size)
                check_folder(out, study, resume and not (may_be_restarted() and holds_nothing(out)))
                held.enter_context(alone_in(out))
            ranks.wait()  # until the folder is there
            ranks.check_same(study.facts())
        finally:
            leave()  # from here on each works on its own
        yield ranks, dataclasses.replace(options, device=device, note=note)


def _left(out: Path, cells: list[Cell]) -> list[Cell]:
    """Those to train: what is not complete, or all of them where a checkpoint of all of them is there to go on from."""
    left = incomplete(out, cells)
    return cells if left and checkpoint.newest(_folder_of(out, cells)) else left


def _folder_of(out: Path, cells: list[Cell]) -> Path:
    """Of cells that are being trained side by side."""
    return out / "streams" / f"{cells[0].name}+{len(cells) - 1}"


def _ignore(seen: Seen) -> None:
    """One of several ranks shows enough."""


def _watch(on_step: Callable[[Seen], None], stream: int, streams: int, cells: int) -> Callable[[Progress], None]:
    return lambda progress: on_step(Seen(stream, streams, cells, progress))


def _run(
    study: Study,
    cells: list[Cell],
    lm: LanguageModel,
    rows: tuple[str, Any],
    out: Path,
    on_step: Callable[[Progress], None],
    options: Options,
) -> None:
    """Train the cells of a stream side by side, measure them together, and write a folder for each. If one diverges
    it is written down, and that is all."""
    folder = _folder_of(out, cells)
    folder.mkdir(parents=True, exist_ok=True)
    begin, first = time.monotonic(), cells[0]
    variants = tuple(Variant(cell.variant, cell.recipe, cell.d_sae) for cell in cells)
    job = dataclasses.replace(study.job, recipe=first.recipe, seed=first.seed, variants=variants)
    hooks = Hooks(on_step=on_step, note=options.note)
    try:
        trainees = train(job, lm, folder, resume=checkpoint.newest(folder) > 0, ranks=_ALONE, hooks=hooks)
    except DivergedError as error:
        [cell] = [cell for cell in cells if cell.variant == error.name.partition(":")[0]]
        options.note(f"{error}; the other cells begin again without it")
        _write_diverged(out / "cells" / cell.name, study, cell, error, folder / "log.csv")
        shutil.rmtree(folder)
        return
    took = time.monotonic() - begin
    entries = [entry for cell in cells for entry in study.entries_of(cell)]
    saes = [reproduction.trained(entry, trainee) for entry, trainee in zip(entries, trainees, strict=True)]
    results = reproduction.measure(saes, entries, job, lm, *rows, None, options)
    each = len(study.job.entries)
    for i, cell in enumerate(cells):
        if not is_complete(out, cell):
            part = slice(i * each, (i + 1) * each)
            facts = {"trained beside": f"{len(cells) - 1} other cells", "seconds for all": round(took, 1)}
            _write_cell(out / "cells" / cell.name, study, cell, saes[part], results[part], facts, folder / "log.csv")
    shutil.rmtree(folder)


def _write_cell(
    folder: Path,
    study: Study,
    cell: Cell,
    saes: list[SAE],
    results: list[Result],
    facts: dict[str, Any],
    log: Path,
) -> None:
    """A run folder as `reproduce` leaves it, but for the report; complete or not there. `log`: of the stream."""
    own = study.job_of(cell)
    run = {"variant": cell.variant, "recipe": study.recipe, "versions": results[0].versions, **own.facts(), **facts}
    with files.replacing_folder(folder) as temporary:
        reproduction.save(saes, temporary)
        forms.write_text(temporary / "log.csv", _own_rows(log, cell.variant))
        forms.write_text(temporary / "eval.csv", forms.to_csv(results))
        forms.write_text(temporary / "registry.yaml", overlay(own, study.recipe, results))
        forms.write_text(temporary / "run.json", json.dumps(run, indent=2) + "\n")


def _write_diverged(folder: Path, study: Study, cell: Cell, error: DivergedError, log: Path) -> None:
    """What there is of a cell that cannot be trained to its end."""
    run = {"variant": cell.variant, "recipe": study.recipe, **study.job_of(cell).facts(), DIVERGED: str(error)}
    with files.replacing_folder(folder) as temporary:
        forms.write_text(temporary / "log.csv", _own_rows(log, cell.variant))
        forms.write_text(temporary / "run.json", json.dumps(run, indent=2) + "\n")


def _own_rows(log: Path, variant: str) -> str:
    """Of a stream's log.csv, in which a layer is called VARIANT:LAYER, the rows of one cell."""
    with log.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    place, written = header.index("layer"), io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        theirs, _, layer = line[place].partition(":")
        if theirs == variant:
            writer.writerow([*line[:place], inert(layer), *line[place + 1 :]])
    return written.getvalue()
