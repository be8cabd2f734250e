"""The recipe's `input_scale`: what is trained on scaled activations, and what is saved for those that are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_resampling import RECIPE
from test_train import entry

from saezoo.entries import Recipe
from saezoo.reproduction import trained
from saezoo.trainers.train import new_trainee

SCALE = 3.0


@pytest.fixture
def x_BD() -> torch.Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) + 0.5


def recipe(**changes: object) -> Recipe:
    return dataclasses.replace(Recipe(**RECIPE), **changes)  # type: ignore[arg-type]


def test_the_saved_sae_reads_activations_as_they_are(x_BD: torch.Tensor) -> None:
    """f(c x) = c f'(x) and x_hat(c x) = c x_hat'(x), f' and x_hat' those of the SAE that is saved."""
    one = dataclasses.replace(entry(0), d_in=16)
    trainee = new_trainee(one, recipe(input_scale=SCALE), "full", x_BD.mean(0) * SCALE)
    for _ in range(20):
        trainee.step(SCALE * x_BD)
    weights = trainee.parameters
    pre_BF = (SCALE * x_BD - weights.b_dec) @ weights.W_enc + weights.b_enc
    sae = trained(dataclasses.replace(one, centre=False), trainee)
    torch.testing.assert_close(SCALE * sae.encode(x_BD), pre_BF.relu(), rtol=1e-4, atol=1e-4)
    x_hat_BD = pre_BF.relu() @ weights.W_dec + weights.b_dec
    torch.testing.assert_close(SCALE * sae(x_BD), x_hat_BD, rtol=1e-4, atol=1e-4)


def test_the_loss_of_february_2024_is_of_degree_one_in_the_activations(x_BD: torch.Tensor) -> None:
    """With biases scaled alike, both terms are c times as large: the balance of error and L1 does not see the norm."""
    found = []
    for scale in (1.0, SCALE):
        trainee = new_trainee(dataclasses.replace(entry(0), d_in=16), recipe(ghost="off"), "full", scale * x_BD.mean(0))
        found.append(trainee.step(scale * x_BD).losses)
    for name in ("mse", "l1"):
        assert float(getattr(found[1], name)) == pytest.approx(SCALE * float(getattr(found[0], name)), rel=1e-5)
    assert float(found[0].l1) > 0
