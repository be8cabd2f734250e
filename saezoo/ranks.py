"""Several processes started by torchrun; every collective is in this file.

An evaluation divides the rows. A training is divided in one of two ways. `entries`: each rank trains its share of the
SAEs. `features`: each rank holds its share of every SAE's features, and the reconstructions are added up. In both the
language model's work is shared: a rank runs its part of the store calls and sends the activations to those that need
them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from saezoo.errors import TrainingError, UsageError

Share = Literal["entries", "features"]
_T = TypeVar("_T")

_GPU_PATIENCE = timedelta(seconds=50)
"""A rank that does not answer on the GPU for so long is taken for dead. Waiting for a checkpoint is done on `_cpu`."""
_CPU_PATIENCE = timedelta(minutes=30)
"""gloo notices a dead rank by its closed connection at once; this is for slow ones."""
_ASK_EVERY = 0.25
"""Seconds between two questions to all ranks: each goes round through all, which with many takes longer than a step."""
_MOST_STEPS = 256
"""Between two questions, should the steps become much slower."""
_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together; `Ranks()` is alone."""

    rank: int = 0
    size: int = 1
    share: Share = "entries"
    _cpu: Any = None
    """Group for what is on the CPU whatever the device: checkpoints and agreements."""

    @property
    def shares_features(self) -> bool:
        return self.size > 1 and self.share == "features"

    def check(self, n_entries: int, d_sae: int) -> None:
        """Raise UsageError unless the work divides evenly."""
        counts = {"entries": n_entries, "features": d_sae}
        what, n = "SAEs" if self.share == "entries" else "features", counts.pop(self.share)
        what = what[:-1] if n == 1 else what
        if n % self.size:
            near = max(size for size in range(1, self.size) if n % size == 0)
            ways = [f"use {near} of them" if near > 1 else "use one process"]
            ways += [f"--share {other}" for other, count in counts.items() if count % self.size == 0]
            raise UsageError(f"{n} {what} cannot be divided among {self.size} ranks; {', or '.join(ways)}")

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise TrainingError, on every rank, unless all have been given the same."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, {**facts, "--share": self.share}, group=self._cpu)
        for rank, theirs in enumerate(found):
            for key, value in found[0].items():
                if theirs.get(key) != value:
                    raise TrainingError(
                        f"rank {rank} has {key} {theirs.get(key)}, rank 0 has {value};"
                        " start all with one command, and on several machines with one shared run folder"
                    )

    def entries(self, everything: Sequence[_T]) -> Sequence[_T]:
        """Those that this rank trains (under `features`, all of them)."""
        if self.shares_features:
            return everything
        each = len(everything) // self.size
        return everything[self.rank * each : (self.rank + 1) * each]

    def part(self, n: int) -> slice:
        """This rank's share of n things in a row, as even as can be; those of rank 0 come first."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def features(self, d_sae: int) -> slice:
        """Those of each SAE that this rank holds."""
        if not self.shares_features:
            return slice(0, d_sae)
        each = d_sae // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that share features, in place."""
        if self.shares_features:
            dist.all_reduce(tensor)
        return tensor

    def exchange(self, x_NLD: Tensor) -> Tensor:
        """From this rank's activations of all layers, everybody's of the layers that it trains, in rank order."""
        if self.size == 1:
            return x_NLD
        if self.share == "features":
            gathered = x_NLD.new_empty(self.size, *x_NLD.shape)
            dist.all_gather(list(gathered), x_NLD.contiguous())
            return gathered.flatten(0, 1)
        parts = torch.stack(x_NLD.chunk(self.size, dim=1))  # one for each rank
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return received.flatten(0, 1)

    def largest(self, *numbers: int) -> list[int]:
        """Each number: the largest of any rank's."""
        found = torch.tensor(numbers, dtype=torch.int32)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._cpu)
        return [int(number) for number in found]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self._cpu)

    def gather(self, value: _T) -> list[_T] | None:
        """On rank 0, every rank's value in order; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._cpu)
        return values

    def collect(self, tensors: dict[str, Tensor], facts: Any) -> list[tuple[dict[str, Tensor], Any]] | None:
        """On rank 0, every rank's tensors and facts in order; None elsewhere."""
        if self.size == 1:
            return [(tensors, facts)]
        listed = self.gather(({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, facts))
        if listed is None:
            for tensor in filter(Tensor.numel, tensors.values()):
                dist.send(_bytes(tensor.cpu()), 0, group=self._cpu)
            return None
        found = [(tensors, facts)]
        for rank, (theirs, their_facts) in list(enumerate(listed))[1:]:
            received = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in theirs.items()}
            for tensor in filter(Tensor.numel, received.values()):
                dist.recv(_bytes(tensor), rank, group=self._cpu)
            found.append((received, their_facts))
        return found


def _bytes(tensor: Tensor) -> Tensor:
    """Its memory as bytes: gloo sends only some dtypes."""
    return tensor.contiguous().flatten().view(torch.uint8)


class Question:
    """Asks all ranks whether any of them has raised a flag: some four times a second, or at each step of slow ones."""

    def __init__(self, ranks: Ranks, every: float = _ASK_EVERY) -> None:
        self._ranks, self._every = ranks, every
        self._steps = self._left = 1
        self._then = time.monotonic()

    def __call__(self, *flags: bool) -> list[bool]:
        """For each flag: whether it is raised anywhere. Called by every rank at every step; while nobody is asked all
        seem to be down, so a flag has to stay up."""
        if self._ranks.size == 1:
            return list(flags)
        self._left -= 1
        if self._left:
            return [False] * len(flags)
        *raised, self._left = self._ranks.largest(*flags, self._until_next())
        self._steps, self._then = self._left, time.monotonic()
        return [bool(flag) for flag in raised]

    def _until_next(self) -> int:
        """Steps, counted by rank 0 alone: all have to ask at the same one."""
        if self._ranks.rank > 0:
            return 0
        pace = (time.monotonic() - self._then) / self._steps
        return max(1, min(int(self._every / pace), 2 * self._steps, _MOST_STEPS))


def join(device: str, share: Share) -> tuple[Ranks, str]:
    """This process's ranks as torchrun set them up, and its device; `Ranks()` without torchrun.

    Raises UsageError for what torchrun was not told rightly, TrainingError if the others do not appear.
    """
    size = started_together()
    if size == 1:
        return Ranks(), device
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {missing[0]} is not set; start the ranks with torchrun")
    if device != "cpu":
        device = _own_gpu(device, int(os.environ["LOCAL_RANK"]))
    backend, patience = ("gloo", _CPU_PATIENCE) if device == "cpu" else ("nccl", _GPU_PATIENCE)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps this store when it starts the ranks again, and in it the addresses of the dead ones.
            store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        cpu = None if device == "cpu" else dist.new_group(backend="gloo", timeout=_CPU_PATIENCE)
    except (RuntimeError, ValueError) as error:
        leave()
        raise TrainingError(f"the {size} ranks do not come together ({first_line(error)}); start all of them") from None
    return Ranks(rank, size, share, cpu), device


def _own_gpu(device: str, local_rank: int) -> str:
    """The GPU of this rank among those of its machine."""
    if device != "cuda":
        raise UsageError(f"several ranks cannot all train on {device}; use --device cuda, or cpu")
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise UsageError(f"rank {local_rank} of this machine has no GPU, it has {found}; lower --nproc-per-node")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def started_together() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def may_be_restarted() -> bool:
    """Whether torchrun was told to start everything again after a failure: its --max-restarts."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


def first_line(error: Exception) -> str:
    """What went wrong, without where in the library."""
    sentence = str(error).strip().split("\n")[0].split(". ")[0]
    return sentence[sentence.find("] ") + 2 :] if sentence.startswith("[") else sentence
