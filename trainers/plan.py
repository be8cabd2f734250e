"""What a run will need, before it starts: from a short calibration on this machine.

FLOPs are those of the exact sparse step: the encoder's product, 2 D F a token and SAE, and the language model's blocks;
all else together is below a tenth of that once few features fire.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from saezoo.activations import residuals
from saezoo.entries import Entry, Recipe
from saezoo.lm import LanguageModel, depth_of
from saezoo.products import half_is_faster
from saezoo.ranks import Ranks
from saezoo.trainers.feed import CALLS_AT_ONCE
from saezoo.trainers.trainee import Product, Trainee, initial_parameters

_DENSE_STEPS = 150
"""Steps after the warm-up until few features fire; dense steps, so the slow ones. tiny-res' layer 2 takes 70 to 80
(log.csv of the runs of benchmarks/precision.py: L0 below 0.1 d_sae); twice that leaves room."""
_DENSER = 1.5
"""Mean density of a run over its final one."""
_FINAL_DENSITY = 0.01
"""Where the registry has no L0 for the entry."""


@dataclass(frozen=True)
class Plan:
    """A forecast. Times in seconds, sizes in bytes."""

    tokens: int
    steps: int
    flops: float
    peak_flops: float
    """Measured matrix-product speed of this machine, in the precision of the encoder's product."""
    lm_seconds: float
    """The language model's share."""
    dense_seconds: float
    """The first steps', while most features fire."""
    sparse_seconds: float
    memory: int
    """Of the training, on its device, at most; the libraries' own comes on top."""
    checkpoints: int
    """On disk, two of them."""
    token_cache: int
    """On disk, at most."""

    @property
    def seconds(self) -> float:
        return self.lm_seconds + self.dense_seconds + self.sparse_seconds


def make_plan(
    entries: Sequence[Entry], recipe: Recipe, tokens: int, lm: LanguageModel, product: Product, ranks: Ranks
) -> Plan:
    """Calibrate with a few forward passes and steps (some seconds on a CPU at GPT-2 small's size a minute)."""
    mine = ranks.entries(entries)
    first, steps = entries[0], -(-tokens // recipe.batch_size)
    call = _seconds(lambda: _model_call(entries, recipe, lm))
    lm_seconds = call * tokens / (recipe.store_rows * first.known_context) / ranks.size
    dense_steps = min(steps, _DENSE_STEPS + max(recipe.lr_warmup_steps, recipe.l1_warmup_steps))
    dense = sum(_seconds(_step(entry, recipe, lm, "dense", None, ranks)) for entry in mine[:1]) * len(mine)
    sparse = sum(_seconds(_step(entry, recipe, lm, product, _density(entry), ranks)) for entry in mine)
    return Plan(
        tokens=tokens,
        steps=steps,
        flops=tokens * flops_per_token(entries, lm),
        peak_flops=matrix_peak(lm.device, product),
        lm_seconds=lm_seconds,
        dense_seconds=dense * dense_steps,
        sparse_seconds=sparse * (steps - dense_steps),
        memory=memory_of(mine, len(mine), recipe, lm, ranks),
        checkpoints=2 * _checkpoint(entries, recipe, lm),
        token_cache=2 * tokens,
    )


def flops_per_token(entries: Sequence[Entry], lm: LanguageModel) -> float:
    """Of the exact sparse step and the language model's blocks that it needs."""
    first = entries[0]
    deepest = max(depth_of(entry.hook, lm.n_layers) for entry in entries)
    block = 24 * lm.d_model**2 + 2 * first.known_context * lm.d_model  # 12 D^2 weights; causal attention
    return sum(2 * entry.d_in * entry.d_sae for entry in entries) + deepest * block


def matrix_peak(device: torch.device, product: Product) -> float:
    """FLOP/s of the best of several large matrix products on `device`, in the precision of the encoder's product."""
    n = 8192 if device.type == "cuda" else 2048
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    a = torch.randn(n, n, device=device).to(half if product == "half" else torch.float32)
    return 2 * n**3 / _seconds(lambda: a @ a)


def best_product(device: torch.device) -> Product:
    """`half` where the hardware multiplies half precision faster than single, else `full`."""
    return "half" if half_is_faster(device) else "full"


def _density(entry: Entry) -> float:
    l0 = entry.published.get("l0")
    return _DENSER * (_FINAL_DENSITY if l0 is None else l0 / entry.d_sae)


def _model_call(entries: Sequence[Entry], recipe: Recipe, lm: LanguageModel) -> None:
    tokens_RT = torch.randint(lm.vocab, (recipe.store_rows, entries[0].known_context), device=lm.device)
    residuals(lm, tokens_RT, [depth_of(entry.hook, lm.n_layers) for entry in entries], centre=True)


def _step(
    entry: Entry, recipe: Recipe, lm: LanguageModel, product: Product, density: float | None, ranks: Ranks
) -> Callable[[], object]:
    """A step on random activations; the encoder's bias makes `density` of the pairs active."""
    features = ranks.features(entry.d_sae)
    b_dec = torch.zeros(entry.d_in, device=lm.device)
    parameters = initial_parameters(entry.d_sae, b_dec, torch.Generator().manual_seed(0), features=features)
    x_BD = torch.randn(recipe.batch_size, entry.d_in, device=lm.device)
    if density is not None:
        pre = (x_BD[:64] @ parameters.W_enc).flatten()
        parameters.b_enc.fill_(-float(pre.float().cpu().kthvalue(int(len(pre) * (1 - min(density, 1))) or 1).values))
    trainee = Trainee(parameters, recipe, product=product)
    trainee.density = density or 1.0
    return lambda: float(trainee.step(x_BD).losses.total)


def _seconds(action: Callable[[], object]) -> float:
    """The fastest of three, after one for warming up."""
    action()
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def weights(entries: Sequence[Entry]) -> int:
    """Numbers in their parameters."""
    return sum(2 * entry.d_in * entry.d_sae + entry.d_sae + entry.d_in for entry in entries)


def _half_buffer(n_entries: int, recipe: Recipe, lm: LanguageModel, context: int) -> int:
    activations = recipe.buffer_batches // 2 * recipe.store_rows * context
    return activations * n_entries * lm.d_model * lm.dtype.itemsize


def memory_of(mine: Sequence[Entry], layers: int, recipe: Recipe, lm: LanguageModel, ranks: Ranks) -> int:
    """Bytes on the device, at most, to train `mine`, which read so many layers."""
    first = mine[0]
    model: int = sum(parameter.numel() * parameter.element_size() for parameter in lm.hf_model.parameters())
    buffer = 5 * _half_buffer(layers, recipe, lm, first.known_context)  # two of them mixed, their mix, and one kept
    # A block of the model holds about four tensors as wide as its hidden layer, 4 D.
    calls = CALLS_AT_ONCE if lm.device.type == "cuda" else 1
    forward = 4 * calls * recipe.store_rows * first.known_context * 4 * lm.d_model * lm.dtype.itemsize
    shared = ranks.size if ranks.shares_features else 1
    states = (12 * weights(mine) + 4 * weights(mine[:1])) // shared  # weights and two moments; one SAE's gradient
    dense = 2 * 4 * recipe.batch_size * first.d_sae // shared
    return model + forward + buffer + states + dense


def _checkpoint(entries: Sequence[Entry], recipe: Recipe, lm: LanguageModel) -> int:
    return 12 * weights(entries) + 2 * _half_buffer(len(entries), recipe, lm, entries[0].known_context)
