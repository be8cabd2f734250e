"""What lies on this machine: the files of the hub that saezoo knows, and what it keeps itself.

Of the hub client's cache only the repositories that the registry or the lock file names are looked at or touched, and
the client's own functions scan and delete. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saezoo import files, hub, lock
from saezoo.download import HubFile
from saezoo.entries import FileFacts
from saezoo.errors import DownloadError
from saezoo.registry import Registry
from saezoo.transfers import size_words

OWN = ("tokens", "evals")
"""Folders under `files.cache_folder`: tokenised texts, and sums of evaluations under way."""
_IN_USE = 3600.0
"""Seconds: a half of a download that grew more recently may be another process's work."""
_DAY = 86400.0


@dataclass(frozen=True)
class Item:
    """A file of the hub, or an item of saezoo's own cache."""

    repo: str
    """`saezoo's own` for the latter."""
    revision: str | None
    """The commit."""
    file: str
    used_by: tuple[str, ...]
    """Registry entries (`gpt2-small-res/10`) and models."""
    bytes: int
    last_used: float
    """Seconds since 1970: of the last reading, where the file system notes that, or of the writing."""
    path: Path
    facts: FileFacts = hub.UNKNOWN
    check: str | None = None
    """What its bytes were checked against, by `verified`."""
    problem: str | None = None
    """What is wrong with it, by `verified`."""

    def describe(self) -> dict[str, Any]:
        """Plain values of what `contents` knows."""
        names = ("repo", "revision", "file", "used_by", "bytes", "last_used", "path")
        return {name: getattr(self, name) for name in names} | {"path": str(self.path), "used_by": list(self.used_by)}


@dataclass(frozen=True)
class Plan:
    """What `prune` would remove."""

    lines: tuple[str, ...]
    """One for each thing that goes, for a person."""
    bytes: int
    paths: tuple[Path, ...]
    """Files and folders."""
    strategies: tuple[Any, ...]
    """The hub client's own plans for its revisions, one for each repository."""

    def execute(self) -> None:
        """Remove all of it. Raises SaezooError if something cannot be removed."""
        for strategy in self.strategies:
            strategy.execute()
        for path in self.paths:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise files.cannot_write(path, error) from None


def contents(registry: Registry) -> list[Item]:
    """Every file of the repositories that saezoo knows, and the items of its own cache, in order."""
    known = _Known(registry)
    found = [item for revision in _revisions(known) for item in known.items(*revision)]
    return sorted(found, key=lambda item: (item.repo, item.revision or "", item.file)) + list(_own())


def broken(registry: Registry) -> Iterator[tuple[str, str]]:
    """Known repositories that the client refuses to scan, and why: a link whose blob is gone, for one."""
    warnings = [] if (scanned := _scan()) is None else [str(warning) for warning in scanned.warnings]
    for repo, folder in _storages(_Known(registry)).items():
        for warning in warnings:
            if str(folder) in warning:
                yield repo, f"{warning}; get it again"


def verified(registry: Registry) -> Iterator[Item]:
    """Every file of the hub with `check` or `problem`: all are read, nothing is written."""
    for item in contents(registry):
        if item.revision is None:
            continue
        try:
            file = HubFile(item.repo, item.revision, item.file)
            check = hub.verify_cached(item.path, file, item.facts, remember=False)
        except DownloadError as error:
            yield dataclasses.replace(item, problem=str(error))
        else:
            yield dataclasses.replace(item, check=check)
    for repo, problem in broken(registry):
        yield Item(repo, None, "(whole repository)", (), 0, 0.0, Path(), problem=problem)


def prunable(registry: Registry, *, older_than: int | None = None) -> Plan:
    """Revisions that neither registry nor lock file names and no branch points to, and old halves of downloads.

    With `older_than`, days: also revisions and items of saezoo's own cache that were not used for so long.
    """
    known, now = _Known(registry), time.time()
    commits: dict[str, list[str]] = {}
    lines: list[str] = []
    for repo, revision in _revisions(known):
        used = max((_last_used(file.blob_path) for file in revision.files), default=revision.last_modified)
        foreign = (repo, revision.commit_hash) not in known.revisions and not revision.refs
        if foreign or _is_old(used, older_than, now):
            why = "in no registry entry" if foreign else _unused(used, now)
            commits.setdefault(repo, []).append(revision.commit_hash)
            lines.append(f"{repo} at {revision.commit_hash[:8]}  {size_words(revision.size_on_disk)}  {why}")
    halves = [path for path in _halves(known) if now - path.stat().st_mtime > _IN_USE]
    lines += [f"{path}  {size_words(_size(path))}  half of a download" for path in halves]
    own = [item for item in _own() if _is_old(item.last_used, older_than, now)]
    lines += [f"{item.path}  {size_words(item.bytes)}  {_unused(item.last_used, now)}" for item in own]
    paths = (*halves, *(item.path for item in own))
    strategies = tuple(_only(repo).delete_revisions(*hashes) for repo, hashes in commits.items())
    freed = sum(int(strategy.expected_freed_size) for strategy in strategies)
    return Plan(tuple(lines), freed + sum(map(_size, paths)), paths, strategies)


def _only(repo: str) -> Any:
    """The client's cache as if it held that repository alone: it finds a revision in any that has a commit like it."""
    scanned = _scan()
    kept = frozenset(one for one in scanned.repos if (one.repo_type, one.repo_id) == ("model", repo))
    return dataclasses.replace(scanned, repos=kept)


def _is_old(used: float, older_than: int | None, now: float) -> bool:
    return older_than is not None and used < now - older_than * _DAY


def _unused(used: float, now: float) -> str:
    return f"not used for {(now - used) // _DAY:,.0f} days"


def table(items: list[Item]) -> Any:
    """A rich table of `contents`: a row for each SAE and model, and for each item of saezoo's own."""
    from rich.table import Table

    rows: dict[tuple[str, str, str], list[Item]] = {}
    for item in items:
        use = ", ".join(item.used_by) or (item.file if item.revision is None else "no registry entry")
        rows.setdefault((item.repo, (item.revision or "")[:8], use), []).append(item)
    shown = Table()
    for column in ("repository", "revision", "of", "files", "size", "last used"):
        shown.add_column(column, overflow="fold", justify="right" if column in ("files", "size") else "left")
    for place, group in rows.items():
        day = time.strftime("%Y-%m-%d", time.localtime(max(item.last_used for item in group)))
        shown.add_row(*place, str(len(group)), size_words(sum(item.bytes for item in group)), day)
    return shown


class _Known:
    """The repositories, revisions and files that the registry or the lock file names."""

    def __init__(self, registry: Registry) -> None:
        self.files: dict[tuple[str | None, str | None, str], tuple[set[str], FileFacts]] = {}
        for entries in registry.collections.values():
            for entry in entries:
                for layout in entry.layouts.values():
                    self._add(f"{entry.collection}/{entry.name}", list(hub.files_of(layout).values()))
        for name, model in registry.models.items():
            self._add(name, hub.files_of_model(model))
        locked = {(record.repo, record.revision) for record in lock.read(lock.lock_path()).values()}
        self.revisions = {(repo, revision) for repo, revision, _ in self.files if repo is not None} | locked
        self.repos = {repo for repo, _ in self.revisions}

    def _add(self, user: str, wanted: list[hub.Wanted]) -> None:
        for file in wanted:
            users, facts = self.files.setdefault((file.repo, file.revision, file.name), (set(), file.facts))
            users.add(user)

    def items(self, repo: str, revision: Any) -> Iterator[Item]:
        """The files of one cached revision."""
        for file in revision.files:
            name = file.file_path.relative_to(revision.snapshot_path).as_posix()
            users, facts = self.files.get((repo, revision.commit_hash, name), (set(), hub.UNKNOWN))
            used = _last_used(file.blob_path)
            place = (repo, revision.commit_hash, name, tuple(sorted(users)))
            yield Item(*place, file.size_on_disk, used, file.file_path, facts)


def _scan() -> Any:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None


def _revisions(known: _Known) -> list[tuple[str, Any]]:
    """Every cached revision of the known model repositories."""
    scanned = _scan()
    repos = [] if scanned is None else [repo for repo in scanned.repos if repo.repo_type == "model"]
    return [(repo.repo_id, revision) for repo in repos if repo.repo_id in known.repos for revision in repo.revisions]


def _storages(known: _Known) -> dict[str, Path]:
    """Repository -> its folder in the hub client's cache, of those that are there."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE)
    folders = {repo: root / repo_folder_name(repo_id=repo, repo_type="model") for repo in sorted(known.repos)}
    return {repo: folder for repo, folder in folders.items() if folder.is_dir()}


def _halves(known: _Known) -> list[Path]:
    return [path for folder in _storages(known).values() for path in sorted((folder / "blobs").glob("*.incomplete"))]


def _own() -> Iterator[Item]:
    for kind in OWN:
        root = files.cache_folder(kind)
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            yield Item("saezoo's own", None, f"{kind}/{path.name}", (), _size(path), _last_used(path), path)


def _below(path: Path) -> list[Path]:
    return [found for found in path.rglob("*") if found.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(found.stat().st_size for found in _below(path))


def _last_used(path: Path) -> float:
    """The last reading that the file system has noted (often once a day at most), or the last writing."""
    facts = [found.stat() for found in _below(path)]
    return max([path.stat().st_mtime, *(max(fact.st_atime, fact.st_mtime) for fact in facts)])
