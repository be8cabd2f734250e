"""`convert`: the files of an SAE in another project's format.

Nothing is computed: tensors keep their bits and are at most transposed. What the other format has no word for (the
hook, centring, dictionary_learning's training parameters) goes along under the key `saezoo` of its configuration, so
that converting back gives the same tensors and the same configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saezoo import files, formats
from saezoo.errors import UsageError, WeightsError
from saezoo.foreign import DICTIONARIES, SPARSIFY
from saezoo.sae import save_tensors, write
from saezoo.sae_config import SAEConfig, config_from, origin_of, to_saelens
from saezoo.weights import Weights

Target = Literal["saelens", "dictionary_learning", "sparsify"]
_CLASSES = {
    ("relu", True): "AutoEncoder",
    ("relu", False): "AutoEncoderNew",
    ("topk", True): "AutoEncoderTopK",
    ("batchtopk", True): "BatchTopKSAE",
    ("jumprelu", False): "JumpReluAutoEncoder",
    ("gated", True): "GatedAutoEncoder",
}
"""(activation, whether b_dec is subtracted from the input) -> class of dictionary_learning."""


def convert(source: Path, target: Path, to: Target) -> Path:
    """Write the SAE at `source` (see `formats.read`) into the new folder `target`; gives that.

    Raises UsageError if `target` exists, WeightsError for an SAE that the format cannot hold.
    """
    if target.exists():
        raise UsageError(f"{target} exists; give a new folder")
    weights = formats.read(source)
    d_in, d_sae = weights.tensors["W_enc"].shape
    config = config_from(weights.config, str(source), d_in, d_sae)
    with files.replacing_folder(target) as folder:
        if to == "saelens":
            _write_saelens(folder, weights, config)
        elif to == "sparsify":
            _write_sparsify(folder, weights, config)
        else:
            _write_dictionary(folder, weights, config)
        if to != "saelens" and weights.log_sparsity is not None:
            save_tensors(folder / "sparsity.safetensors", {"sparsity": weights.log_sparsity.float()})
    return target


def _write_saelens(folder: Path, weights: Weights, config: SAEConfig) -> None:
    write(folder, config, weights.tensors, weights.log_sparsity, weights.origin)
    known = _words(weights, "saelens")
    if known is not None:
        _write_json(folder / "cfg.json", known["config"])


def _write_sparsify(folder: Path, weights: Weights, config: SAEConfig) -> None:
    if config.activation != "topk" or not config.apply_b_dec_to_input:
        raise WeightsError(f"sparsify has TopK with b_dec on the input only, not {_kind(config)}")
    _refuse_normalised(config, "sparsify")
    known = _words(weights, "sparsify")
    made = {
        "activation": "topk",
        "num_latents": config.d_sae,
        "k": config.k,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
        "saezoo": _told(weights, config),
    }
    save_tensors(folder / "sae.safetensors", _renamed(weights.tensors, SPARSIFY))
    _write_json(folder / "cfg.json", made if known is None else known["config"])


def _write_dictionary(folder: Path, weights: Weights, config: SAEConfig) -> None:
    kind = _CLASSES.get((config.activation, config.apply_b_dec_to_input))
    if kind is None:
        raise WeightsError(f"dictionary_learning has no class for {_kind(config)}")
    _refuse_normalised(config, "dictionary_learning")
    known = _words(weights, "dictionary_learning")
    trainer = {
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "k": config.k,
        "lm_name": config.model_name,
    }
    made = {"trainer": trainer, "saezoo": _told(weights, config)}
    described = made if known is None else known["config"]
    names, others, _ = DICTIONARIES[described["trainer"]["dict_class"]]
    state = _renamed(weights.tensors, names)
    if "k" in others:
        state["k"] = torch.tensor(config.k, dtype=torch.int)
    kept = {} if known is None else known.get("state", {})
    for name in set(others) - {"k"}:  # TopK's threshold, -1 where training has not set it; a Matryoshka's groups
        state[name] = torch.tensor(kept.get(name, -1.0))
    torch.save(state, folder / "ae.pt")
    _write_json(folder / "config.json", described)


def _words(weights: Weights, name: str) -> dict[str, Any] | None:
    """{"config", "state"} in the words of format `name`, if the SAE is or ever was in that."""
    record = {"format": "saelens", "config": weights.config} if weights.format == "saelens" else weights.origin
    while record is not None and record.get("format") != name:
        described = record.get("config")
        own = described.get("saezoo") if isinstance(described, dict) else None
        if record.get("format") == "saelens":
            record = origin_of(described) if isinstance(described, dict) else None
        else:
            record = {"format": "saelens", "config": own} if isinstance(own, dict) else None
    return record


def _told(weights: Weights, config: SAEConfig) -> dict[str, Any]:
    """cfg.json as it is, or what it would be."""
    if weights.format == "saelens":
        return weights.config
    return to_saelens(config, str(weights.tensors["W_dec"].dtype), weights.origin)


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """By the other project's names, which `names` gives ours for."""
    pairs = {theirs: (tensors[ours.removesuffix(".T")], ours) for theirs, ours in names.items()}
    return {
        theirs: (tensor.T if ours.endswith(".T") else tensor).contiguous() for theirs, (tensor, ours) in pairs.items()
    }


def _refuse_normalised(config: SAEConfig, name: str) -> None:
    if config.normalise != "none":
        raise WeightsError(f"{name} has no word for `normalize_activations: {config.normalise}`")


def _kind(config: SAEConfig) -> str:
    return f"{config.activation} {'with' if config.apply_b_dec_to_input else 'without'} b_dec on the input"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
