"""Files of weights are screened before any library opens them: nothing runs, and no file is larger than it looks.

Each function returns if the file is what its kind should be, and raises WeightsError, one line, if not. Sizes are
compared as Python integers, which do not overflow; nothing is allocated that the file does not hold. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

from saezoo import pickles
from saezoo.errors import WeightsError, shown

_HEADER_BYTES = 10_000_000  # of a safetensors file; those of SAEs have 400
_PICKLE_BYTES = 4_000_000  # of a 2024 file: 1,993
_CONFIG_BYTES = 4_000_000  # of a cfg.json: 1,279
_ENTRIES = 1000  # of an archive
_DIRECTORY_BYTES = 1_000_000
_DIMENSIONS = 32
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_NUMBER = rb"(?:0|[1-9]\d{0,18})"
_NUMPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (?:True|False), "
    rb"'shape': \((|N,|N(?:, N)+)\), \} *\n".replace(b"N", _NUMBER)
)


class _Damaged(Exception):
    """What is wrong with a file, without its name."""


def screen_safetensors(path: Path) -> None:
    """The header's length, JSON, dtypes, shapes and offsets fit each other and the file, byte for byte."""
    try:
        with path.open("rb") as file:
            _check_safetensors(file, path.stat().st_size)
    except FileNotFoundError:
        raise WeightsError(f"no file {path}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise WeightsError(f"{path} is corrupt or truncated: {error}; get it again") from None


def _check_safetensors(file: BinaryIO, size: int) -> None:
    start = file.read(8)
    if len(start) < 8:
        raise _Damaged(f"it has {size} bytes")
    length = int.from_bytes(start, "little")
    if length > min(size - 8, _HEADER_BYTES):
        raise _Damaged(f"its header claims {length:,} bytes, in a file of {size:,}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise _Damaged("its header is not JSON, or names a tensor twice") from None
    if not isinstance(header, dict):
        raise _Damaged("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damaged("its metadata is not text")
    places = sorted((*_place(name, tensor), name) for name, tensor in header.items())
    end = 0
    for begin, stop, name in places:
        if begin != end:
            what = "overlaps another" if begin < end else "leaves a gap before it"
            raise _Damaged(f"tensor `{shown(name)}` {what} at byte {begin:,}")
        end = stop
    if end != size - 8 - length:
        raise _Damaged(f"its tensors have {end:,} bytes, the file has {size - 8 - length:,} for them")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _place(name: str, tensor: Any) -> tuple[int, int]:
    """First byte of a tensor, and the one behind its last, as its header says."""
    what = f"tensor `{shown(name)}`"
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise _Damaged(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _Damaged(f"{what} has the dtype {shown(dtype)}; known: {', '.join(_ITEM_BYTES)}")
    if not _whole(shape) or len(shape) > _DIMENSIONS:
        raise _Damaged(f"{what} has the shape {shown(shape)}")
    if not _whole(offsets) or len(offsets) != 2:
        raise _Damaged(f"{what} has the offsets {shown(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _Damaged(f"{what} of shape {shown(shape)} and dtype {dtype} cannot have {end - begin:,} bytes")
    return begin, end


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def screen_torch(path: Path, allowed: Set[str] = frozenset()) -> None:
    """The archive holds what torch.save writes, uncompressed, and a pickle that only describes its tensors.

    `allowed` are full names of classes that the pickle may name besides torch's own; whoever unpickles maps them to
    stand-ins.
    """
    with _screened(path, "a PyTorch file") as archive:
        _check_torch(archive, allowed)


class _RunsCode(Exception):
    """The names that a pickle would import."""


def _check_torch(archive: zipfile.ZipFile, allowed: Set[str]) -> None:
    entries = _entries(archive)
    roots = {name.split("/")[0] for name in entries}
    if len(roots) != 1 or f"{(root := roots.pop())}/data.pkl" not in entries:
        raise _Damaged("it holds no data.pkl in its one folder")
    for name, entry in entries.items():
        inner = name.removeprefix(f"{root}/")
        if not re.fullmatch(r"data\.pkl|byteorder|version|\.\w+|\.data/serialization_id|data/\d{1,9}", inner):
            raise _Damaged(f"it holds {shown(name)}, which torch.save does not write")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _Damaged(f"{shown(name)} is compressed, which torch.save does not do")
    if entries[f"{root}/data.pkl"].file_size > _PICKLE_BYTES:
        raise _Damaged(f"its pickle has more than {_PICKLE_BYTES:,} bytes")
    data = archive.read(f"{root}/data.pkl")
    if names := pickles.unsafe_names(data, allowed):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise _RunsCode(", ".join(shown(name) for name in names[:5]) + more)
    for storage in pickles.check(data, allowed):
        record = entries.get(f"{root}/data/{storage.key}")
        if record is None or record.file_size != storage.numel * pickles.ITEM_BYTES[storage.kind]:
            raise _Damaged(f"its storage {shown(storage.key)} is not there or not as long as its pickle says")


def screen_npz(path: Path) -> None:
    """The archive holds .npy files of plain numbers, as long as their headers say, and does not grow when unpacked."""
    with _screened(path, "a .npz of numbers") as archive:
        entries = _entries(archive)
        total = sum(entry.file_size for entry in entries.values())
        if total > 10 * path.stat().st_size + 2**24:  # weights hardly shrink; zeros do, a thousandfold
            raise _Damaged(f"it would grow to {total:,} bytes when unpacked")
        for name, entry in entries.items():
            with archive.open(entry) as file:
                _check_numpy(shown(name), file, entry.file_size)


def _check_numpy(name: str, file: Any, size: int) -> None:
    """The header of one .npy, as numpy.lib.format writes it for numbers; numpy itself would evaluate it."""
    start = file.read(8)
    if not name.endswith(".npy") or start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise _Damaged(f"{name} is not an array of numpy")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    match = _NUMPY_HEADER.fullmatch(file.read(length)) if length <= _HEADER_BYTES // 1000 else None
    if match is None:
        raise _Damaged(f"{name} has a header that numpy does not write for numbers")
    kind = match[1].decode("latin-1")
    if not re.fullmatch("[<>|=][fiub][1248]", kind):
        raise _Damaged(f"{name} holds `{shown(kind)}`, not numbers; objects would be pickles")
    shape = [int(n) for n in match[2].split(b",") if n.strip()]
    expected = 8 + width + length + math.prod(shape) * int(kind[2:])
    if len(shape) > _DIMENSIONS or expected != size:
        raise _Damaged(f"{name} has {size:,} bytes, its header describes {shown(str(expected))}")
    while file.read(2**20):  # the checksum is compared at the end
        pass


@contextlib.contextmanager
def _screened(path: Path, kind: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`; whatever turns out to be wrong with it becomes a WeightsError."""
    try:
        with _archive(path) as archive:
            yield archive
    except _RunsCode as error:
        raise WeightsError(f"{path} would run code when loaded ({error}); refused, nothing was executed") from None
    except FileNotFoundError:
        raise WeightsError(f"no file {path}") from None
    except (_Damaged, pickles.PickleError) as error:
        raise WeightsError(f"{path} is corrupt or not {kind}: {error}; get it again") from None
    except Exception as error:  # zipfile raises whatever a broken archive makes it raise
        raise WeightsError(f"{path} is corrupt or not {kind}: {shown(str(error))}; get it again") from None


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip archive at `path`, if it begins and ends as one and its directory is of modest size.

    Nothing may stand before the first entry or behind the directory: programs disagree about what such files hold.
    """
    with path.open("rb") as file:
        _check_archive(file, path.stat().st_size)
        with zipfile.ZipFile(file) as archive:
            yield archive


def _check_archive(file: BinaryIO, size: int) -> None:
    start = file.read(4)
    file.seek(max(0, size - 98))  # an old directory's end has 22 bytes, preceded by 76 in archives of zip64
    tail = file.read()
    if start != b"PK\3\4" or tail[-22:-18] != b"PK\5\6":
        raise _Damaged("it is no zip archive that begins and ends as one")
    count, length = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\6\7":
        count, length = struct.unpack("<32xQQ50x", tail) if tail[:4] == b"PK\6\6" else (_ENTRIES + 1, 0)
    if count > _ENTRIES or length > _DIRECTORY_BYTES:
        raise _Damaged(f"its directory claims {count:,} entries in {length:,} bytes")


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name -> entry, if all are ordinary files, apart from each other, with names that stay inside, none twice."""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.orig_filename
        if entry.flag_bits & 1:
            raise _Damaged(f"{shown(name)} is encrypted")
        if stat.S_ISLNK(entry.external_attr >> 16) or entry.is_dir():
            raise _Damaged(f"{shown(name)} is a link or a folder")
        if not re.fullmatch(r"[\w.+ ()-]+(/[\w.+ ()-]+)*", name) or ".." in name.split("/"):
            raise _Damaged(f"the name {shown(name)} leads outside, or is no file name")
        if name in found:
            raise _Damaged(f"{shown(name)} is there twice")
        found[name] = entry
    end = archive.start_dir
    for entry in sorted(found.values(), key=lambda entry: -entry.header_offset):
        if entry.header_offset + 30 + len(entry.orig_filename) + entry.compress_size > end:
            raise _Damaged(f"{shown(entry.orig_filename)} overlaps what comes behind it")
        end = entry.header_offset
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in cfg.json; WeightsError if it is none, or of a size that no configuration has."""
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise WeightsError(f"{path} is no configuration: it has more than {_CONFIG_BYTES:,} bytes")
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(cfg, dict):
        raise WeightsError(f"{path} must hold a JSON object, not {type(cfg).__name__}")
    return cfg
