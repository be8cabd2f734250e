"""Bytes and seconds of one checkpoint at GPT-2 small's size, for one layer and for twelve.

    python benchmarks/checkpoint.py --folder FOLDER [--dtype float32] [--sizes 1 12]

Weights, two moments and counters of each SAE, and half a shuffle buffer in the model's dtype: what a run saves between
two refills. Every SAE's tensors are the same memory, which the writer does not notice. Appends to
results/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import RESULTS, append, versions

D, F, HALF_BUFFER = 768, 24_576, 64 * 32 * 128


def main() -> None:
    """Save, load, print and record each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--csv", type=Path, default=RESULTS / "checkpoint.csv")
    args = parser.parse_args()

    import torch

    from saezoo import checkpoint

    sae = {
        f"W_{side}{moment}": torch.randn(F, D) for side in ("enc", "dec") for moment in ("", ".exp_avg", ".exp_avg_sq")
    }
    sae |= {name: torch.zeros(F, dtype=torch.int64) for name in ("since_fired", "window_fires")}
    storage_ND = torch.randn(HALF_BUFFER, D).to(getattr(torch, args.dtype))
    for n in args.sizes:
        tensors = {f"{i}.{name}": tensor for i in range(n) for name, tensor in sae.items()}
        tensors |= {f"storage.{i}": storage_ND for i in range(n)}
        cost = checkpoint.save(args.folder, n, tensors, {}, {})
        begin = time.perf_counter()
        checkpoint.load(args.folder, {})
        load_s = time.perf_counter() - begin
        checkpoint.remove(args.folder)
        row = {"saes": n, "buffer": args.dtype, "bytes": cost.bytes, "save_s": round(cost.seconds, 2)}
        row |= {"load_s": round(load_s, 2), "seconds_apart_for_2_percent": round(cost.seconds / 0.02)}
        print(row)
        append(args.csv, {**row, **versions("torch")})


if __name__ == "__main__":
    main()
