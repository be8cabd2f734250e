"""What a feature's firings say about it, against an implementation by the book: sorted lists and loops."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saezoo.features import describe as module
from saezoo.features.describe import Text, describe, histogram
from saezoo.features.events import Firings
from saezoo.features.records import Feature

ROWS, CONTEXT, VOCAB = 40, 16, 30
M = ROWS * CONTEXT


def text(seed: int = 0) -> Text:
    """Tokens of which some kinds are rare; the first of each row is special and not scored."""
    random = np.random.default_rng(seed)
    tokens_RT = np.minimum(random.geometric(0.15, (ROWS, CONTEXT)), VOCAB - 1)
    tokens_RT[:, 0] = 0
    documents_RT = np.arange(ROWS)[:, None].repeat(CONTEXT, 1) // 2
    counts_V = np.bincount(tokens_RT[:, 1:].ravel(), minlength=VOCAB)
    return Text(tokens_RT.ravel(), documents_RT.ravel(), counts_V, ROWS * (CONTEXT - 1), CONTEXT, seed)


def firings(seed: int, n: int, levels: int) -> Firings:
    """n firings; few `levels` make many ties."""
    random = np.random.default_rng(seed)
    scored_M = np.flatnonzero(np.arange(M) % CONTEXT)
    token_N = np.sort(random.choice(scored_M, n, replace=False))
    return Firings(token_N, (random.integers(1, levels + 1, n) / 8).astype(np.float32))


def ranked(found: Firings) -> list[tuple[int, float]]:
    """(token, value): largest first, of equal ones the earliest."""
    return sorted(zip(found.token_N.tolist(), found.value_N.tolist(), strict=True), key=lambda f: (-f[1], f[0]))


@given(st.integers(0, 99), st.integers(1, 500), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_top_contexts_and_quantiles(seed: int, n: int, levels: int) -> None:
    found, of = firings(seed, n, levels), text(seed)
    feature = describe(seed, found, of)
    order = ranked(found)
    rows = list(dict.fromkeys(token // CONTEXT for token, _ in order))[:20]
    best = {row: next(each for each in order if each[0] // CONTEXT == row) for row in rows}
    assert [(e.row * CONTEXT + e.position, e.value) for e in feature.top] == list(best.values())
    ends = [n * q // 5 for q in range(6)]
    parts = [order[a:b] for a, b in itertools.pairwise(ends) if b > a]
    assert [(q.hi, q.lo, q.firings) for q in feature.quantiles] == [(p[0][1], p[-1][1], len(p)) for p in parts]
    for quantile, part in zip(feature.quantiles, parts, strict=True):
        shown = [e.row * CONTEXT + e.position for e in quantile.examples]
        assert len(set(shown)) == min(5, len(part))
        assert [t for t, _ in part if t in shown] == shown, "in the order of their activation"


@given(st.integers(0, 99), st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_numbers_and_tables(seed: int, n: int) -> None:
    found, of = firings(seed, n, 300), text(seed)
    feature = describe(4, found, of)
    values = found.value_N.astype(float)
    assert (feature.fires, feature.density, feature.max) == (n, n / of.scored, values.max())
    assert feature.mean == pytest.approx(values.mean(), rel=1e-12)
    total, fires = Counter[int](), Counter[int]()
    for token, value in zip(found.token_N, values, strict=True):
        total[int(of.tokens_M[token])] += value
        fires[int(of.tokens_M[token])] += 1
    by_share = sorted(total, key=lambda v: (-total[v], v))[:10]
    often = [v for v in total if of.occurrences_V[v] >= 5]
    by_mean = sorted(often, key=lambda v: (-total[v] / of.occurrences_V[v], v))[:10]
    for stats, wanted in ((feature.tokens_by_share, by_share), (feature.tokens_by_mean, by_mean)):
        assert [stat.token for stat in stats] == wanted
        for stat in stats:
            assert (stat.fires, stat.occurrences) == (fires[stat.token], of.occurrences_V[stat.token])
            assert stat.mean == pytest.approx(total[stat.token] / of.occurrences_V[stat.token])
            assert stat.share == pytest.approx(total[stat.token] / sum(total.values()))


def test_an_example_has_its_whole_row() -> None:
    found, of = firings(1, 300, 50), text()
    dense_M = np.zeros(M, dtype=np.float32)
    dense_M[found.token_N] = found.value_N
    feature = describe(0, found, of)
    for example in [*feature.top, *(e for q in feature.quantiles for e in q.examples)]:
        row = slice(example.row * CONTEXT, (example.row + 1) * CONTEXT)
        assert np.array_equal(example.tokens_T, of.tokens_M[row])
        assert np.array_equal(example.values_T, dense_M[row])
        assert example.value > 0 and example.document == example.row // 2


@given(st.lists(st.floats(0.0078125, 100, width=32), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_histogram(values: list[float]) -> None:
    found = histogram(np.array(values, dtype=np.float32))
    lo, hi = min(values), max(values)
    counts = [0] * 50
    for value in values:
        counts[min(int((value - lo) / (hi - lo) * 50), 49) if hi > lo else 49] += 1
    assert (found.lo, found.hi, list(found.counts)) == (lo, hi, counts)


def test_a_feature_that_never_fired() -> None:
    nothing = Firings(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    assert describe(7, nothing, text()) == Feature(7, 0, 0.0, None, None, None)


def test_every_firing_is_drawn_as_often_as_any_other() -> None:
    """Over 2,000 seeds, each of the 20 firings of a fifth a quarter of the time: 500, and 5 standard deviations."""
    found, of = firings(3, 100, 1000), text()
    drawn = Counter[int]()
    for seed in range(2000):
        feature = describe(0, found, dataclasses.replace(of, seed=seed))
        drawn.update(e.row * CONTEXT + e.position for e in feature.quantiles[2].examples)
    assert len(drawn) == 20 and min(drawn.values()) > 400 and max(drawn.values()) < 600


def test_draws_change_with_the_seed_and_the_feature() -> None:
    found, of = firings(3, 400, 90), text()
    shown = {
        tuple(e.row for e in describe(feature, found, dataclasses.replace(of, seed=seed)).quantiles[0].examples)
        for seed in (0, 1)
        for feature in (0, 1)
    }
    assert len(shown) == 4


def test_a_rank_has_no_say() -> None:
    """What is drawn depends on the firings, not on who found them."""
    found, of = firings(3, 400, 90), text()
    assert repr(describe(1, found, of)) == repr(describe(1, Firings(found.token_N.copy(), found.value_N.copy()), of))
    assert module.TOP == 20 and module.DRAWN == 5
