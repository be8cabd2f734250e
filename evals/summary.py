"""From sums to a `Result`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from saezoo.evals import counts, intervals
from saezoo.evals.metrics import PER_TOKEN
from saezoo.evals.parameters import parameter_metrics
from saezoo.evals.scoring import Scoring
from saezoo.evals.tally import BLOCKS, Subject, Tally
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel
from saezoo.results import Blocks, Measured, Result, measured


class Middle(NamedTuple):
    """Of a sample of activations."""

    median_D: Tensor
    """Geometric median."""
    spread: Tensor
    """Median distance from it."""
    n: int


def middle_of(sample_nD: Tensor) -> Middle:
    """The sample's geometric median, and how far from it activations lie."""
    median_D = geometric_median(sample_nD, ftol=1e-9)
    return Middle(median_D, (sample_nD - median_D).norm(dim=1).median(), len(sample_nD))


def summarise(
    subject: Subject,
    tally: Tally,
    middle: Middle,
    ends: Mapping[str, Tensor],
    scoring: Scoring,
    lm: LanguageModel,
    *,
    text: str,
    model: str,
) -> Result:
    """Every metric with its interval. `ends`: the sums [N] per block that depend on the targets alone."""
    sums = {name: tally.column(name) for name in PER_TOKEN} | dict(ends)
    tokens_N = sums["tokens"]
    tokens_G = torch.zeros(intervals.GROUPS, dtype=torch.float64)
    tokens_G.index_add_(0, torch.arange(BLOCKS) % intervals.GROUPS, tokens_N)
    mean_D = tally.x_sum_ND.sum(0) / tokens_N.sum()
    metrics = intervals.bootstrap(sums, tally.x_sum_ND, seed=scoring.seed)
    metrics |= counts.feature_counts(tally.fires_GF, tokens_G)
    metrics |= _median_distances(middle, mean_D, subject.sae.b_dec)
    metrics |= parameter_metrics(subject.sae)
    return Result(
        collection=subject.collection,
        layer=subject.layer,
        hook=subject.sae.config.hook or "",
        model=model,
        protocol=scoring.protocol,
        text=text,
        context=scoring.context,
        rows=len(scoring.tokens_RT),
        tokens=int(tokens_N.sum()),
        documents=len(torch.unique(scoring.document_RT)),
        seed=scoring.seed,
        device=str(lm.device),
        dtype=str(lm.dtype).removeprefix("torch."),
        versions=versions(),
        metrics=metrics,
        histogram=counts.histogram(tally.fires_GF.sum(0), float(tokens_N.sum())),
        published=subject.published,
        blocks=Blocks(sums, tally.x_sum_ND, tally.fires_GF, tokens_G),
        breakdowns={
            "position": intervals.grouped(tally.by_position_GTP),
            "frequency": intervals.grouped(tally.by_frequency_GQP),
        },
    )


def _median_distances(middle: Middle, mean_D: Tensor, b_dec_D: Tensor) -> dict[str, Measured]:
    """Where b_dec lies: distances to the geometric median of x, beside that of the mean."""
    median_D, spread, n = middle
    to_b_dec = (b_dec_D.float().cpu() - median_D).norm()
    to_mean = (mean_D.float() - median_D).norm()
    from_mean = (b_dec_D.float().cpu() - mean_D.float()).norm()
    values = {
        "gm_distance_b_dec": to_b_dec,
        "gm_distance_b_dec_relative": to_b_dec / spread,
        "gm_distance_mean": to_mean,
        "gm_distance_mean_relative": to_mean / spread,
        "mean_distance_b_dec": from_mean,
        "gm_spread": spread,
        "gm_sample": torch.tensor(n),
    }
    return {name: measured(float(value)) for name, value in values.items()}


def versions() -> dict[str, str]:
    """Of the software that numbers may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    try:
        packages["saezoo"] = version("saezoo")
    except ImportError:  # PackageNotFoundError: run from a checkout that is not installed
        packages["saezoo"] = "checkout"
    return packages | {"python": platform.python_version()}
