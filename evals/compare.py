"""Two SAEs side by side: which features they share, by direction and by when they fire, and how their metrics differ.

docs/compare.md has the definitions with their references. The linear algebra is in `evals/matching.py`.

Shapes: F features of the first SAE (A), G of the second (B), D d_in, R rows, T positions, n scored tokens of a batch,
M scored tokens in all, P pairs of a token and a feature that fires on it.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from scipy.stats import binomtest
from torch import Tensor

from saezoo.errors import SaezooError, TextError, UsageError
from saezoo.evals import intervals, matching
from saezoo.evals.intervals import FEWEST
from saezoo.evals.matching import FEWEST_FIRES, Coactivation, Floats, Indices, Matching, OnProgress
from saezoo.lm import LanguageModel, depth_of
from saezoo.results import Blocks, Measured, measured
from saezoo.sae import SAE
from saezoo.tokens import Rows

THRESHOLD = 0.7
_ENCODE_BYTES = 128 << 20  # of one batch of features, float32; sets the batch size
_MOST_FIRINGS = 50_000_000  # of one SAE: at 8 bytes each, and with the products' copies of both, 1.6 GB
_MOST_PRODUCTS = 4_000_000_000  # sum over tokens of L0 of A times L0 of B: what the counting costs
_BASELINE_ROWS = 4096
_EDGES = [round(x / 20, 2) for x in range(-20, 21)]


class Feature(NamedTuple):
    """One feature of A and what corresponds to it in B. None: there is none, or it is not defined."""

    feature: int
    density: float
    """Fraction of the scored tokens on which it fires."""
    nearest: int | None
    """Of B, by decoder cosine; several features of A may have the same."""
    nearest_cosine: float | None
    partner: int | None
    """Of B, one-to-one, such that the sum of all cosines is as large as possible."""
    partner_cosine: float | None
    partner_density: float | None
    partner_jaccard: float | None
    """Tokens on which both fire / tokens on which either fires."""
    coactive: int | None
    """Of B, with the largest Jaccard index."""
    coactive_jaccard: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    model: str | None
    hook_a: str
    hook_b: str
    threshold: float
    seed: int
    features: tuple[Feature, ...]
    """One for each feature of A, in their order."""
    unique_a: tuple[int, ...]
    """Features of A without a partner of at least `threshold`."""
    unique_b: tuple[int, ...]
    numbers: dict[str, Measured]
    """By name, as in docs/compare.md. Intervals are over features."""
    histogram: dict[str, list[Any]]
    """`edges` of the cosine, and counts between them: `partner`, `nearest_ab`, `nearest_ba`."""

    def summary(self) -> list[tuple[str, float | None, float | None, float | None]]:
        """(name, value, lower end, upper end) of each number."""
        return [(name, *measured) for name, measured in self.numbers.items()]

    def to_csv(self) -> str:
        """One row per feature of A; unknown is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Feature._fields)
        writer.writerows(self.features)
        return text.getvalue()


def compare(
    a: SAE,
    b: SAE,
    lm: LanguageModel,
    rows: Rows,
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Comparison:
    """Match the features of two SAEs of one model, by decoder cosine and by co-activation on the same text.

    Args:
        a, b: SAEs of any numbers of features, at the same or at different layers.
        lm: the model that both read.
        rows: packed tokens; special ones are not counted.
        threshold: of the one-to-one partners' cosine, from which on a feature is shared.
        seed: of the baselines' random directions and shift.
        on_progress: called with (what is being done, how much is done, how much there is).

    Raises UsageError if the SAEs or the model do not fit together, TextError without a token to count, SaezooError
    if weights or activations are not finite.
    """
    _check(a, b, lm, rows, threshold)
    matched = matching.match(a.W_dec, b.W_dec, on_progress=on_progress)
    fires_MF, fires_MG = _firings((a, b), lm, rows, on_progress)
    together = matching.coactivation(fires_MF, fires_MG)
    features = _features(matched, together, fires_MF, fires_MG)
    shared = [row for row in features if row.partner_cosine is not None and row.partner_cosine >= threshold]
    unique_a = set(range(a.config.d_sae)) - {row.feature for row in shared} - set(matched.undefined_a.tolist())
    unique_b = set(range(b.config.d_sae)) - {row.partner for row in shared} - set(matched.undefined_b.tolist())
    counts = {
        "features_a": a.config.d_sae,
        "features_b": b.config.d_sae,
        "undefined_a": len(matched.undefined_a),
        "undefined_b": len(matched.undefined_b),
        "shared": len(shared),
        "unique_a": len(unique_a),
        "unique_b": len(unique_b),
    }
    numbers = {name: Measured(count) for name, count in counts.items()}
    numbers |= _cosine_numbers(matched, a.W_dec, b.W_dec, seed)
    numbers |= _coactivation_numbers(together, features, fires_MF, fires_MG, seed)
    return Comparison(
        model=a.config.model_name or b.config.model_name,
        hook_a=str(a.config.hook),
        hook_b=str(b.config.hook),
        threshold=threshold,
        seed=seed,
        features=features,
        unique_a=tuple(sorted(unique_a)),
        unique_b=tuple(sorted(unique_b)),
        numbers=numbers,
        histogram=_histogram(matched),
    )


def _check(a: SAE, b: SAE, lm: LanguageModel, rows: Rows, threshold: float) -> None:
    """Raise UsageError unless these can be compared."""
    if a.config.d_in != b.config.d_in:
        raise UsageError(
            f"the SAEs read activations of width {a.config.d_in} and {b.config.d_in}; compare SAEs of one model"
        )
    names = a.config.model_name, b.config.model_name
    if None not in names and names[0] != names[1]:
        raise UsageError(f"the SAEs read `{names[0]}` and `{names[1]}`; compare SAEs of one model")
    if a.config.d_in != lm.d_model:
        raise UsageError(f"the SAEs read width {a.config.d_in}, the model has {lm.d_model}; give the model they read")
    for which, sae in (("first", a), ("second", b)):
        if sae.config.hook is None:
            raise UsageError(f"the cfg.json of the {which} SAE does not say which hook it reads; add `hook_name` to it")
        depth_of(sae.config.hook, lm.n_layers)
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold {threshold:g} is no cosine of shared features; give one above 0, at most 1")
    if rows.tokens_RT.shape[1] > lm.n_positions:
        raise UsageError(f"rows of {rows.tokens_RT.shape[1]} tokens: the model has {lm.n_positions} positions")


# Co-activation


def _pairs(sae: SAE, x_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, feature, value), each [P], of the features above 0, sorted by token and then feature."""
    f_nF = sae.encode(x_nD)
    token_P, feature_P = (f_nF > 0).nonzero(as_tuple=True)
    return token_P, feature_P, f_nF[token_P, feature_P]


@torch.inference_mode()
def _firings(
    saes: tuple[SAE, SAE], lm: LanguageModel, rows: Rows, on_progress: OnProgress
) -> tuple[csr_matrix, csr_matrix]:
    """Which features of each SAE fire on which scored token: [M, F] and [M, G], 1 where one does.

    Reads the rows in their order, and no further than `_MOST_FIRINGS` and `_MOST_PRODUCTS` allow (but one batch at
    least), so that memory and time are bounded whatever the SAEs and the text.
    """
    widest = max(sae.config.d_sae for sae in saes)
    step = max(1, _ENCODE_BYTES // (4 * widest * rows.tokens_RT.shape[1]))
    depths = [depth_of(str(sae.config.hook), lm.n_layers) for sae in saes]
    special = torch.tensor(sorted(lm.special_ids), device=lm.device)
    found: tuple[_Firings, _Firings] = (_Firings(saes[0].config.d_sae), _Firings(saes[1].config.d_sae))
    products = 0
    for start in range(0, len(rows), step):
        tokens_BT = torch.from_numpy(rows.tokens_RT[start : start + step]).to(lm.device)
        scored_BT = ~torch.isin(tokens_BT, special)
        residuals = lm.residuals(tokens_BT, depths)
        for sae, depth, firings in zip(saes, depths, found, strict=True):
            x_nD = residuals[depth][scored_BT]
            if not x_nD.isfinite().all():
                raise SaezooError(
                    f"the activations at {sae.config.hook} are not finite; which features fire means nothing"
                )
            firings.add(_pairs(sae, x_nD), len(x_nD))
        products += int(found[0].per_token[-1] @ found[1].per_token[-1])
        on_progress("co-activation", min(start + step, len(rows)), len(rows))
        if products > _MOST_PRODUCTS or max(firings.total for firings in found) > _MOST_FIRINGS:
            break
    if not sum(map(len, found[0].per_token)):
        raise TextError("the text holds special tokens only; give one with text in it")
    return found[0].matrix(), found[1].matrix()


class _Firings:
    """The rows of a sparse matrix, as they come."""

    def __init__(self, n_features: int) -> None:
        self._n_features = n_features
        self._features: list[NDArray[np.int32]] = []
        self.per_token: list[Indices] = []
        self.total = 0

    def add(self, pairs: tuple[Tensor, Tensor, Tensor], tokens: int) -> None:
        """The pairs of `tokens` further tokens."""
        token_P, feature_P, _ = pairs
        self._features.append(feature_P.cpu().numpy().astype(np.int32))
        self.per_token.append(torch.bincount(token_P, minlength=tokens).cpu().numpy())
        self.total += len(feature_P)

    def matrix(self) -> csr_matrix:
        """[tokens, features], int32."""
        per_token, features = np.concatenate(self.per_token), np.concatenate(self._features)
        ends = np.concatenate([[0], np.cumsum(per_token)])
        ones = np.ones(len(features), dtype=np.int32)
        return csr_matrix((ones, features, ends), shape=(len(per_token), self._n_features))


# Tables and numbers


def _features(
    matched: Matching, together: Coactivation, fires_MF: csr_matrix, fires_MG: csr_matrix
) -> tuple[Feature, ...]:
    """The table: one row per feature of A."""
    tokens, n_F, n_G = fires_MF.shape[0], matching.counts(fires_MF), matching.counts(fires_MG)
    jaccard_F = _partners_jaccard(matched.partner_F, fires_MF, fires_MG)

    def row(i: int) -> Feature:
        nearest, partner = int(matched.nearest_ab_F[i]), int(matched.partner_F[i])
        coactive = int(together.best_ab_F[i])
        return Feature(
            feature=i,
            density=int(n_F[i]) / tokens,
            nearest=_known(nearest, nearest),
            nearest_cosine=_known(nearest, float(matched.nearest_ab_cosine_F[i])),
            partner=_known(partner, partner),
            partner_cosine=_known(partner, float(matched.partner_cosine_F[i])),
            partner_density=_known(partner, int(n_G[partner]) / tokens),
            partner_jaccard=None if np.isnan(jaccard_F[i]) else float(jaccard_F[i]),
            coactive=_known(coactive, coactive),
            coactive_jaccard=_known(coactive, float(together.jaccard_ab_F[i])),
        )

    return tuple(row(i) for i in range(len(n_F)))


_Number = TypeVar("_Number", int, float)


def _known(index: int, value: _Number) -> _Number | None:
    return None if index < 0 else value


def _partners_jaccard(partner_F: Indices, fires_MF: csr_matrix, fires_MG: csr_matrix) -> Floats:
    """Jaccard index of each feature and its partner [F]; NaN without a partner, or if one of them fired too rarely."""
    i = np.flatnonzero(partner_F >= 0)
    n_i, n_j = matching.counts(fires_MF)[i], matching.counts(fires_MG)[partner_F[i]]
    both = np.asarray(fires_MF[:, i].multiply(fires_MG[:, partner_F[i]]).sum(0)).ravel()
    jaccard_F = np.full(len(partner_F), np.nan)
    jaccard_F[i] = np.where((n_i >= FEWEST_FIRES) & (n_j >= FEWEST_FIRES), matching.jaccard(both, n_i, n_j), np.nan)
    return jaccard_F


def _cosine_numbers(matched: Matching, a_FD: Tensor, b_GD: Tensor, seed: int) -> dict[str, Measured]:
    """Means of the cosines, what they would be by chance, and how good the matching is."""
    has_partner = matched.partner_F >= 0
    numbers = {
        "mmcs_ab": _mean(matched.nearest_ab_cosine_F[matched.nearest_ab_F >= 0]),
        "mmcs_ba": _mean(matched.nearest_ba_cosine_G[matched.nearest_ba_G >= 0]),
        "matched_cosine": _mean(matched.partner_cosine_F[has_partner]),
        "matched": Measured(int(has_partner.sum())),
    }
    for name, rows, undefined in (("ab", b_GD, matched.undefined_b), ("ba", a_FD, matched.undefined_a)):
        known = len(rows) - len(undefined)
        numbers[f"mmcs_random_{name}"] = Measured(matching.expected_max_cosine(known, rows.shape[1]) if known else None)
    generator = torch.Generator().manual_seed(seed)
    numbers["mmcs_covariance_ab"] = _covariance_baseline(a_FD, b_GD, generator)
    numbers["mmcs_covariance_ba"] = _covariance_baseline(b_GD, a_FD, generator)
    numbers["matching_gap"] = Measured(matched.gap)
    return numbers


def _covariance_baseline(a_FD: Tensor, b_GD: Tensor, generator: torch.Generator) -> Measured:
    """Mean over (a sample of) A's features of the largest cosine with random directions: as many as B's, normally
    distributed with the second moments of B's directions, so that they prefer the same dimensions."""
    unit_GD = b_GD.detach().cpu().double()
    unit_GD = unit_GD / unit_GD.norm(dim=1, keepdim=True).clamp(min=1e-300)
    values, axes = torch.linalg.eigh(unit_GD.T @ unit_GD)
    shape = (int((unit_GD.abs().amax(1) > 0).sum()), b_GD.shape[1])
    random_GD = torch.randn(shape, generator=generator, dtype=torch.float64) * values.clamp(min=0).sqrt() @ axes.T
    sample = torch.randperm(len(a_FD), generator=generator)[:_BASELINE_ROWS]
    index, cosine = matching.nearest(a_FD.detach().cpu()[sample], random_GD, candidates=1)
    return _mean(cosine[index >= 0])


def _coactivation_numbers(
    together: Coactivation, features: tuple[Feature, ...], fires_MF: csr_matrix, fires_MG: csr_matrix, seed: int
) -> dict[str, Measured]:
    """Means of the Jaccard indices, what they would be by chance, and how often cosine and co-activation agree."""
    both = [row for row in features if row.nearest is not None and row.coactive is not None]
    agree = sum(row.nearest == row.coactive for row in both)
    partners = np.array([row.partner_jaccard for row in features if row.partner_jaccard is not None])
    numbers = {
        "tokens": Measured(fires_MF.shape[0]),
        "rare_a": Measured(int((matching.counts(fires_MF) < FEWEST_FIRES).sum())),
        "rare_b": Measured(int((matching.counts(fires_MG) < FEWEST_FIRES).sum())),
        "jaccard_ab": _mean(together.jaccard_ab_F[together.best_ab_F >= 0]),
        "jaccard_ba": _mean(together.jaccard_ba_G[together.best_ba_G >= 0]),
        "jaccard_partner": _mean(partners),
    }
    generator = np.random.default_rng(seed)
    sample = generator.permutation(fires_MF.shape[1])[:_BASELINE_ROWS]
    shift = int(generator.integers(fires_MF.shape[0] // 4, 1 + 3 * fires_MF.shape[0] // 4))
    shifted_MG = vstack([fires_MG[shift:], fires_MG[:shift]]).tocsr()
    chance = matching.coactivation(fires_MF[:, sample], shifted_MG)
    numbers["jaccard_shifted_ab"] = _mean(chance.jaccard_ab_F[chance.best_ab_F >= 0])
    numbers["agreement"] = Measured(None)
    if both:
        ends = binomtest(agree, len(both)).proportion_ci(method="wilson")
        numbers["agreement"] = measured(agree / len(both), float(ends.low), float(ends.high))
    return numbers


def _mean(values: Floats) -> Measured:
    """The mean over features, and 1.96 standard errors to either side."""
    if not len(values):
        return Measured(None)
    value = float(values.mean())
    if len(values) < FEWEST:
        return Measured(value)
    margin = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return Measured(value, value - margin, value + margin)


def _histogram(matched: Matching) -> dict[str, list[Any]]:
    cosines = {
        "partner": matched.partner_cosine_F[matched.partner_F >= 0],
        "nearest_ab": matched.nearest_ab_cosine_F[matched.nearest_ab_F >= 0],
        "nearest_ba": matched.nearest_ba_cosine_G[matched.nearest_ba_G >= 0],
    }
    counts = {name: np.histogram(values.clip(-1, 1), _EDGES)[0].tolist() for name, values in cosines.items()}
    return {"edges": _EDGES, **counts}


# Differences of metrics


def paired_differences(a: Blocks, b: Blocks, *, seed: int = 0) -> dict[str, Measured]:
    """Every metric of A minus that of B, with the 95 % interval of the difference.

    The studentised bootstrap of `evals/intervals.py`, each draw taking the same documents for both SAEs: what makes a
    document hard for both cancels. Fewer than ten blocks: no interval; a metric that is undefined for one of them has
    no difference. Raises UsageError unless both were measured on the same tokens.
    """
    tokens_N = a.sums["tokens"]
    if not torch.equal(tokens_N, b.sums["tokens"]):
        raise UsageError("the two results are not of the same tokens of the same documents; measure both on one text")
    full = tokens_N > 0

    def difference(weights_RN: Tensor) -> dict[str, Tensor]:
        of_a, of_b = (intervals.apply(sums, x_sum_ND, weights_RN) for sums, x_sum_ND in sides)
        return {name: of_a[name] - of_b[name] for name in of_a}

    with torch.inference_mode(False):  # tensors made in that mode cannot be differentiated
        sides = [({name: column[full] for name, column in each.sums.items()}, each.x_sum_ND[full]) for each in (a, b)]
        return intervals.studentised(difference, tokens_N[full], seed=seed)
