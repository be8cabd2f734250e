"""`add`: write the record of a run or of an SAE into a registry file, whose other lines stay as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from saezoo import files
from saezoo.errors import RegistryError, UsageError
from saezoo.records import Record, read_record
from saezoo.registry import Registry, read_registry

_HEAD = "# A registry of SAEs; docs/registry.md says what the keys mean.\n"


def add(
    path: Path, file: Path, *, name: str | None = None, model: str | None = None, licence: str | None = None
) -> tuple[str, bool]:
    """Add a run folder, or the folder or `.pt` of one SAE, to the registry file `file`, which is made if need be.

    Args:
        path: the run or the SAE; its files stay where they are.
        file: written in block style; its comments and other records are kept.
        name: of the new collection; a run has one of its own.
        model: the registry's name of the language model, where the SAE does not say it.
        licence: of the weights.

    Returns the collection's name, and whether anything was written: not if the same record is there already. Raises
    UsageError if another record has the name, and for what is missing.
    """
    known = read_registry(file if file.exists() else "")
    record = read_record(path, known, name=name, model=model, licence=licence)
    if record.name in read_registry("").collections:
        raise UsageError(f"`{record.name}` is a built-in collection; choose another --name")
    before = file.read_bytes().decode("utf-8") if file.is_file() else ""
    there = yaml.safe_load(before) or {}
    content = record.content("local", folder=_place(record.folder, file.parent))
    content["models"] = {} if "models" not in content else _new_models(record, there, known, file)
    new = {section: _new(section, content[section], there, file) for section in content if section != "version"}
    new = {section: records for section, records in new.items() if records}
    if not new:
        return record.name, False
    text = _HEAD + _dump({"version": 1, **new}) if not before else _extended(before, new, file)
    with files.replacing(file) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
        _check(temporary, file, record.name, known)
    return record.name, True


def _place(folder: Path, base: Path) -> str:
    """`folder` relative to `base` if it lies below it, else absolute."""
    folder, base = folder.resolve(), base.resolve()
    return folder.relative_to(base).as_posix() if folder.is_relative_to(base) else str(folder)


def _new_models(record: Record, there: dict[str, Any], known: Registry, file: Path) -> dict[str, Any]:
    """The record's models that `file` does not know as they are; UsageError if it knows another of that name."""
    new = {}
    for name, model in record.models.items():
        if name not in known.models or _unsourced(model) != _unsourced(dataclasses.asdict(known.models[name])):
            if name in (there.get("models") or {}):
                raise UsageError(f"{file} has another model `{name}`; give another --registry")
            new[name] = model | {"source": [record.name]}
    return new


def _unsourced(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "source"}


def _new(section: str, records: dict[str, Any], there: dict[str, Any], file: Path) -> dict[str, Any]:
    """Those of `records` that are not in that section; UsageError if one of the same name is another."""
    found = there.get(section) or {}
    plain = yaml.safe_load(_dump(records)) or {}
    for name in plain:
        if name in found and found[name] != plain[name]:
            raise UsageError(f"{file} has another `{name}` under `{section}`; choose another --name")
    return {name: value for name, value in plain.items() if name not in found}


def _extended(text: str, new: dict[str, dict[str, Any]], file: Path) -> str:
    """`text` with the new records at the ends of their sections; everything else byte for byte."""
    break_ = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    lines[-1] = lines[-1].rstrip("\r\n") + break_
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    assert top is not None  # it has been read before
    _refuse_flow(top, file, "")
    sections = {key.value: value for key, value in top.value}
    insertions: list[tuple[int, str]] = []
    end = ""
    for section, records in new.items():
        node = sections.get(section)
        if node is None:
            end += "\n" + _dump({section: records})
            continue
        _refuse_flow(node, file, f" under `{section}`")
        margin = " " * node.value[0][0].start_mark.column
        block = "".join(margin + line for line in _dump(records).splitlines(keepends=True))
        insertions.append((_last_line(node) + 1, block))
    for line, block in sorted(insertions, reverse=True):  # from below, so that the numbers above stay true
        lines.insert(line, block.replace("\n", break_))
    return "".join(lines) + end.replace("\n", break_)


def _refuse_flow(node: yaml.Node, file: Path, where: str) -> None:
    if not isinstance(node, yaml.MappingNode) or node.flow_style or not node.value:
        raise UsageError(
            f"{file}:{node.start_mark.line + 1}: only `key: value` lines can be added to, and it has another form"
            f"{where}; rewrite that, or give another --registry"
        )


def _last_line(node: yaml.Node) -> int:
    """Number, from 0, of the last line with something of `node` on it."""
    if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last)
    mark = node.end_mark
    # A block scalar ends where the next line begins.
    return int(mark.line - (mark.column == 0 and mark.line > node.start_mark.line))


def _check(temporary: Path, file: Path, name: str, known: Registry) -> None:
    """Raise RegistryError, and so leave `file` as it was, unless the new text is a registry with all that it had."""
    try:
        after = read_registry(temporary)
    except RegistryError as error:
        raise RegistryError(str(error).replace(str(temporary.resolve()), str(file))) from None
    lost = (set(known.collections) | {name}) - set(after.collections)
    if lost:
        raise RegistryError(f"{file}: adding to it would lose {', '.join(sorted(lost))}; give another --registry")


def _dump(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, width=120, allow_unicode=True)) if value else ""
