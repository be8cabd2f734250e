"""Resampling of dead features: a case computed by hand, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saezoo.entries import Recipe
from saezoo.trainers.resampling import resample
from saezoo.trainers.trainee import Parameters, Trainee

RECIPE: dict[str, Any] = {
    "l1_coefficient": 0.5,
    "lr": 1e-3,
    "lr_warmup_steps": 0,
    "batch_size": 4,
    "tokens": 100,
    "store_rows": 1,
    "buffer_batches": 2,
    "buffer": "fixed",
    "ghost": "off",
    "dead_after_steps": 5,
    "sampling_window_steps": 5,
    "b_dec_init": "zero",
    "skip_documents": 0,
    "source": ("test",),
}


def trainee(**changes: Any) -> Trainee:
    """d_in 2, three features; b_dec 0. The first fires on the first axis, the other two point away from everything."""
    W_enc_FD = torch.tensor([[2.0, 0.0], [-3.0, -4.0], [0.0, -1.0]])
    b_enc_F, b_dec_D = torch.tensor([0.0, -1.0, -2.0]), torch.zeros(2)
    W_dec_FD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = Trainee(Parameters(W_enc_FD.T.clone(), b_enc_F, W_dec_FD, b_dec_D), Recipe(**(RECIPE | changes)))
    found.step(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))  # moments are no longer 0
    found.W_enc_FD.copy_(W_enc_FD)
    found.b_enc_F.copy_(b_enc_F)
    found.W_dec_FD.copy_(W_dec_FD)
    found.b_dec_D.zero_()
    found.since_fired_F = torch.tensor([0, 6, 4])
    return found


X_ND = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
"""Feature 0 gives 6 and 2, so errors (3, -4), (1, 0), (0, 0) and losses
25 / (2 x 5) + 0.5 x 6 = 5.5,   1 / (2 x 1) + 0.5 x 2 = 1.5,   0."""


def test_the_loss_of_each_input() -> None:
    assert trainee().loss_of_each(X_ND).tolist() == [5.5, 1.5, 0.0]
    standard = trainee(loss="standard").loss_of_each(X_ND)
    assert standard.tolist() == [25 + 0.5 * 6, 1 + 0.5 * 2, 0.0]


def test_a_dead_feature_begins_anew_as_computed_by_hand() -> None:
    """Only feature 1 has not fired for 5 steps. The mean norm of those alive is (2 + 1) / 2."""
    found = trainee()
    before = [tensor.clone() for tensor in (found.W_enc_FD, found.b_enc_F, found.W_dec_FD)]
    moments = {m: found.adam.state[found.W_enc_FD][m].clone() for m in ("exp_avg", "exp_avg_sq")}
    assert resample(found, X_ND[:1], 5, torch.Generator().manual_seed(0)) == 1
    assert torch.allclose(found.W_dec_FD[1], torch.tensor([0.6, 0.8]))
    assert torch.allclose(found.W_enc_FD[1], 0.2 * 1.5 * torch.tensor([0.6, 0.8]))
    assert found.b_enc_F[1] == 0 and found.since_fired_F.tolist() == [0, 0, 4]
    for tensor in (found.W_enc_FD, found.b_enc_F, found.W_dec_FD):
        assert all(float(found.adam.state[tensor][moment][1].abs().sum()) == 0 for moment in moments)
    for tensor, old in zip((found.W_enc_FD, found.b_enc_F, found.W_dec_FD), before, strict=True):
        assert torch.equal(tensor[[0, 2]], old[[0, 2]]), "the others stay"
    for moment, old in moments.items():
        assert torch.equal(found.adam.state[found.W_enc_FD][moment][[0, 2]], old[[0, 2]])


def test_inputs_are_drawn_by_the_square_of_their_loss() -> None:
    """5.5^2 to 1.5^2 to 0: the first 30.25 of 32.5 times, the last never."""
    generator, first = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        found = trainee()
        resample(found, X_ND, 5, generator)
        first += bool(torch.allclose(found.W_dec_FD[1], torch.tensor([0.6, 0.8])))
        assert found.W_dec_FD[1].norm() == pytest.approx(1)
    assert abs(first / 2000 - 30.25 / 32.5) < 5 * (0.93 * 0.07 / 2000) ** 0.5


def test_nobody_is_dead() -> None:
    found = trainee()
    assert resample(found, X_ND, 7, torch.Generator()) == 0
    assert found.since_fired_F.tolist() == [0, 6, 4]


def test_everybody_is_dead() -> None:
    """Then the mean norm is that of all: (2 + 5 + 1) / 3."""
    found = trainee()
    found.since_fired_F += 100
    assert resample(found, X_ND[:1], 5, torch.Generator()) == 3
    wanted = 0.2 * 8 / 3 * torch.tensor([0.6, 0.8])
    assert all(torch.allclose(row, wanted) for row in found.W_enc_FD)


def test_the_same_generator_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND: Tensor = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    rows = []
    for size in (50, 7):
        monkeypatch.setattr("saezoo.trainers.resampling._AT_ONCE", size)
        found = trainee()
        resample(found, x_ND, 5, torch.Generator().manual_seed(3))
        rows.append(found.W_dec_FD[1])
    assert torch.equal(*rows)
