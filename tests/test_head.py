"""Cross-entropy and KL in tiles of the vocabulary: the same as from whole logits, whatever the numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear
from transformers import GPT2Config, GPT2LMHeadModel

from saezoo import products
from saezoo.evals import head as head_module
from saezoo.evals.head import Head
from saezoo.lm import LanguageModel


def model(vocab: int, dtype: torch.dtype = torch.float64, product: torch.dtype | None = None) -> LanguageModel:
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": vocab}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(dtype)
        hf_model.lm_head.weight.data.mul_(50).sub_(3)  # logits of some size, and far from 0, as GPT-2's are
    return LanguageModel(hf_model, SimpleNamespace(all_special_ids=[0]), product)


def residuals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    clean_nD = torch.randn(n, 8, generator=random, dtype=torch.float64)
    return clean_nD, clean_nD + torch.randn(n, 8, generator=random, dtype=torch.float64)


@given(n=st.integers(1, 40), vocab=st.integers(2, 700), tile=st.integers(1, 4000), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_as_from_whole_logits(n: int, vocab: int, tile: int, seed: int) -> None:
    lm = model(vocab)
    clean_nD, changed_nD = residuals(n, seed)
    target_n = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(head_module, "_CPU_TILE", tile)
        head = Head(lm)
        clean = head.clean(clean_nD)
        h_nD, lse_n = head.changed(changed_nD, clean)
        found = [head.cross_entropy(clean.h_nD, clean.lse_n, target_n), head.cross_entropy(h_nD, lse_n, target_n)]
        kl_n = head.kl(clean, h_nD, lse_n)
        logits, changed = lm.logits(clean_nD), lm.logits(changed_nD)
    torch.testing.assert_close(found[0], cross_entropy(logits, target_n, reduction="none"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], cross_entropy(changed, target_n, reduction="none"), rtol=1e-10, atol=1e-10)
    wanted_n = kl_div(changed.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_n, wanted_n, rtol=1e-9, atol=1e-10)


def test_nothing_changed_is_no_divergence_at_all() -> None:
    head = Head(model(300, torch.float32))
    clean = head.clean(residuals(20, 0)[0].float())
    assert float(head.kl(clean, clean.h_nD, clean.lse_n).abs().max()) == 0


@pytest.mark.parametrize("gain", [1e-3, 1.0, 300.0, 1e5])
def test_a_changed_run_far_from_the_clean_one(gain: float) -> None:
    """float32 holds no exponential above 88 or below -103: sums that overflow or vanish are taken again."""
    lm = model(300, torch.float32)
    head = Head(lm)
    clean_nD, changed_nD = (x.float() for x in residuals(30, 1))
    clean = head.clean(clean_nD)
    lm.hf_model.transformer.ln_f.weight.data.mul_(gain)
    h_nD, lse_n = head.changed(changed_nD, clean)
    u_VD = lm.hf_model.lm_head.weight.double()
    wanted_n = (h_nD.double() @ (u_VD - u_VD.mean(0)).T).logsumexp(1)
    torch.testing.assert_close(lse_n, wanted_n, rtol=1e-6, atol=1e-5)


def test_a_residual_that_is_not_finite_ends() -> None:
    head = Head(model(300, torch.float32))
    clean = head.clean(torch.ones(3, 8))
    _, lse_n = head.changed(torch.full((3, 8), torch.inf), clean)
    assert not lse_n.isfinite().any()


def test_a_constant_residual() -> None:
    lm = model(50)
    head = Head(lm)
    vector_D = residuals(1, 2)[0][0]
    constant = head.constant(vector_D)
    torch.testing.assert_close(constant.log_p_V, lm.logits(vector_D).log_softmax(-1))
    clean = head.clean(vector_D[None])
    torch.testing.assert_close(constant.lse_1, clean.lse_n)


def test_half_precision_is_near(tile: int = 512) -> None:
    """bfloat16 products, all else in float32: the loss of a single token within a hundredth."""
    exact, half = Head(model(700, torch.float32)), Head(model(700, torch.float32, torch.bfloat16))
    clean_nD, changed_nD = (x.float() for x in residuals(200, 3))
    target_n = torch.arange(200)
    losses = []
    for head in (exact, half):
        clean = head.clean(clean_nD)
        h_nD, lse_n = head.changed(changed_nD, clean)
        losses.append((head.cross_entropy(h_nD, lse_n, target_n), head.kl(clean, h_nD, lse_n)))
    for wanted_n, found_n in zip(*losses, strict=True):
        assert float((wanted_n - found_n).abs().max()) < 0.05
        assert abs(float((wanted_n - found_n).mean())) < 0.005
        assert not torch.equal(wanted_n, found_n)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=random) for s in (shape, (5, 4), (5,)))
    for weight in (W, W.T.contiguous().T):
        found, wanted = (f(x, weight, b if bias else None) for f in (products.linear, linear))
        torch.testing.assert_close(found, wanted)
        assert found.shape == wanted.shape


def test_products_on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever library is taken."""
    x, W = torch.randn(7, 16), torch.randn(9, 16)
    for faster in (True, False):
        monkeypatch.setattr(products, "onednn_is_faster", lambda answer=faster: answer)
        torch.testing.assert_close(products.linear(x, W), x @ W.T)
