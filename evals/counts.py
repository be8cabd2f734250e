"""Counts of features by how often they fire. A count means nothing without the number of tokens it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saezoo.evals.intervals import alive_again, redrawn_count, wilson
from saezoo.results import Measured, Result
from saezoo.spreadsheets import frame_csv

if TYPE_CHECKING:
    import pandas

_EDGES = [x / 2 for x in range(-12, 1)]  # log10 density from 1e-6 to 1, half a decade each


def feature_counts(fires_GF: Tensor, tokens_G: Tensor) -> dict[str, Measured]:
    """Dead, alive and dense features from firing counts per group of documents [G, F] and its tokens [G].

    Also `unseen_density`: features below it had more than a 5 % chance of never firing in so many tokens
    ((1 - p)^N > 0.05), so `dead` cannot tell them from truly dead ones.
    """
    n_features, tokens = fires_GF.shape[1], float(tokens_G.sum())
    again = alive_again(fires_GF, tokens_G)
    value, lo, hi = again.known, again.lo, again.hi
    alive, dead = Measured(value / n_features), Measured(n_features - value)
    if lo is not None and hi is not None:
        alive = Measured(value / n_features, lo / n_features, hi / n_features)
        dead = Measured(n_features - value, n_features - hi, n_features - lo)
    return {
        "alive_fraction": alive,
        "dead": dead,
        "dense_100": redrawn_count(fires_GF, tokens_G, lambda fires, n: (fires > n / 100).sum()),
        "dense_10": redrawn_count(fires_GF, tokens_G, lambda fires, n: (fires > n / 10).sum()),
        "unseen_density": Measured(1 - 0.05 ** (1 / tokens)),
    }


def histogram(fires_F: Tensor, tokens: float) -> dict[str, Any]:
    """The post's log10 density histogram: bins of half a decade, and the features that never fired, apart.

    Densities below the first edge are counted in the first bin.
    """
    seen = fires_F[fires_F > 0]
    log_density = (seen / tokens).log10().clamp(_EDGES[0], _EDGES[-1] - 1e-9)
    counts = torch.histogram(log_density.float(), torch.tensor(_EDGES)).hist
    return {
        "edges": _EDGES,
        "counts": [int(count) for count in counts],
        "never": int((fires_F == 0).sum()),
    }


def densities(result: Result) -> pandas.DataFrame:
    """One row per feature: `fires` of `tokens` scored tokens, its density, and the ends of that by `intervals.wilson`.

    NaN, an empty cell of a CSV, is unknown. Raises ValueError if `result` does not hold what it was computed from.
    """
    import pandas as pd

    if result.blocks is None:
        raise ValueError("this result was not measured here: the firing counts of its features are not known")
    fires_GF, tokens_G = result.blocks.fires_GF, result.blocks.tokens_G
    fires_F, tokens = fires_GF.sum(0).long(), int(tokens_G.sum())
    lo_F, hi_F = wilson(fires_GF, tokens_G)
    return pd.DataFrame(
        {
            "collection": result.collection,
            "layer": result.layer,
            "feature": range(len(fires_F)),
            "fires": fires_F.tolist(),
            "tokens": tokens,
            "density": (fires_F.double() / tokens).tolist(),
            "density_lo": lo_F.tolist(),
            "density_hi": hi_F.tolist(),
        }
    )


def densities_csv(results: Sequence[Result]) -> str:
    """CSV text: the rows of `densities` of all results."""
    import pandas as pd

    return frame_csv(pd.concat([densities(result) for result in results], ignore_index=True))
