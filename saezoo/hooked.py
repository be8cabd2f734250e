"""GPT-2 as the TransformerLens model that the SAEs of February 2024 were trained on.

Those SAEs read the residual stream of a model whose writing weights were centred: at every
position, the residual of the transformers model minus its own mean over d_model.
TransformerLens does the centring; up to 3.x the class for it is HookedTransformer, from 4.0
on it is TransformerBridge in compatibility mode. Nothing here reaches for the hub.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

from saezoo.errors import SaezooError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, TransformerBridge
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


def hooked_model(
    hf_model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> HookedTransformer | TransformerBridge:
    """Copy a loaded GPT-2 into a TransformerLens model with centred writing weights.

    Hooks carry the old names. `blocks.{L}.hook_resid_pre` is, to about 1e-5 in float32,
    `hidden_states[L]` minus its mean over the last axis, shape [batch, position, d_model];
    `blocks.{L}.hook_resid_post` is the same behind block L. LayerNorm gains are folded and
    the unembedding is centred, as TransformerLens does by default: log-probabilities and
    losses (nats) are those of `hf_model`, raw logits are shifted by a constant per position.

    `hf_model` may have any size; its dtype and device are kept (float64 weights are rounded to
    float32 by the processing). Neither it nor `tokenizer` is changed, and the result shares no
    memory with them. It is in eval mode, and frozen if `hf_model` is. Without a tokenizer it
    takes token ids only; with one, `to_tokens` and `to_str_tokens` put BOS in front.

    Raises SaezooError when TransformerLens is missing or `hf_model` is not a GPT-2 with a
    language-modelling head.
    """
    if getattr(hf_model.config, "model_type", None) != "gpt2" or not hasattr(hf_model, "lm_head"):
        raise SaezooError(f"hooked_model wants a transformers GPT2LMHeadModel, got {type(hf_model).__name__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer's own farewell
        build = _hooked_transformer if _major_version() < 4 else _transformer_bridge
        model = build(hf_model, _own_tokenizer(tokenizer))
    # The bridge thaws what it rewrites and keeps the rest; HookedTransformer thaws everything.
    return model.eval().requires_grad_(any(p.requires_grad for p in hf_model.parameters()))


def _major_version() -> int:
    """Of the installed TransformerLens. 4.0 removed HookedTransformer."""
    try:
        return int(importlib.metadata.version("transformer-lens").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        raise SaezooError("TransformerLens is not installed; run: pip install transformer-lens") from None


def _hooked_transformer(hf_model: GPT2LMHeadModel, tokenizer: Any) -> Any:
    """TransformerLens 2 and 3. `from_pretrained` would refuse a model not on its list."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions  # type: ignore[import-not-found, unused-ignore]

    config = hf_model.config
    tl_config = HookedTransformerConfig(
        d_model=config.n_embd,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        n_layers=config.n_layer,
        n_ctx=config.n_positions,
        d_vocab=config.vocab_size,
        eps=config.layer_norm_epsilon,
        act_fn=config.activation_function,
        use_attn_scale=config.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        dtype=hf_model.dtype,
        device=str(hf_model.device),
        init_weights=False,  # all are overwritten; drawing them would move the caller's RNG
    )
    model = HookedTransformer(tl_config, tokenizer)
    with torch.no_grad():  # the converted weights are views of hf_model's parameters
        weights = weight_conversions.convert_gpt2_weights(hf_model, tl_config)
        model.load_and_process_state_dict(weights)
    return model


def _transformer_bridge(hf_model: GPT2LMHeadModel, tokenizer: Any) -> Any:
    """TransformerLens 4. `boot_transformers` would fetch a tokenizer where there is none."""
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # The bridge puts its own modules into the model it wraps and rewrites the weights, so it
    # gets a new one: a deepcopy would fire the caller's forward hooks.
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn only to be overwritten
        own: Any = type(hf_model)(copy.deepcopy(hf_model.config))
        own.to(hf_model.device, hf_model.dtype).load_state_dict(hf_model.state_dict())
        bridge = build_bridge_from_module(own, "GPT2LMHeadModel", hf_config=own.config, tokenizer=tokenizer)
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def _own_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """A copy that TransformerLens takes as it is (it sets pad and padding side on it)."""
    own = copy.deepcopy(tokenizer)
    if own is not None:
        # Without add_bos_token it reloads the tokenizer from name_or_path, perhaps from the
        # hub; without name_or_path it dies of a KeyError. BOS is added as text all the same.
        own.init_kwargs = {"name_or_path": "", **own.init_kwargs, "add_bos_token": True}
    return own
