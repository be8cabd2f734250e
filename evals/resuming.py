"""What an interrupted evaluation goes on from: its sums, saved between batches, and those of other ranks.

The sums lie in the cache, in a folder named after everything that they depend on; so `--resume` can only find what
belongs to the same evaluation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo import checkpoint
from saezoo.errors import TrainingError
from saezoo.evals.tally import Tally

_SHORTEST = 20.0
"""Seconds before the first save: what is quicker to repeat than to find again is not saved."""
_STALE = 7 * 86_400.0
"""Seconds after which the sums of an evaluation that nobody came back to are deleted."""


class States:
    """Saves the tallies of one evaluation, on one rank, and finds them again."""

    def __init__(self, root: Path, identity: Callable[[], dict[str, Any]], tallies: Sequence[Tally]) -> None:
        """`identity`: JSON values; called once, and only if there is something to save or to find."""
        self._root, self._identity, self._tallies = root, identity, tallies
        self._known: tuple[Path, dict[str, Any]] | None = None
        self._schedule = checkpoint.Schedule(shortest=_SHORTEST)

    def _place(self) -> tuple[Path, dict[str, Any]]:
        if self._known is None:
            identity = self._identity()
            name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
            self._known = self._root / name, identity
        return self._known

    def restore(self, note: Callable[[str], None]) -> int:
        """Add what was saved to the tallies, which are empty; returns the rows done. TrainingError if nothing is."""
        folder, identity = self._place()
        try:
            saved = checkpoint.load(folder, identity, note)
        except TrainingError as error:
            if checkpoint.newest(folder):
                raise
            raise TrainingError(
                "nothing to resume: no evaluation with just these settings was interrupted; leave --resume out"
            ) from error
        for i, tally in enumerate(self._tallies):
            tally.merge(_of(saved.tensors, i))
        return saved.done

    def offer(self, done: int) -> None:
        """Save the tallies after `done` rows, if it is time."""
        if self._schedule.due():
            folder, identity = self._place()
            for other in self._root.glob("*"):
                if time.time() - other.stat().st_mtime > _STALE:
                    shutil.rmtree(other, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._schedule.saved(checkpoint.save(folder, done, named(self._tallies), {}, identity).seconds)

    def saved(self) -> int:
        """Rows done at the last save; 0 if there was none."""
        return checkpoint.newest(self._known[0]) if self._known else 0

    def remove(self) -> None:
        """The evaluation is complete."""
        if self._known:
            shutil.rmtree(self._known[0], ignore_errors=True)


def named(tallies: Sequence[Tally]) -> dict[str, Tensor]:
    """All tensors of the tallies, under names of their own."""
    return {f"{i}.{name}": tensor for i, tally in enumerate(tallies) for name, tensor in tally.everything().items()}


def merge(tallies: Sequence[Tally], others: Sequence[dict[str, Tensor]]) -> None:
    """Add what other ranks saw, in the order of their rows: their `named` tensors."""
    for tensors in others:
        for i, tally in enumerate(tallies):
            tally.merge(_of(tensors, i))


def _of(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(i)}


def crc(tensors: Sequence[Tensor]) -> int:
    """Of all bytes of `tensors`."""
    found = 0
    for tensor in tensors:
        for piece in torch.split(tensor.detach().flatten(), 1 << 22):
            found = zlib.crc32(piece.cpu().contiguous().view(torch.uint8).numpy().data, found)
    return found
