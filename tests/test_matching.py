"""Matching: the best there is on everything small enough to check, and a bound that holds where it stops early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from torch import Tensor

from saezoo.errors import WeightsError
from saezoo.evals import matching
from saezoo.evals.matching import FEWEST_FIRES, coactivation, expected_max_cosine, match, nearest

Matrix = NDArray[np.float64]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(a_FD: Tensor, b_GD: Tensor) -> Matrix:
    """All of them; 0 for directions of norm 0."""
    a, b = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300) for rows in (a_FD, b_GD))
    found: Matrix = (a @ b.T).numpy()
    return found


def best_total(a_FD: Tensor, b_GD: Tensor) -> float:
    """By scipy's dense solver; a pair of cosine below 0 is no better than none."""
    gain = cosines(a_FD, b_GD).clip(min=0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return float(gain[rows, columns].sum())


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Directions with small integer entries: many ties, opposites, duplicates and zeros."""
    dimensions = draw(st.integers(1, 4))
    rows = st.lists(st.lists(st.integers(-2, 2), min_size=dimensions, max_size=dimensions), min_size=1, max_size=12)
    a, b = (torch.tensor(draw(rows), dtype=torch.float64) for _ in range(2))
    return a, b


@given(two_sets(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_matching_there_is(sets: tuple[Tensor, Tensor], candidates: int) -> None:
    a, b = sets
    found = match(a, b, candidates=candidates)
    assert found.total == pytest.approx(best_total(a, b), abs=1e-9)
    assert found.bound >= best_total(a, b) - 1e-9
    matched = np.flatnonzero(found.partner_F >= 0)
    partners = found.partner_F[matched]
    assert len(set(partners.tolist())) == len(partners)
    assert found.partner_cosine_F[matched] == pytest.approx(cosines(a, b)[matched, partners], abs=1e-12)
    assert (found.partner_cosine_F[matched] > 0).all()


@pytest.mark.parametrize(("f", "g", "d"), [(150, 150, 4), (60, 200, 8), (200, 60, 8), (1, 50, 3), (50, 1, 3)])
def test_few_candidates_are_enough(f: int, g: int, d: int) -> None:
    """One neighbour each to start from: the rest is found by the prices."""
    a, b = normal(f, d, seed=0), normal(g, d, seed=1)
    found = match(a, b, candidates=1)
    assert found.total == pytest.approx(best_total(a, b), abs=1e-9)
    assert found.gap is not None and found.gap < 1e-9


def test_a_search_that_stops_early_says_what_it_may_have_missed() -> None:
    a, b = normal(150, 4, seed=0), normal(150, 4, seed=1)
    best = best_total(a, b)
    stopped = match(a, b, candidates=1, rounds=1)
    assert stopped.rounds == 1
    assert stopped.total < best - 0.1
    assert stopped.bound >= best
    assert stopped.gap == pytest.approx((stopped.bound - stopped.total) / stopped.bound)


@given(two_sets())
@settings(max_examples=200, deadline=None)
def test_the_nearest_is_the_nearest(sets: tuple[Tensor, Tensor]) -> None:
    a, b = sets
    found = match(a, b)
    all_FG = cosines(a, b)
    defined = b.abs().amax(1).numpy() > 0
    for i in range(len(a)):
        if not a[i].any() or not defined.any():
            assert found.nearest_ab_F[i] == -1
            continue
        largest = all_FG[i, defined].max()
        assert found.nearest_ab_cosine_F[i] == pytest.approx(largest, abs=1e-12)
        assert all_FG[i, found.nearest_ab_F[i]] == pytest.approx(largest, abs=1e-12)
        assert defined[found.nearest_ab_F[i]]


def test_both_ways_are_the_same_question() -> None:
    a, b = normal(40, 6, seed=0), normal(55, 6, seed=1)
    there, back = match(a, b), match(b, a)
    assert there.nearest_ab_F.tolist() == back.nearest_ba_G.tolist()
    assert there.nearest_ba_cosine_G.tolist() == pytest.approx(back.nearest_ab_cosine_F.tolist())
    for i, j in enumerate(there.partner_F):
        assert j == -1 or back.partner_F[j] == i


def test_order_and_length_do_not_matter() -> None:
    a, b = normal(50, 8, seed=0), normal(50, 8, seed=1)
    plain = match(a, b)
    order_a, order_b = (torch.randperm(50, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    lengths = torch.logspace(-150, 150, 50, dtype=torch.float64)[:, None]
    other = match(a[order_a] * lengths, b[order_b] * lengths.flip(0))
    assert order_b[torch.from_numpy(other.partner_F)].tolist() == plain.partner_F[order_a.numpy()].tolist()
    assert other.total == pytest.approx(plain.total, abs=1e-9)


def test_the_same_twice_is_the_same() -> None:
    a, b = normal(80, 4, seed=0).round(), normal(80, 4, seed=1).round()
    first, again = match(a, b), match(a, b)
    assert first.partner_F.tolist() == again.partner_F.tolist()
    assert first.bound == again.bound


def test_a_set_matches_itself() -> None:
    a = normal(100, 16, seed=0).float()
    found = match(a, a)
    assert found.partner_F.tolist() == found.nearest_ab_F.tolist() == list(range(100))
    assert found.partner_cosine_F == pytest.approx(np.ones(100), abs=1e-12)
    assert found.gap == pytest.approx(0, abs=1e-9)


def test_a_greedy_choice_is_not_the_best() -> None:
    """By hand: the cosines are 1, 0.90 / 0.90, 0.62, so crosswise pairs have 1.80 and straight ones 1.62."""
    angles_a, angles_b = torch.tensor([0.0, 0.45]), torch.tensor([0.0, -0.45])
    a, b = (torch.stack([angle.cos(), angle.sin()], 1) for angle in (angles_a, angles_b))
    found = match(a, b)
    assert found.nearest_ab_F.tolist() == [0, 0]
    assert found.partner_F.tolist() == [1, 0]
    assert found.total == pytest.approx(2 * np.cos(0.45), abs=1e-6)


def test_directions_of_norm_zero_have_no_part_in_it() -> None:
    a, b = normal(5, 3, seed=0), -normal(5, 3, seed=0)
    a[2] = 0
    b[[0, 4]] = 0  # 0 is above many of these cosines, but it is none
    found = match(a, b)
    assert found.undefined_a.tolist() == [2]
    assert found.undefined_b.tolist() == [0, 4]
    assert found.nearest_ab_F[2] == found.partner_F[2] == -1
    assert found.nearest_ba_G[0] == found.nearest_ba_G[4] == -1
    assert not {0, 4} & ({*found.nearest_ab_F.tolist()} | {*found.partner_F.tolist()})


def test_nothing_to_match() -> None:
    for a, b in (
        (torch.ones(3, 2), -torch.ones(3, 2)),  # only opposed
        (torch.ones(3, 2), torch.zeros(4, 2)),
        (torch.zeros(3, 2), torch.ones(4, 2)),
    ):
        found = match(a, b)
        assert found.partner_F.tolist() == [-1, -1, -1]
        assert (found.total, found.bound, found.gap) == (0, 0, None)


def test_many_duplicates() -> None:
    """Every direction is as near to 400 others; each still gets a partner of its own."""
    found = match(torch.ones(400, 3), torch.ones(400, 3), candidates=2)
    assert sorted(found.partner_F.tolist()) == list(range(400))
    assert found.total == pytest.approx(400, abs=1e-9)
    assert found.gap is not None and found.gap < 1e-4


def test_ties_go_to_the_lowest_index() -> None:
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    assert match(torch.tensor([[3.0, 0.0]]), b).nearest_ab_F.tolist() == [1]


def test_the_size_of_the_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(70, 8, seed=0), normal(90, 8, seed=1)
    whole = match(a, b, candidates=2)
    monkeypatch.setattr(matching, "_BLOCK_BYTES", 4 * 90 * 7)
    monkeypatch.setattr(matching, "_PAIRS_AT_ONCE", 13)
    parts = match(a, b, candidates=2)
    assert parts.partner_F.tolist() == whole.partner_F.tolist()
    assert parts.nearest_ba_G.tolist() == whole.nearest_ba_G.tolist()
    assert parts.bound == pytest.approx(whole.bound, abs=1e-12)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    match(normal(20, 4, seed=0), normal(30, 4, seed=1), on_progress=lambda *step: told.append(step))
    assert [step[0] for step in told][:2] == ["nearest neighbours", "nearest neighbours, the other way"]
    assert told[-1][0].startswith("one-to-one matching, round ")
    assert all(done == total for _, done, total in told)


def test_what_is_not_finite_is_refused() -> None:
    bad = torch.ones(4, 2)
    bad[3, 1] = torch.inf
    with pytest.raises(WeightsError, match="^direction 3 of the second set is not finite; there is no cosine with it$"):
        match(torch.ones(4, 2), bad)


def test_nearest_alone_agrees() -> None:
    a, b = normal(30, 5, seed=0), normal(40, 5, seed=1)
    b[7] = 0
    index_F, cosine_F = nearest(a, b, candidates=1)
    found = match(a, b)
    assert index_F.tolist() == found.nearest_ab_F.tolist()
    assert cosine_F.tolist() == found.nearest_ab_cosine_F.tolist()


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_expected_largest_cosine_in_three_dimensions(n: int) -> None:
    """There a random cosine is uniform from -1 to 1 (Archimedes), so the mean of the largest is 1 - 2 / (n + 1)."""
    assert expected_max_cosine(n, 3) == pytest.approx(1 - 2 / (n + 1), abs=1e-8)


def test_expected_largest_cosine_on_a_line_and_by_simulation() -> None:
    assert expected_max_cosine(4, 1) == pytest.approx(1 - 2 / 2**4)
    found = match(normal(2000, 16, seed=0), normal(300, 16, seed=1))
    error = found.nearest_ab_cosine_F.std() / 2000**0.5
    assert abs(found.nearest_ab_cosine_F.mean() - expected_max_cosine(300, 16)) < 4 * error + 0.003  # one set of 300


# Co-activation


def fires(*columns: set[int], tokens: int = 200) -> csr_matrix:
    """A feature for each set of tokens."""
    dense = np.zeros((tokens, len(columns)), dtype=np.int32)
    for feature, column in enumerate(columns):
        dense[sorted(column), feature] = 1
    return csr_matrix(dense)


def test_jaccard_by_hand() -> None:
    a = fires(set(range(20)), set(range(50, 100)))
    b = fires(set(range(10, 40)), set(range(60, 100)), set(range(20)))
    found = coactivation(a, b)
    assert found.best_ab_F.tolist() == [2, 1]
    assert found.jaccard_ab_F.tolist() == [1.0, 40 / 50]
    assert found.best_ba_G.tolist() == [0, 1, 0]
    assert found.jaccard_ba_G.tolist() == [10 / 40, 40 / 50, 1.0]


def test_rare_features_and_those_that_never_meet_have_none() -> None:
    a = fires(set(range(FEWEST_FIRES - 1)), set(range(FEWEST_FIRES)), set(), set(range(100, 150)))
    found = coactivation(a, fires(set(range(FEWEST_FIRES)), set(range(FEWEST_FIRES - 1))))
    assert found.best_ab_F.tolist() == [-1, 0, -1, -1]
    assert found.best_ba_G.tolist() == [1, -1]


def test_ties_of_jaccard_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_COUNT_BLOCK", 1)
    same = set(range(15))
    found = coactivation(fires({199}, same, same), fires({198}, same, same))
    assert found.best_ab_F.tolist() == found.best_ba_G.tolist() == [-1, 1, 1]


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_pair_counts(seed: int, block: int) -> None:
    """Against all Jaccard indices at once."""
    random = np.random.default_rng(seed)
    dense_a, dense_b = (random.random((120, n)) < random.random(n) * 0.5 for n in random.integers(1, 25, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_COUNT_BLOCK", block)
        found = coactivation(csr_matrix(dense_a.astype(np.int32)), csr_matrix(dense_b.astype(np.int32)))
    both = dense_a.T.astype(int) @ dense_b.astype(int)
    n_a, n_b = dense_a.sum(0), dense_b.sum(0)
    expected = both / np.maximum(n_a[:, None] + n_b - both, 1)
    expected *= (n_a[:, None] >= FEWEST_FIRES) & (n_b >= FEWEST_FIRES)
    assert found.jaccard_ab_F.tolist() == expected.max(1).tolist()
    assert found.jaccard_ba_G.tolist() == expected.max(0).tolist()
    assert found.best_ab_F.tolist() == [int(r.argmax()) if r.max() > 0 else -1 for r in expected]
    assert found.best_ba_G.tolist() == [int(c.argmax()) if c.max() > 0 else -1 for c in expected.T]
