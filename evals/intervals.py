"""95 % intervals. The independent unit is the document: tokens of one text resemble each other.

Means and ratios: percentile bootstrap over blocks of documents. Counts of dense features: delete-one-group jackknife
over 32 groups of documents. The count of alive features: what another sample of the same size would show, since any
redrawing of this one can only lose features, never find new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.special import stdtrit
from torch import Tensor

from saezoo.evals.metrics import BROKEN_DOWN, METRICS, Sums
from saezoo.results import Measured, measured

DRAWS = 1000
FEWEST = 10  # documents: with fewer the percentile bootstrap's intervals are far too narrow
GROUPS = 32
_T_975 = 2.04  # Student's t, 31 degrees of freedom


def bootstrap(sums_KN: dict[str, Tensor], x_sum_ND: Tensor, *, seed: int) -> dict[str, Measured]:
    """Every metric with its interval.

    `sums_KN`: name -> sum per block of documents [N]; `x_sum_ND`: sum of x per block [N, D]. Blocks without a scored
    token are left out. With fewer than ten blocks the interval is unknown.
    """
    full = sums_KN["tokens"] > 0
    sums = {name: column[full] for name, column in sums_KN.items()}
    x_sum_ND = x_sum_ND[full]
    n = len(x_sum_ND)
    values = _apply(sums, x_sum_ND, torch.ones(1, n, dtype=torch.float64))
    if n < FEWEST:
        return {name: measured(float(value[0])) for name, value in values.items()}
    generator = torch.Generator().manual_seed(seed)
    picks_RN = torch.randint(n, (DRAWS, n), generator=generator)
    weights_RN = torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(
        1, picks_RN, torch.ones(DRAWS, n, dtype=torch.float64)
    )
    draws = _apply(sums, x_sum_ND, weights_RN)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: measured(float(values[name][0]), *(float(q) for q in torch.quantile(draws[name], tails)))
        for name in values
    }


def _apply(sums: dict[str, Tensor], x_sum_ND: Tensor, weights_RN: Tensor) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {name: weights_RN @ column for name, column in sums.items()}
    mean_RD = (weights_RN @ x_sum_ND) / totals["tokens"][:, None]
    view: Sums = {**totals, "mean_x2": mean_RD.square().sum(-1)}
    return {metric.name: metric.formula(view) for metric in METRICS}


def alive_again(fires_GF: Tensor, tokens_G: Tensor) -> Measured:
    """The number of features that fired, with the 95 % range of that number in another sample of the same size.

    `fires_GF`: times each feature fired in each group of documents [G, F]; `tokens_G`: scored tokens per group. By
    symmetry another sample misses as many of this one's features as it shows new ones. Their expected number is at
    most that of the features seen in a single group (Good and Turing's first term), Q; half a feature is added for
    Q = 0. Two such Poisson numbers differ by 1.96 sqrt(2 (Q + 1/2)) at most, 95 times in 100: a cautious range.
    """
    fired_GF = fires_GF > 0
    value = float(fired_GF.any(0).sum())
    if int((tokens_G > 0).sum()) < GROUPS:
        return Measured(value, None, None)
    singles = float((fired_GF.sum(0) == 1).sum())
    margin = 1.96 * (2 * (singles + 0.5)) ** 0.5
    return Measured(value, max(0.0, value - margin), min(float(fires_GF.shape[1]), value + margin))


def jackknife(fires_GF: Tensor, tokens_G: Tensor, count: Callable[[Tensor, Tensor], Tensor]) -> Measured:
    """`count(fires_F, tokens)` with its interval.

    `fires_GF`: times each feature fired in each group of documents [G, F]; `tokens_G`: scored tokens per group. Says
    how the count scatters between samples of this size; not what a larger sample would find.
    """
    fires_F, tokens = fires_GF.sum(0), tokens_G.sum()
    value = float(count(fires_F, tokens))
    used = tokens_G > 0
    g = int(used.sum())
    if g < GROUPS:
        return Measured(value, None, None)
    without = torch.stack([count(fires_F - f, tokens - t).double() for f, t in zip(fires_GF, tokens_G, strict=True)])
    error = float(((g - 1) / g * (without - without.mean()).square().sum()).sqrt())
    n_features = fires_F.numel()
    return Measured(value, max(0.0, value - _T_975 * error), min(float(n_features), value + _T_975 * error))


def wilson(fires_GF: Tensor, tokens_G: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends [F] of each feature's density, a Wilson interval with the effective number of tokens.

    `fires_GF`: tokens on which each feature fires in each group of documents [G, F]; `tokens_G`: scored tokens of each.
    With p fires among N tokens, n = (N / d) (z / t)^2:

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    d is the feature's design effect, the delete-one-group jackknife's variance of p over p (1 - p) / N, at least 1: a
    word that a text is about fires in bursts. t is Student's quantile with as many degrees of freedom as there are
    groups of equal size that would be worth these (Kish), less one. All NaN, which is unknown, with fewer than ten
    groups. Wilson 1927, JASA 22:209; with effective numbers: Korn and Graubard 1998, Survey Methodology 24:193.
    """
    fires, tokens = fires_GF[tokens_G > 0].double(), tokens_G[tokens_G > 0].double()
    share_G1 = (tokens / tokens.sum())[:, None]
    g = len(tokens)
    if g < FEWEST:
        unknown_F = torch.full(fires_GF.shape[1:], torch.nan, dtype=torch.float64)
        return unknown_F, unknown_F.clone()
    p_F = fires.sum(0) / tokens.sum()
    change_GF = (fires / tokens.sum() - p_F * share_G1) / (1 - share_G1)
    simple_F = p_F * (1 - p_F) / tokens.sum()
    effect_F = ((g - 1) / g * change_GF.square().sum(0) / simple_F).nan_to_num(1.0).clamp(min=1)
    z, t = float(stdtrit(math.inf, 0.975)), float(stdtrit(float(1 / share_G1.square().sum()) - 1, 0.975))
    n_F = tokens.sum() / effect_F * (z / t) ** 2
    middle_F, half_F = p_F + z * z / (2 * n_F), z * (p_F * (1 - p_F) / n_F + (z / (2 * n_F)) ** 2).sqrt()
    scale_F = 1 + z * z / n_F
    # A feature that never fires has 0 in its interval, not the rounding error beside it.
    return ((middle_F - half_F) / scale_F).where(p_F > 0, 0), ((middle_F + half_F) / scale_F).where(p_F < 1, 1)


_BY_CELL = ("ce_clean", "ce_sae", "ce_delta", "kl_sae", "explained_variance_uncentred", "cosine", "norm_in", "l0")


def grouped(sums_GCP: Tensor) -> list[dict[str, Measured]]:
    """For each of C cells (positions, or tenths of the tokens), metrics from the `BROKEN_DOWN` sums of each group of
    documents. Intervals by the delete-one-group jackknife, where every group has a token in the cell."""
    total_CP = sums_GCP.sum(0)
    whole, without = _cells(total_CP), _cells(total_CP - sums_GCP)
    tokens = BROKEN_DOWN.index("tokens")
    full_C = (sums_GCP[..., tokens] > 0).all(0)
    columns = {"tokens": [measured(n) for n in total_CP[:, tokens].tolist()]}
    for name in _BY_CELL:
        value_C, theta_GC = whole[name], without[name]
        spread_C = (theta_GC - theta_GC.mean(0)).square().sum(0)
        half_C = _T_975 * ((GROUPS - 1) / GROUPS * spread_C).sqrt().where(full_C, torch.nan)
        ends = zip(value_C.tolist(), (value_C - half_C).tolist(), (value_C + half_C).tolist(), strict=True)
        columns[name] = [measured(*end) for end in ends]
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _cells(sums_CP: Tensor) -> dict[str, Tensor]:
    view = {name: sums_CP[..., k] for k, name in enumerate(BROKEN_DOWN)}
    return {metric.name: metric.formula(view) for metric in METRICS if metric.name in _BY_CELL}
