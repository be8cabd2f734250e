"""The running sums of one SAE: everything that an evaluation keeps, whatever the number of tokens.

Tallies of different rows add up to the tally of all of them: that gives resuming and several processes.

Shapes: n scored tokens of a batch, D d_in, F d_sae, N blocks of documents, G groups of documents, T positions,
Q tenths of the tokens by frequency, K sums of `PER_TOKEN`, P of them that are broken down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saezoo.evals.intervals import GROUPS
from saezoo.evals.metrics import BROKEN_DOWN, PER_TOKEN
from saezoo.sae import SAE

BLOCKS = 2048
"""Documents are folded into at most this many blocks: bounds memory, keeps the bootstrap valid."""
TENTHS = 10


@dataclass(frozen=True)
class Subject:
    """An SAE to be evaluated, and what to call it."""

    sae: SAE
    collection: str
    layer: str
    published: dict[str, float | None] = field(default_factory=dict)
    """Published values measured by the protocol that will be used."""


@dataclass(frozen=True)
class Places:
    """Where each scored token of a batch belongs [n], int64."""

    block_n: Tensor
    position_n: Tensor
    tenth_n: Tensor


@dataclass(frozen=True)
class Tally:
    """Sums in float64 on the CPU; see the names in `PER_TOKEN`."""

    sums_NK: Tensor
    x_sum_ND: Tensor
    fires_GF: Tensor
    by_position_GTP: Tensor
    by_frequency_GQP: Tensor
    sample: list[Tensor]
    """Activations [n, D] float32, one tensor for each batch; of several SAEs that read the same, the first has them."""

    @classmethod
    def empty(cls, d_in: int, d_sae: int, context: int) -> Tally:
        """Nothing seen yet."""
        shapes = (
            (BLOCKS, len(PER_TOKEN)),
            (BLOCKS, d_in),
            (GROUPS, d_sae),
            (GROUPS, context, len(BROKEN_DOWN)),
            (GROUPS, TENTHS, len(BROKEN_DOWN)),
        )
        sums, x_sum, fires, positions, tenths = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(sums, x_sum, fires, positions, tenths, [])

    def add(self, values: Mapping[str, Tensor], x_nD: Tensor, fires_GF: Tensor, places: Places) -> None:
        """One batch: per-token values [n] by name, the activations, and the firings in each group of documents."""
        values_nK = torch.stack([values[name].double().cpu() for name in PER_TOKEN], dim=1)
        self.sums_NK.index_add_(0, places.block_n, values_nK)
        add_by_block(self.x_sum_ND, x_nD, places.block_n)
        self.fires_GF.add_(fires_GF.cpu())
        shown_nP = values_nK[:, [PER_TOKEN.index(name) for name in BROKEN_DOWN]]
        group_n = places.block_n % GROUPS
        for table, place_n in ((self.by_position_GTP, places.position_n), (self.by_frequency_GQP, places.tenth_n)):
            table.view(-1, len(BROKEN_DOWN)).index_add_(0, group_n * table.shape[1] + place_n, shown_nP)

    def everything(self) -> dict[str, Tensor]:
        """The sums by name, and the sample as one tensor."""
        sample_nD = torch.cat(self.sample) if self.sample else self.x_sum_ND[:0].float()
        return self._sums() | {"sample": sample_nD}

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add `everything` of a tally that saw later rows."""
        for name, mine in self._sums().items():
            mine.add_(tensors[name])
        self.sample.append(tensors["sample"])

    def _sums(self) -> dict[str, Tensor]:
        names = ("sums_NK", "x_sum_ND", "fires_GF", "by_position_GTP", "by_frequency_GQP")
        return {name: getattr(self, name) for name in names}

    def column(self, name: str) -> Tensor:
        """One of the `PER_TOKEN` sums [N]."""
        return self.sums_NK[:, PER_TOKEN.index(name)]


def add_by_block(total_ND: Tensor, x_nD: Tensor, block_n: Tensor) -> None:
    """Add each row of x to that of its block, in float64; by a product, for `index_add_` takes rows one by one."""
    blocks, place_n = torch.unique(block_n, return_inverse=True)
    member_bn = torch.nn.functional.one_hot(place_n).T.to(x_nD.device, torch.float64)
    total_ND.index_add_(0, blocks, (member_bn @ x_nD.double()).cpu())
