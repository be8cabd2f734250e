"""What a study will need, before it starts, and whether there is enough of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saezoo import reproduction
from saezoo.ablation.grid import Cell
from saezoo.ablation.study import Study, disk_of, incomplete
from saezoo.errors import UsageError
from saezoo.ranks import Ranks, started_together
from saezoo.reproduction import Means
from saezoo.trainers.plan import Plan, make_plan, memory_of
from saezoo.workflows import Options


@dataclass(frozen=True)
class StudyPlan:
    """A forecast. Seconds are those of one device like this one; several divide the streams."""

    cells: int
    """That are left to train."""
    streams: int
    saes: int
    lm_seconds: float
    step_seconds: float
    memory: int
    """Bytes on the device, at most, while the largest stream is trained."""
    disk: int
    """Bytes that the folder will need besides what it has."""

    @property
    def hours(self) -> float:
        return (self.lm_seconds + self.step_seconds) / 3600


def plan_of(study: Study, out: Path, *, means: Means, options: Options) -> StudyPlan:
    """Measure this machine for some seconds and say what is left to do in `out`. UsageError under torchrun."""
    if started_together() > 1:
        raise UsageError("--plan and --hours measure one process; run it without torchrun")
    left = incomplete(out, study.cells)
    streams = [cells for group in study.streams() if (cells := incomplete(out, group))]
    lm = reproduction.language_model(study.job, means, options)
    known: dict[tuple[int | None, int], Plan] = {}

    def planned(cell: Cell) -> Plan:
        key = cell.d_sae, cell.recipe.lr_warmup_steps
        if key not in known:
            entries = study.entries_of(cell)
            known[key] = make_plan(entries, cell.recipe, study.job.tokens, lm, study.job.product, Ranks())
        return known[key]

    def memory(cells: list[Cell]) -> int:
        entries = [entry for cell in cells for entry in study.entries_of(cell)]
        return memory_of(entries, len(study.job.entries), cells[0].recipe, lm, Ranks())

    steps = sum(planned(cell).dense_seconds + planned(cell).sparse_seconds for cell in left)
    return StudyPlan(
        cells=len(left),
        streams=len(streams),
        saes=len(left) * len(study.job.entries),
        lm_seconds=sum(planned(cells[0]).lm_seconds for cells in streams),
        step_seconds=steps,
        memory=max(map(memory, streams), default=0),
        disk=disk_of(study, out),
    )


def check_time(plan: StudyPlan, hours: float) -> None:
    """Raise UsageError unless the study can be done in so many hours on one device."""
    if plan.hours > hours:
        raise UsageError(
            f"{plan.cells:,} cells need {plan.hours:,.2f} hours on this device, more than the {hours:g} given;"
            " fewer factors, levels, seeds, layers or tokens"
        )
