"""Training on several processes (torchrun), in one of two ways; every collective of the trainer is in this file.

`entries`: each rank trains its share of the SAEs. `features`: each rank holds its share of every SAE's features, and
the reconstructions are added up. In both the language model's work is shared: a rank runs its part of the store calls
and sends the activations to those that need them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saezoo.errors import UsageError

Share = Literal["entries", "features"]
_T = TypeVar("_T")

_GPU_PATIENCE = timedelta(seconds=50)
"""A rank that does not answer on the GPU for so long is taken for dead. Waiting for a checkpoint is done on `_cpu`."""
_CPU_PATIENCE = timedelta(minutes=30)
"""gloo notices a dead rank by its closed connection at once; this is for slow ones."""


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
        what, n = ("SAEs", n_entries) if self.share == "entries" else ("features", d_sae)
        if n % self.size:
            fitting = [size for size in range(1, min(n, 1024) + 1) if n % size == 0]
            near = max((size for size in fitting if size < self.size), default=1)
            other = "features" if self.share == "entries" else "entries"
            raise UsageError(f"{n} {what} do not divide among {self.size} ranks; use {near} ranks, or --share {other}")

    def entries(self, everything: Sequence[_T]) -> Sequence[_T]:
        """Those that this rank trains (under `features`, all of them)."""
        if self.shares_features:
            return everything
        each = len(everything) // self.size
        return everything[self.rank * each : (self.rank + 1) * each]

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
            gathered = x_NLD.new_empty(self.size * len(x_NLD), *x_NLD.shape[1:])
            dist.all_gather_into_tensor(gathered, x_NLD.contiguous())
            return gathered
        parts = torch.stack(x_NLD.chunk(self.size, dim=1))  # one for each rank
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return received.flatten(0, 1)

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is raised on any rank."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._cpu)
        return [bool(flag) for flag in raised]

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


def join(device: str, share: Share) -> tuple[Ranks, str]:
    """This process's ranks as torchrun set them up, and its device; `Ranks()` without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(), device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=_GPU_PATIENCE if backend == "nccl" else _CPU_PATIENCE)
    return Ranks(dist.get_rank(), size, share, dist.new_group(backend="gloo", timeout=_CPU_PATIENCE)), device


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
