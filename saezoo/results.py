"""Results: one record per evaluated SAE, and its forms (CSV, JSON; `tables.py` has those to look at).

The column schema is documented in docs/metrics.md and only ever grows. Unknown is an empty cell, never a number.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saezoo import files
from saezoo.errors import UsageError
from saezoo.spreadsheets import frame_csv

if TYPE_CHECKING:
    import pandas
    from torch import Tensor


UNDEFINED = "undefined"
"""What stands where a metric has no value on this text: a cross-entropy of rows of one token, say."""


class Measured(NamedTuple):
    """A number and its 95 % interval; value None: undefined on this text; ends None: the interval is not known."""

    value: float | None
    lo: float | None = None
    hi: float | None = None

    @property
    def known(self) -> float:
        """The value; ValueError if it is undefined."""
        if self.value is None:
            raise ValueError("the metric is undefined on this text")
        return self.value


def measured(value: float, lo: float | None = None, hi: float | None = None) -> Measured:
    """`value` if it is finite, else undefined; the interval only if both ends are finite."""
    if not math.isfinite(value):
        return Measured(None)
    if lo is None or hi is None or not math.isfinite(lo) or not math.isfinite(hi):
        return Measured(value)
    return Measured(value, lo, hi)


@dataclass(frozen=True)
class Blocks:
    """What a result was computed from, by blocks and groups of documents: lets two results be compared document by
    document. float64, on the CPU."""

    sums: dict[str, Tensor]
    """Name in `evals/metrics.py` -> sum over the tokens of each block [N]."""
    x_sum_ND: Tensor
    """Sum of the activations of each block."""
    fires_GF: Tensor
    """Tokens of each group on which each feature fires."""
    tokens_G: Tensor
    """Scored tokens of each group."""


@dataclass(frozen=True)
class Result:
    """What was measured on one SAE, and how."""

    collection: str
    layer: str
    hook: str
    model: str
    protocol: str
    text: str
    context: int
    rows: int
    tokens: int
    """Tokens scored: all, or all but special ones, by the protocol."""
    documents: int
    seed: int
    device: str
    dtype: str
    versions: dict[str, str]
    metrics: dict[str, Measured]
    histogram: dict[str, Any]
    """`edges`: log10 density; `counts`: features between edges; `never`: features that did not fire."""
    published: dict[str, float | None] = field(default_factory=dict)
    """Published values measured by the same protocol."""
    blocks: Blocks | None = field(default=None, compare=False, repr=False)
    breakdowns: dict[str, list[dict[str, Measured]]] = field(default_factory=dict, repr=False)
    """`position`: one record of metrics for each position of a row; `frequency`: for each tenth of the tokens, the most
    frequent first."""
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    """Tables behind the full suite's metrics: `probing`, a record for each task; `absorption`, for each letter."""

    def flat(self) -> dict[str, Any]:
        """One CSV row."""
        row: dict[str, Any] = {
            key: getattr(self, key)
            for key in ("collection", "layer", "hook", "model", "protocol", "text", "context", "rows", "tokens")
        }
        row |= {key: getattr(self, key) for key in ("documents", "seed", "device", "dtype")}
        row |= {f"{name}_version": version for name, version in self.versions.items()}
        for name, (value, lo, hi) in self.metrics.items():
            row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi, f"{name}_published": self.published.get(name)}
        hist = self.histogram
        row["density_histogram"] = ";".join(
            [f"never:{hist['never']}"]
            + [f"{edge:g}:{count}" for edge, count in zip(hist["edges"][:-1], hist["counts"], strict=True)]
        )
        return row


def to_frame(results: Sequence[Result]) -> pandas.DataFrame:
    """One row per SAE, with the columns of the CSV."""
    import pandas as pd

    return pd.DataFrame([result.flat() for result in results])


def to_csv(results: Sequence[Result]) -> str:
    """CSV text; floats in full precision, unknown as an empty cell, a metric that the text leaves undefined as
    `undefined`."""
    frame = to_frame(results)
    for name in {name for result in results for name, (value, _, _) in result.metrics.items() if value is None}:
        frame[name] = frame[name].astype(object).where(frame[name].notna(), UNDEFINED)
    return frame_csv(frame)


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """JSON-ready records: the CSV's columns, the histogram as lists, `undefined` the metrics that the text leaves so
    (they are null), and the breakdowns: for each cell, {metric: [value, lo, hi]}."""
    records = []
    for result in results:
        row = result.flat()
        row["density_histogram"] = result.histogram
        row["undefined"] = [name for name, (value, _, _) in result.metrics.items() if value is None]
        row["breakdowns"] = result.breakdowns
        row["details"] = result.details
        records.append(row)
    return records


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, complete or not at all."""
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_csv(path: Path, results: Sequence[Result]) -> None:
    """Add the rows of `to_csv` to a CSV with the same columns; a file that is not there, or is empty, is made.

    The file is replaced as a whole: it never holds half a row. Two processes must not append to it at once. Raises
    UsageError, and leaves it as it is, if its columns are others.
    """
    text = to_csv(results)
    try:
        before = path.read_bytes().decode() if path.is_file() else ""
    except ValueError:
        raise UsageError(f"cannot append to {path}: it is not text in UTF-8; give a new file") from None
    except OSError as error:
        raise UsageError(f"cannot append to {path}: {error.strerror}; give a new file") from None
    if not before:
        write_text(path, text)
        return
    theirs, ours = (next(csv.reader(io.StringIO(content)), []) for content in (before.removeprefix("\ufeff"), text))
    for i, (old, new) in enumerate(itertools.zip_longest(theirs, ours), 1):
        if old != new:
            there, here = ("missing" if name is None else repr(name) for name in (old, new))
            raise UsageError(f"cannot append to {path}: its column {i} is {there}, here it is {here}; give a new file")
    _, rows = text.split("\n", 1)  # no column name holds a line break
    with files.replacing(path) as temporary:
        temporary.write_bytes((before + ("" if before.endswith("\n") else "\n") + rows).encode())


_PER_TARGET, _PER_TOKEN = ("ce_clean", "ce_sae"), ("kl_sae", "cosine", "norm_in", "l0")


def breakdown_csv(results: Sequence[Result]) -> str:
    """CSV text in long form: a row for each cell, with its tokens and for each metric value, `_lo` and `_hi`.

    `by`: position (`key` 0 is the first of a row), frequency (1 is the tenth of the tokens that are the most frequent)
    or document. More than 2,048 documents are folded: block `key` then holds those of this number modulo 2,048. A
    single document has no interval. Undefined is `undefined`, unknown an empty cell.
    """
    import pandas as pd

    rows = []
    for result in results:
        cells = [("position", key, cell) for key, cell in enumerate(result.breakdowns.get("position", []))]
        cells += [("frequency", key, cell) for key, cell in enumerate(result.breakdowns.get("frequency", []), 1)]
        cells += [("document", key, cell) for key, cell in _by_document(result)]
        for by, key, cell in cells:
            row = {"collection": result.collection, "layer": result.layer, "by": by, "key": key}
            row["tokens"] = int(cell["tokens"].known)
            for name, (value, lo, hi) in cell.items():
                if name != "tokens":
                    row |= {name: UNDEFINED if value is None else value, f"{name}_lo": lo, f"{name}_hi": hi}
            rows.append(row)
    head = ["collection", "layer", "by", "key", "tokens"]
    return frame_csv(pd.DataFrame(rows) if rows else pd.DataFrame(columns=head))


def _by_document(result: Result) -> Iterator[tuple[int, dict[str, Measured]]]:
    """(block, its metrics) of each block of documents with a scored token; docs/metrics.md has the formulas."""
    if result.blocks is None:
        return
    sums = {name: column_N.tolist() for name, column_N in result.blocks.sums.items()}
    for block, tokens in enumerate(sums["tokens"]):
        if tokens == 0:
            continue
        targets = sums["targets"][block]
        cell = {"tokens": Measured(tokens)}
        cell |= {name: Measured(sums[name][block] / targets if targets else None) for name in _PER_TARGET}
        delta = (sums["ce_sae"][block] - sums["ce_clean"][block]) / targets if targets else None
        cell |= {name: Measured(sums[name][block] / tokens) for name in _PER_TOKEN}
        cell["explained_variance_uncentred"] = Measured(1 - sums["unexplained"][block] / tokens)
        yield block, cell | {"ce_delta": Measured(delta)}


def sparkline(counts: Sequence[int]) -> str:
    """One block character per bin, scaled to the fullest; a bin that is not empty is never blank."""
    top = max(counts, default=0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(" " if count == 0 else bars[min(7, int(8 * count / (top + 1)))] for count in counts)
