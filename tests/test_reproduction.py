"""`saezoo reproduce` from the command line to a run folder that works: two SAEs of a tiny model, a few steps."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_registry
from smallrun import COLLECTION, TOKENS, arguments, registry, start, write_overlay, write_text

from saezoo import load, read_registry
from saezoo.cli import main
from saezoo.trainers.log import Row
from saezoo.trainers.trainee import DENSE_ABOVE

SAES = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1)]


@pytest.fixture
def overlay(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return write_overlay(tmp_path, tiny_model_folder)


def saezoo(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def reproduce(overlay: Path, out: Path, *more: object) -> Result:
    return saezoo(*arguments(overlay, out, write_text(out.parent), *more))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_logging_to_tensorboard_too(overlay: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert reproduce(overlay, tmp_path / "run", "--tensorboard").exit_code == 0
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"1/explained_variance_uncentred" in events.read_bytes()


class Finished(NamedTuple):
    """A run that nobody changes any more."""

    out: Path
    result: Result
    overlay: Path


@pytest.fixture(scope="module")
def finished(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    overlay = write_overlay(folder, tiny_model_folder)
    result = reproduce(overlay, folder / "run", "--product", "dense")
    assert result.exit_code == 0, result.output
    return Finished(folder / "run", result, overlay)


def test_a_run_folder_holds_everything(finished: Finished) -> None:
    out = finished.out
    assert finished.result.stdout.splitlines()[-1] == str(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    tables = {"run.json", "log.csv", "eval.csv", "registry.yaml", "report.md"}
    pictures = {"training.png", "density.png", "published.png"}
    files = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    weights = {f"{sae}/{name}" for sae in SAES for name in files}
    assert names == tables | pictures | weights


def test_what_was_run_is_written_down(finished: Finished) -> None:
    run = json.loads((finished.out / "run.json").read_text())
    assert (run["recipe"], run["tokens"], run["text"], run["layers"]) == ("short", TOKENS, "file:text.txt", "0,1")
    assert (run["loss"], run["product"], run["seed"]) == ("feb2024", "dense", 0)
    assert {"speed", "machine", "checkpoints", "wall time", "versions"} <= run.keys()
    report = (finished.out / "report.md").read_text()
    assert report.startswith("# small 0, 1, trained again\n")
    assert all(f"| {words} |" in report for words in ("recipe | short", "tokens | 2,000", "encoder's product | dense"))
    assert all(f"]({name}.png)" in report for name in ("training", "density", "published"))


def test_the_columns_of_the_log(finished: Finished) -> None:
    rows = rows_of(finished.out / "log.csv")
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Row)]
    assert [row["layer"] for row in rows] == ["0", "1"] * (len(rows) // 2)
    assert [rows[i]["tokens"] for i in (0, 2, -1)] == ["64", "128", "2048"]


def test_what_was_measured_stands_beside_what_was_published(finished: Finished) -> None:
    rows = rows_of(finished.out / "eval.csv")
    assert [row["l0_published"] for row in rows] == ["7.5", ""]
    assert all(0 < float(row["l0"]) < 48 for row in rows)
    assert "7.50" in finished.result.stdout
    assert "published" in finished.result.stdout


def test_the_overlay_of_a_run_can_be_used(finished: Finished) -> None:
    written = finished.out / "registry.yaml"
    assert [entry.name for entry in read_registry(written).find("small-rerun")] == ["0", "1"]
    by_name, by_folder = load("small-rerun", 1, registry=written), load(finished.out / SAES[1])
    assert torch.equal(by_name.W_enc, by_folder.W_enc)
    result = saezoo("--registry", written, "eval", "small-rerun", "all", "--tokens", 512, "--csv", "-")
    for row in csv.DictReader(result.stdout.splitlines()):
        assert float(row["l0"]) == pytest.approx(float(row["l0_published"]), rel=1e-5)


def test_another_run_is_not_overwritten(finished: Finished) -> None:
    out = finished.out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = reproduce(finished.overlay, out)
    assert result.exit_code == 2
    assert result.stderr == f"Error: {out} is not empty; choose another --out, or --resume the run in it\n"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_training_learns(overlay: Path, tmp_path: Path) -> None:
    assert reproduce(overlay, tmp_path / "run", "--tokens", 20_000).exit_code == 0
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run" / "log.csv") if row["layer"] == "1"]
    assert losses[-1] < 0.7 * losses[0]


def test_the_product_changes_nothing_but_rounding(tiny_model_folder: Path, tmp_path: Path) -> None:
    """So sparse that from some step on only the pairs above 0 are multiplied."""
    overlay = write_overlay(tmp_path, tiny_model_folder, l1_coefficient=0.02)
    for product in ("dense", "full", "half"):
        assert reproduce(overlay, tmp_path / product, "--product", product).exit_code == 0
        log = rows_of(tmp_path / product / "log.csv")
        assert all(0 < float(row["l0"]) < 0.9 * DENSE_ABOVE * 48 for row in log[-10:])
        for sae in SAES:
            mine, theirs = load(tmp_path / product / sae), load(tmp_path / "dense" / sae)
            torch.testing.assert_close(mine.W_dec, theirs.W_dec, atol=1e-4, rtol=0)


def test_a_model_in_half_precision(overlay: Path, tmp_path: Path) -> None:
    """The SAEs differ a little; they are measured in float32. Few steps: ghost gradients let any difference grow."""
    for name, *more in (("run", "--model-dtype", "bfloat16"), ("single",)):
        assert reproduce(overlay, tmp_path / name, "--tokens", "300", *more).exit_code == 0
    mine, theirs = load(tmp_path / "run" / SAES[1]), load(tmp_path / "single" / SAES[1])
    assert mine.W_dec.dtype == torch.float32
    assert 0 < float((mine.b_dec - theirs.b_dec).norm() / theirs.b_dec.norm()) < 0.1
    assert {row["dtype"] for row in rows_of(tmp_path / "run" / "eval.csv")} == {"float32"}


def refused(result: Result, code: int) -> str:
    """What the last line says of a run that failed with `code`; there is no traceback and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    return result.stderr.splitlines()[-1]


def other_collection(folder: Path, model_folder: Path, **changes: Any) -> Path:
    """The overlay, with `changes` made to the collection."""
    content = registry(model_folder) | {"collections": {"small": COLLECTION | changes}}
    return write_registry(folder / "overlay.yaml", content)


def test_a_metric_without_a_value_is_unknown_in_the_overlay(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Of one scored token, which has no variance and no next token."""
    overlay = other_collection(tmp_path, tiny_model_folder, context_size=2)
    assert reproduce(overlay, tmp_path / "run", "--eval-tokens", 2).exit_code == 0
    (entry, _) = read_registry(tmp_path / "run" / "registry.yaml").find("small-rerun")
    assert entry.published["ce_sae"] is None
    assert entry.published["explained_variance"] is None
    assert entry.published["l0"] == float(rows_of(tmp_path / "run" / "eval.csv")[0]["l0"])


@pytest.fixture
def dataset(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """`small`, trained on a data set of which a part is held out."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    for name, documents in (("train-0", 40), ("train-1", 20), ("held", 30)):
        texts = [f"{name}: number {i} of some short documents. " * 4 for i in range(documents)]
        parquet.write_table(arrow.table({"words": texts}), tmp_path / f"{name}.parquet")
    files = {"data_files": "train-*.parquet", "heldout_files": "held.parquet", "text_column": "words"}
    mine = {"repo": str(tmp_path), "revision": None, "split": "train", "licence": None, "source": ["test"], **files}
    content = registry(tiny_model_folder) | {"datasets": {"mine": mine}}
    content["collections"] = {"small": COLLECTION | {"dataset": "mine"}}
    return write_registry(tmp_path / "overlay.yaml", content)


def test_evaluation_is_on_files_held_out_of_the_data_set(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = saezoo("--registry", dataset, "reproduce", "small", "all", "--out", out, "--eval-tokens", 512)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["text"] == "dataset:mine"
    rows = rows_of(out / "eval.csv")
    assert {row["text"] for row in rows} == {"dataset:mine:heldout"}
    assert "of dataset:mine:heldout, from 3 documents" in (out / "report.md").read_text()


def test_a_heldout_file_that_is_missing_is_noticed_before_the_training(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "held.parquet").unlink()
    result = saezoo("--registry", dataset, "reproduce", "small", "all", "--out", tmp_path / "run")
    assert refused(result, 1).startswith(f"Error: data set {tmp_path} cannot be read: ")
    assert not list((tmp_path / "run").iterdir())


def test_a_missing_package_is_noticed_before_the_training(overlay: Path, tmp_path: Path) -> None:
    words = arguments(overlay, tmp_path / "run", write_text(tmp_path), "--tensorboard")
    process = start(words, "sys.modules['tensorboard'] = None")
    out, told = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert told == "Error: TensorBoard is not installed; pip install 'saezoo[tensorboard]'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 32}, "small 0 reads width 32, the model has 16"),
        ({"context_size": 65}, "small 0 wants rows of 65 tokens, the model takes 64"),
        ({"saes": [{"layer": 2}]}, "hook `blocks.2.hook_resid_pre`: the model has 2 layers, 0 to 1"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_saes_that_do_not_fit_the_model(
    tiny_model_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str, more: list[str]
) -> None:
    overlay = other_collection(tmp_path, tiny_model_folder, **changes)
    result = reproduce(overlay, tmp_path / "run", *more)
    assert refused(result, 2) == f"Error: {message}"
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        ({"recipe": None}, "the recipe of small is unknown; choose one of the registry: --recipe NAME"),
        ({"context_size": None}, "the context size of small 0 is unknown; set `context_size` in "),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_what_a_training_must_know(
    tiny_model_folder: Path, tmp_path: Path, unknown: dict[str, None], message: str, plan: list[str]
) -> None:
    overlay = other_collection(tmp_path, tiny_model_folder, **unknown)
    assert refused(reproduce(overlay, tmp_path / "run", *plan), 2).startswith(f"Error: {message}")
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_can_be_chosen_and_then_a_text_is_needed(tiny_model_folder: Path, tmp_path: Path) -> None:
    overlay = other_collection(tmp_path, tiny_model_folder, recipe=None)
    command = ["--registry", overlay, "reproduce", "small", "all", "--out", tmp_path / "run", "--recipe", "short"]
    message = "Error: what small was trained on is unknown; give --text or --dataset"
    assert refused(saezoo(*command), 2) == message
    result = reproduce(overlay, tmp_path / "run", "--recipe", "short")
    assert result.exit_code == 0, result.output
    assert read_registry(tmp_path / "run" / "registry.yaml").find("small-rerun")[0].recipe_name == "short-rerun"


def test_a_run_needs_enough_text(overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("too few")
    result = reproduce(overlay, tmp_path / "run", "--text", tmp_path / "few.txt")
    assert refused(result, 1) == "Error: file:few.txt holds fewer than the 64 tokens of one store call; give more"


def test_a_budget_below_one_buffer(overlay: Path, tmp_path: Path) -> None:
    message = refused(reproduce(overlay, tmp_path / "run", "--tokens", 255), 2)
    assert message.startswith("Error: 255 tokens are fewer than the shuffle buffer's 256; give at least as many, or a")
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_there(overlay: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.txt"
    assert refused(reproduce(overlay, tmp_path / "run", "--text", absent), 1) == f"Error: no file {absent}"


def line_of(path: Path, key: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if f'"{key}": ' in line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "recipes.short: `batch_size` must be above 0, not 0"),
        ({"lr": -1e-3}, "recipes.short: `lr` must be above 0, not -0.001"),
        ({"l1_warmup_steps": -1}, "recipes.short: `l1_warmup_steps` must be 0 or more, not -1"),
        ({"buffer_batches": 3}, "recipes.short: `buffer_batches` must be even and at least 2, not 3"),
        ({"loss": "standard"}, "recipes.short: `ghost` must be off with the loss `standard`, not fixed"),
        ({"loss": "squared"}, "recipes.short.loss: must be one of feb2024, standard, not `squared`"),
        ({"encoder_init": "zero"}, "recipes.short.encoder_init: must be one of kaiming, decoder, not `zero`"),
        ({"tokens": 1.5}, "recipes.short.tokens: must be a whole number, not `1.5`"),
    ],
)
def test_recipes_out_of_range(tiny_model_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_overlay(tmp_path, tiny_model_folder, **changes)
    (key,) = re.findall(r"short(?:\.|: `)(\w+)", message)
    expected = f"Error: {path}:{line_of(path, key)}: {message}"
    assert refused(reproduce(path, tmp_path / "run"), 1) == expected
    assert not (tmp_path / "run").exists()
