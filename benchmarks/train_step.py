"""Seconds of one training step at GPT-2 small's shape: saezoo's ways beside SAELens' own trainer, in one run.

    python benchmarks/train_step.py --peer-python PYTHON_WITH_SAELENS

Same weights, same activations, L0 about 98 (46 on ordinary tokens; 32 rows are as large as BOS
and fire more), loss `standard` (which SAELens shares; it also clips the gradient's norm).
Each way runs in a process of its own, one after the other; the figure is the median step. Appends to
results/train_step.csv.
Without --peer-python only saezoo is timed. --device cuda times the same on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, append, device_name, in_fresh_process, versions

WAYS = ("dense", "full", "half")
PEER_WAYS = ("saelens", "saelens autocast")
ACTIVE = 46 / 24_576
L1 = 5.0
LR = 1e-9  # the weights, and with them L0, stay where they are


def problem(batch: int, d_in: int, d_sae: int) -> dict[str, Any]:
    """Weights and activations: outlying dimensions and rows as a residual stream has; L0 set by the encoder's bias."""
    import torch

    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(batch, d_in, generator=random) * torch.logspace(-0.5, 0.8, d_in)
    x_BD[::128] *= 5
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=random))
    W_enc_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=random))
    sample = (x_BD[1:100] @ W_enc_FD.T).flatten()
    bias = -float(sample.kthvalue(int(len(sample) * (1 - ACTIVE))).values)
    return {"x": x_BD, "W_enc": W_enc_FD.T.contiguous(), "W_dec": W_dec_FD, "b_enc": torch.full((d_sae,), bias)}


def saezoo_step(way: str, loss: str, data: dict[str, Any], device: str) -> Any:
    """One step as `reproduce` takes it; the first finds the density, so the path is settled from the second on."""
    import dataclasses

    import torch

    from saezoo.registry import read_registry
    from saezoo.trainers.trainee import Parameters, Trainee

    changes: dict[str, Any] = {"loss": "standard", "ghost": "off", "l1_coefficient": L1} if loss == "standard" else {}
    recipe = dataclasses.replace(read_registry().recipe("feb2024"), lr=LR, **changes)
    tensors = {name: tensor.to(device) for name, tensor in data.items()}
    b_dec = torch.zeros(tensors["x"].shape[1], device=device)
    parameters = Parameters(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], b_dec)
    trainee = Trainee(parameters, recipe, product=way)  # type: ignore[arg-type]

    def step() -> tuple[float, float]:
        log = trainee.step(tensors["x"])
        return float(log.losses.total), float(log.l0)

    return step


def saelens_step(way: str, data: dict[str, Any], device: str) -> Any:
    """One step of SAELens' own SAETrainer."""
    from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batch, d_in = data["x"].shape
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=d_in, d_sae=len(data["b_enc"]), device=device, l1_coefficient=L1)
    )
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(sae, name).data.copy_(data[name])
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=batch * 10_000,
        device=device,
        autocast=way.endswith("autocast"),
        lr=LR,
        lr_end=LR,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=1000,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))
    x_BD = data["x"].to(device)

    def step() -> tuple[float, float]:
        out = trainer._train_step(sae, x_BD)
        return float(out.loss), float((out.feature_acts > 0).sum() / batch)

    return step


def measure(way: str, loss: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time `args.steps` steps after two unmeasured ones."""
    import torch

    data = problem(args.batch, args.d_in, args.d_sae)
    step = saelens_step(way, data, args.device) if way in PEER_WAYS else saezoo_step(way, loss, data, args.device)
    value, l0 = step()
    step()
    seconds: list[float] = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()  # reads its loss, so a GPU has finished
        seconds.append(time.perf_counter() - start)
    if args.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        peak = torch.cuda.max_memory_allocated() / 2**20
    median = sorted(seconds)[len(seconds) // 2]
    found = {"s_per_step": round(median, 5), "fastest_s": round(min(seconds), 5), "loss": value, "l0": round(l0, 2)}
    return found | {"peak_mib": round(peak)}


def main() -> None:
    """Run every way in a fresh process, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a python that has sae_lens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=[*PEER_WAYS, *WAYS])
    parser.add_argument("--csv", type=Path, default=RESULTS / "train_step.csv")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LOSS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure(args.one[0], args.one[1], args)
        print(json.dumps(found | versions("torch", "triton", "sae-lens")))
        return
    rows = [(way, "standard") for way in args.ways if way in PEER_WAYS and args.peer_python]
    rows += [(way, loss) for loss in ("standard", "feb2024") for way in args.ways if way in WAYS]
    peer: float | None = None
    for way, loss in rows:
        python = args.peer_python if way in PEER_WAYS else sys.executable
        options = ["--device", args.device, "--steps", str(args.steps), "--batch", str(args.batch)]
        options += ["--d-in", str(args.d_in), "--d-sae", str(args.d_sae)]
        found = in_fresh_process(python, __file__, "--one", way, loss, *options)
        peer = found["s_per_step"] if way == "saelens" else peer
        ratio = None if peer is None else round(peer / found["s_per_step"], 2)
        print(
            f"{loss:9} {way:17} {found['s_per_step']:8.4f} s, {ratio} x SAELens, L0 {found['l0']}, loss {found['loss']}"
        )
        sizes = {"device": device_name(args.device), "batch": args.batch, "d_in": args.d_in, "d_sae": args.d_sae}
        append(args.csv, {**sizes, "loss_version": loss, "way": way, "saelens_over_this": ratio, **found})


if __name__ == "__main__":
    main()
