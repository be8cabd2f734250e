"""Other projects' files of SAEs, put into SAELens' words: tensors by its names, configuration by its keys.

| format | files | written by |
|---|---|---|
| dictionary_learning | `ae.pt`, `config.json` | saprmarks/dictionary_learning |
| sparsify | `sae.safetensors`, `cfg.json` | EleutherAI/sparsify |
| openai | a `.pt` | openai/sparse_autoencoder |
| gemma_scope | `params.npz` | google/gemma-scope |

A kind that `SAE` is not (transcoders, skip connections, GroupMax, tied decoders) is refused. None of these projects
centres the residual stream, so `centre` is false. Tensors keep their bits; transposed ones are views.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.errors import WeightsError, shown
from saezoo.sae_config import feeding
from saezoo.screening import read_config, screen_npz
from saezoo.weights import Weights, checked, read_safetensors, torch_load

_PLAIN: dict[str, Any] = {"model_from_pretrained_kwargs": {}}  # not centred

# Class of dictionary_learning -> (its tensors: ours, other keys that it may hold, configuration). `.T`: transposed.
_LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_NAMED = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_Kind = tuple[dict[str, str], tuple[str, ...], dict[str, Any]]
DICTIONARIES: dict[str, _Kind] = {
    "AutoEncoder": ({**_LINEAR, "bias": "b_dec"}, (), {"apply_b_dec_to_input": True}),
    "AutoEncoderNew": ({**_LINEAR, "decoder.bias": "b_dec"}, (), {"apply_b_dec_to_input": False}),
    "AutoEncoderTopK": (
        {**_LINEAR, "b_dec": "b_dec"},
        ("k", "threshold"),
        {"architecture": "topk", "apply_b_dec_to_input": True},
    ),
    "BatchTopKSAE": (
        {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
        ("k",),
        {"saezoo": {"activation": "batchtopk"}, "apply_b_dec_to_input": True},
    ),
    "MatryoshkaBatchTopKSAE": (
        {**_NAMED, "threshold": "threshold"},
        ("k", "group_sizes"),
        {"saezoo": {"activation": "batchtopk"}, "apply_b_dec_to_input": True},
    ),
    "JumpReluAutoEncoder": (
        {**_NAMED, "threshold": "threshold"},
        (),
        {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    ),
    "GatedAutoEncoder": (
        {
            "encoder.weight": "W_enc.T",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
            "r_mag": "r_mag",
            "decoder.weight": "W_dec.T",
            "decoder_bias": "b_dec",
        },
        (),
        {"architecture": "gated", "apply_b_dec_to_input": True},
    ),
}
SPARSIFY = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_OPENAI = {"encoder.weight": "W_enc.T", "latent_bias": "b_enc", "decoder.weight": "W_dec.T", "pre_bias": "b_dec"}
_OPENAI_OTHERS = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation.k",
    "activation.postact_fn",
)
"""The last two only say again what `activation_state_dict` says."""


def read_dictionary_learning(weights: Path, config: Path) -> Weights:
    """`ae.pt`, and `config.json`, which alone says what kind it is. A threshold that training has not set yet (-1) is
    refused: with it the peer's BatchTopK lets everything through that ReLU does."""
    described = read_config(config)
    trainer = _object(described, "trainer", config)
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in DICTIONARIES:
        raise WeightsError(f"{config}: `dict_class: {shown(kind)}` is not supported; {', '.join(DICTIONARIES)} are")
    names, ignored, cfg = DICTIONARIES[kind]
    state = _state(weights, torch_load(weights))
    tensors = _renamed(weights, state, names, ignored)
    cfg = _PLAIN | cfg | {"hook_name": _dictionary_hook(trainer), "model_name": _text(trainer.get("lm_name"))}
    length = _object(described, "buffer", config).get("ctx_len") if "buffer" in described else None
    cfg["context_size"] = length if type(length) is int and length > 0 else None
    cfg |= _fed(described, config)
    if "k" in ignored:
        cfg = _with_k(cfg, _agreed_k(weights, trainer.get("k"), state.get("k")))
    if "threshold" in tensors and tensors["threshold"].ndim == 0 and float(tensors["threshold"]) < 0:
        raise WeightsError(f"{weights}: its threshold was never set in training ({float(tensors['threshold']):g})")
    kept = {name: state[name].tolist() for name in ignored if name != "k" and isinstance(state.get(name), Tensor)}
    origin = {"format": "dictionary_learning", "config": described, "state": kept}
    return Weights(checked(weights, tensors, cfg), cfg, None, "dictionary_learning", origin)


def read_sparsify(weights: Path, config: Path) -> Weights:
    """`sae.safetensors` and `cfg.json`. The folder's name is the hookpoint; block outputs are understood."""
    described = read_config(config)
    for key, supported in (("activation", "topk"), ("transcode", False), ("skip_connection", False), ("signed", False)):
        if described.get(key, supported) != supported:
            raise WeightsError(
                f"{config}: `{key}: {shown(described[key])}` is not supported; only TopK autoencoders are"
            )
    tensors = _renamed(weights, read_safetensors(weights), SPARSIFY, ())
    block = re.fullmatch(r"(?:.*\.)?(?:h|layers)\.(\d+)", weights.parent.name)
    hook = f"blocks.{block[1]}.hook_resid_post" if block else None
    cfg = _PLAIN | {"architecture": "topk", "hook_name": hook, "d_in": described.get("d_in")}
    cfg = _with_k(cfg, described.get("k")) | {"apply_b_dec_to_input": True} | _fed(described, config)
    if cfg["d_in"] is None:
        raise WeightsError(f"{config}: `d_in` is missing")
    return Weights(checked(weights, tensors, cfg), cfg, None, "sparsify", {"format": "sparsify", "config": described})


def read_openai(path: Path) -> Weights:
    """A `.pt`. Its code normalises the input of a TopK autoencoder, and of that alone (`Autoencoder.from_state_dict`).
    Where it reads is not in the file."""
    state = _state(path, torch_load(path))
    activation, options = state.pop("activation", "ReLU"), state.pop("activation_state_dict", {})
    cfg = _PLAIN | {"apply_b_dec_to_input": True}
    if activation == "TopK" and isinstance(options, dict) and options.get("postact_fn") == "ReLU":
        cfg = _with_k(cfg | {"architecture": "topk", "normalize_activations": "layer_norm"}, _number(options.get("k")))
    elif activation != "ReLU":
        after = options.get("postact_fn") if isinstance(options, dict) else None
        raise WeightsError(
            f"{path}: activation {shown(activation)} ({shown(after)}) is not supported; ReLU and TopK (ReLU) are"
        )
    tensors = _renamed(path, state, _OPENAI, _OPENAI_OTHERS)
    return Weights(checked(path, tensors, cfg), cfg, None, "openai", {"format": "openai", "config": {}})


def read_gemma_scope(path: Path) -> Weights:
    """`params.npz`: JumpReLU; b_dec is added to the output only. Where it reads is not in the file."""
    import numpy as np

    screen_npz(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {re.sub("^w_", "W_", name): archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise whatever a broken archive makes them raise
        raise WeightsError(f"{path} is corrupt or not a .npz of numbers: {shown(str(error))}; get it again") from None
    odd = [name for name, array in arrays.items() if array.dtype.kind != "f"]
    if odd:
        raise WeightsError(f"{path}: {shown(odd[0])} is {arrays[odd[0]].dtype}, expected floating point")
    arrays = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    names = {**_NAMED, "threshold": "threshold"}
    tensors = _renamed(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, names, ())
    cfg = _PLAIN | {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    return Weights(checked(path, tensors, cfg), cfg, None, "gemma_scope", {"format": "gemma_scope", "config": {}})


def _state(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path} must hold tensors by name, not {type(content).__name__}")
    return dict(content)


def _renamed(path: Path, state: dict[str, Any], names: dict[str, str], ignored: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of `state` by our names; WeightsError if it lacks one or holds another."""
    missing, extra = set(names) - set(state), set(state) - set(names) - set(ignored)
    problems = [f"it lacks {', '.join(sorted(missing))}"] if missing else []
    problems += [f"it also holds {shown(', '.join(sorted(extra)), 300)}"] if extra else []
    if problems:
        raise WeightsError(f"{path} must hold {', '.join(names)}; {'; '.join(problems)}")
    found = {}
    for theirs, ours in names.items():
        tensor = state[theirs]
        if not isinstance(tensor, Tensor) or (ours.endswith(".T") and tensor.ndim != 2):
            raise WeightsError(f"{path}: {theirs} is no {'matrix' if ours.endswith('.T') else 'tensor'}")
        found[ours.removesuffix(".T")] = tensor.detach().T if ours.endswith(".T") else tensor.detach()
    return found


def _object(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: `{key}` must be an object, not {type(value).__name__}")
    return value


def _dictionary_hook(trainer: dict[str, Any]) -> str | None:
    """`submodule_name: resid_post_layer_8` is what dictionary_learning's scripts call a block's output."""
    match = re.fullmatch(r"resid_post_layer_(\d+)", str(trainer.get("submodule_name")))
    return f"blocks.{match[1]}.hook_resid_post" if match else None


def _fed(described: dict[str, Any], config: Path) -> dict[str, Any]:
    """What an SAE must be fed, where `conversion.py` has written it beside the format's own words."""
    own = described.get("saezoo")
    if not isinstance(own, dict):
        return {}
    fed = feeding(own, str(config))
    kwargs = {"center_writing_weights": fed.pop("centre")}
    return {"model_from_pretrained_kwargs": kwargs, "hook_name": fed.pop("hook")} | fed


def _with_k(cfg: dict[str, Any], k: Any) -> dict[str, Any]:
    """`cfg` with k where `activation_of` looks for it, which also refuses what is no number."""
    return cfg | ({"saezoo": {**cfg["saezoo"], "k": k}} if "saezoo" in cfg else {"k": k})


def _agreed_k(path: Path, configured: Any, stored: Any) -> Any:
    stored = _number(stored)
    if stored is not None and configured is not None and stored != configured:
        raise WeightsError(f"{path}: k is {stored}, its configuration says {shown(configured)}")
    return configured if stored is None else stored


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
