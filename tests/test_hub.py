"""From an entry to verified files, through the real huggingface_hub client: its cache, and a hub on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_registry
from getting import error_of, leftovers, saezoo
from hubserver import Fault, HubServer
from huggingface_hub import constants
from replicas import (
    files_in,
    legacy_name,
    place_in_hub_cache,
    sparsity,
    weights,
    write_gpt2,
    write_legacy,
    write_reformatted,
)

from saezoo import DownloadError, UsageError, WeightsError, hub, load, read_registry
from saezoo.entries import FileFacts, Model

ROOT = Path(hub.__file__).parents[1]
NEW, OLD = ("owner/reformatted", "a" * 40), ("owner/original", "b" * 40)
HOOK = "blocks.1.hook_resid_pre"
WEIGHTS = f"{HOOK}/sae_weights.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of layer 1 in both layouts, keyed by their path in the repository."""
    new, old = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("old")
    write_reformatted(new / HOOK, 1, d_in=64, d_sae=256)
    write_legacy(old / legacy_name(1, d_sae=256), 1, d_in=64, d_sae=256)
    return files_in(new), files_in(old)


@pytest.fixture
def cache(published: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in use by this process, with both repositories in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for (repo, revision), files in zip((NEW, OLD), published, strict=True):
        place_in_hub_cache(tmp_path / "cache", repo, revision, files)
    return tmp_path / "cache"


@pytest.fixture
def overlay(small_registry: dict[str, Any], tmp_path: Path) -> Path:
    return write_registry(tmp_path / "mine.yaml", small_registry)


@pytest.fixture
def server(published: tuple[dict[str, Path], dict[str, Path]]) -> Iterator[HubServer]:
    with HubServer() as server:
        for (repo, revision), files in zip((NEW, OLD), published, strict=True):
            server.add(repo, revision, files)
        yield server


@pytest.mark.parametrize("layout", [None, "reformatted", "original"])
def test_both_layouts_load_from_the_cache_offline(cache: Path, overlay: Path, layout: str | None) -> None:
    sae = load("small", 1, layout=layout, offline=True, registry=overlay)
    torch.testing.assert_close(dict(sae.state_dict()), weights(1, 64, 256), rtol=0, atol=0)
    torch.testing.assert_close(sae.log_sparsity, sparsity(1, 256), rtol=0, atol=0)
    assert (sae.config.hook, sae.config.model_name, sae.config.centre) == (HOOK, "gpt2-small", True)


def test_published_shapes_load_from_the_cache(cache: Path, tmp_path: Path) -> None:
    entry = read_registry().find("gpt2-small-res", 0)[0]
    layout = entry.layouts["reformatted"]
    write_reformatted(tmp_path / "files" / entry.hook, 0)
    assert layout.repo
    assert layout.revision
    place_in_hub_cache(cache, layout.repo, layout.revision, files_in(tmp_path / "files"))
    sae = load("gpt2-small-res", 0, offline=True)
    assert (tuple(sae.W_enc.shape), tuple(sae.W_dec.shape)) == ((768, 24576), (24576, 768))


def test_each_file_says_how_it_was_checked(cache: Path, overlay: Path) -> None:
    entry = read_registry(overlay).find("small", 1)[0]
    names = {WEIGHTS: "sha256", f"{HOOK}/cfg.json": "git sha1", f"{HOOK}/sparsity.safetensors": "sha256"}
    first = hub.fetch(entry, offline=True).checks
    assert first == {name: f"hub {kind}, now in saezoo.lock" for name, kind in names.items()}
    again = hub.fetch(entry, offline=True).checks
    assert again == {name: f"saezoo.lock {kind}" for name, kind in names.items()}


@pytest.mark.parametrize("name", [WEIGHTS, f"{HOOK}/cfg.json"])
def test_a_flipped_byte_in_the_cache_is_found(
    cache: Path, published: tuple[dict[str, Path], dict[str, Path]], overlay: Path, name: str
) -> None:
    blob = (cache / "models--owner--reformatted" / "snapshots" / NEW[1] / name).resolve()
    content = bytearray(published[0][name].read_bytes())
    content[-1] ^= 1
    blob.unlink()  # a hard link to the file of all tests
    blob.write_bytes(content)
    with pytest.raises(DownloadError) as caught:
        load("small", 1, offline=True, registry=overlay)
    assert f" where the hub says {blob.name}; the file is damaged or was replaced: delete {blob}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sha256", "size", "message"),
    [
        ("0" * 64, None, f" where the registry says {'0' * 64}; the file is damaged or was replaced: delete "),
        (None, 7, "has 132,640 bytes where the registry says 7; the file is damaged or was replaced: delete "),
    ],
)
def test_what_the_registry_promises_is_checked(
    cache: Path, small_registry: dict[str, Any], tmp_path: Path, sha256: str | None, size: int | None, message: str
) -> None:
    facts = {"reformatted": {"weights": {"sha256": sha256, "bytes": size}}}
    small_registry["collections"]["small"]["saes"][1]["files"] = facts
    overlay = write_registry(tmp_path / "mine.yaml", small_registry)
    with pytest.raises(DownloadError) as caught:
        load("small", 1, offline=True, registry=overlay)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_cached_and_offline(cache: Path, overlay: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        load("small", 2, offline=True, registry=overlay)
    name = "blocks.2.hook_resid_pre/sae_weights.safetensors"
    assert str(caught.value) == (f"owner/reformatted/{name} at aaaaaaaa is not in the cache; get it once while online")


def test_local_folders(published: tuple[dict[str, Path], dict[str, Path]], small_registry: Any, tmp_path: Path) -> None:
    layout = small_registry["collections"]["small"]["layouts"]["reformatted"]
    layout |= {"repo": None, "revision": None, "folder": "here"}
    (tmp_path / "here" / HOOK).mkdir(parents=True)
    overlay = write_registry(tmp_path / "mine.yaml", small_registry)
    with pytest.raises(DownloadError, match=r"no file .*safetensors; the registry entry's `folder` must hold it$"):
        load("small", 1, registry=overlay)
    for name, path in published[0].items():
        (tmp_path / "here" / name).write_bytes(path.read_bytes())
    assert load("small", 1, registry=overlay).config.hook == HOOK


def test_the_registry_says_what_the_files_must_be(cache: Path, small_registry: dict[str, Any], tmp_path: Path) -> None:
    small_registry["collections"]["small"]["d_sae"] = 512
    overlay = write_registry(tmp_path / "sizes.yaml", small_registry)
    with pytest.raises(WeightsError, match=r"W_enc is \[64, 256\], the registry says \[64, 512\]$"):
        load("small", 1, offline=True, registry=overlay)
    small_registry["collections"]["small"]["d_sae"] = 256
    for layout in small_registry["collections"]["small"]["layouts"].values():
        layout["weights"] = layout["weights"].replace("{hook}", HOOK)
        layout["config"] = layout["config"] and layout["config"].replace("{hook}", HOOK)
        layout["sparsity"] = None
    overlay = write_registry(tmp_path / "hooks.yaml", small_registry)
    for layout in ("reformatted", "original"):
        message = f"was trained at {HOOK}, the registry says blocks.2.hook_resid_pre$"
        with pytest.raises(WeightsError, match=message):
            load("small", 2, layout=layout, offline=True, registry=overlay)


def test_models(cache: Path, tmp_path: Path) -> None:
    write_gpt2(tmp_path / "files", n_layer=1, d=8, n_head=1, vocab=10, n_positions=4)
    (tmp_path / "files" / "tokenizer.json").write_text("{}")
    snapshot = place_in_hub_cache(cache, "owner/gpt2", "c" * 40, files_in(tmp_path / "files"))
    model = Model("gpt2", 1, 8, 4, 10, "MIT", (), repo="owner/gpt2", revision="c" * 40)
    assert hub.fetch_model(model, offline=True) == snapshot
    assert hub.fetch_named_model("owner/gpt2", offline=True) == snapshot
    assert hub.fetch_named_model(str(snapshot)) == snapshot
    with pytest.raises(DownloadError, match=r"owner/other/config.json is not in the cache; get it once while online"):
        hub.fetch_named_model("owner/other", offline=True)
    with pytest.raises(UsageError, match="model `no/such/folder` is neither a folder here nor a hub id like"):
        hub.fetch_named_model("no/such/folder")


def test_verify(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hub.verify(path, FileFacts(None, None)) == "not verifiable"
    assert hub.verify(path, FileFacts(None, 3)) == "registry size"
    assert hub.verify(path, FileFacts(right, None)) == "registry sha256"
    with pytest.raises(DownloadError, match=f"has sha256 {right} where the registry says {'1' * 64}; "):
        hub.verify(path, FileFacts("1" * 64, 3))


@pytest.mark.parametrize(("layout", "index"), [("reformatted", 0), ("original", 1)])
def test_get_online_then_offline(
    server: HubServer,
    published: tuple[dict[str, Path], dict[str, Path]],
    overlay: Path,
    tmp_path: Path,
    layout: str,
    index: int,
) -> None:
    """The path alone is on stdout; the second run works although the server is gone."""
    online = saezoo(server.url, tmp_path, "get", "small", "1", "--layout", layout)
    assert online.returncode == 0, online.stderr
    path = Path(online.stdout.removesuffix("\n"))
    assert any(path.read_bytes() == file.read_bytes() for file in published[index].values())
    talk = [line for line in online.stderr.splitlines() if line.startswith("small 1  ")]
    assert len(talk) == len(published[index])
    asked = {request.path.split("?")[0].split("/resolve/")[-1] for request in server.requests}
    assert asked == {f"{(NEW, OLD)[index][1]}/{name}" for name in published[index]}
    server.shutdown()
    server.server_close()
    offline = saezoo(server.url, tmp_path, "get", "small", "1", "--layout", layout, "--offline")
    assert (offline.returncode, offline.stdout) == (0, online.stdout)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault(WEIGHTS, "missing", times=None),
            f"the hub has no file owner/reformatted/{WEIGHTS} at aaaaaaaa; correct",
        ),
        (Fault(WEIGHTS, "status", at=403, times=None), f"owner/reformatted/{WEIGHTS} at aaaaaaaa could not be downlo"),
        (Fault(WEIGHTS, "status", at=503, times=None), f"owner/reformatted/{WEIGHTS} at aaaaaaaa could not be downlo"),
        (Fault(WEIGHTS, "reset", at=1000, times=None), f"owner/reformatted/{WEIGHTS} at aaaaaaaa "),
    ],
    ids=["missing", "403", "503", "reset"],
)
def test_faults_of_the_hub(server: HubServer, overlay: Path, tmp_path: Path, fault: Fault, message: str) -> None:
    server.faults.append(fault)
    start = time.monotonic()
    assert error_of(saezoo(server.url, tmp_path, "get", "small", "1")).startswith(message)
    assert time.monotonic() - start < 20  # a busy machine; the client's own retries would take 23 s more
    kept = {name for name in leftovers(tmp_path) if name.endswith("sae_weights.safetensors")}
    assert kept == set()
    server.faults.clear()
    assert saezoo(server.url, tmp_path, "get", "small", "1").returncode == 0


def test_a_byte_flipped_on_the_way_is_mended(server: HubServer, overlay: Path, tmp_path: Path) -> None:
    """The client itself would not notice."""
    server.faults.append(Fault(WEIGHTS, "flip", at=132_000))
    assert saezoo(server.url, tmp_path, "get", "small", "1").returncode == 0
    asked = [request.method for request in server.requests if request.path.endswith(WEIGHTS)]
    assert asked == ["HEAD", "HEAD", "GET", "HEAD", "GET"]


def test_bytes_flipped_twice_are_refused_and_not_kept(
    server: HubServer, published: tuple[dict[str, Path], dict[str, Path]], overlay: Path, tmp_path: Path
) -> None:
    server.faults.append(Fault(WEIGHTS, "flip", at=132_000, times=2))
    message = error_of(saezoo(server.url, tmp_path, "get", "small", "1"))
    right = server.etags[published[0][WEIGHTS]]
    wanted = (
        rf"owner/reformatted/{WEIGHTS} at aaaaaaaa has sha256 \w{{64}} where the hub says {right}, twice; nothing .*"
    )
    assert re.fullmatch(wanted, message)
    assert right not in leftovers(tmp_path)
    assert saezoo(server.url, tmp_path, "get", "small", "1").returncode == 0


def test_a_revision_and_a_repository_that_are_missing(
    server: HubServer, small_registry: dict[str, Any], tmp_path: Path
) -> None:
    layout = small_registry["collections"]["small"]["layouts"]["reformatted"]
    layout["revision"] = "d" * 40
    write_registry(tmp_path / "mine.yaml", small_registry)
    message = error_of(saezoo(server.url, tmp_path, "get", "small", "1"))
    assert message == f"owner/reformatted has no revision {'d' * 40}; correct the registry entry"
    layout["repo"] = "owner/absent"
    write_registry(tmp_path / "mine.yaml", small_registry)
    message = error_of(saezoo(server.url, tmp_path, "get", "small", "1"))
    assert message == "the hub has no repository owner/absent (or it is private: `hf auth login`)"


@pytest.mark.parametrize("options", [(), ("--offline",)])
def test_nothing_cached_and_the_hub_is_down(overlay: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    start = time.monotonic()
    message = error_of(saezoo("http://127.0.0.1:9", tmp_path, "get", "small", "1", *options))
    assert message.startswith(f"owner/reformatted/{WEIGHTS} at aaaaaaaa is not in the cache")
    assert ("the hub cannot be reached" in message) == (options == ())
    assert time.monotonic() - start < 10  # 1 s where nothing else runs
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unpinned_model_in_the_cache_needs_no_hub(tmp_path: Path, offline: dict[str, str]) -> None:
    write_gpt2(tmp_path / "files", n_layer=1, d=8, n_head=1, vocab=10, n_positions=4)
    (tmp_path / "files" / "tokenizer.json").write_text("{}")
    snapshot = place_in_hub_cache(tmp_path / "home" / "hub", "owner/gpt2", "c" * 40, files_in(tmp_path / "files"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | offline
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    code = "from saezoo.hub import fetch_named_model as f; print(f('owner/gpt2'))"
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_a_cache_that_cannot_be_written(server: HubServer, overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache should be")
    assert error_of(saezoo(server.url, tmp_path, "get", "small", "1")).startswith("cannot write ")
