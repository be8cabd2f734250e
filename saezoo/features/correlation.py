"""Pearson correlation and cosine of features with the entries of the residual stream, and with each other.

Shapes: F features of the SAE, n those asked for, D d_in, N tokens, K correlates of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from saezoo.features.events import PART, Events, Firings

Doubles = NDArray[np.float64]
_EPS = 1e-6  # as SAEDashboard (utils_fns.RollingCorrCoef): what is constant, or 0, correlates by 0
_FIRINGS = PART  # of a block; 100 MB as a matrix
_CELLS = 1 << 22  # pairs of features at once: 32 MB for each of some arrays


@dataclass(frozen=True)
class Sums:
    """What the pass adds up over the scored tokens, of the activations x that the SAE reads (centred) and its features
    f; with `Events`, all that correlations need."""

    x_sum_D: Doubles
    x2_sum_D: Doubles
    """Of squares."""
    fx_sum_FD: Doubles
    """Of f_i x_d."""


class Moments(NamedTuple):
    """Sums of each feature, and of its squares."""

    sum_F: Doubles
    square_F: Doubles


class Correlates(NamedTuple):
    """Of each feature the K with the largest Pearson correlation, largest first."""

    index_nK: NDArray[np.int64]
    pearson_nK: Doubles
    cosine_nK: Doubles
    """Uncentred. SAEDashboard writes it in fields that end in `_l1`."""


def moments(events: Events) -> Moments:
    """Of every feature of the SAE."""
    found = np.zeros((2, events.n_features))
    for feature, firings in events.each(range(events.n_features)):
        value_N = firings.value_N.astype(np.float64)
        found[:, feature] = value_N.sum(), value_N @ value_N
    return Moments(found[0], found[1])


def with_neurons(sums: Sums, of: Moments, features: Sequence[int], tokens: int, k: int = 3) -> Correlates:
    """With the entries of x, over `tokens` scored tokens."""
    own = list(features)
    f = Moments(of.sum_F[own], of.square_F[own])
    x = Moments(sums.x_sum_D, sums.x2_sum_D)
    return _largest(*_both(sums.fx_sum_FD[own], f, x, tokens), k)


def with_features(events: Events, of: Moments, features: Sequence[int], tokens: int, k: int = 3) -> Correlates:
    """With all other features of the SAE, of `features`, in ascending order. Exact: the products are sparse, and taken
    in blocks, so that memory holds the firings of two blocks."""
    found: list[Correlates] = []
    for own in _groups(events, features):
        rows = _matrix(read(events, own))
        best: list[Correlates] = []
        for start, stop in events.blocks(range(events.n_features), _FIRINGS):
            columns = _matrix(events.block(start, stop))
            best.append(_between(rows, columns, of, np.array(own), start, tokens, k))
        found.append(_merged(best, k))
    return Correlates(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def read(events: Events, features: Sequence[int]) -> list[Firings]:
    """The firings of `features`, in ascending order, read in large pieces."""
    return [firings for _, firings in events.each(features)]


def _groups(events: Events, features: Sequence[int]) -> list[list[int]]:
    """`features`, as groups with at most `_FIRINGS` together, or one feature."""
    found: list[list[int]] = []
    held = 0
    for feature in features:
        held += int(events.fires_F[feature])
        if found and held <= _FIRINGS:
            found[-1].append(feature)
        else:
            found.append([feature])
            held = int(events.fires_F[feature])
    return found


def _between(
    rows: csr_matrix, columns: csr_matrix, of: Moments, own: NDArray[np.int64], start: int, tokens: int, k: int
) -> Correlates:
    """Of the features `own`, the rows, with those from `start` on, the columns."""
    size = max(rows.shape[1], columns.shape[1])
    rows.resize(rows.shape[0], size)
    columns.resize(columns.shape[0], size)
    columns_T = columns.T.tocsr()
    stop = start + columns.shape[0]
    y = Moments(*(part[start:stop] for part in of))
    step = max(1, _CELLS // columns.shape[0])
    found: list[Correlates] = []
    for first in range(0, len(own), step):
        some = own[first : first + step]
        pearson, cosine = _both(
            (rows[first : first + step] @ columns_T).toarray(), Moments(*(p[some] for p in of)), y, tokens
        )
        inside = np.flatnonzero((some >= start) & (some < stop))
        # With itself 1, which says nothing; 0 as in SAEDashboard.
        pearson[inside, some[inside] - start] = cosine[inside, some[inside] - start] = 0.0
        best = _largest(pearson, cosine, k)
        found.append(best._replace(index_nK=best.index_nK + start))
    return Correlates(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _matrix(block: list[Firings]) -> csr_matrix:
    """Features x tokens."""
    ends = np.cumsum([0, *(len(firings.token_N) for firings in block)])
    token_N = np.concatenate([firings.token_N for firings in block])
    value_N = np.concatenate([firings.value_N for firings in block]).astype(np.float64)
    return csr_matrix((value_N, token_N, ends), shape=(len(block), int(token_N.max(initial=0)) + 1))


def _both(product: Doubles, x: Moments, y: Moments, tokens: int) -> tuple[Doubles, Doubles]:
    """Pearson and cosine from the sums of products, of each x (rows) with each y (columns)."""
    cosine = product / (np.sqrt(np.outer(x.square_F, y.square_F)) + _EPS)
    x_spread, y_spread = (np.maximum(tokens * part.square_F - part.sum_F**2, 0.0) for part in (x, y))
    pearson = tokens * product - np.outer(x.sum_F, y.sum_F)
    return pearson / (np.sqrt(np.outer(x_spread, y_spread)) + _EPS), cosine


def _largest(pearson: Doubles, cosine: Doubles, k: int) -> Correlates:
    """Of each row; among equal ones the first, which torch's topk alone leaves open."""
    k = min(k, pearson.shape[1])
    enough_n = torch.from_numpy(pearson).topk(k).values[:, -1].numpy()
    row, index = np.nonzero(pearson >= enough_n[:, None])
    order = np.lexsort((index, -pearson[row, index], row))
    first_n = np.searchsorted(row, np.arange(len(pearson)))
    best_nK = index[order[first_n[:, None] + np.arange(k)]]
    return Correlates(best_nK, *(np.take_along_axis(part, best_nK, axis=1) for part in (pearson, cosine)))


def _in_order(found: Correlates, k: int) -> Correlates:
    """Largest first, equal ones by index; the first k."""
    order = np.lexsort((found.index_nK, -found.pearson_nK), axis=1)[:, :k]
    return Correlates(*(np.take_along_axis(part, order, axis=1) for part in found))  # type: ignore[arg-type]


def _merged(parts: list[Correlates], k: int) -> Correlates:
    return _in_order(Correlates(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))), k)
