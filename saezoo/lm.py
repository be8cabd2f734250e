"""The frozen language model: raw Hugging Face GPT-2 blocks, run only as far as asked.

The residual stream here is Hugging Face's own. TransformerLens' centred one is this minus its mean over d_model
(`SAE` takes that off); every reader of the residual is a layer norm, so logits are the same in both.

Shapes: B rows, T positions, D d_model, V vocabulary. A *depth* is the number of blocks that have run: depth 0 is the
embedding, `blocks.L.hook_resid_pre` is depth L, `blocks.L.hook_resid_post` is depth L + 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.errors import UsageError, WeightsError
from saezoo.products import linear


def depth_of(hook: str, n_layers: int) -> int:
    """Depth of a TransformerLens hook name; UsageError for other hooks or layers that the model lacks."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if not match:
        raise UsageError(f"hook `{hook}` is not supported; use blocks.L.hook_resid_pre or blocks.L.hook_resid_post")
    layer = int(match[1])
    if layer >= n_layers:
        raise UsageError(f"hook `{hook}`: the model has {n_layers} layers, 0 to {n_layers - 1}")
    return layer + (match[2] == "post")


HALF = (torch.bfloat16, torch.float16)
_SHORT = 256
"""Positions."""


class _Linear(nn.Module):
    """A transformers `Conv1D` (weight [in, out], bias [out]) that takes its product by `products.linear`."""

    def __init__(self, conv: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.nf: int = conv.nf
        self.weight = nn.Parameter(conv.weight.to(dtype), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.to(dtype), requires_grad=False)

    def forward(self, x_BI: Tensor) -> Tensor:
        return linear(x_BI, self.weight.T, self.bias)


def _is_plain(config: Any) -> bool:
    """Whether attention is GPT-2's own: scores divided by the root of the head's width, and by nothing else."""
    return config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx


def _attend(attention: Any, original: Callable[..., Any], x_BTD: Tensor, *args: Any, **options: Any) -> Any:
    """What transformers' GPT-2 attention gives, by plain products where those are quicker: for rows so short that the
    scores lie near the cores. On a CPU torch's fused attention takes two to three times as long there."""
    plain = all(value is None or value is False for value in (*args, *options.values()))
    if not plain or x_BTD.device.type != "cpu" or x_BTD.shape[1] > _SHORT:
        return original(x_BTD, *args, **options)
    rows, length, width = x_BTD.shape
    heads: int = attention.num_heads
    q, k, v = (
        part.view(rows, length, heads, width // heads).transpose(1, 2) for part in attention.c_attn(x_BTD).chunk(3, -1)
    )
    scores_BHTT = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-1, -2))
    later_TT = torch.ones(length, length, dtype=torch.bool, device=x_BTD.device).triu_(1)
    p_BHTT = scores_BHTT.to(x_BTD.dtype).masked_fill_(later_TT, float("-inf")).softmax(-1)
    mixed_BTD = torch.matmul(p_BHTT.to(v.dtype), v).transpose(1, 2).reshape(rows, length, width)
    return attention.c_proj(mixed_BTD), None


class LanguageModel:
    """A GPT-2-architecture model and its tokenizer, in evaluation mode, without gradients."""

    def __init__(self, hf_model: Any, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        """`hf_model` in float32 or float64. `dtype` bfloat16 or float16: the blocks' matrix products are taken in it,
        while the residual stream, the layer norms and the embedding stay as they are, since GPT-2's residual stream
        has entries of several thousand beside ones below 1."""
        self.hf_model = hf_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dtype: torch.dtype = dtype or hf_model.transformer.wte.weight.dtype
        """Of the matrix products; see `residual_dtype`."""
        for block in hf_model.transformer.h:
            if hf_model.config.activation_function == "gelu_new":
                block.mlp.act = nn.GELU(approximate="tanh")  # the same function in one pass over memory, not eight
            for module, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
                for name in names:
                    setattr(module, name, _Linear(getattr(module, name), self.dtype))
            if _is_plain(hf_model.config):
                block.attn.forward = partial(_attend, block.attn, block.attn.forward)
        config = hf_model.config
        self.n_layers: int = config.n_layer
        self.d_model: int = config.n_embd
        self.n_positions: int = config.n_positions
        self.vocab: int = config.vocab_size
        self.bos: int = config.bos_token_id
        eos = config.eos_token_id
        self.special_ids: frozenset[int] = frozenset({self.bos, eos} | set(tokenizer.all_special_ids)) - {None}
        """Ids that the `standard` protocol neither replaces nor scores; for GPT-2, <|endoftext|> alone."""

    @property
    def device(self) -> torch.device:
        return self.hf_model.transformer.wte.weight.device  # type: ignore[no-any-return]

    @property
    def residual_dtype(self) -> torch.dtype:
        return self.hf_model.transformer.wte.weight.dtype  # type: ignore[no-any-return]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token plus position embedding [B, T, D]: the residual at depth 0."""
        transformer = self.hf_model.transformer
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return transformer.wte(tokens_BT) + transformer.wpe(positions_T)  # type: ignore[no-any-return]

    def run(self, resid_BTD: Tensor, start: int, stop: int) -> Tensor:
        """The residual [B, T, D] after blocks start..stop-1. Attention is causal (SDPA without a mask)."""
        with self._products():
            for block in self.hf_model.transformer.h[start:stop]:
                out = block(resid_BTD)
                resid_BTD = out[0] if isinstance(out, tuple) else out  # a tuple before transformers 5
        return resid_BTD

    def _products(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype in HALF else nullcontext()

    def logits(self, resid_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of the residual at the last depth."""
        return self.hf_model.lm_head(self.hf_model.transformer.ln_f(resid_BTD))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def residuals(self, tokens_BT: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The residual [B, T, D] at each of `depths`, from one forward pass that stops at the deepest."""
        resid_BTD, done = self.embed(tokens_BT), 0
        found: dict[int, Tensor] = {}
        for depth in sorted(set(depths)):
            resid_BTD, done = self.run(resid_BTD, done, depth), depth
            found[depth] = resid_BTD
        return found

    @torch.inference_mode()
    def resume(self, resid_BTD: Tensor, depth: int) -> Tensor:
        """Logits [B, T, V] of the model that goes on from the residual at `depth`."""
        return self.logits(self.run(resid_BTD, depth, self.n_layers))

    @torch.inference_mode()
    def constant_logits(self, resid_D: Tensor, depth: int) -> Tensor:
        """Logits [V] when the residual at `depth` is the same vector at every position.

        Attention over equal values returns that value, so every position gives the logits of a one-token sequence.
        """
        return self.resume(resid_D[None, None].to(self.device), depth)[0, 0]


def load_language_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a GPT-2-architecture model from a local folder in the Hugging Face layout.

    `dtype`: of the matrix products; with bfloat16 or float16 all else is float32 (see `LanguageModel`). Raises
    WeightsError for another architecture or files that cannot be read. No code from the folder is run.
    """
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type != "gpt2":
            raise WeightsError(f"{folder} holds a `{config.model_type}` model; only the gpt2 architecture is supported")
        hf_model = GPT2LMHeadModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if dtype in HALF else dtype,
            local_files_only=True,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except WeightsError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError … for damaged folders
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{folder} does not hold a loadable GPT-2 model and tokenizer: {reason}") from None
    return LanguageModel(hf_model.to(device), tokenizer, dtype)
