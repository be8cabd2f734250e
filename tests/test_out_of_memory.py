"""A step that runs out of memory, really: in a process that may have only a little more of it.

Run as a script (`python test_out_of_memory.py PRODUCT FEATURES MEGABYTES`) it is that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saezoo
from saezoo.errors import TrainingError
from saezoo.registry import read_registry
from saezoo.trainers.trainee import Trainee, initial_parameters

B, D = 4096, 16


def trainee(product: Any, d_sae: int, notes: list[str]) -> Trainee:
    """Of its pairs 0.4 % are above 0 unless `product` is dense."""
    recipe = replace(read_registry().recipe("feb2024"), ghost="off")
    parameters = initial_parameters(d_sae, torch.zeros(D), torch.Generator().manual_seed(0))
    found = Trainee(parameters, recipe, product=product, note=notes.append)
    if product != "dense":
        found.b_enc_F.fill_(-0.12)
        found.density = 0.01
    return found


def allow(megabytes: int) -> None:
    """No more address space than is in use now and so much on top."""
    import resource  # not on Windows

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))


def off(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def child(product: str, d_sae: int, megabytes: int) -> None:
    """Print the block of a limited step, and how far its gradients are from those without a limit; then its notes."""
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    dead_F = torch.zeros(d_sae, dtype=torch.bool)
    whole = trainee(product, d_sae, []).differentiate(x_BD, dead_F)
    notes: list[str] = []
    limited = trainee(product, d_sae, notes)
    allow(megabytes)
    try:
        found = limited._within_memory(x_BD, dead_F)
    except TrainingError as error:
        sys.exit(str(error))
    mine, theirs = (*found.gradients, found.b_dec_D), (*whole.gradients, whole.b_dec_D)
    print(limited.block, max(map(off, mine, theirs)), *notes, sep="\n")


def limited_step(product: str, d_sae: int, megabytes: int) -> subprocess.CompletedProcess[str]:
    if not Path("/proc/self/statm").is_file():
        pytest.skip("no limit can be set here")
    environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else glibc keeps some of what is given back
    command = [sys.executable, __file__, product, str(d_sae), str(megabytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("product", "megabytes"), [("dense", 60), ("full", 22)])
def test_blocks_become_smaller_and_the_gradients_stay(product: str, megabytes: int) -> None:
    """Of 16,384 features: f alone would take 256 MB."""
    done = limited_step(product, 16_384, megabytes)
    assert done.returncode == 0, done.stderr
    block, difference, *notes = done.stdout.splitlines()
    assert int(block) in [16_384 // 2**n for n in range(1, 7)]
    assert float(difference) < 1e-5
    told = [f"out of memory on cpu; going on with {16_384 // 2**n:,} features at a time" for n in range(1, 7)]
    assert notes == told[: len(notes)]
    assert notes[-1].endswith(f"with {int(block):,} features at a time")


def test_the_end_of_the_rope() -> None:
    done = limited_step("dense", 16_384, 3)
    assert (done.returncode, done.stdout) == (1, "")
    message = "out of memory on cpu, even 256 features at a time; train fewer layers at once"
    assert done.stderr.splitlines() == [message]


if __name__ == "__main__":
    torch.set_num_threads(1)
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
