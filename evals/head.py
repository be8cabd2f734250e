"""From the last residual to cross-entropy and KL, without a matrix of tokens by vocabulary.

With h the output of the last layer norm and u_v the unembedding row of token v, minus the mean row (which shifts all
logits of a position alike and changes nothing), p and q the next-token distributions of h and of a changed h':

    CE(h, v)  = L(h) - h . u_v                     L(h) = log sum_v exp(h . u_v), summed over tiles of the vocabulary
    KL(p, q)  = (h - h') . m - L(h) + L(h')        m = sum_v p_v u_v, one vector for each token of the clean run

The second line follows from log p_v = h . u_v - L(h): the sum over v with weights p_v is a product with m. So a changed
run costs one product with the vocabulary, its exponentials, and no more memory than a tile.

Shapes: n tokens, D d_model, V vocabulary, W tokens of the vocabulary in one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saezoo.lm import HALF, LanguageModel
from saezoo.products import linear

_CPU_TILE, _GPU_TILE = 2 << 20, 64 << 20
"""Numbers in a tile: on a CPU it should stay near the cores."""


@dataclass(frozen=True)
class Clean:
    """The untouched model at n tokens."""

    h_nD: Tensor
    lse_n: Tensor
    """L(h), float64."""
    mean_u_nD: Tensor
    """m."""


@dataclass(frozen=True)
class Constant:
    """The model when all tokens have the same residual."""

    h_1D: Tensor
    lse_1: Tensor
    log_p_V: Tensor
    """On the CPU, float64."""


class Head:
    """Last layer norm and unembedding of a language model."""

    def __init__(self, lm: LanguageModel) -> None:
        self._norm = lm.hf_model.transformer.ln_f
        self._weight_VD = lm.hf_model.lm_head.weight
        self._mean_D = self._weight_VD.mean(0)
        half = lm.dtype in HALF
        self._product_VD = (self._weight_VD - self._mean_D).to(lm.dtype if half else self._weight_VD.dtype)
        # What one vector is multiplied with: full precision in any case.
        self._single_VD = self._weight_VD if half else self._product_VD
        self._tile = _GPU_TILE if lm.device.type == "cuda" else _CPU_TILE

    def clean(self, resid_nD: Tensor) -> Clean:
        """The untouched model's last residual [n, D]. One pass over the vocabulary, rescaling what was summed so far
        whenever a tile brings a larger logit."""
        h_nD = self._norm(resid_nD)
        top_n = h_nD.new_full((len(h_nD),), float("-inf"))
        sum_n, mean_u_nD = torch.zeros_like(top_n, dtype=torch.float64), torch.zeros_like(h_nD)
        for u_WD, logits_nW in self._tiles(h_nD):
            new_n = torch.maximum(top_n, logits_nW.amax(1))
            p_nW = logits_nW.sub_(new_n[:, None]).exp_()
            scale_n = (top_n - new_n).exp()
            sum_n.mul_(scale_n).add_(p_nW.sum(1))
            mean_u_nD.mul_(scale_n[:, None]).add_(linear(p_nW.to(u_WD.dtype), u_WD.T))
            top_n = new_n
        return Clean(h_nD, top_n + sum_n.log(), mean_u_nD.div_(sum_n[:, None]))

    def changed(self, resid_nD: Tensor, clean: Clean) -> tuple[Tensor, Tensor]:
        """(h', L(h')) of a changed last residual [n, D] at the tokens of `clean`."""
        h_nD = self._norm(resid_nD)
        return h_nD, self._lse(h_nD, clean.lse_n)

    def kl(self, clean: Clean, h_nD: Tensor, lse_n: Tensor) -> Tensor:
        """KL(p, q) [n], nats, float64, p of the clean run and q of h'. One h' [1, D] for all tokens is allowed."""
        difference_nD = clean.h_nD.double() - h_nD.double()
        return (difference_nD * clean.mean_u_nD.double()).sum(1) - clean.lse_n + lse_n

    def cross_entropy(self, h_nD: Tensor, lse_n: Tensor, target_n: Tensor) -> Tensor:
        """-log p(target) [n], float64."""
        u_nD = self._weight_VD[target_n].double() - self._mean_D.double()
        logit_n: Tensor = (h_nD.double() * u_nD).sum(1)
        return lse_n - logit_n

    def constant(self, resid_D: Tensor) -> Constant:
        """When the last residual is the same vector everywhere."""
        h_1D = self._norm(resid_D[None])
        log_p_V = torch.mv(self._single_VD, h_1D[0]).double().log_softmax(0)
        first_1 = torch.zeros(1, dtype=torch.int64, device=h_1D.device)
        minus_logit_1 = self.cross_entropy(h_1D, torch.zeros_like(log_p_V[:1]), first_1)
        lse_1 = -log_p_V[:1] - minus_logit_1  # -log p(v) = L(h) - h . u_v, at any v
        return Constant(h_1D, lse_1, log_p_V.cpu())

    def _lse(self, h_nD: Tensor, near_n: Tensor) -> Tensor:
        """L(h) [n], float64. `near_n` is a guess, which saves the search for the largest logit; where it was so far
        off that the sum overflowed or vanished, the largest logit is looked for after all."""
        sum_n = torch.zeros_like(near_n)
        shift_n1 = near_n.to(h_nD.dtype)[:, None]
        for _, logits_nW in self._tiles(h_nD):
            sum_n += logits_nW.sub_(shift_n1).exp_().sum(1)
        lse_n = near_n.to(h_nD.dtype) + sum_n.log()
        off = (~lse_n.isfinite()).nonzero().squeeze(1)
        if len(off):
            top = [logits_nW.amax(1) for _, logits_nW in self._tiles(h_nD[off])]
            if torch.stack(top).isfinite().all():  # else the residual itself is not finite: nothing to mend
                lse_n[off] = self._lse(h_nD[off], torch.stack(top).amax(0).double())
        return lse_n

    def _tiles(self, h_nD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of u [W, D], logits [n, W]), the logits in full precision and the caller's to change."""
        width = max(128, self._tile // max(1, len(h_nD)))
        product_nD = h_nD.to(self._product_VD.dtype)
        for u_WD in self._product_VD.split(width):
            yield u_WD, linear(product_nD, u_WD).to(h_nD.dtype)
