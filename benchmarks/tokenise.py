"""Tokens per second: the token cache's first pass, its second pass, and a loop that tokenises document by document.

    python benchmarks/tokenise.py --tokenizer FOLDER --text docs.jsonl

Each pass begins with the text on the disk and ends with every document's ids in hand: reading and hashing the file,
writing and fsync, and checksums count. The loop is what SAELens does on raw text: `HookedTransformer.to_tokens` of
each document, that is one call of the tokenizer for a tensor, again at every run and every epoch. The three take
turns --rounds times; medians go to the CSV. The documents' ids must be the same in all of them.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from saezoo.shards import TokenCache  # noqa: E402
from saezoo.tokens import TextSource, text_file  # noqa: E402

PASSES = ("first", "second", "loop")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def document_by_document(tokenizer: Any, source: TextSource) -> Iterator[Any]:
    """Ids as `ActivationsStore._iterate_raw_dataset_tokens` gets them; transformer_lens pads with the EOS token."""
    tokenizer.pad_token = tokenizer.eos_token
    for text in source.documents():
        yield tokenizer(text, return_tensors="pt", padding=True, truncation=False, max_length=None)["input_ids"][0]


def timed(documents: Callable[[], Iterator[Any]]) -> tuple[float, int, int, int]:
    """Seconds for all of `documents`, how many there are, their tokens, and a sum that tells them from others."""
    start = time.perf_counter()
    found = [np.asarray(ids) for ids in documents()]
    seconds = time.perf_counter() - start
    weights = (int((ids.astype(np.int64) * (np.arange(len(ids)) % 1009 + 1)).sum()) for ids in found)
    check = sum((number % 997 + 1) * weight for number, weight in enumerate(weights))
    return seconds, len(found), sum(map(len, found)), check


def one_round(source: TextSource, load: Callable[[], Any]) -> dict[str, tuple[float, int, int, int]]:
    """What `timed` says of each pass, in turn."""
    ours, theirs = load(), load()
    with tempfile.TemporaryDirectory() as root:
        return {
            "first": timed(lambda: TokenCache(source, ours, Path(root)).documents()),
            "second": timed(lambda: TokenCache(source, ours, Path(root)).documents()),
            "loop": timed(lambda: document_by_document(theirs, source)),
        }


def measure(source: TextSource, load: Callable[[], Any], rounds: int) -> tuple[dict[str, float], int, int]:
    """Median seconds of each pass; documents; tokens."""
    found = [one_round(source, load) for _ in range(rounds)]
    contents = {measured[1:] for one in found for measured in one.values()}
    if len(contents) != 1:
        raise SystemExit(f"the passes disagree on documents, tokens or ids: {contents}")
    documents, tokens, _ = contents.pop()
    return {name: statistics.median(one[name][0] for one in found) for name in PASSES}, documents, tokens


def record(path: Path, text: str, seconds: dict[str, float], documents: int, tokens: int, rounds: int) -> None:
    """Print the measurement and append it to the CSV."""
    row: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "text": text,
        "documents": documents,
        "tokens": tokens,
        "rounds": rounds,
        **{f"{name}_s": round(seconds[name], 3) for name in PASSES},
        **{f"{name}_tokens_per_s": round(tokens / seconds[name]) for name in PASSES},
        "loop_over_first": round(seconds["loop"] / seconds["first"], 2),
        "loop_over_second": round(seconds["loop"] / seconds["second"], 1),
        "cpu_threads": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    print(" ".join(f"{key}={value}" for key, value in row.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Parse the command line, measure each text, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with GPT-2's tokenizer files")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "tokenise.csv")
    args = parser.parse_args()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # about documents longer than the model's context

    def load() -> Any:
        return AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)

    for path in args.text:
        seconds, documents, tokens = measure(text_file(path), load, args.rounds)
        name = f"{path.resolve().parent.name}/{path.name}"
        record(args.csv, name, seconds, documents, tokens, args.rounds)
        print(
            f"{name}: document by document takes {seconds['loop'] / seconds['first']:.1f} times as long as the first "
            f"pass, {seconds['loop'] / seconds['second']:.0f} times as long as every later one"
        )


if __name__ == "__main__":
    main()
