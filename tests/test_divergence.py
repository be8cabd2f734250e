"""How far a feature's top examples are from its usual firings: known values, brute force, and what is undefined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from saezoo.features.divergence import divergence
from saezoo.results import Measured

Side = list[tuple[int, int]]
"""(token, document) of each firing."""


def measure(top: Side, middle: Side) -> Measured:
    (a, b), (c, d) = (np.array(side, dtype=np.int64).reshape(-1, 2).T for side in (top, middle))
    return divergence(a, b, c, d)


def own_documents(tokens: Sequence[int]) -> Side:
    return [(token, i) for i, token in enumerate(tokens)]


def brute(top: Side, middle: Side) -> float | None:
    """The definition, pair by pair."""

    def rate(pairs: list[tuple[tuple[int, int], tuple[int, int]]]) -> Fraction | None:
        apart = [a[0] == b[0] for a, b in pairs if a[1] != b[1]]
        return Fraction(sum(apart), len(apart)) if apart else None

    pp, qq = (rate(list(itertools.combinations(side, 2))) for side in (top, middle))
    pq = rate(list(itertools.product(top, middle)))
    if pp is None or qq is None or pq is None or pp + qq == 0:
        return None
    return float(1 - 2 * pq / (pp + qq))


def cut(value: float | None) -> float | None:
    return None if value is None else min(max(value, 0.0), 1.0)


sides = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=12)


@given(sides, sides)
def test_it_is_the_definition_pair_by_pair(top: Side, middle: Side) -> None:
    expected = cut(brute(top, middle))
    assert measure(top, middle).value == (None if expected is None else pytest.approx(expected, abs=1e-12))


@given(sides, sides)
def test_names_and_order_do_not_matter(top: Side, middle: Side) -> None:
    tokens = np.random.default_rng(len(top)).permutation(50_000)[:5]
    documents = np.random.default_rng(len(middle)).permutation(900)[:8]
    renamed = [[(int(tokens[t]), int(documents[d])) for t, d in reversed(side)] for side in (top, middle)]
    for one, other in zip(measure(top, middle), measure(*renamed), strict=True):
        assert one == (None if other is None else pytest.approx(other, abs=1e-12))


@pytest.mark.parametrize(
    ("top", "middle", "value"),
    [
        ([7] * 20, [7] * 30, 0.0),
        ([7] * 20, [8] * 30, 1.0),
        ([7] * 20, [7, 8] * 20, 1 - 2 * 0.5 / (1 + 19 / 39)),
        ([7] * 20, [7, 8, 9, 10] * 10, 1 - 2 * 0.25 / (1 + 9 / 39)),
        ([7, 8] * 10, [7, 8] * 10, 0.0),  # -0.056 before it is cut: no token is its own pair
    ],
)
def test_known_values(top: list[int], middle: list[int], value: float) -> None:
    assert measure(own_documents(top), own_documents(middle)).value == pytest.approx(value)


def test_pairs_within_a_document_do_not_count() -> None:
    """One document that says the same word ten times is one document with that word."""
    middle = [(word, word) for word in range(10) for _ in range(10)] + [(0, 10)]
    top = [(0, 20), (0, 21), (1, 22)]
    assert measure(top, middle).value == pytest.approx(brute(top, middle))
    assert brute(top, middle) == pytest.approx(1 - 2 * (32 / 303) / (1 / 3 + 10 / 4600))


def test_the_estimate_does_not_depend_on_the_number_of_firings() -> None:
    """Both terms of the ratio are unbiased: averaged over samples of any size they give the truth."""
    rng = np.random.default_rng(0)
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    truth = 1 - 2 * (p @ q) / (p @ p + q @ q)
    for n, m in ((20, 30), (20, 300)):
        values = [
            measure(own_documents(rng.choice(3, n, p=p).tolist()), own_documents(rng.choice(3, m, p=q).tolist())).known
            for _ in range(400)
        ]
        assert np.mean(values) == pytest.approx(truth, abs=0.015)


@pytest.mark.parametrize(
    ("top", "middle"),
    [
        ([], [(1, 1), (1, 2)]),
        ([(1, 1), (1, 2)], []),
        ([(1, 1), (1, 1)], [(1, 2), (1, 3)]),  # all top examples in one document
        ([(1, 1), (1, 2)], [(1, 3)]),
        ([(1, 1), (2, 2)], [(3, 3), (4, 4)]),  # no token twice
        ([(1, 1), (1, 1), (2, 2)], [(1, 3), (4, 4)]),  # no token in two documents of one side
    ],
)
def test_what_cannot_be_said_is_unknown(top: Side, middle: Side) -> None:
    assert measure(top, middle) == Measured(None)


@pytest.mark.parametrize(("top", "middle"), [([1] * 9, [1] * 40), ([1] * 20, [1] * 9)])
def test_fewer_than_ten_documents_give_no_interval(top: list[int], middle: list[int]) -> None:
    assert measure(own_documents(top), own_documents(middle)) == Measured(0.0)


def test_no_interval_if_one_document_decides_whether_it_is_defined() -> None:
    """Only documents 0 and 1 share a token."""
    top = own_documents([1, 1, *range(10, 20)])
    assert measure(top, own_documents(range(30, 50))) == Measured(1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(12, 25), (20, 11)]))
def test_the_interval_is_what_the_docstring_says(seed: int, sizes: tuple[int, int]) -> None:
    rng, documents, fewest = np.random.default_rng(seed), max(sizes), min(sizes)
    top, middle = (list(zip(rng.integers(0, 3, n).tolist(), rng.permutation(n).tolist(), strict=True)) for n in sizes)
    value = brute(top, middle)
    assert value is not None

    def without(document: int) -> float:
        left = brute(*([firing for firing in side if firing[1] != document] for side in (top, middle)))
        assert left is not None
        return left

    theta = np.array([without(document) for document in range(documents)])
    pp, qq = (sum(a[0] == b[0] for a, b in itertools.combinations(s, 2)) / math.comb(len(s), 2) for s in (top, middle))
    extra = (2 * qq / (pp + qq) / sizes[0]) ** 2 + (2 * pp / (pp + qq) / sizes[1]) ** 2
    jackknife = (documents - 1) / documents * float(((theta - theta.mean()) ** 2).sum())
    far = float(stdtrit(fewest - 1, 0.975)) * math.sqrt(fewest / (fewest - 1) * (jackknife + extra))
    assert measure(top, middle) == pytest.approx((cut(value), cut(value - far), cut(value + far)), abs=1e-9)


def test_no_overlap_seen_is_not_none_for_sure() -> None:
    value, lo, hi = measure(own_documents([1] * 20), own_documents([2] * 200))
    assert (value, hi) == (1.0, 1.0)
    assert lo is not None
    assert 0.8 < lo < 0.95


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """benchmarks/divergence.py has more cases; here one with documents that repeat themselves."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        theme = rng.integers(0, 4, 40)
        picks = rng.integers(0, 40, 20)
        top = [(0 if rng.random() < 0.8 else int(theme[d]), int(d)) for d in picks]
        middle = [
            (int(theme[d]) if rng.random() < 0.5 else int(rng.integers(0, 4)), d) for d in range(40) for _ in "12"
        ]
        p, q = np.array([0.85, 0.05, 0.05, 0.05]), np.full(4, 0.25)
        _, lo, hi = measure(top, middle)
        assert lo is not None
        assert hi is not None
        held += lo <= 1 - 2 * (p @ q) / (p @ p + q @ q) <= hi
    assert held >= 180
