"""Every firing of an SAE on a text, on disk: written in the order of the text, read by feature.

A dashboard needs, of each feature, things that no running sum can give exactly: quantiles, a histogram between a
minimum and a maximum that are known at the end only, co-activation. So the one pass over the text writes all firings
down, 8 bytes each, in parts; each part is sorted by feature, and whatever is asked of a feature is computed from all
of its firings. Memory holds one part, or one feature; the disk holds 8 bytes x tokens x L0.

Shapes: F features, N firings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from saezoo import files
from saezoo.errors import SaezooError

PART = 8_000_000
"""Firings in a part: 64 MB on disk, and about 300 MB of memory while it is sorted."""
BYTES = 8
"""Of one firing on disk."""
_NAME = re.compile(r"part-(\d{12})\.safetensors")


class Firings(NamedTuple):
    """All firings of one feature, in the order of the text."""

    token_N: NDArray[np.int64]
    """row x context + position."""
    value_N: NDArray[np.float32]
    """Above 0."""


class Writer:
    """Takes the firings of one SAE as they come, and writes a part whenever there are enough."""

    def __init__(self, folder: Path, n_features: int, part: int = PART) -> None:
        self._folder, self._n_features, self._part = folder, n_features, part
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n = 0

    def add(self, feature_N: Tensor, token_N: Tensor, value_N: Tensor) -> None:
        """Firings of tokens that all come after those added before."""
        self._waiting.append((feature_N.cpu().int(), token_N.cpu(), value_N.cpu().float()))
        self._n += len(feature_N)
        if self._n >= self._part:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting. SaezooError if the disk is full."""
        if not self._n:
            return
        feature_N, token_N, value_N = (torch.cat(column) for column in zip(*self._waiting, strict=True))
        order_N = torch.sort(feature_N, stable=True).indices
        ends = np.concatenate([[0], np.cumsum(np.bincount(feature_N.numpy(), minlength=self._n_features))])
        tensors: dict[str, NDArray[Any]] = {
            "ends": ends.astype(np.int64),
            "token": token_N[order_N].numpy().astype(np.uint32),
            "value": value_N[order_N].numpy(),
        }
        path = self._folder / f"part-{int(token_N.min()):012d}.safetensors"
        with files.replacing(path) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise SaezooError(f"cannot write {path}: {error}; is the disk full?") from None
        self._waiting, self._n = [], 0


def parts(folder: Path) -> dict[int, Path]:
    """The parts there: first token -> file, in the order of the text."""
    found = {int(match[1]): path for path in folder.glob("part-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


class Events:
    """The firings that a `Writer` wrote."""

    def __init__(self, folders: Sequence[Path], n_features: int) -> None:
        """`folders`: in the order of the text, one for each rank that wrote."""
        paths = [path for folder in folders for path in parts(folder).values()]
        self._files: list[Any] = [safe_open(path, "np") for path in paths]
        self._ends = [file.get_tensor("ends") for file in self._files]
        self.n_features = n_features
        self.fires_F: NDArray[np.int64] = sum(map(np.diff, self._ends), np.zeros(n_features, dtype=np.int64))

    def of(self, feature: int) -> Firings:
        """One feature's."""
        (firings,) = self.block(feature, feature + 1)
        return firings

    def block(self, start: int, stop: int) -> list[Firings]:
        """Those of features start..stop-1: read together, for the parts' files are read in large pieces."""
        pieces: list[list[Firings]] = [[] for _ in range(start, stop)]
        for file, ends in zip(self._files, self._ends, strict=True):
            first, last = int(ends[start]), int(ends[stop])
            if first == last:
                continue  # safetensors refuses an empty slice at the end
            token_N, value_N = (file.get_slice(name)[first:last] for name in ("token", "value"))
            for i, piece in enumerate(pieces):
                own = slice(int(ends[start + i]) - first, int(ends[start + i + 1]) - first)
                piece.append(Firings(token_N[own], value_N[own]))
        return [_joined(piece) for piece in pieces]

    def each(self, features: Sequence[int]) -> Iterator[tuple[int, Firings]]:
        """Of `features`, in ascending order, each with its firings."""
        for start, stop in self.blocks(features):
            yield from zip(range(start, stop), self.block(start, stop), strict=True)

    def blocks(self, features: Sequence[int], most: int = PART) -> list[tuple[int, int]]:
        """`features`, in ascending order, as ranges (start, stop) of neighbours with at most `most` firings together,
        or one feature."""
        found: list[tuple[int, int]] = []
        held = 0
        for feature in features:
            held += int(self.fires_F[feature])
            if found and found[-1][1] == feature and held <= most:
                found[-1] = (found[-1][0], feature + 1)
            else:
                found.append((feature, feature + 1))
                held = int(self.fires_F[feature])
        return found


def _joined(pieces: list[Firings]) -> Firings:
    if not pieces:
        return Firings(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    token_N, value_N = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Firings(token_N.astype(np.int64), value_N)
