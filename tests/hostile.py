"""Files that somebody might publish to run code, to fill the memory or to write elsewhere: built here, byte by byte.

A payload would create the file PWNED in the working folder, or import the module `hostile_payload`, which does.
"""

from __future__ import annotations

import io
import json
import lzma
import pickle
import stat
import struct
import tarfile
import zipfile
from typing import Any, NamedTuple

import numpy as np


class Hostile(NamedTuple):
    """One file and how it is refused."""

    name: str
    """What the file is called; its ending says who reads it."""
    content: bytes
    message: str
    """Part of the refusal."""


CONFIG_CLASS = b"csae_training.config\nLanguageModelSAERunnerConfig\n"
_ORDERED = b"ccollections\nOrderedDict\n"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_SHAPES = {"W_enc": (3, 4), "b_enc": (4,), "W_dec": (4, 3), "b_dec": (3,)}


def text(word: str) -> bytes:
    """The instruction that puts text on the stack."""
    raw = word.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(n: int) -> bytes:
    """The instruction that puts a whole number on the stack."""
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(*ns: int) -> bytes:
    """A tuple of whole numbers."""
    return b"(" + b"".join(number(n) for n in ns) + b"t"


def tensor(key: str, shape: tuple[int, ...], *, numel: int, stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor that views the storage `key`."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    return _TENSOR + b"(" + storage + number(offset) + numbers(*shape) + numbers(*stride) + b"\x89" + _ORDERED + b")RtR"


def legacy(attributes: bytes = b"}", **changed: bytes) -> bytes:
    """The pickle of 2024, small: the configuration's attributes, and tensors of which some are `changed`."""
    state = b""
    for key, (name, shape) in enumerate(_SHAPES.items()):
        size = int(np.prod(shape))
        good = tensor(str(key), shape, numel=size, stride=(4, 1)[-len(shape) :] if name != "W_dec" else (3, 1))
        state += text(name) + changed.get(name, good)
    cfg = text("cfg") + CONFIG_CLASS + b")\x81" + attributes + b"b"
    return b"\x80\x02}(" + cfg + text("state_dict") + _ORDERED + b")R(" + state + b"uu."


def archive(data: bytes, *more: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    """A .pt with this pickle, the four storages and `more` entries."""
    entries = [(zipfile.ZipInfo("sae/data.pkl"), data), (zipfile.ZipInfo("sae/version"), b"3\n")]
    for key, shape in enumerate(_SHAPES.values()):
        entries.append((zipfile.ZipInfo(f"sae/data/{key}"), bytes(4 * int(np.prod(shape)))))
    return packed(*entries, *more)


def packed(*entries: tuple[zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for info, data in entries:
            file.writestr(info, data, compress_type=method)
    return content.getvalue()


def named(name: str) -> zipfile.ZipInfo:
    """An entry that is called `name`, also where zipfile would correct it."""
    info = zipfile.ZipInfo("x")
    info.filename = name
    return info


def link(name: str) -> zipfile.ZipInfo:
    """An entry that would unpack as a symbolic link."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def _run(imported: bytes, arguments: bytes) -> bytes:
    """A pickle that imports a function and calls it with one argument."""
    return b"\x80\x02" + imported + arguments + b"\x85R."


def _short(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


_TOUCH = text("touch PWNED")
_CODE = text("open('PWNED','w')")
_DEEP = b"K\x01\x85" + b"q\x01h\x01\x86" * 60  # pairs of pairs of …, 2^60 numbers in 240 bytes
_CALLS = {
    "os.system": _run(b"cposix\nsystem\n", _TOUCH),
    "exec": _run(b"cbuiltins\nexec\n", _CODE),
    "eval": _run(b"cbuiltins\neval\n", _CODE),
    "exec of Python 2": _run(b"c__builtin__\nexec\n", _CODE),
    "getattr": _run(b"cbuiltins\ngetattr\n", text("x")),
    "subprocess": _run(b"csubprocess\nPopen\n", _TOUCH),
    "an import alone": b"\x80\x02chostile_payload\nx\n.",
    "__import__": _run(b"cbuiltins\n__import__\n", text("hostile_payload")),
    "importlib": _run(b"cimportlib\nimport_module\n", text("hostile_payload")),
    "runpy": _run(b"crunpy\nrun_path\n", text("hostile_payload.py")),
    "open": b"\x80\x02cio\nopen\n" + text("PWNED") + text("w") + b"\x86R.",
    "through torch's own modules": _run(b"ctorch\nserialization.os.system\n", _TOUCH),
    "torch.hub": _run(b"ctorch.hub\nload\n", text(".")),
    "torch.load": _run(b"ctorch\nload\n", text("sae.pt")),
    "numpy": _run(b"cnumpy.core.multiarray\n_reconstruct\n", text("x")),
    "webbrowser": _run(b"cwebbrowser\nopen\n", text("http://127.0.0.1/")),
    "INST": b"\x80\x02(" + _TOUCH + b"iposix\nsystem\n.",
    "OBJ": b"\x80\x02(cposix\nsystem\n" + _TOUCH + b"o.",
    "STACK_GLOBAL": b"\x80\x04" + _short("posix") + _short("system") + b"\x93" + _TOUCH + b"\x85R.",
    "STACK_GLOBAL from the memo": (
        b"\x80\x04" + _short("posix") + b"\x94" + _short("system") + b"\x94" + b"00h\x00h\x01\x93" + _TOUCH + b"\x85R."
    ),
    "NEWOBJ of a class": b"\x80\x02csubprocess\nPopen\n" + _TOUCH + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + b"csubprocess\nPopen\n" + _TOUCH + b"\x85}\x92.",
    "BUILD of a class": b"\x80\x02cbuiltins\nobject\n)\x81}b.",
    "an extension code": b"\x80\x02\x82\x01.",
    "behind the configuration": legacy(b"}" + text("seed") + b"cposix\nsystem\n" + _TOUCH + b"\x85Rs"),
    "in the place of a tensor": legacy(b_dec=b"cposix\nsystem\n" + _TOUCH + b"\x85R"),
    "before the pickle breaks": b"\x80\x02cposix\nsystem\n" + _TOUCH + b"\x85R\xff",
    "bytearray of a terabyte": _run(b"cbuiltins\nbytearray\n", number(10**12)),
    "a name for the terminal": _run(b"c\x1b]0;x\x07\nsystem\n", _TOUCH),
    "six names": b"\x80\x02" + b"".join(b"cos\nf%d\n0" % i for i in range(6)) + b"N.",
}
"""Pickles that import what no file of weights needs."""
_ODD = {
    "a storage called directly": (_run(b"ctorch\nFloatStorage\n", number(10**12)), "calls torch.FloatStorage"),
    "another protocol": (b"\x80\x05N.", "is of protocol 5"),
    "a buffer from elsewhere": (b"\x80\x02\x97.", "the instruction NEXT_BUFFER"),
    "a persistent id of text": (b"\x80\x02Ptext\n.", "the instruction PERSID"),
    "a persistent id of no storage": (b"\x80\x02" + text("module") + text("x") + b"\x86Q.", "that is no storage"),
    "a dictionary made of a list": (b"\x80\x02" + _ORDERED + b"]\x85R.", "calls collections.OrderedDict"),
    "a device that is a list": (b"\x80\x02ctorch\ndevice\n]\x85R.", "calls torch.device"),
    "attributes of a tensor": (
        legacy(b_dec=tensor("3", (3,), numel=3, stride=(1,)) + b"N\x85b"),
        "sets attributes of what has none",
    ),
    "slots of the configuration": (legacy(b"N}" + text("__class__") + b"Ns\x86"), "sets attributes from what is no"),
    "an object of a function": (b"\x80\x02" + _TENSOR + b")\x81.", "makes an object of a class"),
    "keys whose hash takes for ever": (legacy(b"}" + _DEEP + b"Ns"), "uses keys that are neither"),
    "a million instructions": (b"\x80\x02" + b"N" * 1_000_000 + b".", "more than 200,000 instructions"),
    "an empty stack": (b"\x80\x02R.", "REDUCE finds nothing"),
    "no end": (b"\x80\x02N", "its pickle is broken"),
    "a tensor of a trillion": (
        legacy(b_dec=tensor("3", (10**12,), numel=3, stride=(0,))),
        "a tensor of 1000000000000 elements in a storage of 3",
    ),
    "a tensor behind its storage": (
        legacy(b_dec=tensor("3", (3,), numel=3, stride=(1,), offset=1)),
        "ends outside its storage",
    ),
    "strides that overflow": (legacy(b_dec=tensor("3", (3,), numel=3, stride=(2**62,))), "ends outside its storage"),
    "negative strides": (legacy(b_dec=tensor("3", (3,), numel=3, stride=(-1,))), "by other than whole numbers"),
    "a storage longer than its record": (
        legacy(b_dec=tensor("3", (3,), numel=10**12, stride=(1,))),
        "its storage 3 is not there or not as long",
    ),
    "a storage outside": (
        legacy(b_dec=tensor("../../x", (3,), numel=3, stride=(1,))),
        "its storage ../../x is not there",
    ),
    "a number of many parts": (
        legacy(b"}" + text("context_size") + _DEEP + b"s"),
        "it must be of type int",
    ),
}
"""Pickles that import nothing bad, and are refused all the same."""


def _overlapping() -> bytes:
    """Two directory entries for the same bytes."""
    content = archive(
        legacy(), (zipfile.ZipInfo("sae/data/4"), bytes(5000)), (zipfile.ZipInfo("sae/data/5"), bytes(5000))
    )
    first, second = (content.rindex(b"sae/data/%d" % i) for i in (4, 5))
    return content[: second - 4] + content[first - 4 : first] + content[second:]


def _directory(content: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """Change the field at `offset` of the directory entry called `name`."""
    begin = content.rindex(name) - 46 + offset
    return content[:begin] + value + content[begin + len(value) :]


def _many_entries() -> bytes:
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1)
    return b"PK\3\4" + end + locator + b"PK\5\6" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        info = tarfile.TarInfo("../PWNED")
        file.addfile(info)
    return content.getvalue()


_GOOD = archive(legacy())
_ARCHIVES = {
    "a name that climbs": (archive(legacy(), (named("sae/../../PWNED"), b"x")), "leads outside"),
    "an absolute name": (archive(legacy(), (named("/tmp/PWNED"), b"x")), "leads outside"),
    "a drive": (archive(legacy(), (named("C:\\PWNED"), b"x")), "leads outside"),
    "a link": (archive(legacy(), (link("sae/data/9"), b"/etc/passwd")), "is a link or a folder"),
    "an archive inside": (archive(legacy(), (named("sae/inner.pt"), _GOOD)), "which torch.save does not write"),
    "TorchScript": (archive(legacy(), (named("sae/code/__torch__.py"), b"x")), "which torch.save does not write"),
    "a second pickle": (archive(legacy(), (named("sae/constants.pkl"), b"x")), "which torch.save does not write"),
    "two folders": (archive(legacy(), (named("other/data.pkl"), _CALLS["exec"])), "no data.pkl in its one folder"),
    "a name twice": (
        archive(legacy(), (named("sae/same.pkl"), _CALLS["exec"])).replace(b"sae/same.pkl", b"sae/data.pkl"),
        "is there twice",
    ),
    "a bomb": (
        packed((named("sae/data.pkl"), legacy()), (named("sae/data/0"), bytes(10**7)), method=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "entries that overlap": (_overlapping(), "overlaps what comes behind it"),
    "a quintillion entries": (_many_entries(), "its directory claims 1,152,921,504,606,846,976 entries"),
    "something in front": (b"#!/bin/sh\ntouch PWNED\n" + _GOOD, "begins and ends as one"),
    "something behind": (_GOOD + b"PK\5\6 and more", "begins and ends as one"),
    "an encrypted entry": (_directory(_GOOD, b"sae/data/0", 8, b"\1\0"), "is encrypted"),
    "a size that lies": (_directory(_GOOD, b"sae/data/0", 24, b"\xff\xff\xff\x7f"), "is compressed"),
    "a huge pickle": (archive(b"\x80\x02" + text("x" * 4_000_001) + b"."), "its pickle has more than"),
    "a bare pickle": (_CALLS["exec"], "begins and ends as one"),
    "a tar": (_tar(), "begins and ends as one"),
    "an empty archive": (packed(), "begins and ends as one"),
}


def _safetensors(header: Any, size: int = 0, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size)


def _one(shape: Any = (3,), offsets: Any = (0, 12), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_SAFETENSORS = {
    "a header of 2^63 bytes": (_safetensors(b"{}", length=2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "a header of 2^64 - 1 bytes": (_safetensors(b"{}", length=2**64 - 1), "its header claims"),
    "a header longer than the file": (_safetensors(b"{}", length=100), "its header claims 100 bytes"),
    "a header of 11 MB": (_safetensors(b" " * 11_000_000), "its header claims 11,000,000 bytes"),
    "a header of brackets": (_safetensors(b"[" * 100_000), "its header is not JSON"),
    "a header of no text": (_safetensors(b"\xff\xfe"), "its header is not JSON"),
    "a header that is a list": (_safetensors([]), "is not a JSON object"),
    "a number of 10,000 digits": (_safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "its header is not JSON"),
    "a tensor named twice": (_safetensors(b'{"a":1,"a":2}'), "names a tensor twice"),
    "tensors that overlap": (_safetensors({"a": _one(), "b": _one()}, 12), "tensor `b` overlaps another"),
    "a gap": (_safetensors({"a": _one(offsets=(4, 16))}, 16), "tensor `a` leaves a gap"),
    "bytes that belong to none": (_safetensors({"a": _one()}, 16), "its tensors have 12 bytes, the file has 16"),
    "a tensor behind the end": (_safetensors({"a": _one()}, 8), "its tensors have 12 bytes, the file has 8"),
    "a shape that overflows to 0": (_safetensors({"a": _one([2**32, 2**32], (0, 0))}), "cannot have 0 bytes"),
    "a shape beyond 64 bits": (_safetensors({"a": _one([2**63, 2])}, 12), "has the shape"),
    "a negative shape": (_safetensors({"a": _one([-3, -1])}, 12), "has the shape [-3, -1]"),
    "a shape of true": (_safetensors({"a": _one([True, 3])}, 12), "has the shape"),
    "ten thousand dimensions": (_safetensors({"a": _one([2**62] * 10_000)}, 12), "has the shape"),
    "offsets that run backwards": (_safetensors({"a": _one(offsets=(12, 0))}, 12), "cannot have -12 bytes"),
    "offsets beyond 64 bits": (_safetensors({"a": _one(offsets=(2**64, 2**64 + 12))}, 12), "has the offsets"),
    "a dtype that there is not": (_safetensors({"a": _one(dtype="object")}, 12), "has the dtype object"),
    "a tensor that is text": (_safetensors({"a": "exec"}), "is not described by"),
    "an unknown key": (_safetensors({"a": {**_one(), "code": "x"}}, 12), "is not described by"),
    "metadata of lists": (_safetensors({"__metadata__": {"a": []}}), "its metadata is not text"),
    "a name for the terminal": (_safetensors({"\x1b[2J": "x"}), "tensor `[2J` is not described"),
}


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def _numpy(header: str, size: int = 0) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(size)


class Payload:
    """Would import the module that creates PWNED."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("hostile_payload",)


def _described(descr: str = "<f4", shape: str = "(3,)") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"


_NPZ = {
    "an array of objects": (("W.npy", _npy(np.array([Payload()], dtype=object))), "holds `|O`, not numbers"),
    "objects in a structure": (
        ("W.npy", _numpy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (), }\n")),
        "a header",
    ),
    "a header that is code": (
        ("W.npy", _numpy("__import__('hostile_payload')\n")),
        "a header that numpy does not write",
    ),
    "a shape that is code": (("W.npy", _numpy(_described(shape="__import__('hostile_payload').x"))), "a header"),
    "a header of brackets": (("W.npy", _numpy("(" * 9999)), "a header that numpy does not write"),
    "a header that claims too much": (
        ("W.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff"),
        "a header that numpy does not write",
    ),
    "a shape that overflows": (
        ("W.npy", _numpy(_described(shape="(4294967296, 4294967296)"), 12)),
        "its header describes",
    ),
    "a shape with leading zeros": (("W.npy", _numpy(_described(shape="(03,)"), 12)), "a header that numpy does not"),
    "a shape that is no tuple": (("W.npy", _numpy(_described(shape="(3)"), 12)), "a header that numpy does not"),
    "a shape that lies": (("W.npy", _numpy(_described(shape="(1000000, 1000000)"), 12)), "its header describes"),
    "text": (("W.npy", _npy(np.array(["a"]))), "not numbers"),
    "a pickle beside": (("W.pkl", pickle.dumps(Payload())), "W.pkl is not an array"),
    "a pickle called npy": (("W.npy", pickle.dumps(Payload())), "W.npy is not an array"),
    "a name that climbs": (("../../PWNED.npy", _npy(np.zeros(3))), "leads outside"),
    "an absolute name": (("/PWNED.npy", _npy(np.zeros(3))), "leads outside"),
    "a bomb": (("W.npy", _npy(np.zeros(10**7))), "would grow to 80,000,128 bytes"),
}
_CFGS = {
    "brackets": (b"[" * 100_000, "cannot be read as JSON"),
    "100,000 digits": (b'{"d_in": ' + b"9" * 100_000 + b"}", "cannot be read as JSON"),
    "five megabytes": (b'{"a": "' + b"a" * 5_000_000 + b'"}', "it has more than 4,000,000 bytes"),
    "a name for the terminal": (b'{"hook_name": "\\u001b[2J"}', "it must be at most 200 printable letters"),
    "a name of a thousand letters": (b'{"model_name": "' + b"x" * 1000 + b'"}', "it must be at most 200 printable"),
    "a list": (b"[]", "must hold a JSON object"),
    "a megabyte in the place of a word": (
        b'{"architecture": "' + b"\\u001b" * 160_000 + b'"}',
        "` is not supported; standard, topk, jumprelu, gated are",
    ),
}


def _lines(content: str) -> bytes:
    return lzma.compress(content.encode())


_TEXTS = {
    "bomb.jsonl.xz": (lzma.compress(bytes(10**8)), "holds more than a hundred times its size"),
    "half.jsonl": (b'{"text": "\\ud800"}', ":1: holds half of a surrogate pair"),
    "deep.jsonl": (b"[" * 100_000, ":1: not a JSON object"),
    "digits.jsonl": (b'{"text": ' + b"9" * 100_000 + b"}", ":1: not a JSON object"),
    "null.txt": (b"a\0b", "it holds null bytes"),
    "cut.jsonl.xz": (_lines("{}")[:-8], "is cut off, or more than one packed file"),
    "two.jsonl.xz": (_lines("{}") * 2, "is cut off, or more than one packed file"),
    "dictionary.jsonl.xz": (b"\0\0\0\0\x80\x80" + bytes(7), "cannot be read"),
    "greedy.jsonl.xz": (
        lzma.compress(b"{}", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]),
        "cannot be read",
    ),
}


def weights() -> dict[str, Hostile]:
    """Files that `saezoo` opens as weights, configuration or text."""
    found: dict[str, Hostile] = {}
    for name, data in _CALLS.items():
        found[f"pickle: {name}"] = Hostile("sae.pt", archive(data), "would run code when loaded (")
    found["pickle: of dictionary_learning"] = found["pickle: os.system"]._replace(name="ae.pt")
    for kind, file, table in (
        ("archive", "sae.pt", _ARCHIVES),
        ("safetensors", "sae_weights.safetensors", _SAFETENSORS),
        ("cfg", "cfg.json", _CFGS),
    ):
        found |= {f"{kind}: {name}": Hostile(file, *pair) for name, pair in table.items()}
    for name, (data, message) in _ODD.items():
        found[f"pickle: {name}"] = Hostile("sae.pt", archive(data), message)
    for name, ((entry, data), message) in _NPZ.items():
        packing = zipfile.ZIP_DEFLATED if name == "a bomb" else zipfile.ZIP_STORED
        found[f"npz: {name}"] = Hostile("sae.npz", packed((named(entry), data), method=packing), message)
    wrong = packed((named("W.npy"), _npy(np.zeros(4096)))).replace(bytes(9), bytes(8) + b"x", 1)
    found["npz: a checksum that is wrong"] = Hostile("sae.npz", wrong, "Bad CRC-32 for file 'W.npy'")
    found["npz: a link"] = Hostile("sae.npz", packed((link("W.npy"), b"/etc/passwd")), "is a link or a folder")
    found |= {f"text: {name}": Hostile(name, *pair) for name, pair in _TEXTS.items()}
    return found
