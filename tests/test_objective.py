"""The loss and its gradients against the code of February 2024 (tests/golden/loss_feb2024.*)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from saezoo.registry import read_registry
from saezoo.trainers.objective import Losses, normalise_decoder, ramp, remove_parallel
from saezoo.trainers.trainee import Parameters, Pass, Product, Trainee

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


def trainee(golden: dict[str, Tensor], ghost: Ghost, dtype: torch.dtype, product: Product) -> Trainee:
    parameters = Parameters(*(golden[f"in.{name}"].to(dtype) for name in Parameters._fields))
    recipe = replace(read_registry().recipe("feb2024"), l1_coefficient=0.008, ghost=ghost)
    return Trainee(parameters, recipe, product=product, dense_above=1.0)


def run(
    golden: dict[str, Tensor], ghost: Ghost, dtype: torch.dtype = torch.float64, product: Product = "full"
) -> tuple[Parameters, Pass]:
    """Gradients in the published layout, and the whole pass."""
    done = trainee(golden, ghost, dtype, product).differentiate(golden["in.X"].to(dtype), golden["in.dead_mask"])
    return Parameters(done.gradients.W_enc_FD.T, done.gradients.b_enc_F, done.gradients.W_dec_FD, done.b_dec_D), done


def worst_relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("product", get_args(Product))
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("variant, ghost", VARIANTS)
def test_gradients_are_those_of_2024(
    golden: dict[str, Tensor], variant: str, ghost: Ghost, precision: str, product: Product
) -> None:
    gradients, _ = run(golden, ghost, DTYPES[precision], product)
    tolerance = 1e-10 if precision == "f64" else 2e-3 if variant == "fixed" else 1e-5
    for name, gradient in gradients._asdict().items():
        assert worst_relative(gradient, golden[f"{variant}.{precision}.grad.{name}"]) < tolerance, name
    remove_parallel(gradients.W_dec, golden["in.W_dec"].to(DTYPES[precision]))
    assert worst_relative(gradients.W_dec, golden[f"{variant}.{precision}.grad.W_dec_after_removal"]) < tolerance


@pytest.mark.parametrize("product", get_args(Product))
@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-5), ("f64", 1e-10)])
@pytest.mark.parametrize("variant, ghost", VARIANTS)
def test_losses_are_those_of_2024(
    golden: dict[str, Tensor],
    facts: dict[str, Any],
    variant: str,
    ghost: Ghost,
    precision: str,
    tolerance: float,
    product: Product,
) -> None:
    losses = run(golden, ghost, DTYPES[precision], product)[1].losses
    wanted = facts["scalars"][variant][precision]
    for field, name in zip(Losses._fields, ("loss", "mse_loss", "l1_loss", "ghost_loss"), strict=True):
        assert float(getattr(losses, field)) == pytest.approx(wanted[name], rel=tolerance), field


@pytest.mark.parametrize("product", get_args(Product))
@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-5), ("f64", 1e-10)])
def test_error_and_firing_are_those_of_2024(
    golden: dict[str, Tensor], precision: str, tolerance: float, product: Product
) -> None:
    done = run(golden, "off", DTYPES[precision], product)[1]
    x_hat_BD = done.error_BD + golden["in.X"].to(done.error_BD.dtype)
    assert worst_relative(x_hat_BD, golden[f"out.{precision}.x_hat"]) < tolerance
    assert torch.equal(done.fires_F, (golden[f"out.{precision}.hidden_pre"] > 0).sum(0))


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_ghost_gradients_reach_dead_encoders_only_when_fixed(
    golden: dict[str, Tensor], facts: dict[str, Any], ghost: Ghost
) -> None:
    gradients, done = run(golden, ghost)
    silent_F = golden["in.dead_mask"] & (done.fires_F == 0)
    reached = float(gradients.W_enc[:, silent_F].abs().max())
    wanted = facts["facts"][f"ghost_grad_on_silent_dead_encoder_{'buggy' if ghost == 'bug' else 'fixed'}"]
    assert int(silent_F.sum()) == 21
    assert reached == pytest.approx(wanted, rel=1e-9, abs=0)


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_ghost_gradients_leave_live_encoders_alone_only_when_fixed(
    golden: dict[str, Tensor], facts: dict[str, Any], ghost: Ghost
) -> None:
    extra = run(golden, ghost)[0].W_enc - run(golden, "off")[0].W_enc
    live = float(extra[:, ~golden["in.dead_mask"]].abs().max())
    wanted = facts["facts"][f"ghost_grad_on_live_encoder_{'buggy' if ghost == 'bug' else 'fixed'}"]
    assert live == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_as_run_all_dead_decoder_rows_got_the_same_gradient(golden: dict[str, Tensor]) -> None:
    gradients, done = run(golden, "bug")
    silent_F = golden["in.dead_mask"] & (done.fires_F == 0)
    rows = gradients.W_dec[silent_F]
    assert torch.equal(rows, rows[:1].expand_as(rows)) and bool(rows.any())


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_without_dead_features_there_is_no_ghost_loss(golden: dict[str, Tensor], ghost: Ghost) -> None:
    none_F = torch.zeros_like(golden["in.dead_mask"])
    losses = trainee(golden, ghost, torch.float64, "full").differentiate(golden["in.X"].double(), none_F).losses
    assert float(losses.ghost) == 0
    assert torch.equal(losses.total, run(golden, "off")[1].losses.total)


@pytest.mark.parametrize("ghost", ["bug", "fixed"])
def test_the_ghost_loss_is_about_as_large_as_the_mse(golden: dict[str, Tensor], ghost: Ghost) -> None:
    losses = run(golden, ghost)[1].losses
    assert float(losses.ghost) == pytest.approx(float(losses.mse), rel=1e-3)
    assert float(losses.total) == pytest.approx(float(losses.mse + losses.l1 + losses.ghost), rel=1e-15)


def hand_made(loss: Literal["feb2024", "standard"], product: Product) -> Pass:
    """x = (3, 4) has norm 5; the one feature is 2 and writes (3, 0): x_hat = (6, 0), e = (3, -4)."""
    W_enc, W_dec = torch.tensor([[0.0], [0.5]]), torch.tensor([[3.0, 0.0]])
    recipe = replace(read_registry().recipe("feb2024"), l1_coefficient=0.1, ghost="off", loss=loss)
    one = Trainee(Parameters(W_enc, torch.zeros(1), W_dec, torch.zeros(2)), recipe, product=product, dense_above=1.0)
    return one.differentiate(torch.tensor([[3.0, 4.0]]), torch.zeros(1, dtype=torch.bool))


@pytest.mark.parametrize("product", get_args(Product))
def test_a_hand_made_batch_of_2024(product: Product) -> None:
    done = hand_made("feb2024", product)
    assert float(done.losses.mse) == pytest.approx((9 + 16) / 5 / 2)
    assert float(done.losses.l1) == pytest.approx(0.1 * 2)
    # d mse / d x_hat = 2 e / |x| / D = (0.6, -0.8); times f = 2 for the decoder row
    assert done.gradients.W_dec_FD.tolist() == [pytest.approx([1.2, -1.6])]
    assert float(done.gradients.b_enc_F) == pytest.approx(3 * 0.6 + 0.1)
    assert done.gradients.W_enc_FD.tolist() == [pytest.approx([3 * 1.9, 4 * 1.9])]
    assert done.b_dec_D.tolist() == pytest.approx([0.6, -0.8 - 0.5 * 1.9])


@pytest.mark.parametrize("product", get_args(Product))
def test_a_hand_made_batch_of_today(product: Product) -> None:
    done = hand_made("standard", product)
    assert float(done.losses.mse) == pytest.approx(9 + 16)
    assert float(done.losses.l1) == pytest.approx(0.1 * 2 * 3)
    # d mse / d x_hat = 2 e = (6, -8); the L1 term adds 0.1 f W / |W| = (0.2, 0) to the decoder row
    assert done.gradients.W_dec_FD.tolist() == [pytest.approx([12.2, -16])]
    assert float(done.gradients.b_enc_F) == pytest.approx(3 * 6 + 0.1 * 3)


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
    "step, steps, wanted",
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
def test_ramp(step: int, steps: int, wanted: float) -> None:
    assert ramp(step, steps) == pytest.approx(wanted, rel=1e-15)
