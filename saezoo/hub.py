"""From an entry to verified files on this machine, through huggingface_hub's own cache.

Every file is asked for at the registry's pinned revision and checked on every use: against the registry's SHA-256 and
size where they are known, else against the hash under which the hub itself stores the file (the name of the cache's
blob is the SHA-256 of a large file and git's SHA-1 of a small one) and what saezoo.lock remembers of its first use.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from saezoo import download, files, lock
from saezoo.download import HubFile, Reach, WrongBytes
from saezoo.entries import Entry, FileFacts, Layout, Model
from saezoo.errors import DownloadError, UsageError
from saezoo.sae_config import FOLDERS
from saezoo.transfers import Transfers

UNKNOWN = FileFacts(sha256=None, bytes=None)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Fetched:
    """Local paths of one SAE's files, and how each was verified."""

    weights: Path
    config: Path | None
    sparsity: Path | None
    checks: dict[str, str]
    """File name -> `registry sha256`, `saezoo.lock sha256`, `hub sha256, now in saezoo.lock` or the like with `git
    sha1`, `registry size` or `not verifiable`."""


class Wanted(NamedTuple):
    """A file that is needed here: in a repository, or else in `folder`."""

    repo: str | None
    revision: str | None
    folder: str | None
    name: str
    facts: FileFacts


def layout_of(entry: Entry, layout: str | None = None) -> Layout:
    """The layout called `layout`, or the entry's first; UsageError if it has none of that name."""
    name = layout or next(iter(entry.layouts))
    if name not in entry.layouts:
        known = ", ".join(entry.layouts)
        raise UsageError(f"{entry.collection} {entry.name} has no layout `{name}`; it has: {known}")
    return entry.layouts[name]


def files_of(layout: Layout) -> dict[str, Wanted]:
    """`weights`, `config`, `sparsity` -> the file, of those that the layout has."""
    names = {"weights": layout.weights, "config": layout.config, "sparsity": layout.sparsity}
    return {
        role: Wanted(layout.repo, layout.revision, layout.folder, name, layout.facts.get(role, UNKNOWN))
        for role, name in names.items()
        if name is not None
    }


def files_of_model(model: Model) -> list[Wanted]:
    """config.json, model.safetensors, tokenizer.json, and all in `facts`."""
    names = dict.fromkeys((*MODEL_FILES, *model.facts))
    return [Wanted(model.repo, model.revision, model.folder, name, model.facts.get(name, UNKNOWN)) for name in names]


def fetch(entry: Entry, layout: str | None = None, *, offline: bool = False) -> Fetched:
    """Make the files of `entry` present and verified; download what is missing unless `offline`.

    Raises DownloadError if a file is neither cached nor reachable, or is not the promised one.
    """
    return fetch_all([entry], layout, offline=offline)[0]


def fetch_all(
    entries: Sequence[Entry], layout: str | None = None, *, offline: bool = False, mirror: str | None = None
) -> list[Fetched]:
    """The same for several entries, with several files at once; `mirror` is the URL of another hub."""
    wanted = [files_of(layout_of(entry, layout)) for entry in entries]
    got = iter(_get([file for roles in wanted for file in roles.values()], Reach(offline, mirror)))
    fetched = []
    for roles in wanted:
        here = {role: next(got) for role in roles}
        paths = {role: path for role, (path, _) in here.items()}
        checks = {roles[role].name: check for role, (_, check) in here.items()}
        fetched.append(Fetched(paths["weights"], paths.get("config"), paths.get("sparsity"), checks))
    return fetched


def fetch_model(model: Model, *, offline: bool = False, mirror: str | None = None) -> Path:
    """Folder with the verified files of `model`."""
    return _get(files_of_model(model), Reach(offline, mirror))[0][0].parent


def fetch_named_model(name: str, *, offline: bool = False) -> Path:
    """Folder of a model given as a local folder or a hub id; a hub id is taken at `main`, unpinned."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"model `{name}` is neither a folder here nor a hub id like `openai-community/gpt2`")
    first, *rest = MODEL_FILES
    [(path, _)] = _get([Wanted(name, None, None, first, UNKNOWN)], Reach(offline))
    commit = path.parent.name  # of this one for all: the branch may move meanwhile
    _get([Wanted(name, commit, None, file, UNKNOWN) for file in rest], Reach(offline))
    return path.parent


def fetch_sae(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The verified files of an SAE named as `owner/repository/folder` or `owner/repository/file.pt`, of any format of
    docs/formats.md: the folder, or the file. Without a revision it is taken at `main`, unpinned.

    Raises UsageError for a name of another form, DownloadError if the hub has no SAE there.
    """
    if not is_hub_name(name):
        raise UsageError(f"`{name}` is no name of an SAE on the hub: owner/repository/folder")
    if revision is not None and (".." in revision or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision)):
        raise UsageError(f"`{revision}` is no revision of {name}: a commit, a branch or a tag")
    owner, repository, *rest = name.rstrip("/").split("/")
    repo, inside, reach = f"{owner}/{repository}", "/".join(rest), Reach(offline)
    listed = download.listed(repo, revision, reach)
    wanted = _files_inside(inside, listed)
    if not wanted:
        ends = tuple(f"/{file}" for file in FOLDERS)
        folders = sorted({file.rpartition("/")[0] for file in listed if f"/{file}".endswith(ends)} - {""})
        hint = f"; there are SAEs in {', '.join(folders[:5])}{' …' if len(folders) > 5 else ''}" if folders else ""
        where = "in the cache" if offline else "on the hub"
        raise DownloadError(f"{name} {where} holds none of {', '.join(FOLDERS)}{hint}")
    path = _get([Wanted(repo, revision, None, file, UNKNOWN) for file in wanted], reach)[0][0]
    return path if wanted[0] == inside else path.parent


def is_hub_name(name: str) -> bool:
    """Whether it could be `owner/repository`, with folders and a file below it."""
    fits = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.:+=-]+)*/?", name)
    return fits is not None and not {".", ".."} & set(name.split("/"))


def _files_inside(inside: str, listed: set[str]) -> list[str]:
    """Those of `listed` that make up the SAE there: weights first."""
    if inside in listed and inside.rpartition("/")[2] not in FOLDERS:
        return [inside]
    folder = inside.rpartition("/")[0] if inside in listed else inside
    for weights, config in FOLDERS.items():
        names = [f"{folder}/{name}".lstrip("/") for name in (weights, config, "sparsity.safetensors") if name]
        if names[0] in listed and (inside == folder or names[0] == inside):
            return [name for name in names if name in listed]
    return []


def verify(path: Path, facts: FileFacts) -> str:
    """Check the bytes of `path`; says against what. Raises DownloadError if they are not the promised ones."""
    size = path.stat().st_size
    if facts.bytes is not None and size != facts.bytes:
        raise _damaged(path, f"has {size:,} bytes where the registry says {facts.bytes:,}")
    blob = path.resolve().name
    if facts.sha256 is not None:
        promised, whose, kind = facts.sha256, "registry", "sha256"
    elif re.fullmatch("[0-9a-f]{64}", blob):
        promised, whose, kind = blob, "hub", "sha256"
    elif re.fullmatch("[0-9a-f]{40}", blob):
        promised, whose, kind = blob, "hub", "git sha1"
    else:
        return "not verifiable" if facts.bytes is None else "registry size"
    if (actual := files.digest(path, kind)) != promised:
        raise _damaged(path, f"has {kind} {actual} where the {whose} says {promised}")
    return f"{whose} {kind}"


def verify_cached(path: Path, file: HubFile, facts: FileFacts, *, remember: bool = True) -> str:
    """As `verify`, and against the lock file where the registry has no SHA-256; a first use is written there.

    A lock file that cannot be written is no error: the answer says so.
    """
    check = verify(path, facts)
    if facts.sha256 is not None:
        return check
    where = lock.lock_path()
    found = lock.read(where).get(file)
    if found is None and not remember:
        return check
    known = found
    if known is None:
        kind = "git sha1" if check == "hub git sha1" else "sha256"
        size = path.stat().st_size
        seen = lock.Record(file.repo, file.commit, file.name, kind, files.digest(path, kind), size, lock.today())
        try:
            known = lock.remember(where, seen)
        except lock.NotWritten as error:
            return f"{check}, not in the lock file: {error}"
    if (actual := files.digest(path, known.kind)) != known.hash:
        what = f"has {known.kind} {actual} where {where} says {known.hash} since {known.first_seen}"
        raise WrongBytes(
            f"{path} {what}; it changed at its source or on its way: do not use it, or delete its record", what
        )
    return f"{where.name} {known.kind}" if found else f"{check}, now in {where.name}"


def _damaged(path: Path, what: str) -> WrongBytes:
    remedy = f"the file is damaged or was replaced: delete {path.resolve()} and get it again"
    return WrongBytes(f"{path} {what}; {remedy}", what)


def _get(wanted: Sequence[Wanted], reach: Reach) -> list[tuple[Path, str]]:
    """Path and check of each file, in order. Nothing is downloaded before the hub has said that it has all of them."""
    with Transfers() as view:
        places = view.run([partial(_find, file, reach, view) for file in wanted])
        jobs = [partial(_bring, file, place, reach, view) for file, place in zip(wanted, places, strict=True)]
        return view.run(jobs)


def _find(file: Wanted, reach: Reach, view: Transfers) -> Path | HubFile:
    """Where the file lies on this machine, or what must be downloaded."""
    if file.repo is None:
        path = Path(file.folder or ".") / file.name
        if not path.is_file():
            raise DownloadError(f"no file {path}; the registry entry's `folder` must hold it")
        return path
    here = download.cached(file.repo, file.revision, file.name)
    if here is not None and (file.revision is not None or reach.offline):
        return here
    if reach.offline:
        raise download.not_cached(file.repo, file.revision, file.name)
    try:
        exact = download.probe(file.repo, file.revision, file.name, reach, view)
    except DownloadError:
        if here is None:
            raise
        return here  # of a branch, as it was when the hub could be reached
    return download.cached(*exact) or exact


def _bring(file: Wanted, place: Path | HubFile, reach: Reach, view: Transfers) -> tuple[Path, str]:
    """The file, verified. What arrives wrong is fetched once more, and never stays in the cache."""
    if isinstance(place, Path):
        return place, _check(file, place)
    problem = ""
    for _ in range(2):
        try:
            path = download.download(
                place, None if file.revision == place.commit else file.revision or "main", reach, view
            )
        except WrongBytes as error:
            problem = error.what
            continue
        try:
            return path, _check(file, path)
        except WrongBytes as error:
            problem = error.what
            download.discard(path)
    raise DownloadError(f"{place} {problem}, twice; nothing of it was kept: try again later, or another --mirror")


def _check(file: Wanted, path: Path) -> str:
    if file.repo is None:
        return verify(path, file.facts)
    commit = path.parents[file.name.count("/")].name
    return verify_cached(path, HubFile(file.repo, commit, file.name), file.facts)
