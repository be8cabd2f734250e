"""The built-in registry, value by value; finding entries; overlays; and each refusal."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_registry
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saezoo.entries import Entry, FileFacts, Layout, Model, Recipe
from saezoo.errors import RegistryError, SaezooError, UsageError
from saezoo.registry import Registry, package_folder, read_registry

BUILT_IN = read_registry()
ENTRIES = [entry for entries in BUILT_IN.collections.values() for entry in entries]
GPT2 = BUILT_IN.collections["gpt2-small-res"]
# The post's table: CE with the SAE, explained variance, L0, L1, alive.
PUBLISHED = [
    (3.32, 0.9915, 12.24, 4.58, 0.800),
    (3.33, 0.9837, 14.68, 41.04, 0.834),
    (3.37, 0.9807, 18.80, 51.88, 0.800),
    (3.48, 0.9697, 25.75, 74.96, 0.863),
    (3.44, 0.9577, 33.14, 90.23, 0.977),
    (3.45, 0.9490, 43.61, 108.59, 0.997),
    (3.44, 0.9390, 49.68, 136.07, 1.000),
    (3.45, 0.9308, 57.29, 138.05, 1.000),
    (3.45, 0.9257, 65.47, 167.35, 1.000),
    (3.45, 0.9205, 71.10, 198.42, 1.000),
    (3.52, 0.9112, 53.79, 215.11, 1.000),
    (3.57, 0.9330, 59.16, 270.13, 1.000),
]
METRICS = ("ce_sae", "explained_variance_uncentred", "l0", "l1", "alive_fraction")


def entry_id(entry: Entry) -> str:
    return f"{entry.collection} {entry.name}"


def places(entry: Entry) -> list[Layout | Model]:
    """Where the files of the SAE and of its model lie."""
    return [*entry.layouts.values(), entry.model]


def names(registry: Registry, layers: str | int, collection: str = "gpt2-small-res") -> str:
    return " ".join(entry.name for entry in registry.find(collection, layers))


@pytest.mark.parametrize("entry", GPT2, ids=entry_id)
def test_file_names_of_gpt2_small_res(entry: Entry) -> None:
    hook = "blocks.11.hook_resid_post" if entry.name == "11-post" else f"blocks.{entry.name}.hook_resid_pre"
    assert entry.hook == hook
    assert list(entry.layouts) == ["reformatted", "original"]
    new, old = entry.layouts.values()
    assert (new.format, new.repo) == ("saelens", "jbloom/GPT2-Small-SAEs-Reformatted")
    assert (new.weights, new.config) == (f"{hook}/sae_weights.safetensors", f"{hook}/cfg.json")
    assert new.sparsity == f"{hook}/sparsity.safetensors"
    assert (old.format, old.repo, old.config) == ("legacy", "jbloom/GPT2-Small-SAEs", None)
    assert old.weights == f"final_sparse_autoencoder_gpt2-small_{hook}_24576.pt"
    assert old.sparsity == f"final_sparse_autoencoder_gpt2-small_{hook}_24576_log_feature_sparsity.pt"


@pytest.mark.parametrize("entry", GPT2, ids=entry_id)
def test_facts_of_gpt2_small_res(entry: Entry) -> None:
    assert (entry.d_in, entry.d_sae, entry.context_size, entry.dtype) == (768, 24576, 128, "float32")
    assert entry.prepend_bos
    assert entry.centre
    assert (entry.licence, entry.model_name, entry.recipe_name) == ("MIT", "gpt2-small", "feb2024")
    assert entry.neuronpedia == f"gpt2-small/{12 if entry.name == '11-post' else entry.name}-res-jb"
    assert (entry.model.repo, entry.model.n_layers, entry.model.d_model) == ("openai-community/gpt2", 12, 768)
    assert entry.dataset is not None
    assert (entry.dataset.repo, entry.dataset.split) == ("Skylion007/openwebtext", "train")
    assert entry.definitions.protocol == "feb2024"


@pytest.mark.parametrize("layer", range(12))
def test_published_values(layer: int) -> None:
    published = BUILT_IN.find("gpt2-small-res", layer)[0].published
    assert published == dict(zip(METRICS, PUBLISHED[layer], strict=True))


def test_nothing_was_published_about_the_thirteenth() -> None:
    (entry,) = BUILT_IN.find("gpt2-small-res", "11-post")
    assert entry.published == {}
    assert not entry.in_all
    assert entry.layouts["original"].facts == {
        "weights": FileFacts("43025f1ad3c0c3974c90c9cbb3bda68fdfd28680b40069cf02b9d1362e7d0b83", 151_100_656),
        "sparsity": FileFacts("9b4423f187cf3d0047a500391cf9f9cd022ff6a7524b0eab4bda2e85f4352f35", 100_273),
    }


def test_known_hashes_of_layer_9() -> None:
    facts = BUILT_IN.find("gpt2-small-res", 9)[0].layouts["reformatted"].facts
    assert facts["weights"].sha256 == "beee562c3fee612b76c0e79994d45b82780c2055cfa1305d2644b598d49efec7"
    assert facts["sparsity"].sha256 == "cda7bc856dd536b0a33cd1e4d2ee4bb442a2b74950985b41de9c4811710876e7"


def test_recipe_of_february_2024() -> None:
    assert dataclasses.replace(BUILT_IN.recipe("feb2024"), source=()) == Recipe(
        l1_coefficient=8e-5,
        lr=4e-4,
        lr_warmup_steps=0,
        batch_size=4096,
        tokens=300_000_000,
        store_rows=32,
        buffer_batches=128,
        buffer="bug",
        ghost="bug",
        dead_after_steps=5000,
        sampling_window_steps=1000,
        b_dec_init="geometric_median",
        skip_documents=2,
        source=(),
        loss="feb2024",
        l1_warmup_steps=0,
        encoder_init="kaiming",
    )


def test_recipe_of_the_post_differs_in_four_things() -> None:
    ran, told = (dataclasses.asdict(BUILT_IN.recipe(name)) for name in ("feb2024", "post"))
    different = {key: told[key] for key in ran if ran[key] != told[key] and key != "source"}
    assert different == {"lr_warmup_steps": 5000, "buffer": "fixed", "ghost": "fixed", "skip_documents": 0}


def test_a_recipe_that_says_nothing_else_is_of_february_2024(tmp_path: Path) -> None:
    """Files written before the recipes had these keys mean what they meant."""
    (tmp_path / "mine.yaml").write_text(OVERLAY)
    recipe = read_registry(tmp_path / "mine.yaml").recipe("mine")
    assert (recipe.loss, recipe.l1_warmup_steps, recipe.encoder_init) == ("feb2024", 0, "kaiming")


@pytest.mark.parametrize(("name", "small"), [("post", "tiny"), ("standard", "tiny-standard")])
def test_small_recipes_differ_in_numbers_alone(name: str, small: str) -> None:
    large, tiny = (dataclasses.asdict(BUILT_IN.recipe(each)) for each in (name, small))
    words = [key for key, value in large.items() if isinstance(value, str)]
    assert {key: tiny[key] for key in words} == {key: large[key] for key in words}
    assert tiny["tokens"] < large["tokens"]


def test_text_is_held_out_of_the_training_text() -> None:
    """Of the 80 files of OpenWebText, 0 to 69 are trained on and the last is held out."""
    dataset = BUILT_IN.datasets["openwebtext"]
    names = [f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)]
    trained = fnmatch.filter(names, dataset.data_files or "")
    assert trained == names[:70]
    assert fnmatch.filter(names, dataset.heldout_files or "") == [names[79]]


@pytest.mark.parametrize("entry", ENTRIES, ids=entry_id)
def test_no_fact_is_made_up(entry: Entry) -> None:
    facts = [fact for layout in entry.layouts.values() for fact in layout.facts.values()]
    for fact in [*facts, *entry.model.facts.values()]:
        assert fact.sha256 is None or re.fullmatch("[0-9a-f]{64}", fact.sha256)
        assert fact.bytes is None or fact.bytes > 0
    for place in places(entry):
        assert (place.repo is None) != (place.folder is None)
        assert place.repo is None or re.fullmatch("[0-9a-f]{40}", place.revision or "")
    assert entry.dataset is None or re.fullmatch("[0-9a-f]{40}", entry.dataset.revision or "")
    assert set(entry.published) <= set(entry.definitions.definitions)
    assert entry.d_in == entry.model.d_model
    assert 0 <= entry.layer < entry.model.n_layers
    assert entry.origin == "built-in"
    assert entry.source


@pytest.mark.parametrize("entry", ENTRIES, ids=entry_id)
def test_every_entry_is_found_by_its_name(entry: Entry) -> None:
    assert BUILT_IN.find(entry.collection, entry.name) == [entry]
    assert (entry in BUILT_IN.find(entry.collection)) == entry.in_all


def test_bundled_folders_are_in_the_package() -> None:
    for entry in ENTRIES:
        for place in places(entry):
            assert place.folder is None or Path(place.folder).is_relative_to(package_folder())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", "0 1 2 3 4 5 6 7 8 9 10 11"),
        (" all ", "0 1 2 3 4 5 6 7 8 9 10 11"),
        (10, "10"),
        ("10", "10"),
        ("0-3", "0 1 2 3"),
        ("0-3,7", "0 1 2 3 7"),
        ("7,0-1", "7 0 1"),
        ("5-5", "5"),
        (" 1 , 2 ", "1 2"),
        ("3,3,2-4", "3 2 4"),
        ("11-post", "11-post"),
        ("10-11,11-post", "10 11 11-post"),
    ],
)
def test_find(layers: str | int, expected: str) -> None:
    assert names(BUILT_IN, layers) == expected


@pytest.mark.parametrize(
    ("collection", "layers", "message"),
    [
        ("gpt2-smal-res", "0", "no collection `gpt2-smal-res`; did you mean `gpt2-small-res`?"),
        ("zzz", "0", "no collection `zzz`; known: gpt2-small-res"),
        ("gpt2-small-res", "12", "`gpt2-small-res` has no layer `12`; known: 0, 1, 2"),
        ("gpt2-small-res", 99, "`gpt2-small-res` has no layer `99`; known: 0, 1, 2"),
        ("gpt2-small-res", "10-12", "`gpt2-small-res` has no layer `12`; known: 0, 1, 2"),
        ("gpt2-small-res", "11-pots", "`gpt2-small-res` has no layer `11-pots`; did you mean `11-post`?"),
        ("gpt2-small-res", "3-0", "layer range `3-0` runs backwards; write `0-3`"),
        ("gpt2-small-res", "0-999999999", "layer range `0-999999999` names 1,000,000,000 layers; no collection has"),
        ("gpt2-small-res", -1, "`gpt2-small-res` has no layer `-1`; "),
        ("gpt2-small-res", "", "`gpt2-small-res` has no layer ``; "),
        ("gpt2-small-res", "1,,2", "`gpt2-small-res` has no layer ``; "),
    ],
)
def test_what_is_not_found(collection: str, layers: str | int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        BUILT_IN.find(collection, layers)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unknown_recipe() -> None:
    with pytest.raises(UsageError, match="no recipe `feb2042`; did you mean `feb2024`"):
        BUILT_IN.recipe("feb2042")


@given(st.one_of(st.text(), st.text(alphabet="0123456789-, allpost", max_size=12)))
@example("0-" + "9" * 5000)
@settings(deadline=None)
def test_any_layers_are_found_or_a_usage_error(layers: str) -> None:
    try:
        found = BUILT_IN.find("gpt2-small-res", layers)
    except UsageError:
        return
    assert len({entry.name for entry in found}) == len(found) > 0


def test_an_overlay_adds(small_registry: dict[str, Any], tmp_path: Path) -> None:
    path = write_registry(tmp_path / "mine.yaml", small_registry)
    registry = read_registry(path)
    assert list(registry.collections) == [*BUILT_IN.collections, "small"]
    assert names(registry, "all", "small") == "0 1 2"
    assert {entry.origin for entry in registry.collections["small"]} == {str(path)}
    assert registry.collections["gpt2-small-res"] == GPT2
    assert registry.collections["small"][0].recipe == BUILT_IN.recipe("feb2024")


def test_an_overlay_replaces(small_registry: dict[str, Any], tmp_path: Path) -> None:
    content = small_registry
    content["collections"] = {"gpt2-small-res": content["collections"]["small"]}
    registry = read_registry(str(write_registry(tmp_path / "mine.yaml", content)))
    assert list(registry.collections) == list(BUILT_IN.collections)
    assert names(registry, "all") == "0 1 2"
    assert registry.find("gpt2-small-res", 0)[0].origin == str(tmp_path / "mine.yaml")
    assert read_registry().collections["gpt2-small-res"] == GPT2


def test_the_environment_names_an_overlay_and_the_argument_wins(
    small_registry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEZOO_REGISTRY", str(write_registry(tmp_path / "a.yaml", small_registry)))
    assert "small" in read_registry().collections
    small_registry["collections"] = {"other": small_registry["collections"]["small"]}
    registry = read_registry(write_registry(tmp_path / "b.yaml", small_registry))
    assert "other" in registry.collections
    assert "small" not in registry.collections


def test_an_overlay_is_read_again_when_it_changed(small_registry: dict[str, Any], tmp_path: Path) -> None:
    """A notebook edits its registry and reads it again."""
    path = write_registry(tmp_path / "mine.yaml", small_registry)
    assert "small" in read_registry(path).collections
    small_registry["collections"] = {"renamed": small_registry["collections"]["small"]}
    assert "renamed" in read_registry(write_registry(path, small_registry)).collections


def test_folders_are_relative_to_the_file(small_registry: dict[str, Any], tmp_path: Path) -> None:
    layout = small_registry["collections"]["small"]["layouts"]["reformatted"]
    layout |= {"repo": None, "revision": None, "folder": "."}
    registry = read_registry(write_registry(tmp_path / "mine.yaml", small_registry))
    found = registry.find("small", 1)[0].layouts["reformatted"]
    assert Path(found.folder or "") == tmp_path
    assert found.weights == "blocks.1.hook_resid_pre/sae_weights.safetensors"


OVERLAY = """\
version: 1
sources: {test: made by a test}
recipes:
  mine: {l1_coefficient: 8e-5, lr: 4e-4, lr_warmup_steps: 0, batch_size: 1, tokens: 1, store_rows: 1, buffer_batches: 2,
    buffer: bug, ghost: off, dead_after_steps: 1, sampling_window_steps: 1, b_dec_init: mean, skip_documents: 0,
    source: [test]}
collections:
  small:
    title: Small
    model: gpt2-small
    dataset: null
    recipe: mine
    hook: "blocks.{layer}.hook_resid_pre"
    d_in: 64
    d_sae: 256
    context_size: 128
    prepend_bos: true
    centre: true
    dtype: float32
    licence: MIT
    source: [test]
    layouts:
      here: {format: saelens, folder: ., weights: w, config: c, sparsity: null, source: [test]}
    published: {protocol: standard, sample: none, source: [test], definitions: {l0: features above 0}}
    saes:
      - {layer: 0, neuronpedia: null, published: {l0: 1.5}, files: {}}
      - {layer: 1, neuronpedia: null, published: {l0: null}, files: {}}
"""


def refusal(folder: Path, old: str, new: str) -> str:
    assert OVERLAY.count(old) == 1
    path = folder / "mine.yaml"
    path.write_text(OVERLAY.replace(old, new))
    with pytest.raises(RegistryError) as caught:
        read_registry(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:")


def test_the_overlay_of_the_next_tests_is_right(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OVERLAY)
    entries = read_registry(tmp_path / "mine.yaml").collections["small"]
    assert [entry.published for entry in entries] == [{"l0": 1.5}, {"l0": None}]
    assert entries[0].known_recipe.l1_coefficient == 8e-5
    assert entries[0].known_recipe.ghost == "off"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    title: Small\n",
            "    titel: Small\n",
            "9: collections.small: unknown key `titel`; did you mean `title`?",
        ),
        ("    title: Small\n", "", "9: collections.small: missing key `title`"),
        ("d_in: 64", "d_in: wide", "14: collections.small.d_in: must be a whole number, not `wide`"),
        ("d_in: 64", "d_in: null", "14: collections.small.d_in: must be a whole number; null is not allowed here"),
        ("d_in: 64", "d_in: 64\n    d_in: 65", "15: collections.small: `d_in` is given twice (first on line 14)"),
        ("dtype: float32", "dtype: int8", "19: collections.small.dtype: must be one of float32, float16, bfloat16,"),
        ("layer: 1,", "layer: 0,", "27: collections.small layer 0: layer `0` is given twice; rename or remove one"),
        ("title: Small", "title: *x", "9: YAML alias `*x` is not allowed; write the value out"),
        ("model: gpt2-small", "model: gpt2-smal", "9: collections.small: no model `gpt2-smal`; did you mean `gpt2-sma"),
        ("recipe: mine", "recipe: min", "9: collections.small: no recipe `min`; did you mean `mine`?"),
        ("dataset: null", "dataset: pile", "9: collections.small: no data set `pile`; known: openwebtext"),
        (
            "published: {l0: 1.5}",
            "published: {l9: 1}",
            "26: collections.small layer 0: published metric `l9` has no de",
        ),
        ("published: {l0: 1.5}", "published: {l0: .nan}", "26: collections.small.saes[0].published.l0: must be a numb"),
        (
            "files: {}}\n      -",
            "files: {x: {}}}\n      -",
            "26: collections.small layer 0: `files.x` is not one of th",
        ),
        ("buffer_batches: 2", "buffer_batches: 3", "4: recipes.mine: `buffer_batches` must be even and at least 2, no"),
        ("buffer_batches: 2", "buffer_batches: 0", "4: recipes.mine: `buffer_batches` must be even and at least 2, no"),
        ("lr: 4e-4", "lr: 0", "4: recipes.mine: `lr` must be above 0, not 0.0"),
        ("8e-5", "-8e-5", "4: recipes.mine: `l1_coefficient` must be above 0, not -8e-05"),
        ("8e-5", "inf", "4: recipes.mine.l1_coefficient: must be a number, not `inf`"),
        (" tokens: 1", " tokens: 0", "4: recipes.mine: `tokens` must be above 0, not 0"),
        (" tokens: 1", " tokens: 3e8", "4: recipes.mine.tokens: must be a whole number, not `3e8`"),
        ("batch_size: 1", "batch_size: -1", "4: recipes.mine: `batch_size` must be above 0, not -1"),
        ("lr_warmup_steps: 0", "lr_warmup_steps: -1", "4: recipes.mine: `lr_warmup_steps` must be 0 or more, not -1"),
        ("skip_documents: 0", "skip_documents: -1", "5: recipes.mine: `skip_documents` must be 0 or more, not -1"),
        (
            "skip_documents: 0",
            "skip_documents: 0, l1_warmup_steps: -1",
            "5: recipes.mine: `l1_warmup_steps` must be 0 or more, not -1",
        ),
        (
            "buffer: bug, ghost: off",
            "buffer: bug, ghost: bug, loss: standard",
            "5: recipes.mine: `ghost` must be off with the loss `standard`, not bug",
        ),
        ("ghost: off", "ghost: off, loss: l2", "5: recipes.mine.loss: must be one of feb2024, standard, not `l2`"),
        ("ghost: off", "ghost: maybe", "5: recipes.mine.ghost: must be one of off, bug, fixed, not `maybe`"),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert refusal(tmp_path, old, new).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("version: 1", "version: 2", 1, "version 2 is not the 1 that this saezoo reads"),
        (
            "licence: MIT\n    source: [test]",
            "licence: MIT\n    source: [tset]",
            21,
            "no source `tset`; did you mean `test`",
        ),
        ("d_in: 64", "d_in: 0", 14, "d_in"),
        ("d_sae: 256", "d_sae: -1", 15, "d_sae"),
        ("context_size: 128", "context_size: 0", 16, "context_size"),
        ("layer: 1,", "layer: -1,", 27, "layer"),
        ("folder: .,", "", 23, "repo"),
        ("format: saelens", "format: legacy", 23, "config"),
        ("config: c", "config: null", 23, "config"),
    ],
)
def test_refusals_beyond_types(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    found, _, rest = refusal(tmp_path, old, new).partition(": ")
    assert found.isdigit()
    assert abs(int(found) - line) <= 6  # the record's line or the value's
    assert message in rest


@pytest.mark.parametrize(("key", "empty"), [("saes", []), ("layouts", {})])
def test_an_empty_collection(small_registry: dict[str, Any], tmp_path: Path, key: str, empty: object) -> None:
    """The commands show the first SAE and load the first layout: there must be one."""
    small_registry["collections"]["small"][key] = empty
    with pytest.raises(RegistryError, match=rf"mine\.yaml:\d+: collections\.small.*{key}"):
        read_registry(write_registry(tmp_path / "mine.yaml", small_registry))


def test_a_replaced_model_or_recipe_is_replaced_everywhere(tmp_path: Path) -> None:
    """`eval` takes the model from the registry, `reproduce` from the entry."""
    model = dataclasses.asdict(BUILT_IN.models["gpt2-small"]) | {"repo": "owner/mirror", "facts": {}, "source": ["x"]}
    recipe = dataclasses.asdict(BUILT_IN.recipe("feb2024")) | {"tokens": 4096, "source": ["x"]}
    content = {"version": 1, "sources": {"x": "y"}, "models": {"gpt2-small": model}, "recipes": {"feb2024": recipe}}
    registry = read_registry(write_registry(tmp_path / "mine.yaml", content))
    (entry,) = registry.find("gpt2-small-res", 0)
    assert registry.models["gpt2-small"].repo == "owner/mirror"
    assert entry.model == registry.models["gpt2-small"]
    assert entry.recipe == registry.recipe("feb2024")


def test_what_is_not_known_is_none(small_registry: dict[str, Any], tmp_path: Path) -> None:
    """Of a collection that somebody published without saying how it was trained."""
    small_registry["collections"]["small"] |= dict.fromkeys(["recipe", "context_size", "licence", "dataset"])
    (entry,) = read_registry(write_registry(tmp_path / "mine.yaml", small_registry)).find("small", 0)
    assert (entry.recipe_name, entry.recipe, entry.context_size, entry.licence, entry.dataset) == (None,) * 5
    with pytest.raises(UsageError, match="the recipe of small is unknown; choose one of the registry: --recipe NAME"):
        entry.known_recipe  # noqa: B018
    with pytest.raises(UsageError, match=r"the context size of small 0 is unknown; set `context_size` in .*mine\.yaml"):
        entry.known_context  # noqa: B018


def test_an_overlay_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"absent\.yaml: cannot be read: No such file"):
        read_registry(tmp_path / "absent.yaml")


@given(st.sampled_from(OVERLAY.splitlines(keepends=True)), st.text(max_size=20))
@settings(deadline=None, max_examples=15)
def test_no_damaged_overlay_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, line: str, junk: str
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "mine.yaml"
    path.write_bytes(OVERLAY.replace(line, junk).encode("utf-8", "surrogatepass"))
    try:
        read_registry(path)
    except SaezooError as error:
        assert isinstance(error, RegistryError)


@pytest.mark.parametrize("collection", ["gpt2-small-res", "tiny-res"])
def test_every_fact_carries_its_source(collection: str) -> None:
    registry = read_registry()
    for entry in registry.collections[collection]:
        record = registry.describe(entry)
        blocks = [record, record["model"], record["recipe"], record["definitions"], *record["layouts"].values()]
        for block in blocks:
            assert block["source"]
            assert all(len(record["sources"][key]) > 20 for key in block["source"])
