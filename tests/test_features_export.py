"""Exports against SAEDashboard's definitions: by brute force, by what must hold of any export, and by a real one.

The real export is gpt2-small-res-jb, layer 0, features 0 to 3, as SAEDashboard's own tests have it; it is read where
SAEZOO_SHARED, or a folder `shared` beside the checkout, has it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saezoo.errors import SaezooError, UsageError
from saezoo.features import correlation
from saezoo.features.correlation import Sums, moments, with_features
from saezoo.features.events import Events, Writer
from saezoo.features.export import BatchFiles, Place, export, place_of
from saezoo.features.neuronpedia import ImportFiles, Release
from saezoo.features.records import About
from saezoo.features.saedashboard import Material, _bars
from saezoo.features.sampling import draw, others, splitmix64
from saezoo.tokens import Rows

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("SAEZOO_SHARED") or ROOT.parent / "shared") / "data" / "neuronpedia-export"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real export here; SAEZOO_SHARED names the folder")
ROWS, T, F, D, BOS = 40, 12, 9, 7, 0
DEAD, RARE, TIED = 8, 7, 6
HOSTILE = ("</script><script>alert(1)</script>", "\u2028", "\0", "\\u0000", '"', "\\", "\ud7ff", "Ġâ\x80", "ĊâĢľ")
RELEASE = Release("user1", "A. Author", "our-release", "Our release", "2026-01-02T03:04:05Z", url="https://x.org/a")


def text(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Activations [R, T, F] and tokens [R, T]; the BOS at the start of each row is not scored, and fires not."""
    random = np.random.default_rng(seed)
    f_RTF = np.maximum(random.normal(-0.7, 1, (ROWS, T, F)), 0).astype(np.float32)
    f_RTF[:, :, TIED] = f_RTF[:, :, TIED] > 0
    f_RTF[..., DEAD] = 0
    f_RTF[..., RARE] = 0
    f_RTF[3, 4, RARE], f_RTF[3, 5, RARE], f_RTF[20, 11, RARE] = 0.25, 1.5, 0.75
    f_RTF[:, 0] = 0
    tokens_RT = random.integers(1, 30, (ROWS, T))
    tokens_RT[:, 0] = BOS
    return f_RTF, tokens_RT


def material(
    folder: Path, *, seed: int = 0, features: tuple[int, ...] = tuple(range(F)), scale: float = 1.0
) -> Material:
    """An SAE with the activations of `text`; every decoder row times `scale`, every activation divided by it."""
    f_RTF, tokens_RT = text()
    random = np.random.default_rng(1)
    x_RTD = random.normal(0, 1, (ROWS, T, D)) + f_RTF[..., :D]
    W_dec_FD = random.normal(0, 1, (F, D)).astype(np.float32)
    W_U_DV = random.normal(0, 1, (D, 30)).astype(np.float32)
    scored_RT = tokens_RT != BOS
    writer = Writer(folder, F, part=100)
    for row in range(ROWS):
        position_N, feature_N = torch.from_numpy(f_RTF[row]).nonzero(as_tuple=True)
        value_N = torch.from_numpy(f_RTF[row])[position_N, feature_N] / scale
        writer.add(feature_N, position_N + row * T, value_N)
    writer.flush()
    x_SD, f_SF = x_RTD[scored_RT], f_RTF[scored_RT].astype(float) / scale
    sums = Sums(x_SD.sum(0), (x_SD**2).sum(0), f_SF.T @ x_SD)
    hook = "blocks.8.hook_resid_pre"
    about = About("tiny", "8", hook, "tiny-lm", D, F, "a text", T, ROWS, int(scored_RT.sum()), 3, seed, features)
    rows = Rows(tokens_RT, np.zeros_like(tokens_RT))
    decoder, unembed = torch.from_numpy(W_dec_FD * scale), torch.from_numpy(W_U_DV)
    return Material(about, Events([folder], F), rows, scored_RT, sums, decoder, unembed, tokenizer())


def tokenizer() -> PreTrainedTokenizerFast:
    """30 words, of which some are `HOSTILE`."""
    words = ["<bos>", *HOSTILE, *(f"Ġword{i}" for i in range(29 - len(HOSTILE)))]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<bos>")),
        bos_token="<bos>",
    )


@pytest.fixture
def ours(tmp_path: Path) -> Material:
    (tmp_path / "events").mkdir()
    return material(tmp_path / "events")


def batches(folder: Path) -> list[dict[str, Any]]:
    """What SAEDashboard's files hold."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("batch-*.json"))]


def described(m: Material, folder: Path) -> list[dict[str, Any]]:
    """The features of an export."""
    export(m, [BatchFiles(folder, m.about, place_of(m.about))])
    return [feature for batch in batches(folder) for feature in batch["features"]]


def real() -> list[dict[str, Any]]:
    return [feature for batch in batches(REAL) for feature in batch["features"]]


# ---- what any export must be

NUMBERS, INTEGERS, STRINGS = (float, int), (int,), (str,)
FIELDS: dict[str, tuple[tuple[type, ...], int | None]] = {
    "neuron_alignment_indices": (INTEGERS, 3),
    "neuron_alignment_values": (NUMBERS, 3),
    "neuron_alignment_l1": (NUMBERS, 3),
    "correlated_neurons_indices": (INTEGERS, 3),
    "correlated_neurons_l1": (NUMBERS, 3),
    "correlated_neurons_pearson": (NUMBERS, 3),
    "correlated_features_indices": (INTEGERS, None),
    "correlated_features_l1": (NUMBERS, None),
    "correlated_features_pearson": (NUMBERS, None),
    "neg_str": (STRINGS, 10),
    "neg_values": (NUMBERS, 10),
    "pos_str": (STRINGS, 10),
    "pos_values": (NUMBERS, 10),
    "freq_hist_data_bar_values": (NUMBERS, None),
    "freq_hist_data_bar_heights": (NUMBERS, None),
    "logits_hist_data_bar_heights": (NUMBERS, 50),
    "logits_hist_data_bar_values": (NUMBERS, 50),
    "decoder_weights_dist": (NUMBERS, 0),
}
"""Lists: type of the items, and how many."""
SINGLE = {
    "feature_index": INTEGERS,
    "frac_nonzero": NUMBERS,
    "n_prompts_total": INTEGERS,
    "n_tokens_in_prompt": INTEGERS,
    "dataset": STRINGS,
}
ACTIVATION = {
    "bin_min": NUMBERS,
    "bin_max": NUMBERS,
    "bin_contains": NUMBERS,
    "tokens": (list,),
    "values": (list,),
    "qualifying_token_index": INTEGERS,
}
OLDER = {"dfa_values", "dfa_targetIndex", "dfa_maxValue"}
"""Keys of an activation that SAEDashboard wrote always once; now only for SAEs of attention heads."""


def wrong_types(feature: dict[str, Any]) -> Iterator[str]:
    """What is missing, too much, or of another type."""
    if (keys := set(feature) - {"vector"}) != set(FIELDS) | set(SINGLE) | {"activations"}:
        yield f"keys {sorted(keys)}"
    for name, (types, size) in FIELDS.items():
        if not all(isinstance(item, types) for item in feature[name]) or size not in (None, len(feature[name])):
            yield name
    yield from (name for name, types in SINGLE.items() if not isinstance(feature[name], types))
    for activation in feature["activations"]:
        if set(activation) - OLDER != set(ACTIVATION):
            yield f"activation's keys {sorted(activation)}"
        yield from (name for name, types in ACTIVATION.items() if not isinstance(activation[name], types))
        if not all(isinstance(token, str) for token in activation["tokens"]):
            yield "a token that is no string"


def near(a: float, b: float, tolerance: float = 0.0021) -> bool:
    """Two numbers that were rounded to 3 digits, once or twice."""
    return abs(a - b) <= tolerance


def broken_tables(feature: dict[str, Any], vocab: int) -> Iterator[str]:
    """What does not hold of the tables and histograms of a feature, though it must by their definitions."""
    for name in ("pos_values", "neuron_alignment_values", "correlated_neurons_pearson", "correlated_features_pearson"):
        if feature[name] != sorted(feature[name], reverse=True):
            yield f"{name} are not in order"
    if feature["neg_values"] != sorted(feature["neg_values"]):
        yield "neg_values are not in order"
    if any(abs(v) > 1 for name in feature if "correlated" in name and "ind" not in name for v in feature[name]):
        yield "a correlation beyond 1"
    if not all(0 < share <= 1 for share in feature["neuron_alignment_l1"]):
        yield "a share of the norm beyond 1"
    if sum(feature["logits_hist_data_bar_heights"]) != vocab:
        yield "logits' histogram does not hold the vocabulary"
    centres = feature["logits_hist_data_bar_values"]
    half = (centres[-1] - centres[0]) / 49 / 2
    if not (near(centres[0] - half, feature["neg_values"][0]) and near(centres[-1] + half, feature["pos_values"][0])):
        yield "logits' histogram ends elsewhere than the tables begin"
    fires = sum(feature["freq_hist_data_bar_heights"])
    tokens = feature["n_prompts_total"] * feature["n_tokens_in_prompt"]
    if abs(feature["frac_nonzero"] - fires / tokens) > 5.0001e-6:
        yield "frac_nonzero is not what the histogram holds"
    if len(feature["freq_hist_data_bar_heights"]) != (50 if fires else 0):
        yield "histogram of activations without 50 bins"


def broken_activations(feature: dict[str, Any]) -> Iterator[str]:
    """The same of the activations shown."""
    shown = feature["activations"]
    top, rest = ([a for a in shown if (a["bin_min"] == -1) == is_top] for is_top in (True, False))
    peaks = [a["values"][a["qualifying_token_index"]] for a in top]
    largest = top[0]["bin_max"]
    fires = sum(feature["freq_hist_data_bar_heights"])
    if peaks != sorted(peaks, reverse=True) or peaks[0] != largest or largest != max(max(a["values"]) for a in shown):
        yield "top activations do not begin with the largest"
    if sum(peak > 0 for peak in peaks) != min(len(top), fires):
        yield "top activations leave some out"
    if fires > 1:
        centres = feature["freq_hist_data_bar_values"]
        if not near(centres[-1] + (centres[-1] - centres[0]) / 49 / 2, largest):
            yield "histogram of activations does not end at the largest"
    for a in shown:
        value = a["values"][a["qualifying_token_index"]]
        if len(a["tokens"]) != len(a["values"]) or len(a["tokens"]) != feature["n_tokens_in_prompt"] - 1:
            yield "a row of another length"
        if any(v < 0 or v != round(v, 3) for v in a["values"]):
            yield "a value below 0, or of many digits"
        if a in top and (a["bin_max"], a["bin_contains"]) != (largest, -1):
            yield "a label among the top activations"
        if a in rest and not a["bin_min"] - 0.0011 <= value <= a["bin_max"] + 0.0011:
            yield "a value outside of its interval"
    yield from broken_intervals(rest, largest)


def broken_intervals(rest: list[dict[str, Any]], largest: float) -> Iterator[str]:
    """The same of the intervals' labels."""
    labels = list(dict.fromkeys((a["bin_min"], a["bin_max"], a["bin_contains"]) for a in rest))
    edges = [largest * i / 5 for i in range(6)]
    for lo, hi, contains in labels:
        if not any(near(lo, a) and near(hi, b) for a, b in zip(edges, edges[1:], strict=False)) and largest:
            yield "an interval that is no fifth"
        if not 0 <= contains <= 1 or sum(a["bin_min"] == lo for a in rest) > 5:
            yield "an interval that holds too much"
    if [lo for lo, _, _ in labels] != sorted((lo for lo, _, _ in labels), reverse=True):
        yield "intervals are not in order"
    if sum(contains for _, _, contains in labels) > 1 + 5 * 5e-6 and len({lo for lo, _, _ in labels}) > 1:
        yield "intervals hold more than everything"


def problems(features: list[dict[str, Any]], vocab: int) -> list[str]:
    """All of them, with the feature."""
    return [
        f"feature {feature['feature_index']}: {problem}"
        for feature in features
        for problem in (*wrong_types(feature), *broken_tables(feature, vocab), *broken_activations(feature))
    ]


def test_our_export_is_of_that_kind(ours: Material, tmp_path: Path) -> None:
    found = described(ours, tmp_path / "out")
    assert [feature["feature_index"] for feature in found] == list(range(F))
    assert problems(found, 30) == []


@needs_real
def test_the_real_export_is_of_that_kind() -> None:
    """Else the checker checks something else. Its features fire rarely, and feature 1 never."""
    assert problems(real(), 50257) == []


@needs_real
def test_batches_have_the_keys_of_the_real_one(ours: Material, tmp_path: Path) -> None:
    described(ours, tmp_path / "out")
    (mine,), theirs = batches(tmp_path / "out"), batches(REAL)[0]
    assert set(mine) == set(theirs) | {"sae_id_suffix"}  # which is younger
    assert {name: type(mine[name]) for name in theirs} == {name: type(value) for name, value in theirs.items()}
    skipped, real_skipped = (json.loads((f / "skipped_indexes.json").read_text()) for f in (tmp_path / "out", REAL))
    assert set(skipped) == set(real_skipped)


@pytest.mark.parametrize(
    ("change", "problem"),
    {
        "pos_values": "pos_values are not in order",
        "freq_hist_data_bar_heights": "frac_nonzero is not what the histogram holds",
        "logits_hist_data_bar_heights": "logits' histogram does not hold the vocabulary",
        "neuron_alignment_indices": "neuron_alignment_indices",
    }.items(),
)
def test_the_checker_notices(ours: Material, tmp_path: Path, change: str, problem: str) -> None:
    feature = described(ours, tmp_path / "out")[0]
    feature[change] = [str(i) if "ind" in change else i for i in range(len(feature[change]))]
    assert f"feature 0: {problem}" in problems([feature], 30)


# ---- by brute force


def firings(feature: int, m: Material) -> NDArray[np.float64]:
    """[R, T], times the norm of the feature's decoder row."""
    norm = float(m.W_dec_FD[feature].norm())
    return text()[0][..., feature].astype(np.float64) * norm


@pytest.mark.parametrize("feature", range(F))
def test_histogram_and_density(ours: Material, tmp_path: Path, feature: int) -> None:
    found = described(ours, tmp_path / "out")[feature]
    f_RT = firings(feature, ours)
    positive = f_RT[f_RT > 0]
    assert found["frac_nonzero"] == pytest.approx(round(len(positive) / (ROWS * T), 5), abs=1e-12)
    if feature == DEAD:
        assert found["freq_hist_data_bar_heights"] == found["freq_hist_data_bar_values"] == []
        return
    if feature == TIED:  # all the same: the middle bin
        assert found["freq_hist_data_bar_heights"][25] == len(positive)
        return
    heights, edges = np.histogram(positive, bins=50)
    assert np.abs(np.cumsum(heights) - np.cumsum(found["freq_hist_data_bar_heights"])).max() <= 1  # an edge in float32
    np.testing.assert_allclose(found["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, atol=6e-4)


@pytest.mark.parametrize("size", [1, 2, 50, 5000])
def test_bins_are_those_of_torch(size: int) -> None:
    """Also of values on an edge, and of a single one."""
    for seed in range(20):
        data = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        for values in (data, (data * 50).round() / 50, data.abs() * 1e-6 + 1000):
            assert _bars(values.numpy())[0] == torch.histc(values, bins=50).int().tolist()


@pytest.mark.parametrize("feature", range(F))
def test_top_and_intervals(ours: Material, tmp_path: Path, feature: int) -> None:
    """Largest first, then the earlier token; where the feature fires too rarely, the earliest others."""
    shown = described(ours, tmp_path / "out")[feature]["activations"]
    f_RT = firings(feature, ours)
    scored = np.flatnonzero(ours.scored_RT)
    order = sorted(scored, key=lambda token: (-f_RT.flat[token], token))[:20]
    top = [a for a in shown if a["bin_min"] == -1]
    assert [(a["qualifying_token_index"], a["values"]) for a in top] == [
        (token % T - 1, pytest.approx(f_RT[token // T, 1:].tolist(), abs=6e-4)) for token in order
    ]
    edges = np.float32(f_RT.max()) * np.arange(6, dtype=np.float32) / 5
    for lo, hi in zip(edges, edges[1:], strict=False):
        inside = (f_RT.astype(np.float32) >= lo - 1e-6) & (f_RT.astype(np.float32) <= hi + 1e-6)
        own = [a for a in shown if abs(a["bin_min"] - lo) < 6e-4 and abs(a["bin_max"] - hi) < 6e-4]
        assert len(own) == min(5, (inside & ours.scored_RT).sum())
        assert all(abs(a["bin_contains"] - inside.mean()) < 6e-6 for a in own)
        assert len({(tuple(a["tokens"]), a["qualifying_token_index"]) for a in own}) == len(own)


def test_a_feature_that_never_fires(ours: Material, tmp_path: Path) -> None:
    """As SAEDashboard: one interval, from 0 to 0, and rows of zeros; nothing correlates."""
    found = described(ours, tmp_path / "out")[DEAD]
    labels = [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in found["activations"]]
    assert labels == [(-1, 0, -1)] * 20 + [(0, 0, 1)] * 5
    assert {value for a in found["activations"] for value in a["values"]} == {0.0}
    assert found["correlated_neurons_pearson"] == found["correlated_features_l1"] == [0.0] * 3


def test_logits_and_alignment(ours: Material, tmp_path: Path) -> None:
    found = described(ours, tmp_path / "out")[2]
    direction_D = ours.W_dec_FD[2].double() / ours.W_dec_FD[2].double().norm()
    logits_V = (direction_D @ ours.W_U_DV.double()).numpy()
    np.testing.assert_allclose(found["pos_values"], np.sort(logits_V)[:-11:-1], atol=6e-4)
    np.testing.assert_allclose(found["neg_values"], np.sort(logits_V)[:10], atol=6e-4)
    assert found["logits_hist_data_bar_heights"] == np.histogram(logits_V, bins=50)[0].tolist()
    order = np.argsort(-direction_D.numpy())[:3]
    assert found["neuron_alignment_indices"] == order.tolist()
    share = direction_D.numpy()[order] / np.abs(direction_D.numpy()).sum()
    np.testing.assert_allclose(found["neuron_alignment_l1"], np.abs(share), atol=6e-4)


def test_correlations(ours: Material, tmp_path: Path) -> None:
    """Over scored tokens; with neurons from the sums, with features from the firings."""
    found = described(ours, tmp_path / "out")
    f_RTF, _ = text()
    f_SF = f_RTF[ours.scored_RT].astype(float)
    x_RTD = np.random.default_rng(1).normal(0, 1, (ROWS, T, D)) + f_RTF[..., :D]
    for feature in range(F - 1):
        for name, other_S in (("neurons", x_RTD[ours.scored_RT]), ("features", f_SF)):
            alive = [column.any() for column in other_S.T]
            pearson = np.zeros(len(alive))
            pearson[alive] = [np.corrcoef(f_SF[:, feature], column)[0, 1] for column in other_S.T[alive]]
            if name == "features":
                pearson[feature] = 0
            best = np.argsort(-pearson, kind="stable")[:3]
            assert found[feature][f"correlated_{name}_indices"] == best.tolist()
            np.testing.assert_allclose(found[feature][f"correlated_{name}_pearson"], pearson[best], atol=6e-4)
            a, b = f_SF[:, [feature]], other_S[:, best]
            cosine = (a * b).sum(0) / (np.linalg.norm(a) * np.linalg.norm(b, axis=0) + 1e-6)
            cosine[best == feature] *= name == "neurons"  # with itself: 0, as SAEDashboard
            np.testing.assert_allclose(found[feature][f"correlated_{name}_l1"], cosine, atol=6e-4)


def test_correlations_do_not_depend_on_blocks(ours: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds two blocks of firings; here of a few, and one row of products at a time."""
    features, tokens = [0, 1, 4, 5, 6], int(ours.scored_RT.sum())
    whole = with_features(ours.events, moments(ours.events), features, tokens)
    monkeypatch.setattr(correlation, "_CELLS", 1)
    monkeypatch.setattr(correlation, "_FIRINGS", 250)
    assert len(ours.events.blocks(range(F), 250)) > 3
    parts = with_features(ours.events, moments(ours.events), features, tokens)
    assert parts.index_nK.tolist() == whole.index_nK.tolist()
    np.testing.assert_allclose(parts.pearson_nK, whole.pearson_nK, rtol=1e-12)


def test_the_decoder_norm_is_folded(ours: Material, tmp_path: Path) -> None:
    """A decoder twice as long, with activations half as large, is the same SAE."""
    (tmp_path / "other").mkdir()
    other = material(tmp_path / "other", scale=2.0)
    assert described(ours, tmp_path / "a") == described(other, tmp_path / "b")


def test_a_decoder_row_of_zeros(ours: Material, tmp_path: Path) -> None:
    """Its norm counts as 1e-8, as in SAELens: no logits, and nothing that JSON cannot say."""
    ours.W_dec_FD[1] = 0
    found = described(ours, tmp_path / "out")[1]
    assert found["pos_values"] == found["neg_values"] == [0.0] * 10
    assert (found["logits_hist_data_bar_heights"][25], found["neuron_alignment_l1"]) == (30, [0.0] * 3)
    assert {value for a in found["activations"] for value in a["values"]} == {0.0}


# ---- draws


def test_splitmix64() -> None:
    """The first outputs of Vigna's splitmix64.c, seed 0."""
    found = [splitmix64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_are_uniform_and_different() -> None:
    """Of 8 numbers, each is among the 3 drawn in 3/8 of 4,000 draws, within four standard deviations."""
    drawn = [draw(8, 3, 5, key).tolist() for key in range(4000)]
    assert all(found == sorted(set(found)) and len(found) == 3 for found in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=8)
    assert np.abs(counts - 1500).max() < 4 * np.sqrt(4000 * 3 / 8 * 5 / 8)
    assert draw(3, 5, 1).tolist() == [0, 1, 2]


def test_the_others() -> None:
    excluded = np.array([0, 1, 4, 9])
    assert others(excluded, np.arange(6)).tolist() == [2, 3, 5, 6, 7, 8]
    assert others(np.zeros(0, dtype=np.int64), np.arange(2)).tolist() == [0, 1]


def test_same_seed_same_bytes(ours: Material, tmp_path: Path) -> None:
    """Also of what is gzipped; another seed draws other rows, and changes nothing else."""
    place = Place("tiny-lm", 8, "ours")
    for name in ("a", "b"):
        files = BatchFiles(tmp_path / name, ours.about, place)
        export(ours, [files, ImportFiles(tmp_path / f"np-{name}", ours.about, place, RELEASE)])
    for first, second in (("a", "b"), ("np-a", "np-b")):
        one, two = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in (first, second))
        assert len(one) and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    seeded = dataclasses.replace(ours, about=dataclasses.replace(ours.about, seed=1))
    for mine, other in zip(described(ours, tmp_path / "c"), described(seeded, tmp_path / "d"), strict=True):
        assert mine["activations"][:20] == other.pop("activations")[:20]
        assert {name: value for name, value in mine.items() if name != "activations"} == other
    assert (tmp_path / "c" / "batch-0.json").read_bytes() != (tmp_path / "d" / "batch-0.json").read_bytes()


# ---- files

PRISMA: dict[str, tuple[str, str]] = {
    "release": (
        "name description creatorName creatorId visibility isNewUi featured urls defaultUmapSourceIds createdAt",
        "descriptionShort creatorEmail creatorNameShort defaultSourceSetName defaultSourceId",
    ),
    "model": (
        "id displayNameShort displayName creatorId thinking visibility inferenceEnabled instruct layers neuronsPerLayer"
        " createdAt owner updatedAt",
        "tlensId openRouterId dimension defaultSourceSetName defaultSourceId defaultGraphSourceSetName website",
    ),
    "sourceset": (
        "modelId name hasDashboards allowInferenceSearch visibility description type creatorName urls creatorId"
        " hasGraphs graphEnabled similarityMatrixEnabled defaultRange defaultShowBreaks showDfa showCorrelated"
        " showHeadAttribution showUmap createdAt",
        "creatorEmail releaseName defaultOfModelId defaultGraphModelId",
    ),
    "source": (
        "id modelId hasDashboards inferenceEnabled visibility setName creatorId hasUmap hasUmapLogSparsity"
        " hasUmapClusters createdAt",
        "saelensConfig saelensRelease saelensSaeId hfRepoId hfFolderId defaultOfModelId num_prompts"
        " num_tokens_in_prompt dataset notes cosSimMatchModelId cosSimMatchSourceId",
    ),
    "features": (
        "modelId layer index createdAt hasVector vector topkCosSimIndices topkCosSimValues neuron_alignment_indices"
        " neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson"
        " correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str"
        " neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values"
        " logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist",
        "sourceSetName creatorId maxActApprox vectorLabel vectorDefaultSteerStrength hookName umap_cluster"
        " umap_log_feature_sparsity umap_x umap_y",
    ),
    "activations": (
        "id tokens index layer modelId maxValue maxValueTokenIndex minValue values dfaValues zQIndices zKIndices"
        " zValues creatorId createdAt lossValues",
        "dataIndex dataSource dfaTargetIndex dfaMaxValue logitContributions binMin binMax binContains"
        " qualifyingTokenIndex",
    ),
}
"""Columns of Neuronpedia's tables (apps/webapp/prisma/schema.prisma): those that may not be NULL, those that may."""
REQUIRED: dict[str, str] = {
    "release": "name description creatorName creatorId",
    "model": "id creatorId layers neuronsPerLayer owner",
    "sourceset": "modelId name description creatorName creatorId urls",
    "source": "id modelId setName creatorId",
    "features": "modelId layer index",
    "activations": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId",
}
"""Those without a default."""


def lines(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table, read as Neuronpedia's importer does: null bytes replaced in the text, then JSON by line."""
    one = folder / f"{table}.jsonl"
    found = (
        [one.read_bytes()] if one.is_file() else [gzip.decompress(p.read_bytes()) for p in (folder / table).iterdir()]
    )
    content = b"".join(found).decode("utf-8").replace("\\u0000", " ")
    return [json.loads(line) for line in content.strip().split("\n")]


@pytest.fixture
def imported(ours: Material, tmp_path: Path) -> Path:
    """The folder of an import."""
    export(ours, [ImportFiles(tmp_path / "np", ours.about, Place("tiny-lm", 8, "ours"), RELEASE)])
    return tmp_path / "np" / "tiny-lm" / "8-ours"


@pytest.mark.parametrize("table", PRISMA)
def test_columns_are_those_of_the_table(imported: Path, table: str) -> None:
    """All that have no default are there, none is NULL that may not be, and every line has those of the first."""
    never_null, nullable = (set(names.split()) for names in PRISMA[table])
    found = lines(imported, table)
    assert set(found[0]) <= never_null | nullable
    assert set(REQUIRED[table].split()) <= set(found[0]) and all(set(row) == set(found[0]) for row in found)
    assert all(row[name] is not None for row in found for name in never_null & set(row))


def test_rows_belong_together(imported: Path) -> None:
    (release,), (model,), (group,), (source,) = (
        lines(imported, t) for t in ("release", "model", "sourceset", "source")
    )
    features, activations = lines(imported, "features"), lines(imported, "activations")
    assert (group["releaseName"], group["modelId"], source["setName"]) == (release["name"], model["id"], group["name"])
    assert {(f["modelId"], f["layer"]) for f in features} == {(model["id"], source["id"])} == {("tiny-lm", "8-ours")}
    assert {a["index"] for a in activations} == {f["index"] for f in features} == {str(i) for i in range(F)}
    assert {row["creatorId"] for row in (release, model, group, source, *features, *activations)} == {"user1"}
    ids = [a["id"] for a in activations]
    assert len(set(ids)) == len(ids) and all(len(i) == 25 and i[0] == "c" and i.isalnum() for i in ids)


def test_import_says_what_the_batches_say(ours: Material, imported: Path, tmp_path: Path) -> None:
    features, activations = lines(imported, "features"), iter(lines(imported, "activations"))
    for mine, row in zip(described(ours, tmp_path / "out"), features, strict=True):
        assert row["maxActApprox"] == max(max(a["values"]) for a in mine["activations"])
        assert all(row[name] == mine[name] for name in FIELDS if not name.endswith("_str"))
        for a in mine["activations"]:
            b = next(activations)
            assert (b["values"], b["qualifyingTokenIndex"]) == (a["values"], a["qualifying_token_index"])
            assert (b["binMin"], b["binMax"], b["binContains"]) == (a["bin_min"], a["bin_max"], a["bin_contains"])
            assert (b["maxValue"], b["minValue"]) == (max(a["values"]), min(a["values"]))
            assert b["maxValueTokenIndex"] == a["values"].index(max(a["values"]))


def test_hostile_tokens_arrive(ours: Material, imported: Path, tmp_path: Path) -> None:
    """Scripts, line separators, quotes, backslashes and null bytes. The importer makes null bytes spaces, and must not
    cut a token that is a backslash and `u0000`."""
    wanted = {"</script><script>alert(1)</script>", "\u2028", "\\u0000", '"', "\\", "\ud7ff", "\n“"}
    direct = {token for f in described(ours, tmp_path / "out") for a in f["activations"] for token in a["tokens"]}
    there = {token for a in lines(imported, "activations") for token in a["tokens"]}
    assert wanted | {"\0"} <= direct
    assert wanted | {" "} <= there and "\0" not in there
    assert (tmp_path / "out" / "batch-0.json").read_bytes().isascii()


def test_chosen_features_in_their_order(tmp_path: Path) -> None:
    """The others are skipped ones; an export of some says of each what the whole one says."""
    (tmp_path / "events").mkdir()
    some = material(tmp_path / "events", features=(5, 0, 3))
    found = described(some, tmp_path / "some")
    every = dataclasses.replace(some, about=dataclasses.replace(some.about, features=tuple(range(F))))
    whole = described(every, tmp_path / "whole")
    assert found == [whole[5], whole[0], whole[3]]
    skipped = json.loads((tmp_path / "some" / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [1, 2, 4, 6, 7, 8]


def test_128_features_in_a_batch(ours: Material, tmp_path: Path) -> None:
    many = dataclasses.replace(ours, about=dataclasses.replace(ours.about, features=(0, 1) * 65))
    done: list[int] = []
    files = BatchFiles(tmp_path / "out", many.about, place_of(many.about))
    export(many, [files], done.append)
    assert [len(batch["features"]) for batch in batches(tmp_path / "out")] == [128, 2]
    assert done == [128, 130]


def test_an_earlier_export_goes_and_nothing_else(ours: Material, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "batch-7.json").write_text("old")
    assert len(described(ours, out)) == F
    assert sorted(path.name for path in out.iterdir()) == ["batch-0.json", "skipped_indexes.json"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SaezooError, match=r"out has other things in it, such as notes\.txt; give a new or an empty"):
        BatchFiles(out, ours.about, place_of(ours.about))
    assert (out / "batch-0.json").is_file()


@pytest.mark.parametrize("where", ["", "features", "activations"])
def test_an_import_leaves_other_things_alone(ours: Material, imported: Path, tmp_path: Path, where: str) -> None:
    (imported / where / "mine").mkdir()
    with pytest.raises(SaezooError, match="has other things in it, such as mine; give a new or an empty folder"):
        ImportFiles(tmp_path / "np", ours.about, Place("tiny-lm", 8, "ours"), RELEASE)
    assert (imported / "source.jsonl").is_file()


@pytest.mark.parametrize("lacking", ["creator_id", "creator", "name", "title", "created"])
def test_a_release_that_lacks_something(ours: Material, tmp_path: Path, lacking: str) -> None:
    release = dataclasses.replace(RELEASE, **{lacking: ""})
    with pytest.raises(UsageError, match=f"needs {lacking.replace('_', ' ')} of the release; it is empty"):
        ImportFiles(tmp_path / "np", ours.about, Place("tiny-lm", 8, "ours"), release)


def test_places(ours: Material) -> None:
    """Neuronpedia's own where it is known; a collection that is a folder is no path."""
    known = dataclasses.replace(ours.about, neuronpedia="gpt2-small/8-res_fs768-jb__x")
    assert place_of(known) == Place("gpt2-small", 8, "res_fs768-jb", "x")
    assert place_of(known).source == "8-res_fs768-jb__x"
    folder = dataclasses.replace(ours.about, collection="../../runs/my sae", model="/home/me/lm")
    assert place_of(folder) == Place("home-me-lm", 8, "runs-my-sae")
    with pytest.raises(UsageError, match=r"hook ln_final has no layer, which an export needs: blocks\.LAYER\.name"):
        place_of(dataclasses.replace(ours.about, hook="ln_final"))
