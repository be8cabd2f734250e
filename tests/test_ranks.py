"""Training on several processes: the same SAEs as on one, whatever is shared, stopped or killed.

Sharing SAEs gives the same bits, since on a CPU each rank runs the model on one store call at a time, as one process
does. Sharing features adds the reconstructions up in another order: equal but for rounding.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import smallrun
import torch
from rankserver import PATIENCE, VARIANTS, Ended, RankServer, four, sharded
from test_train import lines
from torch import Tensor

import saezoo
from saezoo import checkpoint, reproduction
from saezoo.errors import UsageError
from saezoo.lm import load_language_model
from saezoo.ranks import Ranks, Share, join
from saezoo.trainers.train import train
from saezoo.trainers.trainee import Product, Trainee

State = tuple[dict[str, Tensor], dict[str, Any]]
WORDS = "<|endoftext|>".join(f"Document {i}: " + "ab cd " * (i % 5) for i in range(20))
DIED = "another rank has ended or does not answer ("
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


class Place(NamedTuple):
    """Where the tests of this module train."""

    ranks: RankServer
    model: Path
    text: Path

    def train(self, size: int, folder: Path, share: Share, **how: Any) -> Ended:
        return self.ranks(size, "train", text=self.text, folder=folder, share=share, **how)


@pytest.fixture(scope="module")
def place(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "words.txt").write_text(WORDS)
    server = RankServer(tiny_model_folder, folder)
    yield Place(server, tiny_model_folder, folder / "words.txt")
    server.close()
    one_process.cache_clear()


@cache
def one_process(place: Place, **changes: Any) -> tuple[list[State], Path]:
    """What one process comes to without interruption, and its folder."""
    folder = place.text.parent / f"one-{'-'.join(map(str, changes.values()))}"
    trainees = train(four(place.text, **changes), load_language_model(place.model), folder)
    return [(state.tensors, state.facts) for state in map(Trainee.state, trainees)], folder


def final(folder: Path) -> list[State]:
    found: list[State] = torch.load(folder / "final.pt")
    return found


def same_bits(folder: Path, wanted: list[State]) -> bool:
    """Of weights, moments, counters and facts."""
    pairs = list(zip(final(folder), wanted, strict=True))
    assert all(mine[1] == theirs[1] and mine[0].keys() == theirs[0].keys() for mine, theirs in pairs)
    return all(torch.equal(mine[0][key], tensor) for mine, theirs in pairs for key, tensor in theirs[0].items())


def assert_close(folder: Path, wanted: list[State]) -> None:
    """As far as float32 and some forty steps allow."""
    for mine, theirs in zip(final(folder), wanted, strict=True):
        for key in ("W_enc", "b_enc", "W_dec", "b_dec", "log_sparsity"):
            torch.testing.assert_close(mine[0][key], theirs[0][key], rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize("size", [2, 4])
def test_sharing_saes_gives_the_same_bits(place: Place, tmp_path: Path, size: int) -> None:
    assert place.train(size, tmp_path, "entries") == Ended([0] * size, [""] * size, [""] * size)
    wanted, folder = one_process(place)
    assert same_bits(tmp_path, wanted)
    assert lines(tmp_path / "log.csv") == lines(folder / "log.csv")


def test_only_rank_0_shows_the_run(place: Place, tmp_path: Path) -> None:
    ended = place.ranks(2, "watched", text=place.text, folder=tmp_path)
    assert (ended.codes, ended.err, ended.out[1]) == ([0, 0], ["", ""], "")
    steps = [line for line in ended.out[0].splitlines() if line == "a step"]
    assert len(steps) == 43
    assert ended.out[0].startswith("filling the shuffle buffer with 256 activations\n")


def test_only_rank_0_writes_to_the_run_folder(place: Place, tmp_path: Path) -> None:
    assert stop(place, tmp_path, 2, "entries", apart=True) >= 200
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


@pytest.mark.parametrize("size, variant", [(2, "fixed"), (2, "standard"), (4, "bug")])
def test_sharing_features_differs_by_rounding(place: Place, tmp_path: Path, size: int, variant: str) -> None:
    changes = {"tokens": 320, **VARIANTS[variant]}  # fixed ghosts would amplify the rounding in a longer run
    assert place.train(size, tmp_path, "features", **changes) == Ended([0] * size, [""] * size, [""] * size)
    wanted, folder = one_process(place, **changes)
    assert_close(tmp_path, wanted)
    for mine, theirs in zip(rows(tmp_path), rows(folder), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def rows(folder: Path) -> list[list[float]]:
    """The numbers of log.csv, without those that tell time."""
    return [[float(cell) for i, cell in enumerate(row) if i != 1] for row in lines(folder / "log.csv")[1:]]


HOW: tuple[tuple[int, Product], ...] = ((0, "full"), (7, "full"), (7, "dense"), (30, "full"))
CASES = [(variant, n_dead, product) for variant in VARIANTS for n_dead, product in HOW]


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_step_is_the_whole_one_in_float64(place: Place, tmp_path: Path, size: int) -> None:
    """All that one step leaves, Adam's moments and with them every gradient included. Seven dead features are on rank 0
    alone; of thirty the last of four ranks has none."""
    ended = place.ranks(size, "step", share="features", folder=tmp_path, cases=CASES)
    assert ended == Ended([0] * size, [""] * size, [""] * size)
    for case, found in zip(CASES, torch.load(tmp_path / "steps.pt"), strict=True):
        wanted = sharded(*case, Ranks()).state().tensors
        for key, tensor in wanted.items():
            bound = 1e-12 * float(tensor.abs().max())
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=bound, msg=f"{case} {key}")


STOP = {str(rank): [(200, "SIGTERM")] for rank in range(4)}
"""To every rank, as torchrun does when it is stopped."""


@pytest.mark.parametrize("share, before, then", [("entries", 4, 2), ("entries", 4, 1), ("entries", 1, 2)])
def test_a_stopped_run_goes_on_with_the_same_bits_on_other_ranks(
    place: Place, tmp_path: Path, share: Share, before: int, then: int
) -> None:
    stop(place, tmp_path, before, share)
    assert place.train(then, tmp_path, share, resume=True).codes == [0] * then
    wanted, folder = one_process(place)
    assert same_bits(tmp_path, wanted)
    assert lines(tmp_path / "log.csv") == lines(folder / "log.csv")


def stop(place: Place, folder: Path, size: int, share: Share, **how: Any) -> int:
    """Have a training stopped half-way, and see that all its ranks stop at the same step, which is returned."""
    ended = place.train(size, folder, share, **{"events": STOP, **how})
    assert ended.codes == [1] * size and ended.out == [""] * size
    (line,) = set(ended.err)
    match = re.fullmatch(r"Error: stopped at (\d+) of \d+ tokens; the same command with --resume goes on\n", line)
    assert match, line
    assert list(folder.rglob(f"checkpoint-{int(match[1]):015d}.safetensors"))
    return int(match[1])


@pytest.mark.parametrize(
    "shares, before, then", [("features features", 4, 2), ("features entries", 2, 1), ("entries features", 2, 2)]
)
def test_a_stopped_run_goes_on_however_it_is_shared(
    place: Place, tmp_path: Path, shares: str, before: int, then: int
) -> None:
    first, second = shares.split()
    stop(place, tmp_path, before, cast(Share, first), tokens=512)
    assert place.train(then, tmp_path, cast(Share, second), resume=True, tokens=512).codes == [0] * then
    assert_close(tmp_path, one_process(place, tokens=512)[0])


def test_a_signal_to_one_rank_stops_all(place: Place, tmp_path: Path) -> None:
    done = stop(place, tmp_path, 2, "entries", events={"1": [(200, "SIGTERM")]})
    assert 200 <= done < 900
    assert place.train(2, tmp_path, "entries", resume=True).codes == [0, 0]
    assert same_bits(tmp_path, one_process(place)[0])


@pytest.mark.parametrize(
    "size, share, rank, event",
    [
        (4, "entries", 2, "SIGKILL"),
        (2, "entries", 0, "SIGKILL"),
        (2, "features", 1, "SIGKILL"),
        (4, "entries", 0, "killed while saving"),
    ],
)
def test_the_others_stop_when_a_rank_is_killed(
    place: Place, tmp_path: Path, size: int, share: Share, rank: int, event: str
) -> None:
    plan = {"tokens": 3000, "ghost": "off"}  # ghosts would amplify the rounding
    ended = place.train(size, tmp_path, share, events={str(rank): [(600, event)]}, **plan)
    assert ended.codes.pop(rank) == -signal.SIGKILL and ended.err.pop(rank) == ""
    assert ended.codes == [1] * (size - 1)
    for line in ended.err:
        assert re.fullmatch(rf"Error: rank \d: {re.escape(DIED)}.*--resume goes on from the last checkpoint\n", line)
    assert 0 < last_checkpoint(tmp_path) < 3000
    assert place.train(1, tmp_path, share, resume=True, **plan).codes == [0]
    assert_close(tmp_path, one_process(place, **plan)[0])
    assert share == "features" or same_bits(tmp_path, one_process(place, **plan)[0])


def last_checkpoint(folder: Path) -> int:
    *_, newest = sorted(folder.glob("checkpoint-*"))
    found, _ = checkpoint._read(newest)  # checks every byte
    return found.done


def test_killed_again_and_again_on_any_number_of_ranks(place: Place, tmp_path: Path) -> None:
    for i, size in enumerate((4, 1, 2)):
        kill = {str(i % size): [(500 * (i + 1), "SIGKILL")]}
        ended = place.train(size, tmp_path, "entries", tokens=3000, resume=i > 0, events=kill)
        assert sorted(ended.codes) == [-signal.SIGKILL] + [1] * (size - 1)
    assert place.train(2, tmp_path, "entries", tokens=3000, resume=True).codes == [0, 0]
    wanted, folder = one_process(place, tokens=3000)
    assert same_bits(tmp_path, wanted)
    assert lines(tmp_path / "log.csv") == lines(folder / "log.csv")


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(place: Place, tmp_path: Path) -> None:
    ended = place.train(4, tmp_path, "entries", events={"2": [(300, "nan")]})
    assert ended.codes == [1] * 4
    told = ended.err.pop(2)
    assert re.fullmatch(
        r"Error: layer 0-post: .* not .*; lower the learning rate\n|Error: layer 0-post: the loss is nan .*\n", told
    )
    assert all(DIED in line and line.count("\n") == 1 for line in ended.err)


def test_a_disk_that_is_full_on_rank_0_ends_all(place: Place, tmp_path: Path) -> None:
    ended = place.train(2, tmp_path, "entries", tokens=3000, events={"0": [(600, "disk full")]})
    assert ended.codes == [1, 1]
    assert ended.err[0].startswith("Error: cannot write ") and ended.err[0].count("\n") == 1
    assert DIED in ended.err[1] and ended.err[1].count("\n") == 1
    assert last_checkpoint(tmp_path) > 0


@pytest.mark.parametrize(
    "others, told",
    [
        ({"1": {"tokens": 800}}, "rank 1 has tokens 800, rank 0 has 900; "),
        ({"3": {"lr": 0.5}}, "rank 3 has lr 0.5, rank 0 has 0.01; "),
    ],
)
def test_ranks_that_were_started_differently(place: Place, tmp_path: Path, others: dict[str, Any], told: str) -> None:
    ended = place.train(4, tmp_path, "entries", others=others)
    assert ended.codes == [1] * 4
    assert all(line.startswith(f"Error: {told}start all with one command") for line in ended.err)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes the words of `saezoo reproduce` with two SAEs, into `tmp_path`/run."""
    overlay, text = smallrun.write_overlay(tmp_path, tiny_model_folder), smallrun.write_text(tmp_path)
    return lambda *more: smallrun.arguments(overlay, tmp_path / "run", text, *more)


@pytest.mark.parametrize(
    "size, more, told",
    [
        (3, ["--share", "entries"], "2 SAEs cannot be divided among 3 ranks; use 2 of them, or --share features"),
        (5, ["--share", "features"], "48 features cannot be divided among 5 ranks; use 4 of them"),
        (2, ["--plan"], "--plan measures one process; run it without torchrun"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_every_rank(
    place: Place, command: Callable[..., list[str]], tmp_path: Path, size: int, more: list[str], told: str
) -> None:
    ended = place.ranks(size, "cli", arguments=command(*more))
    assert ended == Ended([2] * size, [""] * size, [f"Error: {told}\n"] * size)
    assert not (tmp_path / "run").exists()


def test_one_sae_needs_other_ways() -> None:
    with pytest.raises(UsageError, match=r"^1 SAE cannot be divided among 2 ranks; use one process, or --share f"):
        Ranks(0, 2, "entries").check(1, 48)


@pytest.mark.parametrize(
    "device, environment, told",
    [
        ("cpu", {}, "WORLD_SIZE is 2, but RANK is not set; start the ranks with torchrun"),
        ("mps", TORCHRUN, "several ranks cannot all train on mps; use --device cuda, or cpu"),
        ("cuda", {**TORCHRUN, "LOCAL_RANK": "99"}, "rank 99 of this machine has no GPU, it has "),
    ],
)
def test_joining_as_torchrun_would_not(
    monkeypatch: pytest.MonkeyPatch, device: str, environment: dict[str, str], told: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
        join(device, "entries")


def test_torchrun_starts_again_after_a_rank_was_killed(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """The real thing, which also shows that one rank alone talks."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    torchrun = ["--nproc-per-node", "2", "--max-restarts", "1", "--redirects", "3", "--log-dir", str(logs)]
    arguments = command("--resume", "--tokens", 10_000)
    environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1])}
    started = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "saezoo", *arguments]
    process = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        os.kill(in_training(process.pid, out), signal.SIGKILL)
        told, _ = process.communicate(timeout=2 * PATIENCE)
    finally:
        process.terminate()  # and with it the ranks, if they should hang
        process.communicate()
    assert process.returncode == 0 and told == ""
    first, second = (
        {p.parent.name + p.stem: p.read_text() for p in logs.glob(f"*/attempt_{i}/*/*.log")} for i in (0, 1)
    )
    assert DIED in first["0stderr"] and "Traceback" not in first["0stderr"]
    assert second["0stdout"].splitlines()[-1] == str(out) and second["0stdout"].count("standard protocol") == 1
    assert "report: " in second["0stderr"]
    assert (second["1stdout"], second["1stderr"], first["1stderr"]) == ("", "", "")
    assert {"log.csv", "eval.csv", "run.json", "report.md"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    "found, nothing",
    [("", True), ("log.csv .run.json.1a2b", True), ("log.csv checkpoint-1", False), ("run.json", False)],
)
def test_what_counts_as_nothing_to_go_on_from(tmp_path: Path, found: str, nothing: bool) -> None:
    """Then `--resume` starts a run, under --max-restarts; a finished one it must not overwrite."""
    for name in found.split():
        (tmp_path / name).touch()
    assert reproduction._holds_nothing(tmp_path) is nothing


def in_training(parent: int, out: Path) -> int:
    """The pid of rank 1, as soon as the run has a log."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if (out / "log.csv").is_file() and (out / "log.csv").read_text().count("\n") > 20:
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if (
                        int((path.parent / "stat").read_text().split()[3]) == parent
                        and b"\0RANK=1\0" in path.read_bytes()
                    ):
                        return int(path.parent.name)
        time.sleep(0.02)
    raise AssertionError("no training has begun")
