"""Muon: momentum whose matrix is orthogonalised by Newton-Schulz iterations, for hidden weight matrices."""

from __future__ import annotations

from concurrent.futures import Executor

import torch
from torch import Tensor

# Quintic iteration of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


@torch.no_grad()
def orthogonalise(batch: Tensor) -> Tensor:
    """Matrices (count, rows, columns), rows <= columns, with all singular values moved to about 1."""
    a, b, c = NS_COEFFICIENTS
    x = batch.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.to(batch.dtype)
    return result


class Muon:
    """Muon over weights (out, in); a weight whose ``out`` is 3 times ``in`` is taken as query, key, value."""

    def __init__(self, weights: list[Tensor], momentum: float, weight_decay: float) -> None:
        self.weights = weights
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, lr: float, pool: Executor) -> None:
        """One update: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, out / in)), decoupled decay."""
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 1 - self.momentum)
            update = weight.grad.lerp(buffer, self.momentum)
            pieces = 3 if weight.shape[0] == 3 * weight.shape[1] else 1
            for part, target in zip(update.chunk(pieces), weight.chunk(pieces), strict=True):
                if part.shape[0] > part.shape[1]:
                    part = part.mT
                groups.setdefault(tuple(part.shape), []).append((part, target))
        # Equal shapes go through the iteration as one batch; the batches are shared out over the pool's threads.
        stacks = [torch.stack([part for part, _ in pairs]) for pairs in groups.values()]
        for updates, pairs in zip(pool.map(orthogonalise, stacks), groups.values(), strict=True):
            for update, (_, weight) in zip(updates, pairs, strict=True):
                oriented = update if update.shape == weight.shape else update.mT
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - lr * self.weight_decay).add_(oriented, alpha=-lr * scale)
