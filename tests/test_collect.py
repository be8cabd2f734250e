"""The pass over the text: every firing and every sum, against the SAE run by hand; stopped, killed and divided."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_compare import F, random_sae

from saezoo import checkpoint
from saezoo.errors import SaezooError, TextError, TrainingError, UsageError
from saezoo.evals import Subject, evaluate
from saezoo.evals.metrics import OF_RECONSTRUCTION
from saezoo.features.collect import Collection, collect
from saezoo.lm import LanguageModel, load_language_model
from saezoo.tokens import Rows

N_ROWS, CONTEXT, BOS = 30, 20, 256


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Random tokens; BOS begins each row and is in the middle of the third."""
    tokens_RT = torch.randint(0, 256, (N_ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens_RT[:, 0] = tokens_RT[2, 9] = BOS
    return Rows(tokens_RT.numpy(), np.arange(N_ROWS)[:, None].repeat(CONTEXT, 1))


SUBJECTS = [
    Subject(random_sae(0).double(), "tiny", "1"),
    Subject(random_sae(1, hook="blocks.0.hook_resid_pre").double(), "tiny", "0"),
]


def run(lm: LanguageModel, rows: Rows, root: Path, **options: Any) -> Collection:
    found = collect(SUBJECTS, lm, rows, root, **({"batch_size": 4, "correlate": True} | options))
    assert found is not None
    return found


class ByHand(NamedTuple):
    """Features [R, T, F], 0 on special tokens, and what the SAE reads of the others [n, D]."""

    f_RTF: torch.Tensor
    x_nD: torch.Tensor


def by_hand(lm: LanguageModel, rows: Rows, i: int) -> ByHand:
    sae = SUBJECTS[i].sae
    depth = int(str(sae.config.hook).split(".")[1])
    tokens_RT = torch.from_numpy(rows.tokens_RT)
    resid_RTD = lm.residuals(tokens_RT, [depth])[depth]
    scored_RT = tokens_RT != BOS
    x_RTD = resid_RTD - resid_RTD.mean(-1, keepdim=True)
    return ByHand(sae.encode(resid_RTD) * scored_RT[..., None], x_RTD[scored_RT])


@pytest.fixture
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each batch, not only after 20 seconds."""
    monkeypatch.setattr("saezoo.checkpoint.Schedule.due", lambda self: True)
    yield


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_every_firing_and_sum(lm: LanguageModel, rows: Rows, tmp_path: Path, batch_size: int, i: int) -> None:
    found = run(lm, rows, tmp_path, batch_size=batch_size)
    f_RTF, x_nD = by_hand(lm, rows, i)
    f_MF = f_RTF.flatten(0, 1)
    assert found.tokens == N_ROWS * (CONTEXT - 1) - 1 == len(x_nD)
    for feature, firings in enumerate(found.events[i].block(0, F)):
        assert np.array_equal(firings.token_N, f_MF[:, feature].nonzero().squeeze(1).numpy())
        assert np.allclose(firings.value_N, f_MF[firings.token_N, feature].numpy(), rtol=1e-6)
    sums = found.sums[i]
    f_nF = f_RTF[torch.from_numpy(rows.tokens_RT) != BOS]
    assert torch.allclose(sums.fx_sum_FD, f_nF.T @ x_nD, rtol=1e-12)
    assert torch.allclose(sums.x2_sum_D, x_nD.square().sum(0), rtol=1e-12)
    assert torch.allclose(sums.x_sum_ND.sum(0), x_nD.sum(0), rtol=1e-9, atol=1e-12)
    assert torch.equal(sums.fires_GF.sum(0), (f_nF > 0).sum(0).double())


def test_metrics_are_those_of_the_evaluation(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    found = run(lm, rows, tmp_path)
    for result, sums in zip(evaluate(SUBJECTS, lm, rows, batch_size=4), found.sums, strict=True):
        metrics = sums.metrics(0)
        assert {metric.name for metric in OF_RECONSTRUCTION} < set(metrics)
        assert metrics == {name: result.metrics[name] for name in metrics}


def test_the_folder_goes_when_everything_is_made(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    found = run(lm, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    found.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("saved_at_once")
@pytest.mark.parametrize("stopped_at", [80, 160, 400, 560])
def test_resuming_gives_the_same_bits(lm: LanguageModel, rows: Rows, tmp_path: Path, stopped_at: int) -> None:
    wanted = run(lm, rows, tmp_path / "whole")

    def stop(done: int) -> None:
        if done >= stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(SaezooError) as caught:
        run(lm, rows, tmp_path / "stopped", on_progress=stop)
    kept = stopped_at - 80  # the batch that was just done is not saved yet
    words = f"{kept} tokens are done and saved, the same command with --resume goes on from there"
    assert str(caught.value) == f"stopped; {words if kept else 'nothing was saved yet'}"
    if kept:
        assert_same(run(lm, rows, tmp_path / "stopped", resume=True), wanted)


def assert_same(found: Collection, wanted: Collection) -> None:
    for i, sums in enumerate(found.sums):
        theirs = wanted.sums[i].everything()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in sums.everything().items())
        pairs = zip(found.events[i].block(0, F), wanted.events[i].block(0, F), strict=True)
        assert all(np.array_equal(a.token_N, b.token_N) and np.array_equal(a.value_N, b.value_N) for a, b in pairs)


@pytest.mark.usefixtures("saved_at_once")
def test_parts_written_after_the_last_checkpoint_are_written_again(
    lm: LanguageModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two: the firings are on the disk, the sums are not."""
    wanted = run(lm, rows, tmp_path / "whole")
    real = checkpoint.save

    def save(folder: Path, done: int, *rest: Any) -> Any:
        if done >= 12:
            raise KeyboardInterrupt
        return real(folder, done, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(SaezooError, match="stopped; 160 tokens are done"):
        run(lm, rows, tmp_path / "stopped")
    monkeypatch.setattr(checkpoint, "save", real)
    assert_same(run(lm, rows, tmp_path / "stopped", resume=True), wanted)


def test_nothing_to_resume(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    run(lm, rows, tmp_path)
    with pytest.raises(TrainingError) as caught:
        run(lm, rows, tmp_path, resume=True, seed=1)
    assert str(caught.value) == (
        "nothing to resume: no pass with just these settings was interrupted; leave --resume out"
    )


def test_a_disk_too_small_is_seen_after_one_batch(
    lm: LanguageModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SaezooError) as caught:
        run(lm, rows, tmp_path, on_progress=done.append)
    assert str(caught.value) == (
        f"the firings need about 0.0 GB in {tmp_path}, where 0.0 GB are free; fewer --tokens,"
        " or SAEZOO_CACHE in a larger place"
    )
    assert done == [80]


def test_special_tokens_only(lm: LanguageModel, tmp_path: Path) -> None:
    rows = Rows(np.full((2, 5), BOS), np.zeros((2, 5), dtype=np.int64))
    with pytest.raises(TextError, match="the text holds special tokens only; give one with text in it"):
        run(lm, rows, tmp_path)


def test_rows_longer_than_the_model(lm: LanguageModel, tmp_path: Path) -> None:
    rows = Rows(np.zeros((2, 65), dtype=np.int64), np.zeros((2, 65), dtype=np.int64))
    with pytest.raises(UsageError, match="rows of 65 tokens: the model has 64 positions"):
        run(lm, rows, tmp_path)


def test_what_is_not_finite_is_refused(lm: LanguageModel, rows: Rows, tmp_path: Path) -> None:
    sae = random_sae(3)
    sae.W_dec.data[5, 5] = torch.inf
    with pytest.raises(SaezooError, match="W_dec of SAE 7 holds values that are not finite"):
        collect([Subject(sae, "tiny", "7")], lm, rows, tmp_path)
