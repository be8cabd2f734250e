"""Every metric on a tiny model: known values, the same by hand, and what they must not depend on."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from saezoo.entries import Protocol
from saezoo.errors import UsageError
from saezoo.evals import Subject, evaluate
from saezoo.evals.counts import feature_counts, histogram
from saezoo.evals.metrics import METRICS
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel, load_language_model
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows

D, F = 16, 32
DEPTH = 1
CONFIG = SAEConfig(
    d_in=D,
    d_sae=F,
    hook=f"blocks.{DEPTH}.hook_resid_pre",
    model_name=None,
    context_size=20,
    prepend_bos=True,
    centre=True,
    apply_b_dec_to_input=True,
)
PROTOCOLS: tuple[Protocol, ...] = ("standard", "feb2024")


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    """In float64, with weights large enough that every block matters."""
    model = load_language_model(tiny_model_folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.hf_model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


def in_float32(lm: LanguageModel) -> LanguageModel:
    return LanguageModel(copy.deepcopy(lm.hf_model).float(), lm.tokenizer)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Seven rows of 20, a BOS at the start of each and some inside."""
    generator = torch.Generator().manual_seed(2)
    tokens_RT = torch.randint(0, 256, (7, 20), generator=generator)
    tokens_RT[torch.rand(7, 20, generator=generator) < 0.1] = 256
    tokens_RT[:, 0] = 256
    return Rows(tokens_RT.numpy(), (tokens_RT == 256).flatten().cumsum(0).view(7, 20).numpy() - 1)


def scored(rows: Rows, protocol: Protocol) -> Tensor:
    tokens_RT = torch.from_numpy(rows.tokens_RT)
    return tokens_RT >= 0 if protocol == "feb2024" else tokens_RT != 256


def activation(lm: LanguageModel, rows: Rows, depth: int = DEPTH) -> Tensor:
    """Centred, [R, T, D]."""
    hidden = lm.hf_model(torch.from_numpy(rows.tokens_RT), output_hidden_states=True).hidden_states[depth]
    return hidden - hidden.mean(-1, keepdim=True)  # type: ignore[no-any-return]


def mirror(gain: float, towards: Tensor, **config: Any) -> SAE:
    """Reconstructs x as towards + gain (x - towards), with one feature for each direction and sign."""
    eye = torch.eye(D, dtype=torch.float64)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": gain * torch.cat([eye, -eye]), "b_dec": towards}
    return SAE(replace(CONFIG, **config), {**tensors, "b_enc": torch.zeros(F, dtype=torch.float64)})


def random_sae() -> SAE:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return SAE(CONFIG, tensors)


def run(lm: LanguageModel, sae: SAE, rows: Rows, protocol: Protocol = "standard", **options: Any) -> Result:
    return evaluate([Subject(sae, "tiny", "1")], lm, rows, protocol=protocol, **options)[0]


def values(result: Result) -> dict[str, float]:
    """Those that are defined."""
    return {name: m.value for name, m in result.metrics.items() if m.value is not None}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_perfect_sae(lm: LanguageModel, rows: Rows, protocol: Protocol) -> None:
    found = values(run(lm, mirror(1.0, torch.zeros(D, dtype=torch.float64)), rows, protocol))
    ones = ("explained_variance", "explained_variance_uncentred", "cosine", "norm_ratio", "ce_score", "kl_score")
    assert [found[name] for name in ones] == pytest.approx([1] * len(ones), abs=1e-12)
    assert [found[name] for name in ("mse", "ce_delta", "kl_sae")] == pytest.approx([0] * 3, abs=1e-12)
    assert found["norm_out"] == pytest.approx(found["norm_in"])
    assert found["ce_sae"] == pytest.approx(found["ce_clean"])
    x_nD = activation(lm, rows)[scored(rows, protocol)]
    assert found["l0"] == D
    assert found["l1"] == pytest.approx(float(x_nD.abs().sum(-1).mean()))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_half_way_to_the_origin(lm: LanguageModel, rows: Rows, protocol: Protocol) -> None:
    found = values(run(lm, mirror(0.5, torch.zeros(D, dtype=torch.float64)), rows, protocol))
    x2 = activation(lm, rows)[scored(rows, protocol)].square().sum(-1).mean()
    assert found["explained_variance_uncentred"] == pytest.approx(0.75)
    assert [found["cosine"], found["norm_ratio"]] == pytest.approx([1, 0.5])
    assert found["mse"] == pytest.approx(float(x2) / 4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_half_way_to_the_mean(lm: LanguageModel, rows: Rows, protocol: Protocol) -> None:
    mean_D = activation(lm, rows)[scored(rows, protocol)].mean(0)
    found = values(run(lm, mirror(0.5, mean_D), rows, protocol))
    assert found["explained_variance"] == pytest.approx(0.75, rel=1e-12)


def test_an_sae_that_says_zero_is_zero_ablation(lm: LanguageModel, rows: Rows) -> None:
    found = values(run(lm, mirror(0.0, torch.zeros(D, dtype=torch.float64)), rows, "feb2024"))
    assert found["ce_sae"] == pytest.approx(found["ce_zero"], rel=1e-12)
    assert found["kl_sae"] == pytest.approx(found["kl_zero"], rel=1e-12)
    zeros = ("ce_score", "kl_score", "cosine", "norm_out", "norm_ratio", "explained_variance_uncentred")
    assert [found[name] for name in zeros] == pytest.approx([0] * len(zeros), abs=1e-10)
    x2 = float(activation(lm, rows).square().sum(-1).mean())
    assert found["mse"] == pytest.approx(x2, rel=1e-12)


def test_an_sae_that_says_the_mean_is_mean_ablation(lm: LanguageModel, rows: Rows) -> None:
    mean_D = activation(lm, rows).flatten(0, 1).mean(0)
    found = values(run(lm, mirror(0.0, mean_D), rows, "feb2024"))
    assert found["ce_sae"] == pytest.approx(found["ce_mean"], rel=1e-12)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert found["gm_distance_b_dec"] == pytest.approx(found["gm_distance_mean"], rel=1e-4)


def spliced_logits(lm: LanguageModel, tokens_RT: Tensor, resid_RTD: Tensor) -> Tensor:
    """The whole Hugging Face model, with what enters block DEPTH replaced."""

    def swap(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (resid_RTD, *args[1:]), kwargs

    handle = lm.hf_model.transformer.h[DEPTH].register_forward_pre_hook(swap, with_kwargs=True)
    logits: Tensor = lm.hf_model(tokens_RT).logits
    handle.remove()
    return logits


def unigram(rows: Rows, protocol: Protocol) -> Tensor:
    """Each target by its frequency among those of other documents, one added to every count."""
    pairs = [
        (int(target), int(document))
        for tokens, documents, use in zip(rows.tokens_RT, rows.documents_RT, scored(rows, protocol), strict=True)
        for target, document, used in zip(tokens[1:], documents, use, strict=False)
        if used
    ]
    losses = []
    for target, document in pairs:
        others = [v for v, d in pairs if d != document]
        losses.append(-math.log((others.count(target) + 1) / (len(others) + 257)))
    return torch.tensor(losses, dtype=torch.float64).mean()


def by_hand(lm: LanguageModel, sae: SAE, rows: Rows, protocol: Protocol) -> dict[str, float]:
    """Every metric, written down from its definition, with the plain model and no sums."""
    tokens_RT, scored_RT = torch.from_numpy(rows.tokens_RT), scored(rows, protocol)
    x_RTD = activation(lm, rows)
    f_RTF = ((x_RTD - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    y_RTD = f_RTF @ sae.W_dec + sae.b_dec
    x, y, f = x_RTD[scored_RT], y_RTD[scored_RT], f_RTF[scored_RT]
    e2, x2 = (x - y).square().sum(-1), x.square().sum(-1)
    inputs = {
        "clean": x_RTD,
        "sae": torch.where(scored_RT[..., None], y_RTD, x_RTD),
        "zero": torch.zeros_like(x_RTD),
        "mean": x.mean(0).expand_as(x_RTD),
    }
    logits = {name: spliced_logits(lm, tokens_RT, resid_RTD) for name, resid_RTD in inputs.items()}
    targets_n = tokens_RT[:, 1:][scored_RT[:, :-1]]
    ce = {name: cross_entropy(v[:, :-1][scored_RT[:, :-1]], targets_n) for name, v in logits.items()}
    ce["unigram"] = unigram(rows, protocol)
    log_p = {name: v[scored_RT].log_softmax(-1) for name, v in logits.items()}
    kl = {name: kl_div(log_p[name], log_p["clean"], log_target=True, reduction="batchmean") for name in ("sae", "zero")}
    found = {
        **{f"ce_{name}": value for name, value in ce.items()},
        "ce_delta": ce["sae"] - ce["clean"],
        "ce_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "ce_score_unigram": (ce["unigram"] - ce["sae"]) / (ce["unigram"] - ce["clean"]),
        **{f"kl_{name}": value for name, value in kl.items()},
        "kl_score": 1 - kl["sae"] / kl["zero"],
        "explained_variance": 1 - e2.mean() / x.var(0, unbiased=False).sum(),
        "explained_variance_uncentred": (1 - e2 / x2).mean(),
        "mse": e2.mean(),
        "cosine": cosine_similarity(x, y).mean(),
        "norm_in": x.norm(dim=-1).mean(),
        "norm_out": y.norm(dim=-1).mean(),
        "norm_ratio": (y.norm(dim=-1) / x.norm(dim=-1)).mean(),
        "l0": (f > 0).double().sum(-1).mean(),
        "l1": f.sum(-1).mean(),
    }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_metric_by_hand(lm: LanguageModel, rows: Rows, protocol: Protocol) -> None:
    """`standard`: a special token keeps its activation, and no token is scored at its place."""
    result, wanted = run(lm, random_sae(), rows, protocol), by_hand(lm, random_sae(), rows, protocol)
    assert list(wanted) == [metric.name for metric in METRICS]
    assert {name: result.metrics[name].value for name in wanted} == pytest.approx(wanted, rel=1e-10)
    assert result.tokens == int(scored(rows, protocol).sum())


def test_the_protocols_differ(lm: LanguageModel, rows: Rows) -> None:
    standard, feb2024 = (values(run(lm, random_sae(), rows, protocol)) for protocol in PROTOCOLS)
    assert all(abs(standard[metric.name] / feb2024[metric.name] - 1) > 1e-5 for metric in METRICS)


@pytest.fixture(scope="module")
def in_batches(lm: LanguageModel, rows: Rows) -> dict[int, dict[str, float]]:
    """In float32, by batch size."""
    model, sae = in_float32(lm), random_sae().float()
    return {size: values(run(model, sae, rows, batch_size=size)) for size in (1, 3, 7)}


@pytest.mark.parametrize("name", [metric.name for metric in METRICS])
def test_the_batch_size_does_not_matter(in_batches: dict[int, dict[str, float]], name: str) -> None:
    whole = in_batches[7][name]
    assert in_batches[1][name] == pytest.approx(whole, rel=1e-6)
    assert in_batches[3][name] == pytest.approx(whole, rel=1e-6)


def test_the_batch_size_does_not_matter_for_counts_and_distances(in_batches: dict[int, dict[str, float]]) -> None:
    others = in_batches[7].keys() - {metric.name for metric in METRICS}
    assert {"dead", "alive_fraction", "dense_100", "unseen_density", "gm_distance_b_dec", "gm_spread"} <= others
    for size in (1, 3):
        assert {name: in_batches[size][name] for name in others} == pytest.approx(
            {name: in_batches[7][name] for name in others}, rel=1e-5
        )


def with_embedding(lm: LanguageModel, *, factor: float = 1.0, shift: Tensor | None = None) -> LanguageModel:
    """What enters block 0 is multiplied by `factor`, then shifted."""
    hf_model = copy.deepcopy(lm.hf_model)
    with torch.no_grad():
        hf_model.transformer.wte.weight *= factor
        hf_model.transformer.wpe.weight *= factor
        if shift is not None:
            hf_model.transformer.wpe.weight += shift
    return LanguageModel(hf_model, lm.tokenizer)


@pytest.mark.parametrize(
    "name, power",
    [
        ("explained_variance", 0),
        ("explained_variance_uncentred", 0),
        ("cosine", 0),
        ("norm_ratio", 0),
        ("l0", 0),
        ("dead", 0),
        ("dense_10", 0),
        ("gm_distance_b_dec_relative", 0),
        ("mean_distance_b_dec", 1),
        ("norm_in", 1),
        ("norm_out", 1),
        ("l1", 1),
        ("gm_spread", 1),
        ("mse", 2),
    ],
)
def test_a_ten_times_larger_residual_and_sae(lm: LanguageModel, rows: Rows, name: str, power: int) -> None:
    small = random_sae()
    small.config = replace(CONFIG, hook="blocks.0.hook_resid_pre")
    weights = dict(small.named_parameters())
    large = SAE(small.config, {**weights, "b_enc": 10 * small.b_enc, "b_dec": 10 * small.b_dec})
    before, after = run(lm, small, rows), run(with_embedding(lm, factor=10), large, rows)
    assert values(after)[name] == pytest.approx(10**power * values(before)[name], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_with_one_dimension_far_from_zero(
    lm: LanguageModel, rows: Rows, dtype: torch.dtype, batch_size: int
) -> None:
    """An outlier dimension as GPT-2 has: formulas that forget the mean, or take it of squares, give 0.99 and more."""
    shifted = with_embedding(lm, shift=300 * torch.eye(D, dtype=torch.float64)[3])
    mean_D = activation(shifted, rows, depth=0)[scored(rows, "standard")].mean(0)
    sae = mirror(0.5, mean_D, hook="blocks.0.hook_resid_pre").to(dtype)
    model = shifted if dtype == torch.float64 else in_float32(shifted)
    found = values(run(model, sae, rows, batch_size=batch_size))
    assert found["norm_in"] > 250
    assert found["explained_variance"] == pytest.approx(0.75, abs=1e-4 if dtype == torch.float32 else 1e-10)
    assert found["explained_variance_uncentred"] > 0.99


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_one_token_tells_what_a_constant_residual_does(lm: LanguageModel, depth: int) -> None:
    """Zero- and mean-ablation need no full forward pass."""
    vector_D = torch.randn(D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for resid_D in (torch.zeros_like(vector_D), vector_D):
        full_RTV = lm.resume(resid_D.expand(2, 20, D), depth)
        one_V = lm.constant_logits(resid_D, depth)
        torch.testing.assert_close(full_RTV, one_V.expand_as(full_RTV), rtol=1e-12, atol=1e-12)


def test_what_the_sae_does_to_special_tokens_does_not_matter(lm: LanguageModel, rows: Rows) -> None:
    """`standard`: this SAE is perfect but at the position of the BOS, whose embedding is far off."""
    shifted = with_embedding(lm)
    with torch.no_grad():
        shifted.hf_model.transformer.wte.weight[256] += 1000 * torch.eye(D, dtype=torch.float64)[0]
    sae = mirror(1.0, torch.zeros(D, dtype=torch.float64), hook="blocks.0.hook_resid_pre")
    sae.W_dec[0] *= 1 - 1e-3  # the BOS row alone is hit hard
    standard, feb2024 = (values(run(shifted, sae, rows, protocol)) for protocol in PROTOCOLS)
    assert standard["mse"] < 1e-3 < feb2024["mse"]
    assert standard["norm_in"] < 20 < feb2024["norm_in"]


def test_dead_and_dense_features_of_an_sae(lm: LanguageModel, rows: Rows) -> None:
    sae = random_sae()
    sae.b_enc[:5], sae.b_enc[5:8] = -1e6, 1e6
    result = run(lm, sae, rows)
    f_nF = sae.encode(activation(lm, rows)[scored(rows, "standard")])
    density_F = (f_nF > 0).double().mean(0)
    found = values(result)
    assert int((density_F == 0).sum()) >= 5 and int((density_F == 1).sum()) >= 3
    assert found["dead"] == float((density_F == 0).sum())
    assert found["alive_fraction"] == float((density_F > 0).double().mean())
    assert found["dense_100"] == float((density_F > 0.01).sum())
    assert found["dense_10"] == float((density_F > 0.1).sum())


def test_feature_counts() -> None:
    """Six features that fired 0, 1, 10, 11, 100 and 101 times in 1,000 tokens; the thresholds are exclusive."""
    fires_GF = torch.zeros(32, 6, dtype=torch.float64)
    fires_GF[0] = torch.tensor([0, 1, 10, 11, 100, 101])
    tokens_G = torch.full((32,), 1000 / 32, dtype=torch.float64)
    found = {name: measured.known for name, measured in feature_counts(fires_GF, tokens_G).items()}
    unseen = found.pop("unseen_density")
    assert found == {"alive_fraction": 5 / 6, "dead": 1, "dense_100": 3, "dense_10": 1}
    assert (1 - unseen) ** 1000 == pytest.approx(0.05)


def test_histogram() -> None:
    fires_F = torch.tensor([0, 0, 1, 4, 2e5, 9e5, 1e6, 1e-3], dtype=torch.float64)
    found = histogram(fires_F, 1e6)
    assert found["edges"] == [-6, -5.5, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0]
    assert found["counts"] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert found["never"] == 2


def test_saes_that_read_the_same_share_one_sample(
    lm: LanguageModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 30 activations of one layer: three SAEs on it get what one gets, two layers half of it each."""
    monkeypatch.setattr(sys.modules["saezoo.evals.evaluate"], "_SAMPLE_BYTES", 4 * D * 30)
    saes = [random_sae() for _ in range(3)]
    other = SAE(replace(CONFIG, hook="blocks.0.hook_resid_pre"), dict(saes[0].named_parameters()))
    alone = values(run(lm, saes[2], rows))
    subjects = [Subject(sae, "c", str(i)) for i, sae in enumerate(saes)]
    beside = [values(result) for result in evaluate(subjects, lm, rows)]
    names = [name for name in alone if name.startswith("gm_")]
    assert [{name: found[name] for name in names} for found in beside] == [{name: alone[name] for name in names}] * 3
    mixed = evaluate([*subjects, Subject(other, "c", "3")], lm, rows)
    assert [values(result)["gm_sample"] for result in mixed] == [15] * 4 and alone["gm_sample"] == 30
    assert values(mixed[3])["gm_spread"] != values(mixed[0])["gm_spread"]


def test_distances_to_the_geometric_median(lm: LanguageModel, rows: Rows) -> None:
    x_nD = activation(lm, rows)[scored(rows, "standard")]
    median_D, sae = geometric_median(x_nD), random_sae()
    found = values(run(lm, sae, rows))
    spread = float((x_nD - median_D).norm(dim=1).median())
    assert found["gm_sample"] == len(x_nD)
    assert found["gm_spread"] == pytest.approx(spread, rel=1e-3)
    assert found["gm_distance_b_dec"] == pytest.approx(float((sae.b_dec - median_D).norm()), rel=1e-3)
    assert found["gm_distance_mean"] == pytest.approx(float((x_nD.mean(0) - median_D).norm()), rel=1e-3)
    assert found["gm_distance_b_dec_relative"] == pytest.approx(found["gm_distance_b_dec"] / spread, rel=1e-3)
    assert found["mean_distance_b_dec"] == pytest.approx(float((sae.b_dec - x_nD.mean(0)).norm()), rel=1e-4)


def test_progress_counts_tokens(lm: LanguageModel, rows: Rows) -> None:
    seen: list[int] = []
    run(lm, random_sae(), rows, batch_size=3, on_progress=seen.append)
    assert seen == [60, 120, 140]


def test_the_result_says_what_was_measured(lm: LanguageModel, rows: Rows) -> None:
    result = run(lm, random_sae(), rows, text="a text", model="a model", seed=5)
    assert (result.collection, result.layer, result.text, result.model) == ("tiny", "1", "a text", "a model")
    assert (result.rows, result.context, result.seed, result.dtype) == (7, 20, 5, "float64")
    assert result.documents == int((rows.tokens_RT == 256).sum())


@pytest.mark.parametrize(
    "config, context, message",
    [
        ({"d_in": 24}, 20, "1: the SAE reads width 24, the model has 16"),
        ({"hook": None}, 20, "1: cfg.json does not say which hook the SAE reads"),
        ({"hook": "blocks.2.hook_resid_pre"}, 20, "hook `blocks.2.hook_resid_pre`: the model has 2 layers, 0 to 1"),
        ({"hook": "blocks.0.hook_mlp_out"}, 20, "hook `blocks.0.hook_mlp_out` is not supported"),
        ({}, 65, "rows of 65 tokens: the model has 64 positions"),
    ],
)
def test_refusals(lm: LanguageModel, config: dict[str, Any], context: int, message: str) -> None:
    tokens_RT = torch.zeros(2, context, dtype=torch.int64).numpy()
    sae = random_sae()
    sae.config = replace(CONFIG, **config)
    with pytest.raises(UsageError) as caught:
        run(lm, sae, Rows(tokens_RT, tokens_RT))
    assert str(caught.value).startswith(message)
