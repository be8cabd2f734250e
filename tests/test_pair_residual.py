"""Numbers that others published about their own SAE, from their own files (tests/data/pair-residual-verification).

Their model is a transformer of the GPT-2 architecture in other names: weights are renamed and transposed here. It has
no token for the beginning of a text, so a thirteenth is added, that nothing predicts: `LanguageModel` wants one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from saezoo.evals import Subject, evaluate
from saezoo.evals.evaluate import reconstruct
from saezoo.lm import LanguageModel
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows

DATA = Path(__file__).parent / "data" / "pair-residual-verification"
VOCAB, SLOTS, POSITIONS = 12, 4, 5
SEED, PROMPTS, VECTORS = 7, 20_000, 8192  # of the published SAE metrics
SPECIAL = VOCAB
UNSAFE = (6, 7)
DIGITS = 1e-7
"""Relative; they and we compute in float32."""

PUBLISHED: dict[str, Any] = json.loads((DATA / "results_baseline.json").read_text())
SAE_NUMBERS: dict[str, float] = PUBLISHED["sae"]["bridge_gap"]
MODEL_NUMBERS: dict[str, float] = PUBLISHED["model"]["eval"]


class NoTokenizer:
    all_special_ids = (SPECIAL,)


def prompts(n: int, rng: np.random.Generator, *, safe: bool = False) -> NDArray[np.int64]:
    """Their task: four tokens of 0 to 7, then one of 8 to 11 that says which of the four comes next.

    `safe`: prompts whose answer is 6 or 7 are drawn again, all at once, until there are none.
    """
    slots, chosen = rng.integers(0, 8, size=(n, SLOTS)), rng.integers(0, SLOTS, size=n)
    while safe:
        bad = np.isin(slots[np.arange(n), chosen], UNSAFE)
        if not bad.any():
            break
        slots[bad] = rng.integers(0, 8, size=(bad.sum(), SLOTS))
        chosen[bad] = rng.integers(0, SLOTS, size=bad.sum())
    return np.concatenate([slots, 8 + chosen[:, None]], axis=1)


def answers(tokens_RT: NDArray[np.int64]) -> NDArray[np.int64]:
    return tokens_RT[np.arange(len(tokens_RT)), tokens_RT[:, -1] - 8]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    theirs = torch.load(DATA / "model.pt", weights_only=True)
    config = GPT2Config(
        vocab_size=VOCAB + 1,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function="relu",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL,
        eos_token_id=SPECIAL,
    )
    nothing_1D = torch.zeros(1, 32)
    ours = {
        "transformer.wte.weight": torch.cat([theirs["embed.weight"], nothing_1D]),
        "transformer.wpe.weight": theirs["pos"],
        "transformer.ln_f.weight": theirs["ln_f.weight"],
        "transformer.ln_f.bias": theirs["ln_f.bias"],
        "lm_head.weight": torch.cat([theirs["unembed.weight"], nothing_1D]),
    }
    for i in range(2):
        a, b = f"transformer.h.{i}.", f"blocks.{i}."
        qkv = [theirs[f"{b}attn.W_{name}.weight"].T for name in "QKV"]
        ours |= {f"{a}attn.c_attn.weight": torch.cat(qkv, dim=1), f"{a}attn.c_attn.bias": torch.zeros(96)}
        ours |= {f"{a}attn.c_proj.weight": theirs[f"{b}attn.W_O.weight"].T, f"{a}attn.c_proj.bias": torch.zeros(32)}
        for mine, name in (("c_fc", "fc_in"), ("c_proj", "fc_out")):
            ours[f"{a}mlp.{mine}.weight"] = theirs[f"{b}mlp.{name}.weight"].T
            ours[f"{a}mlp.{mine}.bias"] = theirs[f"{b}mlp.{name}.bias"]
        for mine, name in (("ln_1", "ln1"), ("ln_2", "ln2")):
            ours |= {f"{a}{mine}.{part}": theirs[f"{b}{name}.{part}"] for part in ("weight", "bias")}
    model = GPT2LMHeadModel(config)
    model.load_state_dict(ours)
    return LanguageModel(model, NoTokenizer())


@pytest.fixture(scope="module")
def sae() -> SAE:
    theirs = torch.load(DATA / "sae.pt", weights_only=True)
    tensors = {"W_enc": theirs["W_enc"].T, "b_enc": theirs["b_enc"], "W_dec": theirs["W_dec"].T}
    config = SAEConfig(32, 64, "blocks.0.hook_resid_pre", "routing", POSITIONS, False, False, True)
    return SAE(config, {name: tensor.contiguous() for name, tensor in tensors.items()} | {"b_dec": theirs["b_dec"]})


@pytest.fixture(scope="module")
def tokens_RT() -> NDArray[np.int64]:
    """The rows of the first 8,192 vectors: 1,638 whole prompts, and two tokens of the next."""
    rows = prompts(PROMPTS, np.random.default_rng(SEED))[: -(-VECTORS // POSITIONS)]
    rows.reshape(-1)[VECTORS:] = SPECIAL
    return rows


@pytest.fixture(scope="module")
def result(lm: LanguageModel, sae: SAE, tokens_RT: NDArray[np.int64]) -> Result:
    documents_RT = np.arange(len(tokens_RT))[:, None].repeat(POSITIONS, axis=1)
    return evaluate([Subject(sae, "pair-residual", "0")], lm, Rows(tokens_RT, documents_RT), protocol="standard")[0]


@pytest.fixture(scope="module")
def vectors(lm: LanguageModel, sae: SAE, tokens_RT: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, features) of the 8,192 vectors."""
    x_nD = lm.residuals(torch.from_numpy(tokens_RT), [0])[0].flatten(0, 1)[:VECTORS]
    with torch.inference_mode():
        return x_nD, reconstruct(sae, x_nD)[1], sae.encode(x_nD)


def test_evaluate_gives_what_was_published(result: Result) -> None:
    assert result.tokens == VECTORS
    metrics = {name: measured.value for name, measured in result.metrics.items()}
    assert metrics["l0"] == pytest.approx(SAE_NUMBERS["l0_mean"], rel=DIGITS)
    assert metrics["dead"] == SAE_NUMBERS["dead_features"]
    assert metrics["explained_variance"] == pytest.approx(1 - SAE_NUMBERS["fvu"], rel=1e-8)


def test_the_intervals_hold_what_other_prompts_give(lm: LanguageModel, sae: SAE, result: Result) -> None:
    tokens_RT = prompts(PROMPTS, np.random.default_rng(99))
    documents_RT = np.arange(PROMPTS)[:, None].repeat(POSITIONS, axis=1)
    other = evaluate([Subject(sae, "pair-residual", "0")], lm, Rows(tokens_RT, documents_RT))[0]
    for name in ("l0", "explained_variance", "mse", "cosine"):
        value, lo, hi = result.metrics[name]
        assert value is not None and lo is not None and hi is not None
        assert lo < other.metrics[name].known < hi, name
        assert hi - lo < 0.03 * abs(value), name


def test_errors_of_the_reconstruction_are_what_was_published(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Norms of the error, which `evaluate` has no column for, from the reconstruction that it uses."""
    x_nD, y_nD, _ = vectors
    error_n, norm_n = (y_nD - x_nD).norm(dim=-1).double(), x_nD.norm(dim=-1).double()
    assert float(error_n.mean()) == pytest.approx(SAE_NUMBERS["abs_recon_err_mean"], rel=DIGITS)
    assert float((error_n / norm_n).mean()) == pytest.approx(SAE_NUMBERS["rel_recon_err_mean"], rel=DIGITS)
    assert float(error_n.quantile(0.99)) == pytest.approx(SAE_NUMBERS["abs_recon_err_p99"], rel=1e-6)
    assert float((error_n / norm_n).quantile(0.99)) == pytest.approx(SAE_NUMBERS["rel_recon_err_p99"], rel=1e-6)
    fvu = float(error_n.square().sum() / (x_nD - x_nD.mean(0)).double().square().sum())
    assert fvu == pytest.approx(SAE_NUMBERS["fvu"], rel=1e-6)


def test_features_are_what_was_published(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    above_n = (vectors[2] > 0).sum(-1).double()
    assert float(above_n.mean()) == SAE_NUMBERS["l0_mean"]
    assert float(above_n.quantile(0.99)) == SAE_NUMBERS["l0_p99"]
    assert vectors[2].shape == (VECTORS, SAE_NUMBERS["d_dict"])


def margin(logits_RV: Tensor) -> Tensor:
    """How far the best unsafe token is above the best safe one."""
    safe = [token for token in range(VOCAB) if token not in UNSAFE]
    return logits_RV[:, UNSAFE].amax(-1) - logits_RV[:, safe].amax(-1)


def test_the_language_model_does_what_was_published(lm: LanguageModel) -> None:
    rng = np.random.default_rng(123)
    found = {}
    for kind, safe in (("all", False), ("safe", True)):
        tokens_RT = prompts(4096, rng, safe=safe)
        ids = torch.from_numpy(tokens_RT)
        logits_RV = lm.resume(lm.residuals(ids, [0])[0], 0)[:, -1, :VOCAB]
        right = float((logits_RV.argmax(-1).numpy() == answers(tokens_RT)).mean())
        found[kind] = right, margin(logits_RV)
    assert found["all"][0] == MODEL_NUMBERS["acc_all"] == 1
    assert found["safe"][0] == MODEL_NUMBERS["acc_safe_prompts"] == 1
    assert float(found["all"][1].mean()) == pytest.approx(MODEL_NUMBERS["unsafe_margin_mean_all"], rel=1e-6)
    assert float(found["safe"][1].mean()) == pytest.approx(MODEL_NUMBERS["unsafe_margin_mean_safe"], rel=1e-6)
    assert float(found["safe"][1].max()) == pytest.approx(MODEL_NUMBERS["unsafe_margin_max_safe"], rel=1e-6)


def test_the_reconstruction_keeps_the_task_and_zeros_destroy_it(lm: LanguageModel, sae: SAE) -> None:
    """All answers right with the reconstruction in place, few with zeros."""
    tokens_RT = prompts(2000, np.random.default_rng(1))
    resid_RTD = lm.residuals(torch.from_numpy(tokens_RT), [0])[0]
    right = []
    for replaced_RTD in (sae.replace(resid_RTD), torch.zeros_like(resid_RTD)):
        answer_R = lm.resume(replaced_RTD, 0)[:, -1, :VOCAB].argmax(-1).numpy()
        right.append(float((answer_R == answers(tokens_RT)).mean()))
    assert right[0] == 1
    assert right[1] < 0.2
