"""Activations for training and analysis: shuffled through the half-refreshed buffer of February 2024.

Shapes: N activations, L layers (all from one forward pass), D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from saezoo.lm import LanguageModel
from saezoo.tokens import Rows


def activations(lm: LanguageModel, rows: Iterator[Rows], depths: Sequence[int], *, centre: bool) -> Iterator[Tensor]:
    """For each block of rows, the residual at each of `depths`: [N, L, D] float32, one forward pass for all."""
    for block in rows:
        yield residuals(lm, torch.from_numpy(block.tokens_RT).to(lm.device), depths, centre=centre)


def residuals(lm: LanguageModel, tokens_BT: Tensor, depths: Sequence[int], *, centre: bool) -> Tensor:
    """The residual of all tokens at each of `depths`: [N, L, D] float32, minus its mean over D if `centre`."""
    found = lm.residuals(tokens_BT, depths)
    x_NLD = torch.stack([found[depth].flatten(0, 1) for depth in depths], dim=1).float()
    return x_NLD - x_NLD.mean(-1, keepdim=True) if centre else x_NLD


class ActivationBuffer:
    """Iterator of shuffled training batches [n, L, D].

    The storage holds half a buffer. A refill draws as many new activations, mixes both, keeps the first half of the
    mix and serves one half: `bug` (98e4f1b) the half it kept, so that half of all activations is lost and others come
    several times; `fixed` (07d38a0) the other half, so that each comes exactly once.
    """

    def __init__(
        self,
        source: Iterator[Tensor],
        *,
        half: int,
        batch_size: int,
        mode: Literal["bug", "fixed"],
        permute: Callable[[int], Tensor],
    ) -> None:
        """`source` gives blocks [n, L, D]; `half` is the number of blocks in half a buffer; `permute(n)` a random
        permutation of n. Then `fill` it, or `restore` a state."""
        self._source = source
        self._half = half
        self._batch_size = batch_size
        self._mode = mode
        self._permute = permute
        self.refills = 0
        self._pending: list[Tensor] = []

    def fill(self) -> ActivationBuffer:
        """Fill and mix the storage, which is then what b_dec is initialised from, and mix the first batches."""
        self.storage = self._new()
        self._refill()
        return self

    def __iter__(self) -> ActivationBuffer:
        return self

    def __next__(self) -> Tensor:
        if not self._pending:
            self._refill()
        return self._pending.pop(0)

    @property
    def drained(self) -> bool:
        """Whether the next batch comes from a refill; the state is then half as large."""
        return not self._pending

    def _new(self) -> Tensor:
        blocks = [next(self._source) for _ in range(self._half)]
        new_NLD = torch.cat(blocks)
        return new_NLD[self._permute(len(new_NLD))]

    def _refill(self) -> None:
        mix = torch.cat([self._new(), self.storage])
        mix = mix[self._permute(len(mix))]
        middle = len(mix) // 2
        self.storage = mix[:middle].clone()  # a copy, so that the mix itself can go
        served = mix[:middle] if self._mode == "bug" else mix[middle:]
        served = served[self._permute(len(served))]
        self._pending = list(torch.split(served, self._batch_size))
        self.refills += 1

    def state(self) -> dict[str, Tensor]:
        """What the next batch depends on, besides `source` and `permute`: `storage` and the batches still to serve."""
        served = torch.cat(self._pending) if self._pending else self.storage[:0]
        return {"storage": self.storage, "served": served}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from a `state`; the caller winds `source` and `permute` to the same point."""
        self.storage, served = state["storage"].to(device), state["served"].to(device)
        self._pending = list(torch.split(served, self._batch_size)) if len(served) else []
