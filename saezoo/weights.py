"""Reading and checking files of SAE weights: the SAELens folder and the pickle of February 2024.

Both give the same four tensors: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]. No pickle is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saezoo.errors import WeightsError, shown
from saezoo.screening import read_config, screen_safetensors, screen_torch

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_LEGACY_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"


@dataclass(frozen=True)
class Weights:
    """The contents of one SAE's files."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    log_sparsity: Tensor | None
    """log10(firing frequency + 1e-10) of each feature in training, [F]."""


def read_saelens(weights: Path, config: Path, sparsity: Path | None) -> Weights:
    """Read `sae_weights.safetensors` (memory-mapped), `cfg.json` and, if given, `sparsity.safetensors`."""
    cfg = read_config(config)
    tensors = _read_safetensors(weights)
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise WeightsError(f"{weights} has a `scaling_factor` other than 1, which is not supported")
    log_sparsity = None if sparsity is None else _only(sparsity, _read_safetensors(sparsity), "sparsity")
    return Weights(_checked(weights, tensors, log_sparsity), cfg, log_sparsity)


def read_legacy(weights: Path, sparsity: Path | None) -> Weights:
    """Read the original `.pt` of 2024: {"cfg": a pickled config object, "state_dict": the tensors}.

    The config's class is mapped to an inert stand-in; any other class or function in the file is refused unexecuted.
    """
    saved = _torch_load(weights)
    try:
        cfg = {key: _plain(value) for key, value in vars(saved["cfg"]).items()}
        state = dict(saved["state_dict"].items())
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise TypeError
        tensors = {name: tensor.float() for name, tensor in state.items()}
    except (KeyError, TypeError, AttributeError, IndexError):
        raise WeightsError(f"{weights} is not a 2024 SAE file: it needs `cfg` and `state_dict`") from None
    log_sparsity = None
    if sparsity is not None:
        log_sparsity = _torch_load(sparsity)
        if not isinstance(log_sparsity, Tensor):
            raise WeightsError(f"{sparsity} must hold one tensor, not {type(log_sparsity).__name__}")
    return Weights(_checked(weights, tensors, log_sparsity), cfg, log_sparsity)


class _InertConfig:
    """Stands in for the 2024 config class: unpickling sets attributes on it and runs none of its code."""


def _torch_load(path: Path) -> Any:
    screen_torch(path, {_LEGACY_CLASS})
    try:
        with torch.serialization.safe_globals([(_InertConfig, _LEGACY_CLASS)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a broken file makes it raise
        raise WeightsError(f"{path} is corrupt or not a PyTorch file: {shown(str(error))}; get it again") from None


def _plain(value: Any) -> Any:
    """`value` if JSON could hold it, else its name: comparing a tensor with anything gives a tensor."""
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else type(value).__name__


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    screen_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is corrupt or truncated: {shown(str(error))}; get it again") from None


def _only(path: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if set(tensors) != {name}:
        raise WeightsError(f"{path} must hold one tensor `{name}`, not {shown(str(sorted(tensors)), 300)}")
    return tensors[name]


def _checked(path: Path, tensors: dict[str, Tensor], log_sparsity: Tensor | None) -> dict[str, Tensor]:
    """`tensors`, if they are the four of an SAE, of fitting shapes and finite."""
    if set(tensors) != set(NAMES):
        held = ", ".join(sorted(tensors))
        raise WeightsError(f"{path} must hold the tensors {', '.join(NAMES)}; it holds {shown(held, 300)}")
    d_in, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            hint = " (transposed?)" if found == shape[::-1] else ""
            raise WeightsError(f"{path}: {name} has shape {list(found)}, expected {list(shape)}{hint}")
        if not tensors[name].is_floating_point():
            raise WeightsError(f"{path}: {name} is {tensors[name].dtype}, expected floating point")
        if not bool(torch.isfinite(tensors[name].sum(dtype=torch.float32))):
            raise WeightsError(f"{path}: {name} holds NaN or infinite values; get it again or retrain")
    if log_sparsity is not None and tuple(log_sparsity.shape) != (d_sae,):
        raise WeightsError(f"{path}: its sparsity has shape {list(log_sparsity.shape)}, expected [{d_sae}]")
    return tensors
