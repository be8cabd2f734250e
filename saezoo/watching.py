"""A run as the terminal shows it: the live view of a training, and the table of a plan."""

from __future__ import annotations

import time
from typing import Any

from saezoo.ablation.plan import StudyPlan
from saezoo.ablation.study import Study
from saezoo.live import LayerStatus, TrainingStatus, TrainingView, duration
from saezoo.reproduction import Seen
from saezoo.trainers.plan import Plan
from saezoo.trainers.train import Job, Progress
from saezoo.trainers.trainee import StepLog, Trainee
from saezoo.transfers import size_words

_EVERY = 0.5
"""Seconds between two pictures: reading the numbers makes a GPU wait."""
_BINS, _LOWEST = 24, -6
"""Of the density histogram: log10 frequency from -6 to 0."""


class Watch:
    """`on_step` of a run: shows it, twice a second."""

    def __init__(self) -> None:
        self._view = TrainingView()
        self._next = 0.0

    def __enter__(self) -> Watch:
        self._view.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._view.__exit__(*error)

    def note(self, message: str) -> None:
        """One line of talk that does not tear the picture."""
        self._view.note(message)

    def __call__(self, seen: Seen) -> None:
        progress = seen.progress
        if time.monotonic() < self._next and progress.done < progress.total:
            return
        self._next = time.monotonic() + _EVERY
        layers = zip(progress.names, progress.logs, progress.trainees, strict=True)
        self._view(
            TrainingStatus(
                done=min(progress.done, progress.total),  # the last step may overshoot
                total=progress.total,
                tokens_per_second=progress.trained / progress.seconds,
                peak_fraction=seen.peak_fraction,
                checkpoint=_checkpoint(progress),
                layers=tuple(_layer(*layer) for layer in layers),
            )
        )


def _checkpoint(progress: Progress) -> str | None:
    if progress.saved is None:
        return None
    size, seconds = progress.saved
    return f"last checkpoint {size / 1e6:,.0f} MB in {seconds:.1f} s; {progress.saving:.1%} of the time"


def _layer(name: str, log: StepLog, trainee: Trainee) -> LayerStatus:
    loss, mse, l1, ghost = (float(value) for value in log.losses)
    explained = float(log.explained_variance_uncentred)
    return LayerStatus(name, loss, mse, l1, ghost, float(log.l0), explained, int(log.dead), _histogram(trainee))


def _histogram(trainee: Trainee) -> tuple[int, ...]:
    """Of this sampling window so far, or of the last one while this one is young."""
    young = trainee.window_tokens < 100 * trainee.recipe.batch_size
    if young and trainee.log_sparsity_F is not None:
        log10_F = trainee.log_sparsity_F
    else:
        log10_F = (trainee.window_fires_F / max(1, trainee.window_tokens)).log10()
    shown_F = log10_F[log10_F >= _LOWEST].float().cpu()
    return tuple(int(count) for count in shown_F.histc(_BINS, _LOWEST, 0))


def plan_table(job: Job, plan: Plan) -> Any:
    """A rich table of what a run needs."""
    from rich.table import Table

    table = Table(title=f"{job.entries[0].collection} {', '.join(e.name for e in job.entries)}", show_header=False)
    speed = plan.flops / plan.seconds
    rows = {
        "tokens": f"{plan.tokens:,} of {job.source.name}",
        "steps": f"{plan.steps:,} of {job.recipe.batch_size:,} activations",
        "FLOPs": f"{plan.flops:.3g} (encoder products and language model)",
        "matrix-product peak": f"{plan.peak_flops / 1e9:,.0f} GFLOP/s measured;"
        f" {speed / plan.peak_flops:.0%} of it expected",
        "memory": f"{plan.memory / 1e9:,.1f} GB on the device, at most",
        "disk": f"{plan.checkpoints / 1e9:,.1f} GB for two checkpoints,"
        f" up to {plan.token_cache / 1e9:,.1f} GB of tokens",
        "expected time": f"{duration(plan.seconds)}: language model {duration(plan.lm_seconds)},"
        f" dense steps {duration(plan.dense_seconds)}, sparse steps {duration(plan.sparse_seconds)};"
        " tokenising and the evaluation come on top",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def study_plan_table(study: Study, plan: StudyPlan) -> Any:
    """A rich table of what a study needs."""
    from rich.table import Table

    table = Table(title=f"{study.job.entries[0].collection} {study.job.facts()['layers']}", show_header=False)
    rows = {
        "cells": f"{plan.cells:,} of {len(study.cells):,} left to train: {plan.saes:,} SAEs",
        "streams": f"{plan.streams:,}, each one pass of the language model over {study.job.tokens:,} tokens"
        f" of {study.job.source.name}",
        "hours": f"{plan.hours:,.2f} on one device like this: language model {duration(plan.lm_seconds)},"
        f" SAEs {duration(plan.step_seconds)}; tokenising and the evaluations come on top",
        "hours with ranks": ", ".join(f"{n}: {plan.hours / n:,.2f}" for n in (2, 4, 8))
        + " if torchrun's ranks each have such a device",
        "memory": f"{plan.memory / 1e9:,.1f} GB on the device, at most",
        "disk": size_words(plan.disk),
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return table
