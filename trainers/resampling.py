"""Resampling of dead features, the method that ghost gradients replaced.

Bricken et al. 2023, "Towards Monosemanticity", section "Neuron Resampling":
https://transformer-circuits.pub/2023/monosemantic-features/index.html#appendix-autoencoder-resampling

Shapes: N inputs, D d_in, F d_sae, S dead features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saezoo.trainers.trainee import Trainee

INPUTS = 819_200
"""That the loss is taken on; of a smaller shuffle buffer all."""
ENCODER_SCALE = 0.2
"""Norm of a new encoder row, relative to the mean of those alive."""
_AT_ONCE = 8192


@torch.no_grad()
def resample(trainee: Trainee, x_ND: Tensor, window: int, generator: torch.Generator) -> int:
    """Give each feature that has not fired in the last `window` steps the direction of an input that is badly
    reconstructed; returns how many there were.

    1. The loss of each input x_n, as the recipe has it (reconstruction and L1).
    2. For each dead feature an input, drawn with a probability proportional to the square of its loss.
    3. Its decoder row becomes x_n / |x_n|; its encoder row that times 0.2 times the mean norm of the encoder rows of
       the features alive; its bias 0.
    4. Adam's moments of all of these become 0.

    With no feature alive, the mean norm is that of all rows. Inputs of norm 0 are never drawn.
    """
    dead_S = (trainee.since_fired_F >= window).nonzero().squeeze(1)
    if not len(dead_S):
        return 0
    loss_N = torch.cat([trainee.loss_of_each(part_ND) for part_ND in torch.split(x_ND, _AT_ONCE)])
    weight_N = loss_N.double().square() * (x_ND.norm(dim=1) > 0)
    drawn_S = torch.multinomial(weight_N.cpu(), len(dead_S), replacement=True, generator=generator).to(x_ND.device)
    direction_SD = torch.nn.functional.normalize(x_ND[drawn_S].to(trainee.W_dec_FD.dtype), dim=1)
    alive_F = torch.ones_like(trainee.b_enc_F, dtype=torch.bool)
    alive_F[dead_S] = False
    norm_F = trainee.W_enc_FD.norm(dim=1)
    norm = (norm_F[alive_F] if bool(alive_F.any()) else norm_F).mean()
    trainee.W_dec_FD[dead_S] = direction_SD
    trainee.W_enc_FD[dead_S] = ENCODER_SCALE * norm * direction_SD
    trainee.b_enc_F[dead_S] = 0
    trainee.forget(dead_S)
    return len(dead_S)
