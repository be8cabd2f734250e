"""Comparing SAEs: known correspondences are found, nothing depends on batches, and differences are paired."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saezoo import hub, load, read_registry
from saezoo.errors import SaezooError, TextError, UsageError
from saezoo.evals import compare as module
from saezoo.evals.compare import Comparison, compare, paired_differences
from saezoo.evals.intervals import FEWEST, GROUPS, bootstrap
from saezoo.evals.matching import FEWEST_FIRES
from saezoo.evals.metrics import METRICS, PER_TOKEN
from saezoo.lm import LanguageModel, load_language_model
from saezoo.results import Blocks
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows, builtin, collect, encode, pack

D, F = 16, 40


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Thirty rows of random tokens, each beginning with a BOS."""
    generator = torch.Generator().manual_seed(0)
    tokens_RT = torch.randint(0, 256, (30, 20), generator=generator)
    tokens_RT[:, 0] = 256
    return Rows(tokens_RT.numpy(), np.arange(30)[:, None].repeat(20, 1))


def random_sae(seed: int, features: int = F, hook: str | None = "blocks.1.hook_resid_pre", width: int = D) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["b_enc"] = tensors["b_enc"] * 0.01 - 0.1
    tensors["b_dec"] = tensors["b_dec"] * 0.01
    return SAE(SAEConfig(width, features, hook, "tiny", 20, True, True, True), tensors)


def picked(sae: SAE, features: Tensor, factor: float = 1.0) -> SAE:
    """`features` of an SAE, their activations `factor` times as large and their directions as much shorter."""
    tensors = {
        "W_enc": sae.W_enc[:, features] * factor,
        "b_enc": sae.b_enc[features] * factor,
        "W_dec": sae.W_dec[features] / factor,
        "b_dec": sae.b_dec,
    }
    return SAE(dataclasses.replace(sae.config, d_sae=len(features)), tensors)


def value(found: Comparison, name: str) -> float:
    number = found.numbers[name].value
    assert number is not None
    return number


def test_an_sae_with_itself(lm: LanguageModel, rows: Rows) -> None:
    sae = random_sae(0)
    found = compare(sae, sae, lm, rows, threshold=1 - 1e-9)
    for i, row in enumerate(found.features):
        assert (row.feature, row.nearest, row.partner) == (i, i, i)
        assert row.partner_cosine == pytest.approx(1)
        assert row.partner_density == row.density
        assert row.partner_jaccard == row.coactive_jaccard == (None if row.density * 570 < FEWEST_FIRES else 1)
    assert found.unique_a == found.unique_b == ()
    assert (value(found, "shared"), value(found, "unique_a")) == (F, 0)
    assert value(found, "mmcs_ab") == pytest.approx(1)
    assert value(found, "matching_gap") == pytest.approx(0, abs=1e-9)
    assert value(found, "agreement") == 1


def test_a_copy_in_another_order_is_recognised(lm: LanguageModel, rows: Rows) -> None:
    """Of other lengths too; a power of 2, so that the same features fire."""
    sae = random_sae(0)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    found = compare(picked(sae, order, factor=4.0), sae, lm, rows)
    assert [row.partner for row in found.features] == order.tolist()
    assert {row.partner_jaccard for row in found.features} <= {None, 1.0}
    assert value(found, "shared") == F


def test_missing_features_are_unique(lm: LanguageModel, rows: Rows) -> None:
    sae = random_sae(0)
    found = compare(sae, picked(sae, torch.arange(F - 8)), lm, rows, threshold=0.999)
    assert found.unique_a == tuple(range(F - 8, F))
    assert found.unique_b == ()
    assert {row.partner for row in found.features[-8:]} == {None}
    back = compare(picked(sae, torch.arange(F - 8)), sae, lm, rows, threshold=0.999)
    assert (back.unique_a, back.unique_b) == ((), tuple(range(F - 8, F)))


def test_directions_without_a_cosine(lm: LanguageModel, rows: Rows) -> None:
    a, b = random_sae(0), random_sae(1)
    a.W_dec[3] = 0
    b.W_dec[[5, 6]] = 0
    found = compare(a, b, lm, rows)
    assert (value(found, "undefined_a"), value(found, "undefined_b")) == (1, 2)
    row = found.features[3]
    assert (row.nearest, row.nearest_cosine, row.partner, row.partner_cosine) == (None, None, None, None)
    assert not {3} & {*found.unique_a} and not {5, 6} & {*found.unique_b}
    assert not {5, 6} & {row.partner for row in found.features}


@pytest.mark.parametrize("which", ["a", "b"])
def test_counts_add_up(lm: LanguageModel, rows: Rows, which: str) -> None:
    a, b = random_sae(0), random_sae(1, features=30)
    a.W_dec[3] = 0
    found = compare(a, b, lm, rows, threshold=0.5)
    parts = value(found, "shared") + value(found, f"unique_{which}") + value(found, f"undefined_{which}")
    assert parts == value(found, f"features_{which}")
    assert 0 < value(found, "shared") < 30
    assert sum(found.histogram["partner"]) == value(found, "matched")
    assert sum(found.histogram["nearest_ab"]) == F - 1
    assert sum(found.histogram["nearest_ba"]) == 30
    above = sum(row.partner_cosine is not None and row.partner_cosine >= 0.5 for row in found.features)
    assert above == value(found, "shared")


def test_firing_is_counted_on_the_tokens_that_are_scored(lm: LanguageModel, rows: Rows) -> None:
    """Against the features of the whole text, at two depths."""
    a, b = random_sae(0, hook="blocks.0.hook_resid_pre"), random_sae(1, hook="blocks.1.hook_resid_post")
    found = compare(a, b, lm, rows)
    tokens_RT = torch.from_numpy(rows.tokens_RT)
    residuals = lm.residuals(tokens_RT, [0, 2])
    fires_a, fires_b = ((sae.encode(residuals[depth])[tokens_RT != 256] > 0).numpy() for sae, depth in ((a, 0), (b, 2)))
    assert value(found, "tokens") == len(fires_a) == 570
    best = []
    for i, row in enumerate(found.features):
        assert row.density == fires_a[:, i].mean()
        both, either = ((op(fires_a[:, [i]], fires_b)).sum(0) for op in (np.logical_and, np.logical_or))
        jaccard = both / either.clip(min=1) * (fires_b.sum(0) >= FEWEST_FIRES) * (fires_a[:, i].sum() >= FEWEST_FIRES)
        assert row.coactive == (int(jaccard.argmax()) if jaccard.max() > 0 else None)
        best.append(jaccard.max())
        if row.partner is not None:
            assert row.partner_density == fires_b[:, row.partner].mean()
            assert (row.partner_jaccard or 0) == pytest.approx(jaccard[row.partner])
    assert value(found, "jaccard_ab") == pytest.approx(np.mean([x for x in best if x > 0]))
    assert value(found, "rare_a") == (fires_a.sum(0) < FEWEST_FIRES).sum()


def test_batches_do_not_matter(lm: LanguageModel, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_sae(0), random_sae(1)
    whole = compare(a, b, lm, rows)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(module, "_ENCODE_BYTES", 4 * F * 20 * 7)
    parts = compare(a, b, lm, rows, on_progress=lambda *step: told.append(step))
    assert parts == whole
    assert [done for stage, done, _ in told if stage == "co-activation"] == [7, 14, 21, 28, 30]


@pytest.mark.parametrize("limit", ["_MOST_FIRINGS", "_MOST_PRODUCTS"])
def test_the_text_ends_where_the_bound_is(
    lm: LanguageModel, rows: Rows, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(module, "_ENCODE_BYTES", 4 * F * 20 * 7)
    monkeypatch.setattr(module, limit, 0)
    assert value(compare(random_sae(0), random_sae(1), lm, rows), "tokens") == 7 * 19


def test_random_saes_are_as_near_as_chance_has_it(lm: LanguageModel, rows: Rows) -> None:
    """Both baselines say so: the directions have no preferred dimensions."""
    found = compare(random_sae(0, features=600), random_sae(1, features=600), lm, rows)
    assert value(found, "mmcs_random_ab") == pytest.approx(value(found, "mmcs_ab"), rel=0.02)
    assert value(found, "mmcs_covariance_ab") == pytest.approx(value(found, "mmcs_ab"), rel=0.02)


def test_the_second_baseline_knows_preferred_dimensions(lm: LanguageModel, rows: Rows) -> None:
    """Independent directions that lie near one plane are near each other; only the second baseline expects it."""
    a, b = random_sae(0, features=300), random_sae(1, features=300)
    for sae in (a, b):
        sae.W_dec[:, 2:] *= 0.1
    found = compare(a, b, lm, rows)
    assert value(found, "mmcs_covariance_ab") == pytest.approx(value(found, "mmcs_ab"), abs=0.02)
    assert value(found, "mmcs_random_ab") < value(found, "mmcs_ab") - 0.2


def test_the_seed_is_of_the_baselines_only(lm: LanguageModel, rows: Rows) -> None:
    a, b = random_sae(0), random_sae(1)
    first, again, other = (compare(a, b, lm, rows, seed=seed) for seed in (0, 0, 1))
    assert first == again
    changed = {name for name in first.numbers if first.numbers[name] != other.numbers[name]}
    assert changed == {"mmcs_covariance_ab", "mmcs_covariance_ba", "jaccard_shifted_ab"}
    assert first.features == other.features


def test_the_table_as_csv(lm: LanguageModel, rows: Rows) -> None:
    a, b = random_sae(0), random_sae(1)
    a.W_dec[3] = 0
    found = compare(a, b, lm, rows)
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == F
    assert (lines[3]["feature"], lines[3]["partner"], lines[3]["nearest_cosine"]) == ("3", "", "")
    assert float(lines[0]["nearest_cosine"]) == found.features[0].nearest_cosine
    assert "nan" not in found.to_csv().lower()


def test_the_summary_is_numbers_or_none(lm: LanguageModel, rows: Rows) -> None:
    found = compare(random_sae(0), random_sae(1), lm, rows)
    assert [row[0] for row in found.summary()] == list(found.numbers)
    for name, middle, lo, hi in found.summary():
        assert middle is not None and math.isfinite(middle), name
        assert (lo is None) == (hi is None)
        if lo is not None and hi is not None:
            assert lo <= middle <= hi


def test_what_has_no_value_says_so(lm: LanguageModel, rows: Rows) -> None:
    """All directions 0, nothing fires: no mean, no interval, no NaN."""
    dead = random_sae(0)
    dead.W_dec[:] = 0
    dead.b_enc[:] = -1e9
    found = compare(dead, dead, lm, rows)
    counts = {"features", "undefined", "shared", "unique", "matched", "tokens", "rare"}
    assert {number for name, number in found.numbers.items() if name.split("_")[0] not in counts} == {
        (None, None, None)
    }
    assert value(found, "rare_a") == value(found, "undefined_a") == F
    assert value(found, "matched") == value(found, "shared") == value(found, "unique_a") == 0
    assert "nan" not in found.to_csv().lower()


REFUSALS: dict[str, dict[str, Any]] = {
    "the SAEs read activations of width 16 and 8; compare SAEs of one model": {"b": random_sae(1, width=8)},
    "the SAEs read width 8, the model has 16; give the model they read": {
        "a": random_sae(0, width=8),
        "b": random_sae(1, width=8),
    },
    "the cfg.json of the second SAE does not say which hook it reads; add `hook_name` to it": {
        "b": random_sae(1, hook=None)
    },
    "hook `blocks.9.hook_resid_pre`: the model has 2 layers, 0 to 1": {
        "a": random_sae(0, hook="blocks.9.hook_resid_pre")
    },
    "threshold 1.5 is no cosine of shared features; give one above 0, at most 1": {"threshold": 1.5},
    "threshold 0 is no cosine of shared features; give one above 0, at most 1": {"threshold": 0.0},
    "threshold nan is no cosine of shared features; give one above 0, at most 1": {"threshold": math.nan},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(lm: LanguageModel, rows: Rows, message: str) -> None:
    given: dict[str, Any] = {"a": random_sae(0), "b": random_sae(1), "threshold": 0.7} | REFUSALS[message]
    with pytest.raises(UsageError) as error:
        compare(given["a"], given["b"], lm, rows, threshold=given["threshold"])
    assert str(error.value) == message


def test_saes_of_two_models_are_refused(lm: LanguageModel, rows: Rows) -> None:
    other = random_sae(1)
    other.config = dataclasses.replace(other.config, model_name="gpt2-small")
    with pytest.raises(UsageError, match="^the SAEs read `tiny` and `gpt2-small`; compare SAEs of one model$"):
        compare(random_sae(0), other, lm, rows)


def test_text_that_says_nothing_is_refused(lm: LanguageModel, rows: Rows) -> None:
    only_bos = Rows(np.full((3, 20), 256), np.zeros((3, 20), dtype=np.int64))
    with pytest.raises(TextError, match="^the text holds special tokens only; give one with text in it$"):
        compare(random_sae(0), random_sae(1), lm, only_bos)
    too_long = Rows(np.zeros((3, 65), dtype=np.int64), np.zeros((3, 65), dtype=np.int64))
    with pytest.raises(UsageError, match="^rows of 65 tokens: the model has 64 positions$"):
        compare(random_sae(0), random_sae(1), lm, too_long)


def test_activations_that_are_not_finite_are_refused(tiny_model_folder: Path, rows: Rows) -> None:
    broken = load_language_model(tiny_model_folder)
    broken.hf_model.transformer.wte.weight[5, 0] = torch.inf
    with pytest.raises(SaezooError, match="^the activations at blocks.1.hook_resid_pre are not finite;"):
        compare(random_sae(0), random_sae(1), broken, rows)


@pytest.fixture(scope="module")
def neighbours() -> Comparison:
    """Layers 1 and 2 of the bundled collection."""
    a, b = load("tiny-res", 1), load("tiny-res", 2)
    lm = load_language_model(hub.fetch_model(read_registry().models["tiny-lm"]))
    source = builtin("heldout")
    packed = pack(encode(lm.tokenizer, source.documents()), bos=lm.bos, context=128)
    return compare(a, b, lm, collect(packed, tokens=16_384, context=128, source=source.name))


def test_neighbouring_layers_share_features(neighbours: Comparison) -> None:
    """The post's redundancy between SAEs trained on nearby layers, far above chance by either baseline."""
    assert value(neighbours, "shared") > 500
    assert value(neighbours, "mmcs_ab") > 2 * value(neighbours, "mmcs_covariance_ab")
    assert value(neighbours, "mmcs_covariance_ab") > value(neighbours, "mmcs_random_ab")
    assert value(neighbours, "jaccard_ab") > 3 * value(neighbours, "jaccard_shifted_ab")
    assert value(neighbours, "matching_gap") < 1e-9


def test_cosine_and_coactivation_agree(neighbours: Comparison) -> None:
    """Two independent ways to match: were either meaningless, they would agree on 1 of 1,024."""
    assert value(neighbours, "agreement") > 0.7


def test_one_to_one_is_no_nearer_than_the_nearest(neighbours: Comparison) -> None:
    assert value(neighbours, "matched_cosine") < value(neighbours, "mmcs_ab")
    for row in neighbours.features:
        assert row.partner_cosine is not None and row.nearest_cosine is not None
        assert row.partner_cosine <= row.nearest_cosine
        assert (
            row.partner_jaccard is None or row.coactive_jaccard is None or row.partner_jaccard <= row.coactive_jaccard
        )


# Differences of metrics


def blocks(n: int, seed: int, *, hardness_N: Tensor | None = None, shift: float = 0.0) -> Blocks:
    """Sums of `n` documents. l0 of a document: 5 + its hardness + an SAE's own noise + `shift`."""
    generator = torch.Generator().manual_seed(seed)
    tokens_N = torch.arange(n, dtype=torch.float64) % 40 + 10
    sums = {name: tokens_N.clone() for name in (*PER_TOKEN, "ce_zero", "ce_mean", "ce_unigram")}
    noise_N = torch.rand(n, generator=generator, dtype=torch.float64)
    hardness_N = torch.zeros(n, dtype=torch.float64) if hardness_N is None else hardness_N
    sums["l0"] = tokens_N * (5 + shift + hardness_N + 0.1 * noise_N)
    sums["x2"], sums["ce_zero"], sums["ce_mean"], sums["ce_unigram"] = (k * tokens_N for k in (4, 5, 3, 2))
    empty = torch.zeros(GROUPS, 1, dtype=torch.float64)
    return Blocks(sums, torch.zeros(n, 2, dtype=torch.float64), empty, empty[:, 0])


def hardness(n: int, seed: int = 99) -> Tensor:
    return 10 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_sae_does_not_differ_from_itself() -> None:
    found = paired_differences(blocks(50, 0), blocks(50, 0))
    assert list(found) == [metric.name for metric in METRICS]
    for name in ("l0", "explained_variance", "mse", "ce_delta"):
        assert found[name] == (0, 0, 0), name


def test_a_constant_difference_is_certain() -> None:
    found = paired_differences(blocks(50, 0, hardness_N=hardness(50), shift=2), blocks(50, 0, hardness_N=hardness(50)))
    assert tuple(found["l0"]) == pytest.approx((2, 2, 2), abs=1e-9)


def test_pairing_takes_out_what_is_common() -> None:
    """Documents that are hard for both: the difference is known far better than either value."""
    a, b = (blocks(60, seed, hardness_N=hardness(60)) for seed in (0, 1))
    paired = paired_differences(a, b)["l0"]
    alone = [bootstrap(each.sums, each.x_sum_ND, seed=0)["l0"] for each in (a, b)]
    widths = [m.hi - m.lo for m in (paired, *alone) if m.hi is not None and m.lo is not None]
    assert len(widths) == 3
    assert widths[0] < math.hypot(widths[1], widths[2]) / 20


def test_the_other_way_round_is_the_opposite() -> None:
    a, b = blocks(40, 0, shift=0.3), blocks(40, 1)
    there, back = (paired_differences(*pair, seed=3)["l0"] for pair in ((a, b), (b, a)))
    assert there.lo is not None and there.hi is not None and there.value is not None
    assert tuple(back) == pytest.approx((-there.value, -there.hi, -there.lo), abs=1e-12)


def test_the_value_is_the_difference_of_the_values() -> None:
    a, b = blocks(40, 0, shift=0.3), blocks(40, 1)
    values = [bootstrap(each.sums, each.x_sum_ND, seed=0)["l0"].value for each in (a, b)]
    assert values[0] is not None and values[1] is not None
    assert paired_differences(a, b)["l0"].value == pytest.approx(values[0] - values[1], abs=1e-12)


def test_paired_intervals_cover_the_truth() -> None:
    """Of 100 samples of 60 documents, 95 should; 88 or more allows for chance and for 60 being few."""
    hits = 0
    for seed in range(100):
        hard_N = hardness(60, seed=500 + seed)
        a = blocks(60, 2 * seed, hardness_N=hard_N, shift=0.02)
        _, lo, hi = paired_differences(a, blocks(60, 2 * seed + 1, hardness_N=hard_N), seed=seed)["l0"]
        assert lo is not None and hi is not None
        hits += lo <= 0.02 <= hi
    assert 88 <= hits <= 99


@pytest.mark.parametrize("scored", [1, FEWEST - 1, FEWEST])
def test_few_documents_have_no_interval(scored: int) -> None:
    pair = [blocks(20, seed) for seed in (0, 1)]
    for each in pair:
        for column_N in each.sums.values():
            column_N[scored:] = 0
    value, lo, hi = paired_differences(*pair)["l0"]
    assert value is not None
    assert (lo is None) == (hi is None) == (scored < FEWEST)


def test_an_undefined_metric_has_no_difference() -> None:
    a, b = blocks(20, 0), blocks(20, 1)
    b.sums["targets"][:] = 0
    b.sums["ce_sae"][:] = b.sums["ce_clean"][:] = 0
    found = paired_differences(a, b)
    assert found["ce_sae"] == (None, None, None)
    assert found["l0"].value is not None


def test_other_documents_are_refused() -> None:
    with pytest.raises(UsageError, match="^the two results are not of the same tokens of the same documents;"):
        paired_differences(blocks(20, 0), blocks(21, 0))
