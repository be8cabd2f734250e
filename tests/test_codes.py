"""The autoencoder's products: dense, sparse and nominated in half precision are the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saezoo import codes
from saezoo.codes import (
    Code,
    Dense,
    Gradients,
    nominating_inputs,
    nominating_weights,
    sparse,
    sparse_nominated,
)

HALVES = [torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    """Random weights, inputs, and a gradient at the output."""

    x_BD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    grad_BD: Tensor
    l1_F: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Shapes from 1, densities from nothing to all, rows of zeros, features that never fire, outlying dimensions."""
    B, D, F = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x_BD = gaussian(B, D) * 10 ** draw(st.floats(-3, 3))
    x_BD[:, 0] *= draw(st.sampled_from([1.0, 300.0]))
    shift = draw(st.sampled_from([-1e9, -3.0, -1.0, 0.0, 3.0, 1e9])) * float(x_BD.norm(dim=1).mean())
    b_enc_F = gaussian(F) + shift
    if draw(st.booleans()):
        x_BD[draw(st.integers(0, B - 1))] = 0
    W_enc_FD = gaussian(F, D) * 10 ** draw(st.floats(-3, 3))
    if draw(st.booleans()):
        never = draw(st.integers(0, F - 1))
        W_enc_FD[never], b_enc_F[never] = 0, -1
    return Problem(x_BD, W_enc_FD, b_enc_F, gaussian(F, D), gaussian(B, D), gaussian(F).abs())


def ways(p: Problem, block: int) -> list[Code]:
    inputs = (p.x_BD, p.W_enc_FD, p.b_enc_F)
    whole = len(p.b_enc_F)
    return [Dense(*inputs, whole), Dense(*inputs, block), sparse(*inputs, block), sparse_nominated(*inputs, block)]


def by_autograd(p: Problem) -> tuple[Tensor, Gradients]:
    """The formula itself."""
    W_enc, b_enc, W_dec = (w.clone().requires_grad_() for w in (p.W_enc_FD, p.b_enc_F, p.W_dec_FD))
    f_BF = (p.x_BD @ W_enc.T + b_enc).relu()
    x_hat_BD = f_BF @ W_dec
    ((x_hat_BD * p.grad_BD).sum() + (f_BF @ p.l1_F).sum()).backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in (W_enc, b_enc, W_dec)]
    return x_hat_BD.detach(), Gradients(*gradients)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1e-300)


@settings(deadline=None, max_examples=200)
@given(problems(), st.integers(1, 50))
def test_every_way_is_the_formula_in_float64(p: Problem, block: int) -> None:
    x_hat_BD, wanted = by_autograd(p)
    f_BF = torch.addmm(p.b_enc_F, p.x_BD, p.W_enc_FD.T).relu()
    for code in ways(p, block):
        assert torch.equal(code.fires_F, (f_BF > 0).sum(0))
        assert close(code.sums_F, f_BF.sum(0), 1e-10)
        assert close(code.decode(p.W_dec_FD), x_hat_BD, 1e-10)
        feature_N, token_N = f_BF.T.nonzero(as_tuple=True)
        assert torch.equal(code.pairs().feature_N, feature_N) and torch.equal(code.pairs().token_N, token_N)
        assert torch.allclose(code.pairs().value_N, f_BF[token_N, feature_N], rtol=1e-8, atol=1e-300)
        for found, gradient in zip(code.gradients(p.grad_BD, p.W_dec_FD, p.l1_F), wanted, strict=True):
            assert close(found, gradient, 1e-10)


@settings(deadline=None, max_examples=100)
@given(problems(), st.integers(1, 50))
def test_every_way_agrees_in_float32(p: Problem, block: int) -> None:
    p = Problem(*(tensor.float() for tensor in p))
    pre_BF = torch.addmm(p.b_enc_F, p.x_BD, p.W_enc_FD.T)
    scale_BF = p.x_BD.norm(dim=1)[:, None] * p.W_enc_FD.norm(dim=1) + p.b_enc_F.abs()
    if bool(((pre_BF.abs() < 1e-5 * scale_BF) & (scale_BF > 0)).any()):
        return  # on the edge of firing, where rounding decides
    first, *others = ways(p, block)
    absolute = Problem(*map(Tensor.abs, p))
    most = in_float32(Dense(absolute.x_BD, absolute.W_enc_FD, absolute.b_enc_F, len(p.b_enc_F)), absolute)
    for code in others:
        assert torch.equal(code.fires_F, first.fires_F)
        for found, wanted, terms in zip(in_float32(code, p), in_float32(first, p), most, strict=True):
            assert float((found - wanted).abs().max()) <= 1e-5 * float(terms.max())


def in_float32(code: Code, p: Problem) -> list[Tensor]:
    """Everything that is summed. Of absolute values: what the terms of the sums come to where nothing cancels, so that
    rounding is a multiple of it; of a sum that nearly cancels it can be any multiple."""
    return [code.decode(p.W_dec_FD), *code.gradients(p.grad_BD, p.W_dec_FD, p.l1_F)]


@settings(deadline=None, max_examples=300)
@given(problems(), st.sampled_from(HALVES))
def test_no_active_pair_is_missed_by_the_nomination(p: Problem, dtype: torch.dtype) -> None:
    nominated_BF = nominating_inputs(p.x_BD, dtype) @ nominating_weights(p.W_enc_FD, p.b_enc_F, dtype).T > 0
    active_BF = torch.addmm(p.b_enc_F, p.x_BD, p.W_enc_FD.T) > 0
    assert not bool((active_BF & ~nominated_BF).any())


@pytest.mark.parametrize("dtype", HALVES)
def test_few_more_are_nominated_than_active(dtype: torch.dtype) -> None:
    """At GPT-2 small's width with 0.2 % active; in bfloat16 a little over twice as many."""
    random = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(512, 768, generator=random), torch.randn(2048, 768, generator=random) / 768**0.5
    bias_F = torch.full((2048,), -2.9)
    active = int((x_BD @ W_FD.T + bias_F > 0).sum())
    nominated = int((nominating_inputs(x_BD, dtype) @ nominating_weights(W_FD, bias_F, dtype).T > 0).sum())
    assert active < nominated < (2.5 if dtype == torch.bfloat16 else 1.15) * active


@pytest.mark.parametrize("dtype", HALVES)
def test_the_margin_covers_roundings_that_all_add_up(dtype: torch.dtype) -> None:
    """Every factor is half an ulp below the next representable number, against which the bias is balanced."""
    worst = 1 + 0.49 * torch.finfo(dtype).eps
    x_BD, W_FD = torch.full((1, 768), worst), torch.full((1, 768), worst)
    bias_F = torch.tensor([-float((x_BD @ W_FD.T).squeeze()) * (1 - 1e-6)])
    assert bool(nominating_inputs(x_BD, dtype) @ nominating_weights(W_FD, bias_F, dtype).T > 0)


def test_nothing_active() -> None:
    p = Problem(
        *(torch.ones(3, 4), torch.ones(5, 4), torch.full((5,), -9.0), torch.ones(5, 4)), torch.ones(3, 4), torch.ones(5)
    )
    for code in ways(p, 2):
        assert not code.fires_F.any() and not code.decode(p.W_dec_FD).any()
        assert not any(bool(gradient.any()) for gradient in code.gradients(p.grad_BD, p.W_dec_FD, p.l1_F))


def test_blocks_cover_everything_once() -> None:
    assert [(b.start, b.stop) for b in codes.blocks(10, 4)] == [(0, 4), (4, 8), (8, 10)]
