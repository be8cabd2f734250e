"""Steps that do not wait for the GPU are `Trainee`'s steps, whatever happens on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from test_kernels import DEVICE  # first: it makes Triton interpret where there is no GPU
from torch import Tensor

from saezoo.entries import Recipe
from saezoo.registry import read_registry
from saezoo.trainers import fused, updates
from saezoo.trainers.fused import FusedTrainee
from saezoo.trainers.trainee import Parameters, State, StepLog, Trainee

Mode = Literal["off", "bug", "fixed", "standard"]
MODES: tuple[Mode, ...] = ("off", "bug", "fixed", "standard")
GOLDEN = Path(__file__).parent / "golden"
D, F = 4, 16
GPU_ONLY = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small batches have whole blocks, and storage can be small."""
    monkeypatch.setattr(updates, "BLOCK", 8)


def recipe(mode: Mode = "off", **changes: Any) -> Recipe:
    chosen: dict[str, Any] = {"lr": 0.05, "l1_coefficient": 0.01, "dead_after_steps": 3, "sampling_window_steps": 4}
    chosen |= {"lr_warmup_steps": 3, "l1_warmup_steps": 2, "ghost": "off" if mode == "standard" else mode}
    chosen |= {"loss": "standard" if mode == "standard" else "feb2024"}
    return dataclasses.replace(read_registry().recipe("feb2024"), **{**chosen, **changes})


def start() -> Parameters:
    """Every fourth feature is off, more or less firmly."""
    random = torch.Generator().manual_seed(0)
    b_enc = torch.full((F,), -0.3)
    b_enc[::4] = torch.linspace(-9, -2, F // 4)
    tensors = (torch.randn(D, F, generator=random) / 2, b_enc, torch.randn(F, D, generator=random), torch.zeros(D))
    return Parameters(*(tensor.to(DEVICE) for tensor in tensors))


def batches(*scales: float, size: int = 5) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(size, D, generator=random) * scale).to(DEVICE) for scale in scales]


def pair(mode: Mode = "off", *, dense_above: float = 1.0, **changes: Any) -> tuple[FusedTrainee, Trainee]:
    chosen = recipe(mode, **changes)
    return FusedTrainee(start(), chosen, dense_above=dense_above), Trainee(start(), chosen, product="dense")


def same(found: Trainee, wanted: Trainee) -> None:
    """In everything that the next step depends on, and the counters exactly. Fixed ghosts amplify rounding errors."""
    mine, theirs = found.state(), wanted.state()
    tolerance = 1e-3 if found.recipe.ghost == "fixed" else 1e-5
    assert {**mine.facts, "fused": 0} == {**theirs.facts, "fused": 0}
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, tensor in mine.tensors.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, theirs.tensors[name]), name
        else:
            scale = max(float(theirs.tensors[name].abs().max()), 1e-30)
            torch.testing.assert_close(tensor / scale, theirs.tensors[name] / scale, rtol=0, atol=tolerance)


def same_log(found: StepLog, wanted: StepLog, l0_tolerance: float = 1e-6) -> None:
    assert int(found.dead) == int(wanted.dead)
    assert float(found.l0) == pytest.approx(float(wanted.l0), rel=l0_tolerance)
    torch.testing.assert_close(torch.stack(found.losses), torch.stack(wanted.losses), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[3], wanted[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_those_of_trainee(mode: Mode) -> None:
    """Features are dead from the fifth step on, and the eighth batch wakes some of them."""
    mine, theirs = pair(mode)
    dead = []
    for x_BD in batches(1, 1, 1, 1, 1, 1, 1, 8, 1):
        log, wanted = mine.step(x_BD), theirs.step(x_BD)
        assert not mine.settle()
        same_log(log, wanted)
        dead.append(int(wanted.dead))
    assert dead[3] == 0 < dead[4] and dead[8] < dead[7]
    same(mine, theirs)


def test_a_feature_that_may_be_dead_but_is_not_changes_no_bit() -> None:
    """Rows for dead features that stay empty: 0 / 0 must not come of it."""
    results = []
    for mode in MODES[:3]:
        trainee, _ = pair(mode, dead_after_steps=fused.LAG - 1)
        logs = [trainee.step(x_BD) for x_BD in batches(1, 1)]
        results.append([*trainee.state().tensors.values(), *(torch.stack(log.losses) for log in logs)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_step_101_is_that_of_2024_with_its_ghosts(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(GOLDEN / "train_feb2024.safetensors", device=str(DEVICE))
    monkeypatch.setattr(updates, "BLOCK", 128)
    begin = Parameters(*(golden["in.b_dec_init" if name == "b_dec" else f"in.{name}"] for name in Parameters._fields))
    sizes = {"lr": 0.002, "l1_coefficient": 0.012, "dead_after_steps": 20, "sampling_window_steps": 50}
    chosen = recipe("bug", **sizes, lr_warmup_steps=0, l1_warmup_steps=0)
    trainee = FusedTrainee(begin, chosen, dense_above=1.0)
    prefix, tensors = "buggy.f64.step100", trainee.state().tensors
    for name in Parameters._fields:
        names = {name: f"{prefix}.{name}"}
        names |= {f"{name}.{kind}": f"{prefix}.adam_{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq")}
        for mine, theirs in names.items():
            tensors[mine] = golden[theirs].T if name == "W_enc" else golden[theirs]
    tensors["since_fired"] = golden["buggy.f64.steps_since_fired"][99]
    facts = Trainee.state(trainee).facts
    trainee.restore(State(tensors, {**facts, "steps": 100}))
    assert int(trainee.step(golden["in.X"][100]).dead) > 0
    wanted = Parameters(*(golden[f"buggy.f64.step101.{name}"].float() for name in Parameters._fields))
    assert worst_relative(trainee.parameters, wanted) < 1e-4
    assert torch.equal(trainee.since_fired_F, golden["buggy.f64.steps_since_fired"][100].long())


def worst_relative(found: Parameters, wanted: Parameters) -> float:
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


BURST = (0.2, 0.3, 0.3, 40, 0.3, 0.3, 0.3)
"""A batch with more pairs than there is storage for, after a quiet start, the first step of which is dense."""


@pytest.mark.parametrize("settled_after", [4, 6, 7])
@pytest.mark.parametrize("mode", ["fixed", "standard"])
def test_overflow_freezes_and_the_frozen_steps_are_taken_again(mode: Mode, settled_after: int) -> None:
    """The fourth step freezes, at whose start a window closes."""
    mine, theirs = pair(mode, dense_above=0.5, l1_coefficient=1e-4, dead_after_steps=4, sampling_window_steps=4)
    logs: dict[int, StepLog] = {}
    for step, x_BD in enumerate(batches(*BURST), start=1):
        logs[step], wanted = mine.step(x_BD), theirs.step(x_BD)
        if step == settled_after:
            again = mine.settle()
            assert set(again) == set(range(4, step + 1))
            same_log(again[step], wanted)
            assert not mine.settle()
    same(mine, theirs)


def test_nothing_changes_on_the_device_while_frozen() -> None:
    mine, _ = pair("fixed", dense_above=0.5, dead_after_steps=4, sampling_window_steps=100)
    quiet, _, burst, after = batches(0.2, 0.2, 40, 0.2)
    mine.step(quiet)
    mine.step(quiet)
    before = {name: tensor.clone() for name, tensor in Trainee.state(mine).tensors.items()}
    mine.step(burst)
    mine.step(after)
    # `Trainee.state` does not wait.
    assert all(torch.equal(tensor, before[name]) for name, tensor in Trainee.state(mine).tensors.items())
    assert set(mine.settle()) == {3, 4}
    assert not all(torch.equal(tensor, before[name]) for name, tensor in Trainee.state(mine).tensors.items())


@pytest.mark.parametrize("settled_after", [4, 5])
def test_when_the_host_learns_of_it_changes_no_bit(settled_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow in the third step, noticed in the sixth or before."""
    monkeypatch.setattr(fused, "LAG", 3)
    results = []
    for settles in (False, True):
        mine, _ = pair("fixed", dense_above=0.5, dead_after_steps=4, sampling_window_steps=100)
        for step, x_BD in enumerate(batches(0.2, 0.3, 40, 0.3, 0.3, 0.3, 0.3), start=1):
            mine.step(x_BD)
            if settles and step == settled_after:
                mine.settle()
                saved = copied(mine.state())
                mine = pair("fixed", dense_above=0.5, dead_after_steps=4, sampling_window_steps=100)[0]
                mine.restore(saved)
        results.append(mine.state())
    assert results[0].facts == results[1].facts
    assert all(torch.equal(tensor, results[1].tensors[name]) for name, tensor in results[0].tensors.items())


def test_storage_grows_with_what_was_nominated_and_shrinks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LAG", 1)
    mine, _ = pair("off", dense_above=0.9, sampling_window_steps=100)
    sizes = []
    for x_BD in batches(0.3, 0.3, 2, 2, 2, 0.3, 0.3, 0.3):
        mine.step(x_BD)
        sizes.append(len(mine._pairs.key_N) if mine._pairs else 0)
    assert sizes[0] == 0 and sizes[1] < sizes[4] > sizes[-1]


@pytest.mark.parametrize("mode", ["fixed", "standard"])
def test_dense_and_sparse_steps_alternate(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LAG", 1)
    mine, theirs = pair(mode, dense_above=0.3)
    ways = []
    for x_BD in batches(1, 1, 20, 20, 0.2, 0.2, 1):
        mine.step(x_BD)
        theirs.step(x_BD)
        ways.append("dense" if mine._scaled_FK is None else "sparse")
    assert ways[0] == "dense" and "dense sparse" in " ".join(ways) and "sparse dense" in " ".join(ways)
    same(mine, theirs)


def test_one_goes_on_where_the_other_stopped() -> None:
    x = batches(1, 1, 1, 1, 1, 1)
    mine, theirs = pair("bug")
    for x_BD in x[:3]:
        mine.step(x_BD)
        theirs.step(x_BD)
    of_mine, of_theirs = pair("bug")[::-1]
    of_mine.restore(copied(mine.state()))
    of_theirs.restore(copied(theirs.state()))
    for x_BD in x[3:]:
        for trainee in (mine, theirs, of_mine, of_theirs):
            trainee.step(x_BD)
    for trainee in (mine, of_mine, of_theirs):
        same(trainee, theirs)


def copied(state: State) -> State:
    return State({name: tensor.clone() for name, tensor in state.tensors.items()}, dict(state.facts))


def test_same_start_same_bits_also_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the ways alternate, by the density of two steps before."""
    monkeypatch.setattr(fused, "LAG", 2)
    first, second, third = (pair("bug", dense_above=0.4)[0] for _ in range(3))
    x = batches(1, 1, 1, 20, 1, 1, 1)
    for x_BD in x:
        first.step(x_BD)
    for x_BD in x[:4]:
        second.step(x_BD)
    third.restore(copied(second.state()))
    for x_BD in x[4:]:
        third.step(x_BD)
    mine, theirs = first.state(), third.state()
    assert mine.facts == theirs.facts
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def test_batches_of_different_sizes() -> None:
    mine, theirs = pair("fixed")
    for x_BD in [*batches(1, 1), *batches(1, size=3), *batches(1, 1, size=7)]:
        mine.step(x_BD)
        theirs.step(x_BD)
    same(mine, theirs)


def test_only_float32() -> None:
    with pytest.raises(ValueError, match="float32, not torch.float64; use Trainee"):
        FusedTrainee(Parameters(*(tensor.double() for tensor in start())), recipe())


@GPU_ONLY
@pytest.mark.parametrize("mode", MODES)
def test_the_host_does_not_wait(mode: Mode) -> None:
    """PyTorch raises an error at whatever would; windows are long, and no feature is new."""
    trainee, _ = pair(mode, sampling_window_steps=1000)
    x = batches(*[1] * 12)
    for x_BD in x[:6]:
        trainee.step(x_BD)
    trainee.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x_BD in x[6:]:
            trainee.step(x_BD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not trainee.settle()


@GPU_ONLY
@pytest.mark.parametrize("mode", MODES)
def test_at_full_size(mode: Mode) -> None:
    """But for a few pairs on the edge of firing, where rounding decides, and Adam makes much of little gradients."""
    random = torch.Generator().manual_seed(0)
    W_dec, x = torch.randn(24_576, 768, generator=random), torch.randn(5, 4096, 768, generator=random)
    begin = (W_dec.T.clone() / 768**0.5, torch.full((24_576,), -2.6), W_dec, torch.zeros(768))
    parameters, chosen = Parameters(*(tensor.to(DEVICE) for tensor in begin)), recipe(mode, lr=1e-4)
    mine, theirs = FusedTrainee(parameters, chosen), Trainee(parameters, chosen, product="dense")
    for x_BD in x.to(DEVICE):
        same_log(mine.step(x_BD), theirs.step(x_BD), l0_tolerance=1e-4)
    assert not mine.settle() and 0 < mine.density < 0.02
    for found, wanted in zip(mine.parameters, theirs.parameters, strict=True):
        assert float(((found - wanted).abs() > 0.1 * chosen.lr).float().mean()) < 2e-3
