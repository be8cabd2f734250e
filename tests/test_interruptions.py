"""`saezoo reproduce` as a process that is stopped, killed or runs into a wall; and what --resume then makes of it."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from smallrun import arguments, start, wait_for_rows, write_overlay, write_text

from saezoo.cli import main
from saezoo.errors import TrainingError
from saezoo.reproduction import reproduce
from saezoo.trainers.log import Row
from saezoo.workflows import Options

TOKENS = 40_000
BINARY = ["sae_weights.safetensors", "sparsity.safetensors"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    told: str


class Place(NamedTuple):
    """A folder with what a run needs, and the run in it."""

    folder: Path
    model_folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def words(self, *more: object) -> list[str]:
        overlay, text = self.folder / "overlay.yaml", self.folder / "text.txt"
        return arguments(overlay, self.run, text, "--tokens", TOKENS, *more)

    def resume(self, *more: object) -> Ended:
        result = CliRunner().invoke(main, self.words("--resume", *more))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return Ended(result.exit_code, result.stdout, result.stderr)

    def interrupted(self, *more: object, sent: int = signal.SIGINT, rows: int = 20, before: str = "") -> Ended:
        """The command in a process of its own, which gets a signal when log.csv has so many rows."""
        process = start(self.words(*more), before)
        wait_for_rows(process, self.run, rows)
        process.send_signal(sent)
        out, told = process.communicate()
        return Ended(process.returncode, out, told)


def place(folder: Path, model_folder: Path) -> Place:
    folder.mkdir(exist_ok=True)
    write_overlay(folder, model_folder)
    write_text(folder)
    return Place(folder, model_folder)


def results(run: Path) -> dict[str, bytes]:
    """The SAEs that a run has left."""
    paths = [path for name in BINARY for path in run.glob(f"*/{name}")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    here = place(tmp_path_factory.mktemp("whole"), tiny_model_folder)
    assert CliRunner().invoke(main, here.words()).exit_code == 0
    found = results(here.run)
    assert len(found) == 4
    return found


class Stopped(NamedTuple):
    """A run that was stopped by Ctrl-C, and how it ended."""

    place: Place
    ended: Ended


@pytest.fixture(scope="module")
def ctrl_c(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    here = place(tmp_path_factory.mktemp("stopped"), tiny_model_folder)
    return Stopped(here, here.interrupted())


@pytest.fixture
def stopped(ctrl_c: Stopped, tmp_path: Path) -> Place:
    """A copy of it."""
    shutil.copytree(ctrl_c.place.folder, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path, ctrl_c.place.model_folder)


def checkpoints(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("checkpoint-*")}


def test_ctrl_c_saves_and_says_so(ctrl_c: Stopped) -> None:
    code, out, told = ctrl_c.ended
    assert (code, out) == (1, "")
    (error,) = (line for line in told.splitlines() if not line.startswith(("filling ", "token cache: ", "end of ")))
    assert re.fullmatch(r"Error: stopped at [\d,]+ of 40,000 tokens; the same command with --resume goes on", error)
    assert len(checkpoints(ctrl_c.place.run)) == 1
    assert results(ctrl_c.place.run) == {}


def test_resume_leaves_the_same_weights(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    code, out, told = stopped.resume()
    assert code == 0
    assert re.search(r"^resumed at [\d,]+ of 40,000 tokens$", told, re.MULTILINE)
    assert results(stopped.run) == uninterrupted
    assert checkpoints(stopped.run) == {}
    assert out.splitlines()[-1] == str(stopped.run)


def test_stopped_again(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    """By SIGTERM, as batch systems do it; and the last line of the log was cut off."""
    with (stopped.run / "log.csv").open("a") as log:
        log.write("6")
    code, out, told = stopped.interrupted("--resume", sent=signal.SIGTERM, rows=60)
    assert (code, out) == (1, "")
    assert told.splitlines()[-1].startswith("Error: stopped at ")
    assert stopped.resume().code == 0
    assert results(stopped.run) == uninterrupted
    cells = [line.split(",") for line in (stopped.run / "log.csv").read_text().splitlines()]
    assert {len(row) for row in cells} == {len(fields(Row))}
    tokens = [int(row[0]) for row in cells[1:]]
    assert tokens == sorted(tokens)


def test_killed_before_the_first_checkpoint(
    tiny_model_folder: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """There is nothing to resume; the command itself starts again."""
    here = place(tmp_path, tiny_model_folder)
    assert here.interrupted(sent=signal.SIGKILL).code == -signal.SIGKILL
    assert [path.name for path in here.run.iterdir()] == ["log.csv"]
    message = f"nothing to resume: no checkpoint in {here.run}; leave --resume out to start"
    assert here.resume().told.endswith(f"Error: {message}\n")
    assert CliRunner().invoke(main, here.words()).exit_code == 0
    assert results(here.run) == uninterrupted


def test_interrupted_while_evaluating(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    """The last checkpoint stays until all that a run leaves is there."""

    def on_eval(done: int, total: int) -> None:
        raise KeyboardInterrupt

    options = Options(text=stopped.folder / "text.txt", registry=stopped.folder / "overlay.yaml")
    with pytest.raises(TrainingError, match=r"stopped in the evaluation .* --resume goes on there"):
        reproduce("small", out=stopped.run, tokens=TOKENS, resume=True, on_eval=on_eval, options=options)
    assert checkpoints(stopped.run)
    assert stopped.resume().code == 0
    assert results(stopped.run) == uninterrupted
    assert (stopped.run / "report.md").is_file()


def other_recipe(here: Place) -> list[str]:
    write_overlay(here.folder, here.model_folder, lr=0.5, ghost="off")
    return []


def other_text(here: Place) -> list[str]:
    (here.folder / "other.txt").write_text("Another text. " * 90)
    return ["--text", str(here.folder / "other.txt")]


def changed_text(here: Place) -> list[str]:
    with (here.folder / "text.txt").open("a") as file:
        file.write("More.")
    return []


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (other_recipe, r"\(lr: 0.01 in the checkpoint, 0.5 now; ghost: fixed in the checkpoint, off now\)"),
        (lambda here: ["--seed", "1"], r"\(seed: 0 in the checkpoint, 1 now\)"),
        (other_text, r"\(text: file:text.txt \(\w{16}\) in the checkpoint, file:other.txt \(\w{16}\) now\)"),
        (changed_text, r"\(text: file:text.txt \(\w{16}\) in the checkpoint, file:text.txt \(\w{16}\) now\)"),
        (lambda here: ["--tokens", "50000"], r"\(tokens: 40000 in the checkpoint, 50000 now\)"),
        (lambda here: ["--model-dtype", "bfloat16"], r"\(model_dtype: float32 in the checkpoint, bfloat16 now\)"),
    ],
)
def test_resuming_something_else(stopped: Place, change: Callable[[Place], list[str]], listed: str) -> None:
    before = checkpoints(stopped.run)
    code, out, told = stopped.resume(*change(stopped))
    assert (code, out) == (1, "")
    last = told.splitlines()[-1]
    assert re.fullmatch(rf"Error: \S+ belongs to another run {listed}; use its settings, or another --out", last)
    assert checkpoints(stopped.run) == before


def test_the_text_has_vanished(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    path = stopped.folder / "text.txt"
    content = path.read_bytes()
    path.unlink()
    code, out, told = stopped.resume()
    assert (code, out, told) == (1, "", f"Error: no file {path}\n")
    path.write_bytes(content)
    assert stopped.resume().code == 0
    assert results(stopped.run) == uninterrupted


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))"


def test_a_disk_that_is_full_at_a_checkpoint(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    """Files cannot become larger than 30 kB, which cuts the writing short as a full disk does."""
    before = checkpoints(stopped.run)
    code, out, told = stopped.interrupted("--resume", rows=40, before=LIMIT)
    assert (code, out) == (1, "")
    # The log grows towards the same limit, and is first if the signal is slow to arrive.
    written = rf"{stopped.run}/(checkpoint-\d+.safetensors|log.csv)"
    message = f"Error: cannot write {written}: File too large; choose a place that can be written"
    assert re.fullmatch(message, told.splitlines()[-1])
    assert checkpoints(stopped.run) == before
    assert stopped.resume().code == 0
    assert results(stopped.run) == uninterrupted


def test_a_disk_that_is_full_at_the_log(stopped: Place, uninterrupted: dict[str, bytes]) -> None:
    process = start(stopped.words("--resume"), LIMIT)
    out, told = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert told.splitlines()[-1].startswith(f"Error: cannot write {stopped.run / 'log.csv'}: File too large; ")
    assert "Traceback" not in told
    assert stopped.resume().code == 0
    assert results(stopped.run) == uninterrupted
