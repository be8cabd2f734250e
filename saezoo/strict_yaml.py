"""YAML into frozen dataclasses, with the file and line of whatever is wrong.

PyYAML alone lets three mistakes pass that matter in a registry: a key written twice (the last one wins), a key that
nobody reads (a typo), and `8e-5` (a string in YAML 1.1). So the file is composed into nodes, which know their lines,
and every scalar is read by the type of the field it goes to. Aliases are refused: nothing here needs them, and they
are how a small YAML file becomes a large one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from saezoo.errors import RegistryError

T = TypeVar("T")
_NULLS = ("null", "~", "")
_DEEPEST = 20
_LONGEST = 1000  # letters of a message
_LARGEST = 4_000_000  # bytes; the built-in registry has 19,000


def read(path: Path, cls: type[T], *, label: str | None = None) -> T:
    """Read the YAML file at `path` as an instance of the dataclass `cls`.

    `label` replaces the path in messages. Raises RegistryError, one line: file, line, where in the file, remedy.
    """
    name = label or str(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise RegistryError(f"{name}: has more than {_LARGEST:,} bytes, and is no registry")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{name}: cannot be read as text: {error}") from None
    try:
        _check_events(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RegistryError(f"{name}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = " ".join(str(error).split())
        raise RegistryError(f"{name}:{line}: not valid YAML: {reason}") from None
    except (RecursionError, OverflowError, ValueError) as error:  # PyYAML lets these through
        raise RegistryError(f"{name}:1: not valid YAML: {type(error).__name__} while reading it") from None
    if node is None:
        raise RegistryError(f"{name}:1: the file is empty; it needs at least `version: 1`")
    return typing.cast(T, _build(cls, node, name, ""))


def _check_events(text: str, name: str) -> None:
    """Refuse aliases, tags and deep nesting before anything is built from them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise RegistryError(f"{name}:{line}: YAML alias `*{event.anchor}` is not allowed; write the value out")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
            raise RegistryError(f"{name}:{line}: YAML tag `{event.tag}` is not allowed; remove it")  # type: ignore[attr-defined]
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RegistryError(f"{name}:{line}: nested more than {_DEEPEST} deep; a registry needs 7")


def _fail(node: yaml.Node, name: str, where: str, message: str) -> RegistryError:
    at = f"{where}: " if where else ""
    text = " ".join(f"{at}{message}".split()).encode("utf-8", "backslashreplace").decode("utf-8")
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return RegistryError(f"{name}:{node.start_mark.line + 1}: {text}")


def _pairs(node: yaml.Node, name: str, where: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key -> (key node, value node) of a mapping without repeated keys."""
    if not isinstance(node, yaml.MappingNode):
        raise _fail(node, name, where, "must be a mapping (`key: value` lines)")
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _fail(key, name, where, "keys must be plain words")
        _check_letters(key, name, where)
        if key.value in pairs:
            first = pairs[key.value][0].start_mark.line + 1
            raise _fail(key, name, where, f"`{key.value}` is given twice (first on line {first}); remove one")
        pairs[key.value] = (key, value)
    return pairs


def _build(kind: Any, node: yaml.Node, name: str, where: str) -> Any:
    """The value of `node` read as the type `kind`: a dataclass, container, union with None, Literal or scalar."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast(type, kind), node, name, where)
    if origin in (types.UnionType, typing.Union):
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        return _build(inner[0], node, name, where)
    if origin is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise _fail(node, name, where, "must be a list")
        return tuple(_build(args[0], item, name, f"{where}[{i}]") for i, item in enumerate(node.value))
    if origin is dict:
        pairs = _pairs(node, name, where)
        return {key: _build(args[1], value, name, _join(where, key)) for key, (_, value) in pairs.items()}
    return _scalar(kind, node, name, where)


def _record(cls: type, node: yaml.Node, name: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    has_line = fields.pop("line", None) is not None  # filled here, for messages that come after reading
    pairs = _pairs(node, name, where)
    for key, (key_node, _) in pairs.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(fields)}"
            raise _fail(key_node, name, where, f"unknown key `{key}`; {hint}")
    for key, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if key not in pairs and not optional:
            raise _fail(node, name, where, f"missing key `{key}`; add it (docs/registry.md says what it means)")
    values = {key: _build(hints[key], value, name, _join(where, key)) for key, (_, value) in pairs.items()}
    if has_line:
        values["line"] = node.start_mark.line + 1
    try:
        return cls(**values)
    except ValueError as error:
        named = next((key_node for key, (key_node, _) in pairs.items() if f"`{key}`" in str(error)), node)
        raise _fail(named, name, where, str(error)) from None


def _scalar(kind: Any, node: yaml.Node, name: str, where: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _fail(node, name, where, f"must be {_describe(kind)}, not a list or mapping")
    _check_letters(node, name, where)
    text = node.value
    if node.style is None and text in _NULLS:
        raise _fail(node, name, where, f"must be {_describe(kind)}; null is not allowed here")
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind in (int, float):
            return _number(kind, text)
        if typing.get_origin(kind) is typing.Literal and text not in typing.get_args(kind):
            raise ValueError
    except (KeyError, ValueError):
        raise _fail(node, name, where, f"must be {_describe(kind)}, not `{text}`") from None
    return text


def _number(kind: type[int] | type[float], text: str) -> float:
    if "_" in text or len(text) > 40:  # Python would read 1_0 as 10
        raise ValueError
    value = kind(text)
    if not math.isfinite(value) or (kind is int and abs(value) >= 2**63):
        raise ValueError
    return value


def _check_letters(node: yaml.ScalarNode, name: str, where: str) -> None:
    """Refuse what a terminal takes for commands or shows in another order than it is read."""
    for letter in node.value:
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs") and letter not in "\n\t":
            raise _fail(node, name, where, f"holds the invisible character U+{ord(letter):04X}; remove it")


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
