"""An evaluation that was stopped, killed or divided among processes gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_metrics import random_sae
from torch import Tensor

from saezoo.errors import SaezooError, TrainingError
from saezoo.evals import Subject, evaluate, resuming
from saezoo.lm import LanguageModel, load_language_model
from saezoo.ranks import Ranks
from saezoo.results import Result
from saezoo.tokens import Rows

N_ROWS = 44


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def rows() -> Rows:
    tokens_RT = torch.randint(0, 256, (N_ROWS, 20), generator=torch.Generator().manual_seed(0))
    tokens_RT[:, 0] = 256
    return Rows(tokens_RT.numpy(), torch.arange(N_ROWS)[:, None].expand(N_ROWS, 20).numpy())


def run(lm: LanguageModel, rows: Rows, **options: Any) -> list[Result]:
    subjects = [Subject(random_sae(), "tiny", name) for name in ("1", "again")]
    return evaluate(subjects, lm, rows, batch_size=3, text="a text", **options)


@pytest.fixture(autouse=True)
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch, not only after 20 seconds."""
    monkeypatch.setattr(resuming, "_SHORTEST", 0.0)
    monkeypatch.setattr("saezoo.checkpoint.Schedule.due", lambda self: True)


def stop_after(tokens: int) -> Any:
    def on_progress(done: int) -> None:
        if done >= tokens:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("stopped_at", [60, 120, 600, 840])
def test_resuming_gives_the_same_bits(lm: LanguageModel, rows: Rows, tmp_path: Path, stopped_at: int) -> None:
    wanted = run(lm, rows)
    with pytest.raises(SaezooError) as caught:
        run(lm, rows, states=tmp_path, on_progress=stop_after(stopped_at))
    kept = stopped_at - 60  # the batch that was just done is not saved yet
    words = f"{kept} tokens are done and saved, the same command with --resume goes on from there"
    assert str(caught.value) == f"stopped; {words if kept else 'nothing was saved yet'}"
    if not kept:
        return
    seen: list[int] = []
    assert run(lm, rows, states=tmp_path, resume=True, on_progress=seen.append) == wanted
    assert seen[0] == stopped_at and seen[-1] == N_ROWS * 20
    assert list(tmp_path.iterdir()) == [], "what was saved is deleted at the end"


@pytest.mark.parametrize("change", ["seed", "protocol", "text", "weights", "rows", "batch_size"])
def test_only_the_same_evaluation_is_resumed(lm: LanguageModel, rows: Rows, tmp_path: Path, change: str) -> None:
    sae = random_sae()
    common: dict[str, Any] = {"states": tmp_path, "batch_size": 3, "text": "a text"}
    with pytest.raises(SaezooError):
        evaluate([Subject(sae, "tiny", "1")], lm, rows, **common, on_progress=stop_after(300))
    changes: dict[str, Any] = {"seed": 1, "protocol": "feb2024", "text": "another", "batch_size": 4}
    common |= {change: changes[change]} if change in changes else {}
    if change == "weights":
        sae.W_dec[3, 2] += 1e-6
    if change == "rows":
        rows = Rows(rows.tokens_RT[::-1].copy(), rows.documents_RT)
    with pytest.raises(
        TrainingError, match="nothing to resume: no evaluation with just these settings was interrupted"
    ):
        evaluate([Subject(sae, "tiny", "1")], lm, rows, **common, resume=True)


def test_damaged_state_is_not_used(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    """The one before it is; and it is said."""
    with pytest.raises(SaezooError):
        run(lm, rows, states=tmp_path, on_progress=stop_after(600))
    newest = max(tmp_path.glob("*/checkpoint-*"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    notes: list[str] = []
    assert run(lm, rows, states=tmp_path, resume=True, note=notes.append) == run(lm, rows)
    assert len(notes) == 1 and notes[0].startswith(f"{newest.name} is damaged")


def test_what_nobody_came_back_to_goes_after_a_week(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    old, young = tmp_path / "old", tmp_path / "young"
    for folder, days in ((old, 8), (young, 6)):
        folder.mkdir()
        os.utime(folder, times=(time.time() - days * 86_400,) * 2)
    run(lm, rows, states=tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


class Apart(Ranks):
    """A rank whose messages are put together by the test: each rank runs after the other, in one process."""

    def collect(self, tensors: dict[str, Tensor], facts: Any) -> Any:
        box.append({name: tensor.clone() for name, tensor in tensors.items()})
        if self.rank > 0:
            return None
        return [(tensors, facts), *((theirs, facts) for theirs in reversed(box[:-1]))]


box: list[dict[str, Tensor]] = []


@pytest.mark.parametrize("size", [2, 3, 7, 40])
def test_rows_divided_and_sums_merged(lm: LanguageModel, rows: Rows, size: int) -> None:
    """Equal to one process but for the order of float64 sums; more ranks than batches is no error."""
    box.clear()
    for rank in reversed(range(1, size)):
        assert run(lm, rows, ranks=Apart(rank, size)) == []
    found, wanted = run(lm, rows, ranks=Apart(0, size)), run(lm, rows)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.metrics.keys() == theirs.metrics.keys()
        for name, value in theirs.metrics.items():
            for a, b in zip(mine.metrics[name], value, strict=True):
                assert a == (None if b is None else pytest.approx(b, rel=1e-12, abs=1e-13)), name
        assert (mine.histogram, mine.tokens, mine.documents) == (theirs.histogram, theirs.tokens, theirs.documents)
        a, b = (result.breakdowns["position"][3]["ce_delta"].known for result in (mine, theirs))
        assert a == pytest.approx(b, rel=1e-10)


COMMAND = """
import sys, time
from saezoo.evals import resuming
from saezoo import checkpoint
resuming._SHORTEST = 0.0
checkpoint.Schedule.due = lambda self: True
from saezoo.cli import main
main(sys.argv[1:])
"""


def saezoo(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


EVAL = ("eval", "tiny-res", "0", "--tokens", "8192", "--batch-size", "2", "--offline", "--json")


def kill_in_the_middle(cache: Path, how: signal.Signals, saves: int) -> tuple[int, str]:
    """Start, wait for so many saved states, send the signal; exit code and stderr."""
    process = saezoo(*EVAL, SAEZOO_CACHE=str(cache))
    for _ in range(3000):
        found = sorted(cache.glob("evals/*/checkpoint-*"))
        if found and int(found[-1].name.split("-")[1].split(".")[0]) >= 2 * saves:
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_killed_for_real_and_resumed(tmp_path: Path) -> None:
    """kill -9, then Ctrl-C, then to the end: the bytes of an undisturbed run."""
    out, _ = saezoo(*EVAL, SAEZOO_CACHE=str(tmp_path / "other")).communicate(timeout=120)
    code, _ = kill_in_the_middle(tmp_path, signal.SIGKILL, 3)
    assert code == -signal.SIGKILL
    process = saezoo(*EVAL, "--resume", SAEZOO_CACHE=str(tmp_path))
    resumed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(resumed) == json.loads(out)
    assert not list(tmp_path.glob("evals/*"))


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    code, err = kill_in_the_middle(tmp_path, signal.SIGINT, 2)
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("Error: stopped; ")
    assert "Traceback" not in err


def test_torchrun_divides_an_evaluation(tmp_path: Path) -> None:
    """Two real processes, in float64; the table is printed once."""
    arguments = ["eval", "tiny-res", "1", "--tokens", "4096", "--dtype", "float64", "--offline", "--csv", "-"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saezoo"]
    found = [
        subprocess.run(
            [*start, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ,
        )
        for start in ([sys.executable, "-m", "saezoo"], torchrun)
    ]
    assert [done.returncode for done in found] == [0, 0], found[1].stderr
    (names, one), (again, two) = ([line.split(",") for line in done.stdout.splitlines()] for done in found)
    assert names == again
    for name, mine, theirs in zip(names, two, one, strict=True):
        try:
            assert float(mine) == pytest.approx(float(theirs), rel=1e-12, abs=1e-13), name
        except ValueError:
            assert mine == theirs, name
