"""The lock file: which bytes a file of the hub had when it was first used here, where the registry does not say.

Trust on first use: what the hub (or a mirror) served the first time is written down, and a later difference is an
error. The file is JSON, sorted, one record per file; two processes may add to it at the same time. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saezoo import files
from saezoo.errors import DownloadError, SaezooError

_VERSION = 1
_NAME = "saezoo.lock"
_WAIT = 30
"""Seconds for another process to finish its few lines."""
_DIGITS = {"sha256": 64, "git sha1": 40}


class NotWritten(SaezooError):
    """The lock file cannot be written."""


@dataclass(frozen=True, order=True)
class Record:
    """One file of the hub as it was first seen."""

    repo: str
    revision: str
    """The commit, also where a branch was asked for."""
    file: str
    kind: str
    """`sha256`, or `git sha1` for the small files that the hub names by it."""
    hash: str
    bytes: int
    first_seen: str
    """Date, in UTC."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.repo, self.revision, self.file


def lock_path() -> Path:
    """$SAEZOO_LOCK, else saezoo.lock in the working folder if there is one, else in the user's configuration folder."""
    if own := os.environ.get("SAEZOO_LOCK"):
        return Path(own).expanduser()
    if Path(_NAME).is_file():
        return Path(_NAME).absolute()
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "saezoo" / _NAME


def today() -> str:
    """The date of a record that is made now."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def read(path: Path) -> dict[tuple[str, str, str], Record]:
    """All records by (repo, revision, file); none if there is no file. Raises DownloadError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DownloadError(f"the lock file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if (
        not isinstance(content, dict)
        or content.get("version") != _VERSION
        or not isinstance(content.get("files"), list)
    ):
        raise _damaged(path, f'it must hold {{"version": {_VERSION}, "files": […]}}')
    records = [_record(path, values) for values in content["files"]]
    return {record.key: record for record in records}


def remember(path: Path, record: Record) -> Record:
    """Write `record` down unless its file has one already; gives the one that holds now.

    Raises NotWritten if the lock file cannot be written, DownloadError if it is damaged.
    """
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.guard"), timeout=_WAIT):
            records = read(path)
            if record.key in records:
                return records[record.key]
            _write(path, [*records.values(), record])
    except filelock.Timeout:
        raise NotWritten(f"cannot write {path}: another process has held its lock for {_WAIT} s") from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise NotWritten(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    return record


def _write(path: Path, records: list[Record]) -> None:
    content = {"version": _VERSION, "files": [dataclasses.asdict(record) for record in sorted(records)]}
    try:
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except SaezooError as error:
        raise NotWritten(str(error)) from None


def _record(path: Path, values: Any) -> Record:
    kinds = {field.name: int if field.name == "bytes" else str for field in dataclasses.fields(Record)}
    if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != kinds:
        raise _damaged(path, f"a record must have {', '.join(kinds)}")
    record = Record(**values)
    if not re.fullmatch(f"[0-9a-f]{{{_DIGITS.get(record.kind, 0)}}}", record.hash):
        raise _damaged(path, f"`{record.kind}: {record.hash}` of {record.file} is no hash")
    return record


def _damaged(path: Path, reason: str) -> DownloadError:
    return DownloadError(f"the lock file {path} is damaged ({reason}); mend it, or delete it to trust the hub anew")
