"""TensorBoard's and wandb's files, written for real and read back; neither package is needed for anything else."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from saezoo.errors import UsageError
from saezoo.sinks import Sinks, open_sinks

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is missing")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is missing")

WAYS_OUT = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL")
PROGRAM = """
import sys
from pathlib import Path
from saezoo.errors import SaezooError
from saezoo.sinks import open_sinks
try:
    sinks = open_sinks(Path(sys.argv[1]), tensorboard=False, wandb_project="zoo", run_name="first", config={"lr": 4e-4})
except SaezooError as error:
    sys.exit(f"Error: {error}")
for tokens in (1000, 2000):
    sinks.log(tokens, "11-post", {"mse": tokens / 8, "l0": 3.0})
sinks.close()
"""


def opened(folder: Path, *, resumed_at: int = 0) -> Sinks:
    return open_sinks(folder, tensorboard=True, wandb_project=None, run_name="first", config={}, resumed_at=resumed_at)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_run(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], bool]:
    """What a process with a wandb run said, and whether anything of it went to the network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k.lower() != "no_proxy"}
        home = str(folder.parent / "home")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(folder)],
            env=clean | dict.fromkeys(WAYS_OUT, url) | {"HOME": home, "XDG_CONFIG_HOME": home} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.settimeout(0.1)
        try:
            server.accept()[0].close()
        except TimeoutError:
            return done, False
        return done, True


@needs_tensorboard
def test_tensorboard_has_one_curve_per_layer_and_metric(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    sinks.log(1000, "0", {"mse": 0.5, "l0": 12.0})
    sinks.log(1000, "11-post", {"mse": 0.25})
    sinks.log(2000, "0", {"mse": 0.125})
    sinks.close()
    expected = {"0/mse": [(1000, 0.5), (2000, 0.125)], "0/l0": [(1000, 12.0)], "11-post/mse": [(1000, 0.25)]}
    assert scalars(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


@needs_tensorboard
def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    """The first session went on to 3,000 tokens, but its checkpoint was at 2,000."""
    for resumed_at, steps in ((0, (1000, 2000, 3000)), (2000, (3000, 4000))):
        sinks = opened(tmp_path, resumed_at=resumed_at)
        for tokens in steps:
            sinks.log(tokens, "0", {"mse": resumed_at + tokens / 8})
        sinks.close()
    assert scalars(tmp_path) == {"0/mse": [(1000, 125.0), (2000, 250.0), (3000, 2375.0), (4000, 2500.0)]}


@needs_wandb
def test_wandb_offline_leaves_files_and_asks_nobody(tmp_path: Path) -> None:
    done, asked = wandb_run(tmp_path / "run", WANDB_MODE="offline")
    assert (done.returncode, asked) == (0, False), done.stderr
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert all(word in content for word in (b"11-post/mse", b"11-post/l0", b"first", b"zoo"))
    assert not list((tmp_path / "run").rglob("output.log")), "what the terminal shows is not recorded"


@needs_wandb
def test_wandb_without_an_account(tmp_path: Path) -> None:
    done, _ = wandb_run(tmp_path / "run", WANDB_MODE="online", **dict.fromkeys(WAYS_OUT, "http://127.0.0.1:9"))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("Error: wandb does not start: ")
    assert last.endswith("; WANDB_MODE=offline needs no account")


@pytest.mark.parametrize(
    ("package", "project", "message"),
    [
        ("tensorboard", None, "TensorBoard is not installed; pip install 'saezoo[tensorboard]'"),
        ("wandb", "zoo", "wandb is not installed; pip install 'saezoo[wandb]'"),
    ],
)
def test_a_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, project: str | None, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError) as caught:
        open_sinks(tmp_path / "run", tensorboard=project is None, wandb_project=project, run_name="first", config={})
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_nothing_asked_for_needs_nothing(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path / "run", tensorboard=False, wandb_project=None, run_name="first", config={})
    sinks.log(1000, "0", {"mse": 0.5})
    sinks.close()
    assert not (tmp_path / "run").exists()
