"""Reading and checking files of SAE weights: the SAELens folder and the pickle of February 2024.

Both give the tensors of `sae_config.PARAMETERS`. No pickle is ever executed. `foreign.py` has other projects' files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saezoo.errors import WeightsError, shown
from saezoo.sae_config import PARAMETERS, activation_of, origin_of
from saezoo.screening import read_config, screen_safetensors, screen_torch

_LEGACY_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"


@dataclass(frozen=True)
class Weights:
    """The contents of one SAE's files."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """In the words of SAELens' cfg.json, whatever the files say it in."""
    log_sparsity: Tensor | None
    """log10(firing frequency + 1e-10) of each feature in training, [F]."""
    format: str = "saelens"
    origin: dict[str, Any] | None = None
    """{"format": its name, "config": its own words, "state": other tensors, as lists} of another project's files:
    these, or those that they were converted from."""


def read_saelens(weights: Path, config: Path, sparsity: Path | None) -> Weights:
    """Read `sae_weights.safetensors` (memory-mapped), `cfg.json` and, if given, `sparsity.safetensors`."""
    cfg = read_config(config)
    tensors = read_safetensors(weights)
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise WeightsError(f"{weights} has a `scaling_factor` other than 1, which is not supported")
    log_sparsity = None if sparsity is None else read_sparsity(sparsity)
    if activation_of(cfg, str(config))[0] == "batchtopk" and "threshold" in tensors:
        tensors["threshold"] = _one_value(weights, tensors["threshold"])
    return Weights(checked(weights, tensors, cfg, log_sparsity), cfg, log_sparsity, origin=origin_of(cfg))


def read_legacy(weights: Path, sparsity: Path | None) -> Weights:
    """Read the original `.pt` of 2024: {"cfg": a pickled config object, "state_dict": the tensors}.

    The config's class is mapped to an inert stand-in; any other class or function in the file is refused unexecuted.
    """
    saved = torch_load(weights)
    try:
        if not isinstance(saved, dict):  # asked for a key, one of torch's storages raises RuntimeError
            raise TypeError
        cfg = {key: _plain(value) for key, value in vars(saved["cfg"]).items()}
        state = dict(saved["state_dict"].items())
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise TypeError
        tensors = {name: tensor.float() for name, tensor in state.items()}
    except (KeyError, TypeError, AttributeError, IndexError):
        raise WeightsError(f"{weights} is not a 2024 SAE file: it needs `cfg` and `state_dict`") from None
    log_sparsity = None
    if sparsity is not None:
        log_sparsity = torch_load(sparsity)
        if not isinstance(log_sparsity, Tensor):
            raise WeightsError(f"{sparsity} must hold one tensor, not {type(log_sparsity).__name__}")
    return Weights(checked(weights, tensors, cfg, log_sparsity), cfg, log_sparsity, "legacy")


class _InertConfig:
    """Stands in for the 2024 config class: unpickling sets attributes on it and runs none of its code."""


def torch_load(path: Path) -> Any:
    """What a `.pt` holds, if that can be read without running any of its code; WeightsError if not."""
    screen_torch(path, {_LEGACY_CLASS})
    try:
        with torch.serialization.safe_globals([(_InertConfig, _LEGACY_CLASS)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever a broken file makes it raise
        raise WeightsError(f"{path} is corrupt or not a PyTorch file: {shown(str(error))}; get it again") from None


def _plain(value: Any) -> Any:
    """`value` if JSON could hold it, else its name: comparing a tensor with anything gives a tensor."""
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else type(value).__name__


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, memory-mapped."""
    screen_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is corrupt or truncated: {shown(str(error))}; get it again") from None


def read_sparsity(path: Path) -> Tensor:
    """The one tensor of a `sparsity.safetensors`."""
    tensors = read_safetensors(path)
    if set(tensors) != {"sparsity"}:
        raise WeightsError(f"{path} must hold one tensor `sparsity`, not {shown(str(sorted(tensors)), 300)}")
    return tensors["sparsity"]


def _one_value(path: Path, threshold_F: Tensor) -> Tensor:
    if threshold_F.numel() == 0 or bool((threshold_F != threshold_F.flatten()[0]).any()):
        raise WeightsError(f"{path}: a BatchTopK SAE has one threshold, this `threshold` has several values")
    return threshold_F.flatten()[0]


def checked(
    path: Path, tensors: dict[str, Tensor], cfg: dict[str, Any], log_sparsity: Tensor | None = None
) -> dict[str, Tensor]:
    """`tensors`, if they are those of the SAE that `cfg` describes, of fitting shapes and finite; else WeightsError."""
    activation, _ = activation_of(cfg, str(path))
    names = PARAMETERS[activation]
    if set(tensors) != set(names):
        held = ", ".join(sorted(tensors))
        raise WeightsError(
            f"{path} must hold the tensors {', '.join(names)} ({activation}); it holds {shown(held, 300)}"
        )
    d_in, d_sae = tensors["b_dec"].numel(), tensors[names[1]].numel()
    expected = dict.fromkeys(names, (d_sae,)) | {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape and not (name == "threshold" and activation == "batchtopk" and found == ()):
            hint = " (transposed?)" if found == shape[::-1] else ""
            raise WeightsError(f"{path}: {name} has shape {list(found)}, expected {list(shape)}{hint}")
        if not tensors[name].is_floating_point():
            raise WeightsError(f"{path}: {name} is {tensors[name].dtype}, expected floating point")
        if not bool(torch.isfinite(tensors[name].sum(dtype=torch.float32))):
            raise WeightsError(f"{path}: {name} holds NaN or infinite values; get it again or retrain")
    if log_sparsity is not None and tuple(log_sparsity.shape) != (d_sae,):
        raise WeightsError(f"{path}: its sparsity has shape {list(log_sparsity.shape)}, expected [{d_sae}]")
    return tensors
