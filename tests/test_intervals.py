"""Intervals: deterministic, honest about too few documents, and right as often as they claim."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t
from torch import Tensor

from saezoo.evals import Subject, evaluate
from saezoo.evals.counts import feature_counts
from saezoo.evals.intervals import FEWEST, GROUPS, alive_again, bootstrap, grouped, redrawn_count, studentised, wilson
from saezoo.evals.metrics import BROKEN_DOWN, METRICS, PER_TOKEN
from saezoo.lm import load_language_model
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows


def documents(n: int, seed: int) -> dict[str, Tensor]:
    """Sums of `n` documents of 10 to 50 tokens; each has its own level of l0 and of squared error, mean 5 and 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens_N = torch.randint(10, 51, (n,), generator=generator).double()
    sums = {name: tokens_N.clone() for name in (*PER_TOKEN, "ce_zero", "ce_mean", "ce_unigram")}
    for name, level in (("l0", 5.0), ("e2", 1.0)):
        spread_N = torch.rand(n, generator=generator, dtype=torch.float64)
        sums[name] = tokens_N * level * (0.5 + spread_N)
    sums["x2"] = 4 * tokens_N
    for name, level in (("ce_zero", 3.0), ("ce_mean", 2.5), ("ce_unigram", 2.0)):
        sums[name] = level * tokens_N
    sums["kl_zero"] = 2 * tokens_N
    return sums


def no_mean(n: int) -> Tensor:
    return torch.zeros(n, 2, dtype=torch.float64)


def test_the_seed_decides() -> None:
    sums = documents(40, seed=0)
    first, again, other = (bootstrap(sums, no_mean(40), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["l0"].value == other["l0"].value
    assert first["l0"] != other["l0"]


def test_the_value_is_the_ratio_of_the_sums() -> None:
    sums = documents(40, seed=0)
    found = bootstrap(sums, no_mean(40), seed=0)
    assert list(found) == [metric.name for metric in METRICS]
    assert found["l0"].value == pytest.approx(float(sums["l0"].sum() / sums["tokens"].sum()), rel=1e-12)
    assert found["explained_variance"].value == pytest.approx(float(1 - sums["e2"].sum() / sums["x2"].sum()), rel=1e-12)
    for measured in found.values():
        assert measured.lo is not None and measured.hi is not None
        assert measured.lo - 1e-12 <= measured.known <= measured.hi + 1e-12


@pytest.mark.parametrize("scored", [1, FEWEST - 1, FEWEST])
def test_few_documents_have_no_interval(scored: int) -> None:
    """Blocks without a scored token do not count."""
    sums = documents(20, seed=0)
    keep_N = torch.arange(20) < scored
    found = bootstrap({name: column * keep_N for name, column in sums.items()}, no_mean(20), seed=0)
    assert (found["l0"].lo is None, found["l0"].hi is None) == (scored < FEWEST, scored < FEWEST)
    assert found["l0"].known > 0


def test_blocks_without_scored_tokens_change_nothing() -> None:
    sums = documents(30, seed=0)
    padded = {name: torch.cat([torch.zeros(7, dtype=torch.float64), column]) for name, column in sums.items()}
    assert bootstrap(padded, no_mean(37), seed=3) == bootstrap(sums, no_mean(30), seed=3)


def test_more_documents_narrow_the_interval() -> None:
    widths = []
    for n in (50, 800):
        measured = bootstrap(documents(n, seed=4), no_mean(n), seed=0)["l0"]
        assert measured.lo is not None and measured.hi is not None
        widths.append(measured.hi - measured.lo)
    assert 3 < widths[0] / widths[1] < 5.5  # the square root of 16


def covered(measured: Measured, truth: float) -> bool:
    assert measured.lo is not None and measured.hi is not None
    return measured.lo <= truth <= measured.hi


@pytest.mark.parametrize("n", [FEWEST, 60])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int) -> None:
    """Of 200 simulated samples, 95 % should; 92 to 98.5 % allows for chance."""
    hits = {"l0": 0, "mse": 0, "explained_variance": 0}
    truths = {"l0": 5.0, "mse": 1.0, "explained_variance": 0.75}
    for seed in range(200):
        found = bootstrap(documents(n, seed=1000 + seed), no_mean(n), seed=seed)
        for name, truth in truths.items():
            hits[name] += covered(found[name], truth)
    assert all(184 <= count <= 197 for count in hits.values()), hits


def mean_of(value_N: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda weights_RN: {"mean": weights_RN @ value_N / weights_RN.sum(1)}


def test_few_equal_documents_get_students_interval() -> None:
    """The mean of ten normal values: the bootstrap-t must come near the exact interval, the percentile one does not."""
    ratios = []
    for seed in range(40):
        value_N = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ones_N = torch.ones(10, dtype=torch.float64)
        found = studentised(mean_of(value_N), ones_N, seed=seed)["mean"]
        assert found.lo is not None and found.hi is not None
        exact = 2 * float(t.ppf(0.975, 9)) * float(value_N.std()) / 10**0.5
        ratios.append((found.hi - found.lo) / exact)
    assert 0.95 < sum(ratios) / 40 < 1.25


def test_intervals_lean_towards_the_long_tail() -> None:
    """Exponential values: a large one that was not drawn would raise the mean, so the upper end is farther away."""
    value_N = torch.empty(30, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    found = studentised(mean_of(value_N), torch.ones(30), seed=0)["mean"]
    assert found.lo is not None and found.hi is not None
    assert found.hi - found.known > 1.2 * (found.known - found.lo)


def test_one_document_that_decides_leaves_the_interval_unknown() -> None:
    """A third of the draws are without it and scatter not at all."""
    value_N = torch.eye(20, dtype=torch.float64)[0]
    found = studentised(mean_of(value_N), torch.ones(20), seed=0)["mean"]
    assert found == Measured(0.05, None, None)


def test_what_cancels_is_certain() -> None:
    """An SAE's metrics minus its own, say: slopes that are rounding errors make no interval."""
    value_N = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def difference(weights_RN: Tensor) -> dict[str, Tensor]:
        return {"nothing": (weights_RN @ value_N) / weights_RN.sum(1) - (weights_RN @ value_N) / weights_RN.sum(1)}

    assert studentised(difference, torch.ones(30), seed=0)["nothing"] == Measured(0, 0, 0)


def test_intervals_turn_with_the_sign_and_grow_with_the_scale() -> None:
    value_N = torch.rand(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens_N = torch.arange(1, 26).double()
    found = studentised(lambda w: {"a": w @ value_N, "b": -3 * (w @ value_N)}, tokens_N, seed=0)
    a, b = found["a"], found["b"]
    assert b.lo is not None and b.hi is not None and a.lo is not None and a.hi is not None
    assert (b.known, b.lo, b.hi) == pytest.approx((-3 * a.known, -3 * a.hi, -3 * a.lo))


def test_intervals_work_where_nothing_can_be_differentiated() -> None:
    with torch.inference_mode():
        inside = bootstrap(documents(40, seed=0), no_mean(40), seed=1)
    assert inside == bootstrap(documents(40, seed=0), no_mean(40), seed=1)


def test_cells_have_the_interval_of_a_mean_of_groups() -> None:
    """One cell, equal groups: Student's interval of the groups' levels, a little widened."""
    level_G = torch.rand(GROUPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums_GCP = torch.full((GROUPS, 1, len(BROKEN_DOWN)), 10.0, dtype=torch.float64)
    sums_GCP[:, 0, BROKEN_DOWN.index("l0")] = 10 * level_G
    found = grouped(sums_GCP)[0]["l0"]
    far = float(t.ppf(0.975, GROUPS - 1)) * float(level_G.std()) / (GROUPS - 1) ** 0.5
    assert tuple(found) == pytest.approx(
        (float(level_G.mean()), float(level_G.mean()) - far, float(level_G.mean()) + far)
    )


def test_constant_documents_have_an_interval_of_no_width() -> None:
    measured = bootstrap(documents(20, seed=0), no_mean(20), seed=0)["kl_zero"]
    assert measured == Measured(2.0, 2.0, 2.0)


def above(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda fires_F, tokens: (fires_F > limit * tokens).sum()


def test_a_count_is_that_of_the_whole_sample() -> None:
    fires_GF = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double().expand(GROUPS, 4)
    found = redrawn_count(fires_GF, torch.full((GROUPS,), 10.0, dtype=torch.float64), above(0.15))
    assert found == Measured(2, 2, 2)  # the groups are alike: no drawing changes it


def test_a_count_scatters_if_its_features_are_at_the_limit() -> None:
    """A hundred features that fire in half of the groups each: half of them are above their mean by chance."""
    generator = torch.Generator().manual_seed(0)
    fires_GF = torch.randint(2, (GROUPS, 100), generator=generator).double()
    found = redrawn_count(fires_GF, torch.ones(GROUPS, dtype=torch.float64), above(0.5))
    assert found.lo is not None and found.hi is not None
    assert found.value == int((fires_GF.sum(0) > GROUPS / 2).sum())
    assert found.lo == int(found.lo) and found.hi == int(found.hi)  # whole features
    assert 12 < found.hi - found.lo < 40  # 100 coins: 2 x 2.04 x sqrt(100 / 4) = 20


def test_counts_cover_the_truth_as_often_as_they_say() -> None:
    """150 features of known density around 1/100 on 64 documents in bursts, 200 times."""
    generator = torch.Generator().manual_seed(1)
    density_F = 10 ** (-3 + 2 * torch.rand(150, generator=generator, dtype=torch.float64))
    truth, hits = int((density_F > 0.01).sum()), 0
    for _ in range(200):
        fires_NF, tokens_N = bursts(64, density_F, generator)
        fires_GF, tokens_G = fires_NF.view(2, GROUPS, -1).sum(0), tokens_N.view(2, GROUPS).sum(0)
        hits += covered(redrawn_count(fires_GF, tokens_G, above(0.01)), truth)
    assert 180 <= hits <= 199


def test_a_count_stays_within_what_is_possible() -> None:
    generator = torch.Generator().manual_seed(0)
    for features in (1, 3):
        fires_GF = torch.randint(2, (GROUPS, features), generator=generator).double()
        found = redrawn_count(fires_GF, torch.ones(GROUPS, dtype=torch.float64), above(0.5))
        assert found.lo is not None and found.hi is not None
        assert 0 <= found.lo <= found.known <= found.hi <= features


def test_a_count_needs_every_group() -> None:
    tokens_G = torch.ones(GROUPS, dtype=torch.float64)
    tokens_G[5] = 0
    assert redrawn_count(tokens_G[:, None], tokens_G, above(0.5)) == Measured(1, None, None)


def bursts(n: int, density_F: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Firings [n, F] in documents of uneven length, each of which likes each feature more or less: rates between 0 and
    twice the density, and the documents' numbers of tokens [n]."""
    tokens_N = (500 * (0.7 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()).ceil()
    liking_NF = 2 * torch.rand(n, len(density_F), generator=generator, dtype=torch.float64)
    return torch.poisson(liking_NF * density_F * tokens_N[:, None], generator=generator), tokens_N


def test_wilson_of_independent_tokens_is_the_textbook_interval() -> None:
    """If the groups agree better than chance would have it, all tokens count; ends by scipy, at the same level."""
    fires_GF = torch.tensor([[1.0, 20.0, 50.0]], dtype=torch.float64).expand(GROUPS, 3)
    lo_F, hi_F = wilson(fires_GF, torch.full((GROUPS,), 100.0, dtype=torch.float64))
    wide = float(t.ppf(0.975, GROUPS - 1) * math.sqrt(GROUPS / (GROUPS - 1)) / norm.ppf(0.975))
    n = 100 * GROUPS / wide**2
    for density, lo, hi in zip((0.01, 0.2, 0.5), lo_F.tolist(), hi_F.tolist(), strict=True):
        z = float(norm.ppf(0.975))
        # The ends are the densities at which p is z standard errors away.
        for end in (lo, hi):
            assert abs(density - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)
        assert lo < density < hi


def test_wilson_of_a_feature_that_fires_always_or_never() -> None:
    tokens_G = torch.full((GROUPS,), 100.0, dtype=torch.float64)
    lo_F, hi_F = wilson(torch.stack([0 * tokens_G, tokens_G], dim=1), tokens_G)
    assert float(lo_F[0]) == 0
    assert float(hi_F[1]) == 1
    assert float(hi_F[0]) == pytest.approx(float(1 - lo_F[1]))
    assert 3 / 3200 < hi_F[0] < 5 / 3200  # the rule of three


def test_wilson_is_wider_where_a_feature_fires_in_bursts() -> None:
    """Two features that fire 320 times: ten times in each group, or only in four of them."""
    fires_GF = torch.full((GROUPS, 2), 10.0, dtype=torch.float64)
    fires_GF[:, 1] = torch.arange(GROUPS).remainder(8).eq(0) * 80
    lo_F, hi_F = wilson(fires_GF, torch.full((GROUPS,), 1000.0, dtype=torch.float64))
    width_F = hi_F - lo_F
    assert width_F[1] > 5 * width_F[0]
    assert (lo_F < 0.01).all() and (hi_F > 0.01).all() and (lo_F > 0).all()


@pytest.mark.parametrize("n", [20, 64])
def test_wilson_covers_the_truth_as_often_as_it_says(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    density_F = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1]).double().repeat_interleave(40)
    hits_F = torch.zeros(200)
    for _ in range(40):
        fires_NF, tokens_N = bursts(n, density_F, generator)
        group_N = torch.arange(n) % GROUPS
        fires_GF = torch.zeros(GROUPS, 200, dtype=torch.float64).index_add_(0, group_N, fires_NF)
        tokens_G = torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, group_N, tokens_N)
        lo_F, hi_F = wilson(fires_GF, tokens_G)
        hits_F += (lo_F <= density_F) & (density_F <= hi_F)
    rates = (hits_F.view(5, 40).mean(1) / 40).tolist()
    assert all(0.92 <= rate <= 0.99 for rate in rates), rates


def test_wilson_needs_ten_groups() -> None:
    tokens_G = (torch.arange(GROUPS) < FEWEST - 1).double()
    for end_F in wilson(torch.ones(GROUPS, 3, dtype=torch.float64) * tokens_G[:, None], tokens_G):
        assert end_F.isnan().all() and end_F.shape == (3,)
    tokens_G[20] = 1
    assert all(end.isfinite().all() for end in wilson(torch.zeros(GROUPS, 3, dtype=torch.float64), tokens_G))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(10, 40))
def test_wilson_holds_the_density_and_stays_between_0_and_1(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens_N = torch.randint(1, 50, (n,), generator=generator).double()
    fires_NF = (torch.rand(n, 6, generator=generator, dtype=torch.float64) ** 4 * (tokens_N[:, None] + 1)).floor()
    lo_F, hi_F = wilson(fires_NF, tokens_N)
    density_F = fires_NF.sum(0) / tokens_N.sum()
    assert ((lo_F >= 0) & (lo_F <= density_F) & (density_F <= hi_F) & (hi_F <= 1)).all()


def test_unseen_density_is_what_it_says() -> None:
    """A feature of just that density is missed by N independent tokens 5 times in 100."""
    tokens_G = torch.full((GROUPS,), 100.0, dtype=torch.float64)
    density = feature_counts(torch.ones(GROUPS, 1, dtype=torch.float64), tokens_G)["unseen_density"].known
    fired = torch.rand(500, 3200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < density
    assert 10 <= int((~fired.any(1)).sum()) <= 42  # 25 -+ 3.5 standard deviations


def test_the_order_of_the_rows_does_not_matter(tiny_model_folder: Path) -> None:
    lm = load_language_model(tiny_model_folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens_RT = torch.randint(0, 256, (40, 12), generator=generator)
    documents_RT = torch.arange(40)[:, None].expand(40, 12)
    shapes = {"W_enc": (16, 24), "b_enc": (24,), "W_dec": (24, 16), "b_dec": (16,)}
    weights = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    config = SAEConfig(16, 24, "blocks.1.hook_resid_pre", None, 12, True, True, True)
    subject = Subject(SAE(config, weights), "tiny", "1")
    order_R = torch.randperm(40, generator=generator)
    found = [
        evaluate([subject], lm, Rows(tokens_RT[rows].numpy(), documents_RT[rows].numpy()), batch_size=7)[0].metrics
        for rows in (torch.arange(40), order_R)
    ]
    for name, measured in found[0].items():
        has_interval = not name.startswith(("gm_", "mean_distance", "unseen", "decoder", "encoder"))
        parts = [(a, b) for a, b in zip(measured, found[1][name], strict=True) if a is not None]
        assert len(parts) == (3 if has_interval else 1), name
        tolerance = 1e-9 if has_interval else 1e-3  # the median's iteration depends on the order of the sums
        assert all(b == pytest.approx(a, rel=tolerance) for a, b in parts), name


def test_what_another_sample_would_show() -> None:
    """By hand: of sixty features one fires everywhere, two in one group each, the others never: Q = 2."""
    fires_GF = torch.zeros(GROUPS, 60, dtype=torch.float64)
    fires_GF[:, 0], fires_GF[4, 1], fires_GF[9, 2] = 2, 7, 1
    value, lo, hi = alive_again(fires_GF, torch.full((GROUPS,), 10.0, dtype=torch.float64))
    assert (value, lo) == (3, 0)
    assert hi == pytest.approx(3 + 1.96 * math.sqrt(5))


def test_the_range_of_alive_features_covers_another_sample() -> None:
    """Features of known rates, a thousand pairs of samples: the first one's range holds the second one's count."""
    generator = torch.Generator().manual_seed(0)
    rates_F = 10 ** (torch.rand(200, generator=generator, dtype=torch.float64) * 4 - 2.5)
    tokens_G = torch.ones(GROUPS, dtype=torch.float64)
    hits = 0
    for _ in range(1000):
        first, second = (torch.poisson((rates_F / GROUPS).expand(GROUPS, -1), generator=generator) for _ in range(2))
        _, lo, hi = alive_again(first, tokens_G)
        assert lo is not None and hi is not None
        hits += lo <= float((second.sum(0) > 0).sum()) <= hi
    assert hits >= 950


def test_the_range_of_alive_features_needs_documents() -> None:
    assert alive_again(torch.ones(GROUPS, 2), torch.eye(GROUPS)[0]) == Measured(2, None, None)
