"""The geometric median of a cloud of points, by Weiszfeld's algorithm.

Used twice: to start b_dec in training (exactly as the code of February 2024 did), and as the reference point of the
metrics that say where b_dec ended up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 16_384  # rows: bounds the temporary copies to 50 MB at width 768


def geometric_median(points_ND: Tensor, *, max_iterations: int = 100, ftol: float = 1e-20) -> Tensor:
    """The point [D] with the least mean distance to `points_ND` [N, D]; same dtype and device.

    m_0 = mean; then w_j = 1 / max(|p_j - m|, 1e-6) and m <- sum_j w_j p_j / sum_j w_j, until the mean distance changes
    by at most `ftol` of itself or `max_iterations` are done. With the default 1e-20 that is "until it does not change
    at all", as in the original. The distances are summed without rounding (`fsum`), so that the rule stops at the same
    step on any machine: near the end the objective changes in its last bit only. (Averaged in float32, as a naive
    port would, it stops after a few steps, 2e-3 away.)
    """
    median_D = _weighted_mean(points_ND, torch.ones_like(points_ND[:, 0]))
    distances_N = _distances(points_ND, median_D)
    objective = _exact_mean(distances_N)
    for _ in range(max_iterations):
        median_D = _weighted_mean(points_ND, 1 / distances_N.clamp(min=1e-6))
        distances_N = _distances(points_ND, median_D)
        previous, objective = objective, _exact_mean(distances_N)
        if abs(previous - objective) <= ftol * objective:
            break
    return median_D


def _exact_mean(values_N: Tensor) -> float:
    return math.fsum(values_N.tolist()) / len(values_N)


def _distances(points_ND: Tensor, centre_D: Tensor) -> Tensor:
    """|p_j - centre| for every point, [N]."""
    return torch.cat([(chunk - centre_D).norm(dim=1) for chunk in torch.split(points_ND, _CHUNK)])


def _weighted_mean(points_ND: Tensor, weights_N: Tensor) -> Tensor:
    total_D = torch.zeros_like(points_ND[0])
    for weights_n, points_nD in zip(torch.split(weights_N, _CHUNK), torch.split(points_ND, _CHUNK), strict=True):
        total_D += weights_n @ points_nD
    return total_D / weights_N.sum()
