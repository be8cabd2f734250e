"""A training as the terminal shows it: what the picture and the lines say of a real run, and the density histogram."""

from __future__ import annotations

import os
import pty
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest
import torch
from smallrun import arguments, start, write_overlay, write_text

from saezoo.checkpoint import Schedule
from saezoo.live import TrainingView
from saezoo.lm import load_language_model
from saezoo.registry import read_registry
from saezoo.reproduction import Seen
from saezoo.tokens import text_file
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Trainee, initial_parameters
from saezoo.watching import Watch, _checkpoint, _histogram

NUMBER = r"\d[\d.,e-]*"


def screen_of(words: list[str], columns: int, lines: int) -> list[str]:
    """What a terminal shows after `saezoo` has been run with its stderr there."""
    pyte = pytest.importorskip("pyte", reason="pyte is missing")
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {"TERM": "xterm-256color", "PYTHONUTF8": "1", "COLUMNS": str(columns), "LINES": str(lines)}
    process = start(words, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        while written := os.read(ours, 65_536):
            stream.feed(written)
    except OSError:  # the process is gone, and with it the other end
        os.close(ours)
    process.communicate()
    return [line.rstrip() for line in screen.display]


def test_on_a_terminal(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The last picture stays; below it is what comes after the training."""
    words = arguments(write_overlay(tmp_path, tiny_model_folder), tmp_path / "run", write_text(tmp_path))
    shown = screen_of([*words, "--tokens", "6000"], 100, 24)
    first = next(i for i, line in enumerate(shown) if line.startswith("training "))
    assert shown[0] == "filling the shuffle buffer with 256 activations"
    assert re.fullmatch(r"training ━+ 100% 6,000 of 6,000 tokens", shown[first])
    assert re.fullmatch(rf"{NUMBER} tokens/s, 0 s left, \d+% of the matrix-product peak", shown[first + 1])
    assert shown[first + 3].split() == ["layer", "loss", "mse", "l1", "ghost", "L0", "EV", "dead", "1e-6", "1"]
    for name, line in enumerate(shown[first + 4 : first + 6]):
        assert re.fullmatch(rf" +{name}( +{NUMBER}){{7}}  [ ▁▂▃▄▅▆▇█]+", line)
    assert shown[first + 6].startswith(f"report: {tmp_path}")


def test_in_a_pipe(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Notes alone: so short a run is over before the first line is due."""
    words = arguments(write_overlay(tmp_path, tiny_model_folder), tmp_path / "run", write_text(tmp_path))
    process = start(words)
    out, told = process.communicate()
    assert process.returncode == 0
    assert "\x1b" not in told + out
    first, *between, last = told.splitlines()
    assert first == "filling the shuffle buffer with 256 activations"
    assert all(re.match(r"token cache: tokenising|end of file:text.txt", line) for line in between)
    assert last.startswith(f"report: {tmp_path / 'run' / 'report.md'}; use them: saezoo --registry ")
    assert out.splitlines()[-1] == str(tmp_path / "run")


def trained(model_folder: Path, folder: Path, on_step: Callable[[Progress], None], **changes: Any) -> None:
    """1,000 tokens of a small run, with a checkpoint before each refill of the buffer."""
    entries = tuple(read_registry(write_overlay(folder, model_folder, **changes)).find("small", "all"))
    job = Job(entries, entries[0].known_recipe, text_file(write_text(folder)), 1000, 0)
    often = Schedule(share=1e9, shortest=0.0)
    train(job, load_language_model(model_folder), folder / "run", schedule=often, hooks=Hooks(on_step))


def test_what_the_lines_say(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step and the last are shown, and what comes between them twice a second."""
    seen: list[Progress] = []

    def on_step(progress: Progress) -> None:
        seen.append(progress)
        watch(Seen(progress, 0.5))

    with Watch() as watch:
        watch._view = TrainingView(every=0.0)
        trained(tiny_model_folder, tmp_path, on_step)
    first, *_, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("training "))
    assert first.startswith("training 6%, ")
    found = re.fullmatch(r"training 100%, .*, 0 s left, layer 0: loss (.*) mse (.*) l1 (.*) L0 (.*) dead (.*)", last)
    log = seen[-1].logs[0]
    wanted = [float(value) for value in (*log.losses[:3], log.l0, log.dead)]
    assert found and [float(value) for value in found.groups()] == pytest.approx(wanted, rel=0.01)


def test_what_is_said_of_checkpoints(tiny_model_folder: Path, tmp_path: Path) -> None:
    said: list[str | None] = []
    trained(tiny_model_folder, tmp_path, lambda progress: said.append(_checkpoint(progress)))
    assert said[0] is None
    assert re.fullmatch(r"last checkpoint 0 MB in \d\.\d s; \d+\.\d% of the time", said[-1] or "")


def trainee(fires: dict[int, int], tokens: int) -> Trainee:
    """So many features (values) that fired so many times (keys) in a window of `tokens`; the others never did."""
    recipe = replace(read_registry().recipe("tiny"), batch_size=64)
    found = Trainee(initial_parameters(48, torch.zeros(16), torch.Generator().manual_seed(0)), recipe)
    counts = torch.tensor([times for times, features in fires.items() for _ in range(features)])
    found.window_fires_F[: len(counts)] = counts
    found.window_tokens = tokens
    return found


def test_counts_of_the_density_histogram() -> None:
    """24 bins from 1e-6 to 1, by log10 of the frequency: 1 is in the last, 0.2 in the 22nd, 1/6400 in the 9th."""
    found = _histogram(trainee({6400: 3, 1280: 10, 1: 4}, 6400))
    assert len(found) == 24
    assert {i: count for i, count in enumerate(found) if count} == {23: 3, 21: 10, 8: 4}
    assert _histogram(trainee({}, 0)) == (0,) * 24


def test_a_young_window_shows_the_one_before_it() -> None:
    """For fewer than 100 batches, unless there is none before it."""
    young, old = trainee({1: 48}, 64 * 99), trainee({1: 48}, 64 * 100)
    assert _histogram(young)[8] == 48
    for each in (young, old):
        each.log_sparsity_F = torch.full((48,), -0.7)
        each.log_sparsity_F[:8] = -10  # never fired
    assert _histogram(young) == (0,) * 21 + (40, 0, 0)
    assert _histogram(old)[8] == 48
