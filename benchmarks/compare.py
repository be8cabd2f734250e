"""Seconds, peak memory and optimality gap of matching two SAEs of GPT-2 small's size, and of their co-activation.

    OMP_NUM_THREADS=2 python benchmarks/compare.py [--cases random near half coactivation] [--features 24576]

Decoders: `random`, independent normal ones; `near`, the same with noise, in another order (cosine 0.995); `half`, one
half such pairs with more noise (cosine 0.89), the other half independent. `coactivation`: 65,536 tokens, 60 features
each of densities like 1/rank. Each in a fresh process; appends to results/compare.csv, with the machine's load at the
start and the processor seconds of the whole process, which other people's work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, append, device_name, in_fresh_process, versions

CASES = ("random", "near", "half", "coactivation")
D, TOKENS, L0 = 768, 65_536, 60


def decoders(case: str, features: int) -> tuple[Any, Any]:
    """Two sets of directions [F, 768]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(features, D, generator=generator) for _ in range(2))
    if case == "near":
        b = a + 0.1 * b
    elif case == "half":
        b[: features // 2] = a[: features // 2] + 0.5 * b[: features // 2]
    return a, b[torch.randperm(features, generator=generator)]


def matching(case: str, features: int) -> dict[str, Any]:
    """Neighbours both ways and the one-to-one matching."""
    from saezoo.evals.matching import match

    a, b = decoders(case, features)
    stages: list[tuple[str, float]] = []

    def note(stage: str, done: int, total: int) -> None:
        if done == total:
            stages.append((stage, round(time.perf_counter() - begin, 1)))
            print(*stages[-1], file=sys.stderr)

    begin = time.perf_counter()
    found = match(a, b, on_progress=note)
    seconds = time.perf_counter() - begin
    row = {"seconds": round(seconds, 1), "neighbours_s": stages[1][1], "rounds": found.rounds, "gap": found.gap}
    return row | {"mean_cosine": found.total / features, "shared": int((found.partner_cosine_F >= 0.7).sum())}


def coactivation(features: int) -> dict[str, Any]:
    """Every pair's count, and the best of each feature."""
    import numpy as np
    from scipy.sparse import csr_matrix

    from saezoo.evals.matching import coactivation

    random = np.random.default_rng(0)
    density = 1 / np.arange(10, features + 10)

    def fires() -> csr_matrix:
        features_P = random.choice(features, size=TOKENS * L0, p=density / density.sum()).astype(np.int32)
        ends = np.arange(0, TOKENS * L0 + 1, L0)
        found = csr_matrix((np.ones(TOKENS * L0, dtype=np.int32), features_P, ends), shape=(TOKENS, features))
        found.sum_duplicates()
        found.data[:] = 1
        return found

    a, b = fires(), fires()
    begin = time.perf_counter()
    coactivation(a, b)
    return {"seconds": round(time.perf_counter() - begin, 1), "tokens": TOKENS, "firings": int(a.nnz)}


def measure(case: str, features: int) -> dict[str, Any]:
    """One case in this process."""
    load = round(os.getloadavg()[0], 1)
    row = coactivation(features) if case == "coactivation" else matching(case, features)
    used = resource.getrusage(resource.RUSAGE_SELF)
    row |= {"process_cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_rss_mb": round(used.ru_maxrss * 1024 / 1e6)}
    return row | {"device": device_name("cpu"), "load_before": load}


COLUMNS = (
    "seconds",
    "neighbours_s",
    "rounds",
    "gap",
    "mean_cosine",
    "shared",
    "tokens",
    "firings",
    "process_cpu_s",
    "peak_rss_mb",
)


def main() -> None:
    """Measure each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--features", type=int, default=24_576)
    parser.add_argument("--csv", type=Path, default=RESULTS / "compare.csv")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for case in args.cases:
        if args.here:
            print(json.dumps(measure(case, args.features)))
            continue
        found = in_fresh_process(sys.executable, __file__, "--here", "--cases", case, "--features", str(args.features))
        row = {"case": case, "features": args.features, "d_in": D} | {name: found.get(name) for name in COLUMNS}
        row |= {"device": found["device"], "load_before": found["load_before"], **versions("torch", "scipy")}
        print(row)
        append(args.csv, row)


if __name__ == "__main__":
    main()
