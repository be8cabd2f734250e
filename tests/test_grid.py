"""What an ablation varies: factors, levels, cells, and every refusal."""

from __future__ import annotations

import dataclasses

import pytest
from test_resampling import RECIPE

from saezoo.ablation.grid import FACTORS, cells_of, read_factors
from saezoo.entries import Recipe
from saezoo.errors import UsageError

BASE = Recipe(**RECIPE)


def test_every_combination_with_every_seed() -> None:
    factors = read_factors(["ghost=off,bug,fixed", "warmup=0,5", "b_dec=zero,mean"])
    cells = cells_of(BASE, factors, seeds=range(3), tokens=4000)
    assert len(cells) == len({cell.name for cell in cells}) == 3 * 2 * 2 * 3
    assert cells[0].name == "ghost-off,warmup-0,b_dec-zero,seed-0"
    assert cells[0].variant == "ghost=off warmup=0 b_dec=zero"
    last = cells[-1].recipe
    assert (last.ghost, last.lr_warmup_steps, last.b_dec_init) == ("fixed", 5, "mean")
    assert last == dataclasses.replace(BASE, ghost="fixed", lr_warmup_steps=5, b_dec_init="mean")


def test_cells_that_read_the_same_share_a_stream() -> None:
    cells = cells_of(BASE, read_factors(["ghost=off,fixed", "buffer=bug,fixed"]), seeds=range(2), tokens=4000)
    assert len({cell.stream for cell in cells}) == 4


def test_resampling_four_times_in_the_first_half() -> None:
    cells = cells_of(BASE, read_factors(["resample=off,on,30"]), seeds=range(1), tokens=4000)
    assert [cell.recipe.resample_every_steps for cell in cells] == [0, 125, 30]


def test_every_factor_is_a_field_of_a_recipe() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert {factor.field for factor in FACTORS.values()} - {"d_sae"} <= fields


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        (["gost=off"], "no factor `gost`; did you mean `ghost`?"),
        (
            ["xyz=1"],
            "no factor `xyz`; factors: ghost, warmup, b_dec, buffer, dead_after, resample, l1, lr, d_sae, scale",
        ),
        (["ghost"], "--vary ghost: give its levels once each, e.g. ghost=off,fixed"),
        (["ghost="], "--vary ghost=: give its levels once each, e.g. ghost=off,fixed"),
        (["ghost=off,off"], "--vary ghost=off,off: give its levels once each, e.g. ghost=off,fixed"),
        (["ghost=off", "ghost=bug"], "--vary ghost is given twice; put all levels into one: ghost=a,b"),
        (["ghost=of"], "ghost=of: the level must be one of off, bug, fixed"),
        (["warmup=-1"], "warmup=-1: the level must be a number of steps"),
        (["d_sae=0"], "d_sae=0: the level must be a number of features, at most 10,000,000"),
        (["dead_after=0"], "dead_after=0: `dead_after_steps` must be above 0, not 0"),
        (["lr=0"], "lr=0: the level must be a number above 0"),
        (["l1=nan"], "l1=nan: the level must be a number above 0"),
        (["resample=1"], "resample=1: `resample_every_steps` must be 0 or at least 2: half of them are the window"),
    ],
)
def test_what_is_refused(varied: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        cells_of(BASE, read_factors(varied), seeds=range(1), tokens=4000)
    assert str(caught.value).startswith(message)


def test_too_many_cells() -> None:
    factors = {"warmup": [str(i) for i in range(101)], "lr": [f"{i}e-5" for i in range(1, 101)]}
    with pytest.raises(UsageError, match="10,100 cells are too many; at most 10,000"):
        cells_of(BASE, factors, seeds=range(1), tokens=4000)
