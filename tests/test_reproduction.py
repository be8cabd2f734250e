"""`saezoo reproduce` from the command line to a run folder that works: two SAEs of a tiny model, a few steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_registry

from saezoo import load, read_registry
from saezoo.cli import main

TOKENS = 2_000
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


@pytest.fixture
def overlay(tiny_model_folder: Path, small_registry: dict[str, Any], tmp_path: Path) -> Path:
    collection = small_registry["collections"]["small"]
    collection |= {"model": "tiny", "recipe": "short", "d_in": 16, "d_sae": 48, "context_size": 16}
    collection["saes"] = [{"layer": 0, "published": {"l0": 7.5}}, {"layer": 1}]
    shape = {"n_layers": 2, "d_model": 16, "n_positions": 64, "vocab": 257}
    model = {"architecture": "gpt2", "folder": str(tiny_model_folder), "licence": "MIT", "source": ["test"], **shape}
    small_registry |= {"models": {"tiny": model}, "recipes": {"short": RECIPE}}
    return write_registry(tmp_path / "overlay.yaml", small_registry)


def reproduce(overlay: Path, out: Path, *more: str) -> Result:
    text = out.parent / "text.txt"
    text.write_text(
        "<|endoftext|>".join(f"The {i}th of many short texts about nothing at all. " * 4 for i in range(40))
    )
    arguments = ["--registry", overlay, "reproduce", "small", "all", "--out", out, "--text", text]
    return CliRunner().invoke(main, [*map(str, arguments), "--eval-tokens", "512", *more])


def test_a_run_folder_holds_everything(overlay: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = reproduce(overlay, out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    saes = {f"blocks.{layer}.hook_resid_pre/" for layer in (0, 1)}
    files = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert names == {"run.json", "log.csv", "eval.csv", "registry.yaml"} | {s + f for s in saes for f in files}
    run = json.loads((out / "run.json").read_text())
    assert (run["recipe"], run["tokens"], run["text"], run["layers"]) == ("short", TOKENS, "file:text.txt", "0,1")


def test_what_was_measured_stands_beside_what_was_published(overlay: Path, tmp_path: Path) -> None:
    result = reproduce(overlay, tmp_path / "run")
    with (tmp_path / "run" / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["l0_published"] for row in rows] == ["7.5", ""]
    assert all(0 < float(row["l0"]) < 48 for row in rows)
    assert "7.50" in result.stdout
    assert "published" in result.stdout


def test_the_overlay_of_a_run_can_be_used(overlay: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert reproduce(overlay, out).exit_code == 0
    written = out / "registry.yaml"
    assert [entry.name for entry in read_registry(written).find("small-rerun")] == ["0", "1"]
    by_name, by_folder = load("small-rerun", 1, registry=written), load(out / "blocks.1.hook_resid_pre")
    assert torch.equal(by_name.W_enc, by_folder.W_enc)
    arguments = ["--registry", written, "eval", "small-rerun", "all", "--tokens", "512", "--csv", "-"]
    rows = list(csv.DictReader(CliRunner().invoke(main, [*map(str, arguments)]).stdout.splitlines()))
    for row in rows:
        assert float(row["l0"]) == pytest.approx(float(row["l0_published"]), rel=1e-5)


def test_training_learns(overlay: Path, tmp_path: Path) -> None:
    assert reproduce(overlay, tmp_path / "run", "--tokens", "20000").exit_code == 0
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["layer"] == "1"]
    assert losses[-1] < 0.7 * losses[0]


def test_another_run_is_not_overwritten(overlay: Path, tmp_path: Path) -> None:
    assert reproduce(overlay, tmp_path / "run").exit_code == 0
    before = (tmp_path / "run" / "log.csv").read_bytes()
    result = reproduce(overlay, tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path / 'run'} is not empty; choose another --out, or --resume the run in it\n"
    assert (tmp_path / "run" / "log.csv").read_bytes() == before


def test_a_run_needs_enough_text(overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("too few")
    out = str(tmp_path / "run")
    arguments = [
        "--registry",
        str(overlay),
        "reproduce",
        "small",
        "0",
        "--out",
        out,
        "--text",
        str(tmp_path / "few.txt"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "Error: file:few.txt holds fewer than the 64 tokens of one store call; give more" in result.stderr
