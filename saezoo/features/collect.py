"""The pass over the text: one forward of the model for all SAEs; every firing goes to disk, the rest into sums.

Shapes: R rows, T positions, n scored tokens of a batch, D d_in, F d_sae, N blocks of documents, G groups of documents,
K sums of `RECONSTRUCTION_SUMS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saezoo import checkpoint, files
from saezoo.codes import Pairs, weighted_sums
from saezoo.errors import SaezooError, TextError, TrainingError, UsageError
from saezoo.evals import Subject, counts, intervals
from saezoo.evals.evaluate import (
    batch_rows,
    depth_for,
    identity,
    must_be_finite,
    reconstruct,
    reconstruction_values,
)
from saezoo.evals.intervals import GROUPS
from saezoo.evals.metrics import OF_RECONSTRUCTION, RECONSTRUCTION_SUMS
from saezoo.evals.scoring import Scoring
from saezoo.evals.tally import BLOCKS, Places, add_by_block
from saezoo.features.events import BYTES, Events, Writer, parts
from saezoo.lm import LanguageModel
from saezoo.ranks import Ranks
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.tokens import Rows

_SHORTEST = 20.0  # seconds before the first save, as for evaluations
_STALE = 7 * 86_400.0
_MOST_TOKENS = 2**32  # a firing's place in the text is kept in 32 bits
_STOPPED = "stopped; {:,} tokens are done and saved, the same command with --resume goes on from there"


@dataclass(frozen=True)
class Sums:
    """What is summed over the scored tokens, for one SAE: float64, on the CPU. Sums of different rows add up."""

    values_NK: Tensor
    """`RECONSTRUCTION_SUMS` by block of documents."""
    x_sum_ND: Tensor
    """The activations that the SAE reads."""
    fires_GF: Tensor
    x2_sum_D: Tensor
    fx_sum_FD: Tensor
    """Feature times activation; [0, 0] unless correlations are wanted."""

    @classmethod
    def empty(cls, sae: SAE, *, correlate: bool) -> Sums:
        """Nothing seen yet."""
        D, F = sae.config.d_in, sae.config.d_sae
        shapes = (BLOCKS, len(RECONSTRUCTION_SUMS)), (BLOCKS, D), (GROUPS, F), (D,), (F, D) if correlate else (0, 0)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, values: dict[str, Tensor], x_nD: Tensor, pairs: Pairs, fires_GF: Tensor, places: Places) -> None:
        """One batch: per-token values [n] by name, the activations, the features and where the tokens belong."""
        values_nK = torch.stack([values[name].double().cpu() for name in RECONSTRUCTION_SUMS], dim=1)
        self.values_NK.index_add_(0, places.block_n, values_nK)
        add_by_block(self.x_sum_ND, x_nD, places.block_n)
        self.fires_GF.add_(fires_GF.cpu())
        self.x2_sum_D.add_(x_nD.double().square().sum(0).cpu())
        if len(self.fx_sum_FD):
            ends_F1 = torch.bincount(pairs.feature_N + 1, minlength=len(self.fx_sum_FD) + 1).cumsum(0)
            self.fx_sum_FD.add_(weighted_sums(x_nD, pairs.token_N, pairs.value_N, ends_F1).cpu())

    def everything(self) -> dict[str, Tensor]:
        """By name."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    def merge(self, tensors: dict[str, Tensor]) -> None:
        """Add `everything` of other rows."""
        for name, mine in self.everything().items():
            mine.add_(tensors[name])

    def metrics(self, seed: int) -> dict[str, Measured]:
        """The metrics of docs/metrics.md that need no forward pass behind the SAE, with their intervals."""
        sums = {name: self.values_NK[:, k] for k, name in enumerate(RECONSTRUCTION_SUMS)}
        tokens_G = torch.zeros(GROUPS, dtype=torch.float64)
        tokens_G.index_add_(0, torch.arange(BLOCKS) % GROUPS, sums["tokens"])
        found = intervals.bootstrap(sums, self.x_sum_ND, seed=seed, metrics=OF_RECONSTRUCTION)
        return found | counts.feature_counts(self.fires_GF, tokens_G)


@dataclass(frozen=True)
class Collection:
    """Everything that the pass found, and the folders that its firings lie in."""

    scoring: Scoring
    events: list[Events]
    """For each SAE."""
    sums: list[Sums]
    folders: list[Path]

    @property
    def tokens(self) -> int:
        """Scored ones."""
        return int(self.scoring.scored_RT.sum())

    def remove(self) -> None:
        """What was made from it is complete."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@torch.inference_mode()
def collect(
    subjects: Sequence[Subject],
    lm: LanguageModel,
    rows: Rows,
    root: Path,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    correlate: bool = False,
    ranks: Ranks | None = None,
    resume: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Collection | None:
    """Run the SAEs over the rows and keep every firing, under `root`, until `Collection.remove`.

    Args:
        subjects: SAEs that read `lm`.
        rows: packed tokens; special ones are not scored.
        batch_size: rows at once; by default 2,048 tokens on a CPU and 32,768 on a GPU.
        correlate: sum features times activations too (F x D numbers for each SAE).
        ranks: the processes that share the rows; rank 0 gets the collection, the others None. All must see `root`.
        resume: go on from what an interrupted pass with the same arguments left.
        on_progress: called with the number of tokens done (of all ranks, about) after each batch.

    Raises UsageError if an SAE does not fit the model, TextError without a token to score, SaezooError for what is not
    finite and for a disk too small, TrainingError if there is nothing to resume.
    """
    ranks = ranks or Ranks()
    scoring = Scoring.of(rows, lm, "standard", seed)
    if not scoring.scored_RT.any():
        raise TextError("the text holds special tokens only; give one with text in it")
    if rows.tokens_RT.size > _MOST_TOKENS:
        raise UsageError(f"{rows.tokens_RT.size:,} tokens; at most {_MOST_TOKENS:,} at once")
    batch = batch_size or batch_rows(lm, scoring.context)
    part = ranks.part(-(-len(rows) // batch))
    first, last = part.start * batch, min(part.stop * batch, len(rows))
    about = {"rank": ranks.rank, "ranks": ranks.size, "correlate": correlate}
    name = hashlib.sha256(json.dumps(about | identity(subjects, lm, scoring, batch), sort_keys=True).encode())
    run = Pass(subjects, lm, scoring, root / name.hexdigest()[:16], first, correlate=correlate)
    start = run.resume(note) if resume else run.begin()
    try:
        for done in run.go(start, last, batch):
            on_progress(min((done - first) * ranks.size, len(rows)) * scoring.context)
            if done - batch <= first:
                run.check_disk(done - first, len(rows))
            run.offer(done)
    except KeyboardInterrupt:
        kept = (run.saved - first) * scoring.context
        raise SaezooError(_STOPPED.format(kept) if kept else "stopped; nothing was saved yet") from None
    run.save(last)
    return run.joined(ranks)


class Pass:
    """One pass over the text, on one rank, from row `first` on."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        lm: LanguageModel,
        scoring: Scoring,
        folder: Path,
        first: int = 0,
        *,
        correlate: bool = False,
    ) -> None:
        self._subjects, self._lm, self._scoring, self._folder = subjects, lm, scoring, folder
        self._depths = [depth_for(subject, lm) for subject in subjects]
        self._sums = [Sums.empty(subject.sae, correlate=correlate) for subject in subjects]
        self._writers = [Writer(folder / str(i), s.sae.config.d_sae) for i, s in enumerate(subjects)]
        self._schedule = checkpoint.Schedule(shortest=_SHORTEST)
        self._first = self.saved = first
        """The row after the last that was saved."""

    def begin(self) -> int:
        """Make the folder empty; returns the row to begin with."""
        for other in self._folder.parent.glob("*"):
            if time.time() - other.stat().st_mtime > _STALE:
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        files.check_folder(self._folder)
        return self._first

    def resume(self, note: Callable[[str], None]) -> int:
        """Read what the interrupted pass left; returns the row to go on with."""
        try:
            state = checkpoint.load(self._folder, {}, note)
        except TrainingError as error:
            if checkpoint.newest(self._folder):
                raise
            raise TrainingError(
                "nothing to resume: no pass with just these settings was interrupted; leave --resume out"
            ) from error
        for i, sums in enumerate(self._sums):
            sums.merge({name: state.tensors[f"{i}.{name}"] for name in sums.everything()})
            for token, path in parts(self._folder / str(i)).items():
                if token >= state.done * self._scoring.context:  # written after the checkpoint
                    path.unlink()
        self.saved = state.done
        return state.done

    def go(self, first: int, last: int, batch: int) -> Iterator[int]:
        """Run rows first..last-1; gives, after each batch, the row that comes next."""
        scoring, device = self._scoring, self._lm.device
        for start in range(first, last, batch):
            stop = min(start + batch, last)
            scored_BT = scoring.scored_RT[start:stop]
            residuals = self._lm.residuals(scoring.tokens_RT[start:stop].to(device), self._depths)
            token_n = scored_BT.flatten().nonzero().squeeze(1) + start * scoring.context
            for i, depth in enumerate(self._depths):
                h_nD = residuals[depth][scored_BT.to(device)]
                self._add(i, h_nD, token_n, scoring.places(start, stop), f"rows {start} to {stop - 1}")
            yield stop

    def _add(self, i: int, h_nD: Tensor, token_n: Tensor, places: Places, rows: str) -> None:
        """One SAE on the residuals h of one batch's scored tokens."""
        subject = self._subjects[i]
        must_be_finite(h_nD, f"the activations at {subject.sae.config.hook} are not finite in {rows}")
        x_nD, y_nD, code = reconstruct(subject.sae, h_nD)
        must_be_finite(y_nD, f"SAE {subject.layer} gives values that are not finite in {rows}")
        pairs = code.pairs()
        above_n, sum_n = code.per_token()
        values = reconstruction_values(x_nD, y_nD) | {"tokens": torch.ones_like(sum_n), "l0": above_n, "l1": sum_n}
        fires_GF = code.fires_in((places.block_n % GROUPS).to(x_nD.device), GROUPS)
        self._sums[i].add(values, x_nD, pairs, fires_GF, places)
        self._writers[i].add(pairs.feature_N, token_n[pairs.token_N.cpu()], pairs.value_N)

    def check_disk(self, done: int, rows: int) -> None:
        """SaezooError if, judging by the first `done` rows, the firings of all `rows` do not fit on the disk."""
        firings = sum(float(sums.fires_GF.sum()) for sums in self._sums)
        need, free = firings / done * rows * BYTES, shutil.disk_usage(self._folder).free
        if need > free:
            raise SaezooError(
                f"the firings need about {need / 1e9:.1f} GB in {self._folder.parent}, where {free / 1e9:.1f} GB are"
                " free; fewer --tokens, or SAEZOO_CACHE in a larger place"
            )

    def offer(self, row: int) -> None:
        """Save what was found before `row`, if it is time."""
        if self._schedule.due():
            started = time.monotonic()
            self.save(row)
            self._schedule.saved(time.monotonic() - started)

    def save(self, row: int) -> None:
        """Write down what was found before `row`."""
        for writer in self._writers:
            writer.flush()
        checkpoint.save(self._folder, row, self._everything(), {}, {})
        self.saved = row

    def _everything(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, sums in enumerate(self._sums) for name, t in sums.everything().items()}

    def joined(self, ranks: Ranks) -> Collection | None:
        """On rank 0, what all ranks found."""
        everyone = ranks.collect(self._everything(), str(self._folder))
        if everyone is None:
            return None
        for tensors, _ in everyone[1:]:
            for i, sums in enumerate(self._sums):
                sums.merge({name: tensors[f"{i}.{name}"] for name in sums.everything()})
        folders = [Path(folder) for _, folder in everyone]
        events = []
        for i, (subject, sums) in enumerate(zip(self._subjects, self._sums, strict=True)):
            found = Events([folder / str(i) for folder in folders], subject.sae.config.d_sae)
            if found.fires_F.sum() != int(sums.fires_GF.sum()):
                raise SaezooError(f"not all ranks' firings lie in {folders[0].parent}; SAEZOO_CACHE must be shared")
            events.append(found)
        return Collection(self._scoring, events, self._sums, folders)
