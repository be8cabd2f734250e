"""Which tokens are scored, and where each belongs: all that is known about the rows before anything is run.

Shapes: R rows, T positions, n scored tokens of some rows, M targets of all rows, V vocabulary, N blocks of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saezoo.entries import Protocol
from saezoo.errors import UsageError
from saezoo.evals.tally import BLOCKS, TENTHS, Places
from saezoo.lm import LanguageModel
from saezoo.tokens import Rows


@dataclass(frozen=True)
class Scoring:
    """The rows, and for each token whether it is scored and where it belongs."""

    tokens_RT: Tensor
    scored_RT: Tensor
    document_RT: Tensor
    tenth_RT: Tensor
    vocab: int
    protocol: Protocol
    seed: int

    @classmethod
    def of(cls, rows: Rows, lm: LanguageModel, protocol: Protocol, seed: int) -> Scoring:
        """`standard` scores all but special tokens, `feb2024` all. UsageError for tokens or positions that the
        model lacks."""
        tokens_RT = torch.from_numpy(rows.tokens_RT)
        if int(tokens_RT.max()) >= lm.vocab:
            largest = int(tokens_RT.max())
            raise UsageError(f"token {largest} of a model with {lm.vocab}: its folder holds another model's tokenizer")
        if tokens_RT.shape[1] > lm.n_positions:
            raise UsageError(f"rows of {tokens_RT.shape[1]} tokens: the model has {lm.n_positions} positions")
        special_RT = torch.isin(tokens_RT, torch.tensor(sorted(lm.special_ids)))
        scored_RT = torch.ones_like(special_RT) if protocol == "feb2024" else ~special_RT
        tenth_V = tenths(torch.bincount(tokens_RT[scored_RT], minlength=lm.vocab))
        return cls(
            tokens_RT, scored_RT, torch.from_numpy(rows.documents_RT), tenth_V[tokens_RT], lm.vocab, protocol, seed
        )

    @property
    def context(self) -> int:
        return self.tokens_RT.shape[1]

    def places(self, first: int, last: int) -> Places:
        """Of the scored tokens of rows first..last-1."""
        scored_BT = self.scored_RT[first:last]
        position_BT = torch.arange(self.context).expand_as(scored_BT)
        return Places(
            self.document_RT[first:last][scored_BT] % BLOCKS,
            position_BT[scored_BT],
            self.tenth_RT[first:last][scored_BT],
        )

    def targets(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next token [n] of each scored token of rows first..last-1, and 1.0 or (at the end of a row, where there
        is none) 0.0 [n]."""
        scored_BT = self.scored_RT[first:last]
        next_BT = self.tokens_RT[first:last].roll(-1, dims=1)
        has_BT = torch.ones_like(next_BT, dtype=torch.float64)
        has_BT[:, -1] = 0
        return next_BT[scored_BT].to(device), has_BT[scored_BT].to(device)

    def all_targets(self) -> tuple[Tensor, Tensor]:
        """(target, block of the token that it follows) [M] of all rows."""
        scored_RT = self.scored_RT[:, :-1]
        return self.tokens_RT[:, 1:][scored_RT], self.document_RT[:, :-1][scored_RT] % BLOCKS

    def cross_entropy(self, log_p_V: Tensor) -> Tensor:
        """Sum per block [N] of the cross-entropy of predicting each target by the same distribution."""
        target_M, block_M = self.all_targets()
        return torch.zeros(BLOCKS, dtype=torch.float64).index_add_(0, block_M, -log_p_V[target_M])

    def unigram(self) -> Tensor:
        """Sum per block [N] of the cross-entropy of predicting each target by how often it is one in the other blocks:
        p(v) = (count + 1) / (targets + V), counts without the target's own block."""
        target_M, block_M = self.all_targets()
        count_V = torch.bincount(target_M, minlength=self.vocab)
        size_N = torch.bincount(block_M, minlength=BLOCKS)
        _, kind_M, own = torch.unique(block_M * self.vocab + target_M, return_inverse=True, return_counts=True)
        count_M = (count_V[target_M] - own[kind_M] + 1).double()
        loss_M = (len(target_M) - size_N[block_M] + self.vocab).double().log() - count_M.log()
        return torch.zeros(BLOCKS, dtype=torch.float64).index_add_(0, block_M, loss_M)

    def sample(self, most: int) -> Tensor:
        """Which scored tokens [R, T] the geometric median is taken over: a uniform draw, fixed by the seed alone."""
        scored = self.scored_RT.flatten().nonzero().squeeze(1)
        chosen = scored[torch.randperm(len(scored), generator=torch.Generator().manual_seed(self.seed))[:most]]
        mask = torch.zeros(self.scored_RT.numel(), dtype=torch.bool)
        mask[chosen] = True
        return mask.view_as(self.scored_RT)


def tenths(count_V: Tensor) -> Tensor:
    """Each token's tenth [V], 0 for the most frequent: by the share of all tokens that are of more frequent kinds, plus
    half of those of kinds as frequent. So kinds that are equally frequent are never parted."""
    levels, level_V = torch.unique(count_V, return_inverse=True)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level_V, count_V.double())
    above = mass.flip(0).cumsum(0).flip(0) - mass / 2
    return (TENTHS * above / max(1.0, float(mass.sum()))).long().clamp(max=TENTHS - 1)[level_V]
