"""The training loop on a tiny model: the same bits from the same seed, however often it is interrupted.

Run as a script (`python test_train.py FOLDER MODEL TEXT HOW`) it is the training process that is killed.
"""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saezoo
from saezoo import checkpoint
from saezoo.activations import ActivationBuffer, activations
from saezoo.entries import Entry
from saezoo.errors import SaezooError, TrainingError, UsageError
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import read_registry
from saezoo.tokens import TextSource, encode, pack_feb2024, text_file
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Trainee

CALL = 4 * 16  # activations in one store call: rows x context
RECIPE: dict[str, Any] = {
    "batch_size": 24,
    "store_rows": 4,
    "buffer_batches": 4,
    "dead_after_steps": 3,
    "sampling_window_steps": 5,
    "skip_documents": 1,
    "lr": 1e-2,
    "l1_coefficient": 1e-2,
}


def entry(layer: int) -> Entry:
    first = read_registry().find("gpt2-small-res", "0")[0]
    hook = f"blocks.{layer}.hook_resid_pre"
    return replace(first, name=str(layer), layer=layer, hook=hook, d_in=16, d_sae=48, context_size=16)


def job(
    source: TextSource, layers: tuple[int, ...] = (0, 1), *, seed: int = 7, tokens: int = 900, **changes: Any
) -> Job:
    recipe = replace(read_registry().recipe("feb2024"), **{**RECIPE, **changes})
    return Job(tuple(entry(layer) for layer in layers), recipe, source, tokens=tokens, seed=seed)


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    """Some 500 tokens: a run takes several epochs of it."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("<|endoftext|>".join(f"Document {i}: " + "ab cd " * (i % 5) for i in range(20)))
    return text_file(path)


Bits = list[Tensor]


def bits(trainee: Trainee) -> Bits:
    """Everything that an SAE in training has come to."""
    return [tensor.clone() for tensor in trainee.state().tensors.values()]


def equal(mine: Bits, theirs: Bits) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `uninterrupted` was trained."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture(scope="module")
def uninterrupted(lm: LanguageModel, text: TextSource, whole_folder: Path) -> list[Bits]:
    return [bits(trainee) for trainee in train(job(text), lm, whole_folder)]


def test_the_same_seed_gives_the_same_bits(
    lm: LanguageModel, text: TextSource, uninterrupted: list[Bits], tmp_path: Path
) -> None:
    torch.manual_seed(99)  # the global generator has no say
    for trainee, wanted in zip(train(job(text), lm, tmp_path), uninterrupted, strict=True):
        assert equal(bits(trainee), wanted)


def test_another_seed_gives_others(
    lm: LanguageModel, text: TextSource, uninterrupted: list[Bits], tmp_path: Path
) -> None:
    for trainee, first in zip(train(job(text, seed=8), lm, tmp_path), uninterrupted, strict=True):
        assert not torch.equal(trainee.W_enc_FD, first[0])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_trains_alone_as_it_does_beside_others(
    lm: LanguageModel, text: TextSource, uninterrupted: list[Bits], tmp_path: Path, layer: int
) -> None:
    (alone,) = train(job(text, (layer,)), lm, tmp_path)
    assert equal(bits(alone), uninterrupted[layer])


def test_training_lowers_the_loss(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    losses: list[float] = []
    hooks = Hooks(on_step=lambda progress: losses.append(float(progress.logs[0].losses.total)))
    train(job(text, (1,), tokens=6000), lm, tmp_path, hooks=hooks)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_on_step_counts_tokens(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    seen: list[int] = []
    train(job(text, tokens=300), lm, tmp_path, hooks=Hooks(on_step=lambda progress: seen.append(progress.done)))
    assert seen == [24, 48, 72, 96, 120, 128, 152, 176, 200, 224, 248, 256, 280, 304]  # half a buffer is 128


def test_b_dec_starts_at_the_geometric_median(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    plan = job(text, (1,), tokens=256, lr=1e-30)
    (trainee,) = train(plan, lm, tmp_path)
    ids = encode(lm.tokenizer, text.documents())
    rows = pack_feb2024(ids, bos=lm.bos, context=16, rows_per_call=4, skip=1)
    generator = torch.Generator().manual_seed(plan.seed)
    source = activations(lm, rows, [1], centre=True)
    buffer = ActivationBuffer(
        source, half=2, batch_size=24, mode="bug", permute=lambda n: torch.randperm(n, generator=generator)
    ).fill()
    assert torch.equal(trainee.parameters.b_dec, geometric_median(buffer.storage[:, 0].contiguous()))


def test_the_log(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    train(job(text, tokens=300), lm, tmp_path)
    with (tmp_path / "log.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["layer"] for row in found] == ["0", "1"] * 14
    assert [int(row["tokens"]) for row in found[:4]] == [24, 24, 48, 48]
    for row in found:
        parts = sum(float(row[name]) for name in ("mse", "l1", "ghost"))
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
        assert 0 <= float(row["l0"]) <= 48 and 0 <= int(row["dead"]) <= 48


def at(tokens: int, number: int) -> Hooks:
    """Send this process a signal once `tokens` are done."""

    def on_step(progress: Progress) -> None:
        if progress.done == tokens:
            signal.raise_signal(number)

    return Hooks(on_step)


def lines(path: Path) -> list[list[str]]:
    """log.csv without the columns that tell time."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    timing = {rows[0].index(name) for name in ("seconds", "tokens_per_second")}
    return [[cell for i, cell in enumerate(row) if i not in timing] for row in rows]


@pytest.mark.parametrize("changes", [{}, {"buffer": "fixed", "ghost": "fixed", "lr_warmup_steps": 30}])
@pytest.mark.parametrize("tokens", [24, 128, 560, 896])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    lm: LanguageModel, text: TextSource, tmp_path: Path, tokens: int, changes: dict[str, Any]
) -> None:
    plan = job(text, **changes)
    wanted = [bits(trainee) for trainee in train(plan, lm, tmp_path / "whole")]
    with pytest.raises(TrainingError, match=f"stopped at {tokens} of 900 tokens; the same command with --resume"):
        train(plan, lm, tmp_path / "parts", hooks=at(tokens, signal.SIGTERM))
    notes: list[str] = []
    for trainee, bits_of_one in zip(
        train(plan, lm, tmp_path / "parts", resume=True, hooks=Hooks(note=notes.append)), wanted, strict=True
    ):
        assert equal(bits(trainee), bits_of_one)
    assert f"resumed at {tokens} of 900 tokens" in notes


def test_an_interrupted_run_leaves_the_same_log(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    train(job(text), lm, tmp_path / "whole")
    for tokens in (560, 688):
        with pytest.raises(TrainingError):
            train(job(text), lm, tmp_path / "parts", resume=tokens > 560, hooks=at(tokens, signal.SIGINT))
    train(job(text), lm, tmp_path / "parts", resume=True)
    assert lines(tmp_path / "parts" / "log.csv") == lines(tmp_path / "whole" / "log.csv")


def test_the_second_ctrl_c_interrupts_at_once(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    def on_step(progress: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(job(text), lm, tmp_path, hooks=Hooks(on_step))
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_put_back(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(job(text, tokens=256), lm, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def often() -> checkpoint.Schedule:
    """Checkpoints one after the other."""
    return checkpoint.Schedule(share=1e9, shortest=0.0)


def child(folder: Path, model: Path, text: Path, how: str) -> None:
    """Train until stopped by a signal after 560 tokens, or killed at once when the third checkpoint is to appear."""
    checkpoints = 0

    def kill_before_rename(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal checkpoints
        if event == "os.rename" and "checkpoint-" in str(arguments[1]):
            checkpoints += 1
            if checkpoints == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    if how == "SIGKILL":
        sys.addaudithook(kill_before_rename)
    hooks = Hooks() if how == "SIGKILL" else at(560, signal.Signals[how])
    try:
        train(job(text_file(text)), load_language_model(model), folder, schedule=often(), hooks=hooks)
    except SaezooError as error:
        sys.exit(str(error))


def killer(folder: Path, model: Path, text: Path) -> None:
    """Fork a training, kill it at a random moment, go on from its checkpoint; 25 kills at least, then let it finish.

    Prints how many kills there were, and during how many a checkpoint was half written.
    """
    lm, plan = load_language_model(model), job(text_file(text), tokens=24_000)
    list(encode(lm.tokenizer, ["warm"]))
    random_moment = random.Random(0)
    kills = torn = 0
    while True:
        process = os.fork()
        if process == 0:
            resume = any(folder.glob("checkpoint-*"))
            # Slow enough that 25 kills fit into a run on any machine.
            slowly = Hooks(on_step=lambda progress: time.sleep(0.01)) if kills < 25 else Hooks()
            trainees = train(plan, lm, folder, resume=resume, schedule=often(), hooks=slowly)
            torch.save([bits(trainee) for trainee in trainees], folder / "final.pt")
            os._exit(0)
        before = set(folder.glob(".checkpoint-*"))  # the next save clears these away
        if kills < 25:
            time.sleep(random_moment.uniform(0.02, 0.25))
            deadline = time.monotonic() + 1
            while kills % 2 and set(folder.glob(".checkpoint-*")) <= before and time.monotonic() < deadline:
                pass  # every other one: until a checkpoint is being written
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if status == signal.SIGKILL:
            kills += 1
            torn += not set(folder.glob(".checkpoint-*")) <= before
        else:
            print(status, kills, torn)
            return


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1])}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("how, code", [("SIGINT", 1), ("SIGTERM", 1), ("SIGKILL", -signal.SIGKILL)])
def test_a_killed_process_can_be_resumed(
    lm: LanguageModel,
    text: TextSource,
    uninterrupted: list[Bits],
    whole_folder: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    how: str,
    code: int,
) -> None:
    assert text.path is not None
    process = run_script(tmp_path, tiny_model_folder, text.path, how)
    assert process.returncode == code, process.stderr
    assert (how == "SIGKILL") != ("stopped at 560 of 900 tokens" in process.stderr)
    for trainee, wanted in zip(train(job(text), lm, tmp_path, resume=True), uninterrupted, strict=True):
        assert equal(bits(trainee), wanted)
    assert lines(tmp_path / "log.csv") == lines(whole_folder / "log.csv")


def test_kills_at_random_moments_leave_the_same_bits(
    lm: LanguageModel, text: TextSource, tiny_model_folder: Path, tmp_path: Path
) -> None:
    assert text.path is not None
    process = run_script(tmp_path / "killed", tiny_model_folder, text.path, "random")
    assert process.returncode == 0, process.stderr
    status, kills, torn = map(int, process.stdout.split())
    assert status == 0 and kills >= 20 and torn >= 1
    wanted = train(job(text, tokens=24_000), lm, tmp_path / "whole")
    for found, trainee in zip(torch.load(tmp_path / "killed" / "final.pt"), wanted, strict=True):
        assert equal(found, bits(trainee))
    assert lines(tmp_path / "killed" / "log.csv") == lines(tmp_path / "whole" / "log.csv")


@pytest.fixture
def stopped(lm: LanguageModel, text: TextSource, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted after 128 tokens."""
    with pytest.raises(TrainingError, match="stopped at 128"):
        train(job(text), lm, tmp_path, hooks=at(128, signal.SIGTERM))
    return tmp_path


def refusal(plan: Job, lm: LanguageModel, folder: Path, *, resume: bool = True) -> str:
    with pytest.raises((TrainingError, UsageError)) as caught:
        train(plan, lm, folder, resume=resume)
    return str(caught.value)


def test_nothing_to_resume(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    message = refusal(job(text), lm, tmp_path)
    assert message == f"nothing to resume: no checkpoint in {tmp_path}; leave --resume out to start"


@pytest.mark.parametrize(
    "changes, listed",
    [
        ({"lr": 0.5}, "lr: 0.01 in the checkpoint, 0.5 now"),
        ({"seed": 8}, "seed: 7 in the checkpoint, 8 now"),
        ({"tokens": 901}, "tokens: 900 in the checkpoint, 901 now"),
        ({"layers": (1,)}, "layers: 0,1 in the checkpoint, 1 now"),
        ({"ghost": "off", "buffer": "fixed"}, "ghost: bug in the checkpoint, off now"),
    ],
)
def test_resuming_another_run(
    lm: LanguageModel, text: TextSource, stopped: Path, changes: dict[str, Any], listed: str
) -> None:
    message = refusal(job(text, **changes), lm, stopped)
    assert message.startswith(f"{only_checkpoint(stopped)} belongs to another run (")
    assert listed in message
    assert message.endswith("; use its settings, or another --out")


def test_resuming_with_another_text(lm: LanguageModel, stopped: Path, tmp_path: Path) -> None:
    other = text_file(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("Another text. " * 50)
    message = refusal(job(other), lm, stopped)
    assert re.search(r"text: file:words.txt \(\w{16}\) in the checkpoint, file:other.txt \(\w{16}\) now", message)


def test_resuming_with_the_same_text_changed(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    mine = text_file(tmp_path / text.name.removeprefix("file:"))
    assert text.path is not None and mine.path is not None
    mine.path.write_text(text.path.read_text())
    with pytest.raises(TrainingError, match="stopped at 128"):
        train(job(mine), lm, tmp_path / "run", hooks=at(128, signal.SIGTERM))
    mine.path.write_text(text.path.read_text() + "more")
    assert "belongs to another run (text: file:words.txt (" in refusal(job(mine), lm, tmp_path / "run")


def only_checkpoint(folder: Path) -> Path:
    (path,) = folder.glob("checkpoint-*")
    return path


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint(lm: LanguageModel, text: TextSource, stopped: Path, keep: float) -> None:
    path = only_checkpoint(stopped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    message = refusal(job(text), lm, stopped)
    assert message.startswith(f"nothing to resume in {stopped}: {path.name} is damaged (")
    assert message.endswith("; leave --resume out to start again") and "\n" not in message


def test_the_checkpoint_before_a_damaged_one(
    lm: LanguageModel, text: TextSource, uninterrupted: list[Bits], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError):
        train(job(text), lm, tmp_path, schedule=often(), hooks=at(560, signal.SIGTERM))
    *_, before, newest = sorted(tmp_path.glob("checkpoint-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    notes: list[str] = []
    for trainee, wanted in zip(
        train(job(text), lm, tmp_path, resume=True, hooks=Hooks(note=notes.append)), uninterrupted, strict=True
    ):
        assert equal(bits(trainee), wanted)
    assert notes[0].startswith(f"{newest.name} is damaged (")
    assert notes[0].endswith(f"using the one before it, {before.name}")


def test_a_budget_below_one_buffer(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    message = refusal(job(text, tokens=255), lm, tmp_path, resume=False)
    assert message == (
        "255 tokens are fewer than the shuffle buffer's 256; give at least as many, or a recipe with a smaller buffer"
    )


def test_text_too_short(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words<|endoftext|>and some more")
    message = refusal(job(text_file(tmp_path / "short.txt")), lm, tmp_path, resume=False)
    assert message == f"file:short.txt holds fewer than the {CALL} tokens of one store call; give more"


def test_a_loss_that_is_not_finite(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    message = refusal(job(text, lr=1e30), lm, tmp_path, resume=False)
    assert message.startswith("layer 0: the loss is ")
    assert message.endswith(" tokens; lower the learning rate")


def test_weights_that_are_not_finite_are_never_saved(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    """The first loss is still finite; the step after it is not, and then the run is asked to stop and save."""
    with pytest.raises(TrainingError, match=r"^layer 0: weights not finite at 24 tokens; lower the learning rate$"):
        train(job(text, lr=1e39), lm, tmp_path, hooks=at(24, signal.SIGINT))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_epochs_are_told(lm: LanguageModel, text: TextSource, tmp_path: Path) -> None:
    notes: list[str] = []
    train(job(text, tokens=2000), lm, tmp_path, hooks=Hooks(note=notes.append))
    ends = [note for note in notes if note.startswith("end of file:words.txt after ")]
    assert [note.split("; ")[1] for note in ends] == [f"epoch {i} begins" for i in range(2, len(ends) + 2)]
    assert len(ends) > 2


@pytest.mark.parametrize("b_dec_init", ["mean", "zero"])
def test_other_starts_of_b_dec(lm: LanguageModel, text: TextSource, tmp_path: Path, b_dec_init: str) -> None:
    (trainee,) = train(job(text, (1,), tokens=256, lr=1e-30, b_dec_init=b_dec_init), lm, tmp_path)
    assert (float(trainee.parameters.b_dec.detach().abs().max()) < 1e-20) == (b_dec_init == "zero")


if __name__ == "__main__":
    if sys.argv[4] == "random":
        killer(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        child(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
