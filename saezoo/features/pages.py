"""A dashboard's records as the JSON that the site's scripts read. static/data.js has the other half of this format."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saezoo.features.records import About, Example, Feature, Histogram, Logits, TokenStat, Weighted
from saezoo.results import Measured

BEFORE, AFTER = 24, 10
"""Tokens of a context that are shown before and after the firing."""
_LISTED = 5
"""Top tokens in the list of features, which shows and searches them."""
_PROMOTED = 10
"""Promoted tokens there: five are shown, all are searched."""

Json = Any


def number(value: float | None, digits: int = 5) -> float | None:
    """To `digits` significant ones; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def about_page(about: About) -> Json:
    """What a site says of one SAE; its features as ranges [start, stop)."""
    known = {field.name: getattr(about, field.name) for field in dataclasses.fields(about)}
    return known | {
        "features": ranges(about.features),
        "metrics": {name: _measured(value) for name, value in about.metrics.items()},
        "published": {name: number(value) for name, value in about.published.items()},
    }


def ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as the ranges [start, stop) that they fill."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[run[0][1], run[-1][1] + 1] for run in (list(pairs) for _, pairs in runs)]


class Columns:
    """The list of features, by column: what is sorted and searched without opening any feature."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}

    def add(self, feature: Feature) -> None:
        """One more row."""
        logits = feature.logits
        row = {
            "index": feature.index,
            "fires": feature.fires,
            "mean": number(feature.mean, 4),
            "max": number(feature.max, 4),
            "skew": number(logits.skew, 4) if logits else None,
            "kurtosis": number(logits.kurtosis, 4) if logits else None,
            "divergence": _measured(feature.divergence, 4),
            "tokens": tuple(stat.token for stat in feature.tokens_by_share[:_LISTED]),
            "promoted": tuple(weighted.token for weighted in logits.promoted[:_PROMOTED]) if logits else (),
        }
        for name, cell in row.items():
            self.columns[name].append(cell)


_COLUMNS = ["index", "fires", "mean", "max", "skew", "kurtosis", "divergence", "tokens", "promoted"]


def feature_page(feature: Feature) -> Json:
    """Everything on the page of a feature that is not in its row of the list."""
    contexts = iter(_contexts([*feature.top, *(e for part in feature.quantiles for e in part.examples)]))
    return {
        "index": feature.index,
        "histogram": _histogram(feature.histogram),
        "top": list(itertools.islice(contexts, len(feature.top))),
        "quantiles": [
            [number(part.lo), number(part.hi), part.firings, list(itertools.islice(contexts, len(part.examples)))]
            for part in feature.quantiles
        ],
        "byMean": [_stat(stat) for stat in feature.tokens_by_mean],
        "byShare": [_stat(stat) for stat in feature.tokens_by_share],
        "logits": _logits(feature.logits),
        "neighbours": [[near.layer, near.feature, number(near.cosine, 4)] for near in feature.neighbours],
        "coactive": [[c.feature, c.both, number(c.jaccard, 3), number(c.pmi, 3)] for c in feature.coactive],
    }


def _contexts(examples: Sequence[Example]) -> list[Json]:
    """Of each: row, document, first position shown, length of the row, position of the firing, ids, and activations as
    pairs of place in ids and value. All of a feature at once, for there are a million of them in a site."""
    if not examples:
        return []
    starts = [max(0, example.position - BEFORE) for example in examples]
    windows = [slice(start, e.position + AFTER + 1) for e, start in zip(examples, starts, strict=True)]
    values_W = np.concatenate([e.values_T[window] for e, window in zip(examples, windows, strict=True)])
    fires_N = np.flatnonzero(values_W)
    ends = np.cumsum(
        [min(window.stop, len(e.values_T)) - window.start for e, window in zip(examples, windows, strict=True)]
    )
    example_N = np.searchsorted(ends, fires_N, side="right")
    place_N = fires_N - np.concatenate([[0], ends])[example_N]
    pairs: list[list[float]] = [[] for _ in examples]
    columns = (example_N.tolist(), place_N.tolist(), significant(values_W[fires_N].astype(np.float64), 3).tolist())
    for i, place, value in zip(*columns, strict=True):
        pairs[i] += place, value
    return [
        [e.row, e.document, start, len(e.tokens_T), e.position, e.tokens_T[window].tolist(), fired]
        for e, start, window, fired in zip(examples, starts, windows, pairs, strict=True)
    ]


def significant(values_N: NDArray[np.float64], digits: int) -> NDArray[np.float64]:
    """Values above 0, to so many significant digits."""
    shift_N = digits - 1 - np.floor(np.log10(values_N))
    scale_N = 10.0 ** np.abs(shift_N)  # exact, so that what is divided by it has few digits
    down_N, up_N = np.round(values_N * scale_N) / scale_N, np.round(values_N / scale_N) * scale_N
    return np.asarray(np.where(shift_N >= 0, down_N, up_N))


def _stat(stat: TokenStat) -> Json:
    return [stat.token, number(stat.mean, 4), number(stat.share, 4), stat.fires, stat.occurrences]


def _logits(logits: Logits | None) -> Json:
    if logits is None:
        return None
    return {
        "promoted": _weighted(logits.promoted),
        "suppressed": _weighted(logits.suppressed),
        "histogram": _histogram(logits.histogram),
        "std": number(logits.std, 4),
        "skew": number(logits.skew, 4),
        "kurtosis": number(logits.kurtosis, 4),
    }


def _weighted(tokens: Sequence[Weighted]) -> Json:
    return [[weighted.token, number(weighted.logit, 4)] for weighted in tokens]


def _histogram(histogram: Histogram | None) -> Json:
    return None if histogram is None else [number(histogram.lo), number(histogram.hi), list(histogram.counts)]


def _measured(value: Measured, digits: int = 6) -> Json:
    """[value, lower end, upper end]; None if it is undefined."""
    return None if value.value is None else tuple(number(end, digits) for end in value)
