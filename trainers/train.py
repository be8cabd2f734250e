"""The training loop: several SAEs from one stream of activations, with checkpoints, on one process or many.

Read it top to bottom: `train` sets up, loops and saves. One step is in `trainee.py`, the loss in `objective.py`, the
products in `codes.py`, the stream in `feed.py`, the shuffle buffer in `saezoo/activations.py`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saezoo import checkpoint, files
from saezoo.activations import ActivationBuffer
from saezoo.entries import Entry, Recipe
from saezoo.errors import DivergedError, TrainingError, UsageError
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel, depth_of
from saezoo.ranks import Question, Ranks
from saezoo.shards import TokenCache
from saezoo.tokens import TextSource
from saezoo.trainers import gathering
from saezoo.trainers.feed import Cursor, Feed, store_calls
from saezoo.trainers.log import Log, Row
from saezoo.trainers.resampling import INPUTS, resample
from saezoo.trainers.trainee import Product, StepLog, Trainee, initial_parameters

RESAMPLINGS = 4
"""Of a run, as in Bricken et al. 2023."""


class Variant(NamedTuple):
    """What one of several trainings on one stream of activations has of its own."""

    name: str
    recipe: Recipe
    d_sae: int | None = None
    """None: the entry's."""


@dataclass(frozen=True)
class Job:
    """What to train. `entries` share a model, context size and centring."""

    entries: tuple[Entry, ...]
    recipe: Recipe
    source: TextSource
    tokens: int
    seed: int
    product: Product = "full"
    variants: tuple[Variant, ...] = ()
    """Every entry is trained as each of these instead, from one stream of activations; none of them may differ from
    `recipe` in what makes the stream (`STREAM`)."""

    @property
    def members(self) -> list[tuple[Entry, Recipe, str]]:
        """What is trained: entry, recipe, and its name in log.csv. Variant by variant, in the order of the entries."""
        if not self.variants:
            return [(entry, self.recipe, entry.name) for entry in self.entries]
        return [
            (replace(entry, d_sae=variant.d_sae or entry.d_sae), variant.recipe, f"{variant.name}:{entry.name}")
            for variant in self.variants
            for entry in self.entries
        ]

    def check(self) -> None:
        """Raise UsageError if the budget of tokens does not fill the shuffle buffer once."""
        buffered = self.recipe.buffer_batches * self.recipe.store_rows * self.entries[0].known_context
        if self.tokens < buffered:
            raise UsageError(
                f"{self.tokens:,} tokens are fewer than the shuffle buffer's {buffered:,}; give at least as many,"
                " or a recipe with a smaller buffer"
            )
        for variant in self.variants:
            assert all(getattr(variant.recipe, name) == getattr(self.recipe, name) for name in STREAM)

    def facts(self) -> dict[str, Any]:
        """What makes one run another than the next, as plain values."""
        first = self.entries[0]
        return {
            **_plain(self.recipe),
            "collection": first.collection,
            "layers": ",".join(entry.name for entry in self.entries),
            "model": first.model_name,
            "d_sae": first.d_sae,
            "context_size": first.known_context,
            "centre": first.centre,
            "text": self.source.name,
            "tokens": self.tokens,
            "seed": self.seed,
            "product": self.product,
        } | ({"variants": [_plain(v.recipe) | {"d_sae": v.d_sae} for v in self.variants]} if self.variants else {})


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if key not in ("source", "tokens")}


STREAM = ("batch_size", "store_rows", "buffer_batches", "buffer", "skip_documents")
"""Fields of a recipe that say which activations come in which order."""


@dataclass(frozen=True)
class Progress:
    """A run after one step; this rank's SAEs only."""

    done: int
    total: int
    names: tuple[str, ...]
    logs: list[StepLog]
    """Tensors: reading them synchronises."""
    trainees: list[Trainee]
    seconds: float
    """Since training began or was resumed, without the set-up."""
    trained: int
    """Tokens in that time."""
    saved: checkpoint.Cost | None
    """What the last checkpoint cost."""
    saving: float
    """Share of the time that went into checkpoints."""


@dataclass
class Hooks:
    """Who wants to know; every one optional."""

    on_step: Callable[[Progress], None] = lambda progress: None
    on_row: Callable[[Row], None] = lambda row: None
    """Gets every row of log.csv."""
    note: Callable[[str], None] = lambda message: None
    """Gets one-line remarks for the user."""


@dataclass
class _Run:
    """Everything that changes while a run goes on."""

    trainees: list[Trainee]
    buffer: ActivationBuffer
    generator: torch.Generator
    cursor: Cursor
    done: int = 0
    schedule: checkpoint.Schedule = field(default_factory=checkpoint.Schedule)


def train(
    job: Job,
    lm: LanguageModel,
    folder: Path,
    *,
    resume: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    schedule: checkpoint.Schedule | None = None,
    hooks: Hooks | None = None,
) -> list[Trainee]:
    """Train every entry of `job`; returns them in order, whole (on several ranks: on rank 0; others get []).

    Writes `folder`/log.csv and checkpoints as it goes, the latter by `schedule` (as often as costs at most 2 % of the
    time) and on Ctrl-C or SIGTERM.

    Raises UsageError for a budget below one buffer; TrainingError: nothing to resume, another job's checkpoint, text
    shorter than a store call, a loss that is not finite or has exploded, another rank that died, or stopped by a
    signal (after a checkpoint).
    """
    hooks = hooks or Hooks()
    job.check()
    ranks.check(len(job.members), job.entries[0].d_sae)
    if ranks.shares_features and any(recipe.resample_every_steps for _, recipe, _ in job.members):
        raise UsageError("resampling needs all features on one rank; leave --share features out")
    cache = TokenCache(job.source, lm.tokenizer, files.cache_folder("tokens"), hooks.note)
    identity = job.facts() | {
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "text": f"{job.source.name} ({cache.folder.name})",
    }
    saved = checkpoint.load(folder, identity, hooks.note) if resume else None
    with gathering.watch(ranks):
        ranks.check_same(identity | {"a checkpoint at": "none" if saved is None else saved.done})
        if saved is None and ranks.rank == 0:
            checkpoint.remove(folder)  # of a run given up
        run, feed = _set_up(job, lm, cache, saved, ranks, hooks)
        run.schedule = schedule or checkpoint.Schedule()
        names = tuple(name for _, _, name in ranks.entries(job.members))
        log = Log(folder, job.tokens, names, run.done, ranks)
        begin, first, cost = time.monotonic(), run.done, None
        ask, due = Question(ranks), False
        with _StopSignal() as stop:
            while run.done < job.tokens:
                x_nLD = next(run.buffer)
                steps = [trainee.step(_input(x_nLD, i, trainee.recipe)) for i, trainee in enumerate(run.trainees)]
                feed.work_ahead()
                _resample(job, run, ranks)
                run.done += len(x_nLD)
                run.cursor = feed.cursor

                for row in log.rows(run.done, steps, run.trainees):
                    hooks.on_row(row)
                seconds, trained = time.monotonic() - begin, run.done - first
                hooks.on_step(
                    Progress(
                        run.done, job.tokens, names, steps, run.trainees, seconds, trained, cost, run.schedule.share()
                    )
                )
                stopping, found_due = ask(stop.requested, ranks.rank == 0 and run.schedule.due())
                due = due or found_due
                if (stopping or (due and run.buffer.drained)) and run.done < job.tokens:
                    cost, due = _save(job, run, folder, identity, ranks) or cost, False
                if stopping and run.done < job.tokens:
                    raise TrainingError(
                        f"stopped at {run.done:,} of {job.tokens:,} tokens; the same command with --resume goes on"
                    )
        _refuse_not_finite(job, run, ranks)
        return gathering.whole_trainees(job.recipe, job.product, run.trainees, ranks)


def _input(x_nLD: Tensor, index: int, recipe: Recipe) -> Tensor:
    """What the trainee of this number reads: of several variants each has all layers."""
    x_nD = x_nLD[:, index % x_nLD.shape[1]].float().contiguous()
    return x_nD if recipe.input_scale == 1 else x_nD * recipe.input_scale


def _resample(job: Job, run: _Run, ranks: Ranks) -> None:
    """Where it is time, let dead features begin anew, from inputs in the shuffle buffer."""
    for i, ((entry, recipe, _), trainee) in enumerate(zip(ranks.entries(job.members), run.trainees, strict=True)):
        every = recipe.resample_every_steps
        if not every or trainee.steps % every or trainee.steps // every > RESAMPLINGS:
            continue
        generator = torch.Generator().manual_seed(job.seed * 1009 + entry.layer + 1_000_003 * trainee.steps)
        resample(trainee, _input(run.buffer.storage[:INPUTS], i, recipe), every // 2, generator)


def _set_up(
    job: Job, lm: LanguageModel, cache: TokenCache, saved: checkpoint.Checkpoint | None, ranks: Ranks, hooks: Hooks
) -> tuple[_Run, Feed]:
    """The run at its start, or as it was saved; and what feeds its buffer."""
    recipe, first = job.recipe, job.entries[0]
    cursor = Cursor(0, 0) if saved is None else Cursor(*saved.facts["cursor"])
    feed = Feed(
        lm,
        store_calls(
            cache,
            job.source.name,
            recipe,
            bos=lm.bos,
            context=first.known_context,
            start=cursor,
            note=hooks.note,
        ),
        [depth_of(entry.hook, lm.n_layers) for entry in job.entries],
        centre=first.centre,
        per_refill=recipe.buffer_batches // 2,
        start=cursor,
        ranks=ranks,
    )
    generator = torch.Generator().manual_seed(job.seed)
    buffer = ActivationBuffer(
        feed,
        half=recipe.buffer_batches // 2,
        batch_size=recipe.batch_size,
        mode=recipe.buffer,
        permute=lambda n: torch.randperm(n, generator=generator).to(lm.device),
    )
    mine = ranks.entries(job.members)
    if saved is None:
        size = recipe.buffer_batches * recipe.store_rows * first.known_context
        hooks.note(f"filling the shuffle buffer with {size:,} activations")
        buffer.fill()
        starts = [_b_dec(member, _input(buffer.storage, i, member)) for i, (_, member, _) in enumerate(mine)]
    else:
        starts = [torch.zeros(first.d_in, device=lm.device) for _ in mine]
    trainees = [
        new_trainee(entry, member, job.product, start, seed=job.seed, ranks=ranks, note=hooks.note)
        for (entry, member, _), start in zip(mine, starts, strict=True)
    ]
    run = _Run(trainees, buffer, generator, feed.cursor)
    if saved is not None:
        gathering.restore(saved, run.trainees, buffer, generator, lm.device, ranks)
        run.done = saved.done
        hooks.note(f"resumed at {run.done:,} of {job.tokens:,} tokens")
    return run, feed


def _b_dec(recipe: Recipe, storage_ND: Tensor) -> Tensor:
    if recipe.b_dec_init == "geometric_median":
        return geometric_median(storage_ND)
    return storage_ND.mean(0) if recipe.b_dec_init == "mean" else torch.zeros_like(storage_ND[0])


def new_trainee(
    entry: Entry,
    recipe: Recipe,
    product: Product,
    b_dec_D: Tensor,
    *,
    seed: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    note: Callable[[str], None] = lambda message: None,
) -> Trainee:
    """An untrained SAE; its random start depends on the seed and its layer, not on what trains beside it."""
    generator = torch.Generator().manual_seed(seed * 1009 + entry.layer)
    features = ranks.features(entry.d_sae)
    parameters = initial_parameters(entry.d_sae, b_dec_D, generator, recipe.encoder_init, features)
    fused = product == "half" and b_dec_D.is_cuda and not ranks.shares_features and not recipe.resample_every_steps
    if fused and find_spec("triton") is not None:
        from saezoo.trainers.fused import FusedTrainee

        return FusedTrainee(parameters, recipe, note=note)
    return Trainee(parameters, recipe, product=product, ranks=ranks, note=note)


def _save(job: Job, run: _Run, folder: Path, identity: dict[str, Any], ranks: Ranks) -> checkpoint.Cost | None:
    """A checkpoint, written by rank 0; its cost there."""
    start = time.monotonic()
    _refuse_not_finite(job, run, ranks)  # the last good checkpoint stays
    tensors, facts = gathering.run_state(run.trainees, run.buffer, run.generator, ranks)
    cost = None
    if tensors is not None:
        cost = checkpoint.save(folder, run.done, tensors, {**facts, "cursor": list(run.cursor)}, identity)
    ranks.wait()
    run.schedule.saved(time.monotonic() - start)
    return cost


def _refuse_not_finite(job: Job, run: _Run, ranks: Ranks) -> None:
    for (_, _, name), trainee in zip(ranks.entries(job.members), run.trainees, strict=True):
        if not all(math.isfinite(float(parameter.sum())) for parameter in trainee.parameters):
            raise DivergedError(name, f"weights not finite at {run.done:,} tokens")


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag; a second one interrupts at once."""

    def __enter__(self) -> _StopSignal:
        self.requested = False
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: leave signals alone
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
