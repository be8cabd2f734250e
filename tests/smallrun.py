"""A small reproduction, for the tests that run one: a registry file, a text and the words of the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from conftest import write_registry

import saezoo
from saezoo.cli import main

TOKENS = 2_000
BUFFER = 4 * 4 * 16
RECIPE: dict[str, Any] = {
    "l1_coefficient": 1e-3,
    "lr": 1e-2,
    "lr_warmup_steps": 3,
    "batch_size": 64,
    "tokens": TOKENS,
    "store_rows": 4,
    "buffer_batches": 4,
    "buffer": "fixed",
    "ghost": "fixed",
    "dead_after_steps": 5,
    "sampling_window_steps": 10,
    "b_dec_init": "geometric_median",
    "skip_documents": 0,
    "source": ["test"],
}
COLLECTION: dict[str, Any] = {
    "title": "Two SAEs",
    "model": "tiny",
    "dataset": None,
    "recipe": "short",
    "hook": "blocks.{layer}.hook_resid_pre",
    "d_in": 16,
    "d_sae": 48,
    "context_size": 16,
    "prepend_bos": True,
    "centre": True,
    "dtype": "float32",
    "licence": "MIT",
    "source": ["test"],
    "layouts": {
        "absent": {
            "format": "saelens",
            "folder": "absent",
            "weights": "{hook}/sae_weights.safetensors",
            "config": "{hook}/cfg.json",
            "sparsity": None,
            "source": ["test"],
        }
    },
    "published": {"protocol": "standard", "sample": "none", "definitions": {"l0": "above 0"}, "source": ["test"]},
    "saes": [{"layer": 0, "published": {"l0": 7.5}}, {"layer": 1}],
}


def registry(model_folder: Path, **changes: Any) -> dict[str, Any]:
    """Collection `small` with the recipe `short`, `changes` made to the recipe."""
    shape = {"n_layers": 2, "d_model": 16, "n_positions": 64, "vocab": 257}
    model = {"architecture": "gpt2", "folder": str(model_folder), "licence": "MIT", "source": ["test"], **shape}
    return {
        "version": 1,
        "sources": {"test": "made by the tests"},
        "models": {"tiny": model},
        "recipes": {"short": RECIPE | changes},
        "collections": {"small": COLLECTION},
    }


def write_overlay(folder: Path, model_folder: Path, **changes: Any) -> Path:
    """`registry` as `folder`/overlay.yaml."""
    return write_registry(folder / "overlay.yaml", registry(model_folder, **changes))


def write_text(folder: Path) -> Path:
    """`folder`/text.txt, of 40 documents."""
    path = folder / "text.txt"
    texts = (f"The {i}th of many short texts about nothing at all. " * 4 for i in range(40))
    path.write_text("<|endoftext|>".join(texts))
    return path


def arguments(overlay: Path, out: Path, text: Path, *more: object) -> list[str]:
    """Of `saezoo`, to train the two SAEs."""
    words = ["--registry", overlay, "reproduce", "small", "all", "--out", out, "--text", text, "--eval-tokens", 512]
    return [str(word) for word in (*words, *more)]


def start(words: list[str], before: str = "", **options: Any) -> subprocess.Popen[str]:
    """A process that runs `saezoo`, the lines `before` first; its stdout and stderr are pipes unless `options` say."""
    program = f"import sys\n{before}\nfrom saezoo.cli import main\nmain(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1])} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", program, *words], env=environment, text=True, **options)


def wait_for_rows(process: subprocess.Popen[str], out: Path, rows: int) -> None:
    """Until log.csv has so many lines, so that the loop is under way."""
    log = out / "log.csv"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= rows):
        time.sleep(0.02)


def finished_run(folder: Path, model_folder: Path) -> Path:
    """The run folder, in `folder`, of a small reproduction that has ended."""
    overlay = write_overlay(folder, model_folder)
    words = arguments(overlay, folder / "run", write_text(folder), "--product", "dense")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return folder / "run"
