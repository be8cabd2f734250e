"""The autoencoder's products, exactly: everything after the encoder's needs only the active (token, feature) pairs.

Where f_bi = 0, ReLU passes no gradient and the L1 term none either, so decoding and all weight gradients are sums over
the pairs with f_bi > 0. `dense` and `sparse` give the same `Code`; the dense one is faster while most features fire.

With `half` the encoder's product is taken in bfloat16 (float16 on a GPU), and only *nominates* pairs: a bound on the
rounding errors is added within the product, so that no pair with f_bi > 0 can be missed. The nominated pairs are then
computed again in full precision, and those that are not above 0 dropped. So `half` changes speed, not results.

Shapes: B batch, D d_in, F d_sae, C features of one block, N pairs. Weights are [F, D] here: one row per feature.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot

from saezoo.products import linear

SPARSE_BLOCK = 2048
"""Features at once on a CPU: their products [2048, 4096] stay near the cores."""


class Gradients(NamedTuple):
    """Of the part of the loss that passes through f; b_dec's own is not in here."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor


class Pairs(NamedTuple):
    """The features above 0 of one batch, each [N]."""

    feature_N: Tensor
    token_N: Tensor
    value_N: Tensor


class Code(Protocol):
    """The activations f of one batch, in some form."""

    fires_F: Tensor
    """Tokens on which each feature is above 0, int64."""
    sums_F: Tensor
    """Sum over tokens of f."""

    def decode(self, W_dec_FD: Tensor) -> Tensor:
        """sum_i f_i W_dec_i [B, D], without b_dec."""

    def pairs(self) -> Pairs:
        """What is above 0, sorted by feature and then by token."""

    def per_token(self) -> tuple[Tensor, Tensor]:
        """(features above 0, int64; sum of the features) of each token [B]."""

    def fires_in(self, group_B: Tensor, groups: int) -> Tensor:
        """Tokens of each group on which each feature is above 0: [groups, F], int64. `group_B`: each token's group."""

    def gradients(self, grad_BD: Tensor, W_dec_FD: Tensor, l1_F: Tensor) -> Gradients:
        """Weight gradients, given that of x_hat [B, D] and of the L1 term with respect to each f_i > 0 [F]."""


class Dense:
    """f as a matrix [B, F], in blocks of features; recomputed for the gradients if there is more than one block."""

    def __init__(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, block: int) -> None:
        """`x_BD` is what the encoder multiplies: the input minus b_dec."""
        self._x_BD, self._W_enc_FD, self._b_enc_F = x_BD, W_enc_FD, b_enc_F
        self._block = block
        self._whole_BF = self._encode(slice(0, len(W_enc_FD))) if block >= len(W_enc_FD) else None
        # sign().sum(): the sum of booleans would hold a 64-bit integer for each pair.
        parts = [(f_BC.sign().sum(0).long(), f_BC.sum(0)) for _, f_BC in self._blocks()]
        self.fires_F, self.sums_F = (torch.cat(part) for part in zip(*parts, strict=True))

    def _encode(self, features: slice) -> Tensor:
        return linear(self._x_BD, self._W_enc_FD[features], self._b_enc_F[features]).relu_()

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for features in blocks(len(self._W_enc_FD), self._block):
            yield features, self._encode(features) if self._whole_BF is None else self._whole_BF

    def decode(self, W_dec_FD: Tensor) -> Tensor:
        """As `Code` says."""
        x_hat_BD = torch.zeros_like(self._x_BD)
        for features, f_BC in self._blocks():
            x_hat_BD += linear(f_BC, W_dec_FD[features].T)
        return x_hat_BD

    def pairs(self) -> Pairs:
        """As `Code` says."""
        found = []
        for features, f_BC in self._blocks():
            f_CB = f_BC.T
            feature_N, token_N = (f_CB > 0).nonzero(as_tuple=True)
            found.append((feature_N + features.start, token_N, f_CB[feature_N, token_N]))
        return Pairs(*(torch.cat(column) for column in zip(*found, strict=True)))

    def per_token(self) -> tuple[Tensor, Tensor]:
        """As `Code` says."""
        parts = [(f_BC.sign().sum(1).long(), f_BC.sum(1)) for _, f_BC in self._blocks()]
        above_B, sum_B = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return above_B, sum_B

    def fires_in(self, group_B: Tensor, groups: int) -> Tensor:
        """As `Code` says."""
        member_GB = one_hot(group_B, groups).T.to(self._x_BD.dtype)
        return torch.cat([(member_GB @ f_BC.sign()).long() for _, f_BC in self._blocks()], dim=1)

    def gradients(self, grad_BD: Tensor, W_dec_FD: Tensor, l1_F: Tensor) -> Gradients:
        """As `Code` says."""
        found = Gradients(*map(torch.empty_like, (self._W_enc_FD, self._b_enc_F, W_dec_FD)))
        for features, f_BC in self._blocks():
            found.W_dec_FD[features] = linear(f_BC.T, grad_BD.T)
            grad_BC = linear(grad_BD, W_dec_FD[features], l1_F[features])
            grad_BC.masked_fill_(f_BC == 0, 0)
            found.W_enc_FD[features] = linear(grad_BC.T, self._x_BD.T)
            torch.sum(grad_BC, 0, out=found.b_enc_F[features])
        return found


class Sparse:
    """f as its pairs, sorted by feature and, within a feature, by token."""

    def __init__(self, x_BD: Tensor, feature_N: Tensor, token_N: Tensor, value_N: Tensor, n_features: int) -> None:
        self._x_BD = x_BD
        self._feature_N, self._token_N, self._value_N = feature_N, token_N, value_N
        self.fires_F = torch.bincount(feature_N, minlength=n_features)
        self._ends_F1 = _ends(self.fires_F)
        self.sums_F = _segment_sums(value_N, self._ends_F1)

    def decode(self, W_dec_FD: Tensor) -> Tensor:
        """As `Code` says."""
        order_N = torch.sort(self._token_N, stable=True).indices
        ends_B1 = _ends(torch.bincount(self._token_N, minlength=len(self._x_BD)))
        return weighted_sums(W_dec_FD, self._feature_N[order_N], self._value_N[order_N], ends_B1)

    def pairs(self) -> Pairs:
        """As `Code` says."""
        return Pairs(self._feature_N, self._token_N, self._value_N)

    def per_token(self) -> tuple[Tensor, Tensor]:
        """As `Code` says."""
        above_B = torch.bincount(self._token_N, minlength=len(self._x_BD))
        sum_B = self._value_N.new_zeros(len(self._x_BD)).index_add_(0, self._token_N, self._value_N)
        return above_B, sum_B

    def fires_in(self, group_B: Tensor, groups: int) -> Tensor:
        """As `Code` says."""
        n = len(self.fires_F)
        return torch.bincount(group_B[self._token_N] * n + self._feature_N, minlength=groups * n).view(groups, n)

    def gradients(self, grad_BD: Tensor, W_dec_FD: Tensor, l1_F: Tensor) -> Gradients:
        """As `Code` says."""
        grad_N = sampled(W_dec_FD, grad_BD, self._ends_F1, self._token_N) + l1_F[self._feature_N]
        return Gradients(
            weighted_sums(self._x_BD, self._token_N, grad_N, self._ends_F1),
            _segment_sums(grad_N, self._ends_F1),
            weighted_sums(grad_BD, self._token_N, self._value_N, self._ends_F1),
        )


def of_features(x_BD: Tensor, parts: Iterable[Tensor]) -> Sparse:
    """The pairs above 0 of features [B, F] that were computed from x in some other way, given as parts of the batch."""
    found, first, n_features = [], 0, 0
    for f_BF in parts:
        token_N, feature_N = f_BF.nonzero(as_tuple=True)
        found.append((feature_N, token_N + first, f_BF[token_N, feature_N]))
        first, n_features = first + len(f_BF), f_BF.shape[1]
    feature_N, token_N, value_N = (torch.cat(part) for part in zip(*found, strict=True))
    order_N = torch.sort(feature_N, stable=True).indices
    return Sparse(x_BD, feature_N[order_N], token_N[order_N], value_N[order_N], n_features)


def sparse(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, block: int = SPARSE_BLOCK) -> Sparse:
    """The pairs with f_bi > 0, from the encoder's product in full precision."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for features in blocks(len(W_enc_FD), block):
        pre_CB = linear(in_rows(W_enc_FD[features]), x_BD).add_(b_enc_F[features, None])
        feature_N, token_N = (pre_CB > 0).nonzero(as_tuple=True)
        parts.append((feature_N + features.start, token_N, pre_CB[feature_N, token_N]))
    feature_N, token_N, value_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return Sparse(x_BD, feature_N, token_N, value_N, len(W_enc_FD))


def sparse_nominated(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, block: int = SPARSE_BLOCK) -> Sparse:
    """The same pairs, nominated by a product in half precision and decided in full precision."""
    dtype = torch.float16 if x_BD.is_cuda else torch.bfloat16
    x_BK = nominating_inputs(x_BD, dtype)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for features in blocks(len(W_enc_FD), block):
        W_CD = in_rows(W_enc_FD[features])
        W_CK = nominating_weights(W_CD, b_enc_F[features], dtype)
        feature_N, token_N = (W_CK @ x_BK.T > 0).nonzero(as_tuple=True)
        ends_C1 = _ends(torch.bincount(feature_N, minlength=len(W_CD)))
        feature_N += features.start
        value_N = sampled(W_CD, x_BD, ends_C1, token_N) + b_enc_F[feature_N]
        active_N = (value_N > 0).nonzero(as_tuple=True)[0]
        parts.append((feature_N[active_N], token_N[active_N], value_N[active_N]))
    feature_N, token_N, value_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return Sparse(x_BD, feature_N, token_N, value_N, len(W_enc_FD))


_STRIP = 64
_EXTRA = 8  # columns beyond D: margin, bias, and zeros, because products like a multiple of eight
_SMALL = 1e-4  # a row of a smaller norm is not divided by it but nominates all
_ALL = 2.0  # above any cosine


def nominating_inputs(x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D + 8]: x_b / |x_b|, the margin, 1 / |x_b|, zeros. The product with `nominating_weights` is
    cos(x_b, w_i) + margin + b_i / (|x_b| |w_i|), which has the sign of the pre-activation, but for the margin.

    The margin: each factor of the product is rounded by at most u = eps / 2 of itself, so the sum of D products is off
    by at most (2u + u^2) sum_d |x_d w_d| / (|x| |w|) <= 2u + u^2; 1.05 covers u^2, float32 summation and the margin's
    own rounding.
    """
    norm_B1 = x_BD.norm(dim=1, keepdim=True)
    small_B1 = norm_B1 < _SMALL
    out_BK = x_BD.new_zeros(len(x_BD), x_BD.shape[1] + _EXTRA, dtype=dtype)
    inverse_B1 = (1 / norm_B1).masked_fill(small_B1, 0)
    out_BK[:, :-_EXTRA] = x_BD * inverse_B1
    margin = 1.05 * torch.finfo(dtype).eps
    out_BK[:, -_EXTRA] = torch.where(small_B1, _ALL, margin)[:, 0]
    out_BK[:, 1 - _EXTRA] = inverse_B1[:, 0]
    return out_BK


def nominating_weights(W_enc_FD: Tensor, b_enc_F: Tensor, dtype: torch.dtype) -> Tensor:
    """[F, D + 8]: w_i / |w_i|, 1, b_i / |w_i| rounded up, zeros."""
    eps = torch.finfo(dtype).eps
    norm_F1 = W_enc_FD.norm(dim=1, keepdim=True)
    bias_F1 = b_enc_F[:, None] / norm_F1
    bias_F1 = bias_F1 + 2 * eps * bias_F1.abs()
    # Rows that cannot be scaled, and biases that the dtype cannot hold, nominate all.
    odd_F1 = (norm_F1 < _SMALL) | ~(bias_F1.abs() < 1e4)
    out_FK = W_enc_FD.new_zeros(len(W_enc_FD), W_enc_FD.shape[1] + _EXTRA, dtype=dtype)
    out_FK[:, :-_EXTRA] = W_enc_FD / norm_F1.masked_fill(odd_F1, float("inf"))
    out_FK[:, -_EXTRA] = torch.where(odd_F1, _ALL / eps, 1.0)[:, 0]
    out_FK[:, 1 - _EXTRA] = bias_F1.masked_fill(odd_F1, 0)[:, 0]
    return out_FK


def weighted_sums(rows_RD: Tensor, row_N: Tensor, weight_N: Tensor, ends_S1: Tensor) -> Tensor:
    """[S, D]: for each segment of N, the sum of weight * rows[row]."""
    if len(row_N) == 0:
        return rows_RD.new_zeros(len(ends_S1) - 1, rows_RD.shape[1])
    return embedding_bag(row_N, rows_RD, ends_S1, mode="sum", per_sample_weights=weight_N, include_last_offset=True)


def sampled(A_SD: Tensor, B_RD: Tensor, ends_S1: Tensor, row_N: Tensor) -> Tensor:
    """[N]: A[segment of n] . B[row_n], the product A B^T at the pairs only."""
    if len(row_N) == 0:
        return A_SD.new_zeros(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        size = (len(A_SD), len(B_RD))
        pattern = torch.sparse_csr_tensor(ends_S1, row_N, A_SD.new_zeros(len(row_N)), size, check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(pattern, A_SD, B_RD.T, beta=0)
    return product.values()


def in_rows(W_FD: Tensor) -> Tensor:
    """W with each row in one piece. A transposed view is copied in strips, which takes a third of the time of
    `contiguous`: what is read and written stays in the cache."""
    if W_FD.is_contiguous():
        return W_FD
    rows_FD = torch.empty_like(W_FD, memory_format=torch.contiguous_format)
    for columns in blocks(W_FD.shape[1], _STRIP):
        rows_FD[:, columns] = W_FD[:, columns]
    return rows_FD


def blocks(n: int, size: int) -> Iterator[slice]:
    """0..n in slices of at most `size`."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _ends(counts_S: Tensor) -> Tensor:
    """Segment boundaries [S + 1] of segments that long."""
    return torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])


def _segment_sums(value_N: Tensor, ends_S1: Tensor) -> Tensor:
    """[S]: the sum of each segment."""
    return torch.segment_reduce(value_N, "sum", offsets=ends_S1, initial=0)
