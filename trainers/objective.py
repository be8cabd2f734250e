"""The loss of February 2024: reconstruction, L1, and ghost gradients in the form that ran and the corrected one.

Source: https://github.com/jbloomAus/mats_sae_training at 98e4f1b (as run) and f554b16 (ghost gradients corrected);
tests/golden holds that code's outputs. Shapes: B batch, D d_in, F d_sae, S features under ghost gradients.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Parameters(NamedTuple):
    """The leaf tensors that are trained."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Losses(NamedTuple):
    """Scalars. total = mse + l1 + ghost."""

    total: Tensor
    mse: Tensor
    l1: Tensor
    ghost: Tensor


class Outputs(NamedTuple):
    """One forward pass."""

    losses: Losses
    f_BF: Tensor
    error_BD: Tensor


def forward(
    parameters: Parameters,
    x_BD: Tensor,
    *,
    l1_coefficient: float,
    ghost: Literal["off", "bug", "fixed"] = "off",
    dead_F: Tensor | None = None,
) -> Outputs:
    """Loss and activations of one batch.

    MSE = mean_{b,d} e_bd^2 / |x_b|, with e = x_hat - x and the norm of the *uncentred* x, not squared;
    L1 = l1_coefficient * mean_b sum_i f_bi. `dead_F` marks the features that get ghost gradients.
    """
    p = parameters
    pre_BF = (x_BD - p.b_dec) @ p.W_enc + p.b_enc
    f_BF = pre_BF.relu()
    error_BD = f_BF @ p.W_dec + p.b_dec - x_BD
    scaled_BD = error_BD.square() / x_BD.norm(dim=1, keepdim=True)
    mse = scaled_BD.mean()
    l1 = l1_coefficient * f_BF.sum(1).mean()
    extra = mse.new_zeros(())
    if ghost != "off" and dead_F is not None and bool(dead_F.any()):
        if ghost == "bug":
            extra = _ghost_as_run(-error_BD, f_BF[:, dead_F], p.W_dec[dead_F], mse)
        else:
            extra = _ghost_fixed(-error_BD, pre_BF[:, dead_F], p.W_dec[dead_F], scaled_BD)
    return Outputs(Losses(mse + l1 + extra, mse, l1, extra), f_BF.detach(), error_BD.detach())


def _ghost_as_run(residual_BD: Tensor, f_BS: Tensor, W_dec_SD: Tensor, mse: Tensor) -> Tensor:
    """Ghost gradients of 98e4f1b. exp(ReLU(pre)) is 1 for a dead feature, with no gradient to its encoder; and the
    residual is not detached, so live features get a gradient that was not meant for them."""
    ghost_BD = f_BS.exp() @ W_dec_SD
    scale_B1 = (residual_BD.norm(dim=1, keepdim=True) / (2 * ghost_BD.norm(dim=1, keepdim=True))).detach()
    loss_BD = (ghost_BD * scale_B1 - residual_BD).square() / residual_BD.norm(dim=1, keepdim=True)
    loss: Tensor = loss_BD.mean()
    factor: Tensor = (mse / loss).detach()
    return factor * loss


def _ghost_fixed(residual_BD: Tensor, pre_BS: Tensor, W_dec_SD: Tensor, scaled_BD: Tensor) -> Tensor:
    """Ghost gradients of f554b16: exp(pre), residual detached, rescaled element by element."""
    residual_BD = residual_BD.detach()
    norm_B1 = residual_BD.norm(dim=1, keepdim=True)
    ghost_BD = pre_BS.exp() @ W_dec_SD
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
    grad_FD -= (grad_FD * W_dec_FD).sum(1, keepdim=True) * W_dec_FD


def learning_rate(step: int, *, lr: float, warmup_steps: int) -> float:
    """Rate of the 0-based `step`: linear up to `lr` over `warmup_steps`, constant after."""
    return lr if warmup_steps == 0 else lr * min(1.0, (step + 1) / warmup_steps)
