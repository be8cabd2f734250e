"""Training at real shape on a GPU, split by stage: GPT-2 small with random weights, the recipe feb2024.

    python benchmarks/gpu_run.py --layers 10 --seconds 20      (or --layers 0-11)

What is timed is the steady state of `train`: the real feed, buffer and step on random tokens, with encoder biases set
so that L0 is about 50, since a short run would otherwise see only the dense first steps. Appends to
results/gpu_run.csv.
Neither TransformerLens nor datasets is needed. --device cpu runs the same on a CPU, for a check of this script.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, append, device_name, versions

L0 = 50


def random_model(device: str, n_layers: int) -> Any:
    """GPT-2 small's architecture; weights as transformers initialises them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from saezoo.lm import LanguageModel

    class NoTokenizer:
        all_special_ids = (50256,)

    torch.manual_seed(0)
    config = GPT2Config(n_layer=n_layers, attn_implementation="sdpa")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LanguageModel(GPT2LMHeadModel(config).to(device, dtype), NoTokenizer())


def random_calls(rows: int, context: int) -> Iterator[Any]:
    """Store calls of random tokens, each row beginning with BOS."""
    from saezoo.trainers.feed import Call, Cursor

    random = np.random.default_rng(0)
    while True:
        tokens_RT = random.integers(0, 50256, (rows, context))
        tokens_RT[:, 0] = 50256
        yield Call(tokens_RT, Cursor(0, 0))


def run(layers: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steady-state speed and stages of one set of layers."""
    import torch

    from saezoo.activations import ActivationBuffer
    from saezoo.lm import depth_of
    from saezoo.ranks import Ranks
    from saezoo.registry import read_registry
    from saezoo.trainers.feed import Cursor, Feed
    from saezoo.trainers.plan import best_product, flops_per_token, matrix_peak
    from saezoo.trainers.train import new_trainee

    registry = read_registry()
    entries = registry.find("gpt2-small-res", layers)
    recipe = dataclasses.replace(registry.recipe("feb2024"), lr=1e-9, buffer_batches=args.buffer_batches)
    device = torch.device(args.device)
    depths = [depth_of(entry.hook, 12) for entry in entries]
    lm = random_model(args.device, max(1, *depths))
    half, context = recipe.buffer_batches // 2, entries[0].known_context
    calls = random_calls(recipe.store_rows, context)
    feed = Feed(lm, calls, depths, centre=True, per_refill=half, start=Cursor(0, 0), ranks=Ranks())
    generator = torch.Generator(device).manual_seed(0)
    buffer = ActivationBuffer(
        feed,
        half=half,
        batch_size=recipe.batch_size,
        mode=recipe.buffer,
        permute=lambda n: torch.randperm(n, generator=generator, device=device),
    ).fill()
    product = best_product(device)
    means = buffer.storage.float().mean(0)
    trainees = [new_trainee(entry, recipe, product, means[i].clone()) for i, entry in enumerate(entries)]
    for i, trainee in enumerate(trainees):
        thin_out(trainee, buffer.storage[:4096, i].float())

    clock = Clock(device)
    done = 0
    begin: float | None = None
    while begin is None or time.perf_counter() - begin < args.seconds:
        if done == 32 * recipe.batch_size and begin is None:  # compiled, and the capacities settled
            clock.start()
            begin, done = time.perf_counter(), 0
        with clock("refill and language model"):
            x_nLD = next(buffer)
        with clock("SAE steps"):
            for i, trainee in enumerate(trainees):
                log = trainee.step(x_nLD[:, i].float().contiguous())
        with clock("language model ahead"):
            feed.work_ahead()
        done += len(x_nLD)
    clock.stop()
    seconds = time.perf_counter() - begin
    for trainee in trainees:
        trainee.settle()
    speed = done / seconds
    peak = matrix_peak(device, product)
    total = registry.recipe("feb2024").tokens
    return {
        "layers": layers,
        "product": product,
        "tokens": done,
        "tokens_per_s": round(speed),
        "minutes_for_300M": round(total / speed / 60, 2),
        "l0": round(float(log.l0), 1),
        "share_of_peak": round(speed * flops_per_token(entries, lm) / peak, 3),
        "peak_tflops": round(peak / 1e12, 1),
        **{f"share_{stage}": round(share, 3) for stage, share in clock.shares().items()},
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None,
    }


def thin_out(trainee: Any, x_BD: Any) -> None:
    """Set the encoder's biases so that L0 is about 50."""
    state = trainee.state()
    W_FD, b_dec_D = state.tensors["W_enc"], state.tensors["b_dec"]
    pre_BF = (x_BD[1:257] - b_dec_D) @ W_FD.T
    threshold = pre_BF.flatten().float().cpu().kthvalue(int(pre_BF.numel() * (1 - L0 / len(W_FD)))).values
    state.tensors["b_enc"].fill_(-float(threshold))
    facts = {**state.facts, "density": L0 / len(W_FD)}
    trainee.restore(state._replace(facts=facts, tensors={key: value.clone() for key, value in state.tensors.items()}))


class Clock:
    """Time between CUDA events on the main stream, by stage; wall time on a CPU. Never waits before `stop`."""

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda = torch.cuda if device.type == "cuda" else None
        self._marks: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        self._marks.clear()
        if self._cuda is not None:
            self._cuda.synchronize()

    def __call__(self, stage: str) -> Any:
        import contextlib

        @contextlib.contextmanager
        def between() -> Iterator[None]:
            begin = self._mark()
            yield
            self._marks.append((stage, begin, self._mark()))

        return between()

    def _mark(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        if self._cuda is not None:
            self._cuda.synchronize()

    def shares(self) -> dict[str, float]:
        """Fraction of the time of each stage on the main stream."""
        totals: dict[str, float] = {}
        for stage, begin, end in self._marks:
            spent = end - begin if self._cuda is None else begin.elapsed_time(end)
            totals[stage] = totals.get(stage, 0.0) + spent
        return {stage: spent / sum(totals.values()) for stage, spent in totals.items()}


def main() -> None:
    """Run each set of layers, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["10", "0-11"])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--buffer-batches", type=int, default=128)
    parser.add_argument("--csv", type=Path, default=RESULTS / "gpu_run.csv")
    args = parser.parse_args()
    for layers in args.layers:
        row = {"device": device_name(args.device), **run(layers, args), **versions("torch", "triton", "transformers")}
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        append(args.csv, row)


if __name__ == "__main__":
    main()
