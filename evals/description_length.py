"""Description length: how many bits a token's features cost when they are sent with only as much precision as needed.

Shapes: n tokens of a batch, P pairs (token, feature) above 0, D d_in, F d_sae, G groups of documents, S symbols but 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.evals.intervals import GROUPS
from saezoo.results import Measured
from saezoo.sae import SAE

LEVELS = (1, 2, 4, 8, 16, 32, 64)
TOLERANCE = 0.01
NAMES = ("description_length", "description_levels", "description_loss")
_T_975 = 2.04  # Student's t, 31 degrees of freedom

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives, each time it is called, the same (activations [n, D], index of each one's document [n])."""


def description_length(sae: SAE, batches: Batches) -> dict[str, Measured]:
    """Bits per token to send each feature's quantised value, as in Ayonrinde, Pearce & Sharkey 2024.

    "Interpretability as Compression: Reconsidering SAE Explanations of Neural Activations with MDL-SAEs",
    arXiv 2410.11179. Feature i with the largest value m_i is rounded to B levels above 0,

        q_i = round(B f_i / m_i) in {0 .. B},     sent as q_i, read as q_i m_i / B,

    with the smallest B of 1, 2, 4 .. 64 for which the explained variance falls by at most 0.01:
    (E|x - y_q|^2 - E|x - y|^2) / (E|x|^2 - |E x|^2) <= 0.01. Then

        description_length = sum_i H(q_i),     H(q) = -sum_s p(s) log2 p(s),

    p being how often each symbol occurs. A silent feature, and one below half a level, is symbol 0. Which features fire
    and their values are thus one message; the SAE and the m_i are known to both sides and cost nothing.

    Two passes: the m_i, then the counts for all B at once. Memory: 32 x d_sae x 127 counts of 4 bytes (400 MB at
    24,576 features), besides one batch.

    Args:
        sae: its features are quantised.
        batches: activations that the SAE reads, special tokens left out.

    Returns `description_length` (bits per token), `description_levels` (B) and `description_loss` (explained variance
    lost at B); all None where no B is fine enough or where the activations have no variance. The interval is a
    delete-one-group jackknife over 32 groups of documents, m and B held fixed.
    """
    tally = _Tally(sae, _largest(sae, batches))
    for x_nD, document_n in batches():
        tally.add(x_nD, document_n)
    return tally.measured()


def _largest(sae: SAE, batches: Batches) -> Tensor:
    """The largest value of each feature [F]."""
    largest_F = torch.zeros(sae.config.d_sae, dtype=sae.W_enc.dtype, device=sae.W_enc.device)
    for x_nD, _ in batches():
        if len(x_nD):
            largest_F = torch.maximum(largest_F, sae.encode(x_nD).amax(0))
    return largest_F


class _Tally:
    """Counts of symbols and sums of squared errors, for all `LEVELS` at once."""

    def __init__(self, sae: SAE, largest_F: Tensor) -> None:
        self.sae, self.largest_F = sae, largest_F
        n_features = sae.config.d_sae
        # Symbol 0 is not counted: it is the rest.
        self.counts = [torch.zeros(GROUPS, n_features, levels, dtype=torch.int32) for levels in LEVELS]
        self.tokens_G = torch.zeros(GROUPS, dtype=torch.float64)
        self.error = 0.0
        self.errors = [0.0] * len(LEVELS)
        self.x_sum_D = torch.zeros(sae.config.d_in, dtype=torch.float64)
        self.x2 = 0.0

    def add(self, x_nD: Tensor, document_n: Tensor) -> None:
        """Count one batch."""
        x_nD = x_nD.to(self.sae.W_enc.dtype)
        if self.sae.config.centre:
            x_nD = x_nD - x_nD.mean(-1, keepdim=True)
        f_nF = self.sae.encode(x_nD)
        group_n = document_n.to(f_nF.device) % GROUPS
        self.tokens_G += torch.bincount(group_n, minlength=GROUPS).cpu()
        self.x_sum_D += x_nD.double().sum(0).cpu()
        self.x2 += _squares(x_nD)
        token_P, feature_P = f_nF.nonzero(as_tuple=True)
        value_P = f_nF[token_P, feature_P]
        share_P = value_P / self.largest_F[feature_P]  # in (0, 1]
        firsts_n = torch.searchsorted(token_P, torch.arange(len(x_nD), device=token_P.device))
        decode = partial(F.embedding_bag, feature_P, self.sae.W_dec, firsts_n, mode="sum")
        y_nD = self.sae.restore(decode(per_sample_weights=value_P) + self.sae.b_dec, x_nD)
        e_nD = x_nD - y_nD
        self.error += _squares(e_nD)
        slot_P = group_n[token_P] * self.sae.config.d_sae + feature_P
        for k, levels in enumerate(LEVELS):
            symbol_P = (share_P * levels).round()
            rounded_P = symbol_P / levels * self.largest_F[feature_P]
            rounded_nD = self.sae.restore(decode(per_sample_weights=rounded_P) + self.sae.b_dec, x_nD)
            self.errors[k] += _squares(x_nD - rounded_nD)
            heard = symbol_P > 0
            where = (slot_P * levels + symbol_P.long() - 1)[heard].cpu()
            self.counts[k].view(-1).index_add_(0, where, torch.ones(len(where), dtype=torch.int32))

    def measured(self) -> dict[str, Measured]:
        """The result, at the smallest number of levels that is fine enough."""
        tokens = float(self.tokens_G.sum())
        variance = self.x2 - float(self.x_sum_D.square().sum()) / max(tokens, 1.0)
        if variance <= 1e-12 * self.x2:
            return dict.fromkeys(NAMES, Measured(None))
        losses = [(error - self.error) / variance for error in self.errors]
        fine = next((k for k, loss in enumerate(losses) if loss <= TOLERANCE), None)
        if fine is None:
            return dict.fromkeys(NAMES, Measured(None))
        bits = _jackknife(self.counts[fine], self.tokens_G)
        return dict(zip(NAMES, (bits, Measured(float(LEVELS[fine])), Measured(losses[fine])), strict=True))


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def entropy(counts_FS: Tensor, tokens: float) -> float:
    """Sum over features of the entropy of their symbols, bits: counts of all symbols but 0 [F, S] among `tokens`."""
    counts_FS = counts_FS.double()
    silent_F1 = tokens - counts_FS.sum(1, keepdim=True)
    p_FS = torch.cat([silent_F1, counts_FS], dim=1) / tokens
    return float(-torch.xlogy(p_FS, p_FS).sum() / math.log(2))


def _jackknife(counts_GFS: Tensor, tokens_G: Tensor) -> Measured:
    """`entropy` of all groups together, and its interval if there are documents in each group."""
    counts_FS, tokens = counts_GFS.sum(0), float(tokens_G.sum())
    bits = entropy(counts_FS, tokens)
    if int((tokens_G > 0).sum()) < GROUPS:
        return Measured(bits)
    without = torch.tensor(
        [entropy(counts_FS - c_FS, tokens - float(t)) for c_FS, t in zip(counts_GFS, tokens_G, strict=True)],
        dtype=torch.float64,
    )
    error = float(((GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()).sqrt())
    return Measured(bits, max(0.0, bits - _T_975 * error), bits + _T_975 * error)
