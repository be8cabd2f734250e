"""Does a feature's dashboard mislead? How far the tokens of its top examples differ from those of its usual firings.

1 - Morisita's overlap index of two distributions over tokens: p, that of the firings shown as top examples, and q, that
of the firings in the middle. Morisita 1959, Mem. Fac. Sci. Kyushu Univ. E 3:65; Horn 1966, The American Naturalist
100:419. docs/divergence.md has how often the interval covers the truth.

Shapes: N top firings, M firings in the middle, E pairs of a document and a token in it, D documents.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from saezoo.evals.intervals import FEWEST
from saezoo.results import Measured

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


def divergence(top_N: Indices, top_documents_N: Indices, middle_M: Indices, middle_documents_M: Indices) -> Measured:
    """1 - 2 p.q / (p.p + q.q): 0 if both have the same tokens equally often, 1 if they have none in common.

    `top_N`, `middle_M`: ids of the tokens on which the feature fires; beside them their documents. p.p, the
    probability that two draws from p are the same token, is the fraction of pairs of firings *in different documents*
    that are; q.q and p.q likewise. With every firing in a document of its own that is Simpson's unbiased estimator, sum
    n_v (n_v - 1) / n (n - 1), which does not depend on the number of firings. Pairs within a document would add what
    the document is about.

    Interval: v -+ t c sqrt(s^2 + a^2 + b^2), with s^2 the variance by the delete-one-document jackknife. One more
    document among the k of the top examples, or among the m in the middle, would change the overlap by

        a = 2 q.q / (p.p + q.q) / k        b = 2 p.p / (p.p + q.q) / m

    if it was like the other side; without these terms, to see no overlap would mean that there is none (k, m: how many
    documents of equal size would be worth these, Kish). t and c as in `intervals.wilson`, for the smaller of k and m.
    Value and interval are cut to 0..1: p.q may by chance be larger than p.p and q.q.

    Undefined if all top firings, or all in the middle, are in one document, or if no token is in two documents of
    either. No interval with fewer than ten documents of either.
    """
    top_N, middle_M = np.asarray(top_N, dtype=np.int64), np.asarray(middle_M, dtype=np.int64)
    if not len(top_N) or not len(middle_M):
        return Measured(None)
    p_E, q_E, token_E, document_E = _counted(top_N, top_documents_N, middle_M, middle_documents_M)
    p_D, q_D = _sums(document_E, p_E), _sums(document_E, q_E)
    one_D, each_D = np.zeros(len(p_D), dtype=np.int64), np.arange(len(p_D))
    rates, rates_D = [], []
    for x_E, y_E, x_D, y_D in ((p_E, p_E, p_D, p_D), (p_E, q_E, p_D, q_D), (q_E, q_E, q_D, q_D)):
        same, same_D = _pairs(x_E, y_E, token_E, document_E)
        every, every_D = _pairs(x_D, y_D, one_D, each_D)
        if not every:
            return Measured(None)
        rates.append(same / every)
        # Nothing is left without one of two documents: nan, and the interval is unknown.
        left_D = np.where(every > every_D, every - every_D, np.nan)
        rates_D.append((same - same_D) / left_D)
    (pp, pq, qq), (pp_D, pq_D, qq_D) = rates, rates_D
    if pp + qq == 0:
        return Measured(None)
    value = 1 - 2 * pq / (pp + qq)
    if min(np.count_nonzero(p_D), np.count_nonzero(q_D)) < FEWEST or not (pp_D + qq_D > 0).all():
        return Measured(max(value, 0.0))
    k, m = _kish(p_D), _kish(q_D)
    variance = _jackknife(2 * pq_D / (pp_D + qq_D)) + ((2 * qq / k) ** 2 + (2 * pp / m) ** 2) / (pp + qq) ** 2
    effective = min(k, m)
    far = float(stdtrit(effective - 1, 0.975)) * math.sqrt(effective / (effective - 1) * variance)
    return Measured(*(min(max(number, 0.0), 1.0) for number in (value, value - far, value + far)))


def _counted(
    top_N: Indices, top_documents_N: Indices, middle_M: Indices, middle_documents_M: Indices
) -> tuple[Floats, Floats, Indices, Indices]:
    """Of each pair of a document and a token in it: how often it is among the top and in the middle, the token and the
    document, both numbered from 0."""
    documents = 1 + int(max(top_documents_N.max(), middle_documents_M.max()))
    sides = [
        np.unique(tokens * documents + of, return_counts=True)
        for tokens, of in ((top_N, top_documents_N), (middle_M, middle_documents_M))
    ]
    pair_E = np.union1d(sides[0][0], sides[1][0])
    p_E, q_E = np.zeros(len(pair_E)), np.zeros(len(pair_E))
    for count_E, (pairs, counts) in zip((p_E, q_E), sides, strict=True):
        count_E[np.searchsorted(pair_E, pairs)] = counts
    token_E, document_E = np.divmod(pair_E, documents)
    seen_D = np.bincount(document_E) > 0
    return p_E, q_E, np.cumsum(np.diff(token_E, prepend=token_E[0]) > 0), (np.cumsum(seen_D) - 1)[document_E]


def _pairs(x_E: Floats, y_E: Floats, token_E: Indices, document_E: Indices) -> tuple[float, Floats]:
    """Pairs of an x and a y in different documents with the same token: all, and those with one in each document [D].

    Whole numbers, and exact.
    """
    others_x_E = _sums(token_E, x_E)[token_E] - x_E
    others_y_E = _sums(token_E, y_E)[token_E] - y_E
    of_D = _sums(document_E, x_E * others_y_E + y_E * others_x_E)
    return float(of_D.sum()) / 2, of_D


def _sums(index_E: Indices, x_E: Floats) -> Floats:
    """The sum of the x of each index."""
    return np.bincount(index_E, x_E).astype(np.float64)  # which numpy's types take for whole numbers


def _jackknife(without_D: Floats) -> float:
    """Variance of a statistic by its values without each document."""
    n = len(without_D)
    return float((n - 1) / n * np.square(without_D - without_D.mean()).sum())


def _kish(sizes_D: Floats) -> float:
    return float(sizes_D.sum() ** 2 / np.square(sizes_D).sum())
