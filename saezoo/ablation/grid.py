"""What an ablation varies: factors of a recipe, their levels, and the cells that these make.

A cell is one recipe and one seed, and is trained on all layers. Cells that read the same activations in the same order
(`Cell.stream`) are trained side by side, from one forward pass of the language model.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saezoo.entries import Recipe
from saezoo.errors import UsageError, shown

MOST_CELLS = 10_000
MOST_FEATURES = 10_000_000


@dataclass(frozen=True)
class Factor:
    """A field of `Recipe`, or `d_sae`, and how its levels are written."""

    field: str
    what: str
    read: Callable[[str, int], Any]
    """(level, steps of the run) -> value; ValueError if it is none."""


def _one_of(*levels: str) -> Callable[[str, int], Any]:
    def read(text: str, steps: int) -> str:
        if text not in levels:
            raise ValueError(f"one of {', '.join(levels)}")
        return text

    return read


def _steps(text: str, steps: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError("a number of steps")
    return int(text)


def _width(text: str, steps: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= MOST_FEATURES):
        raise ValueError(f"a number of features, at most {MOST_FEATURES:,}")
    return int(text)


def _rate(text: str, steps: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ValueError("a number above 0")
    return value


def _resampling(text: str, steps: int) -> int:
    """`on`: four times in the first half of the run, as Bricken et al. 2023 did, or after so many steps each."""
    if text == "off":
        return 0
    return max(2, steps // 8) if text == "on" else _steps(text, steps)


FACTORS = {
    "ghost": Factor("ghost", "ghost gradients: off, bug, fixed", _one_of("off", "bug", "fixed")),
    "warmup": Factor("lr_warmup_steps", "steps of learning-rate warm-up", _steps),
    "b_dec": Factor("b_dec_init", "where b_dec starts", _one_of("zero", "mean", "geometric_median")),
    "buffer": Factor("buffer", "shuffle buffer: bug, fixed", _one_of("bug", "fixed")),
    "dead_after": Factor("dead_after_steps", "steps without firing after which a feature is dead", _steps),
    "resample": Factor("resample_every_steps", "resampling of dead features: off, on, or steps", _resampling),
    "l1": Factor("l1_coefficient", "L1 coefficient", _rate),
    "lr": Factor("lr", "learning rate", _rate),
    "d_sae": Factor("d_sae", "features of the dictionary", _width),
    "scale": Factor("input_scale", "what activations are multiplied by", _rate),
}


@dataclass(frozen=True)
class Cell:
    """One recipe and one seed."""

    levels: tuple[tuple[str, str], ...]
    """(factor, level), in the order in which they were given."""
    seed: int
    recipe: Recipe
    d_sae: int | None
    """None: the collection's."""

    @property
    def variant(self) -> str:
        """What it is but for the seed: `ghost=off warmup=0`."""
        return " ".join(f"{factor}={level}" for factor, level in self.levels)

    @property
    def name(self) -> str:
        """Of its folder: `ghost-off,warmup-0,seed-0`."""
        return ",".join([*(f"{factor}-{level}" for factor, level in self.levels), f"seed-{self.seed}"])

    @property
    def stream(self) -> tuple[int, str]:
        """Cells of the same seed and buffer read the same activations in the same order."""
        return self.seed, self.recipe.buffer


def read_factors(varied: Sequence[str]) -> dict[str, list[str]]:
    """`ghost=off,fixed` … -> factor -> levels. UsageError for an unknown factor, and for one that is given twice or has
    fewer than one level."""
    found: dict[str, list[str]] = {}
    for text in varied:
        name, equals, levels = text.partition("=")
        if name not in FACTORS:
            close = difflib.get_close_matches(name, FACTORS, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"factors: {', '.join(FACTORS)}"
            raise UsageError(f"no factor `{shown(name)}`; {hint}")
        if name in found:
            raise UsageError(f"--vary {name} is given twice; put all levels into one: {name}=a,b")
        found[name] = [level.strip() for level in levels.split(",")] if equals else []
        if not all(found[name]) or not found[name] or len(set(found[name])) < len(found[name]):
            raise UsageError(f"--vary {shown(text)}: give its levels once each, e.g. ghost=off,fixed")
    return found


def cells_of(recipe: Recipe, factors: Mapping[str, Sequence[str]], seeds: Sequence[int], tokens: int) -> list[Cell]:
    """Every combination of levels with every seed, seed by seed. UsageError for a level that is none, and for more
    than 10,000 cells."""
    n = len(seeds)
    for levels in factors.values():
        n *= len(levels)
    if n > MOST_CELLS:
        raise UsageError(f"{n:,} cells are too many; at most {MOST_CELLS:,}: fewer factors, levels or seeds")
    steps = -(-tokens // recipe.batch_size)
    found = []
    for seed in seeds:
        for levels in itertools.product(*factors.values()):
            named = tuple(zip(factors, levels, strict=True))
            changes = {FACTORS[factor].field: _value(factor, level, steps) for factor, level in named}
            d_sae = changes.pop("d_sae", None)
            try:
                found.append(Cell(named, seed, dataclasses.replace(recipe, **changes), d_sae))
            except ValueError as error:
                raise UsageError(f"{Cell(named, seed, recipe, d_sae).variant}: {error}") from None
    return found


def _value(factor: str, level: str, steps: int) -> Any:
    try:
        return FACTORS[factor].read(level, steps)
    except ValueError as error:
        raise UsageError(f"{factor}={shown(level)}: the level must be {error}") from None
