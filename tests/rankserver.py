"""Ranks for the tests: a warm process that forks groups of them, with the environment that torchrun would give.

Importing torch and transformers anew in each of four ranks would take longer than all that they are tested for.
Run as a script it reads one request per line of stdin, and answers each with the ranks' exit codes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from test_train import RECIPE, entry, often

import saezoo
from saezoo import reproduction, workflows
from saezoo.cli import main
from saezoo.errors import SaezooError
from saezoo.lm import LanguageModel, load_language_model
from saezoo.ranks import Ranks, Share, join, leave
from saezoo.registry import read_registry
from saezoo.tokens import text_file
from saezoo.trainers import gathering
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Product, Trainee, initial_parameters

PATIENCE = 60.0
"""Seconds after which a group is taken to hang: a safety net, nothing is timed by it."""


@dataclass(frozen=True)
class Ended:
    """A group of ranks that has ended."""

    codes: list[int]
    """Exit codes; minus the signal's number if one ended it."""
    out: list[str]
    err: list[str]


class RankServer:
    """The warm process, as the tests see it."""

    def __init__(self, model: Path, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1])}
        command = [sys.executable, __file__, str(model)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._folder, self._groups = folder, 0

    def __call__(self, size: int, program: str, environment: Mapping[str, str] | None = None, **given: Any) -> Ended:
        """Run `program` of this module on `size` ranks until all have ended."""
        self._groups += 1
        folder = self._folder / f"group{self._groups}"
        folder.mkdir()
        request = {"size": size, "folder": str(folder), "program": program, "given": given}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"environment": dict(environment or {})}, default=str) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        out, err = ([(folder / f"{r}.{kind}").read_text() for r in range(size)] for kind in ("out", "err"))
        return Ended(codes, out, err)

    def close(self) -> None:
        """End the warm process."""
        self._process.communicate(timeout=PATIENCE)


def four(text: Path, **changes: Any) -> Job:
    """Training four SAEs, two at each block of the tiny model; 900 tokens if `changes` of the recipe name no others."""
    after = (replace(entry(i), name=f"{i}-post", hook=f"blocks.{i}.hook_resid_post") for i in (0, 1))
    recipe = replace(read_registry().recipe("feb2024"), **{**RECIPE, **changes})
    tokens = changes.get("tokens", 900)
    return Job((entry(0), entry(1), *after), recipe, text_file(text), tokens=tokens, seed=7)


def train_four(
    lm: LanguageModel,
    text: str,
    folder: str,
    share: Share,
    resume: bool = False,
    events: Mapping[str, list[tuple[int, str]]] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    apart: bool = False,
    **changes: Any,
) -> None:
    """Train them; rank 0 leaves the final states in `folder`.

    `events`: rank -> after how many tokens what comes over it; then steps are slow, for ranks ask each other no more
    than four times a second, and checkpoints follow one after the other. `others`: rank -> `changes` of it alone.
    `apart`: each rank is told another folder.
    """
    ranks, _ = join("cpu", share)
    run = Path(folder) / f"{ranks.rank}" if apart else Path(folder)
    due = list((events or {}).get(str(ranks.rank), ()))

    def on_step(progress: Progress) -> None:
        time.sleep(0.02 if events else 0)
        while due and progress.done >= due[0][0]:
            happen(due.pop(0)[1], progress)

    try:
        plan = four(Path(text), **{**changes, **(others or {}).get(str(ranks.rank), {})})
        schedule, hooks = often() if events else None, Hooks(on_step)
        trainees = train(plan, lm, run, resume=resume, ranks=ranks, schedule=schedule, hooks=hooks)
        if ranks.rank == 0:
            torch.save([tuple(trainee.state()) for trainee in trainees], run / "final.pt")
    finally:
        leave()


def happen(event: str, progress: Progress) -> None:
    """What can come over a rank."""
    if event == "nan":
        progress.trainees[0].b_dec_D.fill_(float("nan"))
    elif event == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    elif event == "killed while saving":
        sys.addaudithook(kill_before_rename)
    else:
        os.kill(os.getpid(), signal.Signals[event])


def kill_before_rename(event: str, arguments: tuple[Any, ...]) -> None:
    """When a checkpoint is about to appear."""
    if event == "os.rename" and "checkpoint-" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)


VARIANTS: dict[str, dict[str, Any]] = {
    "off": {"ghost": "off"},
    "bug": {"ghost": "bug"},
    "fixed": {"ghost": "fixed"},
    "standard": {"loss": "standard", "ghost": "off"},
}


def sharded(variant: str, n_dead: int, product: Product, ranks: Ranks) -> Trainee:
    """This rank's features of an SAE in float64, after one step; the first `n_dead` of 48 were dead before it."""
    random = torch.Generator().manual_seed(1)
    recipe = replace(read_registry().recipe("feb2024"), **{**RECIPE, **VARIANTS[variant]})
    b_dec, x_BD = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((16,), (40, 16)))
    mine = ranks.features(48)
    parameters = initial_parameters(48, b_dec, random, features=mine)
    trainee = Trainee(parameters, recipe, product=product, dense_above=1.0, ranks=ranks)
    trainee.density, trainee.steps = 0.5, 10
    trainee.since_fired_F += torch.where(torch.arange(48) < n_dead, 10, 0)[mine]
    trainee.b_enc_F -= torch.where(torch.arange(48) % 3 == 0, 9, 0)[mine]  # a third of them never fire
    trainee.step(x_BD)
    return trainee


def one_step(lm: LanguageModel, share: Share, folder: str, cases: list[tuple[str, int, Product]]) -> None:
    """Each case's `sharded` step; rank 0 leaves all that the SAEs have then come to."""
    ranks, _ = join("cpu", share)
    trainees = [sharded(*case, ranks) for case in cases]
    whole = gathering.whole_trainees(trainees[0].recipe, "dense", trainees, ranks)
    if ranks.rank == 0:
        torch.save([trainee.state().tensors for trainee in whole], Path(folder) / "steps.pt")
    leave()


def watched(lm: LanguageModel, text: str, folder: str) -> None:
    """What `reproduce` shows of training them, on stdout."""
    ranks, _ = join("cpu", "entries")
    options = workflows.Options(note=print)
    shown = reproduction.Means(), options
    reproduction._train(four(Path(text)), lm, Path(folder), False, ranks, 1e9, lambda seen: print("a step"), *shown)
    leave()


def command_line(lm: LanguageModel, arguments: list[str]) -> None:
    """`saezoo` with these arguments."""
    main(arguments)


def serve(lm: LanguageModel) -> None:
    """Fork a group for each request."""
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [fork(rank, port, lm, request) for rank in range(request["size"])]
        print(json.dumps([wait(pid, time.monotonic() + PATIENCE) for pid in pids]), flush=True)


def fork(rank: int, port: int, lm: LanguageModel, request: dict[str, Any]) -> int:
    """The pid of a rank; the rank itself never returns."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["size"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **request["environment"]}
    for descriptor, kind in ((1, "out"), (2, "err")):
        path = Path(request["folder"]) / f"{rank}.{kind}"
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    try:
        PROGRAMS[request["program"]](lm, **request["given"])
        code = 0
    except SaezooError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take a forked interpreter with torch in it apart would be most of the tests' time


def wait(pid: int, until: float) -> int:
    """The rank's exit code; it is killed if it has not ended in time, and that is no signal that any test expects."""
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


PROGRAMS: dict[str, Callable[..., None]] = {
    "train": train_four,
    "cli": command_line,
    "step": one_step,
    "watched": watched,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warm = load_language_model(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as scratch:  # what torch imports at the first step, it has now
        words = Path(scratch) / "warm.txt"
        words.write_text("<|endoftext|>".join(["warm " * 20] * 20))
        train(four(words, tokens=300), warm, Path(scratch) / "run")
    serve(warm)
