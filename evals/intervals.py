"""95 % intervals. The independent unit is the document: tokens of one text resemble each other.

Means and ratios: studentised bootstrap over blocks of documents. Metrics by position or frequency: delete-one-group
jackknife over 32 groups of documents. Counts of dense features: bootstrap over these groups. Densities: Wilson, with
the effective number of tokens. The count of alive features: what another sample of the same size would show, since any
redrawing of this one can only lose features, never find new ones. docs/agreement.md has how often they cover the truth.

Shapes: N blocks of documents, G groups of them, R draws, D d_in, F features, C cells, P sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

from saezoo.evals.metrics import BROKEN_DOWN, METRICS, Metric, Sums
from saezoo.results import Measured, measured

DRAWS = 1000
FEWEST = 10  # documents, or groups of them: fewer are too few to see how they scatter
GROUPS = 32
_COUNT_DRAWS = 300  # their standard deviation is within 4 %

Statistics = Callable[[Tensor], dict[str, Tensor]]
"""How often each block counts in each draw [R, N] -> each metric's values [R]."""


def bootstrap(
    sums_KN: dict[str, Tensor], x_sum_ND: Tensor, *, seed: int, metrics: Sequence[Metric] = METRICS
) -> dict[str, Measured]:
    """Each of `metrics` with its interval.

    `sums_KN`: name -> sum per block of documents [N]; `x_sum_ND`: sum of x per block [N, D]. Blocks without a scored
    token are left out. With fewer than ten blocks the interval is unknown. `ce_mean` and `ce_unigram` keep the mean and
    the frequencies of the full sample.
    """
    with torch.inference_mode(False):  # tensors made in that mode cannot be differentiated
        full = sums_KN["tokens"] > 0
        sums = {name: column[full] for name, column in sums_KN.items()}
        x_sum_ND = x_sum_ND[full]
        return studentised(lambda weights_RN: apply(sums, x_sum_ND, weights_RN, metrics), sums["tokens"], seed=seed)


def studentised(statistics: Statistics, tokens_N: Tensor, *, seed: int) -> dict[str, Measured]:
    """Each statistic of N blocks of documents with its studentised bootstrap interval (bootstrap-t).

    `statistics` must be differentiable, and the same for weights of any common size; `tokens_N`: scored tokens of each
    block. A draw takes N blocks with replacement. With the value v and its standard error s, those of a draw v*, s*,
    and the 2.5 % and 97.5 % quantiles q of (v* - v) / s*, the interval is

        v - s max(c q_hi, t) to v + s max(-c q_lo, t)

    s* is the linearised error (root of the sum of squared slopes by weight), s its delete-one-block jackknife: each
    slope divided by 1 - h, h the block's share of the tokens. k = 1 / sum h^2 is the number of blocks of equal size
    that would be worth these (Kish), c = sqrt(k / (k - 1)), t Student's 97.5 % quantile for k - 1 degrees of freedom,
    since heavy tails make q too short. The percentile bootstrap forgets that s is uncertain and that errors are skewed:
    with ten documents it covers 79 to 92 times in 100. Efron 1981, Canad. J. Stat. 9:139; Hesterberg 2015, The
    American Statistician 69:371.
    """
    n = len(tokens_N)
    with torch.inference_mode(False), torch.enable_grad():
        if n < FEWEST:
            values = statistics(torch.ones(1, n, dtype=torch.float64))
            return {name: measured(float(value)) for name, value in values.items()}
        share_N = tokens_N.double() / tokens_N.sum()
        effective = _kish(share_N)
        wide, student = _widening(effective), _student(effective)
        draws, full = (_slopes(statistics, w) for w in (redrawn(n, seed), torch.ones(1, n, dtype=torch.float64)))
        tails = torch.tensor([0.975, 0.025], dtype=torch.float64)
        found = {}
        for (name, value_1, slope_1N, _), (_, value_R, slope_RN, weights_RN) in zip(full, draws, strict=True):
            error = float((slope_1N / (1 - share_N)).square().sum().mul((n - 1) / n).sqrt())
            error_R = (slope_RN.square_().mul_(weights_RN).sum(1) * n / (n - 1)).sqrt()
            # What does not scatter but by rounding is certain; errors of 0 in many draws, else, make the ends unknown.
            change_R = value_R - value_1
            moved_R = change_R.abs() > 1e-12 * value_1.abs()
            error = error if bool(moved_R.any()) else 0.0
            t_R = (change_R / error_R).where(moved_R, 0.0)
            value, quantiles = float(value_1), torch.quantile(t_R, tails).tolist()
            below, above = (error * max(wide * q, student) for q in (quantiles[0], -quantiles[1]))
            found[name] = measured(value, value - below, value + above)
        return found


def _slopes(statistics: Statistics, weights_RN: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """For each statistic (name, values [R], derivatives by the weights [R, N], the weights)."""
    weights_RN.requires_grad_()
    for name, value_R in statistics(weights_RN).items():
        (slope_RN,) = torch.autograd.grad(
            value_R.sum(), weights_RN, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        yield name, value_R.detach(), slope_RN, weights_RN.detach()


def redrawn(n: int, seed: int) -> Tensor:
    """How often each of n blocks is in each draw [R, n]."""
    picks_RN = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))
    ones_RN = torch.ones(DRAWS, n, dtype=torch.float64)
    return torch.zeros_like(ones_RN).scatter_add_(1, picks_RN, ones_RN)


def _kish(share_N: Tensor) -> float:
    return float(1 / share_N.square().sum())


def _widening(effective: float) -> float:
    """What the standard error of so few independent parts lacks."""
    return math.sqrt(effective / (effective - 1))


def _student(effective: float) -> float:
    """Student's 97.5 % quantile for so many independent parts."""
    return float(stdtrit(effective - 1, 0.975))


def apply(
    sums: dict[str, Tensor], x_sum_ND: Tensor, weights_RN: Tensor, metrics: Sequence[Metric] = METRICS
) -> dict[str, Tensor]:
    """Each of `metrics` [R] when each block counts as often as `weights_RN` says."""
    totals: dict[str, Tensor] = {name: weights_RN @ column for name, column in sums.items()}
    mean_RD = (weights_RN @ x_sum_ND) / totals["tokens"][:, None]
    view: Sums = {**totals, "mean_x2": mean_RD.square().sum(-1)}
    return {metric.name: metric.formula(view) for metric in metrics}


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


def redrawn_count(fires_GF: Tensor, tokens_G: Tensor, count: Callable[[Tensor, Tensor], Tensor]) -> Measured:
    """`count(fires_F, tokens)`, a number of features, with its interval.

    `fires_GF`: tokens on which each feature fires in each group of documents [G, F]; `tokens_G`: scored tokens of each.
    value -+ t c s, and half a feature since counts are whole: s the standard deviation of the count when the groups are
    drawn with replacement, t and c as in `wilson`. Says how the count scatters between samples of this size; not what
    a larger sample would find. (A delete-one jackknife is twice as wide as it need be: counts jump.)
    """
    fires_F, tokens = fires_GF.sum(0), tokens_G.sum()
    value = float(count(fires_F, tokens))
    if int((tokens_G > 0).sum()) < GROUPS:
        return Measured(value, None, None)
    draws = [
        count(fires_DF[i], tokens_D[i])
        for weights_DG in torch.split(redrawn(GROUPS, 0)[:_COUNT_DRAWS], 50)
        for fires_DF, tokens_D in [(weights_DG @ fires_GF, weights_DG @ tokens_G)]
        for i in range(len(tokens_D))
    ]
    effective = _kish(tokens_G / tokens)
    far = _student(effective) * _widening(effective) * float(torch.stack(draws).double().std()) + 0.5
    most = float(fires_F.numel())
    return Measured(value, max(0.0, float(math.ceil(value - far))), min(most, float(math.floor(value + far))))


def wilson(fires_GF: Tensor, tokens_G: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends [F] of each feature's density, a Wilson interval with the effective number of tokens.

    `fires_GF`: tokens on which each feature fires in each group of documents [G, F]; `tokens_G`: scored tokens of each.
    With density p of N tokens, n = (N / d) (z / tc)^2, and

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    d is the feature's design effect, the delete-one-group jackknife's variance of p over p (1 - p) / N, at least 1: a
    word that a text is about fires in bursts. t is Student's quantile with k - 1 degrees of freedom, k the number of
    groups of equal size that would be worth these (Kish), and c = sqrt(k / (k - 1)). NaN, which is unknown, with fewer
    than ten groups. Wilson 1927, JASA 22:209; with effective numbers: Korn and Graubard 1998, Surv. Methodol. 24:193.
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
    effective = _kish(share_G1)
    z, t = _student(math.inf), _student(effective) * _widening(effective)
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
    tokens_GC = sums_GCP[..., tokens]
    full_C = (tokens_GC > 0).all(0)
    effective_C = tokens_GC.sum(0).square() / tokens_GC.square().sum(0)
    t_C = torch.from_numpy(stdtrit((effective_C - 1).numpy(), 0.975)) * (effective_C / (effective_C - 1)).sqrt()
    columns = {"tokens": [measured(n) for n in total_CP[:, tokens].tolist()]}
    for name in _BY_CELL:
        value_C, theta_GC = whole[name], without[name]
        spread_C = (theta_GC - theta_GC.mean(0)).square().sum(0)
        half_C = t_C * ((GROUPS - 1) / GROUPS * spread_C).sqrt().where(full_C, torch.nan)
        ends = zip(value_C.tolist(), (value_C - half_C).tolist(), (value_C + half_C).tolist(), strict=True)
        columns[name] = [measured(*end) for end in ends]
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _cells(sums_CP: Tensor) -> dict[str, Tensor]:
    view = {name: sums_CP[..., k] for k, name in enumerate(BROKEN_DOWN)}
    return {metric.name: metric.formula(view) for metric in METRICS if metric.name in _BY_CELL}
