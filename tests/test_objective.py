"""The loss and its gradients against the code of February 2024 (tests/golden/loss_feb2024.*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from saezoo.trainers.objective import (
    Losses,
    Outputs,
    Parameters,
    forward,
    learning_rate,
    normalise_decoder,
    remove_parallel,
)

Ghost = Literal["off", "bug", "fixed"]

GOLDEN = Path(__file__).parent / "golden"
VARIANTS: list[tuple[str, Ghost]] = [("off", "off"), ("buggy", "bug"), ("fixed", "fixed")]
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "loss_feb2024.safetensors")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "loss_feb2024.json").read_text())
    return found


def run(golden: dict[str, Tensor], ghost: Ghost, dtype: torch.dtype = torch.float64) -> tuple[Parameters, Outputs]:
    """Parameters with their gradients, and the forward pass that gave them."""
    names = Parameters._fields
    parameters = Parameters(*(golden[f"in.{name}"].to(dtype, copy=True).requires_grad_() for name in names))
    dead_F = golden["in.dead_mask"]
    out = forward(parameters, golden["in.X"].to(dtype), l1_coefficient=0.008, ghost=ghost, dead_F=dead_F)
    out.losses.total.backward()  # type: ignore[no-untyped-call]
    return parameters, out._replace(losses=Losses(*(loss.detach() for loss in out.losses)))


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def worst_relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("variant, ghost", VARIANTS)
def test_gradients_are_those_of_2024(golden: dict[str, Tensor], variant: str, ghost: Ghost, precision: str) -> None:
    parameters, _ = run(golden, ghost, DTYPES[precision])
    tolerance = 1e-10 if precision == "f64" else 2e-3 if variant == "fixed" else 1e-5
    for name, parameter in parameters._asdict().items():
        assert worst_relative(grad(parameter), golden[f"{variant}.{precision}.grad.{name}"]) < tolerance, name
    remove_parallel(grad(parameters.W_dec), parameters.W_dec)
    wanted = golden[f"{variant}.{precision}.grad.W_dec_after_removal"]
    assert worst_relative(grad(parameters.W_dec), wanted) < tolerance


@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-5), ("f64", 1e-10)])
@pytest.mark.parametrize("variant, ghost", VARIANTS)
def test_losses_are_those_of_2024(
    golden: dict[str, Tensor], facts: dict[str, Any], variant: str, ghost: Ghost, precision: str, tolerance: float
) -> None:
    losses = run(golden, ghost, DTYPES[precision])[1].losses
    wanted = facts["scalars"][variant][precision]
    for field, name in zip(Losses._fields, ("loss", "mse_loss", "l1_loss", "ghost_loss"), strict=True):
        assert float(getattr(losses, field)) == pytest.approx(wanted[name], rel=tolerance), field


@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-5), ("f64", 1e-10)])
def test_activations_and_error_are_those_of_2024(golden: dict[str, Tensor], precision: str, tolerance: float) -> None:
    out = run(golden, "off", DTYPES[precision])[1]
    x_hat_BD = out.error_BD + golden["in.X"].to(out.error_BD.dtype)
    assert worst_relative(out.f_BF, golden[f"out.{precision}.feature_acts"]) < tolerance
    assert worst_relative(x_hat_BD, golden[f"out.{precision}.x_hat"]) < tolerance
    assert torch.equal(out.f_BF > 0, golden[f"out.{precision}.hidden_pre"] > 0)


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_ghost_gradients_reach_dead_encoders_only_when_fixed(
    golden: dict[str, Tensor], facts: dict[str, Any], ghost: Ghost
) -> None:
    with_ghosts, out = run(golden, ghost)
    silent_F = golden["in.dead_mask"] & (out.f_BF == 0).all(0)
    reached = float(grad(with_ghosts.W_enc)[:, silent_F].abs().max())
    wanted = facts["facts"][f"ghost_grad_on_silent_dead_encoder_{'buggy' if ghost == 'bug' else 'fixed'}"]
    assert int(silent_F.sum()) == 21
    assert reached == pytest.approx(wanted, rel=1e-9, abs=0)


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_ghost_gradients_leave_live_encoders_alone_only_when_fixed(
    golden: dict[str, Tensor], facts: dict[str, Any], ghost: Ghost
) -> None:
    extra = grad(run(golden, ghost)[0].W_enc) - grad(run(golden, "off")[0].W_enc)
    live = float(extra[:, ~golden["in.dead_mask"]].abs().max())
    wanted = facts["facts"][f"ghost_grad_on_live_encoder_{'buggy' if ghost == 'bug' else 'fixed'}"]
    assert live == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_as_run_all_dead_decoder_rows_got_the_same_gradient(golden: dict[str, Tensor]) -> None:
    parameters, out = run(golden, "bug")
    silent_F = golden["in.dead_mask"] & (out.f_BF == 0).all(0)
    rows = grad(parameters.W_dec)[silent_F]
    assert torch.equal(rows, rows[:1].expand_as(rows)) and bool(rows.any())


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_without_dead_features_there_is_no_ghost_loss(golden: dict[str, Tensor], ghost: Ghost) -> None:
    parameters, out = run(golden, "off")
    none_F = torch.zeros_like(golden["in.dead_mask"])
    for dead_F in (none_F, None):
        again = forward(parameters, golden["in.X"].double(), l1_coefficient=0.008, ghost=ghost, dead_F=dead_F)
        assert float(again.losses.ghost) == 0
        assert torch.equal(again.losses.total, out.losses.total)


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_the_ghost_loss_is_about_as_large_as_the_mse(golden: dict[str, Tensor], ghost: Ghost) -> None:
    losses = run(golden, ghost)[1].losses
    assert float(losses.ghost) == pytest.approx(float(losses.mse), rel=1e-3)
    assert float(losses.total) == pytest.approx(float(losses.mse + losses.l1 + losses.ghost), rel=1e-15)


def test_mse_and_l1_of_a_hand_made_batch() -> None:
    """x = (3, 4) has norm 5; the one feature is 2 and writes (1, 0): e = (-1, -4)."""
    parameters = Parameters(torch.tensor([[0.0], [0.5]]), torch.zeros(1), torch.tensor([[1.0, 0.0]]), torch.zeros(2))
    losses = forward(parameters, torch.tensor([[3.0, 4.0]]), l1_coefficient=0.1).losses
    assert float(losses.mse) == pytest.approx((1 + 16) / 5 / 2)
    assert float(losses.l1) == pytest.approx(0.1 * 2)


def gaussian(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


shapes = st.tuples(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None)
@given(shapes, st.floats(1e-3, 1e3))
def test_normalise_decoder_keeps_directions(shape: tuple[int, int, int], scale: float) -> None:
    before = gaussian(*shape) * scale
    after = before.clone()
    normalise_decoder(after)
    torch.testing.assert_close(after.norm(dim=1), torch.ones(len(after), dtype=torch.float64))
    torch.testing.assert_close((after * before).sum(1), before.norm(dim=1))


@settings(deadline=None)
@given(shapes)
def test_remove_parallel_leaves_the_orthogonal_part(shape: tuple[int, int, int]) -> None:
    seed, rows, columns = shape
    W_dec, gradient = gaussian(*shape), gaussian(seed + 1, rows, columns)
    normalise_decoder(W_dec)
    removed = gradient.clone()
    remove_parallel(removed, W_dec)
    torch.testing.assert_close((removed * W_dec).sum(1), torch.zeros(rows, dtype=torch.float64), atol=1e-12, rtol=0)
    along = (gradient * W_dec).sum(1, keepdim=True) * W_dec
    torch.testing.assert_close(removed + along, gradient)
    again = removed.clone()
    remove_parallel(again, W_dec)
    torch.testing.assert_close(again, removed)


@pytest.mark.parametrize(
    "step, warmup_steps, wanted",
    [
        (0, 0, 1.0),  # the run of 2024 had no warm-up at all
        (10**6, 0, 1.0),
        (0, 10, 0.1),
        (4, 10, 0.5),
        (9, 10, 1.0),
        (10, 10, 1.0),
        (10**6, 10, 1.0),
    ],
)
def test_learning_rate(step: int, warmup_steps: int, wanted: float) -> None:
    assert learning_rate(step, lr=4e-4, warmup_steps=warmup_steps) == pytest.approx(4e-4 * wanted, rel=1e-15)
