"""Which features of an SAE fire together: partners, clusters, and groups that exclude each other.

docs/cooccurrence.md has the definitions, and what they find. Memory and time are bounded: `_MOST_FIRINGS`,
`_MOST_PRODUCTS`.

Shapes: F features, P places of the text (row x context + position), C features of a block, S features that may exclude
others, D d_in, N firings or pairs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import pdtr
from torch import Tensor

from saezoo.evals.matching import FEWEST_FIRES, Floats, Indices, jaccard
from saezoo.features.events import Events
from saezoo.features.groups import Pair, cliques
from saezoo.features.records import Coactive
from saezoo.spreadsheets import inert_rows

PARTNERS = 10
TOGETHER = 0.3
"""Jaccard index from which on two features can be in one cluster."""
NEAR = 0.2
"""Cosine of the decoder directions from which on two features can be in one exclusive group."""
RARELY = 0.1
"""Of what independence would give: exclusive features fire together at most so often."""
_LEVEL = 0.05  # of the test that firing together so rarely is no chance, over all pairs
_MOST_FIRINGS = 50_000_000  # at 10 bytes each, in both orders: 500 MB
_MOST_PRODUCTS = 4_000_000_000  # sum over tokens of L0^2: what the counting costs
_BLOCK_CELLS = 1 << 22  # pairs counted at once: 32 MB as float64
_MOST_PAIRS = 32  # kept of each feature for clusters and for groups, so that no SAE makes more than F x 32


class Group(NamedTuple):
    """Features that fire together, or that exclude each other."""

    features: tuple[int, ...]
    """The strongest pair first."""
    mean: float
    """Over its pairs: of a cluster the Jaccard index, of an exclusive group the cosine of the decoder directions."""
    tokens: int
    """On which at least one of them fires."""
    both: int
    """Tokens on which two fire, summed over the pairs."""
    expected: float
    """What `both` would be if they fired independently."""


class Partners(Sequence[tuple[Coactive, ...]]):
    """The partners of every feature. Kept as arrays: a quarter of a million small tuples would make each round of
    Python's garbage collector as long as the work between two."""

    def __init__(self, blocks: Iterable[_Found]) -> None:
        counts_F, *columns = (np.concatenate(column) for column in zip(*blocks, strict=True))
        self._ends = np.concatenate([[0], np.cumsum(counts_F)])
        self._columns = columns

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partners) and list(self) == list(other)

    @overload
    def __getitem__(self, feature: int) -> tuple[Coactive, ...]: ...
    @overload
    def __getitem__(self, feature: slice) -> list[tuple[Coactive, ...]]: ...
    def __getitem__(self, feature: int | slice) -> tuple[Coactive, ...] | list[tuple[Coactive, ...]]:
        if isinstance(feature, slice):
            return [self[i] for i in range(*feature.indices(len(self)))]
        if not 0 <= feature < len(self):
            raise IndexError(feature)
        own = slice(self._ends[feature], self._ends[feature + 1])
        return tuple(Coactive(*row) for row in zip(*(column[own].tolist() for column in self._columns), strict=True))


class _Found(NamedTuple):
    """Of a block of features: how many partners each has [C]; all of them, feature by feature [N]."""

    counts_C: Indices
    feature_N: Indices
    both_N: Indices
    jaccard_N: Floats
    pmi_N: Floats


@dataclass(frozen=True)
class Cooccurrence:
    """What `cooccurrence` found."""

    tokens: int
    """Scored tokens that were counted; the text may have had more."""
    fires: tuple[int, ...]
    """Of each feature, on these tokens."""
    partners: Partners
    """Of each feature, the largest Jaccard index first."""
    clusters: tuple[Group, ...]
    """The one with the strongest pair first."""
    exclusive: tuple[Group, ...]
    """The one with the nearest pair first."""

    def pairs_csv(self) -> str:
        """One row for each feature and partner."""
        rows = (
            (a, b, self.fires[a], self.fires[b], both, self.fires[a] * self.fires[b] / self.tokens, index, pmi)
            for a, partners in enumerate(self.partners)
            for b, both, index, pmi in partners
        )
        header = ("feature_a", "feature_b", "fires_a", "fires_b", "both", "expected", "jaccard", "pmi")
        return _csv([header, *rows])

    def groups_csv(self) -> str:
        """One row for each feature of each group."""
        rows = (
            (kind, number, len(group.features), feature, self.fires[feature], *group[1:])
            for kind, groups in (("cluster", self.clusters), ("exclusive", self.exclusive))
            for number, group in enumerate(groups)
            for feature in group.features
        )
        header = ("kind", "group", "size", "feature", "fires", "mean", "tokens", "both", "expected")
        return _csv([header, *rows])


def cooccurrence(
    events: Events,
    scored_P: NDArray[np.bool_],
    W_dec_FD: Tensor,
    *,
    per_feature: int = PARTNERS,
    together: float = TOGETHER,
    near: float = NEAR,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Cooccurrence:
    """Partners, clusters and exclusive groups of the features of one SAE, from its firings.

    Args:
        events: the firings.
        scored_P: which places of the text are scored, in its order; its length is the number of places.
        W_dec_FD: the decoder, for the cosines of exclusive groups.
        per_feature: partners of each feature; fewer if it fires together with fewer.
        together: smallest Jaccard index of two features of a cluster.
        near: smallest cosine of two features of an exclusive group.
        on_progress: called with (features done, features in all).

    Every pair is counted, on the text up to the place where the counting would cost more than 4e9 products (the sum
    over tokens of L0^2), or hold more than 50 million firings: `tokens` says how many that were. With 24,576 features
    it holds at most about 1.1 GB.

    Two features exclude each other if they fire together on at most a tenth of the tokens that independence would give,
    and a Poisson variable of that mean is so small with a probability of at most 0.05 / pairs. Features that fire less
    than ten times have no partners and are in no group. Of each feature the 32 strongest pairs can be in clusters, and
    in groups. The same firings give the same result.
    """
    fires_FP, tokens = _matrix(events, scored_P)
    n_F, fires_PF = np.diff(fires_FP.indptr).astype(np.int64), fires_FP.T.tocsr()
    test, features = _Test.of(n_F, tokens), len(n_F)
    unit_SD = _units(W_dec_FD)[test.possible]
    partners: list[_Found] = []
    coactive: list[Pair] = []
    exclusive: list[Pair] = []
    step = max(1, _BLOCK_CELLS // max(1, features))
    for start in range(0, features, step):
        own = range(start, min(start + step, features))
        both_CF = _together(fires_FP, fires_PF, own)
        found = _largest(_jaccard(both_CF, n_F, own), max(per_feature, _MOST_PAIRS))
        partners.append(_partners(found.first(per_feature), both_CF, n_F, own, tokens))
        coactive += found.first(_MOST_PAIRS).pairs(start, at_least=together)
        exclusive += _exclusive(both_CF, unit_SD, test, own, near).first(_MOST_PAIRS).pairs(start)
        on_progress(own.stop, features)
    return Cooccurrence(
        tokens=tokens,
        fires=tuple(n_F.tolist()),
        partners=Partners(partners),
        clusters=_groups(coactive, fires_FP, tokens),
        exclusive=_groups(exclusive, fires_FP, tokens),
    )


def _matrix(events: Events, scored_P: NDArray[np.bool_]) -> tuple[csr_matrix, int]:
    """Which feature fires where [F, P], 1 where one does, and how many tokens are counted."""
    l0_P = np.zeros(len(scored_P), dtype=np.int64)
    features = range(events.n_features)
    for _, (token_N, _) in events.each(features):
        l0_P[token_N] += 1
    fits_P = (np.cumsum(l0_P**2) <= _MOST_PRODUCTS) & (np.cumsum(l0_P) <= _MOST_FIRINGS)
    end = max(1, int(fits_P.sum()))  # both sums only grow
    ends, indices = [0], np.empty(int(l0_P[:end].sum()), dtype=np.int32)
    for _, (token_N, _) in events.each(features):
        kept = int(np.searchsorted(token_N, end))
        indices[ends[-1] : ends[-1] + kept] = token_N[:kept]
        ends.append(ends[-1] + kept)
    ones_N = np.ones(len(indices), dtype=np.int8)
    return csr_matrix((ones_N, indices, np.array(ends)), shape=(events.n_features, end)), int(scored_P[:end].sum())


def _together(fires_FP: csr_matrix, fires_PF: csr_matrix, own: range) -> Indices:
    """Tokens on which a feature of `own` and any feature fire [C, F].

    Counts what fires on the tokens of each: a third of the time of scipy's sparse product, which goes over them twice.
    """
    both_CF = np.empty((len(own), fires_FP.shape[0]), dtype=np.int64)
    for i, feature in enumerate(own):
        places = fires_FP.indices[fires_FP.indptr[feature] : fires_FP.indptr[feature + 1]]
        both_CF[i] = np.bincount(fires_PF[places].indices, minlength=both_CF.shape[1])
    return both_CF


def _units(W_FD: Tensor) -> Tensor:
    """The directions with norm 1, or 0 where they are 0; float32 on the CPU."""
    return torch.nn.functional.normalize(W_FD.detach().cpu().float(), eps=torch.finfo(torch.float32).tiny)


def _jaccard(both_CF: Indices, n_F: Indices, own: range) -> Floats:
    """Of each pair; 0 of a feature with itself, and where one of them is rare."""
    jaccard_CF, rare_F = jaccard(both_CF, n_F[own, None], n_F), n_F < FEWEST_FIRES
    jaccard_CF[rare_F[own]] = 0
    jaccard_CF[:, rare_F] = 0
    jaccard_CF[range(len(own)), own] = 0
    return jaccard_CF


class _Cells(NamedTuple):
    """Cells of a table [C, F], row by row, the largest weight of a row first; equal ones by column."""

    row_N: Indices
    column_N: Indices
    weight_N: Floats

    @staticmethod
    def of(row_N: Indices, column_N: Indices, weight_N: NDArray[Any]) -> _Cells:
        """Sorted."""
        order_N = np.lexsort((column_N, -weight_N, row_N))
        return _Cells(row_N[order_N], column_N[order_N], weight_N[order_N].astype(np.float64))

    def where(self, chosen_N: NDArray[np.bool_]) -> _Cells:
        """Some of them."""
        return _Cells(self.row_N[chosen_N], self.column_N[chosen_N], self.weight_N[chosen_N])

    def first(self, most: int) -> _Cells:
        """At most so many of each row."""
        return self.where(np.arange(len(self.row_N)) - np.searchsorted(self.row_N, self.row_N) < most)

    def pairs(self, start: int, at_least: float = -np.inf) -> list[Pair]:
        """As pairs of features; `start`: that of the first row."""
        columns = (column.tolist() for column in self.where(self.weight_N >= at_least))
        return [Pair(min(start + i, j), max(start + i, j), w) for i, j, w in zip(*columns, strict=True)]


def _largest(weight_CF: Floats, most: int) -> _Cells:
    """The `most` largest weights above 0 of each row, and those equal to the last of them."""
    most = min(most, weight_CF.shape[1])
    least_C1 = -np.partition(-weight_CF, most - 1, axis=1)[:, most - 1, None]
    row_N, column_N = np.nonzero((weight_CF >= least_C1) & (weight_CF > 0))
    return _Cells.of(row_N, column_N, weight_CF[row_N, column_N])


def _partners(cells: _Cells, both_CF: Indices, n_F: Indices, own: range, tokens: int) -> _Found:
    row_N, column_N, jaccard_N = cells
    both_N = both_CF[row_N, column_N]
    pmi_N = np.log2(both_N * (tokens / n_F[own.start + row_N]) / n_F[column_N])
    return _Found(np.bincount(row_N, minlength=len(own)), column_N, both_N, jaccard_N, pmi_N)


class _Test(NamedTuple):
    """Whether two features fire together so rarely that they exclude each other."""

    n_F: Indices
    tokens: int
    level: float
    possible: Indices
    """Features that fire often enough for a pair with the most frequent one to pass."""

    @staticmethod
    def of(n_F: Indices, tokens: int) -> _Test:
        """Over all pairs of features that are not rare."""
        usual = int((n_F >= FEWEST_FIRES).sum())
        level = _LEVEL / max(1, usual * (usual - 1) // 2)
        enough_F = (n_F >= FEWEST_FIRES) & (n_F * n_F.max(initial=0) >= -np.log(level) * tokens)
        return _Test(n_F, tokens, level, np.flatnonzero(enough_F))

    def passes(self, i_N: Indices, j_N: Indices, both_N: Indices) -> NDArray[np.bool_]:
        """For each pair."""
        expected_N = self.n_F[i_N] * (self.n_F[j_N] / max(1, self.tokens))
        passed: NDArray[np.bool_] = (both_N <= RARELY * expected_N) & (pdtr(both_N, expected_N) <= self.level)
        return passed


def _exclusive(both_CF: Indices, unit_SD: Tensor, test: _Test, own: range, near: float) -> _Cells:
    """The pairs that exclude each other, with their cosines; `unit_SD`: the directions of those that may."""
    first, last = np.searchsorted(test.possible, (own.start, own.stop))
    cosine = (unit_SD[first:last] @ unit_SD.T).numpy()
    i_N, j_N = np.nonzero(cosine >= near)
    feature_N, column_N = test.possible[first + i_N], test.possible[j_N]
    both_N = both_CF[feature_N - own.start, column_N]
    passed_N = test.passes(feature_N, column_N, both_N)
    return _Cells.of(feature_N[passed_N] - own.start, column_N[passed_N], cosine[i_N, j_N][passed_N])


def _groups(pairs: list[Pair], fires_FP: csr_matrix, tokens: int) -> tuple[Group, ...]:
    """The cliques, with what they cover."""
    found = []
    for features, mean in cliques(sorted(set(pairs))):
        fires_GP = fires_FP[list(features)]
        at_once = np.bincount(fires_GP.indices)
        n_G = np.diff(fires_GP.indptr).astype(float)
        expected = (n_G.sum() ** 2 - (n_G**2).sum()) / 2 / tokens
        both = int((at_once * (at_once - 1) // 2).sum())
        found.append(Group(features, mean, int(np.count_nonzero(at_once)), both, float(expected)))
    return tuple(found)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(inert_rows(rows))
    return text.getvalue()
