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
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from test_train import RECIPE, entry, often

import saezoo
from saezoo.cli import main
from saezoo.entries import Entry
from saezoo.errors import SaezooError
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import read_registry
from saezoo.tokens import encode, text_file
from saezoo.trainers.ranks import Ranks, Share, join, leave
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Parameters, Trainee

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


def entries() -> tuple[Entry, ...]:
    """Four SAEs, two at each block of the tiny model."""
    after = (replace(entry(i), name=f"{i}-post", hook=f"blocks.{i}.hook_resid_post") for i in (0, 1))
    return (entry(0), entry(1), *after)


def four(text: Path, **changes: Any) -> Job:
    """Training them, in 900 tokens if `changes` name no other number."""
    recipe = replace(read_registry().recipe("feb2024"), **{**RECIPE, **changes})
    return Job(entries(), recipe, text_file(text), tokens=changes.get("tokens", 900), seed=7)


def train_four(
    lm: LanguageModel,
    text: str,
    folder: str,
    share: Share,
    resume: bool = False,
    saving: bool = False,
    events: Mapping[str, tuple[int, str]] | None = None,
    **changes: Any,
) -> None:
    """Train them; rank 0 leaves the final states. `events`: rank -> after how many tokens what happens to it."""
    ranks, _ = join("cpu", share)
    due = dict(events or {})

    def on_step(progress: Progress) -> None:
        done, event = due.get(str(ranks.rank), (0, ""))
        if event and progress.done >= done:
            del due[str(ranks.rank)]
            happen(event, progress)

    try:
        hooks, schedule = Hooks(on_step), often() if saving else None
        plan, run = four(Path(text), **changes), Path(folder)
        trainees = train(plan, lm, run, resume=resume, ranks=ranks, schedule=schedule, hooks=hooks)
        if ranks.rank == 0:
            torch.save([trainee.state() for trainee in trainees], run / "final.pt")
    finally:
        leave()


def happen(event: str, progress: Progress) -> None:
    """What can come over a rank."""
    if event == "nan":
        progress.trainees[0].b_dec_D.fill_(float("nan"))
    elif event == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), signal.Signals[event])


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
    os.close(0)
    try:
        PROGRAMS[request["program"]](lm, **request["given"])
    except SaezooError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit()


def wait(pid: int, until: float) -> int:
    """The rank's exit code; it is killed if it has not ended in time, and that is no signal that any test expects."""
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


PROGRAMS: dict[str, Callable[..., None]] = {"train": train_four, "cli": command_line}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warm = load_language_model(Path(sys.argv[1]))
    list(encode(warm.tokenizer, ["warm"]))
    import saezoo.reproduction  # noqa: F401
    serve(warm)
