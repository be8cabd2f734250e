"""What a run is said to need, against hand arithmetic and against what a run then leaves."""

from __future__ import annotations

import itertools
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from smallrun import BUFFER, arguments, write_overlay, write_text
from transformers import GPT2Config, GPT2LMHeadModel

from saezoo.cli import main
from saezoo.errors import TrainingError
from saezoo.lm import LanguageModel, load_language_model
from saezoo.ranks import Ranks
from saezoo.registry import package_folder, read_registry
from saezoo.reproduction import Means, plan
from saezoo.tokens import builtin
from saezoo.trainers.plan import _checkpoint, best_product, flops_per_token, memory_of
from saezoo.trainers.train import Hooks, Job, train
from saezoo.workflows import Options

ROWS = {"tokens", "steps", "FLOPs", "matrix-product peak", "memory", "disk", "expected time"}


def gpt2_small() -> LanguageModel:
    """Its shapes; the weights take no memory."""
    with torch.device("meta"):
        model: Any = GPT2LMHeadModel(GPT2Config())
    return LanguageModel(model, SimpleNamespace(all_special_ids=[]))


# In MFLOP. A block, by hand: 4 D^2 weights of attention and 8 D^2 of the MLP are 14.16; scores and averages over a row
# of 128 tokens, half of them masked, 0.2. Layer 10 reads what ten blocks leave: 143.5.
@pytest.mark.parametrize(("layers", "saes", "blocks"), [("0", 1, 0), ("10", 1, 10), ("0,10", 2, 10), ("all", 12, 11)])
def test_flops_of_gpt2_small(layers: str, saes: int, blocks: int) -> None:
    one_sae, one_block = 2 * 768 * 24_576 / 1e6, (2 * 12 * 768**2 + 2 * 128 * 768) / 1e6
    found = flops_per_token(read_registry().find("gpt2-small-res", layers), gpt2_small()) / 1e6
    assert found == pytest.approx(saes * one_sae + blocks * one_block, rel=1e-12)
    assert one_sae == pytest.approx(37.75, rel=1e-4)
    assert 10 * one_block == pytest.approx(144, rel=0.02)
    assert 11 * one_block == pytest.approx(158, rel=0.02)


def job_of(d_sae: int, **changes: Any) -> tuple[Job, LanguageModel]:
    """Two SAEs of the bundled model, a buffer of 8,192 activations and no token more."""
    changes = {"buffer_batches": 4, "store_rows": 16} | changes
    entries = tuple(replace(entry, d_sae=d_sae) for entry in read_registry().find("tiny-res", "1,3"))
    job = Job(entries, replace(entries[0].known_recipe, **changes), builtin("heldout"), 8192, 0)
    return job, load_language_model(package_folder() / "bundled" / "tiny-lm")


def test_the_checkpoints_size_is_that_of_a_real_one(tmp_path: Path) -> None:
    """Of one at a signal, right after a refill of the buffer: nearly a whole half of it is still to be trained on."""
    job, lm = job_of(1024, batch_size=32)
    with pytest.raises(TrainingError, match="stopped at 32 of "):
        train(job, lm, tmp_path, hooks=Hooks(on_step=lambda progress: signal.raise_signal(signal.SIGTERM)))
    (path,) = tmp_path.glob("checkpoint-*")
    assert path.stat().st_size == pytest.approx(_checkpoint(job.entries, job.recipe, lm), rel=0.05)


def tensors_peak(job: Job, lm: LanguageModel, folder: Path) -> int:
    """Most bytes of tensors that a run has at a time, those of the model left out."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        train(job, lm, folder)
    events: Any = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    changes: list[tuple[int, int]] = sorted((event.start_ns(), event.nbytes()) for event in memory)
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize(("d_sae", "batch_size"), [(512, 256), (2048, 4096)])
def test_the_memory_is_more_than_what_a_run_takes_but_not_much(tmp_path: Path, d_sae: int, batch_size: int) -> None:
    """The forward passes and the buffer decide the first, the dense steps the second."""
    job, lm = job_of(d_sae, batch_size=batch_size)
    model = sum(parameter.numel() * 4 for parameter in lm.hf_model.parameters())
    found, wanted = (
        tensors_peak(job, lm, tmp_path),
        memory_of(job.entries, len(job.entries), job.recipe, lm, Ranks()) - model,
    )
    assert 0.6 * wanted < found <= wanted


def test_best_product() -> None:
    """Half precision on a GPU, and on CPUs that multiply bfloat16."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.is_file():
        pytest.skip("what this CPU can do is not written anywhere")
    capable = re.search(r"^flags.* (avx512_bf16|amx_bf16)\b", cpu.read_text(), re.MULTILINE) is not None
    assert best_product(torch.device("cpu")) == ("half" if capable else "full")
    assert best_product(torch.device("cuda")) == "half"
    assert best_product(torch.device("mps")) == "full"


@pytest.fixture
def overlay(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return write_overlay(tmp_path, tiny_model_folder)


def test_a_plan_of_a_small_run(overlay: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    lm = load_language_model(tiny_model_folder)
    options = Options(text=write_text(tmp_path), registry=overlay)
    job, needed = plan("small", "all", tokens=6_400, means=Means(product="full"), options=options)
    assert (job.tokens, needed.tokens, needed.steps, needed.token_cache) == (6_400, 6_400, 100, 12_800)
    assert needed.flops == 6_400 * (2 * 2 * 16 * 48 + 24 * 16**2 + 2 * 16 * 16)  # two SAEs, one block
    assert needed.seconds == needed.lm_seconds + needed.dense_seconds + needed.sparse_seconds
    assert needed.dense_seconds > 0
    assert needed.sparse_seconds == 0  # so short a run has no sparse steps
    assert needed.checkpoints == 2 * _checkpoint(job.entries, job.recipe, lm)
    assert needed.memory == memory_of(job.entries, len(job.entries), job.recipe, lm, Ranks())


def saezoo(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_the_command_prints_every_row_and_starts_nothing(overlay: Path, tmp_path: Path) -> None:
    text, run = write_text(tmp_path), tmp_path / "run"
    before = set(tmp_path.rglob("*"))
    result = saezoo(*arguments(overlay, run, text, "--plan"))
    assert (result.exit_code, result.stderr) == (0, "")
    shown = {line.split("│")[1].strip() for line in result.stdout.splitlines() if "│" in line}
    assert shown - {""} == ROWS
    assert "2,000 of file:text.txt" in result.stdout and "32 of 64 activations" in result.stdout
    assert set(tmp_path.rglob("*")) == before
    assert not run.exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--tokens", BUFFER - 1], 2, "255 tokens are fewer than the shuffle buffer's 256; give at least as many,"),
        (["--recipe", "absent"], 2, "no recipe `absent`; "),
        (["--device", "tpu9"], 2, "device `tpu9` cannot be used here"),
    ],
)
def test_what_cannot_be_planned(overlay: Path, tmp_path: Path, more: list[object], code: int, message: str) -> None:
    result = saezoo(*arguments(overlay, tmp_path / "run", write_text(tmp_path), "--plan", *more))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(f"Error: {message}")
