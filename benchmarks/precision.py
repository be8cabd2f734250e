"""Does the way of taking a step cost quality? tiny-res trained by every way with three seeds each, and measured.

    python benchmarks/precision.py --out FOLDER [--layer 2] [--tokens 8000000] [--seeds 0 1 2]

Appends one row per run to results/precision.csv; finished runs in FOLDER are not run again, unfinished ones resumed.
`--table` prints the rows as the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from common import RESULTS, append

WAYS = ("dense", "full", "half")
METRICS = ("ce_delta", "explained_variance", "l0", "alive_fraction")
HELDOUT = 131_072


def train_and_measure(way: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """One run in its own folder."""
    from saezoo.reproduction import Means, reproduce
    from saezoo.workflows import Options

    out = args.out / f"{way}-{seed}"
    [result] = reproduce(
        "tiny-res",
        args.layer,
        out=out,
        tokens=args.tokens,
        resume=any(out.glob("checkpoint-*")),
        eval_tokens=HELDOUT,
        means=Means(product=way),  # type: ignore[arg-type]
        options=Options(seed=seed, note=lambda message: print(message, file=sys.stderr)),
    )
    row: dict[str, object] = {"layer": args.layer, "tokens": args.tokens, "product": way, "seed": seed}
    row |= {"eval_tokens": result.tokens, "torch": result.versions["torch"]}
    for name in METRICS:
        value, lo, hi = result.metrics[name]
        row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
    return row


def table(path: Path) -> None:
    """Markdown: a row per run, and whether every value lies in every other run's interval of the same seed."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print("| product | seed | " + " | ".join(METRICS) + " |")
    print("|---" * (2 + len(METRICS)) + "|")
    for row in rows:
        cells = [f"{float(row[m]):.4g} [{float(row[m + '_lo']):.4g}, {float(row[m + '_hi']):.4g}]" for m in METRICS]
        print(f"| {row['product']} | {row['seed']} | " + " | ".join(cells) + " |")
    for metric in METRICS:
        outside = [
            f"{a['product']} {a['seed']} in {b['product']} {b['seed']}"
            for a in rows
            for b in rows
            if not float(b[metric + "_lo"]) <= float(a[metric]) <= float(b[metric + "_hi"])
        ]
        print(f"{metric}: {len(rows) ** 2 - len(outside)} of {len(rows) ** 2} inside", outside[:6])


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--layer", default="2")
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, default=RESULTS / "precision.csv")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    for seed in [] if args.table else args.seeds:
        for way in WAYS:
            if (args.out / f"{way}-{seed}" / "eval.csv").exists():
                continue
            append(args.csv, train_and_measure(way, seed, args))
    table(args.csv)


if __name__ == "__main__":
    main()
