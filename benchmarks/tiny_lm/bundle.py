"""Put the SAEs of a finished `saezoo reproduce tiny-res all` into the package, as float16.

python benchmarks/tiny_lm/bundle.py RUN_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from saezoo import load, read_registry
from saezoo.registry import package_folder


def main(run: Path) -> None:
    """Copy each SAE of `run` to saezoo/bundled/tiny-res/HOOK."""
    for entry in read_registry().find("tiny-res"):
        folder = load(run / entry.hook).save(
            package_folder() / "bundled" / "tiny-res" / entry.hook, dtype=torch.float16
        )
        print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
