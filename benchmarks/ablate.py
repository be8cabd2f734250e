"""Cells side by side from one pass of the language model, against the same cells one after the other.

    python benchmarks/ablate.py [--collection tiny-res --layer 3 --cells 6 --tokens 262144] [--device cuda]

Trains CELLS L1 coefficients of one SAE as `ablate` does and then each alone, as `reproduce` does, in one process, and
compares their weights bit for bit. Times are of the training, filling the buffer included, evaluation not. Appends to
results/ablate.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, append, device_name, versions

from saezoo.ablation.study import plan_study
from saezoo.lm import LanguageModel
from saezoo.reproduction import Means, language_model
from saezoo.trainers.train import Job, Variant, train
from saezoo.trainers.trainee import Trainee
from saezoo.workflows import Options


def timed(job: Job, lm: LanguageModel) -> tuple[float, list[Trainee]]:
    """Seconds, and what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        trainees = train(job, lm, Path(folder))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin, trainees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="tiny-res")
    parser.add_argument("--layer", default="3")
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--registry")
    parser.add_argument("--text")
    parser.add_argument("--csv", type=Path, default=RESULTS / "ablate.csv")
    given = parser.parse_args()
    options = Options(device=given.device, text=given.text, registry=given.registry, offline=True)
    l1 = ",".join(f"{4 + i / 10:.1f}e-4" for i in range(given.cells))
    study = plan_study(
        given.collection, given.layer, vary=[f"l1={l1}"], seeds=1, tokens=given.tokens, means=Means(), options=options
    )
    lm = language_model(study.job, Means(), options)
    timed(study.job_of(study.cells[0]), lm)  # tokens are on disk and libraries warm from here on
    variants = tuple(Variant(cell.variant, cell.recipe) for cell in study.cells)
    together, trainees = timed(dataclasses.replace(study.job, recipe=study.cells[0].recipe, variants=variants), lm)
    alone, same = 0.0, True
    for cell, trainee in zip(study.cells, trainees, strict=True):
        seconds, (own,) = timed(study.job_of(cell), lm)
        alone += seconds
        same &= all(torch.equal(mine, theirs) for mine, theirs in zip(trainee.parameters, own.parameters, strict=True))
    print(f"together {together:.1f} s, alone {alone:.1f} s: {alone / together:.2f} times; the same bits: {same}")
    row = {"collection": given.collection, "layer": given.layer, "cells": given.cells, "tokens": given.tokens}
    row |= {"together_s": round(together, 2), "alone_s": round(alone, 2), "ratio": round(alone / together, 3)}
    row |= {"same_bits": same, "device": device_name(given.device)}
    append(given.csv, {**row, **versions("torch", "saezoo")})


if __name__ == "__main__":
    main()
