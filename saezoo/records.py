"""A finished run, or the files of one SAE, as a registry record: what `add` writes down and `push` sends along."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saezoo import files, formats
from saezoo.checkpoint import newest
from saezoo.entries import Model
from saezoo.errors import TrainingError, UsageError, WeightsError
from saezoo.registry import Registry, read_registry
from saezoo.sae_config import FOLDERS, SAEConfig, config_from

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Record:
    """One collection and what it refers to; `content` makes a registry file of it."""

    name: str
    words: str
    """Where its facts come from."""
    models: dict[str, Any]
    """The models that are not built in, by name."""
    recipe: dict[str, Any] | None
    collection: dict[str, Any]
    """As in a registry file, without `recipe`, `layouts` and the facts of files."""
    layout: dict[str, Any]
    """Format and file names, without the place."""
    folder: Path
    """What the file names are relative to."""
    files: tuple[dict[str, Path], ...]
    """Role -> file, for each SAE of the collection."""
    configs: tuple[SAEConfig, ...]

    def content(self, layout_name: str, **place: str) -> dict[str, Any]:
        """A registry file with this collection; its files lie at `place`: `folder`, or `repo` and `revision`.

        Every name but the models' is the collection's own.
        """
        pairs = zip(self.collection["saes"], self._facts, strict=True)
        saes = [sae | {"files": {layout_name: found}} for sae, found in pairs]
        collection = {
            **{key: value for key, value in self.collection.items() if key not in ("published", "saes")},
            "recipe": None if self.recipe is None else self.name,
            "layouts": {layout_name: {**self.layout, **place}},
            "published": self.collection["published"],
            "saes": saes,
        }
        content: dict[str, Any] = {
            "version": 1,
            "sources": {self.name: self.words},
            "models": self.models,
            "recipes": {} if self.recipe is None else {self.name: self.recipe},
            "collections": {self.name: collection},
        }
        cited: dict[str, Any] = _citing(content, self.name)
        return {key: value for key, value in cited.items() if value}

    @functools.cached_property
    def _facts(self) -> list[dict[str, dict[str, Any]]]:
        """Role -> size and hash of the file, for each SAE; read once."""
        return [
            {role: {"sha256": files.sha256(path), "bytes": path.stat().st_size} for role, path in roles.items()}
            for roles in self.files
        ]


def read_record(path: Path, known: Registry, *, name: str | None, model: str | None, licence: str | None) -> Record:
    """The record of a run folder, or of one SAE's folder or `.pt`.

    Args:
        path: what to describe.
        known: where the model of a bare SAE is looked up.
        name: of the collection; by default the one that the run gave itself.
        model: name in `known`; by default what the SAE's own configuration says.
        licence: of the weights; by default what the run says, else unknown.

    Raises UsageError for what is missing or contradicts, TrainingError for a run that is not finished, WeightsError
    for files that are no SAE.
    """
    if name is not None:
        _check_name(name)
    if not path.exists():
        raise UsageError(f"no file or folder {path}")
    if not is_run(path):
        return _of_sae(path, known, name, model, licence)
    if model is not None:
        raise UsageError(f"{path} is a run, which says itself what model it read; leave --model out")
    return _of_run(path, name, licence)


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a finished run. TrainingError if it is one that is not finished."""
    if not path.is_dir() or any((path / name).is_file() for name in FOLDERS):
        return False
    if newest(path) or ((path / "log.csv").is_file() and not (path / "registry.yaml").is_file()):
        raise TrainingError(
            f"{path} is a run that is not finished; go on with it first: the same command with --resume"
        )
    if (path / "registry.yaml").is_file():
        return True
    raise UsageError(f"{path} holds no SAE (none of {', '.join(FOLDERS)}), nor the registry.yaml of a run")


def _check_name(name: str) -> None:
    """It goes into commands and into a page: no spaces, no line breaks."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"collection name {name!r}: use letters, digits, `_`, `-` and `.`")


def _of_run(folder: Path, name: str | None, licence: str | None) -> Record:
    """From the overlay that `reproduce` left in `folder`."""
    overlay = folder / "registry.yaml"
    known = read_registry(overlay)  # every key is there and of its kind
    content = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    collections = content.get("collections", {})
    if len(collections) != 1:
        raise UsageError(f"{overlay} holds {len(collections)} collections; a run has one")
    ((own, collection),) = collections.items()
    _check_name(name or own)
    entries = known.collections[own]
    layout_name, layout = next(iter(collection["layouts"].items()))
    found = tuple(
        {
            role: folder / file
            for role in ("weights", "config", "sparsity")
            if (file := getattr(entry.layouts[layout_name], role)) is not None
        }
        for entry in entries
    )
    if lacking := [str(path) for roles in found for path in roles.values() if not path.is_file()]:
        raise UsageError(f"{folder} lacks {', '.join(lacking)}: it is no whole run")
    shared = {key: value for key, value in collection.items() if key not in ("recipe", "layouts", "saes")}
    return Record(
        name=name or own,
        words="; ".join(content["sources"].values()),
        models={key: dataclasses.asdict(known.models[key]) for key in content.get("models", {})},
        recipe=content["recipes"][collection["recipe"]],
        collection=shared
        | {"licence": licence or shared["licence"]}
        | {"saes": [{k: v for k, v in sae.items() if k != "files"} for sae in collection["saes"]]},
        layout={key: value for key, value in layout.items() if key not in ("folder", "repo", "revision")},
        folder=folder,
        files=found,
        configs=tuple(_config(roles["weights"].parent)[0] for roles in found),
    )


def _of_sae(path: Path, known: Registry, name: str | None, model: str | None, licence: str | None) -> Record:
    """From the files alone: what they do not say is given, or unknown."""
    config, dtype = _config(path)
    if name is None:
        raise UsageError(f"{path} is one SAE, which has no name yet: --name COLLECTION")
    model_name, found = _model(path, config, known, model)
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", config.hook or "")
    if config.hook is None or match is None:
        raise UsageError(f"{path}: its hook is `{config.hook}`; a registry needs one like `blocks.2.hook_resid_pre`")
    layer = int(match[1])
    roles, layout = _files_of(path)
    return Record(
        name=name,
        words=f"the SAE's own configuration, {roles.get('config', roles['weights']).name}",
        models={} if model_name in read_registry("").models else {model_name: dataclasses.asdict(found)},
        recipe=None,
        collection={
            "title": f"SAE of {model_name} at {config.hook}",
            "model": model_name,
            "dataset": None,
            "hook": config.hook,
            **{key: getattr(config, key) for key in ("d_in", "d_sae", "context_size", "prepend_bos", "centre")},
            "dtype": dtype,
            "licence": licence,
            "source": [],
            "published": {"protocol": "standard", "sample": "nothing was measured", "source": [], "definitions": {}},
            "saes": [{"layer": layer, "name": f"{layer}-post" if match[2].endswith("post") else str(layer)}],
        },
        layout=layout,
        folder=path if path.is_dir() else path.parent,
        files=(roles,),
        configs=(config,),
    )


def _config(path: Path) -> tuple[SAEConfig, str]:
    """What the SAE's files say it must be fed, and the weights' dtype."""
    weights = formats.read(path)
    W_enc_DF = weights.tensors["W_enc"]
    dtype = str(W_enc_DF.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise WeightsError(f"{path}: its weights are {dtype}; a registry knows {', '.join(_DTYPES)}")
    return config_from(weights.config, str(path), *W_enc_DF.shape), dtype


def _model(path: Path, config: SAEConfig, known: Registry, model: str | None) -> tuple[str, Model]:
    name = model or config.model_name
    if name is None or name not in known.models:
        said = f"no model `{model}` in the registry" if model else f"{path} reads `{name}`, which no registry model is"
        raise UsageError(f"{said}; give --model, one of {', '.join(known.models)}")
    found = known.models[name]
    if found.d_model != config.d_in:
        raise UsageError(f"{path} reads width {config.d_in}, the model `{name}` has {found.d_model}")
    return name, found


def _files_of(path: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Role -> file of one SAE, and the layout that names them."""
    found = formats.files_at(path)
    by_role = {"weights": found.weights, "config": found.config, "sparsity": found.sparsity}
    names = {role: None if file is None else file.name for role, file in by_role.items()}
    return {role: file for role, file in by_role.items() if file is not None}, {
        "format": found.format,
        **names,
        "source": [],
    }


def _citing(value: Any, name: str) -> Any:
    """`value` with `name` as the only source of every fact in it."""
    if isinstance(value, list):
        return [_citing(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: [name] if key == "source" else _citing(item, name) for key, item in value.items()}
