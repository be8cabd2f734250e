"""`saezoo verify`: what was published is reproduced, and the scales notice what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import write_registry
from safetensors.torch import load_file, save_file

from saezoo import tokens as text
from saezoo.cli import main
from saezoo.errors import UsageError
from saezoo.evals import intervals
from saezoo.evals.verdict import Cell, judge
from saezoo.registry import package_folder
from saezoo.results import Blocks, Measured, Result
from saezoo.verification import verify
from saezoo.workflows import Options, evaluate

TOKENS = 8192
METRICS = ("ce_sae", "ce_delta", "ce_score", "kl_sae", "explained_variance", "l0", "l1")


@pytest.fixture(scope="module")
def measured() -> Result:
    return evaluate("tiny-res", 0, tokens=TOKENS)[0]


@pytest.fixture
def zoo(measured: Result, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """`tiny-res` 0 again, from a folder of its own, with what a correct evaluation of 8,192 tokens gives as published
    to five digits. A test may change it before it is written."""
    registry = yaml.safe_load((package_folder() / "registry.yaml").read_text(encoding="utf-8"))
    collection = registry["collections"]["tiny-res"]
    folder = tmp_path / "blocks.0.hook_resid_pre"
    shutil.copytree(package_folder() / "bundled" / "tiny-res" / "blocks.0.hook_resid_pre", folder)
    collection["layouts"]["bundled"]["folder"] = str(tmp_path)
    values = {name: float(f"{measured.metrics[name].known:.5g}") for name in METRICS}
    collection["saes"] = [{"layer": 0, "published": values, "files": {}}]
    collection["published"] |= {"tokens": measured.tokens, "text": "builtin:heldout"}
    yield {"version": 1, "sources": registry["sources"], "collections": {"again": collection}}


def cells(tmp_path: Path, zoo: dict[str, Any], *arguments: str, exit_code: int) -> dict[str, dict[str, str]]:
    """Run the command; metric -> its row of the CSV."""
    path = write_registry(tmp_path / "zoo.yaml", zoo)
    command = ["--registry", str(path), "verify", "again", "0", "--tokens", str(TOKENS), "--csv", "-", *arguments]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == exit_code, done.stderr
    return {row["metric"]: row for row in csv.DictReader(io.StringIO(done.stdout))}


def verdicts(found: dict[str, dict[str, str]]) -> dict[str, str]:
    return {metric: row["verdict"] for metric, row in found.items()}


def change_weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = tmp_path / "blocks.0.hook_resid_pre" / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_what_was_measured_is_reproduced(tmp_path: Path, zoo: dict[str, Any]) -> None:
    found = cells(tmp_path, zoo, exit_code=0)
    assert verdicts(found) == dict.fromkeys(METRICS, "reproduced")
    assert {row["reason"] for row in found.values()} == {"the same tokens: all digits published"}
    assert all(float(row["allowed_difference"]) < 2e-4 * float(row["published"]) for row in found.values())


def test_a_weight_is_perturbed(tmp_path: Path, zoo: dict[str, Any], measured: Result) -> None:
    """One of 524,288: an entry of one decoder row of norm 1 is moved by 0.05."""
    assert measured.blocks is not None
    busiest = int(measured.blocks.fires_GF.sum(0).argmax())

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["W_dec"][busiest, 7] += 0.05

    change_weights(tmp_path, change)
    found = verdicts(cells(tmp_path, zoo, exit_code=1))
    assert found["kl_sae"] == "differs"
    assert [found[name] for name in ("l0", "l1")] == ["reproduced"] * 2  # the encoder is as it was


def test_centring_is_skipped(tmp_path: Path, zoo: dict[str, Any]) -> None:
    zoo["collections"]["again"]["centre"] = False
    assert verdicts(cells(tmp_path, zoo, exit_code=1)) == dict.fromkeys(METRICS, "differs")


def test_bos_is_dropped(tmp_path: Path, zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A packing that joins documents without it, as some loaders do."""

    def pack(documents: Any, *, bos: int, context: int) -> Iterator[text.Rows]:
        ids = np.concatenate([document for document, _ in zip(documents, range(20), strict=False)])
        for row in ids[: len(ids) // context * context].reshape(-1, 1, context):
            yield text.Rows(row.astype(np.int64), np.zeros((1, context), dtype=np.int64))

    monkeypatch.setattr(text, "pack", pack)
    zoo["collections"]["again"]["published"]["tokens"] = TOKENS  # it then has all tokens to score
    assert "differs" in verdicts(cells(tmp_path, zoo, exit_code=1)).values()


def test_the_wrong_layer_is_loaded(tmp_path: Path, zoo: dict[str, Any]) -> None:
    """Layer 1's weights under layer 0's name and configuration."""
    other = package_folder() / "bundled" / "tiny-res" / "blocks.1.hook_resid_pre" / "sae_weights.safetensors"
    shutil.copy(other, tmp_path / "blocks.0.hook_resid_pre" / "sae_weights.safetensors")
    assert verdicts(cells(tmp_path, zoo, exit_code=1)) == dict.fromkeys(METRICS, "differs")


def test_decoder_rows_are_a_hundredth_too_long(tmp_path: Path, zoo: dict[str, Any]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["W_dec"] *= 1.01

    change_weights(tmp_path, change)
    assert "differs" in verdicts(cells(tmp_path, zoo, exit_code=1)).values()


def test_a_published_digit_is_wrong(tmp_path: Path, zoo: dict[str, Any]) -> None:
    published = zoo["collections"]["again"]["saes"][0]["published"]
    published["l0"] = round(published["l0"] + 0.002, 3)
    found = verdicts(cells(tmp_path, zoo, exit_code=1))
    assert [name for name, verdict in found.items() if verdict == "differs"] == ["l0"]


def test_the_table_and_the_last_line(tmp_path: Path, zoo: dict[str, Any]) -> None:
    zoo["collections"]["again"]["saes"][0]["published"]["l0"] = 99.5
    zoo["collections"]["again"]["saes"][0]["published"]["alive_fraction"] = 1.0
    zoo["collections"]["again"]["published"]["definitions"]["alive_fraction"] = "in words"
    zoo["collections"]["again"]["published"]["tokens"] = None
    path = write_registry(tmp_path / "zoo.yaml", zoo)
    command = ["--registry", str(path), "verify", "again", "--tokens", "4096"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1] == "Error: not verified: nothing could be measured"
    assert "8 not measurable" in done.stdout
    assert "alive_fraction: depends on the number of tokens" in done.stdout


def test_nothing_published_and_no_text(tmp_path: Path, zoo: dict[str, Any]) -> None:
    path = write_registry(tmp_path / "zoo.yaml", zoo)
    zoo["collections"]["again"]["published"]["text"] = None
    write_registry(path, zoo)
    with pytest.raises(UsageError, match="what again was measured on is not known; give --text or --dataset"):
        verify("again", options=Options(registry=path))
    zoo["collections"]["again"]["saes"][0]["published"] = {}
    write_registry(path, zoo)
    with pytest.raises(UsageError, match="nothing was published about again all; saezoo eval measures it"):
        verify("again", options=Options(registry=path))


def cell(measured: Result, published: dict[str, float | None], tokens: int | None = 4096, **changes: Any) -> list[Cell]:
    result = dataclasses.replace(measured, published=published, **changes)
    return judge([result], tokens, None)


def test_what_is_not_measurable(measured: Result) -> None:
    few = cell(measured, {"l0": 11.0})[0]
    assert (few.verdict, few.allowed) == ("not measurable", None)
    assert few.reason.endswith("documents give no interval; more --tokens")
    metrics = measured.metrics | {"l0": Measured(11.0, 10.0, 12.0), "ce_score": Measured(None)}
    found = cell(measured, {"l0": 11.3, "ce_score": 1.0, "sparkle": 1.0, "dead": 3.0}, metrics=metrics, documents=40)
    assert [c.verdict for c in found] == ["reproduced", *["not measurable"] * 3]
    assert [c.reason for c in found[1:]] == [
        "undefined on this text",
        "not measured here",
        "depends on the number of tokens",
    ]
    assert cell(measured, {"l0": 11.3}, None, metrics=metrics)[0].reason == (
        "the published value's number of tokens is unknown"
    )


def test_the_allowed_difference_by_hand(measured: Result) -> None:
    """Interval of half-width 0.98: standard error 0.5; four times as many tokens as published: its own is 1."""
    metrics = measured.metrics | {"l0": Measured(50.0, 49.02, 50.98)}
    [found] = cell(measured, {"l0": 51.5}, measured.tokens // 4, metrics=metrics, documents=10**6)
    assert found.allowed == pytest.approx(1.96 * math.sqrt(0.25 + 1.0) + 0.05, rel=1e-3)
    assert found.verdict == "reproduced"
    [found] = cell(measured, {"l0": 52.5}, measured.tokens // 4, metrics=metrics, documents=10**6)
    assert found.verdict == "differs"


def test_true_values_are_rarely_called_different() -> None:
    """Published: one stretch of about 4,096 tokens of the held-out text. Measured: all the other documents. 42 cells a
    table; at most one table in twenty may have a false alarm, and some chance on top."""
    result = evaluate("tiny-res", 2, tokens=131_072, options=Options(dtype="bf16"))[0]
    blocks = result.blocks
    assert blocks is not None
    full_N = (blocks.sums["tokens"] > 0).nonzero().squeeze(1)
    alarms = tables = 0
    order = torch.randperm(len(full_N), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(order) - 2, 2):
        inside = full_N[order[start : start + 2]]
        outside = torch.cat([full_N[order[:start]], full_N[order[start + 2 :]]])
        published = of(blocks, inside)
        here = dataclasses.replace(
            result,
            metrics=of(blocks, outside),
            tokens=int(blocks.sums["tokens"][outside].sum()),
            documents=len(outside),
            published={name: published[name].value for name in METRICS},
        )
        found = judge([here], int(blocks.sums["tokens"][inside].sum()), None)
        alarms += any(c.verdict == "differs" for c in found)
        tables += 1
    assert tables >= 25
    assert alarms <= 0.05 * tables + 2


def of(blocks: Blocks, chosen: torch.Tensor) -> dict[str, Measured]:
    return intervals.bootstrap({k: v[chosen] for k, v in blocks.sums.items()}, blocks.x_sum_ND[chosen], seed=0)
