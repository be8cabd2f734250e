"""How often the 95 % intervals of an evaluation hold the truth, where the truth is known.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py

Three parts. `simulated`: documents from known distributions. `tiny-res`: 309 documents of the bundled training text,
evaluated once with layer 2 of tiny-res, are the whole population; samples are drawn from them with replacement, so the
population's value is the truth. `features`: features of known density that fire in bursts. Every interval is made by
the function that `saezoo eval` uses. Beside it: the percentile bootstrap over documents, and the interval that takes
every token for independent. Prints a table and appends to results/coverage.csv. --part runs one part, --samples
changes the number of samples, --population FILE keeps the evaluated documents for the next time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, append
from torch import Tensor

from saezoo.evals import intervals
from saezoo.evals.counts import feature_counts
from saezoo.evals.intervals import GROUPS
from saezoo.evals.metrics import PER_TOKEN
from saezoo.results import Measured

METRICS = ("ce_clean", "ce_delta", "ce_score", "kl_sae", "explained_variance", "explained_variance_uncentred", "l0")
PER_TOKEN_INTERVAL = ("l0", "explained_variance_uncentred")
"""Those for which the documents hold sums of squares, so that tokens can be taken for independent."""
SIMULATED = (10, 20, 35, 100, 400)
REAL = (20, 35, 60, 100, 170)
STRIDE = 12
Key = tuple[str, str, str, int]
"""(part, what, method, documents)."""


class Documents(NamedTuple):
    """Sums over the tokens of each of N documents."""

    sums: dict[str, Tensor]
    x_sum_ND: Tensor
    squares: dict[str, Tensor]
    """Sums of squares of the `PER_TOKEN_INTERVAL` metrics' values."""
    fires_NF: Tensor

    def pick(self, chosen: Tensor) -> Documents:
        sums, squares = ({name: column[chosen] for name, column in each.items()} for each in (self.sums, self.squares))
        return Documents(sums, self.x_sum_ND[chosen], squares, self.fires_NF[chosen])

    def groups(self) -> tuple[Tensor, Tensor]:
        """(fires [G, F], tokens [G])."""
        group_N = torch.arange(len(self.x_sum_ND)) % GROUPS
        fires_GF = torch.zeros(GROUPS, self.fires_NF.shape[1], dtype=torch.float64)
        tokens_G = torch.zeros(GROUPS, dtype=torch.float64)
        return fires_GF.index_add_(0, group_N, self.fires_NF), tokens_G.index_add_(0, group_N, self.sums["tokens"])

    def values(self) -> dict[str, float]:
        ones = torch.ones(1, len(self.x_sum_ND), dtype=torch.float64)
        found = intervals.apply(self.sums, self.x_sum_ND, ones)
        return {name: float(found[name]) for name in METRICS}


class Hits:
    """Counts how often intervals hold the truth."""

    def __init__(self) -> None:
        self.seen: dict[Key, list[float]] = defaultdict(list)

    def add(self, part: str, what: str, method: str, documents: int, interval: Measured, truth: float) -> None:
        inside = interval.lo is not None and interval.hi is not None and interval.lo <= truth <= interval.hi
        self.seen[part, what, method, documents].append(float(inside))

    def add_rate(self, part: str, what: str, method: str, documents: int, rate: float) -> None:
        """The part of many features for which one sample's intervals hold the truth."""
        self.seen[part, what, method, documents].append(rate)

    def show(self, path: Path) -> None:
        """One line for each kind of interval, a column for each number of documents."""
        lines: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
        for (part, what, method, documents), rates in self.seen.items():
            rates_S = torch.tensor(rates, dtype=torch.float64)
            error = float(rates_S.std()) / math.sqrt(len(rates))
            lines[part, what, method][documents] = float(rates_S.mean()), error
            row = {"part": part, "what": what, "method": method, "documents": documents, "samples": len(rates)}
            append(path, row | {"coverage": f"{rates_S.mean():.4f}", "error": f"{error:.4f}"})
        for (part, what, method), cells in lines.items():
            text = "  ".join(f"{n}: {100 * c:.1f} -+ {100 * e:.1f}" for n, (c, e) in cells.items())
            print(f"{part:22} {what:30} {method:12} {text}")


def check_metrics(hits: Hits, part: str, sample: Documents, truth: dict[str, float], seed: int) -> None:
    """One sample's intervals by all methods."""
    n = len(sample.x_sum_ND)
    ours = intervals.bootstrap(sample.sums, sample.x_sum_ND, seed=seed)
    draws = intervals.apply(sample.sums, sample.x_sum_ND, intervals.redrawn(n, seed))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    tokens = float(sample.sums["tokens"].sum())
    for name in METRICS:
        hits.add(part, name, "saezoo", n, ours[name], truth[name])
        lo, hi = torch.quantile(draws[name], tails).tolist()
        hits.add(part, name, "percentile", n, Measured(ours[name].value, lo, hi), truth[name])
    for name in PER_TOKEN_INTERVAL:
        value = ours[name].known
        far = 1.96 * math.sqrt((float(sample.squares[name].sum()) / tokens - value**2) / tokens)
        hits.add(part, name, "tokens", n, Measured(value, value - far, value + far), truth[name])


# Simulated documents


def simulated(kind: str, n: int, generator: torch.Generator) -> Documents:
    """N documents of a mean of 600 tokens, each with its own level of everything; `kind` says how levels scatter."""

    def normal() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    def level() -> Tensor:
        """Mean 0, about 1 wide."""
        if kind == "skewed":
            return (0.8 * normal()).exp() / math.exp(0.32) - 1
        if kind == "heavy tails":
            chi2 = torch.stack([normal() for _ in range(3)]).square().sum(0)
            return normal() / (chi2 / 3).sqrt() / 1.7  # Student's t, 3 degrees of freedom
        if kind == "two kinds":
            other = torch.rand(n, generator=generator, dtype=torch.float64) < 0.1
            return 0.8 * normal() + 2 * other - 0.2
        if kind == "long ones differ":
            return 0.3 * long_N + math.sqrt(1 - 0.3**2) * normal()
        return normal()

    long_N = normal()
    spread = 0.0 if kind == "even" else 0.8
    tokens = (600 * (spread * long_N - spread**2 / 2).exp()).ceil()
    sums = {name: tokens.clone() for name in (*PER_TOKEN, "ce_zero", "ce_mean", "ce_unigram")}
    sums["ce_clean"] = tokens * (3.5 + 0.4 * level())
    sums["ce_sae"] = sums["ce_clean"] + tokens * (0.3 + 0.08 * level())
    sums["kl_sae"] = tokens * (0.3 + 0.08 * level())
    sums["ce_zero"] = tokens * (9 + 0.3 * level())
    sums["kl_zero"] = 6 * tokens
    sums["x2"] = tokens * (10 + 2 * level())
    unexplained = 0.2 + 0.04 * level()
    sums["unexplained"] = tokens * unexplained
    sums["e2"] = tokens * (2 + 0.4 * level())
    l0 = 20 + 3 * level()
    sums["l0"] = tokens * l0
    squares = {
        "l0": tokens * (l0**2 + 8**2),
        "explained_variance_uncentred": tokens * ((1 - unexplained) ** 2 + 0.1**2),
    }
    x_sum_ND = torch.stack([tokens * (1 + 0.3 * level()), tokens * 0.3 * level()], dim=1)
    return Documents(sums, x_sum_ND, squares, torch.zeros(n, 0, dtype=torch.float64))


def run_simulated(hits: Hits, samples: int) -> None:
    for kind in ("even", "uneven", "skewed", "heavy tails", "two kinds", "long ones differ"):
        generator = torch.Generator().manual_seed(0)
        truth = simulated(kind, 1_000_000, generator).values()
        for n in SIMULATED:
            for seed in range(samples):
                check_metrics(hits, f"simulated {kind}", simulated(kind, n, generator), truth, seed)


# Documents of the bundled text


def evaluated() -> Documents:
    """Every twelfth document of the bundled training text, evaluated with layer 2 of tiny-res."""
    from saezoo import tokens
    from saezoo.evals import evaluate
    from saezoo.evals.evaluate import reconstruct
    from saezoo.workflows import Options, prepare

    task = prepare("tiny-res", 2, tokens=128, protocol="standard", model=None, layout=None, options=Options())
    documents = list(tokens.builtin("train").documents())[::STRIDE]
    packed = tokens.pack(tokens.encode(task.lm.tokenizer, documents), bos=task.lm.bos, context=128)
    rows = tokens.concatenate(list(packed))
    blocks = evaluate(task.subjects, task.lm, rows)[0].blocks
    assert blocks is not None
    n, sae = int(rows.documents_RT.max()) + 1, task.subjects[0].sae
    fires_NF = torch.zeros(n, sae.config.d_sae, dtype=torch.float64)
    squares = {name: torch.zeros(n, dtype=torch.float64) for name in PER_TOKEN_INTERVAL}
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            tokens_BT = torch.from_numpy(rows.tokens_RT[start : start + 32])
            scored_BT = tokens_BT != task.lm.bos
            document_n = torch.from_numpy(rows.documents_RT[start : start + 32])[scored_BT]
            x_nD, y_nD, code = reconstruct(sae, task.lm.residuals(tokens_BT, [2])[2][scored_BT])
            fires_NF += code.fires_in(document_n, n)
            explained_n = 1 - (y_nD - x_nD).double().square().sum(-1) / x_nD.double().square().sum(-1)
            squares["l0"].index_add_(0, document_n, code.per_token()[0].double().square())
            squares["explained_variance_uncentred"].index_add_(0, document_n, explained_n.square())
    return Documents({name: column[:n] for name, column in blocks.sums.items()}, blocks.x_sum_ND[:n], squares, fires_NF)


def run_real(hits: Hits, samples: int, population: Documents) -> None:
    part, n_all = "tiny-res", len(population.x_sum_ND)
    truth, density_F = population.values(), population.fires_NF.sum(0) / population.sums["tokens"].sum()
    generator = torch.Generator().manual_seed(0)
    for n in REAL:
        for seed in range(samples):
            sample, other = (population.pick(torch.randint(n_all, (n,), generator=generator)) for _ in range(2))
            check_metrics(hits, part, sample, truth, seed)
            check_features(hits, part, n, sample.groups(), other.groups(), density_F)


# Features


def check_features(
    hits: Hits, part: str, n: int, sample: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], density_F: Tensor
) -> None:
    """Intervals of the densities and of the counts of one sample of n documents; `other`: another sample like it."""
    fires_GF, tokens_G = sample
    fires_F, tokens = fires_GF.sum(0), tokens_G.sum()
    lo_F, hi_F = intervals.wilson(fires_GF, tokens_G)
    p_F = fires_F / tokens
    # Wilson's interval with every token for independent.
    middle_F, half_F = p_F + 1.92 / tokens, 1.96 * (p_F * (1 - p_F) / tokens + (0.98 / tokens) ** 2).sqrt()
    naive_lo_F, naive_hi_F = ((middle_F + sign * half_F) / (1 + 3.84 / tokens) for sign in (-1, 1))
    for least, most in ((1e-5, 1e-4), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1), (1e-1, 1.0)):
        chosen = (density_F > least) & (density_F <= most)
        if int(chosen.sum()) < 10:
            continue
        what = f"density {least:g} to {most:g}"
        for method, lo, hi in (("saezoo", lo_F, hi_F), ("tokens", naive_lo_F, naive_hi_F)):
            inside_F = (lo <= density_F) & (density_F <= hi)
            hits.add_rate(part, what, method, n, float(inside_F[chosen].double().mean()))
    found = feature_counts(fires_GF, tokens_G)
    if found["dense_10"].lo is None:
        return
    hits.add(part, "dense_100", "saezoo", n, found["dense_100"], float((density_F > 0.01).sum()))
    hits.add(part, "dense_10", "saezoo", n, found["dense_10"], float((density_F > 0.1).sum()))
    hits.add(part, "dead, of another sample", "saezoo", n, found["dead"], float((other[0].sum(0) == 0).sum()))


def bursts(n: int, density_F: Tensor, burst: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(fires [G, F], tokens [G]) of n documents of uneven length. A document's rate of a feature is the density times
    a gamma variable of mean 1 and variance `burst`."""
    tokens_N = (600 * (0.8 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()).ceil()
    shape = torch.full((n, len(density_F)), 1 / burst, dtype=torch.float64)
    liking_NF = torch._standard_gamma(shape, generator=generator) * burst
    fires_NF = torch.poisson(liking_NF * density_F * tokens_N[:, None], generator=generator)
    sums = {"tokens": tokens_N}
    return Documents(sums, torch.zeros(n, 1), {}, fires_NF.minimum(tokens_N[:, None])).groups()


def run_features(hits: Hits, samples: int) -> None:
    density_F = 10 ** torch.linspace(-5, -0.7, 600, dtype=torch.float64)
    for burst in (0.3, 1.0):
        generator = torch.Generator().manual_seed(0)
        part = f"features burst {burst:g}"
        for n in (12, 35, 100, 400):
            for _ in range(samples // 2):
                first, second = (bursts(n, density_F, burst, generator) for _ in range(2))
                check_features(hits, part, n, first, second, density_F)


def unseen() -> Iterator[str]:
    """How often a feature of density `unseen_density` never fires: 5 % if tokens are independent."""
    generator = torch.Generator().manual_seed(0)
    for burst in (0.001, 1.0, 10.0):
        rates = []
        for _ in range(50):
            _, tokens_G = bursts(100, torch.zeros(1, dtype=torch.float64), 1.0, generator)
            limit = feature_counts(torch.ones(GROUPS, 1, dtype=torch.float64), tokens_G)["unseen_density"].known
            density_F = torch.full((1000,), limit, dtype=torch.float64)
            rates.append(float((bursts(100, density_F, burst, generator)[0].sum(0) == 0).double().mean()))
        yield f"never fires at unseen_density, 100 documents, burst {burst:g}: {100 * sum(rates) / len(rates):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["simulated", "tiny-res", "features"], action="append")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--population", type=Path)
    args = parser.parse_args()
    hits = Hits()
    parts: dict[str, Callable[[], Any]] = {
        "simulated": lambda: run_simulated(hits, args.samples),
        "tiny-res": lambda: run_real(hits, args.samples, population(args.population)),
        "features": lambda: run_features(hits, args.samples),
    }
    for name in args.part or parts:
        start = time.perf_counter()
        parts[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s")
    hits.show(RESULTS / "coverage.csv")
    if not args.part or "features" in args.part:
        print(*unseen(), sep="\n")


def population(path: Path | None) -> Documents:
    """The evaluated documents, from `path` if they are there."""
    if path is not None and path.exists():
        return Documents(*torch.load(path, weights_only=True))
    documents = evaluated()
    if path is not None:
        torch.save(tuple(documents), path)
    return documents


if __name__ == "__main__":
    main()
