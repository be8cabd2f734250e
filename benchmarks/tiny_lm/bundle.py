"""Put the SAEs of finished runs of `saezoo reproduce tiny-res …` into the package, as float16.

    python benchmarks/tiny_lm/bundle.py RUN_FOLDER [RUN_FOLDER ...]

The hashes and measured values in `registry.yaml` are then written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from saezoo import load
from saezoo.registry import package_folder


def main(runs: list[Path]) -> None:
    """Copy each SAE of each run to saezoo/bundled/tiny-res/HOOK."""
    for folder in (folder for run in runs for folder in sorted(run.glob("blocks.*"))):
        print(load(folder).save(package_folder() / "bundled" / "tiny-res" / folder.name, dtype=torch.float16))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
