"""Which format the files of an SAE are in, told by what they hold, and their contents.

| format | where |
|---|---|
| saelens | a folder with `cfg.json` and `sae_weights.safetensors`, perhaps `sparsity.safetensors` |
| legacy | a `.pt` of February 2024, perhaps with `…_log_feature_sparsity.pt` beside it |
| dictionary_learning, sparsify, openai, gemma_scope | see `foreign.py` |
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import NamedTuple

from saezoo.errors import UsageError, WeightsError
from saezoo.foreign import read_dictionary_learning, read_gemma_scope, read_openai, read_sparsify
from saezoo.sae_config import FOLDERS
from saezoo.weights import Weights, checked, read_legacy, read_saelens, read_sparsity, torch_load

_NAMES = {
    "sae_weights.safetensors": "saelens",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "params.npz": "gemma_scope",
}


class Files(NamedTuple):
    """The files of one SAE, and what they are."""

    format: str
    weights: Path
    config: Path | None
    sparsity: Path | None


def read(path: Path) -> Weights:
    """The SAE at `path`, a folder or a file. Raises UsageError if there is nothing, WeightsError for what is no SAE
    or of a kind that is not supported."""
    return read_as(*files_at(path))


def read_as(name: str, weights: Path, config: Path | None, sparsity: Path | None) -> Weights:
    """The same from files of which the format is known."""
    if name == "legacy":
        return read_legacy(weights, sparsity)
    if name == "openai":
        return read_openai(weights)
    if name == "gemma_scope":
        return read_gemma_scope(weights)
    assert config is not None  # Layout sees to that
    if name == "saelens":
        return read_saelens(weights, config, sparsity)
    found = (read_dictionary_learning if name == "dictionary_learning" else read_sparsify)(weights, config)
    if sparsity is None:
        return found
    log_sparsity = read_sparsity(sparsity)
    checked(sparsity, found.tensors, found.config, log_sparsity)
    return dataclasses.replace(found, log_sparsity=log_sparsity)


def files_at(path: Path) -> Files:
    """The files of the SAE at `path`, told by what they hold. Raises as `read`."""
    if not path.exists():
        raise UsageError(f"no file or folder {path}")
    if path.is_file():
        return _around(path) if path.name in FOLDERS else _alone(path)
    held = [name for name in FOLDERS if (path / name).is_file()]
    if len(held) > 1:
        raise WeightsError(f"{path} holds several SAEs' files: {', '.join(held)}; name one of them")
    if held:
        return _around(path / held[0])
    inside = sorted(found.parent.name for name in FOLDERS for found in path.glob(f"*/{name}"))
    hint = f"; there are SAEs in its folders {', '.join(inside[:5])}{' …' if len(inside) > 5 else ''}" if inside else ""
    raise WeightsError(f"{path} is not an SAE folder: it holds none of {', '.join(FOLDERS)}{hint}")


def _around(weights: Path) -> Files:
    """Of a folder: the weights, and what lies beside them."""
    described = FOLDERS[weights.name]
    config = None if described is None else weights.with_name(described)
    if config is not None and not config.is_file():
        raise WeightsError(f"{weights.parent} is not an SAE folder: it lacks {config.name}")
    return Files(_NAMES[weights.name], weights, config, _if_there(weights.with_name("sparsity.safetensors")))


def _alone(path: Path) -> Files:
    if path.suffix == ".npz" or _holds_arrays(path):
        return Files("gemma_scope", path, None, None)
    content = torch_load(path)
    if isinstance(content, dict) and "pre_bias" in content:
        return Files("openai", path, None, None)
    return Files("legacy", path, None, _if_there(path.with_name(f"{path.stem}_log_feature_sparsity.pt")))


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _holds_arrays(path: Path) -> bool:
    """Whether it is a zip of `.npy` files, as numpy writes, and not one of pickles, as torch does."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)
