"""The commands that look at features, as a user runs them: what they write, resume and refuse."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import nothing_cached, process, refused, sae_folder, saezoo, text  # noqa: F401  # fixtures
from test_site import read

from saezoo.dashboard import dashboard
from saezoo.errors import SaezooError, UsageError
from saezoo.gathered import feature_numbers
from saezoo.workflows import Options

ROOT = Path(sys.modules["saezoo"].__file__ or "").parents[1]
TOKENS = 1536


@pytest.fixture
def arguments(sae_folder: Path, tiny_model_folder: Path, text: Path) -> list[object]:  # noqa: F811
    """Of every command: an SAE of 32 features, and a text."""
    return [sae_folder, "--model", tiny_model_folder, "--text", text, "--tokens", TOKENS]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site(arguments: list[object], tmp_path: Path) -> None:
    done = saezoo("dashboard", *arguments, "--out", tmp_path / "site")
    assert done.stdout == f"{tmp_path}/site/index.html\n"
    manifest = read(tmp_path / "site" / "data" / "manifest.js")
    (about,) = manifest["saes"]
    assert manifest["complete"] and about["features"] == [[0, 32]] and about["tokens"] == 1427
    assert len(read(tmp_path / "site" / "data" / "sae0" / "0.js")) == 32
    assert not list(Path(os.environ["SAEZOO_CACHE"]).glob("dashboards/*")), "the firings are gone"


def test_the_same_command_writes_the_same_bytes(arguments: list[object], tmp_path: Path) -> None:
    for name in ("a", "b"):
        saezoo("dashboard", *arguments, "--out", tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_some_features_and_the_evaluation(arguments: list[object], tmp_path: Path) -> None:
    saezoo("dashboard", *arguments, "--features", "9, 0-3", "--evaluate", "--out", tmp_path / "site")
    (about,) = read(tmp_path / "site" / "data" / "manifest.js")["saes"]
    assert about["features"] == [[0, 4], [9, 10]] and "ce_delta" in about["metrics"]
    pages = read(tmp_path / "site" / "data" / "sae0" / "0.js")
    assert [page["index"] for page in pages] == [0, 1, 2, 3, 9]
    assert all(near[1] < 32 for page in pages for near in page["neighbours"])


def test_a_site_is_replaced(arguments: list[object], tmp_path: Path) -> None:
    saezoo("dashboard", *arguments, "--out", tmp_path / "site")
    first = contents(tmp_path / "site")
    saezoo("dashboard", *arguments, "--features", "5", "--out", tmp_path / "site")
    saezoo("dashboard", *arguments, "--out", tmp_path / "site")
    assert contents(tmp_path / "site") == first


RELEASE = "creator_id: me\ncreator: Me\nname: mine\ntitle: Mine\ncreated: '2026-11-26T00:00:00Z'\n"


def test_exports(arguments: list[object], tmp_path: Path) -> None:
    release = tmp_path / "release.yaml"
    release.write_text(RELEASE)
    folders = {"--out": "site", "--batches": "batches", "--neuronpedia": "np"}
    places = [part for option, name in folders.items() for part in (option, tmp_path / name)]
    saezoo("dashboard", *arguments, *places, "--release", release)
    batch = json.loads((tmp_path / "batches" / "1" / "batch-0.json").read_text())
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(32))
    (lines,) = (tmp_path / "np").rglob("features/batch-0.jsonl.gz")
    neurons = [json.loads(line) for line in gzip.decompress(lines.read_bytes()).splitlines()]
    fires = read(tmp_path / "site" / "data" / "sae0" / "list.js")["fires"]
    assert [round(neuron["frac_nonzero"] * TOKENS) for neuron in neurons] == pytest.approx(fires, abs=0.02 * TOKENS)
    assert len(list((tmp_path / "np").rglob("*.jsonl"))) == 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--features", "32", "no feature 32; there are 32, 0 to 31"),
        ("--features", "3-1", "--features 3-1 is empty; give the smaller number first"),
        ("--features", "1,x", "--features 1,x: `x` is no number or range; e.g. 0-99,512"),
        ("--features", "-4", "--features -4: `-4` is no number or range; e.g. 0-99,512"),
        ("--neuronpedia", "np", "--neuronpedia needs --release FILE, which says whose it is (docs/exports.md)"),
    ],
)
def test_what_is_refused(arguments: list[object], tmp_path: Path, option: str, value: str, message: str) -> None:
    done = saezoo("dashboard", *arguments, "--out", tmp_path / "site", option, value)
    assert refused(done, 2) == message
    assert not (tmp_path / "site").exists(), "nothing is left half-written"


def test_a_folder_with_other_files_is_refused_at_once(arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = saezoo("dashboard", *arguments, "--out", tmp_path)
    message = f"{tmp_path} holds other files and is no site of saezoo; choose a new or empty folder with --out"
    assert refused(done, 1) == message
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_release_that_says_too_little(arguments: list[object], tmp_path: Path) -> None:
    release = tmp_path / "release.yaml"
    release.write_text(RELEASE.replace("creator: Me\n", ""))
    places = ["--out", tmp_path / "site", "--neuronpedia", tmp_path / "np", "--release", release]
    assert refused(saezoo("dashboard", *arguments, *places), 1).startswith(f"{release}:1: ")


def test_an_empty_text_is_refused(sae_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "empty.txt").write_text(" \n")
    done = saezoo(
        "dashboard", sae_folder, "--model", tiny_model_folder, "--text", tmp_path / "empty.txt", "--out", tmp_path / "s"
    )
    assert refused(done, 1) == f"{tmp_path}/empty.txt is empty; give a file with text in it"
    assert not (tmp_path / "s").exists()


def test_which_site_to_open() -> None:
    assert refused(saezoo("dashboard"), 2) == "say which COLLECTION, or which site to open: --serve --out FOLDER"


@pytest.mark.parametrize("text", ["5", "0-2,9", " 9 , 0 - 2,1"])  # noqa: F811
def test_feature_numbers(text: str) -> None:  # noqa: F811
    assert feature_numbers(text, 10) == ([5] if text == "5" else [0, 1, 2, 9])


@pytest.mark.parametrize("text", ["", ",", "1-", "-1", "1-2-3", "١", "1e3", "9" * 30])  # noqa: F811
def test_what_is_no_feature(text: str) -> None:  # noqa: F811
    with pytest.raises(UsageError):
        feature_numbers(text, 10)


# Stopped, killed, divided


SLOWLY = """
import sys
from saezoo.checkpoint import Schedule
Schedule.due = lambda self: True
import runpy
sys.argv[0] = "saezoo"
runpy.run_module("saezoo", run_name="__main__")
"""


def test_a_killed_run_resumes_to_the_same_bytes(arguments: list[object], tmp_path: Path) -> None:
    """Killed at random moments, until it gets through; saved after each batch rather than after 20 seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SAEZOO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SLOWLY, "dashboard", *map(str, arguments), "--batch-size", "1"]
    saezoo("dashboard", *arguments, "--batch-size", "1", "--out", tmp_path / "whole")
    chance, kills, resumed = random.Random(0), 0, False
    for _ in range(40):
        started = [*command, "--out", str(tmp_path / "killed"), *(["--resume"] if resumed else [])]
        running = subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        saved_before = list((tmp_path / "cache").rglob("checkpoint-*"))
        deadline = time.monotonic() + 60
        while running.poll() is None and list((tmp_path / "cache").rglob("checkpoint-*")) == saved_before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        if kills == 4 or running.poll() is not None:
            break
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills, resumed = kills + 1, True
    assert running.wait(timeout=60) == 0
    assert kills >= 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert list((tmp_path / "cache" / "dashboards").iterdir()) == []


def test_torchrun_divides_the_text(arguments: list[object], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saezoo"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SAEZOO_CACHE": str(tmp_path / "cache")}
    command = [*torchrun, "dashboard", *map(str, arguments), "--batch-size", "8", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/two/index.html\n"), done.stderr
    saezoo("dashboard", *arguments, "--batch-size", "8", "--out", tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_ctrl_c_while_pages_are_written(arguments: list[object], tmp_path: Path) -> None:
    """The text need not be read again; until then the site says that it is not complete."""
    folder, *rest = arguments
    named = dict(zip(map(str, rest[::2]), rest[1::2], strict=True))
    options = Options(text=str(named["--text"]))

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("features") and done == 9:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"tokens": TOKENS, "model": str(named["--model"]), "options": options}
    with pytest.raises(SaezooError, match="^stopped; the text is read, the same command with --resume goes on from"):
        dashboard(str(folder), None, out=tmp_path / "site", on_stage=stop, **settings)
    assert not read(tmp_path / "site" / "data" / "manifest.js")["complete"]
    seen: list[str] = []
    dashboard(
        str(folder), None, out=tmp_path / "site", resume=True, on_stage=lambda s, d, t: seen.append(s), **settings
    )
    assert read(tmp_path / "site" / "data" / "manifest.js")["complete"]
    assert not [stage for stage in seen if stage.startswith("reading")]


FULL = """
import resource, runpy, signal, sys
from saezoo.features.site import Site
write = Site.write
def limited(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
    write(*arguments, **options)
Site.write = limited
sys.argv[0] = "saezoo"
runpy.run_module("saezoo", run_name="__main__")
"""


def test_a_site_that_was_not_finished_says_so(arguments: list[object], tmp_path: Path) -> None:
    """The disk is full: a limit on the size of files stands for it."""
    saezoo("dashboard", *arguments, "--out", tmp_path / "site")
    largest = max(path.stat().st_size for path in (tmp_path / "site").rglob("*.js"))
    command = [sys.executable, "-c", FULL.format(largest - 1), "dashboard", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command += ["--out", str(tmp_path / "site")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"Error: cannot write {tmp_path}/site/data")
    assert not read(tmp_path / "site" / "data" / "manifest.js")["complete"]


# One feature, in the terminal


def test_feature(arguments: list[object]) -> None:
    folder, *rest = arguments
    options = [{"--text": "--corpus"}.get(str(option), option) for option in rest]
    done = saezoo("feature", folder, 3, *options, "--text", "Says 49 é\n")
    assert done.exit_code == 0
    for words in ("feature 3", "density", "promotes", "top 5 of 20 contexts", "drawn from", "strongest features"):
        assert words in done.stdout
    assert "⟨c3⟩" in done.stdout and "⟨a9⟩" in done.stdout, "é is two tokens of a byte each"


@pytest.mark.parametrize(
    ("index", "sentence", "message"),
    [
        ("x", "hello", "`x` is no feature; give its number, e.g. saezoo feature tiny-res 2 17"),
        ("32", "hello", "no feature 32; there are 32, 0 to 31"),
        ("3", " ", "--text is empty; give a sentence"),
        ("3", "long " * 20, "--text has 100 tokens; the model reads at most 63"),
    ],
)
def test_feature_refuses(arguments: list[object], index: str, sentence: str, message: str) -> None:
    folder, *rest = arguments
    options = [{"--text": "--corpus"}.get(str(option), option) for option in rest]
    assert refused(saezoo("feature", folder, index, *options, "--text", sentence), 2) == message


def test_feature_that_never_fired(arguments: list[object], tmp_path: Path) -> None:
    import torch

    from saezoo import load

    folder, *rest = arguments
    sae = load(str(folder))
    sae.b_enc.data[7] = -torch.tensor(1e6)
    options = [{"--text": "--corpus"}.get(str(option), option) for option in rest]
    done = saezoo("feature", sae.save(tmp_path / "dead"), 7, *options)
    assert "did not fire on these tokens: density below 0.0021 with 95 % confidence" in " ".join(done.stdout.split())


SAMPLE = ROOT / "docs" / "dashboards" / "site"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="not a checkout")
def test_the_site_in_the_docs_is_one_of_today() -> None:
    """Its data are those of another machine, perhaps; its scripts, and which features it has, are not."""
    static = ROOT / "saezoo" / "features" / "static"
    assert all((SAMPLE / path.name).read_bytes() == path.read_bytes() for path in static.iterdir())
    manifest = read(SAMPLE / "data" / "manifest.js")
    assert manifest["complete"]
    pages = {sae["layer"]: {i for a, b in sae["features"] for i in range(a, b)} for sae in manifest["saes"]}
    linked = re.findall(r"site/index.html#/(\d+)/(\d+)\)", (ROOT / "docs" / "dashboards.md").read_text())
    assert len(linked) == 10 and all(int(index) in pages[layer] for layer, index in linked)
