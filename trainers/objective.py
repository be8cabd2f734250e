"""The losses, as formulas on the reconstruction; and what is done to the decoder and the rates around them.

`feb2024`: https://github.com/jbloomAus/mats_sae_training at 98e4f1b (as run) and f554b16 (ghost gradients corrected);
tests/golden holds that code's outputs. `standard`: today's convention, as in SAELens 6. Both loss functions want
x_hat = b_dec + sum_i f_i W_dec_i; how f comes about and what follows for the weights is in `codes.py`.

Shapes: B batch, D d_in, F d_sae, S features under ghost gradients.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ghost = Literal["off", "bug", "fixed"]


class Losses(NamedTuple):
    """Scalars. total = mse + l1 + ghost."""

    total: Tensor
    mse: Tensor
    l1: Tensor
    ghost: Tensor


def feb2024(x_BD: Tensor, x_hat_BD: Tensor, l1: Tensor, *, ghost: Ghost, ghost_BD: Tensor | None) -> Losses:
    """The loss of the published SAEs.

    mse = mean_{b,d} e_bd^2 / |x_b|, with e = x_hat - x and the norm of the *uncentred* x, not squared.
    l1 = l1_coefficient * mean_b sum_i f_bi, as given. `ghost_BD`: sum over dead features of a_i W_dec_i, with
    a = `ghost_activations`; None if no feature is dead.
    """
    scaled_BD = (x_hat_BD - x_BD).square() / x_BD.norm(dim=1, keepdim=True)
    mse = scaled_BD.mean()
    extra = mse.new_zeros(())
    if ghost_BD is not None:
        term = _ghost_as_run if ghost == "bug" else _ghost_fixed
        extra = term(x_BD - x_hat_BD, ghost_BD, scaled_BD)
    return Losses(mse + l1 + extra, mse, l1, extra)


def standard(x_BD: Tensor, x_hat_BD: Tensor, l1: Tensor) -> Losses:
    """Today's loss: mse = mean_b sum_d e_bd^2; l1 = l1_coefficient * mean_b sum_i f_bi |W_dec_i|, as given."""
    mse = (x_hat_BD - x_BD).square().sum(1).mean()
    return Losses(mse + l1, mse, l1, mse.new_zeros(()))


def ghost_activations(pre_BS: Tensor, ghost: Ghost) -> Tensor:
    """Activations of dead features in the ghost term.

    98e4f1b took exp(ReLU(pre)): 1 for a feature that does not fire, with no gradient to its encoder. f554b16: exp(pre).
    """
    return (pre_BS.relu() if ghost == "bug" else pre_BS).exp()


def _ghost_as_run(residual_BD: Tensor, ghost_BD: Tensor, scaled_BD: Tensor) -> Tensor:
    """98e4f1b. The residual is not detached, so live features get a gradient that was not meant for them."""
    scale_B1 = (residual_BD.norm(dim=1, keepdim=True) / (2 * ghost_BD.norm(dim=1, keepdim=True))).detach()
    loss_BD = (ghost_BD * scale_B1 - residual_BD).square() / residual_BD.norm(dim=1, keepdim=True)
    loss: Tensor = loss_BD.mean()
    factor: Tensor = (scaled_BD.mean() / loss).detach()
    return factor * loss


def _ghost_fixed(residual_BD: Tensor, ghost_BD: Tensor, scaled_BD: Tensor) -> Tensor:
    """f554b16: residual detached, rescaled element by element."""
    residual_BD = residual_BD.detach()
    norm_B1 = residual_BD.norm(dim=1, keepdim=True)
    scale_B1 = (norm_B1 / (1e-6 + 2 * ghost_BD.norm(dim=1, keepdim=True))).detach()
    loss_BD = (ghost_BD * scale_B1 - residual_BD).square() / norm_B1
    factor_BD = (scaled_BD / (loss_BD + 1e-6)).detach()
    return torch.mean(factor_BD * loss_BD)


@torch.no_grad()
def normalise_decoder(W_dec_FD: Tensor) -> None:
    """Divide each decoder row by its norm, in place."""
    W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)


@torch.no_grad()
def remove_parallel(grad_FD: Tensor, W_dec_FD: Tensor) -> None:
    """Take off, in place, each row's gradient component along that row: the part that would only change its norm."""
    grad_FD.addcmul_(torch.linalg.vecdot(grad_FD, W_dec_FD)[:, None], W_dec_FD, value=-1)


def ramp(step: int, steps: int) -> float:
    """Factor of the 0-based `step` in a linear warm-up over `steps`; 1 after, and always if `steps` is 0."""
    return 1.0 if steps == 0 else min(1.0, (step + 1) / steps)
