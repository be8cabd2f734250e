# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of a training step on a GPU, second half: from the pairs of a batch to new weights.

One program per feature sums over its pairs, and updates its rows at once: the gradient is never in memory. For that
the pairs are sorted by feature. See `kernels.py` for what is common to both halves.

Shapes: B batch, D d_in, F d_sae, K = D + 8 (see `codes.py`), N pairs (the capacity), S dead features, C blocks of
BLOCK pairs; within kernels, P pairs at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo.codes import _EXTRA
from saezoo.trainers.kernels import Pairs, Weights, jit, nominating, rows, tiles

BLOCK = 128
"""A feature with more pairs than this has blocks of as many summed by other programs: a feature that fires on every
token would otherwise keep one program busy for longer than all the others together."""


class Ghosts(NamedTuple):
    """Gradients of dead features."""

    row_F: Tensor
    """Row in the other tensors, int32; -1 of a feature that is not dead."""
    W_enc_SD: Tensor
    b_enc_S: Tensor
    W_dec_SD: Tensor


class Sums(NamedTuple):
    """What the weights' gradients are summed from, and what has been summed already."""

    pairs: Pairs
    inputs_BD: Tensor
    grad_BD: Tensor
    ghosts: Ghosts | None
    key_N: Tensor
    """Sorted, so by feature and then by token."""
    order_N: Tensor
    """Where each pair lies in `pairs`."""
    ends_F1: Tensor
    """Feature i's are ends[i] to ends[i + 1]."""
    blocks_2CD: Tensor
    """sum f grad and sum slope inputs of each block of BLOCK pairs, if they are of one feature; else nothing."""
    f_F: Tensor
    """sum f"""
    slope_F: Tensor
    """Sum of slopes, and of the ghosts' b_enc: the gradient of b_enc."""


class Adam(NamedTuple):
    """One step of torch.optim.Adam, as numbers."""

    step_size: float
    """lr / (1 - beta1^t)"""
    root: float
    """sqrt(1 - beta2^t)"""
    beta1: float
    beta2: float
    eps: float


Moments = tuple[Tensor, Tensor]
"""exp_avg and exp_avg_sq of one tensor."""


def add_up(pairs: Pairs, inputs_BD: Tensor, grad_BD: Tensor, ghosts: Ghosts | None) -> Sums:
    """Sort the pairs with f > 0 by feature and make all sums that several programs need. `pairs` holds a multiple of
    BLOCK."""
    B, D = inputs_BD.shape
    F, C = len(pairs.bounds_F1) - 1, len(pairs.key_N) // BLOCK
    key_N, order_N = torch.sort(pairs.key_N)
    ends_F1 = torch.searchsorted(key_N, pairs.bounds_F1, out_int32=True)
    blocks_2CD, sums_2F = inputs_BD.new_empty(2, C, D), inputs_BD.new_empty(2, F)
    weighing = (pairs.value_N, pairs.slope_N, grad_BD, inputs_BD)
    options = {"NONE": pairs.none, "BLOCK": BLOCK, **tiles(D, inputs_BD.device)}
    _sum_blocks[(C,)](key_N, order_N, *weighing, *blocks_2CD, B, D, **options)
    ghost = (pairs.start_B, inputs_BD) if ghosts is None else (ghosts.row_F, ghosts.b_enc_S)
    options = {"GHOSTS": ghosts is not None, "PAIRS": 64, "num_warps": 1}
    _sum_features[(F,)](order_N, ends_F1, *weighing[:2], *sums_2F, *ghost, **options)
    return Sums(pairs, inputs_BD, grad_BD, ghosts, key_N, order_N, ends_F1, blocks_2CD, *sums_2F)


def count(ends_F1: Tensor, since_F: Tensor, window_F: Tensor, frozen: Tensor) -> None:
    """For features with pairs: since = 0 and window += pairs; for the others since += 1."""
    F = len(since_F)
    _count[(triton.cdiv(F, 256),)](frozen, ends_F1, since_F, window_F, F, BLOCK_F=256)


def update_decoder(weights: Weights, moments: Moments, sums: Sums, adam: Adam, l1: float, frozen: Tensor) -> None:
    """Adam on W_dec; if rows count as normalised, from there, and without the gradient along them; else with L1's."""
    pairs, ghosts = sums.pairs, sums.ghosts
    (B, D), F = sums.grad_BD.shape, len(weights.b_enc_F)
    own = (weights.W_dec_FD, *moments)
    summed = (sums.key_N, sums.order_N, sums.ends_F1, pairs.value_N, sums.grad_BD, sums.blocks_2CD[0], sums.f_F)
    ghost = (sums.ends_F1, sums.f_F) if ghosts is None else (ghosts.row_F, ghosts.W_dec_SD)
    options = {"NORMALISED": weights.normalised, **_options(sums, adam)}
    _update_decoder[(F,)](frozen, *own, *summed, *ghost, l1, adam.step_size, adam.root, B, D, **options)


def update_encoder(
    weights: Weights, scaled_FK: Tensor, W_moments: Moments, b_moments: Moments, sums: Sums, adam: Adam, frozen: Tensor
) -> None:
    """Adam on W_enc and b_enc; scaled = `codes.nominating_weights` of the new ones, whose zeros must be there."""
    pairs, ghosts = sums.pairs, sums.ghosts
    (B, D), F = sums.inputs_BD.shape, len(weights.b_enc_F)
    own = (weights.W_enc_FD, *W_moments, weights.b_enc_F, *b_moments, scaled_FK)
    summed = (sums.key_N, sums.order_N, sums.ends_F1, pairs.slope_N, sums.inputs_BD, sums.blocks_2CD[1], sums.slope_F)
    ghost = (sums.ends_F1, sums.slope_F) if ghosts is None else (ghosts.row_F, ghosts.W_enc_SD)
    options = {"ULP": torch.finfo(scaled_FK.dtype).eps, **nominating(D), **_options(sums, adam)}
    _update_encoder[(F,)](frozen, *own, *summed, *ghost, adam.step_size, adam.root, B, D, D + _EXTRA, **options)


def update_bias(
    b_dec_D: Tensor, moments: Moments, output_D: Tensor, input_D: Tensor, adam: Adam, frozen: Tensor
) -> None:
    """Adam on b_dec, whose gradient is output - input."""
    D = len(b_dec_D)
    _update_bias[(1,)](
        frozen, b_dec_D, *moments, output_D, input_D, adam.step_size, adam.root, D, **_constants(adam), **rows(D)
    )


def _constants(adam: Adam) -> dict[str, float]:
    return {"BETA1": adam.beta1, "BETA2": adam.beta2, "EPS": adam.eps}


def _options(sums: Sums, adam: Adam) -> dict[str, Any]:
    D, device = sums.grad_BD.shape[1], sums.grad_BD.device
    return {"GHOSTS": sums.ghosts is not None, "BLOCK": BLOCK, **_constants(adam), **tiles(D, device)}


@jit
def _add_pairs(sum_D, first, end, zero, key, pair, weight, rows, D, d, inside, PAIRS: tl.constexpr):
    """Add weight * rows[token] of the ordered pairs first to end; `zero` is the key of their feature's token 0."""
    for n in range(first, end, PAIRS):
        n_P = n + tl.arange(0, PAIRS)
        real_P = n_P < end
        token_P = (tl.load(key + n_P, mask=real_P, other=0) - zero).to(tl.int64)
        weight_P = tl.load(weight + tl.load(pair + n_P, mask=real_P, other=0), mask=real_P, other=0.0)
        real_PD = real_P[:, None] & inside[None, :]
        row_PD = tl.load(rows + token_P[:, None] * D + d[None, :], mask=real_PD, other=0.0)
        sum_D += tl.sum(weight_P[:, None] * row_PD, axis=0)
    return sum_D


@jit
def _sum_feature(
    feature, key, pair, ends, weight, rows, blocks, B, D, d, inside, BLOCK: tl.constexpr, PAIRS: tl.constexpr
):
    """Sum of weight * rows[token] over all pairs of `feature`; whole blocks are there already."""
    first, end = tl.load(ends + feature), tl.load(ends + feature + 1)
    block, stop = tl.cdiv(first, BLOCK), end // BLOCK
    inner, outer = tl.where(block < stop, block * BLOCK, end), tl.where(block < stop, stop * BLOCK, end)
    sum_D = tl.zeros_like(d).to(tl.float32)
    sum_D = _add_pairs(sum_D, first, inner, feature * B, key, pair, weight, rows, D, d, inside, PAIRS)
    at_D = block.to(tl.int64) * D + d
    for _ in range(block, stop):
        sum_D += tl.load(blocks + at_D, mask=inside, other=0.0)
        at_D += D
    return _add_pairs(sum_D, outer, end, feature * B, key, pair, weight, rows, D, d, inside, PAIRS)


@jit
def _sum_blocks(
    key,
    pair,
    value,
    slope,
    grad,
    inputs,
    f_blocks,
    slope_blocks,
    B,
    D,
    NONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    lowest, highest = tl.load(key + first), tl.load(key + first + BLOCK - 1)
    feature = (lowest // B).to(tl.int64)
    if (highest != NONE) & ((highest // B).to(tl.int64) == feature):
        d = tl.arange(0, BLOCK_D)
        inside, at_D = d < D, block * D + d
        none_D, zero, end = tl.zeros_like(d).to(tl.float32), feature * B, first + BLOCK
        sum_D = _add_pairs(none_D, first, end, zero, key, pair, value, grad, D, d, inside, PAIRS)
        tl.store(f_blocks + at_D, sum_D, mask=inside)
        sum_D = _add_pairs(none_D, first, end, zero, key, pair, slope, inputs, D, d, inside, PAIRS)
        tl.store(slope_blocks + at_D, sum_D, mask=inside)


@jit
def _sum_features(
    pair, ends, value, slope, f_F, slope_F, ghost_row, ghost_b, GHOSTS: tl.constexpr, PAIRS: tl.constexpr
):
    feature = tl.program_id(0)
    first, end = tl.load(ends + feature), tl.load(ends + feature + 1)
    f_P, slope_P = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for n in range(first, end, PAIRS):
        n_P = n + tl.arange(0, PAIRS)
        real_P = n_P < end
        pair_P = tl.load(pair + n_P, mask=real_P, other=0)
        f_P += tl.load(value + pair_P, mask=real_P, other=0.0)
        slope_P += tl.load(slope + pair_P, mask=real_P, other=0.0)
    slopes = tl.sum(slope_P, axis=0)
    if GHOSTS:
        row = tl.load(ghost_row + feature)
        slopes += tl.load(ghost_b + row, mask=row >= 0, other=0.0)
    tl.store(f_F + feature, tl.sum(f_P, axis=0))
    tl.store(slope_F + feature, slopes)


@jit
def _count(frozen, ends, since, window, F, BLOCK_F: tl.constexpr):
    feature_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = (feature_F < F) & (tl.load(frozen) == 0)
    first_F = tl.load(ends + feature_F, mask=inside_F, other=0)
    fires_F = tl.load(ends + feature_F + 1, mask=inside_F, other=0) - first_F
    since_F = tl.load(since + feature_F, mask=inside_F, other=0)
    tl.store(since + feature_F, tl.where(fires_F > 0, 0, since_F + 1), mask=inside_F)
    fired_F = tl.load(window + feature_F, mask=inside_F, other=0)
    tl.store(window + feature_F, fired_F + fires_F, mask=inside_F)


@jit
def _adam(w, gradient, m, v, at, mask, step_size, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """The new w; moments are read and written."""
    m_new = tl.load(m + at, mask=mask, other=0.0)
    m_new += (gradient - m_new) * (1 - BETA1)
    v_new = tl.load(v + at, mask=mask, other=0.0) * BETA2 + gradient * gradient * (1 - BETA2)
    tl.store(m + at, m_new, mask=mask)
    tl.store(v + at, v_new, mask=mask)
    return w - step_size * m_new / (tl.sqrt(v_new) / root + EPS)


@jit
def _update_decoder(
    frozen,
    W_dec,
    m,
    v,
    key,
    pair,
    ends,
    value,
    grad,
    blocks,
    f_F,
    ghost_row,
    ghost_W,
    l1,
    step_size,
    root,
    B,
    D,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NORMALISED: tl.constexpr,
    GHOSTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    if tl.load(frozen) != 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside, at_D = d < D, feature * D + d
    gradient_D = _sum_feature(feature, key, pair, ends, value, grad, blocks, B, D, d, inside, BLOCK, PAIRS)
    if GHOSTS:
        row = tl.load(ghost_row + feature).to(tl.int64)
        gradient_D += tl.load(ghost_W + row * D + d, mask=inside & (row >= 0), other=0.0)
    w_D = tl.load(W_dec + at_D, mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(w_D * w_D, axis=0))
    if NORMALISED:
        w_D = w_D / norm
        gradient_D -= tl.sum(gradient_D * w_D, axis=0) * w_D
    else:
        gradient_D += l1 * tl.load(f_F + feature) / norm * w_D
    w_D = _adam(w_D, gradient_D, m, v, at_D, inside, step_size, root, BETA1, BETA2, EPS)
    tl.store(W_dec + at_D, w_D, mask=inside)


@jit
def _update_encoder(
    frozen,
    W_enc,
    m,
    v,
    b_enc,
    b_m,
    b_v,
    scaled,
    key,
    pair,
    ends,
    slope,
    inputs,
    blocks,
    slope_F,
    ghost_row,
    ghost_W,
    step_size,
    root,
    B,
    D,
    K,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ULP: tl.constexpr,
    SMALL: tl.constexpr,
    ALL: tl.constexpr,
    ALIGN: tl.constexpr,
    GHOSTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    if tl.load(frozen) != 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside, at_D = d < D, feature * D + d
    gradient_D = _sum_feature(feature, key, pair, ends, slope, inputs, blocks, B, D, d, inside, BLOCK, PAIRS)
    if GHOSTS:
        row = tl.load(ghost_row + feature).to(tl.int64)
        gradient_D += tl.load(ghost_W + row * D + d, mask=inside & (row >= 0), other=0.0)
    w_D = tl.load(W_enc + at_D, mask=inside, other=0.0)
    w_D = _adam(w_D, gradient_D, m, v, at_D, inside, step_size, root, BETA1, BETA2, EPS)
    tl.store(W_enc + at_D, w_D, mask=inside)
    b = tl.load(b_enc + feature)
    b = _adam(b, tl.load(slope_F + feature), b_m, b_v, feature, feature >= 0, step_size, root, BETA1, BETA2, EPS)
    tl.store(b_enc + feature, b)
    norm = tl.sqrt(tl.sum(w_D * w_D, axis=0))
    bias = b / tl.where(norm < SMALL, 1.0, norm)
    bias += 2 * ULP * tl.abs(bias)
    plain = (norm >= SMALL) & (tl.abs(bias) < 1e4)
    half = scaled.dtype.element_ty
    to = scaled + tl.multiple_of(feature * K, ALIGN)
    tl.store(to + d, tl.where(plain, w_D / tl.where(plain, norm, 1.0), 0.0).to(half), mask=inside)
    tl.store(to + D, tl.where(plain, 1.0, ALL / ULP).to(half))
    tl.store(to + D + 1, tl.where(plain, bias, 0.0).to(half))


@jit
def _update_bias(
    frozen,
    b_dec,
    m,
    v,
    output,
    input,
    step_size,
    root,
    D,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    inside = (d < D) & (tl.load(frozen) == 0)
    gradient_D = tl.load(output + d, mask=inside, other=0.0) - tl.load(input + d, mask=inside, other=0.0)
    b_D = tl.load(b_dec + d, mask=inside, other=0.0)
    b_D = _adam(b_D, gradient_D, m, v, d, inside, step_size, root, BETA1, BETA2, EPS)
    tl.store(b_dec + d, b_D, mask=inside)
