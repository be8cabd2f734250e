"""The training loop: several SAEs from one stream of activations, with checkpoints.

Read it top to bottom: `train` sets up, loops and saves; the loss is in `objective.py`, one step in `trainee.py`, the
shuffle buffer in `saezoo/activations.py`, token packing in `saezoo/tokens.py`.
"""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from saezoo import files
from saezoo.activations import ActivationBuffer, activations
from saezoo.entries import Entry, Recipe
from saezoo.errors import TrainingError
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel, depth_of
from saezoo.tokens import Rows, TextSource, encode, pack_feb2024
from saezoo.trainers.trainee import StepLog, Trainee, initial_parameters

_LOG_COLUMNS = ("tokens", "layer", "loss", "mse", "l1", "ghost", "l0", "explained_variance_uncentred", "ghosts")
_CHECKPOINTS = 10  # as many in a run, as the original had
_LOGS = 500  # rows of log.csv per SAE and run


@dataclass(frozen=True)
class Job:
    """What to train. `entries` share a model, context size and centring."""

    entries: tuple[Entry, ...]
    recipe: Recipe
    source: TextSource
    tokens: int
    seed: int

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed, as plain values."""
        recipe = {key: value for key, value in asdict(self.recipe).items() if key not in ("source", "tokens")}
        first = self.entries[0]
        return {
            **recipe,
            "collection": first.collection,
            "layers": ",".join(entry.name for entry in self.entries),
            "model": first.model_name,
            "d_sae": first.d_sae,
            "context_size": first.context_size,
            "centre": first.centre,
            "text": self.source.name,
            "tokens": self.tokens,
            "seed": self.seed,
        }


def train(
    job: Job,
    lm: LanguageModel,
    folder: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int, list[StepLog]], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> list[Trainee]:
    """Train every entry of `job`; returns them in order.

    Writes `folder`/log.csv and `folder`/checkpoint.pt as it goes, the latter at every tenth of the run and on Ctrl-C
    or SIGTERM. `on_step` gets the tokens done and one log per SAE (tensors: reading them synchronises). `note` gets
    one-line remarks for the user.

    Raises TrainingError: nothing to resume, another job's checkpoint, text shorter than half a buffer, a loss that is
    not finite, or stopped by a signal (after a checkpoint).
    """
    feed = _Feed(job, lm, note)
    checkpoint = folder / "checkpoint.pt"
    saved = _read_checkpoint(checkpoint, job) if resume else None
    if saved is not None:
        feed.skip(saved["calls"] - job.recipe.buffer_batches)  # the buffer's set-up draws that many again
    generator = torch.Generator().manual_seed(job.seed)
    size = job.recipe.buffer_batches * job.recipe.store_rows * job.entries[0].context_size
    note(f"filling the shuffle buffer with {size:,} activations")
    buffer = ActivationBuffer(
        feed,
        half=job.recipe.buffer_batches // 2,
        batch_size=job.recipe.batch_size,
        mode=job.recipe.buffer,
        permute=lambda n: torch.randperm(n, generator=generator).to(lm.device),
    )
    trainees = [_new_trainee(job, i, buffer.storage[:, i]) for i in range(len(job.entries))]
    done = 0
    if saved is not None:
        done = saved["done"]
        buffer.restore(saved["buffer"])
        generator.set_state(saved["generator"])
        for trainee, state in zip(trainees, saved["trainees"], strict=True):
            trainee.restore(state)
        note(f"resumed at {done:,} of {job.tokens:,} tokens")

    log = _Log(folder / "log.csv", job, keep_until=done)
    for leftover in folder.glob(f".{checkpoint.name}.*"):  # of a run that was killed while saving
        leftover.unlink()
    next_save = done + job.tokens / _CHECKPOINTS
    with _StopSignal() as stop:
        while done < job.tokens:
            x_nLD = next(buffer)
            steps = [trainee.step(x_nLD[:, i].contiguous()) for i, trainee in enumerate(trainees)]
            done += len(x_nLD)
            log.add(done, steps)
            if on_step is not None:
                on_step(done, steps)
            if (done >= next_save or stop.requested) and done < job.tokens:
                _refuse_not_finite(job, trainees, done)  # the last good checkpoint stays
                state = [trainee.state() for trainee in trainees]
                _write_checkpoint(checkpoint, job, done, feed.calls, generator, buffer, state)
                next_save += job.tokens / _CHECKPOINTS
            if stop.requested and done < job.tokens:
                raise TrainingError(
                    f"stopped at {done:,} of {job.tokens:,} tokens; the same command with --resume goes on"
                )
    return trainees


class _Feed:
    """Iterator of activation blocks [n, L, D], over as many epochs of the text as it takes."""

    def __init__(self, job: Job, lm: LanguageModel, note: Callable[[str], None]) -> None:
        self._job, self._lm, self._note = job, lm, note
        self.calls = 0
        """Blocks taken from the text so far, over all epochs."""
        depths = [depth_of(entry.hook, lm.n_layers) for entry in job.entries]
        self._rows = self._epochs()
        self._blocks = activations(lm, self._rows, depths, centre=job.entries[0].centre)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self._blocks)

    def skip(self, calls: int) -> None:
        """Pass over `calls` blocks of tokens without running the model."""
        for _ in range(calls):
            next(self._rows)

    def _epochs(self) -> Iterator[Rows]:
        job, first = self._job, self._job.entries[0]
        epoch = 1
        while True:
            before = self.calls
            documents = encode(self._lm.tokenizer, job.source.documents())
            packed = pack_feb2024(
                documents,
                bos=self._lm.bos,
                context=first.context_size,
                rows_per_call=job.recipe.store_rows,
                skip=job.recipe.skip_documents,
            )
            for rows in packed:
                self.calls += 1
                yield rows
            if self.calls == before:
                need = job.recipe.store_rows * first.context_size
                raise TrainingError(
                    f"{job.source.name} holds fewer than the {need:,} tokens of one store call; give more"
                )
            epoch += 1
            self._note(f"end of {job.source.name} after {self.calls - before:,} calls; epoch {epoch} begins")


def _new_trainee(job: Job, index: int, storage_ND: Tensor) -> Trainee:
    """An untrained SAE; its random start depends on the seed and its layer, not on what trains beside it."""
    entry, recipe = job.entries[index], job.recipe
    if recipe.b_dec_init == "geometric_median":
        b_dec = geometric_median(storage_ND.contiguous())
    else:
        b_dec = storage_ND.mean(0) if recipe.b_dec_init == "mean" else torch.zeros_like(storage_ND[0])
    generator = torch.Generator().manual_seed(job.seed * 1009 + entry.layer)
    return Trainee(initial_parameters(entry.d_in, entry.d_sae, b_dec, generator), recipe)


class _Log:
    """log.csv: one row per SAE at about every 1/500 of the run."""

    def __init__(self, path: Path, job: Job, *, keep_until: int) -> None:
        self._path, self._names = path, [entry.name for entry in job.entries]
        self._interval = job.tokens / _LOGS
        self._tokens = job.tokens
        self._last = keep_until
        rows = []
        if keep_until and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row[0].isdigit() and int(row[0]) <= keep_until]
        with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_LOG_COLUMNS, *rows])

    def add(self, done: int, steps: Sequence[StepLog]) -> None:
        """Note the step that ended at `done` tokens, if one is due. Raises TrainingError if a loss is not finite."""
        due = done // self._interval > self._last // self._interval or self._last == 0 or done >= self._tokens
        self._last = done
        if not due:
            return
        with self._path.open("a", newline="", encoding="utf-8") as file:
            for name, step in zip(self._names, steps, strict=True):
                values = [float(loss) for loss in step.losses]
                if not all(map(_finite, values)):
                    raise TrainingError(
                        f"layer {name}: the loss is {values[0]} at {done:,} tokens; lower the learning rate"
                    )
                tail = [float(step.l0), float(step.explained_variance_uncentred), int(step.ghosts)]
                csv.writer(file).writerow([done, name, *values, *tail])


def _refuse_not_finite(job: Job, trainees: list[Trainee], done: int) -> None:
    for entry, trainee in zip(job.entries, trainees, strict=True):
        if not all(_finite(float(parameter.detach().sum())) for parameter in trainee.parameters):
            raise TrainingError(f"layer {entry.name}: weights not finite at {done:,} tokens; lower the learning rate")


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


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


def _write_checkpoint(
    path: Path,
    job: Job,
    done: int,
    calls: int,
    generator: torch.Generator,
    buffer: ActivationBuffer,
    trainees: list[dict[str, Any]],
) -> None:
    content = {"job": job.identity(), "done": done, "calls": calls, "generator": generator.get_state()}
    content |= {"buffer": buffer.state(), "trainees": trainees}
    with files.replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch reports a full disk this way
            raise TrainingError(f"cannot write {path}: {str(error).splitlines()[0]}; is the disk full?") from None


def _read_checkpoint(path: Path, job: Job) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingError(f"nothing to resume: no {path}; leave --resume out to start")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["job"]
    except Exception as error:  # a damaged zip or pickle raises many kinds
        reason = str(error).split("\n")[0] or type(error).__name__
        raise TrainingError(f"{path} is damaged ({reason}); delete it and start again") from None
    mine = job.identity()
    differing = [key for key in mine if mine[key] != theirs.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {theirs.get(key)} in the checkpoint, {mine[key]} now" for key in differing)
        raise TrainingError(f"{path} belongs to another run ({listed}); use its settings, or another --out")
    return saved
