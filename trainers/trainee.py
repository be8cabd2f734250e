"""One SAE in training: its parameters, optimiser and firing statistics, and what one step does to them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saezoo.entries import Recipe
from saezoo.trainers.objective import (
    Losses,
    Parameters,
    forward,
    learning_rate,
    normalise_decoder,
    remove_parallel,
)


class StepLog(NamedTuple):
    """What one step showed, as tensors on the device (reading them costs a synchronisation)."""

    losses: Losses
    l0: Tensor
    ghosts: Tensor
    """Features under ghost gradients."""
    explained_variance_uncentred: Tensor


def initial_parameters(d_in: int, d_sae: int, b_dec: Tensor, generator: torch.Generator) -> Parameters:
    """Kaiming-uniform as PyTorch did it for these shapes: W_enc in +-sqrt(6/F), W_dec rows of norm 1; b_enc zero."""

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / columns)  # kaiming_uniform_ takes the second dimension for the fan-in
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    W_dec = uniform(d_sae, d_in)
    normalise_decoder(W_dec)
    tensors = (uniform(d_in, d_sae), torch.zeros(d_sae), W_dec, b_dec.clone())
    return Parameters(*(t.to(b_dec.device, b_dec.dtype).requires_grad_() for t in tensors))


class Trainee:
    """One SAE in training. `step` is the order of operations of the code of 28 January 2024."""

    def __init__(self, parameters: Parameters, recipe: Recipe) -> None:
        self.parameters = parameters
        self.recipe = recipe
        self.adam = torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
        self.steps = 0
        n_features, device = parameters.b_enc.numel(), parameters.b_enc.device
        self.since_fired_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.window_fires_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.window_tokens = 0
        self.log_sparsity_F: Tensor | None = None
        """log10(frequency + 1e-10) over the last complete window; None before the first."""

    def step(self, x_BD: Tensor) -> StepLog:
        """One optimiser step on the activations x [B, D]."""
        p, recipe = self.parameters, self.recipe
        normalise_decoder(p.W_dec)
        if (self.steps + 1) % recipe.sampling_window_steps == 0:
            self._close_window()
        rate = learning_rate(self.steps, lr=recipe.lr, warmup_steps=recipe.lr_warmup_steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        dead_F = self.since_fired_F > recipe.dead_after_steps

        out = forward(p, x_BD, l1_coefficient=recipe.l1_coefficient, ghost=recipe.ghost, dead_F=dead_F)

        fired_BF = out.f_BF > 0
        fires_F = fired_BF.sum(0)
        self.since_fired_F += 1
        self.since_fired_F[fires_F > 0] = 0
        self.window_fires_F += fires_F
        self.window_tokens += len(x_BD)

        out.losses.total.backward()  # type: ignore[no-untyped-call]
        assert p.W_dec.grad is not None
        remove_parallel(p.W_dec.grad, p.W_dec)
        self.adam.step()
        self.steps += 1
        unexplained = (out.error_BD.square().sum(1) / x_BD.square().sum(1)).mean()
        losses = Losses(*(loss.detach() for loss in out.losses))
        return StepLog(losses, fires_F.sum() / len(x_BD), dead_F.sum(), 1 - unexplained)

    def _close_window(self) -> None:
        frequency_F = self.window_fires_F / max(1, self.window_tokens)
        self.log_sparsity_F = (frequency_F + 1e-10).log10().float()
        self.window_fires_F.zero_()
        self.window_tokens = 0

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and numbers."""
        return {
            "parameters": [p.detach() for p in self.parameters],
            "adam": self.adam.state_dict(),
            "steps": self.steps,
            "since_fired": self.since_fired_F,
            "window_fires": self.window_fires_F,
            "window_tokens": self.window_tokens,
            "log_sparsity": self.log_sparsity_F,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]
        self.since_fired_F.copy_(state["since_fired"])
        self.window_fires_F.copy_(state["window_fires"])
        self.window_tokens = state["window_tokens"]
        self.log_sparsity_F = state["log_sparsity"]
