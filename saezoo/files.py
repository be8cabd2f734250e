"""Files appear under their final name only when complete: write to a temporary name beside it, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from saezoo.errors import SaezooError

_CHUNK = 1 << 20


def cache_folder(name: str) -> Path:
    """Where saezoo keeps what it can make again: $SAEZOO_CACHE/name, else $XDG_CACHE_HOME/saezoo/name, else
    ~/.cache/saezoo/name."""
    if own := os.environ.get("SAEZOO_CACHE"):
        return Path(own).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saezoo" / name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, remove it otherwise.

    What is there and no regular file (a pipe, /dev/stdout) is yielded itself: it cannot be replaced.
    Raises SaezooError, one line, if the folder cannot be written or the disk is full.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    temporary = _temporary(path)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes its files readable by the owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which must not exist; it becomes `path` on success and goes otherwise."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Make the folder, and raise SaezooError now, rather than after long work, if files cannot be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    check_writable(path / "check")


def check_writable(path: Path) -> None:
    """Raise SaezooError now, rather than after long work, if `path` cannot be written."""
    if path.is_dir():
        raise SaezooError(f"cannot write {path}: it is a folder; give a file name")
    if path.is_file() or not path.exists():
        _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    """A new empty file beside `path`, with the permissions that an ordinary file would get."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise cannot_write(path, error) from None
    return temporary


def cannot_write(path: Path, error: OSError) -> SaezooError:
    """What to tell the user when writing to `path` failed with `error`."""
    if error.errno == errno.ENOSPC:
        return SaezooError(f"no space left on the disk while writing {path}; free some, or choose another place")
    return SaezooError(f"cannot write {path}: {error.strerror or error}; choose a place that can be written")


_digests: dict[tuple[str, int, int, int, int], str] = {}


def digest(path: Path, kind: str) -> str:
    """Hex `sha256` or `git sha1` of the file; one that stays as it is, but for its name, is read once per process."""
    facts = path.stat()
    key = (kind, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256(path) if kind == "sha256" else git_sha1(path)
    return _digests[key]


def git_sha1(path: Path) -> str:
    """Hex SHA-1 of the file as a git blob; the hub names small files by it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
