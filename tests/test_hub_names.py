"""SAEs by their name on the hub, `owner/repository/folder`: any format, fetched, locked, and then offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hubserver import Fault, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

from saezoo import SAE, hub, load, lock
from saezoo.cli import main
from saezoo.errors import DownloadError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "formats"
REVISION = "c" * 40
NAMES = {
    "saelens_topk": "peer/saes/saelens_topk",
    "dictionary_learning_BatchTopKSAE": "peer/saes/dictionary_learning_BatchTopKSAE",
    "sparsify": "peer/saes/sparsify/h.3",
    "openai_topk": "peer/saes/openai_topk/3.pt",
    "gemma_scope": "peer/saes/gemma_scope",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A repository of every format, and one SAE at the root of another."""
    files = {
        path.relative_to(GOLDEN).as_posix(): path
        for case in NAMES
        for path in (GOLDEN / case).rglob("*")
        if path.is_file() and path.name != "expected.safetensors"
    }
    with HubServer() as server:
        server.add("peer/saes", REVISION, files)
        server.add("peer/single", REVISION, {path.name: path for path in (GOLDEN / "saelens_gated").iterdir()})
        server.add("peer/text", REVISION, {"README.md": GOLDEN.parent / "README.md"})
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.mark.parametrize("case", NAMES)
def test_every_format_by_name_and_then_offline(server: HubServer, case: str) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    torch.testing.assert_close(load(NAMES[case])(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-6)
    records = lock.read(lock.lock_path())
    assert {(repo, commit) for repo, commit, _ in records} == {("peer/saes", REVISION)}
    server.requests.clear()
    again = load(NAMES[case], offline=True)
    torch.testing.assert_close(again(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-6)
    assert not server.requests


def test_only_the_files_of_the_sae_are_fetched(server: HubServer) -> None:
    load(NAMES["sparsify"])
    fetched = {file for _, _, file in lock.read(lock.lock_path())}
    assert fetched == {"sparsify/h.3/cfg.json", "sparsify/h.3/sae.safetensors"}


def test_the_root_of_a_repository(server: HubServer) -> None:
    assert load("peer/single").config.activation == "gated"
    assert load("peer/single", offline=True).config.activation == "gated"


def test_a_file_that_changed_since_its_first_use(server: HubServer, tmp_path: Path) -> None:
    """The lock file knows what the commit held, whatever the hub says of it now."""
    load("peer/single")
    path = lock.lock_path()
    content = json.loads(path.read_text())
    for record in content["files"]:
        record["hash"] = "0" * len(record["hash"])
    path.write_text(json.dumps(content))
    with pytest.raises(DownloadError, match=r"it changed at its source or on its way"):
        load("peer/single")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "peer/absent",
            "there is no folder peer/absent here, and the hub has no repository peer/absent (or it is private",
        ),
        (
            "peer/text",
            "there is no folder peer/text here, and peer/text on the hub holds none of sae_weights.safetensors, ",
        ),
        ("peer/saes", "; there are SAEs in dictionary_learning_BatchTopKSAE, gemma_scope, saelens_topk, sparsify/h.3"),
    ],
)
def test_what_the_hub_has_not(server: HubServer, name: str, message: str) -> None:
    with pytest.raises(DownloadError) as caught:
        load(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_without_having_it(server: HubServer) -> None:
    with pytest.raises(DownloadError, match=r"peer/single in the cache holds none of "):
        load("peer/single", offline=True)
    assert not server.requests


@pytest.mark.parametrize(
    "name", ["../up/saes", "peer/../saes", "peer/./saes", "/absolute/saes", "peer", "pe er/saes", "peer\\saes"]
)
def test_what_is_no_name_of_the_hub(server: HubServer, name: str) -> None:
    with pytest.raises(UsageError):
        hub.fetch_sae(name)
    with pytest.raises(UsageError, match=r"^no folder `"):
        load(name)
    assert not server.requests


@pytest.mark.parametrize("revision", ["../../other", "/etc", "a b", ""])
def test_what_is_no_revision(server: HubServer, revision: str) -> None:
    with pytest.raises(UsageError, match=r"is no revision of peer/single: a commit, a branch or a tag$"):
        SAE.from_pretrained("peer/single", revision=revision, local_files_only=True)


def test_a_revision_is_taken(server: HubServer) -> None:
    assert SAE.from_pretrained("peer/single", revision=REVISION).config.activation == "gated"
    with pytest.raises(DownloadError, match=r"has no revision"):
        SAE.from_pretrained("peer/single", revision="d" * 40)


def test_from_pretrained_offline(server: HubServer) -> None:
    """Without the config.json that the hub's mixin would ask for."""
    before = SAE.from_pretrained("peer/saes", subfolder="saelens_topk")
    server.requests.clear()
    again = SAE.from_pretrained("peer/saes", subfolder="saelens_topk", local_files_only=True)
    assert torch.equal(again.W_dec, before.W_dec)
    assert not server.requests


def test_a_hub_that_fails(server: HubServer) -> None:
    server.faults.append(Fault("sae_weights.safetensors", "missing", times=None))
    with pytest.raises(DownloadError, match=r"the hub has no file peer/single/sae_weights\.safetensors"):
        load("peer/single")


def test_convert_by_name(server: HubServer, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", NAMES["gemma_scope"], str(tmp_path / "new"), "--to", "saelens"])
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "new").config.activation == "jumprelu"


def test_layers_of_one_sae_are_refused_before_anything_is_fetched(server: HubServer) -> None:
    done = CliRunner().invoke(main, ["eval", "peer/single", "3"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "peer/single is a folder with one SAE; leave the layers and the layout out" in done.stderr
    assert not server.requests
