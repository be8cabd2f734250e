"""`saezoo` as a process of its own, against a loopback hub, with an empty home of the hub client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saezoo import hub

ROOT = Path(hub.__file__).parents[1]


def start(endpoint: str, folder: Path, *arguments: str, before: str = "", **options: Any) -> subprocess.Popen[str]:
    """`saezoo --registry FOLDER/mine.yaml …`, begun; the code `before` runs in that process first."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SAEZOO_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"SAEZOO_LOCK": str(folder / "saezoo.lock"), "SAEZOO_CACHE": str(folder / "own")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    program = ["-c", f"{before}; from saezoo.cli import main; main()"] if before else ["-m", "saezoo"]
    command = [sys.executable, *program, "--registry", str(folder / "mine.yaml"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **(pipes | options))


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for it to end."""
    out, told = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def saezoo(endpoint: str, folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    return finish(start(endpoint, folder, *arguments, **options))


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of stderr, of a run that failed as it should."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("Error: ")
    assert done.stderr.count("Error: ") == 1
    return last.removeprefix("Error: ")


def leftovers(folder: Path) -> list[str]:
    """Files in the cache other than refs and locks: halves of downloads, and what looks like a whole one."""
    repositories = (folder / "home" / "hub").glob("models--*")
    found = [path for repository in repositories for path in repository.rglob("*") if not path.is_dir()]
    return [path.name for path in found if path.suffix != ".lock" and path.parent.name != "refs"]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Fail if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
