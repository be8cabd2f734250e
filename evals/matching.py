"""Which directions of one set correspond to which of another: nearest neighbours, and the best one-to-one matching.

The best matching is a linear program: over all pairs (i, j), maximise the sum of c_ij x_ij with at most one partner for
each direction. Its dual has a price u_i >= 0, v_j >= 0 for each direction and asks for u_i + v_j >= c_ij at every pair;
any such prices sum to at least the total of any matching. The full matrix of cosines (24,576 x 24,576 is 2.4 GB) is
never held. Instead:

1. the `k` nearest neighbours of every direction, either way, are the first candidates;
2. the best matching among candidates is found exactly (Jonker and Volgenant 1987, scipy's sparse implementation), and
   prices for it that no candidate violates;
3. one blocked product over *all* pairs looks for pairs that violate the prices. If there are none, the matching is
   optimal over all pairs. If there are, they become candidates, and it goes on with 2.

That is column generation (Ford and Fulkerson 1958, Gilmore and Gomory 1961). Raising the prices by what is violated
gives an upper bound of the optimum at any time, so that a search that stops early says by how much it may have missed.

Products are in float32 and only *nominate*: wherever a nomination might be a rounding error the cosine is taken again
in float64, and those decide.

Shapes: F directions of the first set, G of the second, D dimensions, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.special import betainc
from torch import Tensor

from saezoo.errors import WeightsError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
OnProgress = Callable[[str, int, int], None]

CANDIDATES = 16
"""Nearest neighbours of each direction that are candidates from the start."""
ROUNDS = 20
FEWEST_FIRES = 10
"""A feature that fired less often is left out of the co-activation: two sets so small may agree by chance."""
_COUNT_BLOCK = 256  # features counted at once: against 24,576 their counts are 25 MB, their Jaccard indices 50 MB
_BLOCK_BYTES = 64 << 20  # of one block of cosines, float32
_PAIRS_AT_ONCE = 1 << 14  # float64 cosines of single pairs; two gathers of [16384, 768] are 200 MB
_TOLERANCE = 1e-10  # a pair that violates the prices by less is no reason for another round
_NEARLY = 2e-3  # with the pairs that violate, those that nearly do become candidates: saves rounds
_MOST_NEW = 64  # new candidates per direction and round


@dataclass(frozen=True)
class Matching:
    """How two sets of directions correspond. An index of -1 is "none", and the cosine beside it means nothing."""

    nearest_ab_F: Indices
    """The direction of the second set with the largest cosine; the lowest index if several have it."""
    nearest_ab_cosine_F: Floats
    nearest_ba_G: Indices
    nearest_ba_cosine_G: Floats
    partner_F: Indices
    """One-to-one: in the second set, such that the sum of all partners' cosines is as large as possible."""
    partner_cosine_F: Floats
    """Above 0: directions that are orthogonal or opposed are not matched."""
    undefined_a: Indices
    """Directions of norm 0: no cosine, no neighbour, no partner."""
    undefined_b: Indices
    bound: float
    """No one-to-one matching has a larger total."""
    rounds: int
    """Products over all pairs that were needed, besides the two of the neighbours' search."""

    @property
    def total(self) -> float:
        """The sum of the partners' cosines."""
        return float(self.partner_cosine_F[self.partner_F >= 0].sum())

    @property
    def gap(self) -> float | None:
        """(bound - total) / bound; at most rounding if the matching is optimal. None if nothing can be matched."""
        return max(0.0, 1 - self.total / self.bound) if self.bound > 0 else None


def match(
    a_FD: Tensor,
    b_GD: Tensor,
    *,
    candidates: int = CANDIDATES,
    rounds: int = ROUNDS,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Matching:
    """Nearest neighbours by cosine, both ways, and the one-to-one matching of the largest total cosine.

    Args:
        a_FD, b_GD: the directions, as rows of any norm.
        candidates: nearest neighbours of each direction to start from. Changes the time, not how good the result is.
        rounds: stop after so many products over all pairs; `gap` then says what that may have cost.
        on_progress: called with (what is being done, directions done, directions in all).

    The same input gives the same result. Where several matchings have the largest total, it is one of them.
    Raises WeightsError if a direction is not finite.
    """
    a_FD, known_a = _directions(a_FD, "first")
    b_GD, known_b = _directions(b_GD, "second")
    near_ab = _nearest(a_FD, b_GD, candidates, "nearest neighbours", on_progress)
    near_ba = _nearest(b_GD, a_FD, candidates, "nearest neighbours, the other way", on_progress)
    pairs = _Pairs.union(near_ab, near_ba.swapped())
    partner_F, bound, done = np.full(len(a_FD), -1), 0.0, 0
    while len(pairs.cosine_P) and done < rounds:
        partner_F = _assign(pairs)
        u_F, v_G = _prices(pairs, partner_F)
        done += 1
        stage = f"one-to-one matching, round {done}"
        bound, violating = _violations(a_FD, b_GD, u_F, v_G, partial(on_progress, stage))
        if violating is None:
            break
        pairs = _Pairs.union(pairs, violating)
    back_a, back_b = np.flatnonzero(known_a), np.flatnonzero(known_b)
    to_b, ab_cosine = near_ab.best()
    to_a, ba_cosine = near_ba.best()
    matched = partner_F >= 0
    partner_cosine = np.zeros(len(back_a))
    partner_cosine[matched] = _cosines(a_FD, b_GD, np.flatnonzero(matched), partner_F[matched])
    return Matching(
        nearest_ab_F=_spread(_named(to_b, back_b), known_a, -1),
        nearest_ab_cosine_F=_spread(ab_cosine, known_a, 0.0),
        nearest_ba_G=_spread(_named(to_a, back_a), known_b, -1),
        nearest_ba_cosine_G=_spread(ba_cosine, known_b, 0.0),
        partner_F=_spread(_named(partner_F, back_b), known_a, -1),
        partner_cosine_F=_spread(partner_cosine, known_a, 0.0),
        undefined_a=np.flatnonzero(~known_a),
        undefined_b=np.flatnonzero(~known_b),
        bound=bound,
        rounds=done,
    )


def nearest(a_FD: Tensor, b_GD: Tensor, *, candidates: int = CANDIDATES) -> tuple[Indices, Floats]:
    """For each direction of the first set the nearest of the second [F] and its cosine [F]; -1 where there is none.

    Raises WeightsError if a direction is not finite.
    """
    a_FD, known_a = _directions(a_FD, "first")
    b_GD, known_b = _directions(b_GD, "second")
    index_F, cosine_F = _nearest(a_FD, b_GD, candidates, "", lambda stage, done, total: None).best()
    return _spread(_named(index_F, np.flatnonzero(known_b)), known_a, -1), _spread(cosine_F, known_a, 0.0)


def expected_max_cosine(directions: int, dimensions: int) -> float:
    """Mean of the largest of the cosines between one direction and `directions` random ones, uniform on the sphere.

    (1 + c) / 2 of a random cosine c has the distribution Beta((d - 1) / 2, (d - 1) / 2); the mean of the largest of n
    is 1 - integral of P(c <= t)^n from -1 to 1, here by the midpoint rule.
    """
    steps = 200_000
    t = (np.arange(steps) + 0.5) / steps  # (1 + cosine) / 2
    half = (dimensions - 1) / 2
    below = betainc(half, half, t) if dimensions > 1 else np.full(steps, 0.5)
    return float(1 - 2 * np.mean(below**directions))


@dataclass(frozen=True)
class Coactivation:
    """For each feature the one of the other SAE with the largest Jaccard index; the lowest such, -1 if none."""

    best_ab_F: Indices
    jaccard_ab_F: Floats
    best_ba_G: Indices
    jaccard_ba_G: Floats


def coactivation(fires_MF: csr_matrix, fires_MG: csr_matrix) -> Coactivation:
    """The best pairs of features by when they fire, exactly: every pair that fires together is counted.

    n_ij tokens on which both fire are the product of the two sparse matrices, taken in blocks of rows; Jaccard is
    n_ij / (n_i + n_j - n_ij). Features that fired less than `FEWEST_FIRES` times have none.
    """
    n_F, n_G = counts(fires_MF), counts(fires_MG)
    fires_FM = fires_MF.T.tocsr()
    best = Coactivation(np.full(len(n_F), -1), np.zeros(len(n_F)), np.full(len(n_G), -1), np.zeros(len(n_G)))
    usual_G = n_G >= FEWEST_FIRES
    for start in range(0, len(n_F), _COUNT_BLOCK):
        block = slice(start, start + _COUNT_BLOCK)
        jaccard_CG = jaccard((fires_FM[block] @ fires_MG).toarray(), n_F[block, None], n_G)
        jaccard_CG *= (n_F[block, None] >= FEWEST_FIRES) & usual_G
        best.best_ab_F[block], best.jaccard_ab_F[block] = jaccard_CG.argmax(1), jaccard_CG.max(1)
        highest_G = jaccard_CG.max(0)
        larger_G = highest_G > best.jaccard_ba_G
        best.best_ba_G[larger_G] = start + jaccard_CG[:, larger_G].argmax(0)
        best.jaccard_ba_G[larger_G] = highest_G[larger_G]
    best.best_ab_F[best.jaccard_ab_F == 0] = -1
    return best


def jaccard(both: Indices, n_i: Indices, n_j: Indices) -> Floats:
    """Tokens on which both fire by tokens on which either does; 0 where neither ever fires."""
    found: Floats = both / np.maximum(n_i + n_j - both, 1)
    return found


def counts(fires_MF: csr_matrix) -> Indices:
    """Tokens on which each feature fires [F]."""
    return np.bincount(fires_MF.indices, minlength=fires_MF.shape[1])


@dataclass(frozen=True)
class _Pairs:
    """Candidate pairs of directions and their cosines in float64."""

    i_P: Indices
    j_P: Indices
    cosine_P: Floats
    shape: tuple[int, int]

    @staticmethod
    def union(one: _Pairs, other: _Pairs) -> _Pairs:
        """Pairs of either with a cosine above 0, each once, sorted by i and then j."""
        i_P, j_P = np.concatenate([one.i_P, other.i_P]), np.concatenate([one.j_P, other.j_P])
        cosine_P = np.concatenate([one.cosine_P, other.cosine_P])
        key_P, first_P = np.unique(i_P * one.shape[1] + j_P, return_index=True)
        first_P = first_P[cosine_P[first_P] > 0]
        return _Pairs(i_P[first_P], j_P[first_P], cosine_P[first_P], one.shape)

    def swapped(self) -> _Pairs:
        """The same pairs seen from the second set."""
        return _Pairs(self.j_P, self.i_P, self.cosine_P, (self.shape[1], self.shape[0]))

    def best(self) -> tuple[Indices, Floats]:
        """For each i the j of the largest cosine (the lowest such j), and the cosine; -1 if i is in no pair."""
        index_F, cosine_F = np.full(self.shape[0], -1), np.zeros(self.shape[0])
        order_P = np.lexsort((self.j_P, -self.cosine_P, self.i_P))
        i, first = np.unique(self.i_P[order_P], return_index=True)
        index_F[i], cosine_F[i] = self.j_P[order_P[first]], self.cosine_P[order_P[first]]
        return index_F, cosine_F


def _directions(rows_FD: Tensor, which: str) -> tuple[Tensor, NDArray[np.bool_]]:
    """The rows of norm above 0, divided by it, in float64; and which these are."""
    rows_FD = rows_FD.detach().cpu().double()
    if not rows_FD.isfinite().all():
        bad = int((~rows_FD.isfinite().all(1)).nonzero()[0])
        raise WeightsError(f"direction {bad} of the {which} set is not finite; there is no cosine with it")
    largest_F1 = rows_FD.abs().amax(1, keepdim=True)
    known_F = largest_F1[:, 0] > 0
    scaled = rows_FD[known_F] / largest_F1[known_F]  # so that squares neither overflow nor vanish
    return scaled / scaled.norm(dim=1, keepdim=True), known_F.numpy()


def _nearest(a_FD: Tensor, b_GD: Tensor, k: int, stage: str, on_progress: OnProgress) -> _Pairs:
    """The `k` largest cosines of each direction of the first set."""
    parts = [torch.zeros(0, min(k, len(b_GD)), dtype=torch.int64)]
    b_half_GD = b_GD.float()
    for start, block in _blocks(a_FD.float(), len(b_GD)):
        parts.append((block @ b_half_GD.T).topk(min(k, len(b_GD)), dim=1).indices)
        on_progress(stage, start + len(block), len(a_FD))
    j_Fk = torch.cat(parts).numpy()
    i_P = np.repeat(np.arange(len(j_Fk)), j_Fk.shape[1])
    return _Pairs(i_P, j_Fk.ravel(), _cosines(a_FD, b_GD, i_P, j_Fk.ravel()), (len(a_FD), len(b_GD)))


def _blocks(a_FD: Tensor, others: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) such that their cosines with `others` directions fit one block; none if there are no others."""
    step = max(1, _BLOCK_BYTES // (4 * max(1, others)))
    for start in range(0, len(a_FD) if others else 0, step):
        yield start, a_FD[start : start + step]


def _cosines(a_FD: Tensor, b_GD: Tensor, i_P: Indices, j_P: Indices) -> Floats:
    """float64 cosines of single pairs [P]."""
    found = [np.zeros(0)]
    for start in range(0, len(i_P), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        found.append((a_FD[torch.from_numpy(i_P[part])] * b_GD[torch.from_numpy(j_P[part])]).sum(1).numpy())
    return np.concatenate(found)


def _assign(pairs: _Pairs) -> Indices:
    """The partner of each direction of the first set in the best matching among `pairs`, or -1.

    Each has a column of its own besides, at cosine 0, so that scipy finds a full matching: that is "no partner". All
    costs are taken from 2, since scipy drops zeros; every full matching has the same number of pairs.
    """
    f, g = pairs.shape
    cost = np.concatenate([2 - pairs.cosine_P, np.full(f, 2.0)])
    rows, columns = np.concatenate([pairs.i_P, np.arange(f)]), np.concatenate([pairs.j_P, g + np.arange(f)])
    _, column_F = min_weight_full_bipartite_matching(csr_matrix((cost, (rows, columns)), shape=(f, g + f)))
    return np.where(column_F < g, column_F, -1).astype(np.int64)


def _prices(pairs: _Pairs, partner_F: Indices) -> tuple[Floats, Floats]:
    """Prices u [F], v [G] for an optimal matching of `pairs`: their sum is its total, no pair violates them.

    The smallest possible v and the smallest possible u are both such prices; half-way between them the fewest pairs
    outside `pairs` are violated.
    """
    back_G = np.full(pairs.shape[1], -1)
    matched = partner_F >= 0
    back_G[partner_F[matched]] = np.flatnonzero(matched)
    u_F, least_v_G = _least_prices(pairs, partner_F)
    v_G, least_u_F = _least_prices(pairs.swapped(), back_G)
    return (u_F + least_u_F) / 2, (v_G + least_v_G) / 2


def _least_prices(pairs: _Pairs, partner_F: Indices) -> tuple[Floats, Floats]:
    """Prices with the smallest possible v: raised from 0 until no pair is violated (Bellman and Ford's iteration)."""
    order_P = np.argsort(pairs.j_P, kind="stable")
    i_P, j_P, cosine_P = pairs.i_P[order_P], pairs.j_P[order_P], pairs.cosine_P[order_P]
    firsts = np.flatnonzero(np.diff(j_P, prepend=-1))
    own_P = partner_F[i_P] == j_P
    own_F = np.zeros(len(partner_F))
    own_F[i_P[own_P]] = cosine_P[own_P]
    v_G = np.zeros(pairs.shape[1])
    for _ in range(sum(pairs.shape) + 1):
        u_F = np.where(partner_F >= 0, own_F - v_G[partner_F], 0.0)
        least = np.maximum.reduceat(cosine_P - u_F[i_P], firsts)
        raised = least - v_G[j_P[firsts]]
        if raised.max() <= 1e-14:
            break
        v_G[j_P[firsts]] += raised.clip(min=0)
    return u_F, v_G


def _violations(
    a_FD: Tensor, b_GD: Tensor, u_F: Floats, v_G: Floats, on_block: Callable[[int, int], None]
) -> tuple[float, _Pairs | None]:
    """What all pairs say about the prices: the upper bound that follows, and the pairs with u_i + v_j < c_ij together
    with those that nearly are such; None if no pair is.

    The product gives c_ij - u_i - v_j in float32. Its error is below `margin`: at most (D + 8) 2^-24 (each rounding,
    Higham 2002, 3.5) times the norms of both rows, at most the square root of 3 each. What comes so near 0 is taken
    again in float64. Of a direction with very many such pairs (duplicates) only some are, random ones among equals so
    that not all directions choose the same; the bound allows for the rest.
    """
    margin = 3 * (a_FD.shape[1] + 8) * 2.0**-24
    reach = max(margin, _NEARLY)
    u_F1, v_G1 = torch.from_numpy(u_F)[:, None], torch.from_numpy(v_G)[:, None]
    left = torch.cat([a_FD, -u_F1, -torch.ones_like(u_F1)], 1).float()
    right = torch.cat([b_GD, torch.ones_like(v_G1), v_G1], 1).float()
    raise_F, violated = np.zeros(len(u_F)), False
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Indices, Indices, Floats]] = []
    for start, block in _blocks(left, len(b_GD)):
        over = block @ right.T
        i, j = (over > -reach).nonzero(as_tuple=True)
        if len(i) > _MOST_NEW * len(block):
            jitter = margin * torch.rand(over.shape, generator=generator)
            values, most = (over + jitter).topk(min(_MOST_NEW + 1, len(b_GD)), dim=1)
            raise_F[start : start + len(block)] = (values[:, -1].double() + margin).clamp(min=0).numpy()
            i, place = (values > -reach).nonzero(as_tuple=True)
            j = most[i, place]
        i_P, j_P = i.numpy() + start, j.numpy()
        cosine_P = _cosines(a_FD, b_GD, i_P, j_P)
        over_P = cosine_P - u_F[i_P] - v_G[j_P]
        np.maximum.at(raise_F, i_P, over_P)
        violated |= bool((over_P > _TOLERANCE).any())
        found.append((i_P, j_P, cosine_P))
        on_block(start + len(block), len(left))
    i_P, j_P, cosine_P = (np.concatenate(part) for part in zip(*found, strict=True))
    bound = float(u_F.sum() + v_G.sum() + raise_F.sum())
    return bound, _Pairs(i_P, j_P, cosine_P, (len(a_FD), len(b_GD))) if violated else None


def _named(index_F: Indices, names: Indices) -> Indices:
    """`names[index]`, and -1 for -1."""
    return np.append(names, -1)[index_F]


def _spread(values: NDArray[Any], known_F: NDArray[np.bool_], other: float) -> NDArray[Any]:
    """`values` at the places of `known_F`, `other` elsewhere."""
    spread = np.full(len(known_F), other, dtype=values.dtype)
    spread[known_F] = values
    return spread
