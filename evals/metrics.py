"""Every metric's formula, on sums over tokens.

The pass over the text (`evals/evaluate.py`) keeps one row of sums per block of documents. A metric is a function of
the total of those rows, never a mean of per-batch values, so it does not depend on the batch size; and its interval
comes from drawing the rows with replacement (`evals/intervals.py`). docs/metrics.md has the prose and the references.

Notation: x the activation that the SAE reads (centred if the SAE says so), y its reconstruction, e = y - x, f the
features; means run over scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Sums = Mapping[str, Tensor]
"""Name -> sum over tokens; any shape, the same for all (a scalar, or one value per bootstrap draw)."""


@dataclass(frozen=True)
class Metric:
    """One column of the result."""

    name: str
    formula: Callable[[Sums], Tensor]
    definition: str


PER_TOKEN = (
    "tokens",  # scored tokens
    "targets",  # scored tokens that have a next token in their row
    "ce_clean",
    "ce_sae",
    "kl_sae",
    "kl_zero",
    "e2",  # |e|^2
    "x2",  # |x|^2
    "unexplained",  # |e|^2 / |x|^2
    "cosine",
    "norm_in",  # |x|
    "norm_out",  # |y|
    "norm_ratio",  # |y| / |x|
    "l0",
    "l1",
)
"""The sums that the pass keeps. `ce_zero`, `ce_mean` and `ce_unigram`, which depend on the targets alone, are added at
the end; `mean_x2` is |mean of x|^2 (not a sum)."""

BROKEN_DOWN = ("tokens", "targets", "ce_clean", "ce_sae", "kl_sae", "unexplained", "cosine", "norm_in", "l0")
"""The sums that are also kept for each position and for each tenth of the tokens by frequency."""


def _mean(name: str) -> Callable[[Sums], Tensor]:
    return lambda s: s[name] / s["tokens"]


def _mean_ce(name: str) -> Callable[[Sums], Tensor]:
    return lambda s: s[name] / s["targets"]


def _score(baseline: str) -> Callable[[Sums], Tensor]:
    """Part of the way from the baseline's loss to the untouched model's that the reconstruction keeps."""
    return lambda s: (s[baseline] - s["ce_sae"]) / (s[baseline] - s["ce_clean"])


METRICS = (
    Metric("ce_clean", _mean_ce("ce_clean"), "next-token cross-entropy of the untouched model, nats"),
    Metric("ce_sae", _mean_ce("ce_sae"), "the same with the reconstruction spliced in"),
    Metric("ce_zero", _mean_ce("ce_zero"), "the same with the activation set to zero at every position"),
    Metric("ce_mean", _mean_ce("ce_mean"), "the same with the activation set to its mean at every position"),
    Metric("ce_unigram", _mean_ce("ce_unigram"), "that of the tokens' frequencies in the other documents"),
    Metric("ce_delta", lambda s: (s["ce_sae"] - s["ce_clean"]) / s["targets"], "ce_sae - ce_clean"),
    Metric("ce_score", _score("ce_zero"), "(ce_zero - ce_sae) / (ce_zero - ce_clean); flattering on a residual stream"),
    Metric("ce_score_mean", _score("ce_mean"), "(ce_mean - ce_sae) / (ce_mean - ce_clean)"),
    Metric("ce_score_unigram", _score("ce_unigram"), "(ce_unigram - ce_sae) / (ce_unigram - ce_clean)"),
    Metric("kl_sae", _mean("kl_sae"), "KL(clean || spliced) of the next-token distribution, nats"),
    Metric("kl_zero", _mean("kl_zero"), "KL(clean || zero-ablated), nats"),
    Metric("kl_score", lambda s: (s["kl_zero"] - s["kl_sae"]) / s["kl_zero"], "(kl_zero - kl_sae) / kl_zero"),
    Metric(
        "explained_variance",
        lambda s: 1 - s["e2"] / (s["x2"] - s["mean_x2"] * s["tokens"]),
        "1 - E|e|^2 / (E|x|^2 - |E x|^2)",
    ),
    Metric(
        "explained_variance_uncentred",
        lambda s: 1 - s["unexplained"] / s["tokens"],
        "mean of 1 - |e|^2/|x|^2, as the post of 2024 had it",
    ),
    Metric("mse", _mean("e2"), "E|e|^2, summed over dimensions"),
    Metric("cosine", _mean("cosine"), "mean cosine of x and y"),
    Metric("norm_in", _mean("norm_in"), "mean |x|"),
    Metric("norm_out", _mean("norm_out"), "mean |y|"),
    Metric("norm_ratio", _mean("norm_ratio"), "mean |y|/|x|"),
    Metric("l0", _mean("l0"), "mean number of features above 0"),
    Metric("l1", _mean("l1"), "mean sum of the features"),
)

OF_RECONSTRUCTION = tuple(metric for metric in METRICS if not metric.name.startswith(("ce_", "kl_")))
"""Those that need no forward pass behind the SAE."""
RECONSTRUCTION_SUMS = tuple(name for name in PER_TOKEN if name != "targets" and not name.startswith(("ce_", "kl_")))
