"""Loading the twelve SAEs of GPT-2 small's shape from the hub's cache: saezoo beside SAELens, same files, in one run.

    python benchmarks/gpt2_small_replica.py build --cache DIR --tokenizer DIR [DIR …]      (3.5 GB, once)
    python benchmarks/load.py --cache DIR --peer-python PYTHON_WITH_SAELENS

Each in a process of its own. saezoo hashes every file, checks every value and keeps the weights memory-mapped; SAELens
does not hash. The memory is the process's peak beyond what it held before, over the size of the files. A second round
follows, with the files in the operating system's cache. Appends to results/load.csv.
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

from common import RESULTS, append, in_fresh_process, versions

LAYERS = range(12)


def load_all(tool: str, cache: Path) -> dict[str, Any]:
    """Seconds and memory, in this process."""
    os.environ["HF_HUB_CACHE"] = str(cache / "hub")
    from saezoo import hub, load
    from saezoo.registry import read_registry

    registry = cache / "registry.yaml"
    entries = read_registry(registry).find("gpt2-small-res", "0-11")
    paths = [hub.fetch(entry, offline=True).weights for entry in entries[:1]]  # the first alone: it is only a warm-up
    folders = [paths[0].parent.parent / entry.hook for entry in entries]
    if tool == "saelens":
        from sae_lens import SAE  # type: ignore[attr-defined, unused-ignore]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if tool == "saelens":
        saes: list[Any] = [SAE.load_from_disk(folder) for folder in folders]
    else:
        saes = [load("gpt2-small-res", layer, offline=True, registry=registry) for layer in LAYERS]
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = sum((folder / "sae_weights.safetensors").stat().st_size for folder in folders)
    facts = {"saes": len(saes), "seconds": seconds, "gigabytes": size / 1e9, "memory_per_byte": grown / size}
    return facts | versions("torch", "sae_lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--tool", choices=["saezoo", "saelens"], help="this one alone, in this process, as JSON")
    args = parser.parse_args()
    if args.tool:
        print(json.dumps(load_all(args.tool, args.cache)))
        return
    peers = [("saelens", args.peer_python)] if args.peer_python else []
    for _ in range(2):
        for tool, python in [("saezoo", sys.executable), *peers]:
            row = {"tool": tool} | in_fresh_process(python, __file__, "--tool", tool, "--cache", str(args.cache))
            print(f"{tool:8} {row['seconds']:6.2f} s  memory {row['memory_per_byte']:.2f} x {row['gigabytes']:.2f} GB")
            append(RESULTS / "load.csv", row)


if __name__ == "__main__":
    main()
