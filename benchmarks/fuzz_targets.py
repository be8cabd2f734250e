"""What the fuzzer feeds: for each reader of foreign files, a few good files, a grammar of bad ones, and the reader.

A reader may return or raise SaezooError; anything else is a crash.
"""

from __future__ import annotations

import functools
import io
import json
import lzma
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import yaml

from saezoo import formats, registry, screening, tokens
from saezoo.foreign import read_dictionary_learning, read_gemma_scope, read_sparsify
from saezoo.sae_config import config_from
from saezoo.weights import read_legacy, read_saelens

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
D_IN, D_SAE = 3, 4


class Target(NamedTuple):
    """One reader."""

    suffix: str
    seeds: list[bytes]
    """Good files, which mutations start from."""
    words: list[bytes]
    """What mutations insert."""
    make: Callable[[Random], bytes]
    """A file from the grammar."""
    read: Callable[[Path], object]


_NUMBERS = [0, 1, -1, 2, 3, 4, 12, 48, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**40, 0.5, 1e308]
_VALUES: list[Any] = [
    *_NUMBERS,
    None,
    True,
    False,
    "",
    "relu",
    "F32",
    "blocks.0.hook_resid_pre",
    "../x",
    "/x",
    "\x1b[2J",
]
_JSON_WORDS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"null",
    b"NaN",
    b"1e999",
    b"-",
    b"\\ud800",
    b"9" * 5000,
    b"[" * 3000,
]


def value(random: Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = random.random()
    if depth and kind < 0.12:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    if depth and kind < 0.2:
        return {str(random.choice(_VALUES)): value(random, depth - 1) for _ in range(random.randrange(4))}
    return random.choice(_VALUES)


def altered(random: Random, content: Any, chance: float = 0.1) -> Any:
    """A copy of a JSON value with some of its parts exchanged, left out or given other names."""
    if random.random() < chance / 3:
        return value(random)
    if isinstance(content, dict):
        kept = {key: item for key, item in content.items() if random.random() > chance / 10}
        renamed = {(value(random, 0) if random.random() < chance / 20 else key): item for key, item in kept.items()}
        return {str(key): altered(random, item, chance) for key, item in renamed.items()}
    if isinstance(content, list):
        return [altered(random, item, chance) for item in content for _ in range(random.choice((1,) * 20 + (0, 2)))]
    return content


def _tensors() -> dict[str, Any]:
    shapes = {"W_dec": (D_SAE, D_IN), "W_enc": (D_IN, D_SAE), "b_dec": (D_IN,), "b_enc": (D_SAE,)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def _safetensors_header() -> dict[str, Any]:
    header, end = {}, 0
    for name, tensor in _tensors().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    return header


def _safetensors(header: Any, size: int, length: int | None = None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * size


def _make_safetensors(random: Random) -> bytes:
    header = _safetensors_header()
    if random.random() < 0.3:  # dtypes and shapes whose sizes still fit
        for tensor in header.values():
            tensor["dtype"] = random.choice(["F32", "I32", "U32", "F16", "BF16", "F64"])
            tensor["shape"] = [*tensor["shape"], *random.choice([[], [1], [2], [0]])]
    size = random.choice([124, 124, 124, 124, 123, 125, 0])
    length = random.choice([2**63, 2**64 - 1, 10**7, 0, 100]) if random.random() < 0.05 else None
    return _safetensors(altered(random, header), size, length)


_CFG: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "hook_point": "blocks.0.hook_resid_pre",
    "hook_name": "blocks.0.hook_resid_pre",
    "model_name": "gpt2-small",
    "context_size": 128,
    "prepend_bos": True,
    "architecture": "standard",
    "activation_fn_str": "relu",
    "normalize_activations": "none",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "hook_head_index": None,
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
    "metadata": {"prepend_bos": True},
}


@functools.cache
def _cfg_beside() -> Path:
    """A good cfg.json for the tensors above, in the folder of the inputs."""
    path = Path(_FOLDER[0]) / "good.json"
    path.write_text(json.dumps(_CFG), encoding="utf-8")
    return path


_FOLDER = ["."]


def use_folder(folder: Path) -> None:
    """Where inputs are written."""
    _FOLDER[0] = str(folder)
    _cfg_beside.cache_clear()


def _read_safetensors(path: Path) -> object:
    return read_saelens(path, _cfg_beside(), None)


def _read_cfg(path: Path) -> object:
    return config_from(screening.read_config(path), str(path), D_IN, D_SAE)


@functools.cache
def _legacy() -> dict[str, bytes]:
    """The records of a file of 2024, made small."""
    with zipfile.ZipFile(GOLDEN / "legacy.pt") as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    data = records["data.pkl"]
    # 64 x 256 becomes 3 x 4: the pickle's own numbers, in the order of its four tensors
    data = data.replace(b"M\x00\x40", b"K\x0c").replace(b"M\x00\x01", b"K\x04").replace(b"K\x40", b"K\x03")
    sizes = {"data/0": 48, "data/1": 16, "data/2": 48, "data/3": 12}
    return {**records, "data.pkl": data, **{name: records[name][:size] for name, size in sizes.items()}}


def zipped(records: dict[str, bytes], root: str = "legacy/", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these records."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, record in records.items():
            archive.writestr(zipfile.ZipInfo(root + name), record, method)
    return content.getvalue()


_PICKLE_WORDS = [
    *(b"cos\nsystem\n", b"cbuiltins\nexec\n", b"c__builtin__\neval\n", b"ccollections\nOrderedDict\n"),
    *(
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\ndevice\n",
        b"cbuiltins\nbytearray\n",
    ),
    *(b"\x93", b"\x94", b"\x8c\x02os", b"\x8c\x06system", b"ios\nsystem\n", b"\x82\x01", b"X\x02\x00\x00\x00aa"),
    *(b"(", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"s", b"u", b"a", b"e", b"Q", b"0"),
    *(b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"N", b"\x88", b"."),
    *(
        b"q\x00",
        b"h\x00",
        b"h\x01",
        b"j\xff\xff\xff\xff",
        b"r\xff\xff\xff\xff",
        b"G" + b"\x7f\xf0" + b"\0" * 6,
        b"\x80\x05",
    ),
]


def _make_pickle(random: Random) -> bytes:
    records = dict(_legacy())
    data = records["data.pkl"]
    if random.random() < 0.4:
        data = _well_formed(random)
    elif random.random() < 0.3:
        data = b"\x80\x02" + b"".join(random.choices(_PICKLE_WORDS, k=random.randrange(1, 40))) + b"."
    else:
        data = mutated(random, [data], _PICKLE_WORDS)
    records["data.pkl"] = data
    if random.random() < 0.1:
        records[random.choice(["../x", "/x", "data/../../x", "code/x.py", "constants.pkl", "data/7"])] = b"x"
    return zipped(records, method=zipfile.ZIP_DEFLATED if random.random() < 0.02 else zipfile.ZIP_STORED)


def _well_formed(random: Random) -> bytes:
    """A pickle that runs to its end, of the right form with some values and tensors exchanged."""
    shapes = [(str(i), [*tensor.shape]) for i, tensor in enumerate(_tensors().values())]
    state = b""
    for name, (key, shape) in zip(_tensors(), shapes, strict=True):
        stride = [shape[-1], 1][-len(shape) :]
        view = [0, _changed(random, shape), _changed(random, stride), False]
        kind = random.choice([b"FloatStorage"] * 9 + [b"IntStorage", b"HalfStorage", b"DoubleStorage"])
        numel = altered(random, int(np.prod(shape)), 0.02)
        storage = b"(" + _plain(random, "storage") + b"ctorch\n" + kind + b"\n" + _plain(random, key)
        storage += _plain(random, "cpu") + _plain(random, numel) + b"tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(_plain(random, part) for part in view)
        tensor += b"ccollections\nOrderedDict\n)RtR"
        state += _plain(random, name) + (
            tensor if random.random() < 0.97 else random.choice([_plain(random, 1), storage])
        )
    cfg = (
        b"csae_training.config\nLanguageModelSAERunnerConfig\n)\x81"
        + _plain(random, altered(random, _CFG, 0.05))
        + b"b"
    )
    rest = _plain(random, "state_dict") + b"ccollections\nOrderedDict\n)R(" + state + b"u"
    return b"\x80\x02}(" + _plain(random, "cfg") + cfg + rest + b"u."


def _changed(random: Random, shape: list[int]) -> Any:
    found = altered(random, shape, 0.02)
    return tuple(found) if isinstance(found, list) else found


def _plain(random: Random, content: Any) -> bytes:
    """The instructions that put a plain value on the stack; now and then something else."""
    if random.random() < 0.003:
        return random.choice(
            [b"ctorch\nfloat32\n", b"ctorch\ndevice\nX\x03\x00\x00\x00cpu\x85R", b"]", b"(K\x01K\x02t"]
        )
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.fast = True  # no memo, whose numbers would clash
    pickler.dump(content)
    return buffer.getvalue()[2:-1]


def _read_pickle(path: Path) -> object:
    return read_legacy(path, None)


def _numpy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _numpy_records() -> dict[str, bytes]:
    tensors = _tensors() | {"threshold": np.ones(D_SAE, np.float32)}
    return {f"{name}.npy": _numpy(tensor) for name, tensor in tensors.items()}


def _make_npz(random: Random) -> bytes:
    records = _numpy_records()
    for name in records:
        if random.random() < 0.3:
            kind = random.choice(
                ["<f4", "<f8", ">f2", "|O", "|b1", "<i8", "<U9", "<c8", "|V2", "f4,f4", "<f3", "__import__"]
            )
            shape = random.choice(
                ["()", "(3,)", "(4, 3)", "(3)", "(0,)", "(9999999999999999999, 4)", "(-1,)", "(2,) * 9", "3"]
            )
            head = (
                f"{{'descr': '{kind}', 'fortran_order': {random.choice(['True', 'False', '1'])}, 'shape': {shape}, }}\n"
            )
            length = random.choice([len(head)] * 8 + [0, 65535])
            size = random.choice([0, 12, 16, 24, 48, 96])
            records[name] = b"\x93NUMPY\1\0" + struct.pack("<H", length) + head.encode() + b"\0" * size
        elif random.random() < 0.3:
            records[name] = mutated(random, [records[name]], [b"'|O'", b"True", b"(", b"\x80\x04cos\nsystem\n."])
    if random.random() < 0.05:
        records["bomb.npy"] = _numpy(np.zeros(random.choice([10, 10**6])))
    return zipped(records, "", random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def _read_npz(path: Path) -> object:
    return read_gemma_scope(path)


_FORMATS = GOLDEN / "formats"
_BATCHTOPK = _FORMATS / "dictionary_learning_BatchTopKSAE"
_SPARSIFY = _FORMATS / "sparsify" / "h.3"


@functools.cache
def _peer_configs() -> list[Any]:
    """Configurations of dictionary_learning, of sparsify, and of either with what `convert` adds."""
    plain = [json.loads((_BATCHTOPK / "config.json").read_text()), json.loads((_SPARSIFY / "cfg.json").read_text())]
    own = json.loads((_FORMATS / "saelens_topk" / "cfg.json").read_text())
    return [*plain, *(config | {"saezoo": own} for config in plain)]


def _make_peer_config(random: Random) -> bytes:
    return json.dumps(altered(random, random.choice(_peer_configs()))).encode()


def _read_peer_config(path: Path) -> object:
    """Beside good weights, which are of the one format or of the other."""
    if b"trainer" in path.read_bytes():
        found = read_dictionary_learning(_BATCHTOPK / "ae.pt", path)
    else:
        found = read_sparsify(_SPARSIFY / "sae.safetensors", path)
    return config_from(found.config, str(path), *found.tensors["W_enc"].shape)


@functools.cache
def _openai() -> dict[str, bytes]:
    with zipfile.ZipFile(_FORMATS / "openai_topk" / "3.pt") as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def _make_openai(random: Random) -> bytes:
    records = dict(_openai())
    records["data.pkl"] = mutated(random, [records["data.pkl"]], [*_PICKLE_WORDS, b"ReLU", b"TopK", b"Identity"])
    return zipped(records)


def _read_pt(path: Path) -> object:
    """As a file of which nobody has said what it is."""
    found = formats.read(path)
    return config_from(found.config, str(path), *found.tensors["W_enc"].shape)


@functools.cache
def _registry() -> dict[str, Any]:
    """A small overlay with every kind of block, taken from the built-in registry."""
    everything = yaml.safe_load((registry.package_folder() / "registry.yaml").read_text(encoding="utf-8"))
    collection = dict(everything["collections"]["tiny-res"], saes=everything["collections"]["tiny-res"]["saes"][:1])
    return {
        "version": 1,
        "sources": dict(list(everything["sources"].items())[:1]),
        "recipes": {"tiny": everything["recipes"]["tiny"]},
        "collections": {"mine": collection},
    }


_YAML_WORDS = [
    *(
        b": ",
        b"- ",
        b"&a ",
        b"*a",
        b"!!python/name:os.getcwd ",
        b"!x ",
        b"|\n",
        b">\n",
        b"%YAML 9.9\n",
        b"'",
        b'"',
        b"? ",
    ),
    *(
        b"\t",
        b"\n",
        b"  ",
        b"---\n",
        b"...\n",
        b"<<: ",
        b"\\u",
        b"[" * 30,
        b"{a: " * 30,
        b"~",
        b"1e999",
        b"9" * 60,
        b"\x1b",
    ),
]


def _make_registry(random: Random) -> bytes:
    content = altered(random, _registry(), 0.03)
    if random.random() < 0.5:
        return json.dumps(content).encode()
    return str(yaml.safe_dump(content, sort_keys=False)).encode("utf-8", "surrogatepass")


def _read_registry(path: Path) -> object:
    return registry._read.__wrapped__(str(path), None)


_TEXT_WORDS = [
    b"<|endoftext|>",
    b"\n",
    b'{"text": "',
    b'"}',
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"null",
]


def _make_lines(random: Random) -> bytes:
    lines = [json.dumps(altered(random, {"text": "Some words."}, 0.5)) for _ in range(random.randrange(5))]
    return "\n".join(lines).encode()


def _make_text(random: Random) -> bytes:
    return b"".join(random.choices([*_TEXT_WORDS, b"words ", "Größe".encode()], k=random.randrange(30)))


def _read_text(path: Path) -> object:
    return sum(len(document.encode()) for document in tokens.text_file(path).documents())


def targets() -> dict[str, Target]:
    """All of them."""
    lines = [b'{"text": "One."}\n{"text": "Two.", "x": [1]}\n', b'{"text": ""}']
    packed = [lzma.compress(line) for line in (*lines, b'{"text": "' + b"a" * 10**5 + b'"}')]
    pickles = [zipped(_legacy())]
    numpy = [zipped(_numpy_records(), ""), zipped(_numpy_records(), "", zipfile.ZIP_DEFLATED)]
    overlay = [json.dumps(_registry()).encode(), yaml.safe_dump(_registry(), sort_keys=False).encode()]
    cfg = [json.dumps(_CFG).encode(), (GOLDEN / "reformatted" / "cfg.json").read_bytes()]
    tensors = [_safetensors(_safetensors_header(), 124)]
    peers = [json.dumps(config).encode() for config in _peer_configs()]

    def make_cfg(random: Random) -> bytes:
        return json.dumps(altered(random, _CFG)).encode()

    def make_packed(random: Random) -> bytes:
        return lzma.compress(_make_lines(random) * random.choice([1, 1, 1, 1000]), preset=0)

    return {
        "registry": Target(".yaml", overlay, _YAML_WORDS, _make_registry, _read_registry),
        "safetensors": Target(".safetensors", tensors, _JSON_WORDS, _make_safetensors, _read_safetensors),
        "pickle": Target(".pt", pickles, [*_PICKLE_WORDS, b"PK\1\2", b"PK\5\6"], _make_pickle, _read_pickle),
        "npz": Target(".npz", numpy, [b"PK\1\2", b"PK\5\6", b"'|O'"], _make_npz, _read_npz),
        "peer config": Target(".json", peers, _JSON_WORDS, _make_peer_config, _read_peer_config),
        "peer pickle": Target(".pt", [zipped(_openai())], [b"PK\1\2", b"PK\5\6"], _make_openai, _read_pt),
        "cfg": Target(".json", cfg, _JSON_WORDS, make_cfg, _read_cfg),
        "jsonl": Target(".jsonl", lines, [*_JSON_WORDS, *_TEXT_WORDS], _make_lines, _read_text),
        "txt": Target(".txt", [b"Words.<|endoftext|>More.", "Größe".encode()], _TEXT_WORDS, _make_text, _read_text),
        "xz": Target(".jsonl.xz", packed, [b"\xfd7zXZ\0", b"YZ"], make_packed, _read_text),
    }


def mutated(random: Random, seeds: list[bytes], words: list[bytes]) -> bytes:
    """One of the seeds after one to six changes."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        place = random.randrange(len(data) + 1)
        match random.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << random.randrange(8)
            case 1 if data:
                data[place % len(data)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 2:
                data[place:place] = random.choice(words)
            case 3:
                del data[place : place + random.choice((1, 2, 4, 8, 50))]
            case 4:
                number = random.choice((0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                width = random.choice((1, 2, 4, 8))
                data[place : place + width] = (number % 256**width).to_bytes(width, random.choice(("little", "big")))
            case 5:
                other = random.choice(seeds)
                begin = random.randrange(len(other) + 1)
                data[place : place + 8] = other[begin : begin + random.choice((4, 8, 64))]
            case 6 if random.random() < 0.2:
                del data[place:]
    return bytes(data)


if sys.platform == "win32":  # pragma: no cover
    raise SystemExit("the fuzzer needs signals and limits that Windows has not")
