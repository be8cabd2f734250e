"""saezoo.lock: what is written at first use, and what a later difference leads to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_registry
from getting import ROOT, error_of, saezoo
from hubserver import HubServer
from huggingface_hub import constants
from replicas import files_in, place_in_hub_cache, write_reformatted

from saezoo import DownloadError, hub, lock, read_registry

REPO, COMMIT = "owner/reformatted", "a" * 40
HOOK = "blocks.1.hook_resid_pre"
CONFIG = f"{HOOK}/cfg.json"
RECORD = lock.Record("owner/name", "a" * 40, "cfg.json", "git sha1", "b" * 40, 12, "2026-03-01")


@pytest.fixture
def overlay(small_registry: dict[str, Any], tmp_path: Path) -> Path:
    return write_registry(tmp_path / "mine.yaml", small_registry)


def publish(folder: Path, seed: int = 0) -> dict[str, Path]:
    write_reformatted(folder / HOOK, 1, d_in=64, d_sae=256, seed=seed)
    return files_in(folder)


def test_which_file_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's, else the one in the working folder if there is one, else the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEZOO_LOCK", str(tmp_path / "own"))
    assert lock.lock_path() == tmp_path / "own"
    monkeypatch.delenv("SAEZOO_LOCK")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert lock.lock_path() == tmp_path / "config" / "saezoo" / "saezoo.lock"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert lock.lock_path() == Path("~/.config/saezoo/saezoo.lock").expanduser()
    (tmp_path / "saezoo.lock").write_text("{}")
    assert lock.lock_path() == tmp_path / "saezoo.lock"


def test_records_are_sorted_and_the_first_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "saezoo.lock"
    other = dataclasses.replace(RECORD, file="a.pt", kind="sha256", hash="c" * 64)
    assert lock.remember(path, RECORD) == RECORD
    assert lock.remember(path, other) == other
    assert lock.remember(path, dataclasses.replace(RECORD, hash="d" * 40)) == RECORD
    assert lock.read(path) == {other.key: other, RECORD.key: RECORD}
    assert [record["file"] for record in json.loads(path.read_text())["files"]] == ["a.pt", "cfg.json"]


def test_several_processes_write_at_the_same_time(tmp_path: Path) -> None:
    """No record is lost."""
    program = (
        "import dataclasses, pathlib, sys; from saezoo import lock\n"
        "for n in range(20):\n"
        "    record = lock.Record('o/n', 'a' * 40, f'{sys.argv[2]}-{n}', 'git sha1', 'b' * 40, 1, '2026-03-01')\n"
        "    lock.remember(pathlib.Path(sys.argv[1]), record)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "saezoo.lock")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([*command, str(number)], env=environment) for number in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    assert len(lock.read(tmp_path / "saezoo.lock")) == 80


FILE = json.dumps({"version": 1, "files": [dataclasses.asdict(RECORD)]})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", 'it must hold {"version": 1, "files": […]}'),
        (FILE.replace('"version": 1', '"version": 2'), 'it must hold {"version": 1, "files": […]}'),
        (FILE.replace('"bytes": 12', '"bytes": "12"'), "a record must have repo, revision, file, kind, hash, bytes"),
        (FILE.replace("git sha1", "sha256"), f"`sha256: {'b' * 40}` of cfg.json is no hash"),
        (FILE.replace("git sha1", "md5"), f"`md5: {'b' * 40}` of cfg.json is no hash"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "saezoo.lock"
    path.write_text(content)
    for act in (lambda: lock.read(path), lambda: lock.remember(path, dataclasses.replace(RECORD, file="x"))):
        with pytest.raises(DownloadError) as caught:
            act()
        assert str(caught.value).startswith(f"the lock file {path} is damaged ({reason}")
        assert str(caught.value).endswith("mend it, or delete it to trust the hub anew")
    assert path.read_text() == content


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(lock.NotWritten, match=f"^cannot write {tmp_path / 'file' / 'saezoo.lock'}: "):
        lock.remember(tmp_path / "file" / "saezoo.lock", RECORD)


def test_what_get_says_and_writes(overlay: Path, tmp_path: Path) -> None:
    """First use, then known; files that the registry has a hash for need no record."""
    content = json.loads(overlay.read_text())
    with HubServer() as server:
        files = publish(tmp_path / "files")
        server.add(REPO, COMMIT, files)
        facts = {"sha256": server.etags[files[f"{HOOK}/sparsity.safetensors"]], "bytes": None}
        content["collections"]["small"]["saes"][1]["files"] = {"reformatted": {"sparsity": facts}}
        write_registry(overlay, content)
        first, again = (saezoo(server.url, tmp_path, "get", "small", "1") for _ in range(2))
    checks = [line.rsplit("  ", 1)[1] for line in first.stderr.splitlines()]
    assert checks == ["hub sha256, now in saezoo.lock", "hub git sha1, now in saezoo.lock", "registry sha256"]
    checks = [line.rsplit("  ", 1)[1] for line in again.stderr.splitlines()]
    assert checks == ["saezoo.lock sha256", "saezoo.lock git sha1", "registry sha256"]
    assert [key[2] for key in lock.read(tmp_path / "saezoo.lock")] == [CONFIG, f"{HOOK}/sae_weights.safetensors"]


@pytest.mark.parametrize("options", [(), ("--offline",)])
def test_other_bytes_than_at_first_use_are_an_error(overlay: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The hub replaced the files under the same commit, and its own hashes fit: only the lock file knows."""
    with HubServer() as server:
        server.add(REPO, COMMIT, publish(tmp_path / "files"))
        assert saezoo(server.url, tmp_path, "get", "small", "1").returncode == 0
    before = (tmp_path / "saezoo.lock").read_text()
    (tmp_path / "home" / "hub").rename(tmp_path / "gone")
    other = publish(tmp_path / "other", seed=1)
    if options:
        place_in_hub_cache(tmp_path / "home" / "hub", REPO, COMMIT, other)
    with HubServer() as server:
        server.add(REPO, COMMIT, other)
        message = error_of(saezoo(server.url, tmp_path, "get", "small", "1", *options))
        new = server.etags[other[f"{HOOK}/sae_weights.safetensors"]]
    old = lock.read(tmp_path / "saezoo.lock")[REPO, COMMIT, f"{HOOK}/sae_weights.safetensors"]
    difference = f"has sha256 {new} where {tmp_path / 'saezoo.lock'} says {old.hash} since {old.first_seen}"
    remedy = "; it changed at its source or on its way: do not use it, or delete its record" if options else ", twice; "
    assert difference + remedy in message
    assert (tmp_path / "saezoo.lock").read_text() == before
    blobs = {path.name for path in (tmp_path / "home" / "hub").glob("models--*/blobs/*")}
    assert (new in blobs) == bool(options)


def test_an_unpinned_model_is_recorded_by_its_commit(tiny_model_folder: Path, tmp_path: Path) -> None:
    program = "from saezoo.hub import fetch_named_model as f; print(f('owner/tiny'))"
    (tmp_path / "mine.yaml").write_text("version: 1\n")
    with HubServer() as server:
        server.add("owner/tiny", "b" * 40, files_in(tiny_model_folder))
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", program]
        done = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done
    assert Path(done[0].stdout.strip()).parts[-2:] == ("snapshots", "b" * 40)
    assert {key[:2] for key in lock.read(lock.lock_path())} == {("owner/tiny", "b" * 40)}
    assert (tmp_path / "home" / "hub" / "models--owner--tiny" / "refs" / "main").read_text() == "b" * 40


def test_a_branch_that_moved_is_downloaded_anew(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the cached commit is used when the hub is gone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer() as server:
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for commit in ("b" * 40, "c" * 40):
            server.add("owner/tiny", commit, files_in(tiny_model_folder))
            assert hub.fetch_named_model("owner/tiny").name == commit
    assert hub.fetch_named_model("owner/tiny").name == "c" * 40
    assert hub.fetch_named_model("owner/tiny", offline=True).name == "c" * 40


def test_a_large_file_is_hashed_once_per_process(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it changes."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = place_in_hub_cache(tmp_path / "cache", REPO, COMMIT, publish(tmp_path / "files"))
    entry = read_registry(overlay).find("small", 1)[0]
    hub.fetch(entry, offline=True)
    blob = (snapshot / CONFIG).resolve()
    facts = blob.stat()
    content = blob.read_bytes()
    blob.write_bytes(b" " + content[1:])
    os.utime(blob, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    hub.fetch(entry, offline=True)  # same size and time: not read again
    os.utime(blob)
    with pytest.raises(DownloadError, match="has git sha1 "):
        hub.fetch(entry, offline=True)
