"""Seconds and peak memory of `cooccurrence` on synthetic firings of an SAE of GPT-2 small's size.

    OMP_NUM_THREADS=1 python benchmarks/cooccurrence.py

Features fire independently, with densities that are log-normal (a standard deviation of one decade, at most 1/4) and
sum to --l0. Writes the firings to a temporary folder, counts them in a fresh process, prints one JSON line and appends
to results/cooccurrence.csv.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, append, in_fresh_process

from saezoo.features.cooccurrence import cooccurrence
from saezoo.features.events import Events, Writer

STEP = 10_000  # tokens


def write(folder: Path, features: int, tokens: int, l0: float) -> None:
    """The firings of `tokens` tokens."""
    rng = np.random.default_rng(0)
    density_F = 10 ** rng.normal(0, 1, features)
    for _ in range(20):
        density_F = np.minimum(density_F * l0 / density_F.sum(), 0.25)
    writer = Writer(folder, features)
    for start in range(0, tokens, STEP):
        n_F = rng.binomial(STEP, density_F)
        feature_N = np.repeat(np.arange(features), n_F)
        token_N = np.concatenate([rng.choice(STEP, n, replace=False) for n in n_F if n])
        order_N = np.lexsort((feature_N, token_N))
        columns = torch.from_numpy(feature_N[order_N]), torch.from_numpy(token_N[order_N] + start)
        writer.add(*columns, torch.ones(len(order_N)))
    writer.flush()


def count(folder: Path, features: int, tokens: int, d_in: int) -> None:
    """Prints what the counting took."""
    events = Events([folder], features)
    W_dec_FD = torch.randn(features, d_in, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = cooccurrence(events, np.ones(tokens, dtype=bool), W_dec_FD)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    found.pairs_csv()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row: dict[str, float] = {"features": features, "tokens": tokens, "firings": int(events.fires_F.sum())}
    row |= {"counted": found.tokens, "seconds": round(seconds, 1), "csv_seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(row | {"before_mb": before // 1024, "peak_mb": peak // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=24_576)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--l0", type=float, default=60)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--folder", type=Path, help="count the firings that are there")
    args = parser.parse_args()
    if args.folder is not None:
        count(args.folder, args.features, args.tokens, args.d_in)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.features, args.tokens, args.l0)
        given = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("features", "tokens", "d-in")]
        found = in_fresh_process(sys.executable, __file__, f"--folder={folder}", *given)
    append(RESULTS / "cooccurrence.csv", {"l0": args.l0, **found})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
