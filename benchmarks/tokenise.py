"""Tokens per second: the token cache's first pass, its second pass, and a loop that tokenises document by document.

    python benchmarks/tokenise.py --tokenizer FOLDER --text docs.jsonl

Each pass begins with the text on the disk and ends with every document's ids in hand: reading and hashing the file,
writing and fsync, and checksums count. The loop is what SAELens does on raw text: `HookedTransformer.to_tokens` of
each document, that is one call of the tokenizer for a tensor, again at every run and every epoch. The three take
turns --rounds times; medians go to the CSV. The documents' ids must be the same in all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import append, versions

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


class Timed(NamedTuple):
    """One pass: what it took, and what it gave."""

    wall_s: float
    cpu_s: float
    """Of all threads; steadier than `wall_s` where other work shares the cores."""
    contents: tuple[int, int, int]
    """Documents, their tokens, and a sum over both that tells them from others."""


def timed(documents: Callable[[], Iterator[Any]]) -> Timed:
    """Go through all of `documents`."""
    start, cpu_start = time.perf_counter(), time.process_time()
    found = [np.asarray(ids) for ids in documents()]
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    weights = (int((ids.astype(np.int64) * (np.arange(len(ids)) % 1009 + 1)).sum()) for ids in found)
    check = sum((number % 997 + 1) * weight for number, weight in enumerate(weights))
    return Timed(wall, cpu, (len(found), sum(map(len, found)), check))


def one_round(source: TextSource, load: Callable[[], Any]) -> dict[str, Timed]:
    """Each pass, in turn."""
    ours, theirs = load(), load()
    with tempfile.TemporaryDirectory() as root:
        return {
            "first": timed(lambda: TokenCache(source, ours, Path(root)).documents()),
            "second": timed(lambda: TokenCache(source, ours, Path(root)).documents()),
            "loop": timed(lambda: document_by_document(theirs, source)),
        }


def measure(source: TextSource, load: Callable[[], Any], rounds: int) -> dict[str, Timed]:
    """Medians over the rounds."""
    found = [one_round(source, load) for _ in range(rounds)]
    contents = {measured.contents for one in found for measured in one.values()}
    if len(contents) != 1:
        raise SystemExit(f"the passes disagree on documents, tokens or ids: {contents}")
    return {name: median([one[name] for one in found]) for name in PASSES}


def median(measured: list[Timed]) -> Timed:
    """Of wall and of CPU time, each by itself."""
    wall = statistics.median(one.wall_s for one in measured)
    return Timed(wall, statistics.median(one.cpu_s for one in measured), measured[0].contents)


def record(path: Path, text: str, found: dict[str, Timed], rounds: int) -> None:
    """Print the measurement and append it to the CSV."""
    documents, tokens, _ = found["first"].contents
    row: dict[str, object] = {
        "text": text,
        "documents": documents,
        "tokens": tokens,
        "rounds": rounds,
        **{f"{name}_s": round(found[name].wall_s, 3) for name in PASSES},
        **{f"{name}_cpu_s": round(found[name].cpu_s, 3) for name in PASSES},
        **{f"{name}_tokens_per_s": round(tokens / found[name].wall_s) for name in PASSES},
        "loop_over_first": round(found["loop"].wall_s / found["first"].wall_s, 2),
        "loop_over_second": round(found["loop"].wall_s / found["second"].wall_s, 1),
        "loop_over_first_cpu": round(found["loop"].cpu_s / found["first"].cpu_s, 2),
        "cpu_threads": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        **versions(*PACKAGES),
    }
    print(" ".join(f"{key}={value}" for key, value in row.items()))
    append(path, row)


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
        name = f"{path.resolve().parent.name}/{path.name}"
        record(args.csv, name, measure(text_file(path), load, args.rounds), args.rounds)


if __name__ == "__main__":
    main()
