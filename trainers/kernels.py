# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of a training step on a GPU, first half: from activations to the pairs (token, feature) of a batch.

Each public function here and in `updates.py` is a few lines of PyTorch, without their memory. The pairs lie in storage
of fixed capacity: were its size to depend on the data, the host would have to wait for the GPU to learn it. A batch
that does not fit sets `frozen` to the number of its step; from then on no kernel changes the SAE (see `fused.py`).

Sums run in an order that depends on the pairs with f > 0 alone, not on what else was nominated nor on which program
was first: same weights and batch, same bits.

Shapes: B batch, D d_in, F d_sae, K = D + 8 (see `codes.py`), N pairs (the capacity), W words of 32 features; within
kernels, P pairs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo.codes import _ALL, _EXTRA, _SMALL

jit: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=["step"])


class Pairs:
    """The nominated pairs of one batch. Those of a token lie together, features ascending."""

    def __init__(self, batch: int, n_features: int, capacity: int, device: torch.device) -> None:
        """Storage for `capacity` pairs."""

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.cursor = empty(1, dtype=torch.int64)
        """Pairs nominated, whether they fit or not."""
        self.words_BW = empty(batch, -(-n_features // 32))
        self.start_B, self.count_B = empty(batch), empty(batch)
        self.feature_N = empty(capacity)
        self.value_N = empty(capacity, dtype=torch.float32)
        """f; 0 where a pair was nominated in vain."""
        self.slope_N = empty(capacity, dtype=torch.float32)
        """The loss's derivative by the pre-activation; 0 where f is."""
        wide = batch * n_features >= 2**31
        self.key_N = empty(capacity, dtype=torch.int64 if wide else torch.int32)
        """feature * B + token of the pairs with f > 0; elsewhere `none`."""
        self.none = torch.iinfo(self.key_N.dtype).max
        self.bounds_F1 = torch.arange(n_features + 1, dtype=self.key_N.dtype, device=device) * batch
        """Key of each feature's token 0."""


class Weights(NamedTuple):
    """What the SAE multiplies with."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    normalised: bool
    """Whether rows of W_dec count as if divided by their norms (and L1 is sum f), or not (and L1 is sum f norm)."""


def rows(d_in: int) -> dict[str, int]:
    """Launch options of kernels that handle rows of D: one warp, which needs no barriers, for each 1,024."""
    block = triton.next_power_of_2(d_in)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 1024)), "num_stages": 1}


def tiles(d_in: int, device: torch.device) -> dict[str, int]:
    """The same for several rows at a time. A warp's registers hold two [2, 1024] besides its own sums; the interpreter,
    on a CPU, takes its time by the tile."""
    return {"PAIRS": 2 if device.type == "cuda" else 8, **rows(d_in)}


def nominating(d_in: int) -> dict[str, Any]:
    """Constants of `codes.nominating_inputs` and `_weights`. With ALIGN their rows are written 8 bytes at a time."""
    return {"SMALL": _SMALL, "ALL": _ALL, "ALIGN": math.gcd(d_in + _EXTRA, 4)}


def scale_inputs(x_BD: Tensor, b_dec_D: Tensor, inputs_BD: Tensor, scaled_BK: Tensor) -> None:
    """inputs = x - b_dec; scaled = `codes.nominating_inputs(inputs)`, whose zeros must be there already."""
    B, D = x_BD.shape
    margin = 1.05 * torch.finfo(scaled_BK.dtype).eps
    _scale_inputs[(B,)](x_BD, b_dec_D, inputs_BD, scaled_BK, D, D + _EXTRA, MARGIN=margin, **nominating(D), **rows(D))


def compact(product_BF: Tensor, pairs: Pairs, frozen: Tensor, step: int) -> None:
    """List in `pairs` where `product` is above 0; a token whose pairs do not fit gets none, and freezes."""
    B, F = product_BF.shape
    W = pairs.words_BW.shape[1]
    pairs.cursor.zero_()
    pairs.key_N.fill_(pairs.none)
    _nominated_words[(B, triton.cdiv(W, 256))](product_BF, pairs.words_BW, F, W, BLOCK_W=256)
    where = (pairs.start_B, pairs.count_B, pairs.feature_N)
    block = triton.next_power_of_2(W)
    options = {"BLOCK_W": block, "num_warps": min(16, max(1, block // 256))}  # more words a thread do not fit
    _list_pairs[(B,)](pairs.words_BW, pairs.cursor, frozen, *where, step, len(pairs.feature_N), W, **options)


def decode(x_BD: Tensor, inputs_BD: Tensor, b_dec_D: Tensor, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """f = ReLU(inputs . W_enc + b_enc) of every pair, into `pairs`; x_hat = b_dec + sum f W_dec [B, D]; and for each
    token L1, and |x_hat - x|^2 / |x|^2 [2, B]."""
    B, D = x_BD.shape
    x_hat_BD, figures_2B = torch.empty_like(x_BD), x_BD.new_empty(2, B)
    known = (*weights[:-1], pairs.start_B, pairs.count_B, pairs.feature_N)
    found = (pairs.value_N, pairs.key_N, x_hat_BD, figures_2B)
    options = {"NORMALISED": weights.normalised, "NONE": pairs.none, **tiles(D, x_BD.device)}
    _decode[(B,)](x_BD, inputs_BD, b_dec_D, *known, *found, B, D, **options)
    return x_hat_BD, figures_2B


def slopes(grad_BD: Tensor, weights: Weights, pairs: Pairs, l1: float) -> None:
    """grad . W_dec + l1 of every pair with f > 0, else 0, into `pairs`."""
    B, D = grad_BD.shape
    known = (pairs.start_B, pairs.count_B, pairs.feature_N, pairs.value_N)
    options = {"NORMALISED": weights.normalised, **tiles(D, grad_BD.device)}
    _slopes[(B,)](grad_BD, weights.W_dec_FD, *known, pairs.slope_N, l1, D, **options)


@jit
def _scale_inputs(
    x,
    b_dec,
    inputs,
    scaled,
    D,
    K,
    MARGIN: tl.constexpr,
    SMALL: tl.constexpr,
    ALL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x_D = tl.load(x + token * D + d, mask=inside, other=0.0) - tl.load(b_dec + d, mask=inside, other=0.0)
    tl.store(inputs + token * D + d, x_D, mask=inside)
    norm = tl.sqrt(tl.sum(x_D * x_D, axis=0))
    small = norm < SMALL
    inverse = tl.where(small, 0.0, 1.0 / tl.where(small, 1.0, norm))
    half = scaled.dtype.element_ty
    to = scaled + tl.multiple_of(token * K, ALIGN)
    tl.store(to + d, (x_D * inverse).to(half), mask=inside)
    tl.store(to + D, tl.where(small, ALL, MARGIN).to(half))
    tl.store(to + D + 1, inverse.to(half))


@jit
def _nominated_words(product, words, F, W, BLOCK_W: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    word_W = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    bit = tl.arange(0, 32)
    feature = word_W[:, None] * 32 + bit[None, :]
    nominated = tl.load(product + token * F + feature, mask=feature < F, other=0.0) > 0
    tl.store(words + token * W + word_W, tl.sum(nominated.to(tl.int32) << bit[None, :], axis=1), mask=word_W < W)


@jit
def _ones(words_W):
    """Number of bits set in each; int64, because the interpreter refuses sums that wrap around."""
    twos_W = words_W - ((words_W >> 1) & 0x55555555)
    fours_W = (twos_W & 0x33333333) + ((twos_W >> 2) & 0x33333333)
    return ((((fours_W + (fours_W >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@jit
def _list_pairs(words, cursor, frozen, start, count, feature, step, capacity, W, BLOCK_W: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    word_W = tl.arange(0, BLOCK_W)
    left_W = tl.load(words + token * W + word_W, mask=word_W < W, other=0).to(tl.int64) & 0xFFFFFFFF
    ones_W = _ones(left_W)
    total = tl.sum(ones_W, axis=0)
    first = tl.atomic_add(cursor, total, sem="relaxed")
    fits = first + total <= capacity
    tl.store(frozen, step, mask=(first + total > capacity) & (tl.load(frozen) == 0))
    tl.store(start + token, tl.where(fits, first, 0).to(tl.int32))
    tl.store(count + token, tl.where(fits, total, 0).to(tl.int32))
    if fits:
        to_W = first + tl.cumsum(ones_W, axis=0) - ones_W
        for _ in range(0, tl.max(ones_W, axis=0).to(tl.int32)):
            some_W = left_W != 0
            lowest_W = left_W & (0 - left_W)
            # A power of two is its exponent as a float32.
            bit_W = (lowest_W.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(feature + to_W, word_W * 32 + bit_W, mask=some_W)
            to_W += some_W.to(tl.int64)
            left_W = left_W ^ lowest_W


@jit
def _norms(row_PD, active_P):
    """Of the rows; 1 of those that do not matter, by which one can divide."""
    return tl.where(active_P, tl.sqrt(tl.sum(row_PD * row_PD, axis=1)), 1.0)


@jit
def _decode(
    x,
    inputs,
    b_dec,
    W_enc,
    b_enc,
    W_dec,
    start,
    count,
    feature,
    value,
    key,
    x_hat,
    figures,
    B,
    D,
    NORMALISED: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    input_D = tl.load(inputs + token * D + d, mask=inside, other=0.0)
    sum_D = tl.load(b_dec + d, mask=inside, other=0.0)
    l1 = 0.0
    p = tl.arange(0, PAIRS)
    first = tl.load(start + token)
    end = first + tl.load(count + token)
    for n in range(first, end, PAIRS):
        real_P = n + p < end
        feature_P = tl.load(feature + n + p, mask=real_P, other=0).to(tl.int64)
        at_PD, real_PD = feature_P[:, None] * D + d[None, :], real_P[:, None] & inside[None, :]
        enc_PD = tl.load(W_enc + at_PD, mask=real_PD, other=0.0)
        dec_PD = tl.load(W_dec + at_PD, mask=real_PD, other=0.0)
        pre_P = tl.sum(enc_PD * input_D[None, :], axis=1) + tl.load(b_enc + feature_P, mask=real_P, other=0.0)
        active_P = real_P & (pre_P > 0)
        value_P = tl.where(active_P, pre_P, 0.0)
        norm_P = _norms(dec_PD, active_P)
        weight_P = value_P / norm_P if NORMALISED else value_P
        l1_P = value_P if NORMALISED else value_P * norm_P
        for i in tl.static_range(PAIRS):  # one after the other, so that one of weight 0 is as if it were not there
            weight = tl.sum(tl.where(p == i, weight_P, 0.0), axis=0)
            sum_D = tl.fma(weight, tl.sum(tl.where(p[:, None] == i, dec_PD, 0.0), axis=0), sum_D)
            l1 += tl.sum(tl.where(p == i, l1_P, 0.0), axis=0)
        tl.store(value + n + p, value_P, mask=real_P)
        key_P = tl.where(active_P, feature_P * B + token, NONE).to(key.dtype.element_ty)
        tl.store(key + n + p, key_P, mask=real_P)
    tl.store(x_hat + token * D + d, sum_D, mask=inside)
    x_D = tl.load(x + token * D + d, mask=inside, other=0.0)
    error_D = tl.where(inside, sum_D - x_D, 0.0)
    tl.store(figures + token, l1)
    tl.store(figures + B + token, tl.sum(error_D * error_D, axis=0) / tl.sum(x_D * x_D, axis=0))


@jit
def _slopes(
    grad,
    W_dec,
    start,
    count,
    feature,
    value,
    slope,
    l1,
    D,
    NORMALISED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    grad_D = tl.load(grad + token * D + d, mask=inside, other=0.0)
    first = tl.load(start + token)
    end = first + tl.load(count + token)
    for n in range(first, end, PAIRS):
        pair_P = n + tl.arange(0, PAIRS)
        real_P = pair_P < end
        feature_P = tl.load(feature + pair_P, mask=real_P, other=0).to(tl.int64)
        real_PD = real_P[:, None] & inside[None, :]
        dec_PD = tl.load(W_dec + feature_P[:, None] * D + d[None, :], mask=real_PD, other=0.0)
        active_P = tl.load(value + pair_P, mask=real_P, other=0.0) > 0
        norm_P = _norms(dec_PD, active_P)
        slope_P = tl.sum(dec_PD * grad_D[None, :], axis=1)
        slope_P = slope_P / norm_P + l1 if NORMALISED else slope_P + l1 * norm_P
        tl.store(slope + pair_P, tl.where(active_P, slope_P, 0.0), mask=real_P)
