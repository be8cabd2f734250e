"""Tokens on disk, so that no text is tokenised twice. Never activations: they are a thousand times larger.

A cache is a folder `root/<key>`; the key is a hash of the text's and the tokenizer's identity. In it lie shards of
consecutive documents, `NNNNNN.tokens` (their ids, little-endian, without BOS) and `NNNNNN.ends` (int64: where each
document ends), and `meta.json`, which lists the shards that count. What a shard holds follows from key and number
alone. So processes need no lock: whoever writes a shard writes the same bytes, and a kill costs the unlisted shard.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saezoo import files
from saezoo.errors import TextError
from saezoo.tokens import TextSource

VERSION = 1
SHARD_DOCUMENTS = 4096
SHARD_TOKENS = 8_000_000
Ids = NDArray[np.uint16] | NDArray[np.uint32]
"""Token ids of one document [n], read-only; uint32 if the vocabulary has more than 65,536 entries."""

_BATCH_DOCUMENTS = 1000  # in one call of the tokenizer, which spreads them over all cores
_BATCH_CHARACTERS = 4_000_000  # bounds its memory, and the time until the thread sees that it shall stop
_STALE_S = 3600  # a temporary file is renamed within seconds; one this old was left by a kill
_JOIN_S = 10.0  # longer than a batch takes; a read from a dead network must not hold up the exit


@dataclass(frozen=True)
class _Shard:
    documents: int
    tokens: int
    crc32_tokens: int
    crc32_ends: int


@dataclass(frozen=True)
class _Contents:
    """What meta.json lists; `complete` if the last shard ends with the text."""

    shards: tuple[_Shard, ...] = ()
    complete: bool = False


class TokenCache:
    """The tokens of one text by one tokenizer, in a folder that grows as they are asked for.

    `source`: the text; `tokenizer`: a fast tokenizer of transformers; `root`: usually `files.cache_folder("tokens")`;
    `note` gets one-line remarks for the user. A shard ends with its `shard_documents`th document, or with the one that
    brings it to `shard_tokens` tokens.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        root: Path,
        note: Callable[[str], None] = lambda message: None,
        *,
        shard_documents: int = SHARD_DOCUMENTS,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._source, self._tokenizer, self._note = source, _Frozen.of(tokenizer), note
        self._limits = (shard_documents, shard_tokens)
        self._text = _identity(source)
        rest = json.dumps([VERSION, self._limits, self._text, self._tokenizer.split_special_tokens])
        self.folder = root / hashlib.sha256((rest + self._tokenizer.state).encode()).hexdigest()[:16]
        self.dtype = np.dtype("<u2" if self._tokenizer.vocab <= 1 << 16 else "<u4")
        self._lock = threading.Lock()  # several walks over one cache may be under way in this process
        self._sound: set[int] = set()
        stored = self._stored()
        self._contents = stored or _Contents()
        if stored is None:
            note("token cache: meta.json is damaged; tokenising again")
        for number, shard in enumerate(self._contents.shards):
            if not self._has_sizes(number, shard):
                self._cut(number)
                break
        if self._contents.shards and source.dataset is not None and source.dataset.revision is None:
            note(f"token cache: {source.name} has no pinned revision; if it has changed, delete {self.folder}")

    def documents(self, start: int = 0) -> Iterator[Ids]:
        """The ids of every document from number `start` on, as `tokens.encode` gives them, without BOS.

        Finished shards come from the disk. Where they end, the text is tokenised on, one shard ahead of what has been
        yielded; that work stops when the iterator is closed or collected. Raises what reading the text raises, and
        TextError if the text is not the one that the finished shards were made of.
        """
        encoder = _Encoder(self._source, self._text, self._tokenizer, self.dtype, self.folder)
        ahead = _Ahead(lambda: self._make_next(encoder), encoder.stop)
        number = first = 0
        try:
            while True:
                contents = self._contents
                if number >= len(contents.shards):
                    if contents.complete:
                        return
                    self._wait(ahead)
                    continue
                shard = contents.shards[number]
                if first + shard.documents > start:
                    opened = self._open(number, shard)
                    if opened is None:
                        self._cut(number)
                        continue
                    # Not before the finished shards have once run out: a repeated run would make one more each time.
                    if ahead.used and number + 1 == len(contents.shards) and not contents.complete:
                        ahead.begin()
                    yield from _split(*opened, max(0, start - first))
                first += shard.documents
                number += 1
        finally:
            ahead.close()

    def _wait(self, ahead: _Ahead) -> None:
        if not ahead.used:
            self._note(f"token cache: tokenising {self._source.name} into {self.folder}")
            files.check_writable(self.folder / "meta.json")
            for path in self.folder.glob(".*"):
                with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
                    if time.time() - path.stat().st_mtime > _STALE_S:
                        path.unlink()
        ahead.wait()

    def _make_next(self, encoder: _Encoder) -> None:
        """Write and list the next shard, unless another process has; on the background thread."""
        mine = self._contents
        theirs = _longer(mine, self._stored() or _Contents())
        if theirs != mine:
            self._contents = theirs
            return
        done = sum(shard.documents for shard in mine.shards)
        documents, ended = encoder.take(done, *self._limits)
        new = (self._write_shard(len(mine.shards), documents),) if documents else ()
        with self._lock:
            stored = self._stored() or _Contents()
            self._contents = _longer(_Contents(mine.shards + new, ended), stored)
            if self._contents != stored:
                self._write_meta()

    def _write_shard(self, number: int, documents: list[Ids]) -> _Shard:
        tokens = np.concatenate(documents).tobytes()
        ends = np.cumsum([len(ids) for ids in documents], dtype="<i8").tobytes()
        for path, content in zip(self._paths(number), (tokens, ends), strict=True):
            _write(path, content)
        return _Shard(len(documents), len(tokens) // self.dtype.itemsize, zlib.crc32(tokens), zlib.crc32(ends))

    def _write_meta(self) -> None:
        about = {"version": VERSION, "text": self._source.name, "vocab": self._tokenizer.vocab}
        content = {**about, "dtype": self.dtype.name, **asdict(self._contents)}
        _write(self.folder / "meta.json", json.dumps(content, indent=1).encode())

    def _stored(self) -> _Contents | None:
        """What meta.json on disk lists, which other processes add to; None if it is damaged."""
        path = self.folder / "meta.json"
        try:
            content = json.loads(path.read_bytes())
            if content["version"] > VERSION:
                raise TextError(
                    f"{path} is of version {content['version']}, this saezoo reads up to {VERSION}; "
                    f"update saezoo, or delete {self.folder}"
                )
            return _Contents(tuple(_Shard(**shard) for shard in content["shards"]), content["complete"])
        except (FileNotFoundError, NotADirectoryError):  # the latter is told when it comes to writing
            return _Contents()
        except OSError as error:
            raise TextError(f"{path} cannot be read ({error.strerror}); choose another cache folder") from None
        except (ValueError, KeyError, TypeError):
            return None

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"{number:06d}.tokens", self.folder / f"{number:06d}.ends"

    def _has_sizes(self, number: int, shard: _Shard) -> bool:
        found = [path.stat().st_size if path.is_file() else None for path in self._paths(number)]
        return found == [shard.tokens * self.dtype.itemsize, shard.documents * 8]

    def _open(self, number: int, shard: _Shard) -> tuple[Ids, NDArray[np.int64]] | None:
        """All ids of a shard, mapped, and the documents' ends in it; None if the files are not the listed ones."""
        tokens_path, ends_path = self._paths(number)
        try:
            if not self._has_sizes(number, shard):
                return None
            ends = np.fromfile(ends_path, "<i8")
            mapped = np.memmap(tokens_path, self.dtype, "r") if shard.tokens else np.empty(0, self.dtype)
        except (OSError, ValueError):  # taken away or cut since its size was looked at
            return None
        ids = np.asarray(mapped)
        if number not in self._sound:
            if (zlib.crc32(ids.data), zlib.crc32(ends.data)) != (shard.crc32_tokens, shard.crc32_ends):
                return None
            self._sound.add(number)
        return ids, ends

    def _cut(self, number: int) -> None:
        """List a damaged shard no more, nor those after it."""
        self._note(f"token cache: shard {number:06d} is damaged; tokenising it again")
        with self._lock:
            self._contents = _Contents(self._contents.shards[:number])
            self._write_meta()


def _longer(mine: _Contents, theirs: _Contents) -> _Contents:
    """The further of two lists; mine if they do not begin alike."""
    alike = all(a == b for a, b in zip(mine.shards, theirs.shards, strict=False))
    return max(mine, theirs, key=lambda listed: (len(listed.shards), listed.complete)) if alike else mine


def _split(ids: Ids, ends: NDArray[np.int64], skip: int) -> Iterator[Ids]:
    bounds = [0, *ends.tolist()]
    for begin, end in zip(bounds[skip:], bounds[skip + 1 :], strict=False):
        yield ids[begin:end]


def _write(path: Path, content: bytes) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else meta.json might outlive a power cut that the shards do not


def _identity(source: TextSource) -> list[object]:
    """What tells this text from others, as plain values."""
    if source.path is not None:
        try:
            return [files.sha256(source.path), ".jsonl" in source.path.suffixes, source.path.suffix == ".xz"]
        except FileNotFoundError:
            raise TextError(f"no file {source.path}") from None
        except OSError as error:
            raise TextError(f"{source.path} cannot be read: {error}") from None
    spec = source.dataset
    assert spec is not None
    return [spec.repo, spec.revision or "unpinned", spec.data_files, spec.split, spec.text_column]


@dataclass(frozen=True)
class _Frozen:
    """A tokenizer's state: for the key, and for a copy, since another thread must not share the original."""

    state: str
    split_special_tokens: bool
    vocab: int

    @classmethod
    def of(cls, tokenizer: Any) -> _Frozen:
        backend = tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:  # left there by an earlier call
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        vocab = max(tokenizer.get_vocab().values()) + 1
        return cls(backend.to_str(), bool(tokenizer.split_special_tokens), vocab)

    def thaw(self) -> Any:
        from tokenizers import Tokenizer

        copy: Any = Tokenizer.from_str(self.state)
        copy.encode_special_tokens = self.split_special_tokens
        return copy


class _Encoder:
    """Tokenises a text from any document on; used by one thread at a time."""

    def __init__(
        self, source: TextSource, identity: list[object], frozen: _Frozen, dtype: np.dtype[Any], folder: Path
    ) -> None:
        self.stop = threading.Event()
        self._source, self._identity, self._frozen, self._dtype = source, identity, frozen, dtype
        self._folder = folder  # for what to tell the user
        self._tokenizer: Any = None
        self._rewind()

    def _rewind(self) -> None:
        self._texts = self._checked_texts()
        self._pending: deque[Ids] = deque()
        self._position = 0  # number of the document that is first in _pending, or comes next

    def take(self, start: int, n_documents: int, n_tokens: int) -> tuple[list[Ids], bool]:
        """Documents from `start` on until there are as many of either; and whether the text ended before that."""
        self._seek(start)
        taken: list[Ids] = []
        tokens = 0
        while len(taken) < n_documents and tokens < n_tokens:
            if not self._pending:
                self._tokenise_batch()
            if not self._pending:
                return taken, True
            taken.append(self._pending.popleft())
            tokens += len(taken[-1])
            self._position += 1
        return taken, False

    def _seek(self, start: int) -> None:
        if self._position > start:  # what has been made already is found damaged
            self._rewind()
        while self._position < start:
            if self._pending:
                self._pending.popleft()
            elif next(self._texts, None) is None:
                raise TextError(
                    f"{self._source.name} has {self._position:,} documents, but {start:,} were tokenised before: "
                    f"it has changed; delete {self._folder}"
                )
            self._position += 1

    def _tokenise_batch(self) -> None:
        batch: list[str] = []
        characters = 0
        while len(batch) < _BATCH_DOCUMENTS and characters < _BATCH_CHARACTERS:
            text = next(self._texts, None)
            if text is None:
                break
            batch.append(text)
            characters += len(text)
        if self._tokenizer is None:
            self._tokenizer = self._frozen.thaw()
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        self._pending.extend(np.array(encoding.ids, self._dtype) for encoding in encodings)

    def _checked_texts(self) -> Iterator[str]:
        for number, text in enumerate(self._source.documents(), start=1):
            if self.stop.is_set():
                raise _Stopped
            if number == 1 and _identity(self._source) != self._identity:  # a file has been read whole by now
                raise TextError(f"{self._source.name} was changed while it was being read; start again")
            try:
                text.encode()
            except (AttributeError, UnicodeEncodeError):  # a null in a data set; half of a surrogate pair
                raise TextError(f"{self._source.name}: document {number:,} is not valid text; leave it out") from None
            yield text


class _Stopped(Exception):
    """Nobody waits for the shard any more."""


class _Ahead:
    """Calls `call` on a background thread, once at a time; what it raises comes out of the next `wait` or `begin`."""

    def __init__(self, call: Callable[[], None], stop: threading.Event) -> None:
        self.used = False
        self._call, self._stop = call, stop
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start a call; the one before it must be about to end."""
        if self._thread is not None:
            self.wait()
        if not self.used:
            atexit.register(self.close)  # no thread may be inside another library when the interpreter goes
        self.used = True
        self._thread = threading.Thread(target=self._run, name="saezoo-tokens", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the call that is under way, or for one started now."""
        if self._thread is None:
            self.begin()
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Have the thread stop at its next document; wait for that, but not for ever."""
        self._stop.set()
        atexit.unregister(self.close)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error
