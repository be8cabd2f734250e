"""Means and paired differences over seeds, by hand."""

from __future__ import annotations

import pytest
from scipy import stats
from test_resampling import RECIPE

from saezoo.ablation.effects import ALL, Effect, Row, effect, effects, mean_of, survivors, variants
from saezoo.ablation.grid import cells_of, read_factors
from saezoo.entries import Recipe
from saezoo.results import Measured

FACTORS = read_factors(["ghost=off,fixed", "warmup=0,5"])
CELLS = cells_of(Recipe(**RECIPE), FACTORS, seeds=range(3), tokens=4000)


def rows(value_of: dict[tuple[str, str, int], float | None]) -> list[Row]:
    found = []
    for cell in CELLS:
        ghost, warmup = (level for _, level in cell.levels)
        found.append(Row(cell, "1", {"l0": value_of[ghost, warmup, cell.seed]}))
    return found


VALUES: dict[tuple[str, str, int], float | None] = {
    (ghost, warmup, seed): 10.0 * seed + (3.0 + seed if ghost == "fixed" else 0.0) + (1.0 if warmup == "5" else 0.0)
    for ghost in ("off", "fixed")
    for warmup in ("0", "5")
    for seed in range(3)
}


def test_mean_and_interval_are_students() -> None:
    found = mean_of([1.0, 2.0, 6.0])
    lo, hi = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert found == pytest.approx((3.0, lo, hi))
    assert mean_of([2.0]) == Measured(2.0) and mean_of([]) == Measured(None)


def test_paired_differences_do_not_see_what_seeds_share() -> None:
    """Seeds differ by 10, and ghost=fixed by 3, 4, 5: its interval comes from the latter alone."""
    ghost, warmup = effects(rows(VALUES), FACTORS, ["l0"])
    assert (ghost.factor, ghost.level, ghost.baseline, len(ghost.by_seed)) == ("ghost", "fixed", "off", 3)
    assert ghost.difference == pytest.approx(tuple(mean_of([3.0, 4.0, 5.0])))
    assert ghost.verdict == "more"
    assert warmup.difference.value == pytest.approx(1.0)


def test_what_is_undefined_is_left_out() -> None:
    values = VALUES | {("fixed", "0", 0): None, ("fixed", "5", 0): None}
    ghost, _ = effects(rows(values), FACTORS, ["l0"])
    assert len(ghost.by_seed) == 2 and ghost.difference.value == 4.5
    assert variants(rows(values), "l0")["ghost=fixed warmup=0", "1"].value == pytest.approx((14 + 25) / 2)


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    only = [row for row in rows(VALUES) if row.cell.seed == 1]
    ghost, _ = effects(only, FACTORS, ["l0"])
    assert ghost.difference == Measured(4.0) and ghost.verdict == "not known"


def test_all_layers_together() -> None:
    """The mean of the layers' differences, each seed's own."""
    both = rows(VALUES)
    both += [Row(row.cell, "2", {"l0": 2 * (row.metrics["l0"] or 0)}) for row in both]
    layers = {found.layer: found for found in effects(both, FACTORS, ["l0"]) if found.factor == "ghost"}
    assert list(layers) == ["1", "2", ALL]
    assert layers[ALL].by_seed == pytest.approx((4.5, 6.0, 7.5))


def test_a_level_against_any_other() -> None:
    found = effect(rows(VALUES), "ghost", "off", "fixed", "1", "l0")
    assert found.by_seed == pytest.approx((-3.0, -4.0, -5.0)) and found.verdict == "less"


def test_p_is_that_of_students_paired_test() -> None:
    ghost = effect(rows(VALUES), "ghost", "fixed", "off", "1", "l0")
    assert ghost.p == pytest.approx(stats.ttest_1samp([3.0, 4.0, 5.0], 0).pvalue)


@pytest.mark.parametrize("by_seed", [(), (2.0,), (0.0, 0.0), (-0.5, -0.5, -0.5), (0.1 + 0.2, 0.3)])
def test_without_a_scatter_there_is_no_interval(by_seed: tuple[float, ...]) -> None:
    """Counts of few features are often equal in all seeds: an interval of width 0 would be surer than anything."""
    found = Effect("a", "b", "c", "1", "dead", by_seed)
    assert (found.difference.lo, found.difference.hi, found.p, found.verdict) == (None, None, None, "not known")
    assert survivors([found]) == [False]


def test_holm_by_hand() -> None:
    """p = 0.005, 0.02, 0.03, 0.5 of four: thresholds 0.0125, 0.0167, …; the second is above its own, so none follow."""
    found = [_with_p(p) for p in (0.03, 0.005, 0.5, 0.02)]
    assert survivors(found) == [False, True, False, False]
    assert survivors([_with_p(p) for p in (0.03, 0.005, 0.5, 0.016)]) == [False, True, False, True]


def _with_p(p: float) -> Effect:
    """Of two seeds, mean 1 and standard error e: t = 1 / e with one degree of freedom."""
    error = 1 / stats.t.ppf(1 - p / 2, 1)
    found = Effect("a", "b", "c", "1", "l0", (1 - error, 1 + error))
    assert found.p == pytest.approx(p)
    return found
