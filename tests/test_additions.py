"""`saezoo add`: runs and bare SAEs become records that every other command reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import write_registry
from replicas import legacy_name, write_legacy
from smallrun import COLLECTION, finished_run, registry, write_text

from saezoo import SAE, SAEConfig, load, read_registry
from saezoo.cli import main

HOOK = "blocks.1.hook_resid_pre"
NOTES = """\
# my notes
version: 1

sources:
    me: "notes"   # of March
    # more to come

# nothing below is mine
"""


def saezoo(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, code: int) -> str:
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two SAEs."""
    return finished_run(tmp_path_factory.mktemp("finished"), tiny_model_folder)


@pytest.fixture
def mine(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A registry file with comments, in which the tiny model is known."""
    model = registry(tiny_model_folder)["models"]["tiny"] | {"source": ["me"]}
    path = tmp_path / "mine.yaml"
    path.write_text(NOTES + yaml.safe_dump({"models": {"tiny": model}}))
    return path


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    """A folder with one SAE of the tiny model."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"W_enc": (16, 32), "b_enc": (32,), "W_dec": (32, 16), "b_dec": (16,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    config = SAEConfig(16, 32, HOOK, "tiny", 32, True, True, True)
    return SAE(config, tensors).save(tmp_path / "saes" / "one")


def test_an_added_run_is_used_like_a_built_in_one(run: Path, tmp_path: Path) -> None:
    """Its model, which is not built in, comes along."""
    file = tmp_path / "zoo.yaml"
    result = saezoo("--registry", file, "add", run)
    assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.output
    assert result.stderr == f"small-rerun is in {file}; use it: saezoo --registry {file} list\n"
    assert "small-rerun" in saezoo("--registry", file, "list").stdout
    assert "recipe: small-rerun" in saezoo("--registry", file, "info", "small-rerun", 0).stdout
    checks = saezoo("--registry", file, "get", "small-rerun", "all").stderr
    assert checks.count("registry sha256") == 6
    by_name, by_folder = load("small-rerun", 1, registry=file), load(run / HOOK)
    assert torch.equal(by_name.W_enc, by_folder.W_enc)


def test_an_added_run_reproduces_its_own_numbers(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    assert saezoo("--registry", file, "add", run).exit_code == 0
    result = saezoo("--registry", file, "verify", "small-rerun", "--tokens", 512, "--csv", "-")
    assert result.exit_code == 0, result.output
    verdicts = [line for line in result.stdout.splitlines() if "reproduced" in line]
    assert len(verdicts) == 16
    assert "differs" not in result.stdout


def test_an_added_run_can_be_trained_again(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    assert saezoo("--registry", file, "add", run, "--name", "first").exit_code == 0
    words = ["--registry", file, "reproduce", "first", 0, "--text", write_text(tmp_path), "--eval-tokens", 512]
    result = saezoo(*words, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    (entry,) = read_registry(tmp_path / "again" / "registry.yaml").find("first-rerun")
    assert entry.recipe_name == "first-rerun"


def test_every_other_line_of_the_file_stays(run: Path, sae: Path, mine: Path) -> None:
    before = mine.read_text()
    for words in ([run], [sae, "--name", "one"]):
        result = saezoo("--registry", mine, "add", *words)
        assert result.exit_code == 0, result.output
    rest = iter(mine.read_text().splitlines())
    assert all(line in rest for line in before.splitlines())  # in this order
    known = read_registry(mine)
    assert [entry.name for entry in known.find("small-rerun")] == ["0", "1"]
    assert known.find("one")[0].model == known.models["tiny"]
    assert list(yaml.safe_load(mine.read_text())["models"]) == ["tiny"]


@pytest.mark.parametrize(
    "last",
    [
        "'quoted'   # why",
        "|\n      of\n\n      lines\n",
        ">-\n      folded\n      lines",
        "plain\n      goes on",
        "'quoted\n\n      goes on'",
        "x\n    # further in\n  # further out\n\n",
    ],
)
def test_whatever_the_section_ends_with(sae: Path, mine: Path, last: str) -> None:
    mine.write_text(mine.read_text().replace("# nothing below is mine", f"    you: {last}\n# nothing below is mine"))
    before, lines = yaml.safe_load(mine.read_text()), mine.read_text().splitlines()
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    after, rest = yaml.safe_load(mine.read_text()), iter(mine.read_text().splitlines())
    assert after["sources"] == before["sources"] | {"one": "the SAE's own configuration, cfg.json"}
    assert all(line in rest for line in lines)


def test_line_ends_of_windows_stay(sae: Path, mine: Path) -> None:
    mine.write_bytes(mine.read_bytes().replace(b"\n", b"\r\n"))
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    content = mine.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    assert read_registry(mine).find("one")


def test_a_last_line_without_an_end(sae: Path, mine: Path) -> None:
    mine.write_text(mine.read_text().rstrip("\n"))
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    assert read_registry(mine).find("one")


def test_the_same_again_changes_nothing(run: Path, mine: Path) -> None:
    assert saezoo("--registry", mine, "add", run).exit_code == 0
    before = mine.read_bytes()
    result = saezoo("--registry", mine, "add", run)
    assert (result.exit_code, result.stdout) == (0, f"{mine}\n")
    assert "small-rerun was already in" in result.stderr
    assert mine.read_bytes() == before


def test_a_bare_sae_says_what_is_not_known(sae: Path, mine: Path) -> None:
    result = saezoo("--registry", mine, "add", sae, "--name", "one", "--licence", "MIT")
    assert result.exit_code == 0, result.output
    (entry,) = read_registry(mine).find("one")
    assert (entry.name, entry.layer, entry.hook, entry.context_size) == ("1", 1, HOOK, 32)
    assert (entry.recipe, entry.dataset, entry.licence, entry.published) == (None, None, "MIT", {})
    assert yaml.safe_load(mine.read_text())["collections"]["one"]["layouts"]["local"]["folder"] == "saes/one"
    assert torch.equal(load("one", 1, registry=mine).W_dec, load(sae).W_dec)
    measured = saezoo("--registry", mine, "eval", "one", "all", "--tokens", 512, "--csv", "-")
    assert measured.exit_code == 0, measured.output
    message = "nothing was published about one all; saezoo eval measures it"
    assert refused(saezoo("--registry", mine, "verify", "one"), 2) == message


def test_a_context_size_that_is_not_known(sae: Path, mine: Path) -> None:
    """`eval` then takes 128 tokens, or as many as the model can."""
    config = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(config | {"context_size": None}))
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    assert read_registry(mine).find("one")[0].context_size is None
    measured = saezoo("--registry", mine, "eval", "one", "all", "--tokens", 512, "--csv", "-")
    header, row = measured.stdout.splitlines()
    assert row.split(",")[header.split(",").index("context")] == "64"


def test_a_file_of_2024(tmp_path: Path) -> None:
    file = tmp_path / legacy_name(1, d_sae=64)
    write_legacy(file, 1, d_in=768, d_sae=64)
    mine = tmp_path / "mine.yaml"
    result = saezoo("--registry", mine, "add", file, "--name", "old", "--model", "gpt2-small")
    assert result.exit_code == 0, result.output
    (entry,) = read_registry(mine).find("old")
    assert entry.layouts["local"].format == "legacy"
    assert torch.equal(load("old", 1, registry=mine).W_enc, load(file).W_enc)


def test_a_file_that_changed_afterwards_is_refused(sae: Path, mine: Path) -> None:
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    config = sae / "cfg.json"
    config.write_text(config.read_text().replace("cpu", "gpu"))
    assert "cfg.json has sha256 " in refused(saezoo("--registry", mine, "get", "one", 1), 1)


def test_without_a_file_named(sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    """The environment's, else one in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEZOO_REGISTRY", str(mine))
    assert saezoo("add", sae, "--name", "one").stdout == f"{mine}\n"
    monkeypatch.delenv("SAEZOO_REGISTRY")
    config = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(config | {"model_name": None}))
    message = refused(saezoo("add", sae, "--name", "one", "--model", "tiny"), 2)
    assert message == "no model `tiny` in the registry; give --model, one of gpt2-small, tiny-lm"
    assert not (tmp_path / "saezoo-registry.yaml").exists()


@pytest.mark.parametrize(
    ("change", "words", "code", "message"),
    [
        ({}, [], 2, "{sae} is one SAE, which has no name yet: --name COLLECTION"),
        ({}, ["--name", "a b"], 2, "collection name 'a b': use letters, digits, `_`, `-` and `.`"),
        ({}, ["--name", "tiny-res"], 2, "`tiny-res` is a built-in collection; choose another --name"),
        ({}, ["--name", "me"], 2, "{mine} has another `me` under `sources`; choose another --name"),
        ({}, ["--name", "x", "--model", "tiny-lm"], 2, "{sae} reads width 16, the model `tiny-lm` has 256"),
        ({"model_name": "other"}, ["--name", "x"], 2, "{sae} reads `other`, which no registry model is; give --model,"),
        ({"hook_name": None, "hook_point": None}, ["--name", "x"], 2, "{sae}: its hook is `None`; a registry needs"),
    ],
)
def test_refusals_of_a_bare_sae(
    sae: Path, mine: Path, change: dict[str, Any], words: list[str], code: int, message: str
) -> None:
    config = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(config | change))
    before = mine.read_bytes()
    told = refused(saezoo("--registry", mine, "add", sae, *words), code)
    assert told.startswith(message.format(sae=sae, mine=mine))
    assert mine.read_bytes() == before


def test_refusals_of_a_run(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    message = f"{run} is a run, which says itself what model it read; leave --model out"
    assert refused(saezoo("--registry", file, "add", run, "--model", "tiny"), 2) == message
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / HOOK / "cfg.json").unlink()
    message = f"{broken} lacks {broken / HOOK / 'cfg.json'}: it is no whole run"
    assert refused(saezoo("--registry", file, "add", broken), 2) == message
    (broken / "registry.yaml").unlink()
    message = f"{broken} is a run that is not finished; go on with it first: the same command with --resume"
    assert refused(saezoo("--registry", file, "add", broken), 1) == message
    assert refused(saezoo("--registry", file, "add", tmp_path / "no"), 2) == f"no file or folder {tmp_path / 'no'}"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(saezoo("--registry", file, "add", empty), 2).startswith(f"{empty} holds no SAE (none of ")
    assert not file.exists()


def test_another_record_of_that_name(run: Path, sae: Path, mine: Path) -> None:
    assert saezoo("--registry", mine, "add", sae, "--name", "small-rerun").exit_code == 0
    message = f"{mine} has another `small-rerun` under `sources`; choose another --name"
    assert refused(saezoo("--registry", mine, "add", run), 2) == message


def test_another_model_of_that_name(run: Path, tmp_path: Path) -> None:
    content = registry(tmp_path)  # the model is said to lie in another folder
    content["collections"] = {}
    file = tmp_path / "zoo.yaml"
    file.write_text(yaml.safe_dump(content))
    message = f"{file} has another model `tiny`; give another --registry"
    assert refused(saezoo("--registry", file, "add", run), 2) == message


@pytest.mark.parametrize("section", ["", "collections"])
def test_a_file_in_another_form(sae: Path, mine: Path, section: str) -> None:
    """JSON, or a section in braces: lines cannot be added there."""
    if section:
        mine.write_text(mine.read_text() + "collections: {}\n")
        where = f" under `{section}`"
    else:
        write_registry(mine, yaml.safe_load(mine.read_text()))
        where = ""
    before = mine.read_bytes()
    told = refused(saezoo("--registry", mine, "add", sae, "--name", "one"), 2)
    assert f"only `key: value` lines can be added to, and it has another form{where}; rewrite that, or" in told
    assert mine.read_bytes() == before


def test_a_broken_file_stays_as_it_is(sae: Path, mine: Path) -> None:
    mine.write_text(mine.read_text() + "colections: {}\n")
    before = mine.read_bytes()
    assert "unknown key `colections`" in refused(saezoo("--registry", mine, "add", sae, "--name", "one"), 1)
    assert mine.read_bytes() == before


def test_a_document_that_has_ended(sae: Path, mine: Path) -> None:
    """Lines after `...` would be a second document: nothing is written."""
    mine.write_text(mine.read_text() + "...\n")
    before = mine.read_bytes()
    told = refused(saezoo("--registry", mine, "add", sae, "--name", "one"), 1)
    assert told.startswith(f"{mine}:")
    assert "not valid YAML" in told
    assert mine.read_bytes() == before
    assert [path.name for path in mine.parent.iterdir() if path.name.startswith(".")] == []


def test_a_record_goes_to_the_end_of_its_section(sae: Path, mine: Path) -> None:
    """Before whatever comes after it, here the end of the document."""
    old = json.loads(json.dumps(COLLECTION | {"recipe": None}).replace('["test"]', '["me"]'))
    mine.write_text(mine.read_text() + yaml.safe_dump({"collections": {"old": old}}) + "...\n")
    assert saezoo("--registry", mine, "add", sae, "--name", "one").exit_code == 0
    assert mine.read_text().endswith("...\n")
    assert list(yaml.safe_load(mine.read_text())["collections"]) == ["old", "one"]
    assert read_registry(mine).find("old")
