"""`saezoo compare A B`, as a user would run it."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner, Result

from saezoo.cli import main


def saezoo(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments, "--tokens", "8192", "--offline"], catch_exceptions=False)


def test_an_sae_with_itself() -> None:
    done = saezoo("tiny-res/2", "tiny-res/2", "--json")
    assert done.exit_code == 0, done.stderr
    found = {record["name"]: record for record in json.loads(done.stdout)}
    assert (found["shared"]["value"], found["unique_a"]["value"], found["unique_b"]["value"]) == (1024, 0, 0)
    assert found["matched_cosine"]["value"] == pytest.approx(1)
    assert found["agreement"]["value"] == 1
    differences = [record for name, record in found.items() if name.startswith("difference.")]
    assert len(differences) > 15
    assert {record["value"] for record in differences} == {0.0}
    assert all(record["a"] == record["b"] for record in differences)


def test_neighbouring_layers() -> None:
    done = saezoo("tiny-res/1", "tiny-res/2", "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [int(row["feature"]) for row in rows] == list(range(1024))
    assert sum(float(row["partner_cosine"] or 0) >= 0.7 for row in rows) > 600


def test_the_tables() -> None:
    done = saezoo("tiny-res/1", "tiny-res/2", "--threshold", "0.9")
    assert done.exit_code == 0
    assert "A: tiny-res/1   B: tiny-res/2" in done.stdout
    for words in ("shared (partners of cosine 0.9 or more)", "A - B", "ce_delta", "matching is best but for at most"):
        assert words in done.stdout
    assert "nan" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("tiny-res", "tiny-res/1"), 2, "tiny-res has several SAEs; say which: tiny-res/LAYER"),
        (("tiny-res/0-1", "tiny-res/1"), 2, "tiny-res/0-1 names 2 SAEs; compare takes one on each side"),
        (("tiny-res/9", "tiny-res/1"), 2, "`tiny-res` has no layer `9`; known: 0, 1, 2, 3"),
        (("tiny-res/1", "/nowhere/else"), 2, "no folder /nowhere/else"),
        (("tiny-res/1", "tiny-res/2", "--threshold", "1.5"), 2, "threshold 1.5 is no cosine of shared features"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = saezoo(*arguments)
    assert done.exit_code == code
    assert done.stderr.strip().splitlines()[-1].startswith(f"Error: {message}")
    assert done.stdout == ""
