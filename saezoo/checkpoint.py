"""Checkpoints of a run: one file each, whole or not there; which one to go on from, and when to write the next.

A checkpoint is a safetensors file. Its metadata `saezoo` is JSON; its last tensor is the CRC-32 of every byte before
it, header included, in this and all later formats: what passes that check can be trusted to say which format it is.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saezoo import files
from saezoo.errors import SaezooError, TrainingError

FORMAT = 1
KEPT = 2
"""Checkpoints that stay: the newest, and the one to fall back on if that is damaged."""

_NAME = re.compile(r"checkpoint-(\d{15,})\.safetensors")
_ABOUT, _CHECKSUM = "saezoo", "crc32"
_PIECE = 1 << 22  # elements written at a time: a non-CPU tensor costs that much memory here, not all of its size
_READ = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Cost(NamedTuple):
    """What saving one checkpoint cost."""

    bytes: int
    seconds: float


class Checkpoint(NamedTuple):
    """What a run goes on from."""

    done: int
    """Tokens done."""
    tensors: dict[str, Tensor]
    """As they were saved, on the CPU and in memory of their own."""
    facts: dict[str, Any]
    """JSON values as they were saved (a tuple has become a list)."""


def save(
    folder: Path, done: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], identity: Mapping[str, Any]
) -> Cost:
    """Write `folder`/checkpoint-<done, 15 digits>.safetensors and keep, of those up to `done`, the newest `KEPT`.

    Tensors may have any shape, strides, device and real dtype, and may share memory; `facts` and `identity` hold JSON
    values. When this returns the checkpoint is on the disk, also through a power cut. Those of more than `done` tokens
    are of a run given up, and go. Raises SaezooError, with every earlier checkpoint as it was: disk full, folder not
    writable.
    """
    start = time.monotonic()
    path = folder / f"checkpoint-{done:015d}.safetensors"
    about = {"format": FORMAT, "done": done, "identity": dict(identity), "facts": dict(facts)}
    try:
        _delete(folder.glob(".checkpoint*"))  # of runs killed while saving; now, for this one may need the space
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            size = crc = 0
            for piece in _pieces(tensors, about):
                size += file.write(piece)
                crc = zlib.crc32(piece, crc)
            size += file.write(crc.to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())
        _sync(folder)
        kept = [number for number in _found(folder) if number <= done][:KEPT]
        _delete(older for number, older in _found(folder).items() if number not in kept)
    except OSError as error:
        raise files.cannot_write(path, error) from None
    return Cost(size, time.monotonic() - start)


def load(folder: Path, identity: Mapping[str, Any], note: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """The newest checkpoint in `folder` that is whole; `note` gets a line for each newer one that is damaged.

    Raises TrainingError: none there, none whole, one of another run (its `identity` differs) or of a later format.
    """
    damaged: list[str] = []
    for path in _found(folder).values():
        try:
            checkpoint, theirs = _read(path)
        except _Damaged as error:
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        for what in damaged:
            note(f"{what}; using the one before it, {path.name}")
        _refuse_other_run(path, json.loads(json.dumps(dict(identity))), theirs)  # tuples are lists in the file
        return checkpoint
    if damaged:
        raise TrainingError(f"nothing to resume in {folder}: {'; '.join(damaged)}; leave --resume out to start again")
    if (folder / "checkpoint.pt").is_file():
        raise TrainingError(
            f"{folder / 'checkpoint.pt'} was written by an older saezoo, which alone can resume it; "
            "leave --resume out to start again"
        )
    raise TrainingError(f"nothing to resume: no checkpoint in {folder}; leave --resume out to start")


def newest(folder: Path) -> int:
    """Tokens done at the newest checkpoint in `folder`; 0 if there is none."""
    return max(_found(folder), default=0)


def remove(folder: Path) -> None:
    """Delete every checkpoint in `folder`, if there are any. Raises SaezooError if that is not allowed."""
    try:
        _delete([*_found(folder).values(), *folder.glob(".checkpoint*")])
    except OSError as error:
        raise SaezooError(f"cannot delete the checkpoints in {folder}: {error.strerror or error}") from None


class Schedule:
    """When to save: so that saving takes at most a given share of the run, whatever one checkpoint costs.

    The share can be exceeded by the latest save alone, which the time until the next one makes good.
    """

    SHORTEST = 30.0
    """Seconds between two saves at least, and before the first."""

    def __init__(
        self, share: float = 0.02, clock: Callable[[], float] = time.monotonic, shortest: float = SHORTEST
    ) -> None:
        """`share` of the time may go into saving; `clock` gives seconds and never goes back."""
        self._allowed, self._clock, self._shortest = share, clock, shortest
        self._start = self._last = clock()
        self._wait = shortest
        self._spent = 0.0

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() - self._last >= self._wait

    def saved(self, seconds: float) -> None:
        """A checkpoint has just been saved, and took `seconds`."""
        self._last = self._clock()
        self._wait = max(self._shortest, seconds / self._allowed)
        self._spent += seconds

    def share(self) -> float:
        """Fraction of the time so far that went into saving."""
        elapsed = self._clock() - self._start
        return self._spent / elapsed if elapsed > 0 else 0.0


class _Damaged(Exception):
    """Why a file cannot be used; another one may be."""


def _pieces(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of the file but for the checksum, a part at a time.

    safetensors' own writer has all tensors on the CPU at once, refuses shared memory, and cannot be fsynced.
    """
    reserved = {"__metadata__", _CHECKSUM} & tensors.keys()
    if reserved:
        raise ValueError(f"no tensor may be called {reserved.pop()}")
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {_ABOUT: json.dumps(about)}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header[_CHECKSUM] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        for piece in torch.split(tensor.detach().reshape(-1), _PIECE):
            yield piece.cpu().view(torch.uint8).numpy().data


def _read(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its identity. Raises _Damaged, or TrainingError if it is of another format."""
    try:
        _check_crc(path)
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
            if about["format"] != FORMAT:
                raise TrainingError(
                    f"{path} has checkpoint format {about['format']}, and this saezoo reads {FORMAT}; "
                    "resume with a newer saezoo"
                )
            # Copies: a mapping would hold the space of a deleted file, and crash if the file is cut short later.
            names = [name for name in file.keys() if name != _CHECKSUM]  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name).clone() for name in names}
        return Checkpoint(about["done"], tensors, about["facts"]), about["identity"]
    except OSError as error:
        raise _Damaged(error.strerror or str(error)) from None
    except (SafetensorError, ValueError, KeyError, TypeError):  # nothing that `save` wrote
        raise _Damaged("it is no checkpoint") from None


def _check_crc(path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        crc, left = 0, size - 4
        while left > 0 and (piece := file.read(min(left, _READ))):
            crc, left = zlib.crc32(piece, crc), left - len(piece)
        if size < 4 or int.from_bytes(file.read(4), "little") != crc:
            raise _Damaged(f"its {size:,} bytes do not fit its checksum")


def _refuse_other_run(path: Path, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [key for key in {**mine, **theirs} if key not in mine or key not in theirs or mine[key] != theirs[key]]
    if differing:
        listed = "; ".join(
            f"{key}: {theirs.get(key, 'nothing')} in the checkpoint, {mine.get(key, 'nothing')} now"
            for key in differing
        )
        raise TrainingError(f"{path} belongs to another run ({listed}); use its settings, or another --out")


def _found(folder: Path) -> dict[int, Path]:
    """Tokens done -> file, the newest first."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*.safetensors")]
    found = {int(match[1]): path for match, path in matches if match and path.is_file()}
    return dict(sorted(found.items(), reverse=True))


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """See that the names in `folder` are on the disk too."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
