"""No CSV that saezoo writes holds text that a spreadsheet would run as a formula, and numbers stay numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import result
from test_train import entry, job

from saezoo import report
from saezoo.evals.counts import densities_csv
from saezoo.evals.verdict import Cell
from saezoo.lm import load_language_model
from saezoo.results import Blocks, Measured, Result, append_csv, breakdown_csv, to_csv
from saezoo.spreadsheets import inert, original
from saezoo.tokens import text_file
from saezoo.trainers.train import train
from saezoo.verification import Verification

FORMULAS = [
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://127.0.0.1","x")',
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "=1\r=2",
    "＝1+1",
]


def hostile_result(formula: str) -> Result:
    blocks = Blocks({}, torch.zeros(1, 2), torch.tensor([[1, 0]]), torch.tensor([4]))
    names: dict[str, Any] = dict.fromkeys(
        ("collection", "layer", "hook", "model", "protocol", "text", "device", "dtype"), formula
    )
    metrics = {"ce_delta": Measured(-0.5, -0.6, -0.4), "l0": Measured(None)}
    cells = {"position": [{"tokens": Measured(4.0), "ce_delta": Measured(-0.25)}]}
    changes: dict[str, Any] = {"metrics": metrics, "breakdowns": cells, "versions": {"torch": formula}}
    return replace(result(**{"hook": "x", **changes}), **names, blocks=blocks)


def breakdown(results: list[Result]) -> str:
    return breakdown_csv([replace(found, blocks=None) for found in results])


def verdicts(results: list[Result]) -> str:
    name = results[0].layer
    return Verification(results, [Cell(name, name, -1.5, Measured(-1.4), 0.1, "differs", name)]).to_csv()


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("write", [to_csv, breakdown, densities_csv, verdicts])
def test_names_are_no_formulas(write: Callable[[list[Result]], str], formula: str) -> None:
    rows = list(csv.reader(io.StringIO(write([hostile_result(formula)]), newline="")))
    cells = [cell for row in rows for cell in row]
    written = formula.replace("\r", "\n")
    assert f"'{written}" in cells
    assert formula not in cells
    for cell in cells:
        assert not cell.startswith(tuple("=+-@\t\r\n＝")) or float(cell) < 0


def test_numbers_stay_numbers() -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv([hostile_result("=1")])))
    assert (row["ce_delta"], row["ce_delta_lo"], row["l0"]) == ("-0.5", "-0.6", "undefined")
    assert row["tokens"] == "65024"


@pytest.mark.parametrize("cell", [-1, -1.5, None, "a=b", "blocks.0", "'quoted'", "", "1-2"])
def test_other_cells_are_left_alone(cell: Any) -> None:
    assert inert(cell) is cell
    assert not isinstance(cell, str) or original(cell) == cell


@pytest.mark.parametrize("formula", FORMULAS)
def test_what_is_made_inert_can_be_read_again(formula: str) -> None:
    assert original(inert(formula)) == formula.replace("\r", "\n")


def test_a_carriage_return_begins_no_row() -> None:
    """pandas writes it without quotes, and what stands behind it would be the first cell of another row."""
    text = to_csv([replace(result(), text="a\r=1+1")])
    assert "\r" not in text
    assert len(list(csv.reader(io.StringIO(text, newline="")))) == 2


def test_appending_to_such_a_file(tmp_path: Path) -> None:
    one, two = hostile_result("=1"), hostile_result("@2")
    append_csv(tmp_path / "a.csv", [one])
    append_csv(tmp_path / "a.csv", [two])
    assert (tmp_path / "a.csv").read_text() == to_csv([one, two])


def test_the_log_of_a_training(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("<|endoftext|>".join(f"Document {i}: " + "ab cd " * 5 for i in range(20)))
    run = job(text_file(tmp_path / "words.txt"), (0,), tokens=300)
    train(replace(run, entries=(replace(entry(0), name="=1+1"),)), load_language_model(tiny_model_folder), tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        assert {row["layer"] for row in csv.DictReader(file)} == {"'=1+1"}
    assert set(report._read_log(tmp_path / "log.csv")) == {"=1+1"}
