"""GPT-2 small ready to run: saezoo's way (transformers' blocks, mean subtracted) beside TransformerLens' centred model.

    python benchmarks/gpt2_small_replica.py build --cache DIR --tokenizer DIR [DIR …]      (3.5 GB, once)
    python benchmarks/model_start.py --cache DIR

Each in a process of its own, files in the page cache. `seconds` is from the folder of the model's files, with torch and
transformers imported, to the residual streams of one row of 128 tokens; `before_s` is what comes before: those imports,
and the checking of the files' hashes, which are the same for both. Then the largest difference between the two at each
depth, relative to the largest entry of that depth, in float32. Appends to results/model_start.csv.
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

from common import RESULTS, ROOT, append, in_fresh_process, versions

ROUNDS = 3


def start(tool: str, cache: Path, out: Path) -> dict[str, Any]:
    """Load the model with one tool, run one row, save its centred residuals; seconds and peak of memory."""
    os.environ["HF_HUB_CACHE"] = str(cache / "hub")
    os.environ["SAEZOO_LOCK"] = str(cache / "saezoo.lock")  # a replica: not what the user trusts
    begin = time.perf_counter()
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: F401 (both tools need them)

    from saezoo import hub
    from saezoo.lm import load_language_model
    from saezoo.registry import read_registry

    entry = read_registry(cache / "registry.yaml").find("gpt2-small-res", 0)[0]
    folder = hub.fetch_model(entry.model, offline=True)
    ready = time.perf_counter()
    tokens_BT = torch.arange(1000, 1128)[None]
    depths = range(entry.model.n_layers)
    with torch.inference_mode():
        if tool == "saezoo":
            lm = load_language_model(folder)
            found = lm.residuals(tokens_BT, depths)
            x = torch.stack([found[depth] - found[depth].mean(-1, keepdim=True) for depth in depths])
        else:
            from saezoo.hooked import hooked_model

            hf_model = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
            _, kept = hooked_model(hf_model).run_with_cache(tokens_BT)
            x = torch.stack([kept[f"blocks.{depth}.hook_resid_pre"] for depth in depths])
    seconds = time.perf_counter() - ready
    torch.save(x, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "before_s": ready - begin,
        "seconds": seconds,
        "peak_mib": peak,
        **versions("torch", "transformers", "transformer_lens"),
    }


def main() -> None:
    """Time both, and compare what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), required=True, help="folder of the replicas")
    parser.add_argument("--tool", choices=("saezoo", "transformer_lens"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS / "model_start.csv")
    args = parser.parse_args()
    if args.tool:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(start(args.tool, args.cache, args.out)))
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(ROUNDS):
            for tool in ("saezoo", "transformer_lens"):
                out = str(Path(folder) / tool)
                row = in_fresh_process(
                    sys.executable, __file__, "--cache", str(args.cache), "--tool", tool, "--out", out
                )
                best[tool] = min(best.get(tool, row), row, key=lambda r: float(r["seconds"]))
        ours, theirs = (torch.load(Path(folder) / tool) for tool in ("saezoo", "transformer_lens"))
    difference = float(((ours - theirs).abs().amax((1, 2, 3)) / theirs.abs().amax((1, 2, 3))).max())
    ratio = best["transformer_lens"]["seconds"] / best["saezoo"]["seconds"]
    for tool, row in best.items():
        rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
        append(args.csv, {"tool": tool, "worst_relative_difference": f"{difference:.1e}"} | rounded)
        print(tool, *(f"{key}={value}" for key, value in rounded.items()))
    print(f"TransformerLens takes {ratio:.2f} times as long to start; largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
