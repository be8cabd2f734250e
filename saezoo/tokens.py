"""Text to rows of tokens: where documents come from, and the two ways of packing them.

Shapes: R rows, T context size. Every packed token carries the index of its document, because documents, not tokens,
are the independent unit of every interval that saezoo prints.
"""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saezoo.entries import Dataset
from saezoo.errors import TextError
from saezoo.registry import package_folder

SEPARATOR = "<|endoftext|>"
_TOKENISE_AT_ONCE = 64
_XZ_MEMORY = 2**27  # bytes; a dictionary of `xz -9` takes half of it
_MAX_DOCUMENT = 1024  # TransformerLens 1.10 truncated to GPT-2's n_ctx, BOS included


@dataclass(frozen=True)
class Rows:
    """Packed tokens."""

    tokens_RT: NDArray[np.int64]
    documents_RT: NDArray[np.int64]
    """Index of the document that each token belongs to; a BOS belongs to the document it opens."""

    def __len__(self) -> int:
        return len(self.tokens_RT)


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: the bundled text, a local file, or a data set on the hub."""

    name: str
    """For tables and CSV, e.g. `builtin:heldout`."""
    path: Path | None = None
    dataset: Dataset | None = None

    def documents(self) -> Iterator[str]:
        """The texts, in their order. Raises TextError if they cannot be read."""
        return _read_file(self.path) if self.path is not None else _read_dataset(self)


def builtin(split: str) -> TextSource:
    """The bundled public-domain text: `train`, or `heldout`, which no bundled model or SAE was trained on."""
    return TextSource(f"builtin:{split}", path=package_folder() / "bundled" / "text" / f"{split}.jsonl.xz")


def text_file(path: Path) -> TextSource:
    """A local file: `.jsonl` (one {"text": …} a line; `.jsonl.xz` too), or plain text.

    Plain text is one document, or several separated by `<|endoftext|>`.
    """
    return TextSource(f"file:{path.name}", path=path)


def _read_file(path: Path) -> Iterator[str]:
    try:
        raw = _unpacked(path) if path.suffix == ".xz" else path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"no file {path}") from None
    except (OSError, lzma.LZMAError) as error:
        raise TextError(f"{path} cannot be read: {error}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}); give a text or .jsonl file") from None
    if "\0" in text:
        raise TextError(f"{path} is not text: it holds null bytes; give a text or .jsonl file")
    if not text.strip():
        raise TextError(f"{path} is empty; give a file with text in it")
    lines_of_json = ".jsonl" in path.suffixes
    yield from _json_lines(path, text) if lines_of_json else (part for part in text.split(SEPARATOR) if part.strip())


def _unpacked(path: Path) -> bytes:
    """The contents of a `.xz`, unless they are far larger than text packs or it asks for much memory itself."""
    packed = path.read_bytes()
    most = 100 * len(packed) + 2**24
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    raw = decompressor.decompress(packed, max_length=most + 1)
    if len(raw) > most:
        raise TextError(f"{path} holds more than a hundred times its size, which is no text; unpack it first")
    if not decompressor.eof or decompressor.unused_data:
        raise TextError(f"{path} is cut off, or more than one packed file; pack the text again")
    return raw


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                document = json.loads(line)["text"]
                if not isinstance(document, str):
                    raise TypeError
                document.encode()  # JSON can spell halves of letters, which no tokenizer reads
            except UnicodeEncodeError:
                raise TextError(f"{path}:{number}: holds half of a surrogate pair, which is no letter") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise TextError(f'{path}:{number}: not a JSON object with a "text" field') from None
            if document.strip():
                yield document


def _read_dataset(source: TextSource) -> Iterator[str]:
    """Stream a data set in its own order, without shuffling, as the 2024 code did."""
    import datasets

    spec = source.dataset
    assert spec is not None
    try:
        stream = datasets.load_dataset(
            spec.repo, revision=spec.revision, data_files=spec.data_files, split=spec.split, streaming=True
        )
        for row in stream:
            yield row[spec.text_column]
    except KeyError:
        raise TextError(f"data set {spec.repo} has no column `{spec.text_column}`") from None
    except Exception as error:  # the library raises its own, fsspec's, and the hub client's errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TextError(f"data set {spec.repo} cannot be read: {reason}") from None


def encode(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each document, without any BOS."""
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, _TOKENISE_AT_ONCE)):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def pack(documents: Iterable[list[int]], *, bos: int, context: int) -> Iterator[Rows]:
    """Pack as today's SAELens does, one row at a time: nothing is cut or lost but the last unfinished row.

    Each row begins with one BOS; within a row each further document is preceded by one.
    """
    row = _Row(context)
    for index, ids in enumerate(documents):
        rest = np.concatenate(([bos], np.asarray(ids, dtype=np.int64)))
        if row.used == 1:  # the row's own BOS, left by a document that ended with the row before
            row.used = 0
        while len(rest):
            taken = row.add(rest, index)
            rest = rest[taken:]
            if row.full:
                yield row.take()
                row.add(np.array([bos]), index)


def pack_feb2024(
    documents: Iterable[Sequence[int] | NDArray[np.unsignedinteger[Any]]],
    *,
    bos: int,
    context: int,
    rows_per_call: int,
    skip: int = 0,
) -> Iterator[Rows]:
    """Pack exactly as the code of February 2024 did, `rows_per_call` rows at a time.

    Documents are BOS + ids cut to 1,024 in all. One that overruns a row goes on in the next row after another BOS; one
    that fits exactly leaves the row waiting for the next document. At the end of a call the rest of the current
    document is dropped; at the end of the data the unfinished call is. `skip` documents are lost at the start.
    """
    stream = itertools.islice(enumerate(documents), skip, None)
    while True:
        done: list[Rows] = []
        row = _Row(context)
        while len(done) < rows_per_call:
            item = next(stream, None)
            if item is None:
                return
            index, ids = item
            rest = np.concatenate(([bos], np.asarray(ids, dtype=np.int64)))[:_MAX_DOCUMENT]
            while len(rest) > context - row.used and len(done) < rows_per_call:
                taken = row.add(rest, index)
                done.append(row.take())
                rest = np.concatenate(([bos], rest[taken:]))
            if len(done) < rows_per_call:
                row.add(rest, index)
        yield concatenate(done)


class _Row:
    """One row being filled."""

    def __init__(self, context: int) -> None:
        self._tokens = np.zeros(context, dtype=np.int64)
        self._documents = np.zeros(context, dtype=np.int64)
        self.used = 0

    @property
    def full(self) -> bool:
        return self.used == len(self._tokens)

    def add(self, ids: NDArray[np.int64], document: int) -> int:
        """Put in as many of `ids` as fit; returns how many did."""
        taken = min(len(ids), len(self._tokens) - self.used)
        self._tokens[self.used : self.used + taken] = ids[:taken]
        self._documents[self.used : self.used + taken] = document
        self.used += taken
        return taken

    def take(self) -> Rows:
        """The full row; this one starts afresh."""
        rows = Rows(self._tokens[None].copy(), self._documents[None].copy())
        self.used = 0
        return rows


def concatenate(parts: list[Rows]) -> Rows:
    """Several blocks of rows as one."""
    return Rows(
        np.concatenate([part.tokens_RT for part in parts]), np.concatenate([part.documents_RT for part in parts])
    )


def collect(rows: Iterable[Rows], *, tokens: int, context: int, source: str) -> Rows:
    """The first `tokens` // `context` rows; TextError if there is not even one."""
    wanted = max(1, tokens // context)
    parts: list[Rows] = []
    have = 0
    for part in rows:
        parts.append(part)
        have += len(part)
        if have >= wanted:
            break
    if not parts:
        raise TextError(f"{source} is shorter than one row of {context} tokens; give more text")
    found = concatenate(parts)
    return Rows(found.tokens_RT[:wanted], found.documents_RT[:wanted])
