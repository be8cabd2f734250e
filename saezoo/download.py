"""One file of the hub into huggingface_hub's own cache, with patience.

The client says what there is (ETag, size, link), finds the token, and its session, locks and cache layout are used. Its
own `hf_hub_download` is not: version 2.4.0 starts a file anew after any exception or kill, sleeps as long as a hub's
Retry-After says, and gives a file its final name unhashed. Here bytes are appended to a partial file that outlives the
process, and get their final name when size and hash are the promised ones. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from saezoo import files
from saezoo.errors import DownloadError, UsageError
from saezoo.transfers import Transfers

PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the second, third and fourth attempt; they begin anew whenever an attempt brought bytes."""
MAX_RETRY_AFTER = 60
"""Seconds that the hub may ask us to wait; if it asks for more, we give up and say so."""
_PASSING = (408, 429, 500, 502, 503, 504)
_T = TypeVar("_T")


class HubFile(NamedTuple):
    """A file of a model repository, at a commit."""

    repo: str
    commit: str
    name: str

    def __str__(self) -> str:
        return _words(self.repo, self.commit, self.name)


@dataclass(frozen=True)
class Reach:
    """How the hub is reached."""

    offline: bool = False
    """Never touch the network."""
    mirror: str | None = None
    """URL of another hub; None is the client's: HF_ENDPOINT or huggingface.co."""


class WrongBytes(DownloadError):
    """A file is there, or came, with another hash than the promised one."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what
        """`has sha256 … where the hub says …`"""


class _Short(Exception):
    """The connection ended without an error before the promised size, or brought more."""


def cached(repo: str, revision: str | None, name: str) -> Path | None:
    """Where the file lies in the client's cache, if it does; the revision None is `main`."""
    from huggingface_hub import try_to_load_from_cache

    with _explained(repo, revision, name):
        found = try_to_load_from_cache(repo, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def not_cached(repo: str, revision: str | None, name: str) -> DownloadError:
    """What to say offline."""
    return DownloadError(f"{_words(repo, revision, name)} is not in the cache; get it once while online")


def probe(repo: str, revision: str | None, name: str, reach: Reach, view: Transfers) -> HubFile:
    """Ask the hub whether it has the file, and tell `view` its size; gives the file at its commit.

    Raises DownloadError, one line. Without a network this fails at once.
    """
    what = _words(repo, revision, name)
    with _explained(repo, revision, what):
        found = _patiently(lambda: _metadata(repo, revision, name, reach), what, view)
    exact = HubFile(repo, found.commit_hash or "", name)
    if re.fullmatch("[0-9a-f]{40}", revision or "") and exact.commit != revision:
        raise DownloadError(f"{what}: the hub answered with commit {exact.commit}; correct --mirror or HF_ENDPOINT")
    view.expect(str(exact), _size(_partial(_blob(exact, found))), found.size, label=name)
    return exact


def listed(repo: str, revision: str | None, reach: Reach) -> set[str]:
    """Names of all files of the repository; offline, of those in the cache. Raises DownloadError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if reach.offline:
        storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
        ref = storage / "refs" / (revision or "main")
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision or ""
        root = storage / "snapshots" / commit
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} if commit else set()
    with _explained(repo, revision, repo):
        return set(HfApi(endpoint=reach.mirror).list_repo_files(repo, revision=revision))


def download(file: HubFile, branch: str | None, reach: Reach, view: Transfers) -> Path:
    """Bring the file into the cache, and note the commit as that of `branch` if one is given.

    Raises DownloadError, one line, if the attempts are used up; WrongBytes.
    """

    def attempt() -> Path:
        found = _metadata(*file, reach)  # each time: links to a CDN expire
        blob = _blob(file, found)
        with _alone(blob, view):
            if not blob.exists():
                _complete(file, found, blob, reach, view)
            return _link(file, blob, branch)

    with _explained(file.repo, file.commit, str(file)):
        path = _patiently(attempt, str(file), view)
    view.update(str(file), path.stat().st_size, path.stat().st_size)
    return path


def discard(path: Path) -> None:
    """Take a file of wrong bytes out of the cache, under its blob's name too."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _words(repo: str, revision: str | None, name: str) -> str:
    return f"{repo}/{name}" + (f" at {revision[:8]}" if revision else "")


def _metadata(repo: str, revision: str | None, name: str, reach: Reach) -> Any:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, endpoint=reach.mirror))


def _blob(file: HubFile, found: Any) -> Path:
    """Where the client's cache keeps these bytes; DownloadError if what answered is no hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not re.fullmatch(r"[\w-]+", found.etag or "") or not re.fullmatch("[0-9a-f]{40}", found.commit_hash or ""):
        raise DownloadError(
            f"{file}: what answered is no hub (no commit, no usable ETag); correct --mirror or HF_ENDPOINT"
        )
    folder: str = repo_folder_name(repo_id=file.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs" / str(found.etag)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.saezoo.incomplete")  # `.incomplete`: the hub's own tools know it as such


def _link(file: HubFile, blob: Path, branch: str | None) -> Path:
    """The blob under the file's name, as the client does it: a relative link, or itself where there are no links."""
    storage = blob.parents[1]
    path = storage / "snapshots" / str(file.commit) / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.unlink(missing_ok=True)  # a link whose blob is gone
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:
            os.replace(blob, path)
    if branch is not None:
        with files.replacing(storage / "refs" / branch) as ref:
            ref.write_text(str(file.commit), encoding="utf-8")
    return path


@contextlib.contextmanager
def _alone(blob: Path, view: Transfers) -> Iterator[None]:
    """Hold the lock of this blob; another process that has it does the work for us."""
    import filelock
    from huggingface_hub.utils import WeakFileLock

    folder = blob.parents[2] / ".locks" / blob.parents[1].name
    for needed in (folder, blob.parent):
        needed.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            view.check_stopped()
            with contextlib.suppress(filelock.Timeout):
                # The client's own lock: whoever downloads this blob by other means waits for us.
                stack.enter_context(WeakFileLock(folder / f"{blob.name}.lock", timeout=1))
                break
        yield


def _complete(file: HubFile, found: Any, blob: Path, reach: Reach, view: Transfers) -> None:
    """Go on with the partial file of an earlier attempt or process; rename it if it is what was promised."""
    partial = _partial(blob)
    if found.size is None:  # nobody could say whether the partial file is the whole
        partial.unlink(missing_ok=True)
    try:
        if found.size is None or not 0 < found.size <= _size(partial):
            _append(file, found, partial, reach, view)
    except BaseException:
        if _size(partial) == 0:
            partial.unlink(missing_ok=True)
        raise
    if found.size is not None and (size := _size(partial)) != found.size:
        if size > found.size:
            partial.unlink()
        raise _Short(f"{size:,} bytes came of {found.size:,}")
    kind = {64: "sha256", 40: "git sha1"}.get(len(blob.name))
    if kind is not None and (actual := files.digest(partial, kind)) != blob.name:
        partial.unlink()
        what = f"has {kind} {actual} where the hub says {blob.name}"
        raise WrongBytes(f"{file} {what}", what)
    os.replace(partial, blob)


def _append(file: HubFile, found: Any, partial: Path, reach: Reach, view: Transfers) -> None:
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    hub = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=reach.mirror)
    url, start = urljoin(hub, found.location), _size(partial)
    headers: dict[str, str] = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if urlsplit(url)[:2] != urlsplit(hub)[:2]:  # scheme, host and port
        headers.pop("authorization", None)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {start}-"
        )
        with partial.open("ab" if goes_on else "wb") as out:
            for chunk in response.iter_bytes():
                view.check_stopped()
                out.write(chunk)
                view.update(str(file), out.tell(), found.size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _patiently(action: Callable[[], _T], what: str, view: Transfers) -> _T:
    attempt, before = 0, view.done(what)
    while True:
        view.check_stopped()
        try:
            return action()
        except Exception as error:
            if view.done(what) > before:
                attempt, before = 0, view.done(what)
            asked = _wait(error)
            if asked is None or attempt == len(PAUSES):
                raise
            seconds = max(asked, PAUSES[attempt])
            view.note(f"{what}: {_first_line(error)}; next attempt in {seconds:.0f} s")
        attempt += 1
        view.wait(seconds)


def _wait(error: Exception) -> float | None:
    """Seconds that the hub asks to wait before another attempt, usually 0; None if another one is pointless."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        asked = _retry_after(error.response.headers)
        return asked if error.response.status_code in _PASSING and asked <= MAX_RETRY_AFTER else None
    # Without a network every attempt fails in the same way; a refused connection is not a lost one.
    lost = isinstance(error, errors.HTTPError) and type(error).__name__ not in _NOT_CONNECTED
    return 0 if lost or isinstance(error, _Short) else None


_NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
"""By name: huggingface_hub 1 raises those of httpx, 2 those of httpx2."""


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the hub asks us to wait; 0 if it does not say, or gives a date."""
    value = headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d{1,9}", value) else 0.0


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, what: str) -> Iterator[None]:
    """Turn the hub client's many exceptions into one line with the remedy."""
    from huggingface_hub import constants, errors

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
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"{what} is not in the cache; get it once while online") from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"the hub has no file {what}; correct the registry entry") from None
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{what} could not be downloaded ({_refusal(error)}") from None
    except _Short as error:
        raise DownloadError(
            f"{what} could not be downloaded ({error}); try again later, what has come is kept"
        ) from None
    except errors.HTTPError as error:  # the client library's own
        if type(error).__name__ in _NOT_CONNECTED:
            problem = f"is not in the cache and the hub cannot be reached ({_first_line(error)})"
        else:
            problem = f"could not be downloaded ({_first_line(error)}); try again later, what has come is kept"
        raise DownloadError(f"{what} {problem}") from None
    except OSError as error:
        raise files.cannot_write(Path(error.filename or constants.HF_HUB_CACHE), error) from None


def _refusal(error: Any) -> str:
    """What the hub answered, and what to do."""
    if error.response.status_code == 401:
        return "the hub refuses the token); `hf auth login`, or correct HF_TOKEN"
    seconds = _retry_after(error.response.headers)
    when = f"in {seconds:,.0f} s, as it asks" if seconds > MAX_RETRY_AFTER else "later"
    return f"{_first_line(error)}); try again {when}"


def _first_line(error: BaseException) -> str:
    """Without what a URL may hold that is secret: user and password, and the signature of a link to a CDN."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return re.sub(r"(https?://)(?:[^/\s'@]*@)?([^\s?']*)(?:\?[^\s']*)?", r"\1\2", line)
