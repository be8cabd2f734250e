"""What a feature's decoder direction says: which logits it raises, and which other features point the same way.

The residual stream reaches the logits through the final layer norm, logits = W_U (gain * (r - mean r) / std r + bias).
Its division by std r differs from token to token and is left out, as everybody does: a logit here is what one unit of
the feature adds where std r is 1. The gain and the subtraction of the mean are folded into W_U; the mean over the
vocabulary is taken off, for the softmax does not see it. TransformerLens folds and centres the same by default.

Shapes: F features, C features of one block, D d_in, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, linalg

from saezoo.codes import blocks
from saezoo.features.describe import BINS, TOKENS
from saezoo.features.records import Histogram, Logits, Neighbour, Weighted
from saezoo.lm import LanguageModel
from saezoo.products import linear

NEIGHBOURS = 5
"""In each layer."""
_CPU_BYTES, _GPU_BYTES = 16 << 20, 512 << 20  # of one block of logits or cosines, float32; the CPU's stay in its cache


@torch.inference_mode()
def unembedding(lm: LanguageModel) -> Tensor:
    """W_U [D, V] in float32, with the final layer norm folded in, centred over D and over V."""
    gain_D = lm.hf_model.transformer.ln_f.weight.double()
    W_U_DV = lm.hf_model.lm_head.weight.double().T * gain_D[:, None]
    W_U_DV = W_U_DV - W_U_DV.mean(0, keepdim=True)
    centred_DV: Tensor = W_U_DV - W_U_DV.mean(1, keepdim=True)
    return centred_DV.float()


@torch.inference_mode()
def logits(W_dec_FD: Tensor, W_U_DV: Tensor, features: Sequence[int]) -> Iterator[Logits | None]:
    """Of each of `features` in turn."""
    W_U_VD = W_U_DV.T.contiguous()
    size = min(_at_once(W_U_VD), len(features))
    # Large tensors made anew for each block would cost as much as the arithmetic.
    work_CV = torch.empty(size, len(W_U_VD), device=W_U_VD.device)
    place_CV = torch.empty_like(work_CV, dtype=torch.int32)
    for block in blocks(len(features), size):
        chosen_CD = W_dec_FD[list(features[block])].float()
        room = work_CV[: len(chosen_CD)], place_CV[: len(chosen_CD)]
        yield from _of_block(linear(chosen_CD, W_U_VD), chosen_CD.abs().amax(1) > 0, *room)


def _of_block(logit_CV: Tensor, known_C: Tensor, work_CV: Tensor, place_CV: Tensor) -> list[Logits | None]:
    """`logit_CV` is spent; `work_CV` and `place_CV`: room."""
    top, bottom = _extremes(logit_CV, largest=True), _extremes(logit_CV, largest=False)
    lo_C, hi_C = ([row[0].logit for row in rows] for rows in (bottom, top))
    counts_CB = _histograms(logit_CV, lo_C, hi_C, work_CV, place_CV)
    z_CV = logit_CV.sub_(logit_CV.mean(1, keepdim=True))
    square_CV = torch.mul(z_CV, z_CV, out=work_CV)
    m2_C, m4_C = square_CV.mean(1).double(), linalg.vecdot(square_CV, square_CV).double() / logit_CV.shape[1]
    m3_C = linalg.vecdot(square_CV, z_CV).double() / logit_CV.shape[1]
    moments = torch.stack([m2_C.sqrt(), m3_C / m2_C**1.5, m4_C / m2_C**2 - 3], dim=1).tolist()
    found: list[Logits | None] = []
    for i, known in enumerate(known_C.tolist()):
        std, skew, kurtosis = moments[i]
        histogram = Histogram(lo_C[i], hi_C[i], tuple(counts_CB[i].tolist()))
        shape = (skew, kurtosis) if std > 0 else (None, None)
        found.append(Logits(top[i], bottom[i], histogram, std, *shape) if known else None)
    return found


def _histograms(x_CV: Tensor, lo_C: list[float], hi_C: list[float], work_CV: Tensor, place_CV: Tensor) -> Tensor:
    """Of each row, the counts [C, BINS] in equal bins; as `describe.histogram`."""
    lo_C1, hi_C1 = (x_CV.new_tensor(ends)[:, None] for ends in (lo_C, hi_C))
    width_C1 = hi_C1 - lo_C1
    torch.sub(x_CV, lo_C1, out=work_CV).mul_(BINS / width_C1.clamp(min=1e-30))
    place_CV.copy_(work_CV).clamp_(max=BINS - 1).masked_fill_(width_C1 == 0, BINS - 1)
    place_CV += torch.arange(0, len(x_CV) * BINS, BINS, dtype=torch.int32, device=x_CV.device)[:, None]
    return torch.bincount(place_CV.view(-1), minlength=len(x_CV) * BINS).view(-1, BINS)


def _extremes(x_CV: Tensor, *, largest: bool) -> list[tuple[Weighted, ...]]:
    """The `TOKENS` largest or smallest of each row, the most extreme first; of equal ones the lowest id."""
    most = min(TOKENS, x_CV.shape[1])
    last_C = x_CV.topk(most, dim=1, largest=largest).values[:, -1]
    rows = []
    for x_V, last in zip(x_CV, last_C, strict=True):
        candidate_K = ((x_V >= last) if largest else (x_V <= last)).nonzero().squeeze(1)  # more if several equal it
        order_K = torch.sort(x_V[candidate_K], descending=largest, stable=True).indices[:most]
        ids, values = candidate_K[order_K].tolist(), x_V[candidate_K[order_K]].tolist()
        rows.append(tuple(map(Weighted, ids, values)))
    return rows


@torch.inference_mode()
def neighbours(
    layer: str, decoders: Mapping[str, Tensor], features: Sequence[int], near: Sequence[str]
) -> Iterator[tuple[Neighbour, ...]]:
    """Of each of `features` of `layer` in turn: the nearest by cosine of W_dec in each layer of `near`, nearest first.

    `decoders`: W_dec [F, D] of each layer. A direction of 0 is nobody's neighbour and has none.
    """
    unit = {name: _unit(decoders[name]) for name in {layer, *near}}
    zero = {name: rows_FD.abs().amax(1) == 0 for name, rows_FD in unit.items()}
    widest = max((unit[name] for name in near), key=len)
    for block in blocks(len(features), _at_once(widest)):
        chosen = list(features[block])
        found: list[list[Neighbour]] = [[] for _ in chosen]
        for name in near:
            cosine_CF = linear(unit[layer][chosen], unit[name])
            if name == layer:
                cosine_CF[range(len(chosen)), chosen] = -torch.inf
            cosine_CF[:, zero[name]] = -torch.inf
            values, indices = cosine_CF.topk(min(NEIGHBOURS, len(unit[name])), dim=1)
            for i, (cosines, ids) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
                pairs = sorted(zip(ids, cosines, strict=True), key=lambda pair: (-pair[1], pair[0]))
                found[i] += [Neighbour(name, j, cosine) for j, cosine in pairs if np.isfinite(cosine)]
        yield from (() if none else tuple(row) for row, none in zip(found, zero[layer][chosen].tolist(), strict=True))


def _at_once(rows_RD: Tensor) -> int:
    """Features of a block of products with so many rows."""
    return max(1, (_GPU_BYTES if rows_RD.is_cuda else _CPU_BYTES) // (4 * len(rows_RD)))


def _unit(W_FD: Tensor) -> Tensor:
    W_FD = W_FD.float()
    unit_FD: Tensor = W_FD / W_FD.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return unit_FD
