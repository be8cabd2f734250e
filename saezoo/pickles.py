"""Reading a pickle without executing it: what it would import, and whether it only describes tensors.

A pickle is a program for a small stack machine. `unsafe_names` lists what the program would import. `check` runs it
on stand-ins that hold no objects: it refuses every instruction, call and size that a file of weights does not need, as
far as torch's own `weights_only` unpickler (torch/_weights_only_unpickler.py) would let them pass.
"""

from __future__ import annotations

import contextlib
import math
import pickletools
from collections.abc import Callable, Iterator, Set
from enum import Enum
from typing import Any, NamedTuple, TypeGuard

_MOST_INSTRUCTIONS = 200_000  # a file of 2024 has 343
_MOST_DIMENSIONS = 32
ITEM_BYTES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage"), 1),
    **dict.fromkeys(("BFloat16Storage", "HalfStorage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
}
"""Bytes of one number in each kind of torch's storages that a file may use."""
_DTYPES = "bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint8"
_CALLS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}
SAFE = frozenset({f"torch.{name}" for name in (*ITEM_BYTES, *_DTYPES.split())} | _CALLS)
"""What a pickle of tensors imports. Fewer names than torch's own list, which has some that allocate at will."""


class PickleError(Exception):
    """Not a pickle of tensors; the message says why."""


class Storage(NamedTuple):
    """The numbers behind a tensor, which lie outside the pickle."""

    kind: str
    key: str
    numel: int


class _Name(str):
    """What an import would give, by its full name."""


class _Kind(Enum):
    """What an object that was made would be."""

    LIST = "list"
    DICT = "dict"
    ORDERED = "OrderedDict"
    TENSOR = "tensor"
    OBJECT = "object"
    OTHER = "value"


def unsafe_names(data: bytes, allowed: Set[str]) -> list[str]:
    """Names, sorted, that the pickle would import beyond `SAFE` and `allowed`; also of a pickle that breaks off."""
    found: set[str] = set()
    with contextlib.suppress(PickleError):  # a hostile instruction runs before the place where the pickle breaks
        found.update(_imports(data))
    return sorted(found - SAFE - allowed)


def _imports(data: bytes) -> Iterator[str]:
    """Every import; the two strings on which STACK_GLOBAL works are those put on the stack last."""
    pushed: list[str] = []
    memo: dict[int, str] = {}
    for name, argument in _instructions(data):
        if name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join((["?", "?"] + pushed)[-2:])
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield f"extension {argument}"
        elif "PUT" in name:
            memo[int(argument)] = pushed[-1] if pushed else "?"
        elif name == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else "?"
        elif "GET" in name:
            pushed.append(memo.get(int(argument), "?"))
        elif isinstance(argument, str):
            pushed.append(argument)


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) up to STOP."""
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count >= _MOST_INSTRUCTIONS:
                raise PickleError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
            yield instruction.name, argument
    except (ValueError, OverflowError) as error:  # also UnicodeDecodeError
        reason = " ".join(str(error).split())[:100]
        raise PickleError(f"its pickle is broken ({reason})") from None


def check(data: bytes, allowed: Set[str]) -> list[Storage]:
    """The storages that the pickle asks for; PickleError if it does anything but describe tensors and plain values.

    `allowed` are classes of which it may make objects, by their full names.
    """
    machine = _Machine(allowed)
    for name, argument in _instructions(data):
        run = _INSTRUCTIONS.get(name)
        if run is None:
            raise PickleError(f"its pickle holds the instruction {name}, which torch does not write")
        try:
            run(machine, argument)
        except (IndexError, KeyError):
            raise PickleError(f"its pickle is broken ({name} finds nothing to work on)") from None
    return machine.storages


class _Machine:
    """The stack and what is on it: text, numbers, `_Name`s, `Storage`s, tuples of these, and `_Kind`s."""

    def __init__(self, allowed: Set[str]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []
        self._below: list[list[Any]] = []

    def mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def make_tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def make_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def import_name(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in SAFE and name not in self.allowed:
            raise PickleError(f"its pickle imports {name}")
        self.stack.append(_Name(name))

    def extend(self, items: list[Any]) -> None:
        _need(self.stack[-1] is _Kind.LIST, "puts items into what is no list")

    def set_items(self, items: list[Any]) -> None:
        _need(self.stack[-1] in (_Kind.DICT, _Kind.ORDERED), "sets keys of what is no dictionary")
        _need(len(items) % 2 == 0, "sets a key without a value")
        # The hash of a tuple of tuples that share their items can take for ever.
        _need(all(type(key) in (str, int) for key in items[::2]), "uses keys that are neither text nor whole numbers")

    def new_object(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        named = isinstance(name, _Name) and name in self.allowed and arguments == ()
        _need(named, "makes an object of a class that is no configuration")
        self.stack.append(_Kind.OBJECT)

    def build(self) -> None:
        state = self.stack.pop()
        _need(self.stack[-1] in (_Kind.OBJECT, _Kind.ORDERED), "sets attributes of what has none")
        _need(state is _Kind.DICT, "sets attributes from what is no dictionary")

    def load_storage(self) -> None:
        match self.stack.pop():
            case ("storage", _Name() as kind, str(key), str(), int(numel)):
                storage = Storage(kind.removeprefix("torch."), key, numel)
                _need(storage.kind in ITEM_BYTES and numel >= 0, f"asks for a storage of the kind {kind}")
            case _:
                raise PickleError("its pickle asks for something outside it that is no storage")
        self.storages.append(storage)
        self.stack.append(storage)

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        _need(isinstance(name, _Name) and isinstance(arguments, tuple), "calls what is no function")
        match name, arguments:
            case "collections.OrderedDict", ():
                self.stack.append(_Kind.ORDERED)
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, size, stride, bool(), _Kind.ORDERED):
                _check_view(storage, offset, size, stride)
                self.stack.append(_Kind.TENSOR)
            case "torch._utils._rebuild_parameter", (_Kind.TENSOR, bool(), _Kind.ORDERED):
                self.stack.append(_Kind.TENSOR)
            case "torch.device", (str(),) | (str(), int()):
                self.stack.append(_Kind.OTHER)
            case "torch.Size", (size,) if _whole(size):
                self.stack.append(_Kind.OTHER)
            case _:
                raise PickleError(f"its pickle calls {name} with arguments that torch does not write")


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PickleError(f"its pickle {otherwise}")


def _whole(size: object) -> TypeGuard[tuple[int, ...]]:
    """Whether it is a tuple of whole numbers, such as a tensor's shape."""
    return isinstance(size, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in size)


def _check_view(storage: Storage, offset: object, size: object, stride: object) -> None:
    """The tensor must lie inside its storage and have no more elements than that: strides of 0 make any number."""
    begin = (offset,)
    if not (_whole(begin) and _whole(size) and _whole(stride)):
        raise PickleError("its pickle describes a tensor by other than whole numbers")
    _need(len(size) == len(stride) <= _MOST_DIMENSIONS, "describes a tensor with wrong strides")
    numel = math.prod(size)
    _need(numel <= storage.numel, f"describes a tensor of {numel} elements in a storage of {storage.numel}")
    last = begin[0] + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
    _need(last < max(storage.numel, 1), "describes a tensor that ends outside its storage")


def _push(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value)


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _protocol(machine: _Machine, version: int) -> None:
    _need(version == 2, f"is of protocol {version}; torch writes 2")


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _protocol,
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.make_tuple_since_mark(),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "NONE": _push(None),
    "NEWFALSE": _push(False),
    "NEWTRUE": _push(True),
    "EMPTY_TUPLE": _push(()),
    "EMPTY_LIST": _push(_Kind.LIST),
    "EMPTY_DICT": _push(_Kind.DICT),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _push_argument),
    "GLOBAL": lambda machine, argument: machine.import_name(argument),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "NEWOBJ": lambda machine, _: machine.new_object(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.load_storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "STOP": lambda machine, _: machine.stack.pop(),
}
"""All that protocol 2 of torch.save writes and torch's unpickler reads."""
