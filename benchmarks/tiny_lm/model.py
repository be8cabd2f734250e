"""A plain GPT-2 for training, saved in the layout of ``transformers.GPT2LMHeadModel``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import write_bytes
from safetensors.torch import load_file, save
from tokenizer import CONTEXT, EOT_ID, VOCAB
from torch import Tensor, nn

LAYERS = 4
WIDTH = 256
HEADS = 4
INIT_STD = 0.02  # GPT-2's
HF_MODULES = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
CHUNK = 1024  # tokens whose logits are held at once


def causal_attention(heads: Tensor) -> Tensor:
    """Softmax attention of queries, keys, values (3, batch, positions, head width).

    The queries are handled in two halves: the first half needs only the first half of the keys, which saves a
    quarter of the work, and batched bfloat16 products were faster on CPU than the fused kernel.
    """
    queries, keys, values = heads[0], heads[1], heads[2]
    length, width = queries.shape[1:]
    half = length // 2
    mask = torch.full((length, length), -math.inf, dtype=heads.dtype).triu(1)
    parts: list[Tensor] = []
    for low, high in ((0, half), (half, length)):
        scores = torch.baddbmm(
            mask[low:high, :high], queries[:, low:high], keys[:, :high].transpose(1, 2), alpha=width**-0.5
        )
        parts.append(torch.bmm(scores.softmax(-1).to(values.dtype), values[:, :high]))
    return torch.cat(parts, dim=1)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``x @ weight.T`` without ever holding all logits.

    The gradient is formed chunk by chunk during the forward pass: a chunk's logits then stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats; x is (tokens, WIDTH), targets (tokens,)."""
        low, low_x = weight.to(torch.bfloat16), x.to(torch.bfloat16)
        grad_x = torch.empty_like(low_x)
        grad_weight = torch.zeros_like(weight)
        total = 0.0
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            logits = (low_x[piece] @ low.T).float()
            logs = torch.log_softmax(logits, dim=-1)
            index = targets[piece, None]
            total -= float(logs.gather(1, index).sum())
            delta = logs.exp_().scatter_add_(1, index, torch.full(index.shape, -1.0))
            scaled = delta.mul_(1 / len(targets)).to(torch.bfloat16)
            grad_x[piece] = scaled @ low
            grad_weight += scaled.T @ low_x[piece]
        ctx.save_for_backward(grad_x.to(x.dtype), grad_weight)
        return x.new_tensor(total / len(targets), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients formed in forward, times the incoming one."""
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0], grad_weight * grads[0], None


class Block(nn.Module):
    """Pre-norm attention and MLP, as in GPT-2 (gelu_new, biases everywhere)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_proj = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream (rows, positions, WIDTH) after this block."""
        rows, length, _ = x.shape
        heads = self.c_attn(self.ln_1(x)).view(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = causal_attention(heads.reshape(3, rows * HEADS, length, WIDTH // HEADS))
        joined = mixed.view(rows, HEADS, length, WIDTH // HEADS).transpose(1, 2).reshape(rows, length, WIDTH)
        x = x + F.dropout(self.attn_proj(joined), self.dropout, self.training)
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_proj(hidden), self.dropout, self.training)


class TinyGPT2(nn.Module):
    """GPT-2 of LAYERS blocks with tied embeddings."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # GPT-2 scales the projections into the residual stream down with depth.
                scale = 1 / math.sqrt(2 * LAYERS) if "_proj" in name else 1.0
                nn.init.normal_(parameter, std=INIT_STD * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting ids[:, 1:] from ids[:, :-1]."""
        inputs = ids[:, :-1]
        x = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        targets = ids[:, 1:].reshape(-1)
        # torch leaves Function.apply without annotations.
        loss: Tensor = TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            self.ln_f(x).view(-1, WIDTH), self.wte.weight, targets
        )
        return loss


def hf_config(dropout: float) -> dict[str, object]:
    """config.json of the saved model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": INIT_STD,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": dropout,
        "bos_token_id": EOT_ID,
        "eos_token_id": EOT_ID,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


def hf_name(name: str) -> tuple[str, bool]:
    """GPT2LMHeadModel's name of a TinyGPT2 parameter, and whether it is stored transposed (Conv1D: in, out)."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return f"transformer.{name}", False
    layer, module, kind = parts[1:]
    return f"transformer.h.{layer}.{HF_MODULES.get(module, module)}.{kind}", module in HF_MODULES and kind == "weight"


def hf_state(model: TinyGPT2) -> dict[str, Tensor]:
    """float16 weights under GPT2LMHeadModel's names."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        key, transposed = hf_name(name)
        state[key] = (value.T if transposed else value).detach().to(torch.float16).contiguous()
    return state


@torch.no_grad()
def load_hf(model: TinyGPT2, folder: Path) -> None:
    """Fill ``model`` with the weights that ``save_hf`` wrote into ``folder``."""
    state = load_file(folder / "model.safetensors")
    for name, value in model.named_parameters():
        key, transposed = hf_name(name)
        value.copy_(state[key].T if transposed else state[key])


def save_hf(model: TinyGPT2, folder: Path, dropout: float) -> None:
    """Write config.json and model.safetensors, each under a temporary name first."""
    write_bytes(folder / "model.safetensors", save(hf_state(model), metadata={"format": "pt"}))
    write_bytes(folder / "config.json", (json.dumps(hf_config(dropout), indent=2) + "\n").encode("utf-8"))
