"""Intervals: deterministic, honest about too few documents, and right as often as they claim."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saezoo.evals import Subject, evaluate
from saezoo.evals.intervals import FEWEST, GROUPS, alive_again, bootstrap, jackknife
from saezoo.evals.metrics import METRICS, PER_TOKEN
from saezoo.lm import load_language_model
from saezoo.results import Measured
from saezoo.sae import SAE, SAEConfig
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


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Of 300 simulated samples of 60 documents, 95 % should; 90 to 99 % allows for chance and for 60 being few."""
    hits = {"l0": 0, "mse": 0, "explained_variance": 0}
    truths = {"l0": 5.0, "mse": 1.0, "explained_variance": 0.75}
    for seed in range(300):
        found = bootstrap(documents(60, seed=1000 + seed), no_mean(60), seed=seed)
        for name, truth in truths.items():
            hits[name] += covered(found[name], truth)
    assert all(270 <= count <= 297 for count in hits.values()), hits


def test_constant_documents_have_an_interval_of_no_width() -> None:
    measured = bootstrap(documents(20, seed=0), no_mean(20), seed=0)["kl_zero"]
    assert measured == Measured(2.0, 2.0, 2.0)


def smooth(fires_F: Tensor, tokens: Tensor) -> Tensor:
    """A mean, for which the jackknife's standard error is known."""
    return fires_F.sum() / tokens


def test_jackknife_of_a_mean_is_the_textbook_standard_error() -> None:
    levels_G = torch.rand(GROUPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknife(100 * levels_G[:, None], torch.full((GROUPS,), 100.0, dtype=torch.float64), smooth)
    error = float(levels_G.std() / GROUPS**0.5)
    assert found.value == pytest.approx(float(levels_G.mean()))
    assert found.lo == pytest.approx(found.known - 2.04 * error)
    assert found.hi == pytest.approx(found.known + 2.04 * error)


def test_jackknife_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(300):
        levels_G = torch.rand(GROUPS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tokens_G = torch.full((GROUPS,), 100.0, dtype=torch.float64)
        hits += covered(jackknife(100 * levels_G[:, None], tokens_G, smooth), 0.5)
    assert 270 <= hits <= 297


def test_jackknife_stays_within_what_is_possible() -> None:
    """A feature that fired in one group only: alive is 1 or 0 without it."""
    fires_GF = torch.zeros(GROUPS, 1, dtype=torch.float64)
    fires_GF[3] = 1
    found = jackknife(fires_GF, torch.ones(GROUPS, dtype=torch.float64), lambda fires, _: (fires > 0).sum())
    assert (found.value, found.hi) == (1, 1)
    assert found.lo == 0


def test_a_certain_count_has_no_width() -> None:
    fires_GF = torch.tensor([[0.0, 9.0, 9.0]], dtype=torch.float64).expand(GROUPS, 3)
    dead = jackknife(fires_GF, torch.full((GROUPS,), 10.0, dtype=torch.float64), lambda fires, _: (fires == 0).sum())
    assert dead == Measured(1, 1, 1)


def test_jackknife_needs_every_group() -> None:
    tokens_G = torch.ones(GROUPS, dtype=torch.float64)
    tokens_G[5] = 0
    found = jackknife(tokens_G[:, None], tokens_G, smooth)
    assert found == Measured(1, None, None)


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
        has_interval = not name.startswith(("gm_", "unseen", "decoder", "encoder"))
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
