"""The evaluation against SAELens 6.54.12 and the evaluation of February 2024 (tests/golden/saelens_eval.*)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from saezoo.entries import Protocol
from saezoo.evals import Subject, evaluate
from saezoo.evals.head import Head
from saezoo.lm import LanguageModel
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows

GOLDEN = Path(__file__).parent / "golden"
BOS, DEPTH = 511, 2
CONFIG = SAEConfig(
    d_in=64,
    d_sae=256,
    hook="blocks.2.hook_resid_pre",
    model_name=None,
    context_size=128,
    prepend_bos=True,
    centre=True,
    apply_b_dec_to_input=True,
)
DTYPES = {"f32": torch.float32, "f64": torch.float64}
MASKS: dict[Protocol, str] = {"feb2024": "all_tokens", "standard": "no_bos"}
SAELENS_NAMES = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "ce_score": "ce_loss_score",
    "kl_sae": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
    "kl_score": "kl_div_score",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cosine": "cossim",
    "norm_in": "l2_norm_in",
    "norm_out": "l2_norm_out",
    "norm_ratio": "l2_ratio",
    "l0": "l0",
    "l1": "l1",
}


class Setup(NamedTuple):
    """The golden model, SAE and rows in one precision."""

    precision: str
    lm: LanguageModel
    sae: SAE
    rows: Rows

    @property
    def tokens(self) -> Tensor:
        return torch.from_numpy(self.rows.tokens_RT)

    def evaluate(self, protocol: Protocol, **config: Any) -> Result:
        sae = SAE(replace(self.sae.config, **config), dict(self.sae.named_parameters()))
        return evaluate([Subject(sae, "golden", "2")], self.lm, self.rows, protocol=protocol, batch_size=3)[0]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "saelens_eval.safetensors")


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "saelens_eval.json").read_text())
    return found


@pytest.fixture(scope="module", params=["f32", "f64"])
def setup(request: pytest.FixtureRequest, tensors: dict[str, Tensor]) -> Setup:
    return build(request.param, tensors)


@pytest.fixture(scope="module")
def exact(tensors: dict[str, Tensor]) -> Setup:
    """In float64."""
    return build("f64", tensors)


def build(precision: str, tensors: dict[str, Tensor]) -> Setup:
    dtype = DTYPES[precision]
    model: Any = GPT2LMHeadModel
    hf_model = model.from_pretrained(GOLDEN / "saelens_eval_model", dtype=dtype, attn_implementation="sdpa")
    words = {str(i): i for i in range(BOS)} | {"<bos>": BOS}
    tokenizer: Any = FastTokenizer
    lm = LanguageModel(hf_model, tokenizer(tokenizer_object=Tokenizer(WordLevel(words, "0")), bos_token="<bos>"))
    weights = load_file(GOLDEN / "saelens_eval_sae.safetensors")
    sae = SAE(CONFIG, {name: tensor.to(dtype) for name, tensor in weights.items()})
    tokens_RT = tensors["tokens"].long().numpy()
    return Setup(precision, lm, sae, Rows(tokens_RT, (tokens_RT == BOS).cumsum().reshape(tokens_RT.shape)))


def saelens(numbers: dict[str, Any], mask: str, precision: str) -> dict[str, float]:
    groups = numbers["saelens"][mask][precision].values()
    return {name: value for group in groups for name, value in group.items()}


@pytest.fixture(scope="module", params=["feb2024", "standard"])
def result(request: pytest.FixtureRequest, setup: Setup) -> Result:
    return setup.evaluate(request.param)


@pytest.mark.parametrize("ours, theirs", SAELENS_NAMES.items())
def test_metrics_are_those_of_saelens(
    numbers: dict[str, Any], setup: Setup, result: Result, ours: str, theirs: str
) -> None:
    wanted = saelens(numbers, MASKS[result.protocol], setup.precision)[theirs]  # type: ignore[index]
    tolerance = 1e-6 if ours == "l0" else 1e-5 if setup.precision == "f32" else 1e-10
    assert result.metrics[ours].value == pytest.approx(wanted, rel=tolerance)


def test_uncentred_explained_variance_is_that_of_2024(numbers: dict[str, Any], setup: Setup, result: Result) -> None:
    independent = numbers["independent_float64"][MASKS[result.protocol]]  # type: ignore[index]
    tolerance = 1e-5 if setup.precision == "f32" else 1e-10
    wanted = independent["feb2024_explained_variance_uncentred"]
    assert result.metrics["explained_variance_uncentred"].value == pytest.approx(wanted, rel=tolerance)


def test_feb2024_protocol_gives_the_historical_numbers(numbers: dict[str, Any], setup: Setup) -> None:
    found = setup.evaluate("feb2024").metrics
    wanted = numbers["historical_98e4f1b_float32"]
    names = {
        "ce_score": "CE_loss_score",
        "ce_clean": "ce_loss_without_sae",
        "ce_sae": "ce_loss_with_sae",
        "ce_zero": "ce_loss_with_ablation",
        "norm_out": "l2_norm",
        "norm_ratio": "l2_ratio",
        "l0": "l0",
        "explained_variance_uncentred": "explained_variance_uncentred",
    }
    for ours, theirs in names.items():
        assert found[ours].value == pytest.approx(wanted[theirs], rel=1e-5), ours


def test_tokens_and_features_counted(numbers: dict[str, Any], tensors: dict[str, Tensor], result: Result) -> None:
    assert result.tokens == (1152 if result.protocol == "feb2024" else 1152 - numbers["n_bos_tokens"])
    density_F = tensors[f"{MASKS[result.protocol]}.f32.featurewise.feature_density"]  # type: ignore[index]
    assert result.metrics["dead"].value == len(numbers["designed_features"]["dead"]) == 16
    assert result.metrics["dense_10"].value == len(numbers["designed_features"]["dense"]) == 10
    assert result.metrics["dense_100"].value == int((density_F > 0.01).sum())
    assert result.metrics["alive_fraction"].value == 240 / 256


def test_density_histogram(tensors: dict[str, Tensor], result: Result) -> None:
    density_F = tensors[f"{MASKS[result.protocol]}.f64.featurewise.feature_density"].double()  # type: ignore[index]
    edges = result.histogram["edges"]
    log_density = density_F[density_F > 0].log10().float()
    assert result.histogram["never"] == int((density_F == 0).sum())
    for low, high, count in zip(edges[:-1], edges[1:], result.histogram["counts"], strict=True):
        last = high == edges[-1]
        assert count == int(((log_density >= low) & ((log_density < high) | last)).sum())


def test_feature_densities(tensors: dict[str, Tensor], numbers: dict[str, Any], setup: Setup) -> None:
    """Feature by feature, over all tokens and over those that are not BOS."""
    f_RTF = setup.sae.encode(setup.lm.residuals(setup.tokens, [DEPTH])[DEPTH])
    for mask, scored_RT in (("all_tokens", setup.tokens >= 0), ("no_bos", setup.tokens != BOS)):
        density_F = (f_RTF[scored_RT] > 0).double().mean(0)
        wanted_F = tensors[f"{mask}.{setup.precision}.featurewise.feature_density"].double()
        torch.testing.assert_close(density_F, wanted_F, rtol=1e-6, atol=1e-6)
        assert (density_F == 0).nonzero().flatten().tolist() == numbers["designed_features"]["dead"]
        assert (density_F > 0.1).nonzero().flatten().tolist() == numbers["designed_features"]["dense"]


def test_activations_features_and_reconstructions(tensors: dict[str, Tensor], setup: Setup) -> None:
    resid_RTD = setup.lm.residuals(setup.tokens, [DEPTH])[DEPTH]
    x_RTD = resid_RTD - resid_RTD.mean(-1, keepdim=True)
    f_RTF = setup.sae.encode(resid_RTD)
    for name, found in (("x", x_RTD), ("feature_acts", f_RTF), ("x_hat", setup.sae.decode(f_RTF))):
        assert float((found - tensors[f"f32.{name}"]).abs().max()) < 1e-4, name
    assert torch.equal(f_RTF > 0, tensors["f32.feature_acts"] > 0)


def losses(setup: Setup, resid_RTD: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL [R, T] of a changed residual at DEPTH; at the last position, the first is of no meaning."""
    lm, tokens = setup.lm, setup.tokens
    head = Head(lm)
    clean = head.clean(lm.residuals(tokens, [lm.n_layers])[lm.n_layers].flatten(0, 1))
    h_nD, lse_n = head.changed(lm.run(resid_RTD, DEPTH, lm.n_layers).flatten(0, 1), clean)
    ce_n = head.cross_entropy(h_nD, lse_n, tokens.roll(-1, dims=1).flatten())
    return ce_n.view_as(tokens), head.kl(clean, h_nD, lse_n).view_as(tokens)


@pytest.mark.parametrize("protocol", ["feb2024", "standard"])
def test_losses_of_every_token(tensors: dict[str, Tensor], setup: Setup, protocol: Protocol) -> None:
    resid_RTD = setup.lm.residuals(setup.tokens, [DEPTH])[DEPTH]
    keep_RT = setup.tokens == BOS if protocol == "standard" else None
    ce_RT, kl_RT = losses(setup, setup.sae.replace(resid_RTD, keep_BT=keep_RT))
    tolerance = 1e-4 if setup.precision == "f32" else 1e-10
    for name, value_RT in (("ce_loss_with_sae", ce_RT[:, :-1]), ("kl_div_with_sae", kl_RT)):
        wanted_RT = tensors[f"{MASKS[protocol]}.{setup.precision}.per_token.{name}"]
        assert float((value_RT - wanted_RT).abs().max()) < tolerance, name


def test_losses_of_every_token_without_the_sae(tensors: dict[str, Tensor], setup: Setup) -> None:
    resid_RTD = setup.lm.residuals(setup.tokens, [DEPTH])[DEPTH]
    (clean_RT, _), (zero_RT, kl_RT) = losses(setup, resid_RTD), losses(setup, torch.zeros_like(resid_RTD))
    found = {
        "ce_loss_without_sae": clean_RT[:, :-1],
        "ce_loss_with_ablation": zero_RT[:, :-1],
        "kl_div_with_ablation": kl_RT,
    }
    for name, value_RT in found.items():
        wanted_RT = tensors[f"all_tokens.{setup.precision}.per_token.{name}"]
        assert float((value_RT - wanted_RT).abs().max()) < (1e-4 if setup.precision == "f32" else 1e-10), name


@pytest.fixture(scope="module")
def mistakes(numbers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What typical mistakes give: numbers that the tests above must not have come near."""
    found: dict[str, dict[str, float]] = numbers["negative_controls_float64"]
    return found


def test_centring_forgotten(exact: Setup, mistakes: dict[str, dict[str, float]]) -> None:
    wanted = mistakes["centring_forgotten"]
    raw = exact.evaluate("feb2024", centre=False).metrics
    assert raw["ce_sae"].value == pytest.approx(wanted["ce_loss_with_sae_all"], rel=1e-10)
    assert raw["explained_variance"].value == pytest.approx(wanted["explained_variance_all"], rel=1e-10)
    assert raw["l0"].value == pytest.approx(wanted["l0_all"], rel=1e-10)
    without_bos = exact.evaluate("standard", centre=False).metrics["explained_variance"].value
    assert without_bos == pytest.approx(wanted["explained_variance_no_bos"], rel=1e-10)


def test_b_dec_not_subtracted_from_the_input(exact: Setup, mistakes: dict[str, dict[str, float]]) -> None:
    wanted = mistakes["b_dec_not_subtracted_from_input"]
    found = exact.evaluate("feb2024", apply_b_dec_to_input=False).metrics
    assert found["mse"].value == pytest.approx(wanted["mse_all"], rel=1e-10)
    assert found["ce_sae"].value == pytest.approx(wanted["ce_loss_with_sae_all"], rel=1e-10)


def test_decoder_rows_renormalised(exact: Setup, mistakes: dict[str, dict[str, float]]) -> None:
    wanted, sae = mistakes["W_dec_rows_renormalised"], exact.sae
    W_dec = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    wrong = exact._replace(sae=SAE(CONFIG, {**dict(sae.named_parameters()), "W_dec": W_dec}))
    found = wrong.evaluate("feb2024").metrics
    assert found["mse"].value == pytest.approx(wanted["mse_all"], rel=1e-10)
    assert found["ce_sae"].value == pytest.approx(wanted["ce_loss_with_sae_all"], rel=1e-10)


def test_bos_replaced_but_not_scored(exact: Setup, mistakes: dict[str, dict[str, float]]) -> None:
    ce_RT, _ = losses(exact, exact.sae.replace(exact.lm.residuals(exact.tokens, [DEPTH])[DEPTH]))
    mean = float(ce_RT[:, :-1][exact.tokens[:, :-1] != BOS].mean())
    wanted = mistakes["bos_replaced_too_but_not_scored (no_bos masks)"]["ce_loss_with_sae"]
    assert mean == pytest.approx(wanted, rel=1e-10)
    assert exact.evaluate("standard").metrics["ce_sae"].known < mean - 5e-5


def test_raw_and_centred_activations_give_the_same_cross_entropy(exact: Setup) -> None:
    """What the SAE takes off, it puts back, and every reader is a layer norm: so neither frame is wrong."""
    raw_RTD = exact.lm.residuals(exact.tokens, [DEPTH])[DEPTH]
    centred_RTD = raw_RTD - raw_RTD.mean(-1, keepdim=True)
    assert float((raw_RTD - centred_RTD).abs().max()) > 3
    raw_RT, centred_RT = (losses(exact, exact.sae.replace(resid_RTD))[0] for resid_RTD in (raw_RTD, centred_RTD))
    torch.testing.assert_close(raw_RT, centred_RT, rtol=0, atol=1e-11)


def test_several_saes_in_one_pass_get_what_each_gets_alone(setup: Setup) -> None:
    """The clean forward pass is shared; layers may be given in any order, and twice."""
    hooks = ("blocks.2.hook_resid_pre", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    weights: dict[str, Tensor] = dict(setup.sae.named_parameters())
    subjects = [Subject(SAE(replace(CONFIG, hook=hook), weights), "golden", hook) for hook in hooks]
    together = evaluate(subjects, setup.lm, setup.rows, batch_size=3)
    assert [result.layer for result in together] == list(hooks)
    for subject, result in zip(subjects, together, strict=True):
        assert evaluate([subject], setup.lm, setup.rows, batch_size=3)[0] == result
    assert together[0].metrics == together[2].metrics
