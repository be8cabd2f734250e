"""`loss: standard`, today's loss with free decoder rows: against the real SAELens, and in training."""

from __future__ import annotations

import csv
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from smallrun import arguments, write_overlay, write_text
from torch import Tensor

from saezoo import load
from saezoo.cli import main
from saezoo.entries import Recipe
from saezoo.registry import read_registry
from saezoo.trainers.trainee import Parameters, Product, Trainee

B, D, F = 64, 16, 48
STANDARD: dict[str, Any] = {"loss": "standard", "ghost": "off", "l1_coefficient": 0.01, "encoder_init": "decoder"}


def recipe(**changes: Any) -> Recipe:
    return replace(read_registry().recipe("standard"), **{"l1_coefficient": 0.3, "l1_warmup_steps": 0, **changes})


def random_parameters(dtype: torch.dtype) -> Parameters:
    """Decoder rows of norms about 2 to 6."""
    random = torch.Generator().manual_seed(0)
    shapes = ((D, F), (F,), (F, D), (D,))
    return Parameters(*(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes))


def batch(dtype: torch.dtype) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def of_saelens(
    parameters: Parameters, x_BD: Tensor, l1_coefficient: float
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and gradients by the names of the parameters, of SAELens' own forward pass and autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        config = StandardTrainingSAEConfig(d_in=D, d_sae=F, dtype=str(x_BD.dtype).removeprefix("torch."))
        sae: Any = StandardTrainingSAE(config)
    sae.load_state_dict(parameters._asdict())
    step_input = TrainStepInput(x_BD, {"l1": l1_coefficient}, None, n_training_steps=0, is_logging_step=False)
    output = sae.training_forward_pass(step_input)
    output.loss.backward()
    losses = {name: loss.item() for name, loss in output.losses.items()} | {"loss": output.loss.item()}
    return losses, {name: parameter.grad for name, parameter in sae.named_parameters()}


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae_lens is not installed")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("product", ["dense", "full", "half"])
def test_gradients_are_those_of_saelens(product: Product, dtype: torch.dtype, tolerance: float) -> None:
    parameters, x_BD = random_parameters(dtype), batch(dtype)
    losses, wanted = of_saelens(parameters, x_BD, 0.3)
    trainee = Trainee(parameters, recipe(), product=product, dense_above=1.0)
    trainee.density = 0.5  # so that `full` and `half` take the pairs
    found = trainee.differentiate(x_BD, torch.zeros(F, dtype=torch.bool))
    for mine, theirs in zip(found.losses[:3], ("loss", "mse_loss", "l1_loss"), strict=True):
        assert float(mine) == pytest.approx(losses[theirs], rel=tolerance)
    W_enc_FD, b_enc_F, W_dec_FD = found.gradients
    gradients = {"W_enc": W_enc_FD.T, "b_enc": b_enc_F, "W_dec": W_dec_FD, "b_dec": found.b_dec_D}
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).abs().max() / wanted[name].abs().max()) < tolerance, name


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 400), (199, 200 / 400), (200, 201 / 400), (399, 1), (10**6, 1)])
def test_the_l1_coefficient_warms_up(step: int, factor: float) -> None:
    """Linearly: the first step has 1/n of it, the n-th all."""
    x_BD, dead_F = batch(torch.float64), torch.zeros(F, dtype=torch.bool)
    trainee = Trainee(random_parameters(torch.float64), recipe(l1_warmup_steps=400))
    trainee.steps = 10**6
    whole = trainee.differentiate(x_BD, dead_F)
    trainee.steps = step
    found = trainee.differentiate(x_BD, dead_F)
    assert float(found.losses.l1 / whole.losses.l1) == pytest.approx(factor, rel=1e-12)
    assert torch.equal(found.losses.mse, whole.losses.mse)
    assert torch.equal(found.gradients.b_enc_F, whole.gradients.b_enc_F) == (factor == 1)


def test_each_step_has_its_own_coefficient() -> None:
    """Weights that stay as they are, for the rate is next to nothing."""
    trainee = Trainee(random_parameters(torch.float64), recipe(l1_warmup_steps=4, lr=1e-30, lr_warmup_steps=0))
    found = [float(trainee.step(batch(torch.float64)).losses.l1) for _ in range(6)]
    assert [l1 / found[-1] for l1 in found] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-12)


def test_decoder_rows_are_free() -> None:
    """And a step keeps the gradient's part along the row, which is what L1 then shrinks it by."""
    trainee = Trainee(random_parameters(torch.float32), recipe(lr=1e-2, lr_warmup_steps=0))
    before = trainee.parameters.W_dec.norm(dim=1)
    for _ in range(20):
        trainee.step(batch(torch.float32))
    after = trainee.parameters.W_dec.norm(dim=1)
    assert float((before - 1).abs().min()) > 0.1
    assert float((after - 1).abs().min()) > 0.01
    assert not torch.allclose(before, after, rtol=0.01)


def losses_in(folder: Path) -> list[float]:
    with (folder / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["layer"] == "1"]


def test_a_whole_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    """It learns; the SAE is saved with its rows as they are, measured, and used by its overlay."""
    overlay, run = write_overlay(tmp_path, tiny_model_folder, **STANDARD), tmp_path / "run"
    words = arguments(overlay, run, write_text(tmp_path), "--tokens", 20_000)
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    losses = losses_in(run)
    assert losses[-1] < 0.7 * losses[0]
    sae = load("small-rerun", 1, registry=run / "registry.yaml")
    assert float((sae.W_dec.norm(dim=1) - 1).abs().max()) > 0.1
    assert read_registry(run / "registry.yaml").find("small-rerun", 1)[0].known_recipe.loss == "standard"
    with (run / "eval.csv").open(newline="") as file:
        assert all(float(row["explained_variance"]) > 0.5 for row in csv.DictReader(file))
