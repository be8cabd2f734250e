"""Train the bundled language model on CPU within a wall-clock budget.

Run: ``python benchmarks/tiny_lm/train.py --minutes 45`` after ``corpus.py`` and ``tokenizer.py``.
Muon for the hidden matrices, AdamW for embeddings, biases and layer norms. The learning rate follows the wall
clock (warm-up, flat, linear decay to 0), so the run ends on time on a machine that other programs share.

A step's rows are shared out over worker threads, each with a replica of the model over the same weights and with
one compute thread: threads then meet once a step. Parallelism inside each operation meets at every operation, and
was several times slower whenever another program took a core.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from model import TinyGPT2, load_hf, save_hf
from optim import Muon
from tokenizer import CONTEXT, MODEL, Tokens, encode_split, pack_rows
from torch import Tensor

MONITOR_ROWS = 96  # held-out rows scored during training: a fixed subset, to keep it cheap
LOG = Path(__file__).resolve().parent / "train_log.csv"
FIELDS = ("step", "tokens", "seconds", "lr_factor", "train_loss", "heldout_ce", "tokens_per_s")


def batches(docs: list[Tokens], rows: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (rows, CONTEXT + 1); each epoch packs the documents in a new order."""
    rng = np.random.default_rng(seed)
    while True:
        # One token more than the context, so that the last position is trained as well.
        packed = pack_rows([docs[i] for i in rng.permutation(len(docs))], CONTEXT + 1)
        order = rng.permutation(len(packed))
        for start in range(0, len(order) - rows + 1, rows):
            yield torch.from_numpy(packed[order[start : start + rows]])


def lr_factor(progress: float, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: linear warm-up, flat, linear decay to 0."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


@torch.no_grad()
def monitor(model: TinyGPT2, rows: Tensor) -> float:
    """Mean cross-entropy (nats) of ``rows`` in bfloat16; a monitor, not the reported figure."""
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(model(rows[low : low + 16])) for low in range(0, len(rows), 16)]
    model.train()
    return float(np.mean(losses))


def replica(model: TinyGPT2, dropout: float) -> TinyGPT2:
    """A second model over the same weights, with gradients of its own."""
    copy = TinyGPT2(dropout)
    for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data
    return copy


def forward_backward(model: TinyGPT2, ids: Tensor) -> float:
    """Loss (nats) of a worker's rows; leaves the gradients in ``model``."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids)
    loss.backward()
    return float(loss.detach())


class Run:
    """Model, optimisers and log of one training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.model = TinyGPT2(args.dropout)
        if args.init is not None:
            load_hf(self.model, args.init)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and n.startswith("blocks")]
        tables = [self.model.wte.weight, self.model.wpe.weight]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.replicas = [self.model] + [replica(self.model, args.dropout) for _ in range(args.threads - 1)]
        self.pool = ThreadPoolExecutor(args.threads)
        self.muon = Muon(list(hidden), 0.95, args.weight_decay)
        self.adam = torch.optim.AdamW(
            [{"params": tables, "weight_decay": args.table_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.adam_lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=True,
        )

    def step(self, ids: Tensor, factor: float) -> float:
        """One update on a batch; returns its loss in nats. The batch must divide evenly over the replicas."""
        losses = list(self.pool.map(forward_backward, self.replicas, ids.chunk(len(self.replicas))))
        for parameters in zip(*(model.parameters() for model in self.replicas), strict=True):
            total = parameters[0].grad
            for other in parameters[1:]:
                total.add_(other.grad)
                other.grad = None
            total.div_(len(self.replicas))
        for group in self.adam.param_groups:
            group["lr"] = self.args.adam_lr * factor
        self.adam.step()
        self.muon.step(self.args.muon_lr * factor, self.pool)
        self.model.zero_grad(set_to_none=True)
        return sum(losses) / len(losses)

    def save(self, name: str) -> None:
        """A snapshot under the scratch folder and, unless this is a pilot, in the package."""
        save_hf(self.model, self.args.scratch / name, self.args.dropout)
        if not self.args.pilot:
            save_hf(self.model, MODEL, self.args.dropout)


def train(args: argparse.Namespace) -> None:
    """The whole run: train, log every ``args.log_every`` steps, save every ``args.save_minutes``."""
    run = Run(args)
    source = batches(encode_split("train"), args.rows, args.seed)
    held = torch.from_numpy(pack_rows(encode_split("heldout"), CONTEXT + 1))
    held = held[:: max(1, len(held) // MONITOR_ROWS)][:MONITOR_ROWS]
    budget = args.minutes * 60.0
    started, step, losses, saves, last = time.monotonic(), 0, [], 1, (0.0, 0)
    with (args.scratch / "pilot.csv" if args.pilot else args.log).open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(FIELDS)
        while (elapsed := time.monotonic() - started) < budget:
            factor = lr_factor(elapsed / budget, args.warmup, args.decay)
            losses.append(run.step(next(source), factor))
            step += 1
            if step % args.log_every == 0 or elapsed > budget - 2:
                seconds = time.monotonic() - started
                speed = (step - last[1]) * args.rows * CONTEXT / (seconds - last[0])
                ce = monitor(run.model, held)
                row = (step, step * args.rows * CONTEXT, f"{seconds:.1f}", f"{factor:.4f}")
                writer.writerow((*row, f"{np.mean(losses):.4f}", f"{ce:.4f}", f"{speed:.0f}"))
                handle.flush()
                print(*row, f"train {np.mean(losses):.4f} held-out {ce:.4f} {speed:.0f} tokens/s", flush=True)
                losses, last = [], (time.monotonic() - started, step)
                if not math.isfinite(ce):
                    raise RuntimeError("training diverged")
            if elapsed > saves * args.save_minutes * 60:
                saves += 1
                run.save("snapshot")
    run.save("final")


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0, help="wall-clock budget of the training loop")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for snapshots")
    parser.add_argument("--init", type=Path, help="model folder to start from (weights only, no optimiser state)")
    parser.add_argument("--log", type=Path, default=LOG, help="CSV file of the log")
    parser.add_argument("--pilot", action="store_true", help="write nothing outside the scratch folder")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the hidden matrices")
    parser.add_argument("--table-decay", type=float, default=0.01, help="of the two embedding tables")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the budget")
    parser.add_argument("--decay", type=float, default=0.8, help="share of the budget")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
