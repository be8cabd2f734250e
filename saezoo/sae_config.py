"""What an SAE is and must be fed, and how cfg.json says it: in the words of 2024's and of today's SAELens.

Other projects' files are first put into the same words (`foreign.py`). Whatever would need another forward pass than
`SAE` has is refused here. Imports no torch.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from saezoo.errors import WeightsError, shown

_T = TypeVar("_T")

Activation = Literal["relu", "topk", "jumprelu", "batchtopk", "gated"]
Normalisation = Literal["none", "layer_norm"]

_LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
PARAMETERS: dict[Activation, tuple[str, ...]] = {
    "relu": _LINEAR,
    "topk": _LINEAR,
    "jumprelu": (*_LINEAR, "threshold"),
    "batchtopk": (*_LINEAR, "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
"""W_enc [D, F], W_dec [F, D], b_dec [D]; the others [F], but for the threshold of batchtopk, which is one number."""

# `architecture` in cfg.json -> ours. SAELens keeps BatchTopK as JumpReLU once it is trained.
_ARCHITECTURES: dict[str | None, Activation] = {
    None: "relu",
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_LONGEST_NAME = 200  # of a hook or model; they go into tables and CSVs
_OWN = "saezoo"
"""Key of cfg.json under which saezoo keeps what SAELens has no word for."""


FOLDERS: dict[str, str | None] = {
    "sae_weights.safetensors": "cfg.json",
    "sae.safetensors": "cfg.json",
    "ae.pt": "config.json",
    "params.npz": None,
}
"""File of weights -> the file that describes it, for formats that are folders."""


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
    activation: Activation = "relu"
    k: int | None = None
    """Features that fire: at most, on each token (topk); on average, in training (batchtopk)."""
    normalise: Normalisation = "none"
    """`layer_norm`: each token is brought to mean 0 and standard deviation 1 first, and its reconstruction back."""


def config_from(cfg: dict[str, Any], where: str, d_in: int, d_sae: int) -> SAEConfig:
    """What cfg.json says about an SAE of these shapes.

    Raises WeightsError for anything that would need another forward pass than `SAE` has.
    """
    activation, k = activation_of(cfg, where)
    cfg = _merged(cfg, where)
    for key, known in (("d_in", d_in), ("d_sae", d_sae)):
        if cfg.get(key, known) != known:
            raise WeightsError(f"{where}: cfg.json says {key} {shown(cfg[key])}, the tensors say {known}")
    if k is not None and k > d_sae:
        raise WeightsError(f"{where}: cfg.json says k {k}, there are {d_sae} features")
    return SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        **feeding(cfg, where),
        apply_b_dec_to_input=_typed(cfg, "apply_b_dec_to_input", bool, where) is not False,
        activation=activation,
        k=k,
        normalise="layer_norm" if cfg.get("normalize_activations") == "layer_norm" else "none",
    )


def feeding(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """What cfg.json says about the input: the fields hook, model_name, context_size, prepend_bos and centre."""
    cfg = _merged(cfg, where)
    # Files of early 2024 say nothing: all were trained on TransformerLens' default, centred, residual stream. Later
    # ones bear a version, and centre only if they say so (SAELens loads models with from_pretrained_no_processing).
    model_kwargs = _typed(cfg, "model_from_pretrained_kwargs", dict, where)
    if model_kwargs is None and {"sae_lens_version", "sae_lens_training_version", "metadata"} & set(cfg):
        model_kwargs = {}
    centred = None if model_kwargs is None else _typed(model_kwargs, "center_writing_weights", bool, where)
    context_size = _typed(cfg, "context_size", int, where)
    if context_size is not None and context_size < 1:
        raise WeightsError(f"{where}: cfg.json says `context_size: {context_size}`; it must be above 0")
    return {
        "hook": _typed(cfg, "hook_name", str, where) or _typed(cfg, "hook_point", str, where) or None,
        "model_name": _typed(cfg, "model_name", str, where),
        "context_size": context_size,
        "prepend_bos": _typed(cfg, "prepend_bos", bool, where) is not False,
        "centre": True if model_kwargs is None else bool(centred),
    }


def activation_of(cfg: dict[str, Any], where: str) -> tuple[Activation, int | None]:
    """(activation, k) that cfg.json describes; WeightsError for one that `SAE` has not."""
    cfg = _merged(cfg, where)
    supported: dict[str, tuple[object, ...]] = {
        "normalize_activations": (None, "none", "layer_norm"),
        "reshape_activations": (None, "none"),
        "finetuning_scaling_factor": (None, False),
        "hook_head_index": (None,),
        "hook_point_head_index": (None,),
        "rescale_acts_by_decoder_norm": (None, False),
    }
    for key, values in supported.items():
        if not any(value is cfg.get(key) or value == cfg.get(key) for value in values):
            raise WeightsError(f"{where}: `{key}: {shown(cfg[key])}` is not supported")
    own = _typed(cfg, _OWN, dict, where) or {}
    if own.get("activation") == "batchtopk":
        return "batchtopk", _k(own.get("k"), where)
    architecture = cfg.get("architecture")
    if not isinstance(architecture, (str, type(None))) or architecture not in _ARCHITECTURES:
        known = ", ".join(str(name) for name in _ARCHITECTURES if name)
        raise WeightsError(f"{where}: `architecture: {shown(architecture)}` is not supported; {known} are")
    activation = _ARCHITECTURES[architecture]
    key = "activation_fn_str" if cfg.get("activation_fn_str") else "activation_fn"
    function = cfg.get(key)
    if function == "topk" and activation == "relu":  # SAELens before version 6: an architecture `standard` with TopK
        activation = "topk"
    elif function not in (None, "relu") and not (function == "topk" and activation == "topk"):
        raise WeightsError(f"{where}: `{key}: {shown(function)}` is not supported with the architecture {architecture}")
    if activation != "topk":
        return activation, None
    options = _typed(cfg, "activation_fn_kwargs", dict, where) or {}
    return activation, _k(cfg.get("k", options.get("k")), where)


def to_saelens(config: SAEConfig, dtype: str, origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """cfg.json with the names of 2024 (hook_point …) and those that today's SAELens reads.

    `origin`: `Weights.origin` of the files that the SAE came from, so that it can be converted back.
    """
    hook = config.hook or ""  # SAELens wants a text
    layer = next((int(part) for part in hook.split(".") if part.isdigit()), None)
    architectures: dict[Activation, str] = {"relu": "standard", "batchtopk": "jumprelu"}
    own: dict[str, Any] = {"activation": "batchtopk", "k": config.k} if config.activation == "batchtopk" else {}
    own |= {} if origin is None else {"origin": origin}
    return {
        "architecture": architectures.get(config.activation, config.activation),
        "model_name": config.model_name,
        "hook_point": hook,
        "hook_point_layer": layer,
        "hook_point_head_index": None,
        "hook_name": hook,
        "hook_layer": layer,
        "hook_head_index": None,
        "context_size": config.context_size,
        "prepend_bos": config.prepend_bos,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "activation_fn_str": "topk" if config.activation == "topk" else "relu",
        "activation_fn_kwargs": {"k": config.k} if config.activation == "topk" else {},
        "normalize_activations": config.normalise,
        "finetuning_scaling_factor": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": True} if config.centre else {},
        **({"k": config.k} if config.activation == "topk" else {}),
        **({_OWN: own} if own else {}),
    }


def origin_of(cfg: dict[str, Any]) -> dict[str, Any] | None:
    """What `to_saelens` was told about where the SAE came from."""
    own = cfg.get(_OWN)
    origin = own.get("origin") if isinstance(own, dict) else None
    return origin if isinstance(origin, dict) else None


def _merged(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """`cfg` with its `metadata`, where SAELens 6 keeps what is not architecture."""
    return {**cfg, **(_typed(cfg, "metadata", dict, where) or {})}


def _k(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise WeightsError(
            f"{where}: its configuration says `k: {shown(reprlib.repr(value))}`; it must be a whole number above 0"
        )
    return value


def _typed(cfg: dict[str, Any], key: str, kind: type[_T], where: str) -> _T | None:
    """`cfg[key]` if it is of the type `kind`, None if it is absent or null; else WeightsError."""
    value = cfg.get(key)
    if value is not None and type(value) is not kind:
        told = f"`{key}: {shown(reprlib.repr(value))}`; it must be of type {kind.__name__}"
        raise WeightsError(f"{where}: cfg.json says {told}")
    if isinstance(value, str) and (len(value) > _LONGEST_NAME or not value.isprintable()):
        told = f"`{key}: {shown(value)}`; it must be at most {_LONGEST_NAME} printable letters"
        raise WeightsError(f"{where}: cfg.json says {told}")
    return value
