"""`saezoo push` against a hub on loopback, through the real client; what came up is loaded again in every way shown."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hubuploads import READER, WRITER, UploadServer
from huggingface_hub import constants
from safetensors.torch import load_file
from smallrun import finished_run
from torch import Tensor

import saezoo as package
from saezoo import SAE, SAEConfig, hub, load
from saezoo.cli import main
from saezoo.model_card import render
from saezoo.sharing import pack

# The client's own upload of large files, as of huggingface_hub 2.4.0.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

HOOKS = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1)]
SAE_FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
PICTURES = {"training.png", "density.png", "published.png"}
DATA = {f"{hook}/{name}" for hook in HOOKS for name in SAE_FILES} | {"eval.csv", "run.json", "log.csv"} | PICTURES
LATE = {"README.md", "registry.yaml"}


def saezoo(*words: object, **more: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], **more)


def refused(result: Result, code: int) -> str:
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1] == line
    return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def finished(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two SAEs that nobody changes."""
    return finished_run(tmp_path_factory.mktemp("finished"), tiny_model_folder)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadServer]:
    """A hub that this process talks to, with the right to write."""
    store = tmp_path / "store"
    store.mkdir()
    with UploadServer(store) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("SAEZOO_CACHE", str(tmp_path / "saezoo"))
        yield server


def x_BD(width: int = 16) -> Tensor:
    """Activations whose mean is not 0."""
    return torch.randn(7, width, generator=torch.Generator().manual_seed(1)) + 3


def card_of(server: UploadServer, repo: str = "me/saes") -> str:
    return server.files(repo)["README.md"].read_text()


def blocks(card: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def run_snippet(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_everything_goes_up_in_two_commits(run: Path, server: UploadServer) -> None:
    """The second names the first. Not the report, and what is not of the run."""
    for name in ("notes.txt", "mine.png"):
        (run / name).write_text("mine")
    result = saezoo("push", run, "--repo", "me/saes")
    assert (result.exit_code, result.stdout) == (0, f"{server.url}/me/saes\n"), result.output
    assert server.repositories["me/saes"] == ["saezoo: small-rerun", "saezoo: card of small-rerun"]
    files = server.files("me/saes")
    assert set(files) == DATA | LATE
    assert all(files[name].read_bytes() == (run / name).read_bytes() for name in DATA)
    assert server.hidden == set()


def test_the_registry_file_pins_the_first_commit(run: Path, server: UploadServer, tmp_path: Path) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    overlay = server.files("me/saes")["registry.yaml"]
    layout = yaml.safe_load(overlay.read_text())["collections"]["small-rerun"]["layouts"]["hub"]
    assert layout["repo"] == "me/saes"
    assert set(server.files("me/saes", layout["revision"])) == DATA
    mine = shutil.copy(overlay, tmp_path / "theirs.yaml")
    for layer, hook in enumerate(HOOKS):
        there, here = load("small-rerun", layer, registry=mine), load(run / hook)
        assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))
        assert there.config == here.config
    checks = saezoo("--registry", mine, "get", "small-rerun", "all").stderr
    assert checks.count("registry sha256") == 6


def test_no_path_of_this_machine_goes_up(run: Path, server: UploadServer, tiny_model_folder: Path) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    files = server.files("me/saes")
    for name in ("README.md", "registry.yaml", "run.json", "eval.csv"):
        assert str(tiny_model_folder) not in files[name].read_text()
        assert str(run.parent) not in files[name].read_text()
    assert yaml.safe_load(files["registry.yaml"].read_text())["models"]["tiny"]["folder"] == "tiny"
    assert "Where to get the model. If you have it: config.json, model.safetensors" in card_of(server)


def test_the_front_matter(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    front = yaml.safe_load(card_of(server).split("---\n")[1])
    tags = ["sparse-autoencoder", "mechanistic-interpretability", "saezoo"]
    assert front == {"library_name": "saelens", "license": "mit", "tags": tags}


def test_the_card_has_the_measured_values_and_no_others(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    card = card_of(server)
    with (run / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        section = card.split(f"### SAE {row['layer']}\n")[1].split("\n## ")[0]
        assert f"{row['tokens']} tokens of builtin:heldout, from {row['documents']} documents, seed 0." in section
        (shown,) = re.findall(r"^\| L0 .*?\| (.*?) \| (.*?) \|$", section.split("### ")[0], re.MULTILINE)
        assert float(shown[0]) == pytest.approx(float(row["l0"]), rel=1e-2)
        assert bool(row["l0_lo"]) == (shown[1] != "unknown")
    assert all(f"]({name})" in card for name in PICTURES)
    assert "| lr | 0.01 |" in card
    assert "The training text file:text.txt: it is not part of this repository." in card
    assert f"torch {torch.__version__}" in card


def test_a_run_without_its_evaluation_is_not_measured(run: Path, server: UploadServer) -> None:
    (run / "eval.csv").unlink()
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    card = card_of(server)
    assert card.count("Not measured.") == 2
    assert "How good these SAEs are: nothing was measured." in card
    assert "L0" not in card


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        (("", "", ""), "not measured |  |"),
        (("undefined", "", ""), "undefined on this text |  |"),
        (("7.1234567", "", ""), "7.12346 | unknown |"),
        (("7.1234567", "6.9", "7.31"), "7.12 | 6.90 to 7.31 |"),
        (("1234.5", "1200.1", "1300.2"), "1234 | 1200 to 1300 |"),
    ],
)
def test_a_cell_of_the_evaluation(run: Path, tmp_path: Path, cells: tuple[str, ...], shown: str) -> None:
    """An empty one is no number."""
    with (run / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0] |= dict(zip(("l0", "l0_lo", "l0_hi"), cells, strict=True))
    with (run / "eval.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert f"| L0 (features/token) | {shown}" in render(pack(run, "me/saes").card)


def test_model_and_data_set_on_the_hub_are_in_the_front_matter(run: Path) -> None:
    overlay, facts = run / "registry.yaml", run / "run.json"
    content = yaml.safe_load(overlay.read_text())
    content["models"]["tiny"] |= {"folder": None, "repo": "owner/model", "revision": "a" * 40}
    overlay.write_text(yaml.safe_dump(content))
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"text": "dataset:openwebtext"}))
    parcel = pack(run, "me/saes")
    front = yaml.safe_load(render(parcel.card).split("---\n")[1])
    assert (front["base_model"], front["datasets"]) == ("owner/model", ["Skylion007/openwebtext"])
    assert "Where to get the model" not in render(parcel.card)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_the_snippets_of_the_card_run(server: UploadServer, tmp_path: Path, centre: bool, subtract: bool) -> None:
    """saezoo's and plain torch's give the SAE's own reconstruction."""
    sae = one(tmp_path, centre=centre, apply_b_dec_to_input=subtract)
    assert saezoo("push", sae, "--repo", "me/saes").exit_code == 0
    ours, _, plain = blocks(card_of(server))
    x = x_BD(256)
    expected = load(sae)(x)
    found = run_snippet(plain, x=x)
    torch.testing.assert_close(found["x_hat"], expected, rtol=1e-5, atol=1e-5)
    assert (found["features"] > 0).any()
    assert torch.equal(run_snippet(ours, x=x)["x_hat"], expected)


@pytest.mark.parametrize(
    "case",
    ["saelens_gated", "saelens_topk_normalised", "dictionary_learning_BatchTopKSAE", "gemma_scope", "openai_topk"],
)
def test_the_plain_snippet_for_every_activation(server: UploadServer, tmp_path: Path, case: str) -> None:
    """It gives what the project that the SAE came from computes."""
    golden = Path(__file__).parent / "golden" / "formats" / case
    sae = load(golden / "3.pt" if case == "openai_topk" else golden).save(tmp_path / "sae")
    assert saezoo("push", sae, "--repo", "me/saes").exit_code == 0
    expected = load_file(golden / "expected.safetensors")
    found = run_snippet(blocks(card_of(server))[-1], x=expected["x"])
    torch.testing.assert_close(found["features"], expected["f"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["x_hat"], expected["x_hat"], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of SAELens and what it imports
@pytest.mark.parametrize("centre", [True, False])
def test_the_snippet_for_saelens_runs(server: UploadServer, tmp_path: Path, centre: bool) -> None:
    pytest.importorskip("sae_lens", reason="sae_lens is not installed (it needs transformer_lens < 4)")
    sae = one(tmp_path, centre=centre)
    assert saezoo("push", sae, "--repo", "me/saes").exit_code == 0
    x = x_BD(256)
    mean = x.mean(-1, keepdim=True) if centre else torch.zeros(1)
    with torch.no_grad():
        found = run_snippet(blocks(card_of(server))[1], x=x - mean)
    assert type(found["sae"]).__module__.startswith("sae_lens")
    torch.testing.assert_close(found["x_hat"] + mean, load(sae)(x), rtol=1e-5, atol=1e-5)


def one(folder: Path, **changes: Any) -> Path:
    """A folder with one SAE of tiny-lm."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"W_enc": (256, 32), "b_enc": (32,), "W_dec": (32, 256), "b_dec": (256,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    config: dict[str, Any] = {
        "hook": HOOKS[1],
        "model_name": "tiny-lm",
        "context_size": 128,
        "prepend_bos": True,
        "centre": True,
    }
    config |= {"apply_b_dec_to_input": True} | changes
    return SAE(SAEConfig(256, 32, **config), tensors).save(folder / "one")


def test_a_bare_sae_whose_model_is_known(server: UploadServer, tmp_path: Path) -> None:
    assert saezoo("push", one(tmp_path), "--repo", "me/one").exit_code == 0
    assert set(server.files("me/one")) == {f"{HOOKS[1]}/{name}" for name in SAE_FILES[:2]} | LATE
    card = card_of(server, "me/one")
    for line in ("Not measured.", "- The licence of the weights.", "- How and on what they were trained."):
        assert line in card
    assert "license" not in card.split("---\n")[1]
    assert load("one", 1, registry=shutil.copy(server.files("me/one")["registry.yaml"], tmp_path / "x.yaml"))


def test_a_bare_sae_whose_model_is_not_known(server: UploadServer, tmp_path: Path) -> None:
    """Without a registry file; the card loads it otherwise."""
    sae = one(tmp_path, model_name=None, hook=None)
    assert saezoo("push", sae, "--repo", "me/one").exit_code == 0
    assert set(server.files("me/one")) == {f"sae/{name}" for name in SAE_FILES[:2]} | {"README.md"}
    card = card_of(server, "me/one")
    assert "Sparse autoencoders of an unknown model." in card
    again = run_snippet(blocks(card)[0])["sae"]
    assert torch.equal(again.W_enc, load(sae).W_enc)


def test_names_are_escaped(server: UploadServer, run: Path) -> None:
    """A run's names come from a registry file that anybody wrote."""
    overlay = run / "registry.yaml"
    title = "a|b <script>[x](y) `z`\n# no heading"
    content = yaml.safe_load(overlay.read_text())
    content["collections"]["small-rerun"] |= {"title": title, "licence": "mine: [all"}
    overlay.write_text(yaml.safe_dump(content))
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    card = card_of(server)
    assert r"# a\|b \<script\>\[x\](y) \`z\` # no heading" in card.splitlines()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "mine-all")


def test_a_name_that_no_command_could_have(server: UploadServer, run: Path) -> None:
    overlay = run / "registry.yaml"
    content = yaml.safe_load(overlay.read_text())
    content["collections"]["a\n```\nb"] = content["collections"].pop("small-rerun")
    overlay.write_text(yaml.safe_dump(content))
    told = refused(saezoo("push", run, "--repo", "me/saes"), 2)
    assert told == r"collection name 'a\n```\nb': use letters, digits, `_`, `-` and `.`"


def test_the_same_again_uploads_nothing(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    result = saezoo("push", run, "--repo", "me/saes")
    assert (result.exit_code, result.stdout) == (0, f"{server.url}/me/saes\n")
    assert result.stderr == "me/saes has all of it already\n"
    assert len(server.repositories["me/saes"]) == 2


def test_what_would_change_is_listed_and_needs_a_yes(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    (run / "log.csv").write_text("tokens,layer\n")
    told = refused(saezoo("push", run, "--repo", "me/saes"), 2)
    assert told.startswith(
        "me/saes has 3 of these files, and they would change: README.md, log.csv, registry.yaml; --yes"
    )
    assert len(server.repositories["me/saes"]) == 2
    assert saezoo("push", run, "--repo", "me/saes", "--yes").exit_code == 0
    assert server.files("me/saes")["log.csv"].read_text() == "tokens,layer\n"
    assert len(server.repositories["me/saes"]) == 4
    assert saezoo("push", run, "--repo", "me/saes").stderr == "me/saes has all of it already\n"


def test_a_repository_made_by_hand_needs_no_yes(run: Path, server: UploadServer) -> None:
    """It holds nothing that would change."""
    server.create("me/saes", private=True)
    assert saezoo("push", run, "--repo", "me/saes", "--private").exit_code == 0
    assert set(server.files("me/saes")) == DATA | LATE


def test_only_the_card_changes(run: Path, server: UploadServer) -> None:
    """Then the registry file goes on naming the same commit."""
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    before = server.files("me/saes")["registry.yaml"].read_bytes()
    content = (run / "registry.yaml").read_text()
    (run / "registry.yaml").write_text(content.replace("trained again by", "by"))
    assert saezoo("push", run, "--repo", "me/saes", "--yes").exit_code == 0
    assert len(server.repositories["me/saes"]) == 3
    after = server.files("me/saes")["registry.yaml"].read_bytes()
    assert after == before.replace(b"trained again by", b"by")


def test_a_private_repository(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes", "--private").exit_code == 0
    assert server.hidden == {"me/saes"}
    server.create("me/public", private=False)
    message = "me/public is there and public; leave --private out, or choose another --repo"
    assert refused(saezoo("push", run, "--repo", "me/public", "--private"), 2) == message


def test_a_dry_run_shows_the_tree_and_asks_nobody(run: Path, server: UploadServer, tmp_path: Path) -> None:
    result = saezoo("push", run, "--repo", "me/saes", "--dry-run")
    assert result.exit_code == 0
    sizes = {name: int(size.replace(",", "")) for size, name in (line.split() for line in result.stdout.splitlines())}
    assert set(sizes) == DATA | LATE
    assert all(sizes[name] == (run / name).stat().st_size for name in DATA)
    card = tmp_path / "saezoo" / "push" / "me--saes" / "README.md"
    assert result.stderr == f"nothing was uploaded; the card: {card}\n"
    assert card.stat().st_size == sizes["README.md"]
    assert server.requests == []


def test_another_hub(run: Path, server: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    result = saezoo("push", run, "--repo", "me/saes", "--mirror", server.url)
    assert (result.exit_code, result.stdout) == (0, f"{server.url}/me/saes\n"), result.output
    assert saezoo("push", run, "--repo", "me/saes", "--mirror", server.url).stderr.endswith("all of it already\n")


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", "me/saes", "the hub does not know you: `hf auth login`, or set HF_TOKEN, to write me/saes"),
        (READER, "me/saes", "your token may not write to me/saes; give it that right, or choose another --repo"),
        (WRITER, "you/saes", "your token may not write to you/saes; give it that right, or choose another --repo"),
    ],
)
def test_who_may_not_write(
    run: Path, server: UploadServer, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "no-token"))
    assert refused(saezoo("push", run, "--repo", repo), 1) == message
    assert server.repositories == {}


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("saes", "--repo saes: say whose it is, as in OWNER/saes"),
        ("me/sa es", "--repo me/sa es: Repo id must use alphanumeric chars, '-', '_' or '.'."),
        ("me/saes/one", "--repo me/saes/one: Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
    ],
)
def test_names_that_no_repository_has(run: Path, server: UploadServer, repo: str, message: str) -> None:
    assert refused(saezoo("push", run, "--repo", repo, "--dry-run"), 2).startswith(message)
    assert server.requests == []


def test_without_a_network(run: Path, server: UploadServer) -> None:
    url = "http://127.0.0.1:9"
    told = refused(saezoo("push", run, "--repo", "me/saes", "--mirror", url), 1)
    assert told.startswith(f"the hub at {url} cannot be reached (")


def test_an_upload_that_breaks_off_leaves_no_commit(run: Path, server: UploadServer) -> None:
    server.broken_uploads = 1
    told = refused(saezoo("push", run, "--repo", "me/saes"), 1)
    assert told.startswith("the upload to me/saes failed (Error while uploading '")
    assert server.repositories["me/saes"] == []
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    assert set(server.files("me/saes")) == DATA | LATE


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/repos/create", "the hub refused the upload to me/saes ("),
        ("/commit/main", "the hub refused the upload to me/saes ("),
        ("/api/validate-yaml", "the upload to me/saes failed (Invalid metadata in README.md."),
    ],
)
def test_what_the_hub_refuses(run: Path, server: UploadServer, path: str, message: str) -> None:
    server.refused = path
    told = refused(saezoo("push", run, "--repo", "me/saes"), 1)
    assert told.startswith(message)
    server.refused = None
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    assert set(server.files("me/saes")) == DATA | LATE


def test_offline(run: Path, server: UploadServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "saezoo", "push", str(run), "--repo", "me/saes"]
    offline = environment(server, tmp_path) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: HF_HUB_OFFLINE is set; unset it to upload, or look first: --dry-run\n"
    assert server.requests == []


def test_a_hub_without_xet(run: Path, server: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes Xet where hf_xet is installed, whatever the hub can."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    told = refused(saezoo("push", run, "--repo", "me/saes"), 1)
    assert told.startswith("the upload to me/saes failed (")
    assert told.endswith("; for a hub without Xet set HF_HUB_DISABLE_XET=1")
    assert server.repositories["me/saes"] == []


def test_folders_that_cannot_be_pushed(run: Path, server: UploadServer, tmp_path: Path) -> None:
    def told(path: Path, code: int) -> str:
        return refused(saezoo("push", path, "--repo", "me/saes"), code)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert told(empty, 2).startswith(f"{empty} holds no SAE (none of ")
    assert told(tmp_path / "no", 2) == f"no folder {tmp_path / 'no'}; push takes a run folder, or the folder of one SAE"
    (run / "checkpoint-000000000001024.safetensors").write_bytes(b"")
    message = f"{run} is a run that is not finished; go on with it first: the same command with --resume"
    assert told(run, 1) == message
    sae = one(tmp_path)
    (sae / "sae_weights.safetensors").write_bytes(b"no")
    assert "sae_weights.safetensors is corrupt or truncated" in told(sae, 1)
    assert server.requests == []


def test_a_run_json_that_is_none(run: Path, server: UploadServer) -> None:
    (run / "run.json").write_text("{")
    told = refused(saezoo("push", run, "--repo", "me/saes"), 2)
    assert told.startswith(f"{run / 'run.json'} cannot be read as JSON: ")


def environment(server: UploadServer, folder: Path) -> dict[str, str]:
    """Of a process that has this hub for the hub, and its token from a login."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "home" / "token").write_text(WRITER)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SAEZOO_"))}
    ours |= {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return ours | {"SAEZOO_CACHE": str(folder / "saezoo"), "PYTHONPATH": str(Path(package.__file__).parents[1])}


@pytest.mark.parametrize("answer", ["y", "n"])
def test_on_a_terminal_it_asks(run: Path, server: UploadServer, tmp_path: Path, answer: str) -> None:
    """In a process of its own, by the environment's settings."""
    command = [sys.executable, "-m", "saezoo", "push", str(run), "--repo", "me/saes"]
    first = subprocess.run(command, env=environment(server, tmp_path), capture_output=True, text=True, timeout=120)
    assert (first.returncode, first.stdout) == (0, f"{server.url}/me/saes\n"), first.stderr
    (run / "log.csv").write_text("tokens,layer\n")
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    second = subprocess.run(
        command, env=environment(server, tmp_path), stdin=theirs, capture_output=True, text=True, timeout=120
    )
    os.close(ours)
    os.close(theirs)
    assert second.returncode == (0 if answer == "y" else 1)
    assert "they would change: README.md, log.csv, registry.yaml\nOverwrite them? [y/N]: " in second.stderr
    assert "Traceback" not in second.stderr
    assert (server.files("me/saes")["log.csv"].read_text() == "tokens,layer\n") == (answer == "y")


def test_the_mixin_writes_the_published_layout(tmp_path: Path) -> None:
    sae: Any = load(one(tmp_path))  # mypy does not see the mixin
    sae.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "config.json", "README.md"}
    again = SAE.from_pretrained(tmp_path / "saved")
    assert again.config == sae.config
    assert torch.equal(load(tmp_path / "saved").W_enc, sae.W_enc)
    ours, theirs = (json.loads((tmp_path / "saved" / name).read_text()) for name in ("cfg.json", "config.json"))
    assert theirs == {**theirs, **{key: value for key, value in ours.items() if key in theirs}}


def test_the_mixin_s_config_is_that_of_now(tmp_path: Path) -> None:
    """Also if the configuration was replaced after the SAE was made; and cfg.json is what is read."""
    import dataclasses

    sae: Any = load(one(tmp_path))  # mypy does not see the mixin
    sae.config = dataclasses.replace(sae.config, hook=HOOKS[0])
    sae.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["hook"] == HOOKS[0]
    assert SAE.from_pretrained(tmp_path / "saved").config.hook == HOOKS[0]


def test_the_mixin_pushes_and_reads(server: UploadServer, tmp_path: Path) -> None:
    sae: Any = load(one(tmp_path))  # mypy does not see the mixin
    sae.push_to_hub("me/mixed")
    assert set(server.files("me/mixed")) == {"cfg.json", "sae_weights.safetensors", "config.json", "README.md"}
    again = SAE.from_pretrained("me/mixed", dtype=torch.float64)
    assert torch.equal(again.W_enc, sae.W_enc.double())
    assert "model_hub_mixin" in card_of(server, "me/mixed")


def test_the_mixin_reads_one_sae_of_many(run: Path, server: UploadServer) -> None:
    assert saezoo("push", run, "--repo", "me/saes").exit_code == 0
    again = SAE.from_pretrained("me/saes", subfolder=HOOKS[0])
    here = load(run / HOOKS[0])
    assert torch.equal(again.W_dec, here.W_dec)
    assert again.log_sparsity is not None
    assert torch.equal(again.log_sparsity, here.log_sparsity)  # type: ignore[arg-type]
    assert hub.fetch_sae(f"me/saes/{HOOKS[0]}").name == HOOKS[0]


def test_the_mixin_says_what_is_missing(server: UploadServer) -> None:
    with pytest.raises(package.DownloadError, match="the hub has no repository me/absent"):
        SAE.from_pretrained("me/absent")
    server.create("me/empty", private=False)
    with pytest.raises(package.DownloadError, match=r"me/empty on the hub holds none of "):
        SAE.from_pretrained("me/empty")
