"""The post's claims, put to studies whose numbers are made up so that the answers are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_resampling import RECIPE

from saezoo.ablation.claims import Answer, answers, in_words
from saezoo.ablation.effects import Row
from saezoo.ablation.grid import cells_of, read_factors
from saezoo.entries import Recipe
from saezoo.results import Measured

Of = Callable[[dict[str, str], int, int], dict[str, float]]
"""(levels, seed, layer) -> metrics."""


def answered(varied: list[str], of: Of, layers: int = 2) -> dict[str, Answer]:
    factors = read_factors(varied)
    cells = cells_of(Recipe(**RECIPE), factors, range(3), 4000)
    rows = [Row(cell, str(i), of(dict(cell.levels), cell.seed, i)) for cell in cells for i in range(layers)]
    return {answer.claim: answer for answer in answers(rows, factors)}


def ghosts(**dead: float) -> Of:
    """Dead features by level, with a scatter over seeds that the layers share."""
    return lambda levels, seed, layer: {"dead": dead[levels["ghost"]] * (1 + 0.01 * seed)}


GHOST = "Ghost gradients, corrected, reduce dead features."
BUG = "The bug made ghost gradients useless against dead features."


@pytest.mark.parametrize(
    ("dead", "ghost", "bug"),
    [
        ({"off": 50.0, "bug": 60.0, "fixed": 10.0}, "yes", "yes"),
        ({"off": 50.0, "bug": 40.0, "fixed": 60.0}, "no", "no"),
        ({"off": 50.0, "bug": 50.0, "fixed": 50.0}, "not shown", "not shown"),
    ],
)
def test_ghost_gradients(dead: dict[str, float], ghost: str, bug: str) -> None:
    found = answered(["ghost=off,bug,fixed"], ghosts(**dead))
    assert (found[GHOST].verdict, found[BUG].verdict) == (ghost, bug)
    assert found[GHOST].figure.startswith("features that never fired: ")


def test_a_difference_within_the_scatter_is_not_shown() -> None:
    found = answered(
        ["ghost=off,fixed"],
        lambda levels, seed, layer: {"dead": 50 + (seed - 1.2) * 10 * (levels["ghost"] == "fixed")},
    )
    assert found[GHOST].verdict == "not shown" and "difference -2 [-27, 23]" in found[GHOST].figure.replace("+", "")


def test_an_effect_that_turns_round_with_another_factor() -> None:
    """Less with b_dec=mean and more with b_dec=zero: the mean over both would hide it."""

    def of(levels: dict[str, str], seed: int, layer: int) -> dict[str, float]:
        sign = 1 if levels["b_dec"] == "zero" else -1
        return {"dead": 50.0 + seed + (levels["ghost"] == "bug") * sign * (30 + seed)}

    found = answered(["ghost=off,bug", "b_dec=zero,mean", "warmup=0"], of)[BUG]
    assert found.verdict == "it depends"
    assert found.figure.endswith(
        "difference +0. With each combination of the other levels: "
        "from -31 [-33, -29] (b_dec=mean) to +31 [+29, +33] (b_dec=zero)"
    )


def test_nothing_dies() -> None:
    found = answered(["ghost=off,bug,fixed"], lambda levels, seed, layer: {"dead": 0.0})
    assert found[GHOST].verdict == found[BUG].verdict == "not at this scale"


def test_dictionary_and_warmup() -> None:
    found = answered(
        ["d_sae=512,64", "warmup=0,5"],
        lambda levels, seed, layer: {
            "alive_fraction": (0.9 if levels["d_sae"] == "64" else 0.5 + 0.01 * seed),
            "dead": 5.0 + (3 + 0.1 * seed) * (levels["warmup"] == "5"),
        },
    )
    assert found["Fewer features die in a smaller dictionary."].verdict == "yes"
    assert found["Learning-rate warm-up keeps features alive."].verdict == "no"


def test_b_dec() -> None:
    def of(levels: dict[str, str], seed: int, layer: int) -> dict[str, float]:
        to_median = 2.0 if levels["b_dec"] == "geometric_median" else 4.0
        to_median *= 1 + 0.01 * seed
        return {"gm_distance_b_dec": to_median, "mean_distance_b_dec": 3.0, "dense_10": to_median}

    found = answered(["b_dec=zero,geometric_median"], of)
    nearer = "The final b_dec is nearer to the geometric median than to the mean, when it starts at {}."
    assert found[nearer.format("geometric median")].verdict == "yes"
    assert found[nearer.format("zero")].verdict == "no"
    claim = "Starting b_dec at the geometric median avoids dense features (above 1/10), compared with zero."
    assert found[claim].verdict == "yes"
    assert not [claim for claim in found if "the mean." in claim and "Starting" in claim], "no level is the mean"


@pytest.mark.parametrize(
    ("per_layer", "per_scale", "depth", "scale"),
    [(5.0, 0.0, "yes", "not shown"), (5.0, 9.0, "yes", "yes"), (-5.0, -9.0, "no", "no")],
)
def test_depth(per_layer: float, per_scale: float, depth: str, scale: str) -> None:
    def of(levels: dict[str, str], seed: int, layer: int) -> dict[str, float]:
        return {"l0": 20 + (1 + 0.001 * seed) * (per_layer * layer + per_scale * (levels["scale"] == "4"))}

    found = answered(["scale=4,1"], of)
    assert found["L0 grows with depth."].verdict == depth
    assert found["Larger activations, with the same L1 coefficient, have a larger L0."].verdict == scale


def test_a_grid_is_asked_only_what_it_varies() -> None:
    assert list(answered(["lr=1e-3,1e-2"], lambda levels, seed, layer: {"dead": 1.0}, layers=1)) == []


def test_numbers_in_words() -> None:
    assert in_words(Measured(1234.5, 1200.0, 1269.0)) == "1,234 [1,200, 1,269]"
    assert in_words(Measured(0.5, 0.25, 0.75), "+") == "+0.50 [+0.25, +0.75]"
    assert in_words(Measured(0.5, 0.25, 0.75), plus_minus=True) == "0.50 ±0.25"
    assert in_words(Measured(2.0)) == "2" and in_words(Measured(None)) == "unknown"
