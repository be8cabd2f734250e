"""`push`: a run, or one SAE, to a model repository on the hub, with a card and a registry file that pins it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saezoo import files, formats
from saezoo.errors import UploadError, UsageError
from saezoo.model_card import Card, CardSAE, render
from saezoo.records import Record, is_run, read_record
from saezoo.registry import Registry, read_registry
from saezoo.results import write_text
from saezoo.sae_config import SAEConfig, config_from

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SAE_FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
_PICTURES = ("training.png", "density.png", "published.png")
_RUN_FILES = ("eval.csv", "run.json", "log.csv", *_PICTURES)
_LATE = ("README.md", "registry.yaml")
"""Files that name the commit of the others, and so are uploaded after them."""


@dataclass(frozen=True)
class Parcel:
    """What a push uploads."""

    repo: str
    files: Mapping[str, Path]
    """Path in the repository -> file."""
    card: Card
    record: Record | None
    """None if the SAE's model is in no registry: then there is no registry.yaml either."""

    def late(self, revision: str | None) -> dict[str, Path]:
        """Write README.md and registry.yaml for the commit `revision` of the other files; path in the repository ->
        file. They lie in saezoo's cache, the run folder stays as it is."""
        folder = files.cache_folder("push") / self.repo.replace("/", "--")
        write_text(folder / "README.md", render(dataclasses.replace(self.card, revision=revision)))
        if self.record is None:
            return {"README.md": folder / "README.md"}
        head = f"# Use it: saezoo --registry THIS_FILE list. The files lie on the hub in {self.repo}.\n"
        content = self.record.content("hub", repo=self.repo, revision=revision or "0" * 40)
        for name, model in content.get("models", {}).items():
            if model["repo"] is None:  # a folder of ours is nothing to others
                model["folder"] = name
        dumped = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
        write_text(folder / "registry.yaml", head + str(dumped))
        return {name: folder / name for name in _LATE}


def pack(path: Path, repo: str, registry: str | Path | None = None) -> Parcel:
    """What `push` would upload of a run folder or of one SAE's folder; touches no network.

    Raises UsageError for a repository that no hub can have and for a folder without SAEs, TrainingError for a run that
    is not finished, WeightsError for files that are no SAE.
    """
    _check_name(repo)
    if not path.is_dir():
        raise UsageError(f"no folder {path}; push takes a run folder, or the folder of one SAE")
    return _run(path, repo) if is_run(path) else _single(path, repo, read_registry(registry))


def push(
    parcel: Parcel,
    *,
    private: bool = False,
    mirror: str | None = None,
    agree: Callable[[list[str]], None],
    note: Callable[[str], None] = lambda message: None,
) -> str:
    """Upload `parcel`: its files in one commit, then the card and registry.yaml, which name that commit.

    Args:
        private: for a repository that is made; one that is there must be private already.
        mirror: the hub's address, by default HF_ENDPOINT's.
        agree: called with the files there that would change; raises to stop before anything is.
        note: gets one-line remarks.

    Returns the repository's address. Raises UploadError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=mirror)
    with _explained(parcel.repo, api.endpoint):
        there = _there(api, parcel.repo, private)
        new = {name: path for name, path in parcel.files.items() if not _same(path, (there or {}).get(name))}
        revision = _pinned(api, parcel) if there and not new else None
    late = parcel.late(revision)
    changing = {name: path for name, path in {**new, **late}.items() if not _same(path, (there or {}).get(name))}
    if not changing:
        note(f"{parcel.repo} has all of it already")
        return f"{api.endpoint}/{parcel.repo}"
    if over := sorted(set(changing) & set(there or ())):
        agree(over)
    with _explained(parcel.repo, api.endpoint):
        if there is None:
            api.create_repo(parcel.repo, private=private, exist_ok=True)
        if revision is None:
            if new:
                note(f"uploading {len(new)} files, {sum(path.stat().st_size for path in new.values()):,} bytes")
            revision = _commit(api, parcel.repo, parcel.files, f"saezoo: {parcel.card.collection}")
        _commit(api, parcel.repo, parcel.late(revision), f"saezoo: card of {parcel.card.collection}")
    return f"{api.endpoint}/{parcel.repo}"


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--repo {repo}: {' '.join(str(error).split())}") from None
    if "/" not in repo:
        raise UsageError(f"--repo {repo}: say whose it is, as in OWNER/{repo}")


def _run(path: Path, repo: str) -> Parcel:
    """Of a finished run."""
    record = read_record(path, read_registry(""), name=None, model=None, licence=None)
    sae_files = [file for roles in record.files for file in roles.values()]
    content = {file.relative_to(path).as_posix(): file for file in sae_files}
    content |= {name: path / name for name in _RUN_FILES if (path / name).is_file()}
    rows = _rows(path / "eval.csv")
    run = _json(path / "run.json")
    known = read_registry(path / "registry.yaml")
    dataset = known.datasets.get(str(run.get("text", "")).removeprefix("dataset:"))
    folders = [roles["weights"].parent.relative_to(path).as_posix() for roles in record.files]
    names = [entry.name for entry in known.collections[record.name]]
    saes = tuple(
        CardSAE(name, folder, config, rows.get(name))
        for name, folder, config in zip(names, folders, record.configs, strict=True)
    )
    card = _card(record, repo, saes, known)
    card = dataclasses.replace(
        card,
        datasets=(dataset.repo,) if dataset is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset.repo) else (),
        run=run,
        pictures=tuple(name for name in _PICTURES if name in content),
    )
    return Parcel(repo, content, card, record)


def _single(path: Path, repo: str, known: Registry) -> Parcel:
    """Of one SAE's folder, about which no more is known than its own configuration."""
    if formats.files_at(path).format != "saelens":
        raise UsageError(f"{path} is not in the published layout; `saezoo convert {path} NEW --to saelens` makes that")
    weights = formats.read(path)
    config = config_from(weights.config, str(path), *weights.tensors["W_enc"].shape)
    folder = _folder(config)
    content = {f"{folder}/{name}": path / name for name in _SAE_FILES if (path / name).is_file()}
    name = repo.split("/")[1]
    record = None
    if config.model_name in known.models and config.hook is not None:
        record = read_record(path, known, name=name, model=None, licence=None)
        in_repo = {role: f"{{hook}}/{file.name}" for role, file in record.files[0].items()}
        record = dataclasses.replace(record, layout=record.layout | in_repo)
        saes = (CardSAE(record.collection["saes"][0]["name"], folder, config, None),)
        return Parcel(repo, content, _card(record, repo, saes, known), record)
    saes = (CardSAE(folder, folder, config, None),)
    card = Card(name, name, repo, None, config.model_name, None, False, None, (), saes, None, overlay=False)
    return Parcel(repo, content, card, None)


def _card(record: Record, repo: str, saes: tuple[CardSAE, ...], known: Registry) -> Card:
    name = record.collection["model"]
    return Card(
        title=record.collection["title"],
        collection=record.name,
        repo=repo,
        revision=None,
        model_name=name,
        model_repo=known.models[name].repo,
        model_bundled=name not in record.models and known.models[name].repo is None,
        licence=record.collection["licence"],
        datasets=(),
        saes=saes,
        recipe=record.recipe,
    )


def _folder(config: SAEConfig) -> str:
    """Where the SAE goes in the repository: SAELens takes the folder's name as the SAE's."""
    return "sae" if config.hook is None else config.hook


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """Layer -> its row of the evaluation; none without one."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row.get("layer", ""): row for row in csv.DictReader(file)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}; restore it") from None
    return found if isinstance(found, dict) else {}


def _there(api: HfApi, repo: str, private: bool) -> dict[str, str] | None:
    """`_hashes` of the repository, None if there is none. UsageError if it is public and shall be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise UsageError(f"{repo} is there and public; leave --private out, or choose another --repo")
    return _hashes(api, repo, None)


def _hashes(api: HfApi, repo: str, revision: str | None) -> dict[str, str]:
    """Path -> hash of every file there: SHA-256 of large ones, git's SHA-1 of others."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    found = [item for item in tree if isinstance(item, RepoFile)]
    return {file.path: file.blob_id if file.lfs is None else file.lfs.sha256 for file in found}


def _same(path: Path, known: str | None) -> bool:
    """Whether the file has the hash that the hub tells."""
    return known is not None and known == (files.sha256(path) if len(known) == 64 else files.git_sha1(path))


def _pinned(api: HfApi, parcel: Parcel) -> str | None:
    """The commit that the card in the repository names, if all files of the parcel are in it as they are."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        text = Path(api.hf_hub_download(parcel.repo, "README.md")).read_text(encoding="utf-8")
        found = re.search(r"revision='([0-9a-f]{40})'", text)
        known = _hashes(api, parcel.repo, found[1]) if found else {}
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return found[1] if found and all(_same(path, known.get(name)) for name, path in parcel.files.items()) else None


def _commit(api: HfApi, repo: str, content: Mapping[str, Path], message: str) -> str:
    """One commit with all of `content`; its id, or the newest one's if nothing differs."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, str(path)) for name, path in content.items()]
    return str(api.create_commit(repo, operations, commit_message=message).oid)


@contextlib.contextmanager
def _explained(repo: str, endpoint: str) -> Iterator[None]:
    """Turn the hub client's exceptions into one line with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401:
            raise UploadError(f"the hub does not know you: `hf auth login`, or set HF_TOKEN, to write {repo}") from None
        if code == 403:
            raise UploadError(
                f"your token may not write to {repo}; give it that right, or choose another --repo"
            ) from None
        raise UploadError(f"the hub refused the upload to {repo} ({_first_line(error)})") from None
    except errors.OfflineModeIsEnabled:
        raise UploadError("HF_HUB_OFFLINE is set; unset it to upload, or look first: --dry-run") from None
    except errors.HTTPError as error:  # the client library's own: no network, connection lost
        raise UploadError(f"the hub at {endpoint} cannot be reached ({_first_line(error)})") from None
    except OSError as error:  # Xet's; a hub without it needs the older way
        hint = "the same command again goes on; for a hub without Xet set HF_HUB_DISABLE_XET=1"
        raise UploadError(f"the upload to {repo} failed ({_first_line(error)}); {hint}") from None
    except (RuntimeError, ValueError) as error:  # of one file, and of what the hub thinks of the card
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ else ""
        why = f"{_first_line(error)}{cause}"
        raise UploadError(f"the upload to {repo} failed ({why}); the same command again goes on") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
