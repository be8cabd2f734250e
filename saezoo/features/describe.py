"""What a feature's firings say about it: exact, and the same at each run.

Ties go to the earlier token or the lower id. What is drawn hangs on the seed, the feature, the quantile and how many
firings it has; not on the batch size or the number of processes.

Shapes: M tokens of the text (row x context + position), T positions of a row, N firings, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saezoo.evals.scoring import Scoring
from saezoo.features.divergence import divergence
from saezoo.features.events import Firings
from saezoo.features.records import Example, Feature, Histogram, Quantile, TokenStat
from saezoo.features.sampling import draw

Integers = NDArray[np.int64]

TOP = 20
"""Contexts with the largest activations."""
QUANTILES = 5
DRAWN = 5
"""Examples from each quantile."""
BINS = 50
TOKENS = 10
"""Rows of a table of tokens."""
FEWEST_OCCURRENCES = 5
"""Of a token that is ranked by its mean activation: the mean over fewer says little."""


@dataclass(frozen=True)
class Text:
    """The text, flat."""

    tokens_M: Integers
    documents_M: Integers
    occurrences_V: Integers
    """Scored tokens of each kind."""
    scored: int
    context: int
    seed: int

    @classmethod
    def of(cls, scoring: Scoring) -> Text:
        """Of the rows that were scored."""
        tokens_M = scoring.tokens_RT.numpy().reshape(-1)
        scored_M = scoring.scored_RT.numpy().reshape(-1)
        return cls(
            tokens_M,
            scoring.document_RT.numpy().reshape(-1),
            np.bincount(tokens_M[scored_M], minlength=scoring.vocab),
            int(scored_M.sum()),
            scoring.context,
            scoring.seed,
        )


def describe(index: int, firings: Firings, text: Text) -> Feature:
    """What can be said from a feature's firings alone; its weights' and its partners' part is None or empty."""
    value_N, n = firings.value_N, len(firings.value_N)
    if n == 0:
        return Feature(index, 0, 0.0, None, None, None)
    order_N = np.argsort(-value_N, kind="stable")
    top_K = _top_rows(order_N, firings.token_N // text.context)
    ends = [n * q // QUANTILES for q in range(QUANTILES + 1)]
    groups = [order_N[start:stop] for start, stop in itertools.pairwise(ends) if stop > start]
    drawn = [group[draw(len(group), DRAWN, text.seed, index, q)] for q, group in enumerate(groups)]
    examples = iter(_examples(firings, np.concatenate([top_K, *drawn]), text))
    top = tuple(itertools.islice(examples, len(top_K)))
    quantiles = tuple(
        Quantile(
            float(value_N[group[-1]]), float(value_N[group[0]]), len(group), tuple(itertools.islice(examples, len(d)))
        )
        for group, d in zip(groups, drawn, strict=True)
    )
    by_mean, by_share = token_stats(firings, text)
    top_token_K, middle_token_N = firings.token_N[top_K], firings.token_N[order_N[ends[1] : ends[4]]]
    return Feature(
        index=index,
        fires=n,
        density=n / text.scored,
        mean=float(value_N.mean(dtype=np.float64)),
        max=float(value_N[order_N[0]]),
        histogram=histogram(value_N),
        top=top,
        quantiles=tuple(quantiles),
        tokens_by_mean=by_mean,
        tokens_by_share=by_share,
        divergence=divergence(
            text.tokens_M[top_token_K],
            text.documents_M[top_token_K],
            text.tokens_M[middle_token_N],
            text.documents_M[middle_token_N],
        ),
    )


def histogram(value_N: NDArray[np.float32], bins: int = BINS) -> Histogram:
    """Counts in equal bins from the smallest to the largest value. If all are equal they are in the last."""
    lo, hi = float(value_N.min()), float(value_N.max())
    place_N = np.full(len(value_N), bins - 1)
    if hi > lo:
        place_N = np.minimum(((value_N.astype(np.float64) - lo) / (hi - lo) * bins).astype(np.int64), bins - 1)
    return Histogram(lo, hi, tuple(np.bincount(place_N, minlength=bins).tolist()))


def token_stats(firings: Firings, text: Text) -> tuple[tuple[TokenStat, ...], tuple[TokenStat, ...]]:
    """The kinds of tokens with the largest mean activation, and with the largest share of it."""
    id_N = text.tokens_M[firings.token_N]
    if len(id_N) < len(text.occurrences_V) // 8:  # then sorting is quicker than to look at the whole vocabulary
        kind_K, of_N, fires_K = np.unique(id_N, return_inverse=True, return_counts=True)
        sum_K = np.bincount(of_N, weights=firings.value_N)
    else:
        fires_V = np.bincount(id_N, minlength=len(text.occurrences_V))
        kind_K = np.flatnonzero(fires_V)
        fires_K, sum_K = fires_V[kind_K], np.bincount(id_N, firings.value_N, len(fires_V))[kind_K]
    mean_K, total = sum_K / text.occurrences_V[kind_K], sum_K.sum()

    def stats(chosen: Integers) -> tuple[TokenStat, ...]:
        return tuple(
            TokenStat(
                int(kind_K[k]),
                float(mean_K[k]),
                float(sum_K[k] / total),
                int(fires_K[k]),
                int(text.occurrences_V[kind_K[k]]),
            )
            for k in chosen
        )

    often_K = np.flatnonzero(text.occurrences_V[kind_K] >= FEWEST_OCCURRENCES)
    return stats(often_K[largest(mean_K[often_K], TOKENS)]), stats(largest(sum_K, TOKENS))


def largest(x_K: NDArray[Any], most: int) -> Integers:
    """Places of the `most` largest, largest first; of equal ones the first."""
    return np.argsort(-x_K, kind="stable")[:most]


def _top_rows(order_N: Integers, row_N: Integers) -> Integers:
    """The strongest firing of each of the `TOP` rows with the strongest, strongest first."""
    found: dict[int, int] = {}
    for i in order_N:
        if len(found) == TOP:
            break
        found.setdefault(int(row_N[i]), int(i))
    return np.array(list(found.values()))


def _examples(firings: Firings, chosen_K: Integers, text: Text) -> Iterator[Example]:
    """Firings, by their places, with their rows."""
    row_K, position_K = np.divmod(firings.token_N[chosen_K], text.context)
    first_K = row_K * text.context
    start_K, stop_K = np.searchsorted(firings.token_N, [first_K, first_K + text.context])
    facts = zip(*(x.tolist() for x in (row_K, position_K, first_K, start_K, stop_K)), strict=True)
    for row, position, first, start, stop in facts:
        values_T = np.zeros(text.context, dtype=np.float32)
        values_T[firings.token_N[start:stop] - first] = firings.value_N[start:stop]
        tokens_T = text.tokens_M[first : first + text.context]
        yield Example(row, position, int(text.documents_M[first + position]), tokens_T, values_T)
