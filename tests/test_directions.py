"""Logits and neighbours: against TransformerLens' own unembedding, and against plain float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_compare import random_sae

from saezoo.features import directions
from saezoo.features.directions import logits, neighbours, unembedding
from saezoo.hooked import hooked_model
from saezoo.lm import LanguageModel, load_language_model


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    lm = load_language_model(tiny_model_folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lm.hf_model.transformer.ln_f.weight.uniform_(0.5, 2.0)
    return lm


def test_the_unembedding_is_that_of_transformer_lens(lm: LanguageModel) -> None:
    theirs = hooked_model(lm.hf_model, lm.tokenizer).W_U
    assert torch.allclose(unembedding(lm), theirs, atol=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 1 << 30])
def test_logits(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(directions, "_CPU_BYTES", block_bytes)
    W_dec_FD, W_U_DV, chosen = random_sae(0).W_dec.clone(), unembedding(lm), [0, 3, 39]
    W_dec_FD[3] = 0
    found = list(logits(W_dec_FD, W_U_DV, chosen))
    assert len(found) == 3 and found[1] is None
    for i, feature in ((0, found[0]), (39, found[2])):
        assert feature is not None
        wanted_V = (W_dec_FD[i].double() @ W_U_DV.double()).numpy()
        order_V = np.argsort(-wanted_V)
        assert [w.token for w in feature.promoted] == order_V[:10].tolist()
        assert [w.token for w in feature.suppressed] == order_V[::-1][:10].tolist()
        assert [w.logit for w in feature.promoted] == pytest.approx(wanted_V[order_V[:10]], rel=1e-4)
        assert [w.logit for w in feature.suppressed] == pytest.approx(wanted_V[order_V[::-1][:10]], rel=1e-4)
        assert feature.std == pytest.approx(wanted_V.std(), rel=1e-5)
        assert feature.skew == pytest.approx(stats.skew(wanted_V), rel=1e-3, abs=1e-4)
        assert feature.kurtosis == pytest.approx(stats.kurtosis(wanted_V), rel=1e-3, abs=1e-4)
        counts, edges = np.histogram(wanted_V, bins=50)
        assert sum(feature.histogram.counts) == lm.vocab
        assert np.abs(np.array(feature.histogram.counts) - counts).sum() <= 4  # float32 may cross an edge
        assert (feature.histogram.lo, feature.histogram.hi) == pytest.approx((edges[0], edges[-1]), rel=1e-5)


def test_equal_logits_go_to_the_lower_token() -> None:
    W_U_DV = torch.zeros(2, 30)
    W_U_DV[0, 5:25] = 1
    (found,) = logits(torch.tensor([[2.0, 0.0]]), W_U_DV, [0])
    assert found is not None
    assert [w.token for w in found.promoted] == list(range(5, 15))
    assert [w.token for w in found.suppressed] == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]


@pytest.mark.parametrize("block_bytes", [1, 1 << 30])
def test_neighbours(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(directions, "_CPU_BYTES", block_bytes)
    decoders = {str(i): random_sae(i, 30 + i).W_dec.clone() for i in range(3)}
    decoders["1"][4] = decoders["2"][7] = 0
    chosen = [0, 4, 30]
    found = list(neighbours("1", decoders, chosen, ["0", "1", "2"]))
    assert found[1] == ()
    for feature, near in zip((0, 30), (found[0], found[2]), strict=True):
        assert [n.layer for n in near] == ["0"] * 5 + ["1"] * 5 + ["2"] * 5
        for layer in "012":
            W_FD = decoders[layer].double().numpy()
            own_D = decoders["1"][feature].double().numpy()
            norms_F = np.linalg.norm(W_FD, axis=1)
            cosine_F = np.where(norms_F > 0, W_FD @ own_D / np.maximum(norms_F, 1e-9), -np.inf) / np.linalg.norm(own_D)
            if layer == "1":
                cosine_F[feature] = -np.inf
            wanted = np.argsort(-cosine_F)[:5]
            theirs = [n for n in near if n.layer == layer]
            assert [n.feature for n in theirs] == wanted.tolist()
            assert [n.cosine for n in theirs] == pytest.approx(cosine_F[wanted], abs=1e-6)


def test_equally_near_is_the_lower_number() -> None:
    W_FD = torch.eye(3).repeat(4, 1)
    (near,) = neighbours("a", {"a": W_FD}, [4], ["a"])
    assert [(n.feature, n.cosine) for n in near][:3] == [(1, 1.0), (7, 1.0), (10, 1.0)]
