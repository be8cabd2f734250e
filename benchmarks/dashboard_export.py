"""Seconds, peak memory and bytes of exporting the features of an SAE of GPT-2 small's shape, from made-up firings.

    OMP_NUM_THREADS=1 python benchmarks/dashboard_export.py [--features 1024] [--tokens 65536]

65,536 tokens, 60 firings each, densities of the 24,576 features like 1/rank; random decoder and unembedding. Times the
export alone, without the pass over the text: SAEDashboard's batches, and Neuronpedia's import files besides. Each in a
fresh process; appends to results/dashboard_export.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, append, device_name, in_fresh_process, versions

F, D, V, T, L0 = 24_576, 768, 50_257, 128, 60
ROWS_AT_ONCE = 64
CASES = ("batches", "both")


class Vocabulary:
    """As much of a tokenizer as an export asks for."""

    def get_vocab(self) -> dict[str, int]:
        """Spelling -> id."""
        return {f"Ġw{token}": token for token in range(V)}


def material(features: int, tokens: int, folder: Path) -> Any:
    """Made-up firings, in `folder`."""
    import torch

    from saezoo.features.correlation import Sums
    from saezoo.features.events import Events, Writer
    from saezoo.features.records import About
    from saezoo.features.saedashboard import Material
    from saezoo.tokens import Rows

    random, n_rows = np.random.default_rng(0), tokens // T
    density = np.cumsum(1 / np.arange(10, F + 10))
    order = random.permutation(F)
    writer = Writer(folder, F)
    for start in range(0, n_rows, ROWS_AT_ONCE):
        place_N = np.arange(start * T, min(start + ROWS_AT_ONCE, n_rows) * T)
        place_N = place_N[place_N % T > 0]
        feature_NL = order[np.searchsorted(density, random.random((len(place_N), L0)) * density[-1])]
        pairs = np.unique(place_N[:, None] * F + feature_NL)
        value = random.exponential(size=len(pairs)).astype(np.float32)
        writer.add(torch.from_numpy(pairs % F), torch.from_numpy(pairs // F), torch.from_numpy(value))
    writer.flush()
    scored_RT = np.ones((n_rows, T), dtype=bool)
    scored_RT[:, 0] = False
    about = About("made-up", "8", "blocks.8.hook_resid_pre", "gpt2-small", D, F, "made up", T, n_rows,
                  int(scored_RT.sum()), 1, 0, tuple(range(features)))  # fmt: skip
    tokens_RT = random.integers(1, V, (n_rows, T))
    sums = Sums(random.normal(size=D), np.full(D, 1e5), random.normal(size=(F, D)))
    rows = Rows(tokens_RT, np.zeros_like(tokens_RT))
    decoder, unembedding = torch.randn(F, D), torch.randn(D, V)
    return Material(about, Events([folder], F), rows, scored_RT, sums, decoder, unembedding, Vocabulary())


def run(case: str, features: int, tokens: int) -> dict[str, Any]:
    """One export, in this process."""
    from saezoo.features.export import BatchFiles, export, place_of
    from saezoo.features.neuronpedia import ImportFiles, Release

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "events").mkdir()
        m = material(features, tokens, folder / "events")
        place, release = place_of(m.about), Release("user", "A. Author", "name", "title", "2026-01-01T00:00:00Z")
        outputs: list[Any] = [BatchFiles(folder / "batches", m.about, place)]
        if case == "both":
            outputs.append(ImportFiles(folder / "import", m.about, place, release))
        begin, cpu = time.perf_counter(), time.process_time()
        export(m, outputs)
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        sizes = {part: sum(p.stat().st_size for p in (folder / part).rglob("*")) for part in ("batches", "import")}
    row = {"case": case, "features": features, "tokens": tokens, "firings": int(m.events.fires_F.sum())}
    row |= {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1)}
    row |= {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    row |= {f"{part}_mb": size // 10**6 for part, size in sizes.items()}
    return row | {"device": device_name("cpu")} | versions("torch", "numpy", "scipy")


def main() -> None:
    """Run all cases; or, with --case, one, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=F, help="that are exported")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--case", choices=CASES)
    args = parser.parse_args()
    if args.case:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(run(args.case, args.features, args.tokens)))
        return
    for case in CASES:
        load = {"load_before": round(os.getloadavg()[0], 1)}
        size = ("--features", str(args.features), "--tokens", str(args.tokens))
        row = in_fresh_process(sys.executable, __file__, "--case", case, *size)
        append(RESULTS / "dashboard_export.csv", load | row)
        print(*(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
