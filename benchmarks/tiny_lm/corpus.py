"""Build the bundled text: train and held-out splits of five freely licensed sources.

Run: ``python benchmarks/tiny_lm/corpus.py --data DIR``. DIR holds one folder per source, each with
``docs.jsonl`` (one JSON object a line: ``id``, ``text``) and ``SOURCE.txt`` (``key: value`` lines:
repository, commit, path, what, licence).

The output does not depend on the machine: documents are split and ordered by the SHA-256 of their text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("18f-blog-cc0", "digitalgov-cc0", "factbook-pd", "gutenberg-pd", "us-presidents-pd")
# Share of each source's documents that is held out, in 1/1000. Rounded up, so no source is left without any.
HELD_OUT_PER_MILLE = 45
REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "saezoo" / "bundled" / "text"


@dataclass(frozen=True)
class Document:
    """One document: ``id`` is ``source/original id``, ``digest`` the SHA-256 hex of its UTF-8 text."""

    id: str
    text: str
    digest: str


def read_source(folder: Path) -> list[Document]:
    """Documents of one source folder, in file order, exact repeats and empty texts left out."""
    seen: set[str] = set()
    docs: list[Document] = []
    with (folder / "docs.jsonl").open(encoding="utf-8") as handle:
        for line in handle:
            row = json.loads(line)
            text = str(row["text"])
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
            if not text.strip() or digest in seen:
                continue
            seen.add(digest)
            docs.append(Document(f"{folder.name}/{row['id']}", text, digest))
    return docs


def split(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out) of one source: the documents with the smallest digests are held out."""
    ordered = sorted(docs, key=lambda doc: doc.digest)
    count = -(-len(ordered) * HELD_OUT_PER_MILLE // 1000)
    return ordered[count:], ordered[:count]


def shuffled(docs: list[Document]) -> list[Document]:
    """A fixed pseudo-random order: by a second hash, so that it is unrelated to the split."""
    return sorted(docs, key=lambda doc: hashlib.sha256(f"order:{doc.digest}".encode()).hexdigest())


def write_bytes(path: Path, data: bytes) -> None:
    """Write through a temporary name, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_split(path: Path, docs: list[Document]) -> None:
    """One ``{"id", "text"}`` object a line, xz-compressed (an xz stream holds no time stamp)."""
    lines = (json.dumps({"id": doc.id, "text": doc.text}, ensure_ascii=False) + "\n" for doc in docs)
    write_bytes(path, lzma.compress("".join(lines).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))


def read_split(path: Path) -> list[str]:
    """Texts of one written split, in file order."""
    with lzma.open(path, "rt", encoding="utf-8") as handle:
        return [str(json.loads(line)["text"]) for line in handle]


def source_fields(folder: Path) -> dict[str, str]:
    """``key: value`` lines of a source's SOURCE.txt."""
    fields: dict[str, str] = {}
    for line in (folder / "SOURCE.txt").read_text(encoding="utf-8").splitlines():
        key, separator, value = line.partition(": ")
        if separator:
            fields[key.strip()] = value.strip()
    return fields


def describe(name: str, fields: dict[str, str], train: list[Document], held: list[Document]) -> str:
    """One section of SOURCES.md; sizes are bytes of UTF-8 text."""
    # The sources' own notes name files of their download ("raw/ = ..."), which are not part of this package.
    what = ". ".join(part for part in fields["what"].split(". ") if not part.startswith("raw/"))
    sizes = [sum(len(doc.text.encode("utf-8")) for doc in docs) for docs in (train, held)]
    return "\n".join(
        [
            f"## {name}",
            "",
            f"- What: {what}",
            f"- Licence: {fields['licence']}",
            f"- Repository: https://github.com/{fields['repository'].removeprefix('github:')}",
            f"- Commit: `{fields['commit']}` ({fields['date']})",
            f"- Path: `{fields['path']}`",
            f"- Train: {len(train):,} documents, {sizes[0]:,} bytes",
            f"- Held-out: {len(held):,} documents, {sizes[1]:,} bytes",
            "",
        ]
    )


def main() -> None:
    """Read every source, write both splits and SOURCES.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds one folder per source")
    parser.add_argument("--out", type=Path, default=OUT, help="where the splits go")
    args = parser.parse_args()
    train: list[Document] = []
    held: list[Document] = []
    sections: list[str] = []
    for name in SOURCES:
        source_train, source_held = split(read_source(args.data / name))
        sections.append(describe(name, source_fields(args.data / name), source_train, source_held))
        train += source_train
        held += source_held
    # A text that two sources share could straddle the split: it then stays in train only.
    train_digests = {doc.digest for doc in train}
    held = [doc for doc in held if doc.digest not in train_digests]
    write_split(args.out / "train.jsonl.xz", shuffled(train))
    write_split(args.out / "heldout.jsonl.xz", shuffled(held))
    head = (
        "# Sources of the bundled text\n\n"
        "`train.jsonl.xz` and `heldout.jsonl.xz`: one JSON object (`id`, `text`) a line, written by\n"
        "`benchmarks/tiny_lm/corpus.py`. Everything here is public domain or CC0 and may be redistributed.\n"
        "About 4.5 % of each source's documents, those with the smallest SHA-256 of their text, are held out.\n\n"
        f"In all: {len(train):,} train and {len(held):,} held-out documents.\n\n"
    )
    write_bytes(args.out / "SOURCES.md", (head + "\n".join(sections)).encode("utf-8"))
    print(f"train {len(train)} documents, held-out {len(held)} documents -> {args.out.name}/")


if __name__ == "__main__":
    main()
