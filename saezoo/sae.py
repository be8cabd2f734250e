"""A sparse autoencoder that knows what it must be fed.

Shapes: B any leading dimensions (batch, or batch and position), D d_in, F d_sae.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from saezoo import files
from saezoo.errors import SaezooError, UsageError, WeightsError, shown
from saezoo.weights import NAMES, Weights, read_legacy, read_saelens

_T = TypeVar("_T")
_LONGEST_NAME = 200  # of a hook or model; they go into tables and CSVs


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE must be fed. None is unknown."""

    d_in: int
    d_sae: int
    hook: str | None
    """Where it reads, by TransformerLens' name: `blocks.{L}.hook_resid_pre` or `blocks.{L}.hook_resid_post`."""
    model_name: str | None
    context_size: int | None
    """Tokens per row in training."""
    prepend_bos: bool
    """True: rows began with the model's beginning-of-sequence token."""
    centre: bool
    """True: it wants the residual minus its mean over d_in; `encode` and `replace` see to that."""
    apply_b_dec_to_input: bool
    """True: b_dec is subtracted from the input as well as added to the output."""


class SAE(nn.Module):
    """ReLU sparse autoencoder: f = ReLU((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec.

    Parameters W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]. With `config.centre`, inputs may come from
    TransformerLens (centred) or from raw Hugging Face activations: the mean over D is taken off first, which changes
    nothing for the former. The decoder's rows are used as stored, never renormalised.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, config: SAEConfig, tensors: dict[str, Tensor], log_sparsity: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.log_sparsity = log_sparsity
        """log10(firing frequency + 1e-10) of each feature in training [F], or None if unknown."""
        for name in NAMES:
            setattr(self, name, nn.Parameter(tensors[name], requires_grad=False))

    def encode(self, x_BD: Tensor) -> Tensor:
        """Features f [..., F], all >= 0, of activations x [..., D]."""
        if x_BD.shape[-1] != self.config.d_in:
            raise UsageError(f"this SAE reads activations of width {self.config.d_in}, not {x_BD.shape[-1]}")
        x_BD = x_BD.to(self.W_enc.dtype)
        if self.config.centre:
            x_BD = x_BD - x_BD.mean(-1, keepdim=True)
        if self.config.apply_b_dec_to_input:
            x_BD = x_BD - self.b_dec
        return torch.relu(x_BD @ self.W_enc + self.b_enc)

    def decode(self, f_BF: Tensor) -> Tensor:
        """Reconstruction [..., D] from features [..., F], in the frame the SAE was trained in (centred)."""
        return f_BF @ self.W_dec + self.b_dec

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction [..., D] of x [..., D], in the frame of the input: a mean over D is added back."""
        x_hat_BD = self.decode(self.encode(x_BD))
        if self.config.centre:
            x_hat_BD = x_hat_BD + x_BD.mean(-1, keepdim=True)
        return x_hat_BD.to(x_BD.dtype)

    def replace(self, resid_BTD: Tensor, hook: object = None, *, keep_BT: Tensor | None = None) -> Tensor:
        """The residual stream with the reconstruction spliced in; give it to TransformerLens as a hook function.

        `hook` is ignored (TransformerLens passes it). Positions where `keep_BT` is true keep their activation.
        Centred and raw Hugging Face activations give the same cross-entropy, since every reader of the residual
        stream is a layer norm.
        """
        spliced_BTD = self(resid_BTD)
        return spliced_BTD if keep_BT is None else torch.where(keep_BT[..., None], resid_BTD, spliced_BTD)

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write cfg.json, sae_weights.safetensors and (if known) sparsity.safetensors, the published layout.

        SAELens' `SAE.load_from_disk` reads the folder too. Each file appears only when complete.
        """
        folder = Path(folder)
        tensors = {name: getattr(self, name).detach().to("cpu", dtype).contiguous() for name in NAMES}
        _save_tensors(folder / "sae_weights.safetensors", tensors)
        sparsity = folder / "sparsity.safetensors"
        if self.log_sparsity is not None:
            _save_tensors(sparsity, {"sparsity": self.log_sparsity.cpu().float().contiguous()})
        elif sparsity.is_file():
            sparsity.unlink()  # of the SAE that was here before
        with files.replacing(folder / "cfg.json") as path:
            path.write_text(json.dumps(_saelens_config(self.config, dtype), indent=2) + "\n", encoding="utf-8")
        return folder

    def extra_repr(self) -> str:
        return f"d_in={self.config.d_in}, d_sae={self.config.d_sae}, hook={self.config.hook}"


def read_folder(folder: Path) -> Weights:
    """The files of a local SAE: a folder in the published layout, or a `.pt` of 2024."""
    if folder.suffix == ".pt" and folder.is_file():
        sparsity = folder.with_name(f"{folder.stem}_log_feature_sparsity.pt")
        return read_legacy(folder, sparsity if sparsity.is_file() else None)
    missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"{folder} is not an SAE folder: it lacks {' and '.join(missing)}")
    sparsity = folder / "sparsity.safetensors"
    return read_saelens(
        folder / "sae_weights.safetensors", folder / "cfg.json", sparsity if sparsity.is_file() else None
    )


def from_weights(weights: Weights, where: str, *, device: str, dtype: torch.dtype) -> SAE:
    """An SAE from what its files say; WeightsError if they describe a kind that this class is not."""
    d_in, d_sae = weights.tensors["W_enc"].shape
    config = config_from(weights.config, where, d_in, d_sae)
    tensors = {name: tensor.to(device, dtype) for name, tensor in weights.tensors.items()}
    return SAE(config, tensors, weights.log_sparsity)


def config_from(cfg: dict[str, Any], where: str, d_in: int, d_sae: int) -> SAEConfig:
    """What cfg.json (of 2024's or of today's SAELens) says about an SAE of these shapes.

    Raises WeightsError for anything that would need another forward pass than `SAE` has.
    """
    metadata = _typed(cfg, "metadata", dict, where) or {}  # where SAELens 6 keeps what is not architecture
    cfg = {**cfg, **metadata}
    for key, known in (("d_in", d_in), ("d_sae", d_sae)):
        if cfg.get(key, known) != known:
            raise WeightsError(f"{where}: cfg.json says {key} {shown(cfg[key])}, the tensors say {known}")
    plain = {
        "architecture": (None, "standard"),
        "activation_fn": (None, "relu"),
        "activation_fn_str": (None, "relu"),
        "normalize_activations": (None, "none"),
        "reshape_activations": (None, "none"),
        "finetuning_scaling_factor": (None, False),
        "hook_head_index": (None,),
        "hook_point_head_index": (None,),
    }
    for key, supported in plain.items():
        if cfg.get(key) not in supported:
            raise WeightsError(f"{where}: `{key}: {shown(cfg[key])}` is not supported; only plain ReLU SAEs are")
    # Absent in files of early 2024, which were all trained on TransformerLens' default, centred, residual stream.
    model_kwargs = _typed(cfg, "model_from_pretrained_kwargs", dict, where)
    centred = None if model_kwargs is None else _typed(model_kwargs, "center_writing_weights", bool, where)
    context_size = _typed(cfg, "context_size", int, where)
    if context_size is not None and context_size < 1:
        raise WeightsError(f"{where}: cfg.json says `context_size: {context_size}`; it must be above 0")
    return SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        hook=_typed(cfg, "hook_name", str, where) or _typed(cfg, "hook_point", str, where),
        model_name=_typed(cfg, "model_name", str, where),
        context_size=context_size,
        prepend_bos=_typed(cfg, "prepend_bos", bool, where) is not False,
        centre=True if model_kwargs is None else bool(centred),
        apply_b_dec_to_input=_typed(cfg, "apply_b_dec_to_input", bool, where) is not False,
    )


def _typed(cfg: dict[str, Any], key: str, kind: type[_T], where: str) -> _T | None:
    """`cfg[key]` if it is of the type `kind`, None if it is absent or null; else WeightsError."""
    value = cfg.get(key)
    if value is not None and type(value) is not kind:
        raise WeightsError(
            f"{where}: cfg.json says `{key}: {shown(reprlib.repr(value))}`; it must be of type {kind.__name__}"
        )
    if isinstance(value, str) and (len(value) > _LONGEST_NAME or not value.isprintable()):
        told = f"`{key}: {shown(value)}`; it must be at most {_LONGEST_NAME} printable letters"
        raise WeightsError(f"{where}: cfg.json says {told}")
    return value


def _saelens_config(config: SAEConfig, dtype: torch.dtype) -> dict[str, Any]:
    """cfg.json with the names of 2024 (hook_point …) and those that today's SAELens reads."""
    hook = config.hook or ""
    layer = next((int(part) for part in hook.split(".") if part.isdigit()), None)
    return {
        "architecture": "standard",
        "model_name": config.model_name,
        "hook_point": config.hook,
        "hook_point_layer": layer,
        "hook_point_head_index": None,
        "hook_name": config.hook,
        "hook_layer": layer,
        "hook_head_index": None,
        "context_size": config.context_size,
        "prepend_bos": config.prepend_bos,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(dtype),
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "activation_fn_str": "relu",
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": config.centre},
    }


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with files.replacing(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise SaezooError(f"cannot write {path}: {error}; is the disk full?") from None
