"""From an entry to verified files on this machine, through huggingface_hub's own cache.

Every file is asked for at the registry's pinned revision and checked on every use: against the registry's SHA-256 and
size where they are known, else against the hash under which the hub itself stores the file: the name of the cache's
blob is the SHA-256 of a large file and git's SHA-1 of a small one. Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from saezoo import files
from saezoo.entries import Entry, FileFacts, Layout, Model
from saezoo.errors import DownloadError, UsageError

_UNKNOWN = FileFacts(sha256=None, bytes=None)
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Fetched:
    """Local paths of one SAE's files, and how each was verified."""

    weights: Path
    config: Path | None
    sparsity: Path | None
    checks: dict[str, str]
    """File name -> `registry sha256`, `hub sha256`, `hub git sha1`, `registry size` or `not verifiable`."""


def layout_of(entry: Entry, layout: str | None = None) -> Layout:
    """The layout called `layout`, or the entry's first; UsageError if it has none of that name."""
    name = layout or next(iter(entry.layouts))
    if name not in entry.layouts:
        known = ", ".join(entry.layouts)
        raise UsageError(f"{entry.collection} {entry.name} has no layout `{name}`; it has: {known}")
    return entry.layouts[name]


def fetch(entry: Entry, layout: str | None = None, *, offline: bool = False) -> Fetched:
    """Make the files of `entry` present and verified; download what is missing unless `offline`.

    Raises DownloadError if a file is neither cached nor reachable, or is not the promised one.
    """
    chosen = layout_of(entry, layout)
    checks: dict[str, str] = {}

    def get(name: str, role: str) -> Path:
        path = _locate(chosen.repo, chosen.revision, chosen.folder, name, offline=offline)
        checks[name] = verify(path, chosen.facts.get(role, _UNKNOWN))
        return path

    return Fetched(
        weights=get(chosen.weights, "weights"),
        config=None if chosen.config is None else get(chosen.config, "config"),
        sparsity=None if chosen.sparsity is None else get(chosen.sparsity, "sparsity"),
        checks=checks,
    )


def fetch_model(model: Model, *, offline: bool = False) -> Path:
    """Folder with the verified files of `model`: config.json, model.safetensors, tokenizer.json, and all in `facts`."""
    folder = None
    for name in dict.fromkeys((*_MODEL_FILES, *model.facts)):
        path = _locate(model.repo, model.revision, model.folder, name, offline=offline)
        verify(path, model.facts.get(name, _UNKNOWN))
        folder = path.parent
    assert folder is not None
    return folder


def fetch_named_model(name: str, *, offline: bool = False) -> Path:
    """Folder of a model given as a local folder or a hub id; a hub id is taken at `main`, unpinned."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"model `{name}` is neither a folder here nor a hub id like `openai-community/gpt2`")
    for file in _MODEL_FILES:
        path = _locate(name, None, None, file, offline=offline)
        verify(path, _UNKNOWN)
    return path.parent


def verify(path: Path, facts: FileFacts) -> str:
    """Check the bytes of `path`; says against what. Raises DownloadError if they are not the promised ones."""
    size = path.stat().st_size
    if facts.bytes is not None and size != facts.bytes:
        raise DownloadError(_wrong(path, f"has {size:,} bytes where the registry says {facts.bytes:,}"))
    blob = path.resolve().name
    if facts.sha256 is not None:
        promised, actual, check = facts.sha256, files.sha256(path), "registry sha256"
    elif re.fullmatch("[0-9a-f]{64}", blob):
        promised, actual, check = blob, files.sha256(path), "hub sha256"
    elif re.fullmatch("[0-9a-f]{40}", blob):
        promised, actual, check = blob, files.git_sha1(path), "hub git sha1"
    else:
        return "not verifiable" if facts.bytes is None else "registry size"
    if actual != promised:
        whose, kind = check.split(" ", 1)
        raise DownloadError(_wrong(path, f"has {kind} {actual} where the {whose} says {promised}"))
    return check


def _wrong(path: Path, what: str) -> str:
    return f"{path} {what}; the file is damaged or was replaced: delete {path.resolve()} and get it again"


def _locate(repo: str | None, revision: str | None, folder: str | None, name: str, *, offline: bool) -> Path:
    if repo is None:
        path = Path(folder or ".") / name
        if not path.is_file():
            raise DownloadError(f"no file {path}; the registry entry's `folder` must hold it")
        return path
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    with _explained(repo, revision, name):
        cached = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(cached, str) and (revision is not None or offline):
            return Path(cached)
        if offline:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        if not isinstance(cached, str):
            # One request that fails at once without a network; the download itself would retry for 23 s first.
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
        return Path(hf_hub_download(repo, name, revision=revision))


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, name: str) -> Iterator[None]:
    """Turn the hub client's many exceptions into one line with the remedy."""
    from huggingface_hub import errors

    what = f"{repo}/{name}" + (f" at {revision[:8]}" if revision else "")
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"`{repo}` is no hub id: {_first_line(error)}") from None
    except errors.GatedRepoError:
        raise DownloadError(f"{repo} is gated: accept its terms on its hub page, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"the hub has no repository {repo} (or it is private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{repo} has no revision {revision}; correct the registry entry") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise DownloadError(f"{what} is not in the cache; get it once while online") from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"the hub has no file {what}; correct the registry entry") from None
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{what} could not be downloaded ({_first_line(error)}); try again later") from None
    except errors.HTTPError as error:  # the client library's own: no network, connection lost
        raise DownloadError(
            f"{what} is not in the cache and the hub cannot be reached ({_first_line(error)})"
        ) from None
    except OSError as error:
        raise files.cannot_write(Path(error.filename or what), error) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
