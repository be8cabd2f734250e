"""What the benchmarks share: fresh processes, versions, and rows of results."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def in_fresh_process(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that `script` prints in its last line, run from this checkout without warnings."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, script, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """One row behind the date, with a header if the file is new."""
    dated = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"), **row}
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dated), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(dated)


def versions(*packages: str) -> dict[str, str]:
    """Of Python and `packages`; empty where absent."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def device_name(device: str) -> str:
    """`cpu` with its threads, or the GPU's name."""
    import torch

    return f"cpu x {torch.get_num_threads()}" if device == "cpu" else torch.cuda.get_device_name(device)
