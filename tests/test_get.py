"""`saezoo get` as a process: killed, beside another one, without space, without rights, with tokens and mirrors."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_registry
from getting import error_of, finish, saezoo, start, wait_until
from hubserver import Fault, HubServer
from replicas import files_in, write_reformatted

REPO, COMMIT = "owner/reformatted", "a" * 40
HOOK = "blocks.1.hook_resid_pre"
WEIGHTS = f"{HOOK}/sae_weights.safetensors"
TOKEN = "hf_thisisnobodystoken"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    write_reformatted(folder / HOOK, 1, d_in=64, d_sae=256)
    return files_in(folder)


@pytest.fixture
def server(published: dict[str, Path]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, COMMIT, published)
        yield server


@pytest.fixture
def place(small_registry: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with a registry file whose only entry is layer 1."""
    small = small_registry["collections"]["small"]
    small["saes"] = [sae for sae in small["saes"] if sae["layer"] == 1]
    write_registry(tmp_path / "mine.yaml", small_registry)
    return tmp_path


def slow() -> Fault:
    """2.7 seconds for the 132 kB; once."""
    return Fault(WEIGHTS, "trickle", at=1000)


def halves(folder: Path) -> list[Path]:
    return list((folder / "home" / "hub").glob("models--*/blobs/*.incomplete"))


def ranges(server: HubServer) -> list[str | None]:
    """The Range of each request for the weights."""
    asked = [request for request in server.requests if request.path.split("?")[0].endswith(WEIGHTS)]
    return [request.headers.get("range") for request in asked if request.method == "GET"]


def got(endpoint: str, folder: Path, published: dict[str, Path], *arguments: str, **options: Any) -> str:
    """What a run that succeeds says on stderr; its stdout is the path of the right bytes."""
    done = saezoo(endpoint, folder, "get", "small", *arguments, **options)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.removesuffix("\n")).read_bytes() == published[WEIGHTS].read_bytes()
    return done.stderr


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_download_that_was_stopped_goes_on_where_it_was(
    server: HubServer, place: Path, published: dict[str, Path], sent: signal.Signals
) -> None:
    """Without LAYERS: all. The half stays under another name than the whole will have."""
    server.faults.append(slow())
    process = start(server.url, place, "get", "small")
    wait_until(lambda: any(path.stat().st_size > 30_000 for path in halves(place)))
    process.send_signal(sent)
    done = finish(process)
    assert done.returncode == (1 if sent == signal.SIGINT else -sent)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [half] = halves(place)
    so_far = half.stat().st_size
    assert 30_000 <= so_far < published[WEIGHTS].stat().st_size
    got(server.url, place, published)
    assert ranges(server) == [None, f"bytes={so_far}-"]
    assert halves(place) == []


def test_a_half_that_was_damaged_is_not_built_upon(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    """The whole has another hash, so it is fetched anew from the start."""
    blobs = place / "home" / "hub" / "models--owner--reformatted" / "blobs"
    blobs.mkdir(parents=True)
    wrong = bytes(40_000)
    (blobs / f"{server.etags[published[WEIGHTS]]}.saezoo.incomplete").write_bytes(wrong)
    got(server.url, place, published)
    assert ranges(server) == ["bytes=40000-", None]


def test_two_processes_download_a_file_once(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    server.faults.append(slow())
    both = [start(server.url, place, "get", "small") for _ in range(2)]
    ended = [finish(process) for process in both]
    assert [done.returncode for done in ended] == [0, 0], ended
    assert ended[0].stdout == ended[1].stdout
    assert Path(ended[0].stdout.strip()).read_bytes() == published[WEIGHTS].read_bytes()
    assert ranges(server) == [None]
    assert len(json.loads((place / "saezoo.lock").read_text())["files"]) == 3


def test_files_of_the_same_bytes_are_downloaded_once(
    server: HubServer, place: Path, published: dict[str, Path]
) -> None:
    """Two threads want one blob."""
    twice = published | {f"{HOOK}/sparsity.safetensors": published[WEIGHTS]}
    server.add(REPO, COMMIT, twice)
    server.faults.append(slow())
    got(server.url, place, published)
    assert [request.method for request in server.requests].count("GET") == 2  # the other one is cfg.json
    snapshot = place / "home" / "hub" / "models--owner--reformatted" / "snapshots" / COMMIT
    assert (snapshot / HOOK / "sparsity.safetensors").read_bytes() == published[WEIGHTS].read_bytes()


def test_an_empty_file(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    (place / "empty.json").write_bytes(b"")
    server.add(REPO, COMMIT, published | {f"{HOOK}/cfg.json": place / "empty.json"})
    assert f"{HOOK}/cfg.json  hub git sha1, now in saezoo.lock" in got(server.url, place, published)


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_offline_by_the_environment_or_the_option(server: HubServer, place: Path, env: dict[str, str]) -> None:
    options = [] if env else ["--offline"]
    message = error_of(saezoo(server.url, place, "get", "small", *options, env=env))
    assert message == f"owner/reformatted/{WEIGHTS} at aaaaaaaa is not in the cache; get it once while online"
    assert server.requests == []


def test_a_full_disk(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    """No file can become larger than 30 kB, which cuts the writing short as a full disk does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))"
    message = error_of(saezoo(server.url, place, "get", "small", before=limit))
    assert re.fullmatch(r"cannot write \S+: File too large; choose a place that can be written", message)
    assert [half.stat().st_size for half in halves(place)] == [30_000]
    got(server.url, place, published)
    assert ranges(server)[-1] == "bytes=30000-"


def bound_by_permissions() -> None:
    """Even root: without CAP_DAC_OVERRIDE it may write only what its owner may."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP; for other users it fails and is not needed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes a right away from root as Linux does it")
def test_a_read_only_cache(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    """What is there is used, a lock file that cannot be written is said; what is missing is one line."""
    options: dict[str, Any] = {"preexec_fn": bound_by_permissions}
    place.chmod(0o555)
    message = error_of(saezoo(server.url, place, "get", "small", **options))
    assert message.startswith(f"cannot write {place / 'home'}")
    place.chmod(0o755)
    got(server.url, place, published)
    (place / "saezoo.lock").unlink()
    (place / ".saezoo.lock.guard").unlink(missing_ok=True)
    for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    told = got(NOWHERE, place, published, **options)
    for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    written = f"hub sha256, not in the lock file: cannot write {place / 'saezoo.lock'}: Permission denied"
    assert f"small 1  {WEIGHTS}  {written}\n" in told


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_tokens(server: HubServer, place: Path, published: dict[str, Path], kind: str) -> None:
    """Sent to the hub, and neither printed nor written anywhere, nor sent to the host that has the large files."""
    getattr(server, kind)[REPO] = TOKEN
    without = error_of(saezoo(server.url, place, "get", "small"))
    private = "the hub has no repository owner/reformatted (or it is private: `hf auth login`)"
    gated = "owner/reformatted is gated: accept its terms on its hub page, then `hf auth login`"
    assert without == {"private": private, "gated": gated}[kind]
    wrong = saezoo(server.url, place, "get", "small", env={"HF_TOKEN": TOKEN + "x"})
    assert error_of(wrong) == without
    with HubServer() as cdn:
        cdn.share(server)
        cdn.faults.append(Fault(WEIGHTS, "drop", at=1000))
        told = got(server.url, place, published, env={"HF_TOKEN": TOKEN})
        assert [request.path.split("/")[-1] for request in cdn.requests].count("cfg.json") == 0
        assert len(cdn.requests) == 3
        assert not [request for request in cdn.requests if "authorization" in request.headers]
    said = told + wrong.stderr + (place / "saezoo.lock").read_text()
    assert TOKEN not in said
    assert "sesame" not in said  # the signature of a link to the CDN


def test_a_token_that_the_hub_does_not_know(server: HubServer, place: Path) -> None:
    server.faults.append(
        Fault(WEIGHTS, "status", at=401, times=None, message="Invalid credentials in Authorization header")
    )
    message = error_of(saezoo(server.url, place, "get", "small", env={"HF_TOKEN": TOKEN}))
    wanted = f"owner/reformatted/{WEIGHTS} at aaaaaaaa could not be downloaded (the hub refuses the token); "
    assert message == wanted + "`hf auth login`, or correct HF_TOKEN"


def test_a_mirror(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    """For this call; afterwards nothing is left to ask."""
    got(NOWHERE, place, published, "--mirror", server.url + "/")
    asked = len(server.requests)
    got(NOWHERE, place, published, "--offline")
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mirror", "hf-mirror.com"], "--mirror `hf-mirror.com` is no URL; it begins with https://"),
        (["--mirror", "https://a.b", "--offline"], "give --mirror or --offline, not both"),
    ],
)
def test_mirrors_that_are_refused(place: Path, arguments: list[str], message: str) -> None:
    done = saezoo(NOWHERE, place, "get", "small", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"Error: {message}"


def test_a_mirror_that_answers_with_another_commit(server: HubServer, place: Path, published: dict[str, Path]) -> None:
    """A pinned revision is what the registry says, or nothing."""
    server.add(REPO, "c" * 40, published, ref=COMMIT)
    message = error_of(saezoo(server.url, place, "get", "small"))
    assert message.endswith(f": the hub answered with commit {'c' * 40}; correct --mirror or HF_ENDPOINT")


def test_a_wait_that_is_too_long_is_not_waited_for(server: HubServer, place: Path) -> None:
    server.faults.append(Fault(WEIGHTS, "status", at=429, retry_after=3600))
    message = error_of(saezoo(server.url, place, "get", "small"))
    assert message.endswith("); try again in 3,600 s, as it asks")


def test_a_terminal_shows_a_bar_for_each_file_and_one_for_all(
    server: HubServer, place: Path, published: dict[str, Path]
) -> None:
    server.faults.append(slow())
    main, terminal = pty.openpty()
    process = start(server.url, place, "get", "small", stderr=terminal, env={"COLUMNS": "120", "TERM": "xterm"})
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(main, 4096):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert Path(out.strip()).is_file()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"all files +\S+ +[\d.]+/[\d.]+ kB", plain), plain
    assert re.search(r"blocks.1.hook_resid_pre/sae_weights.safetensors +\S+ +[\d.]+/[\d.]+ kB", plain), plain


def test_get_then_offline(
    server: HubServer, small_registry: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    """get, cache verify, the hub is gone, eval --offline: all as processes."""
    write_reformatted(tmp_path / "saes" / HOOK, 1, d_in=16, d_sae=48)
    server.add(REPO, COMMIT, files_in(tmp_path / "saes"))
    server.add("owner/tiny", "b" * 40, files_in(tiny_model_folder))
    sizes = {"n_layers": 2, "d_model": 16, "n_positions": 64, "vocab": 257}
    origin = {"licence": "MIT", "source": ["test"], "repo": "owner/tiny", "revision": "b" * 40}
    small_registry["models"] = {"tiny": {"architecture": "gpt2", **sizes, **origin}}
    small = {"model": "tiny", "d_in": 16, "d_sae": 48, "context_size": 32, "saes": [{"layer": 1}]}
    small_registry["collections"]["small"] |= small
    write_registry(tmp_path / "mine.yaml", small_registry)
    (tmp_path / "text.txt").write_text("Some words, again and again. " * 300)
    online = saezoo(server.url, tmp_path, "get", "small", "--with-model")
    assert online.returncode == 0, online.stderr
    checked = saezoo(server.url, tmp_path, "cache", "verify")
    assert (checked.returncode, checked.stdout.count("saezoo.lock ")) == (0, 6), checked
    server.shutdown()
    server.server_close()
    words = ["eval", "small", "1", "--offline", "--text", str(tmp_path / "text.txt"), "--tokens", "256", "--csv", "-"]
    measured = saezoo(server.url, tmp_path, *words)
    assert measured.returncode == 0, measured.stderr
    header, row = measured.stdout.splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["layer"] == "1"
