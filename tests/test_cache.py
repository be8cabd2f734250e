"""`saezoo cache`: what it lists, what it finds damaged, what it removes and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import write_registry
from huggingface_hub import constants
from replicas import files_in, place_in_hub_cache, write_reformatted

from saezoo import lock
from saezoo.cli import main

REPO, COMMIT, OLD = "owner/reformatted", "a" * 40, "e" * 40
HOOK = "blocks.1.hook_resid_pre"
DAY = 86400


@pytest.fixture
def cache(tmp_path: Path, small_registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with layer 1, an older revision of it, and a repository that is nobody's business; own caches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAEZOO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("SAEZOO_REGISTRY", str(write_registry(tmp_path / "mine.yaml", small_registry)))
    for revision, seed in ((OLD, 1), (COMMIT, 0)):
        write_reformatted(tmp_path / revision / HOOK, 1, d_in=64, d_sae=256, seed=seed)
        place_in_hub_cache(tmp_path / "cache", REPO, revision, files_in(tmp_path / revision))
    place_in_hub_cache(tmp_path / "cache", "somebody/else", "f" * 40, files_in(tmp_path / OLD))
    (tmp_path / "own" / "tokens" / "0123456789abcdef").mkdir(parents=True)
    (tmp_path / "own" / "tokens" / "0123456789abcdef" / "0.bin").write_bytes(bytes(3000))
    return tmp_path / "cache"


def saezoo(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments], catch_exceptions=False, **options)


def storage(cache: Path, repo: str = REPO) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def test_ls(cache: Path) -> None:
    """Known repositories and saezoo's own, nothing else."""
    result = saezoo("ls", "--json")
    found = json.loads(result.stdout)
    assert [(item["repo"], item["revision"]) for item in found] == [(REPO, COMMIT)] * 3 + [(REPO, OLD)] * 3 + [
        ("saezoo's own", None)
    ]
    by_file = {(item["revision"], item["file"]): item for item in found}
    weights = by_file[COMMIT, f"{HOOK}/sae_weights.safetensors"]
    assert weights["used_by"] == ["small/1"]
    assert weights["bytes"] == Path(weights["path"]).stat().st_size
    assert time.time() - weights["last_used"] < 600
    assert by_file[OLD, f"{HOOK}/cfg.json"]["used_by"] == []
    assert by_file[None, "tokens/0123456789abcdef"]["bytes"] == 3000


def test_ls_as_a_table(cache: Path) -> None:
    result = saezoo("ls")
    rows = [[cell.strip() for cell in line.split("│")[1:-2]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[:4] for row in rows] == [
        [REPO, "aaaaaaaa", "small/1", "3"],
        [REPO, "eeeeeeee", "no registry entry", "3"],
        ["saezoo's own", "", "tokens/0123456789abcdef", "1"],
    ]
    assert rows[-1][4] == "3,000 B"
    assert re.fullmatch(r"\d+\.\d kB in 7 items\n", result.stderr)


def test_an_empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("SAEZOO_CACHE", str(tmp_path / "none"))
    assert json.loads(saezoo("ls", "--json").stdout) == []
    assert (saezoo("verify").exit_code, saezoo("verify").stderr) == (0, "0 files have the hash that they should have\n")
    assert saezoo("prune", "--older-than", "0").stderr == "nothing to remove\n"


def test_verify(cache: Path) -> None:
    """It reads everything and writes nothing, not even the lock file."""
    result = saezoo("verify")
    assert (result.exit_code, result.stderr) == (0, "6 files have the hash that they should have\n")
    assert f"{REPO}/{HOOK}/cfg.json  hub git sha1\n" in result.stdout
    assert not lock.lock_path().exists()


def damage(cache: Path, name: str) -> Path:
    """Flip a bit of a cached file; its blob."""
    blob = (storage(cache) / "snapshots" / COMMIT / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.unlink()  # a hard link to the replica
    blob.write_bytes(content)
    return blob


def test_verify_finds_a_flipped_bit(cache: Path) -> None:
    blob = damage(cache, f"{HOOK}/sparsity.safetensors")
    result = saezoo("verify")
    assert result.exit_code == 1
    assert f"{REPO}/{HOOK}/sparsity.safetensors  DAMAGED\n" in result.stdout
    problem, last = result.stderr.splitlines()
    assert f" where the hub says {blob.name}; the file is damaged or was replaced: delete {blob} and get" in problem
    assert last == "Error: 1 of 6 files are damaged"


def test_verify_finds_a_link_without_its_blob(cache: Path) -> None:
    (storage(cache) / "snapshots" / COMMIT / HOOK / "cfg.json").resolve().unlink()
    result = saezoo("verify")
    assert result.exit_code == 1
    assert f"{REPO}/(whole repository)  DAMAGED\n" in result.stdout
    assert "Blob missing (broken symlink)" in result.stderr
    assert f"not listed: {REPO}: Blob missing (broken symlink): " in saezoo("ls").stderr


def test_prune_removes_what_no_entry_names(cache: Path) -> None:
    """The revision, and its blobs that no other one shares; not the pinned one, nor what others have."""
    (storage(cache) / "refs" / "main").unlink()
    result = saezoo("prune", input="y\n")
    assert result.exit_code == 0
    [line] = result.stdout.splitlines()
    assert re.fullmatch(rf"{REPO} at eeeeeeee  [\d.]+ kB  in no registry entry", line)
    assert "Remove these, " in result.stderr
    assert [path.name for path in (storage(cache) / "snapshots").iterdir()] == [COMMIT]
    assert saezoo("verify").stderr == "3 files have the hash that they should have\n"
    assert len(list((storage(cache, "somebody/else") / "snapshots").iterdir())) == 1


def test_prune_does_not_take_another_repository_with_that_commit(cache: Path, tmp_path: Path) -> None:
    """A copy of a repository has the same commits."""
    (storage(cache) / "refs" / "main").unlink()
    for copy in ("aaa/copy", "zzz/copy"):
        place_in_hub_cache(cache, copy, OLD, files_in(tmp_path / OLD))
    assert saezoo("prune", "--yes").stdout.startswith(f"{REPO} at eeeeeeee")
    assert [path.name for path in (storage(cache) / "snapshots").iterdir()] == [COMMIT]
    for copy in ("aaa/copy", "zzz/copy"):
        assert (storage(cache, copy) / "snapshots" / OLD / HOOK / "cfg.json").is_file()


def test_verify_says_what_has_no_hash(cache: Path) -> None:
    """As where a file system has no links: the file's name is not its hash, and nobody has written one down."""
    pointer = storage(cache) / "snapshots" / COMMIT / HOOK / "cfg.json"
    content = pointer.read_bytes()
    pointer.unlink()
    pointer.write_bytes(content)
    result = saezoo("verify")
    assert f"{REPO}/{HOOK}/cfg.json  not verifiable\n" in result.stdout
    assert result.stderr == "5 files have the hash that they should have; of 1 none is known\n"


def test_prune_asks(cache: Path) -> None:
    (storage(cache) / "refs" / "main").unlink()
    result = saezoo("prune", input="n\n")
    assert result.exit_code == 1
    assert (storage(cache) / "snapshots" / OLD).is_dir()


def test_prune_leaves_what_a_branch_or_the_lock_file_names(cache: Path) -> None:
    """A branch: another program's, which asked for it by that name."""
    (storage(cache) / "refs" / "main").write_text(OLD)
    assert saezoo("prune", "--yes").stderr == "nothing to remove\n"
    (storage(cache) / "refs" / "main").unlink()
    lock.remember(lock.lock_path(), lock.Record(REPO, OLD, "any", "sha256", "0" * 64, 1, "2026-03-01"))
    assert saezoo("prune", "--yes").stderr == "nothing to remove\n"


def test_prune_removes_old_halves(cache: Path) -> None:
    """One that grew within the hour may be under way."""
    old, new = (storage(cache) / "blobs" / f"{digit * 64}.saezoo.incomplete" for digit in "01")
    foreign = storage(cache, "somebody/else") / "blobs" / "2.incomplete"
    for half in (old, new, foreign):
        half.write_bytes(bytes(2000))
    for half in (old, foreign):
        os.utime(half, (time.time() - 4000,) * 2)
    (storage(cache) / "refs" / "main").write_text(OLD)
    result = saezoo("prune", "--yes")
    assert result.stdout == f"{old}  2,000 B  half of a download\n"
    assert result.stderr == "removed 2,000 B\n"
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_prune_removes_what_was_not_used_for_long(cache: Path) -> None:
    """Of saezoo's own and of the known repositories."""
    assert saezoo("prune", "--yes", "--older-than", "30").stdout.count("not used") == 0
    before = (time.time() - 40 * DAY,) * 2
    own = cache.parent / "own" / "tokens" / "0123456789abcdef"
    for path in [own / "0.bin", own, *(storage(cache) / "blobs").iterdir()]:
        os.utime(path, before)
    os.utime(next((storage(cache, "somebody/else") / "blobs").iterdir()), before)
    result = saezoo("prune", "--yes", "--older-than", "30")
    lines = result.stdout.splitlines()
    assert f"{own}  3,000 B  not used for 40 days" in lines
    assert any(re.fullmatch(rf"{REPO} at aaaaaaaa  .*  not used for 40 days", line) for line in lines)
    assert not own.exists()
    assert not storage(cache).exists()
    assert storage(cache, "somebody/else").exists()
