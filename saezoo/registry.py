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
from typing import Any, Literal, TypeVar

from saezoo import strict_yaml
from saezoo.entries import Dataset, Entry, FileFacts, Layout, Model, Published, Recipe, check_inside
from saezoo.errors import RegistryError, UsageError

VERSION = 1
_Placed = TypeVar("_Placed", Layout, Model)


@dataclass(frozen=True)
class _Sae:
    line: int
    layer: int
    neuronpedia: str | None = None
    published: dict[str, float | None] = field(default_factory=dict)
    files: dict[str, dict[str, FileFacts]] = field(default_factory=dict)
    name: str | None = None
    hook: str | None = None
    in_all: bool = True
    d_sae: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"`layer` must be 0 or more, not {self.layer}")
        if self.d_sae is not None and self.d_sae < 1:
            raise ValueError(f"`d_sae` must be above 0, not {self.d_sae}")


@dataclass(frozen=True)
class _Collection:
    line: int
    title: str
    model: str
    dataset: str | None
    recipe: str | None
    hook: str
    d_in: int
    d_sae: int | None
    context_size: int | None
    prepend_bos: bool
    centre: bool
    dtype: Literal["float32", "float16", "bfloat16"]
    licence: str | None
    source: tuple[str, ...]
    layouts: dict[str, Layout]
    published: Published
    saes: tuple[_Sae, ...]

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "context_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be above 0, not {value}")
        for name in ("saes", "layouts"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must list at least one")
        if any(layout.facts for layout in self.layouts.values()):
            raise ValueError("`layouts` hold no `facts`; sizes and hashes stand with each SAE, under `files`")


@dataclass(frozen=True)
class _File:
    version: int
    sources: dict[str, str] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    collections: dict[str, _Collection] = field(default_factory=dict)


@dataclass(frozen=True)
class Registry:
    """All entries by collection, in registry order, and the recipes by name."""

    collections: Mapping[str, tuple[Entry, ...]]
    recipes: Mapping[str, Recipe]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    sources: Mapping[str, str]
    """What the keys under `source` stand for, in words."""

    def describe(self, entry: Entry) -> dict[str, Any]:
        """Every field of `entry` as plain values, and `sources`: what the keys that it cites stand for."""
        record = dataclasses.asdict(entry)
        return {**record, "sources": {key: self.sources[key] for key in sorted(_cited(record))}}

    def find(self, collection: str, layers: str | int = "all") -> list[Entry]:
        """The entries of `collection` that `layers` names: `10`, `0-3,7`, `11-post` or `all`.

        Raises UsageError with the nearest name for an unknown collection or layer.
        """
        if collection not in self.collections:
            raise UsageError(_unknown("collection", collection, self.collections))
        entries = self.collections[collection]
        by_name = {entry.name: entry for entry in entries}
        found: dict[str, Entry] = {}
        for part in str(layers).split(","):
            for name in _expand("".join(part.split()), by_name):
                if name not in by_name:
                    raise UsageError(f"`{collection}` has {_unknown('layer', name, by_name)}")
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

    `overlay`, or else the environment variable SAEZOO_REGISTRY, names that file. What it defines is added; a
    collection, model, data set or recipe with a built-in's name replaces it, also for the built-in entries that use
    it. `saezoo list` shows where each collection came from. Raises RegistryError: file, line, what and remedy.
    """
    path = str(overlay) if overlay is not None else os.environ.get("SAEZOO_REGISTRY", "")
    if not path:
        return _read(None, None)
    try:
        stamp = os.stat(path)
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from None
    return _read(str(Path(path).resolve()), (stamp.st_mtime_ns, stamp.st_size))


@functools.lru_cache(maxsize=8)
def _read(overlay: str | None, stamp: tuple[int, int] | None) -> Registry:
    """`stamp` is part of the cache's key, so that an edited file is read again."""
    files = [_built_in()]
    if overlay is not None:
        files.append(_load(overlay, Path(overlay)))
    everything = _File(version=VERSION)
    for file in files:
        everything = _File(
            version=VERSION,
            sources=everything.sources | file.content.sources,
            models=everything.models | file.content.models,
            datasets=everything.datasets | file.content.datasets,
            recipes=everything.recipes | file.content.recipes,
        )
        _check_sources(file, everything.sources)
    collections: dict[str, tuple[Entry, ...]] = {}
    for file in files:
        for name, spec in file.content.collections.items():
            collections[name] = _Resolver(file, name, spec, everything).entries()
    return Registry(collections, everything.recipes, everything.models, everything.datasets, everything.sources)


@dataclass(frozen=True)
class _Loaded:
    """One registry file."""

    origin: str
    """`built-in`, or its path."""
    label: str
    """What messages call it."""
    path: Path
    content: _File

    def error(self, line: int, message: str) -> RegistryError:
        return RegistryError(f"{self.label}:{line}: {' '.join(message.split())}")

    def line_of(self, pattern: str) -> int:
        """Number of the first line that matches; 1 if none does."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return next((n for n, line in enumerate(lines, start=1) if re.search(pattern, line)), 1)


@functools.cache
def _built_in() -> _Loaded:
    return _load("built-in", package_folder() / "registry.yaml")


def _load(origin: str, path: Path) -> _Loaded:
    label = "registry.yaml" if origin == "built-in" else origin
    content = strict_yaml.read(path, _File, label=label)
    # Folders are relative to the file; the built-in one is found through a link, so this is the package's folder.
    models = {key: _located(model, path.parent) for key, model in content.models.items()}
    collections = {
        key: dataclasses.replace(spec, layouts={k: _located(v, path.parent) for k, v in spec.layouts.items()})
        for key, spec in content.collections.items()
    }
    file = _Loaded(origin, label, path, dataclasses.replace(content, models=models, collections=collections))
    if content.version != VERSION:
        line = file.line_of(r"^version\b")
        raise file.error(line, f"version {content.version} is not the {VERSION} that this saezoo reads; update saezoo")
    return file


def _located(item: _Placed, base: Path) -> _Placed:
    """The same, with its `folder` made absolute."""
    return item if item.folder is None else dataclasses.replace(item, folder=str(base / item.folder))


def _check_sources(file: _Loaded, sources: Mapping[str, str]) -> None:
    content = file.content
    groups: list[Iterable[Model | Dataset | Recipe | _Collection | Layout | Published]] = [
        content.models.values(),
        content.datasets.values(),
        content.recipes.values(),
        content.collections.values(),
        *(spec.layouts.values() for spec in content.collections.values()),
        [spec.published for spec in content.collections.values()],
    ]
    for key in sorted({key for group in groups for item in group for key in item.source} - set(sources)):
        line = file.line_of(rf"source:.*\b{re.escape(key)}\b")
        raise file.error(line, f"{_unknown('source', key, sources)} (sources are spelled out under `sources:`)")


@dataclass(frozen=True)
class _Resolver:
    """Turns the short records of one collection into entries."""

    file: _Loaded
    name: str
    spec: _Collection
    known: _File

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
        try:
            check_inside("hook", hook)  # file names are made of it
        except ValueError as error:
            raise self._fail(sae, str(error)) from None
        for metric in sae.published:
            if metric not in spec.published.definitions:
                raise self._fail(sae, f"published metric `{metric}` has no definition")
        for layout, facts in sae.files.items():
            for role in facts:
                if role not in ("weights", "config", "sparsity"):
                    raise self._fail(sae, f"unknown key `{role}` in `files.{layout}`; known: weights, config, sparsity")
            if layout not in spec.layouts:
                raise self._fail(sae, f"`files.{layout}` is not one of the layouts: {', '.join(spec.layouts)}")
        d_sae = sae.d_sae or spec.d_sae
        if d_sae is None:
            raise self._fail(sae, "`d_sae` is missing; give it here, or for the whole collection")
        words = {"{hook}": hook, "{layer}": str(sae.layer), "{d_sae}": str(d_sae)}
        return Entry(
            collection=self.name,
            name=sae.name or str(sae.layer),
            in_all=sae.in_all,
            title=spec.title,
            layer=sae.layer,
            hook=hook,
            model_name=spec.model,
            model=self._named("model", spec.model, self.known.models),
            d_in=spec.d_in,
            d_sae=d_sae,
            context_size=spec.context_size,
            prepend_bos=spec.prepend_bos,
            centre=spec.centre,
            dtype=spec.dtype,
            licence=spec.licence,
            layouts={key: _filled(layout, words, sae.files.get(key, {})) for key, layout in spec.layouts.items()},
            neuronpedia=sae.neuronpedia,
            definitions=spec.published,
            published=dict(sae.published),
            recipe_name=spec.recipe,
            recipe=None if spec.recipe is None else self._named("recipe", spec.recipe, self.known.recipes),
            dataset_name=spec.dataset,
            dataset=None if spec.dataset is None else self._named("data set", spec.dataset, self.known.datasets),
            source=spec.source,
            origin=self.file.origin,
        )

    def _named(self, kind: str, name: str, table: Mapping[str, strict_yaml.T]) -> strict_yaml.T:
        if name not in table:
            raise self.file.error(self.spec.line, f"collections.{self.name}: {_unknown(kind, name, table)}")
        return table[name]

    def _fail(self, sae: _Sae, message: str) -> RegistryError:
        return self.file.error(sae.line, f"collections.{self.name} layer {sae.name or sae.layer}: {message}")


def _filled(layout: Layout, words: Mapping[str, str], facts: dict[str, FileFacts]) -> Layout:
    """With the entry's own words in the names of the files."""

    def name(template: str) -> str:
        for placeholder, word in words.items():
            template = template.replace(placeholder, word)
        return template

    config, sparsity = (None if template is None else name(template) for template in (layout.config, layout.sparsity))
    return dataclasses.replace(layout, weights=name(layout.weights), config=config, sparsity=sparsity, facts=facts)


def _cited(record: Mapping[str, Any]) -> set[str]:
    """The source keys anywhere in `record`."""
    found = set(record.get("source", ()))
    for value in record.values():
        if isinstance(value, Mapping):
            found |= _cited(value)
    return found


def _expand(part: str, names: Mapping[str, Entry]) -> list[str]:
    """`0-3` -> 0, 1, 2, 3; anything else (also the name `11-post`) -> itself."""
    if part == "all":
        return [name for name, entry in names.items() if entry.in_all]
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", part)
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
