"""What the ranks of a training send each other per step, and how long a step is: tiny-res on 1, 2 and 4 gloo ranks.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --project     no measurement: the table of docs/scaling.md for GPUs

Bytes are counted twice: those handed to the collectives of trainers/ranks.py, and those that left the rank's sockets
(Linux's TCP_INFO). Appends to results/ranks.csv. Ranks of one machine share its cores, so the seconds say what the
communication costs here, and nothing about how training scales.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, versions

BEFORE, MEASURED = 16, 48
"""Steps. The buffer is refilled every 16, so the measured ones see three refills."""
BUFFER = 8
_SENT = 120  # where struct tcp_info has its bytes_acked, 64 bit


LM_MS, STEP_MS, REST_MS = 1.6, 0.8, 0.05
"""Projection: bounds on an H200 for 4,096 tokens through eleven blocks and for a step of 24,576 features, reasoned and
not measured; and what of a step does not shrink with the features (losses, b_dec, launches), assumed."""


class Enough(Exception):
    """All steps are measured."""


class Meter:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self.begin, self.sent, self.handed = time.perf_counter(), sent_bytes(), dict(HANDED)

    def since(self, steps: int) -> dict[str, float]:
        """Per step: seconds, bytes sent, and bytes handed to each collective."""
        seconds, sent = time.perf_counter() - self.begin, sent_bytes() - self.sent
        handed = {f"{name}_bytes": (HANDED[name] - before) / steps for name, before in self.handed.items()}
        return {"s_per_step": seconds / steps, "sent_bytes": sent / steps, **handed}


HANDED = {"all_reduce": 0, "all_to_all_single": 0, "all_gather": 0}


def count_collectives() -> None:
    """Have the collectives that the trainer calls note the bytes of what this rank gives to them."""
    import torch.distributed as dist

    def counting(name: str, call: Callable[..., Any], position: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            HANDED[name] += args[position].nbytes
            return call(*args, **kwargs)

        return counted

    for name in HANDED:
        setattr(dist, name, counting(name, getattr(dist, name), 0 if name == "all_reduce" else 1))


def sent_bytes() -> int:
    """Through all TCP connections of this process, as far as acknowledged."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as found:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _SENT)[0]
        except OSError:  # no socket, or not TCP
            continue
    return total


def measure(share: Any, ghosts: bool) -> dict[str, Any] | None:
    """This rank's part of a short run; on rank 0, the mean over the ranks. `ghosts`: as if features had died."""
    import torch

    from saezoo.lm import load_language_model
    from saezoo.ranks import join, leave
    from saezoo.registry import read_registry
    from saezoo.tokens import builtin
    from saezoo.trainers.train import Hooks, Job, Progress, train

    torch.set_num_threads(1)
    entries = read_registry().find("tiny-res", "all")
    recipe = replace(entries[0].known_recipe, buffer_batches=BUFFER, dead_after_steps=1 if ghosts else 500)
    job = Job(tuple(entries), recipe, builtin("train"), tokens=recipe.tokens, seed=0)
    lm = load_language_model(Path(str(entries[0].model.folder)))
    ranks, _ = join("cpu", share)
    count_collectives()
    meters: list[Meter] = []

    def on_step(progress: Progress) -> None:
        if progress.done == BEFORE * recipe.batch_size:
            ranks.wait()
            meters.append(Meter())
        elif progress.done == (BEFORE + MEASURED) * recipe.batch_size:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        try:
            train(job, lm, Path(folder), ranks=ranks, hooks=Hooks(on_step))
        except Enough:
            found = meters[0].since(MEASURED)
    ranks.wait()
    begin = time.perf_counter()
    for _ in range(100):
        ranks.largest(0)
    found["question_us"] = (time.perf_counter() - begin) * 1e4
    every = ranks.gather(found)
    leave()
    sizes = {"saes": len(entries), "d_in": entries[0].d_in, "d_sae": entries[0].d_sae, "batch": recipe.batch_size}
    return None if every is None else sizes | {key: sum(one[key] for one in every) / len(every) for key in found}


def exchanged(size: int, share: str, batch: int, saes: int, d_in: int, itemsize: int) -> float:
    """Bytes of activations that a rank sends per step: to each other the part that it trains, or all."""
    mine = itemsize * batch * saes * d_in / size
    return mine * (size - 1) / size if share == "entries" else mine * (size - 1)


def added_up(size: int, share: str, batch: int, saes: int, d_in: int, ghosts: bool) -> float:
    """Bytes that a rank sends per step in a ring that adds up the reconstructions, and b_dec's gradient."""
    numbers = batch * d_in * (2 if ghosts else 1) + 3 + d_in
    return 0 if share == "entries" else saes * 4 * numbers * 2 * (size - 1) / size


def projected(size: int, saes: int, share: str, d_sae: int, gb_s: float, latency_ms: float, ghosts: bool) -> float:
    """Milliseconds per step of 4,096 tokens on so many GPUs; nothing overlaps."""
    sent = exchanged(size, share, 4096, saes, 768, 2) + added_up(size, share, 4096, saes, 768, ghosts)
    step = STEP_MS * d_sae / 24_576 / size
    if share == "features":
        step += REST_MS + 2 * latency_ms
    return LM_MS / size + saes * step + sent / gb_s / 1e6


def project() -> None:
    """Print the table."""
    near, far = (300.0, 0.02), (50.0, 0.06)  # GB/s that a rank sends, and milliseconds that a collective takes at least
    for size, saes, share, d_sae, link in (
        (4, 12, "entries", 24_576, near),
        (6, 12, "entries", 24_576, near),
        (12, 12, "entries", 24_576, far),
        (8, 1, "features", 24_576, near),
        (8, 12, "features", 24_576, near),
        (64, 12, "features", 24_576, far),
        (8, 1, "features", 1_048_576, near),
        (64, 1, "features", 1_048_576, far),
    ):
        alone = LM_MS + saes * STEP_MS * d_sae / 24_576
        cells = []
        for ghosts in (False, True) if share == "features" else (False,):
            ms = projected(size, saes, share, d_sae, *link, ghosts)
            cells.append(f"{ms:.2f} ms, {alone / ms:.1f} x")
        print(f"| {size} | {saes} x {d_sae:,} | {share} | {link[0]:.0f} GB/s | {alone:.1f} ms | {'; '.join(cells)} |")


def main() -> None:
    """Every number of ranks, both ways of sharing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "ranks.csv")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--project", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SHARE", "GHOSTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.project:
        project()
        return
    if args.one:
        found = measure(args.one[0], args.one[1] == "True")
        if found is not None:
            print(json.dumps(found))
        return
    ways = [("entries", False), ("features", False), ("features", True)]
    for size, share, ghosts in [(n, *way) for n in args.ranks for way in (ways if n > 1 else ways[:1])]:
        row = measured(size, share, ghosts)
        print(f"{size} {share:8} ghosts {ghosts!s:5} {row['s_per_step']:.4f} s, sent {row['sent_bytes']:,.0f} bytes")
        append(args.csv, row)


def measured(size: int, share: str, ghosts: bool) -> dict[str, Any]:
    """A row of ranks.csv."""
    found = under_torchrun(size, share, str(ghosts))
    batch, saes, d_in = (int(found[key]) for key in ("batch", "saes", "d_in"))
    sent = exchanged(size, share, batch, saes, d_in, 4) + added_up(size, share, batch, saes, d_in, ghosts)
    row = {"cores": os.cpu_count(), "ranks": size, "share": share, "ghosts": ghosts, "steps": MEASURED}
    row |= {key: round(value, 4) for key, value in found.items()}
    return row | {"formula_bytes": round(sent), **versions("torch")}


def under_torchrun(size: int, *arguments: str) -> dict[str, Any]:
    """The object that rank 0 of so many prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command += [__file__, "--one", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
