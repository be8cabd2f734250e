"""What Bloom's post and its updates say about the choices of the recipe, put to a study.

Post: https://www.lesswrong.com/posts/f9EgfLSurAiqRJySD. An answer is `yes` or `no` only where the 95 % interval over
seeds says so; `it depends` where it says yes with some levels of the other factors and no with others; else `not
shown`, with what the interval leaves possible; `not at this scale` where there is nothing of which there could be less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from saezoo.ablation.effects import ALL, Effect, Row, conditional, effect, mean_of
from saezoo.report import digits
from saezoo.results import Measured

Verdict = Literal["yes", "no", "it depends", "not shown", "not at this scale"]
Factors = Mapping[str, Sequence[str]]


class Answer(NamedTuple):
    """To one claim."""

    claim: str
    verdict: Verdict
    figure: str
    """The numbers, in words."""


def answers(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    """To every claim about which this grid can say something."""
    found = [claim(rows, factors) for claim in (_ghost, _bug, _dictionary, _warmup, _median, _b_dec, _depth)]
    return [answer for answers in found for answer in answers]


def in_words(measured: Measured, sign: str = "", *, plus_minus: bool = False) -> str:
    """A number and its interval, in brackets or as ±. `sign`: `+` to show that of a positive number, as for
    differences."""
    value, lo, hi = measured
    if value is None:
        return "unknown"
    if lo is None or hi is None:
        return f"{value:{sign}.4g}"
    n = min(digits(value, lo, hi), 4)
    if plus_minus:
        return f"{value:{sign},.{n}f} ±{(hi - lo) / 2:,.{n}f}"
    return f"{value:{sign},.{n}f} [{lo:{sign},.{n}f}, {hi:{sign},.{n}f}]"


def _verdict(difference: Measured, sign: int) -> Verdict:
    """Whether a difference has the sign that the claim says."""
    if difference.lo is None or difference.hi is None:
        return "not shown"
    if difference.lo > 0 or difference.hi < 0:
        return "yes" if (difference.lo > 0) == (sign > 0) else "no"
    return "not shown"


def _levels(factors: Factors, factor: str, *levels: str) -> bool:
    return set(levels) <= set(factors.get(factor, ()))


def _compared(
    rows: Sequence[Row], claim: str, factor: str, level: str, baseline: str, metric: str, sign: int, unit: str
) -> Answer:
    found = effect(rows, factor, level, baseline, ALL, metric)
    groups = [[row for row in rows if dict(row.cell.levels)[factor] == at] for at in (level, baseline)]
    means = [mean_of([*_by_seed(group, metric).values()]) for group in groups]
    if metric == "dead" and all(mean.value == 0 for mean in means):
        return Answer(claim, "not at this scale", "no variant has a dead feature")
    figure = (
        f"{unit}: {in_words(means[0])} with {factor}={level}, {in_words(means[1])} with {baseline};"
        f" difference {in_words(found.difference, '+')}"
    )
    within = conditional(rows, found)
    verdicts = [_verdict(each.difference, sign) for each in within.values()]
    if within:
        figure += f". With each combination of the other levels: {spread(within)}"
    depends = {"yes", "no"} <= set(verdicts)
    return Answer(claim, "it depends" if depends else _verdict(found.difference, sign), figure)


def spread(within: Mapping[str, Effect]) -> str:
    """Where a difference is least and where it is most."""
    ends = sorted(within.items(), key=lambda item: item[1].difference.value or 0.0)
    words = [f"{in_words(each.difference, '+')} ({name})" for name, each in (ends[0], ends[-1])]
    return f"from {words[0]} to {words[1]}"


_DEAD = "features that never fired"


def _ghost(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    if not _levels(factors, "ghost", "off", "fixed"):
        return []
    claim = "Ghost gradients, corrected, reduce dead features."
    return [_compared(rows, claim, "ghost", "fixed", "off", "dead", -1, _DEAD)]


def _bug(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    """Useless: no fewer dead features than without. An interval that holds 0 does not show that."""
    if not _levels(factors, "ghost", "off", "bug"):
        return []
    claim = "The bug made ghost gradients useless against dead features."
    return [_compared(rows, claim, "ghost", "bug", "off", "dead", 1, _DEAD)]


def _dictionary(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    sizes = sorted(factors.get("d_sae", ()), key=int)
    if len(sizes) < 2:
        return []
    claim = "Fewer features die in a smaller dictionary."
    unit = "fraction that fired"
    return [_compared(rows, claim, "d_sae", sizes[0], sizes[-1], "alive_fraction", 1, unit)]


def _warmup(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    steps = sorted(factors.get("warmup", ()), key=int)
    if len(steps) < 2 or steps[0] != "0":
        return []
    claim = "Learning-rate warm-up keeps features alive."
    return [_compared(rows, claim, "warmup", steps[-1], "0", "dead", -1, _DEAD)]


def _median(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    if not _levels(factors, "b_dec", "geometric_median"):
        return []
    claim = "Starting b_dec at the geometric median avoids dense features (above 1/10), compared with {}."
    return [
        _compared(rows, claim.format(name), "b_dec", "geometric_median", other, "dense_10", -1, "features above 1/10")
        for other, name in (("zero", "zero"), ("mean", "the mean"))
        if other in factors["b_dec"]
    ]


def _b_dec(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    """Of each SAE the difference of two distances; by where b_dec started, if that is varied."""
    found = []
    for start in factors.get("b_dec", ("",)):
        chosen = [row for row in rows if not start or dict(row.cell.levels)["b_dec"] == start]
        median, mean = (_by_seed(chosen, name) for name in ("gm_distance_b_dec", "mean_distance_b_dec"))
        if not median:
            continue
        difference = mean_of([median[seed] - mean[seed] for seed in median])
        claim = "The final b_dec is nearer to the geometric median than to the mean"
        claim += f", when it starts at {start.replace('_', ' ')}." if start else "."
        figure = (
            f"distance to the median {in_words(mean_of([*median.values()]))}, to the mean"
            f" {in_words(mean_of([*mean.values()]))}; difference {in_words(difference, '+')}"
        )
        found.append(Answer(claim, _verdict(difference, -1), figure))
    return found


def _depth(rows: Sequence[Row], factors: Factors) -> list[Answer]:
    """Growth with depth is L0 of the last layer less that of the first."""
    found = []
    layers = sorted({row.layer for row in rows if row.layer.isdigit()}, key=int)
    if len(layers) > 1:
        first, last = (_by_seed([row for row in rows if row.layer == layer], "l0") for layer in (layers[0], layers[-1]))
        growth = mean_of([last[seed] - first[seed] for seed in first if seed in last])
        figure = f"L0 of layer {layers[-1]} less that of layer {layers[0]}: {in_words(growth, '+')}"
        found.append(Answer("L0 grows with depth.", _verdict(growth, 1), figure))
    scales = sorted(factors.get("scale", ()), key=float)
    if len(scales) > 1:
        claim = "Larger activations, with the same L1 coefficient, have a larger L0."
        found.append(_compared(rows, claim, "scale", scales[-1], scales[0], "l0", 1, "L0"))
    return found


def _by_seed(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Each seed's mean over everything else."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = row.metrics.get(metric)
        if value is not None:
            found.setdefault(row.cell.seed, []).append(value)
    return {seed: sum(values) / len(values) for seed, values in found.items()}
