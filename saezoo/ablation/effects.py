"""What an ablation found: means over seeds, and differences between levels, with intervals over seeds.

The independent unit is the seed: a training that starts elsewhere and shuffles the text differently. With n seeds the
interval of a mean is mean -+ t s / sqrt(n), t Student's 97.5 % quantile with n - 1 degrees of freedom. Differences are
paired: of the same seed, layer and levels of all other factors, averaged over these, and then the same interval.

Where many differences are looked at, some intervals of 95 % miss 0 by chance. `survivors` says which of them still
stand out by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979), which allows one such miss among all
differences in one study of twenty.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from saezoo.ablation.grid import Cell
from saezoo.results import Measured

ALL = "all"
"""Instead of a layer: the mean over them."""


@dataclass(frozen=True)
class Row:
    """One SAE of one cell, measured."""

    cell: Cell
    layer: str
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Effect:
    """What it does to a metric to take one level of a factor rather than another."""

    factor: str
    level: str
    baseline: str
    layer: str
    metric: str
    by_seed: tuple[float, ...]
    """Metric at `level` minus that at `baseline`, each seed's mean over the other factors."""

    @property
    def difference(self) -> Measured:
        """Mean over seeds, with its interval."""
        return mean_of(self.by_seed)

    @property
    def p(self) -> float | None:
        """Of Student's paired test, two-sided; None where there is no interval."""
        error = standard_error(self.by_seed)
        if error is None:
            return None
        return 2 * float(stdtr(len(self.by_seed) - 1, -abs(float(np.mean(self.by_seed))) / error))

    @property
    def verdict(self) -> str:
        """`more`, `less`, or `not known`: what the interval supports."""
        if self.difference.lo is None or self.difference.hi is None:
            return "not known"
        return "more" if self.difference.lo > 0 else "less" if self.difference.hi < 0 else "not known"


def mean_of(values: Sequence[float]) -> Measured:
    """Over seeds, with its interval where `standard_error` is known."""
    if not values:
        return Measured(None)
    mean, error = float(np.mean(values)), standard_error(values)
    if error is None:
        return Measured(mean)
    far = float(stdtrit(len(values) - 1, 0.975)) * error
    return Measured(mean, mean - far, mean + far)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean. None with one value, and where all agree but for rounding, as counts of few features may: their
    scatter is not 0, it has not been seen."""
    if len(values) < 2 or np.ptp(values) <= 1e-9 * np.abs(values).max():
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def variants(rows: Iterable[Row], metric: str) -> dict[tuple[str, str], Measured]:
    """(variant, layer) -> the metric's mean over seeds; seeds in which it is undefined are left out."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        value = row.metrics.get(metric)
        place = found[row.cell.variant, row.layer]
        if value is not None:
            place.append(value)
    return {key: mean_of(values) for key, values in found.items()}


def effects(rows: Sequence[Row], factors: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> list[Effect]:
    """Every level of every factor against that factor's first, by layer and metric; last for all layers together."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    return [
        effect(rows, factor, level, levels[0], layer, metric)
        for (factor, levels), metric in itertools.product(factors.items(), metrics)
        for level in levels[1:]
        for layer in (*layers, *([ALL] if len(layers) > 1 else []))
    ]


def effect(rows: Iterable[Row], factor: str, level: str, baseline: str, layer: str, metric: str) -> Effect:
    """Of one level against another. Each difference is between two cells that differ in nothing but the factor."""
    values = {
        (row.cell.seed, row.layer, row.cell.levels): row.metrics.get(metric)
        for row in rows
        if layer in (ALL, row.layer)
    }
    by_seed: dict[int, list[float]] = defaultdict(list)
    for (seed, at, levels), value in values.items():
        if dict(levels)[factor] != level or value is None:
            continue
        other = values.get((seed, at, tuple((name, baseline if name == factor else is_at) for name, is_at in levels)))
        if other is not None:
            by_seed[seed].append(value - other)
    means = tuple(float(np.mean(differences)) for differences in by_seed.values())
    return Effect(factor, level, baseline, layer, metric, means)


def conditional(rows: Sequence[Row], found: Effect) -> dict[str, Effect]:
    """The same difference within each combination of levels of the other factors (`warmup=0 b_dec=mean`), where it can
    be another one; {} if no other factor is varied."""
    others: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        others[" ".join(f"{name}={level}" for name, level in row.cell.levels if name != found.factor)].append(row)
    if len(others) < 2:
        return {}
    within = {
        words: effect(group, found.factor, found.level, found.baseline, found.layer, found.metric)
        for words, group in others.items()
    }
    shared = set.intersection(*(set(words.split()) for words in within))
    return {" ".join(w for w in words.split() if w not in shared): each for words, each in within.items()}


def survivors(found: Sequence[Effect], error: float = 0.05) -> list[bool]:
    """For each, whether it differs from 0 also by Holm's method over all of them."""
    known = sorted((p, i) for i, effect in enumerate(found) if (p := effect.p) is not None)
    kept = [False] * len(found)
    for rank, (p, i) in enumerate(known):
        if p > error / (len(known) - rank):
            break
        kept[i] = True
    return kept
