"""A sparse autoencoder that knows what it must be fed.

Shapes: B any leading dimensions (batch, or batch and position), D d_in, F d_sae.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from saezoo import files, formats, hub
from saezoo.errors import SaezooError, UsageError
from saezoo.sae_config import PARAMETERS, SAEConfig, config_from, to_saelens
from saezoo.weights import Weights

_EPS = 1e-5  # of layer_norm, as in OpenAI's code and SAELens
_CARD = """---
{{ card_data }}
---

A sparse autoencoder in the layout of SAELens: cfg.json and sae_weights.safetensors.
`saezoo.SAE.from_pretrained` reads it.
"""


class SAE(  # type: ignore[call-arg]  # mypy does not see the client's types
    nn.Module,
    ModelHubMixin,  # type: ignore[misc]
    library_name="saelens",
    tags=["sparse-autoencoder"],
    model_card_template=_CARD,
):
    """Sparse autoencoder: f = activation((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec.

    Parameters W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], and those that the activation needs besides. With p the
    pre-activation, `config.activation` is

        relu       ReLU(p)
        topk       ReLU(p) of the k largest p of each token, 0 elsewhere
        jumprelu   ReLU(p) where p > threshold_i, 0 elsewhere
        batchtopk  the same with one threshold for all features, as in use after training
        gated      ReLU(exp(r_mag_i) q + b_mag_i) where q + b_gate_i > 0, with q = (x - b_dec) W_enc

    With `config.centre`, inputs may come from TransformerLens (centred) or from raw Hugging Face activations: the mean
    over D is taken off first, which changes nothing for the former. The decoder's rows are used as stored, never
    renormalised.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def __init__(self, config: SAEConfig, tensors: dict[str, Tensor], log_sparsity: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.log_sparsity = log_sparsity
        """log10(firing frequency + 1e-10) of each feature in training [F], or None if unknown."""
        for name in PARAMETERS[config.activation]:
            setattr(self, name, nn.Parameter(tensors[name], requires_grad=False))

    def encode(self, x_BD: Tensor) -> Tensor:
        """Features f [..., F], all >= 0, of activations x [..., D]."""
        if x_BD.shape[-1] != self.config.d_in:
            raise UsageError(f"this SAE reads activations of width {self.config.d_in}, not {x_BD.shape[-1]}")
        x_BD = x_BD.to(self.W_enc.dtype)
        if self.config.centre or self.config.normalise == "layer_norm":
            x_BD = x_BD - x_BD.mean(-1, keepdim=True)
        if self.config.normalise == "layer_norm":
            x_BD = x_BD / (x_BD.std(-1, keepdim=True) + _EPS)
        if self.config.apply_b_dec_to_input:
            x_BD = x_BD - self.b_dec
        return self._activate(x_BD @ self.W_enc)

    def _activate(self, q_BF: Tensor) -> Tensor:
        """Features of x W_enc; the class's docstring has the formulas."""
        activation = self.config.activation
        if activation == "gated":
            magnitude_BF = torch.relu(q_BF * self.r_mag.exp() + self.b_mag)
            return magnitude_BF * (q_BF + self.b_gate > 0)
        p_BF = q_BF + self.b_enc
        if activation == "topk":
            assert self.config.k is not None  # config_from sees to that
            top = p_BF.topk(self.config.k, dim=-1)
            return torch.zeros_like(p_BF).scatter_(-1, top.indices, top.values.relu())
        if activation == "relu":
            return torch.relu(p_BF)
        return torch.relu(p_BF) * (p_BF > self.threshold)

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """Reconstruction [..., D] from features [..., F], in the frame the SAE was trained in (centred).

        An SAE with `config.normalise` needs the activations x [..., D] that were encoded too, to undo it; UsageError
        without.
        """
        return self.restore(f_BF @ self.W_dec + self.b_dec, x_BD)

    def restore(self, x_hat_BD: Tensor, x_BD: Tensor | None) -> Tensor:
        """f W_dec + b_dec [..., D] with the normalisation of x undone; the last step of `decode`."""
        if self.config.normalise == "none":
            return x_hat_BD
        if x_BD is None:
            raise UsageError("this SAE normalises each token; give decode the activations too: decode(f, x)")
        x_BD = x_BD.to(x_hat_BD.dtype)
        x_hat_BD = x_hat_BD * x_BD.std(-1, keepdim=True)
        return x_hat_BD if self.config.centre else x_hat_BD + x_BD.mean(-1, keepdim=True)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction [..., D] of x [..., D], in the frame of the input: a mean over D is added back."""
        x_hat_BD = self.decode(self.encode(x_BD), x_BD)
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
        names = PARAMETERS[self.config.activation]
        tensors = {name: getattr(self, name).detach().to("cpu", dtype) for name in names}
        return write(Path(folder), self.config, tensors, self.log_sparsity)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._hub_mixin_config = self.config  # for the hub's own config.json: as it is now, not as it was made
        self.save(save_directory, dtype=self.W_enc.dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SAE:
        """The SAE in a local folder or a repository of the hub, `owner/repository`, of any format of docs/formats.md.

        Not the mixin's own, which fetches config.json first: that says nothing that is needed, and offline it fails.
        The token and the cache are those of the environment. Raises as `load`.
        """
        local = Path(name) / subfolder
        if not Path(name).is_dir():
            whole = f"{name}/{subfolder}".rstrip("/")
            local = hub.fetch_sae(whole, revision=revision, offline=local_files_only)
        return from_weights(formats.read(local), str(local), device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"d_in={self.config.d_in}, d_sae={self.config.d_sae}, hook={self.config.hook}"


def from_weights(weights: Weights, where: str, *, device: str, dtype: torch.dtype) -> SAE:
    """An SAE from what its files say; WeightsError if they describe a kind that this class is not."""
    d_in, d_sae = weights.tensors["W_enc"].shape
    config = config_from(weights.config, where, d_in, d_sae)
    return SAE(config, placed(weights.tensors, device, dtype), weights.log_sparsity)


def placed(tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors there and so, each in one piece (files of other projects give transposed views); what is so already
    stays memory-mapped."""
    return {name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()}


def write(
    folder: Path,
    config: SAEConfig,
    tensors: dict[str, Tensor],
    log_sparsity: Tensor | None,
    origin: dict[str, Any] | None = None,
) -> Path:
    """The files of an SAE in the published layout; `origin` as in `to_saelens`."""
    if config.activation == "batchtopk":  # for SAELens a JumpReLU, whose features have thresholds of their own
        tensors = tensors | {"threshold": tensors["threshold"].expand(config.d_sae)}
    save_tensors(folder / "sae_weights.safetensors", tensors)
    sparsity = folder / "sparsity.safetensors"
    if log_sparsity is not None:
        save_tensors(sparsity, {"sparsity": log_sparsity.cpu().float()})
    elif sparsity.is_file():
        sparsity.unlink()  # of the SAE that was here before
    cfg = to_saelens(config, str(tensors["W_dec"].dtype), origin)
    with files.replacing(folder / "cfg.json") as path:
        path.write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    return folder


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, complete or not at all; SaezooError if the disk is full."""
    with files.replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise SaezooError(f"cannot write {path}: {error}; is the disk full?") from None
