"""The registry: what each SAE is, where its bytes lie, what was published about it, how it was trained.

`registry.yaml` is data that a person reads; this module turns it, once, into frozen dataclasses and finds entries by
name. Unknown facts are None. Nothing here touches the network or imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from saezoo import strict_yaml
from saezoo.errors import RegistryError, UsageError

VERSION = 1
Protocol = Literal["standard", "feb2024"]


@dataclass(frozen=True)
class FileFacts:
    """What is known about the bytes of one file; None where nobody has published it."""

    sha256: str | None
    bytes: int | None


@dataclass(frozen=True)
class Layout:
    """One published form of an SAE. In `registry.yaml` the file names may hold `{hook}`."""

    format: Literal["saelens", "legacy"]
    """`saelens`: a folder of cfg.json + safetensors. `legacy`: the pickle of February 2024."""
    weights: str
    config: str | None
    sparsity: str | None
    source: tuple[str, ...]
    repo: str | None = None
    """Hugging Face model repository, or None for files that lie in `folder`."""
    revision: str | None = None
    folder: str | None = None
    """Folder of the files, relative to the registry file (to the package for the built-in one)."""
    facts: dict[str, FileFacts] = field(default_factory=dict)
    """`weights`, `config`, `sparsity` -> size and hash."""


@dataclass(frozen=True)
class Model:
    """The frozen language model that an SAE reads."""

    architecture: Literal["gpt2"]
    n_layers: int
    d_model: int
    n_positions: int
    vocab: int
    licence: str
    source: tuple[str, ...]
    repo: str | None = None
    revision: str | None = None
    folder: str | None = None
    facts: dict[str, FileFacts] = field(default_factory=dict)
    """File name -> size and hash."""


@dataclass(frozen=True)
class Dataset:
    """Text on the Hugging Face hub that the SAE was trained on."""

    repo: str
    revision: str | None
    data_files: str | None
    """Glob of parquet files in the repository; None lets `datasets` find them."""
    split: str
    text_column: str
    licence: str | None
    source: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Every hyperparameter of one training; units in the field docs. No run-time options (device, paths) in here."""

    l1_coefficient: float
    """λ in MSE + λ·mean_b Σ_i |f_bi|, where MSE is the mean over batch and dimensions of e²/‖x_b‖."""
    lr: float
    lr_warmup_steps: int
    """Linear from 0 over this many steps; 0 is a constant rate."""
    batch_size: int
    """Activations in one step."""
    tokens: int
    """Activations to train on; the last step may overshoot."""
    store_rows: int
    """Rows of `context_size` tokens in one call of the token store."""
    buffer_batches: int
    """The activation buffer holds this many store calls; half of it is refilled at a time."""
    buffer: Literal["bug", "fixed"]
    """Which half of the mixed buffer is trained on: `bug` the half that also stays, `fixed` the other one."""
    ghost: Literal["off", "bug", "fixed"]
    """Ghost gradients: `bug` exp(ReLU(pre)) as the post ran it, `fixed` exp(pre)."""
    dead_after_steps: int
    """A feature that has not fired for more than this many steps gets ghost gradients."""
    sampling_window_steps: int
    """Log feature sparsity is computed over the last complete window of this many steps."""
    b_dec_init: Literal["geometric_median", "mean", "zero"]
    skip_documents: int
    """Documents lost at the start of the data; the original's start-up check consumed two."""
    source: tuple[str, ...]

    def __post_init__(self) -> None:
        positive = ("l1_coefficient", "lr", "batch_size", "tokens", "store_rows", "dead_after_steps")
        for name in (*positive, "sampling_window_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, not {getattr(self, name)}")
        if self.lr_warmup_steps < 0 or self.skip_documents < 0:
            raise ValueError("`lr_warmup_steps` and `skip_documents` must be 0 or more")
        if self.buffer_batches < 2 or self.buffer_batches % 2:
            raise ValueError(f"`buffer_batches` must be even and at least 2, not {self.buffer_batches}")


@dataclass(frozen=True)
class Published:
    """Which protocol and sample the published numbers of a collection were measured with, and what they mean."""

    protocol: Protocol
    sample: str
    definitions: dict[str, str]
    """Our metric's name -> how the source defines it."""
    source: tuple[str, ...]


@dataclass(frozen=True)
class _Sae:
    line: int
    layer: int
    neuronpedia: str | None
    published: dict[str, float | None]
    files: dict[str, dict[str, FileFacts]]
    name: str | None = None
    hook: str | None = None
    in_all: bool = True


@dataclass(frozen=True)
class _Collection:
    line: int
    title: str
    model: str
    dataset: str | None
    recipe: str
    hook: str
    d_in: int
    d_sae: int
    context_size: int
    prepend_bos: bool
    centre: bool
    dtype: Literal["float32", "float16", "bfloat16"]
    licence: str
    source: tuple[str, ...]
    layouts: dict[str, Layout]
    published: Published
    saes: tuple[_Sae, ...]


@dataclass(frozen=True)
class _File:
    version: int
    sources: dict[str, str] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    collections: dict[str, _Collection] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One SAE of the zoo, everything resolved."""

    collection: str
    name: str
    """What users type after the collection: `10`, or `11-post`."""
    in_all: bool
    """False for siblings that `all` leaves out."""
    title: str
    layer: int
    hook: str
    """TransformerLens' name of the activation, e.g. `blocks.10.hook_resid_pre`."""
    model_name: str
    model: Model
    d_in: int
    d_sae: int
    context_size: int
    """Tokens per row in training; positions beyond it were never seen."""
    prepend_bos: bool
    centre: bool
    """True: the SAE wants the residual minus its mean over d_model (TransformerLens' centred writing weights)."""
    dtype: str
    licence: str
    layouts: dict[str, Layout]
    """In order of preference; `load` takes the first."""
    neuronpedia: str | None
    definitions: Published
    published: dict[str, float | None]
    """Our metric's name -> the published value."""
    recipe_name: str
    recipe: Recipe
    dataset_name: str | None
    dataset: Dataset | None
    source: tuple[str, ...]
    origin: str
    """The registry file this came from; `built-in` for the package's own."""


@dataclass(frozen=True)
class Registry:
    """All entries by collection, in registry order, and the recipes by name."""

    collections: Mapping[str, tuple[Entry, ...]]
    recipes: Mapping[str, Recipe]
    models: Mapping[str, Model]

    def find(self, collection: str, layers: str | int = "all") -> list[Entry]:
        """The entries of `collection` that `layers` names: `10`, `0-3,7`, `11-post` or `all`.

        Raises UsageError with the nearest name for an unknown collection or layer.
        """
        if collection not in self.collections:
            raise UsageError(_unknown("collection", collection, self.collections))
        entries = self.collections[collection]
        if str(layers).strip() == "all":
            return [entry for entry in entries if entry.in_all]
        by_name = {entry.name: entry for entry in entries}
        found: dict[str, Entry] = {}
        for part in str(layers).split(","):
            for name in _expand(part.strip(), by_name):
                if name not in by_name:
                    raise UsageError(_unknown(f"layer of `{collection}`", name, by_name))
                found[name] = by_name[name]
        return list(found.values())

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`; UsageError with the nearest name if there is none."""
        if name not in self.recipes:
            raise UsageError(_unknown("recipe", name, self.recipes))
        return self.recipes[name]


def package_folder() -> Path:
    """Folder of the installed package, where the built-in registry and the bundled files lie."""
    return Path(str(resources.files("saezoo")))


def read_registry(overlay: Path | str | None = None) -> Registry:
    """The built-in registry, overlaid by a user's file of the same form.

    `overlay`, or else the environment variable SAEZOO_REGISTRY, names that file. Its collections, recipes and models
    are added; one with a built-in's name replaces it, and `saezoo list` shows where each entry came from.
    """
    path = str(overlay) if overlay is not None else os.environ.get("SAEZOO_REGISTRY", "")
    return _read(str(Path(path).resolve()) if path else None)


@functools.lru_cache(maxsize=8)
def _read(overlay: str | None) -> Registry:
    base = _located(
        strict_yaml.read(package_folder() / "registry.yaml", _File, label="registry.yaml"), package_folder()
    )
    files = [("built-in", base)]
    if overlay is not None:
        files.append((overlay, _located(strict_yaml.read(Path(overlay), _File), Path(overlay).parent)))
    models: dict[str, Model] = {}
    datasets: dict[str, Dataset] = {}
    recipes: dict[str, Recipe] = {}
    sources: dict[str, str] = {}
    collections: dict[str, tuple[Entry, ...]] = {}
    for origin, file in files:
        if file.version != VERSION:
            raise RegistryError(f"{_shown(origin)}: version {file.version} is not the {VERSION} that this saezoo reads")
        models.update(file.models)
        datasets.update(file.datasets)
        recipes.update(file.recipes)
        sources.update(file.sources)
        for name, spec in file.collections.items():
            resolve = _Resolver(origin, name, spec, models, datasets, recipes)
            collections[name] = resolve.entries()
        _check_sources(origin, file, sources)
    return Registry(collections, recipes, models)


def _located(file: _File, base: Path) -> _File:
    """The same, with every `folder` made absolute."""

    def at(item: Layout | Model) -> str | None:
        return None if item.folder is None else str(base / item.folder)

    models = {key: dataclasses.replace(model, folder=at(model)) for key, model in file.models.items()}
    collections = {
        key: dataclasses.replace(
            spec, layouts={k: dataclasses.replace(layout, folder=at(layout)) for k, layout in spec.layouts.items()}
        )
        for key, spec in file.collections.items()
    }
    return dataclasses.replace(file, models=models, collections=collections)


@dataclass(frozen=True)
class _Resolver:
    """Turns the short records of one collection into entries."""

    origin: str
    name: str
    spec: _Collection
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    recipes: Mapping[str, Recipe]

    def entries(self) -> tuple[Entry, ...]:
        entries: dict[str, Entry] = {}
        for sae in self.spec.saes:
            entry = self._entry(sae)
            if entry.name in entries:
                raise self._fail(sae, f"layer `{entry.name}` is given twice; rename or remove one")
            entries[entry.name] = entry
        return tuple(entries.values())

    def _entry(self, sae: _Sae) -> Entry:
        spec = self.spec
        hook = sae.hook or spec.hook.replace("{layer}", str(sae.layer))
        for metric in sae.published:
            if metric not in spec.published.definitions:
                raise self._fail(sae, f"published metric `{metric}` has no definition")
        for layout in sae.files:
            if layout not in spec.layouts:
                raise self._fail(sae, f"`files.{layout}` is not one of the layouts: {', '.join(spec.layouts)}")
        return Entry(
            collection=self.name,
            name=sae.name or str(sae.layer),
            in_all=sae.in_all,
            title=spec.title,
            layer=sae.layer,
            hook=hook,
            model_name=spec.model,
            model=self._named("model", spec.model, self.models),
            d_in=spec.d_in,
            d_sae=spec.d_sae,
            context_size=spec.context_size,
            prepend_bos=spec.prepend_bos,
            centre=spec.centre,
            dtype=spec.dtype,
            licence=spec.licence,
            layouts={key: _filled(layout, hook, sae.files.get(key, {})) for key, layout in spec.layouts.items()},
            neuronpedia=sae.neuronpedia,
            definitions=spec.published,
            published=dict(sae.published),
            recipe_name=spec.recipe,
            recipe=self._named("recipe", spec.recipe, self.recipes),
            dataset_name=spec.dataset,
            dataset=None if spec.dataset is None else self._named("dataset", spec.dataset, self.datasets),
            source=spec.source,
            origin=self.origin,
        )

    def _named(self, kind: str, name: str, table: Mapping[str, strict_yaml.T]) -> strict_yaml.T:
        if name not in table:
            raise RegistryError(
                f"{_shown(self.origin)}:{self.spec.line}: collections.{self.name}: {_unknown(kind, name, table)}"
            )
        return table[name]

    def _fail(self, sae: _Sae, message: str) -> RegistryError:
        where = f"collections.{self.name} layer {sae.name or sae.layer}"
        return RegistryError(f"{_shown(self.origin)}:{sae.line}: {where}: {message}")


def _filled(layout: Layout, hook: str, facts: dict[str, FileFacts]) -> Layout:
    def name(template: str | None) -> str | None:
        return None if template is None else template.replace("{hook}", hook)

    return dataclasses.replace(
        layout,
        weights=layout.weights.replace("{hook}", hook),
        config=name(layout.config),
        sparsity=name(layout.sparsity),
        facts=facts,
    )


def _shown(origin: str) -> str:
    return "registry.yaml" if origin == "built-in" else origin


def _check_sources(origin: str, file: _File, sources: Mapping[str, str]) -> None:
    cited: set[str] = set()
    for group in (file.models, file.datasets, file.recipes, file.collections):
        for item in group.values():
            cited.update(item.source)
    for collection in file.collections.values():
        cited.update(collection.published.source)
        for layout in collection.layouts.values():
            cited.update(layout.source)
    for key in sorted(cited - set(sources)):
        raise RegistryError(f"{_shown(origin)}: {_unknown('source', key, sources)}; add it under `sources:`")


def _expand(part: str, names: Mapping[str, Entry]) -> list[str]:
    """`0-3` -> 0, 1, 2, 3; anything else (also the name `11-post`) -> itself."""
    match = re.fullmatch(r"(\d+)-(\d+)", part)
    if part in names or not match:
        return [part]
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UsageError(f"layer range `{part}` runs backwards; write `{last}-{first}`")
    if last - first > 10_000:
        raise UsageError(f"layer range `{part}` names {last - first + 1:,} layers; no collection has so many")
    return [str(layer) for layer in range(first, last + 1)]


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = [] if name.isdigit() else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"
    return f"no {kind} `{name}`; {hint}"
