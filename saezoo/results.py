"""Results: one record per evaluated SAE, and its forms (rich table, CSV, JSON).

The column schema is documented in docs/metrics.md and only ever grows. Unknown is an empty cell, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saezoo import files

if TYPE_CHECKING:
    import pandas
    from rich.table import Table
    from rich.text import Text
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
    return str(frame.to_csv(index=False))


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """JSON-ready records: the CSV's columns, the histogram as lists, `undefined` the metrics that the text leaves so
    (they are null), and the breakdowns: for each cell, {metric: [value, lo, hi]}."""
    records = []
    for result in results:
        row = result.flat()
        row["density_histogram"] = result.histogram
        row["undefined"] = [name for name, (value, _, _) in result.metrics.items() if value is None]
        row["breakdowns"] = result.breakdowns
        records.append(row)
    return records


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, complete or not at all."""
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table(results: Sequence[Result]) -> Table:
    """The table for the terminal, at most 100 columns: the protocol decides which metrics it shows."""
    from rich.table import Table
    from rich.text import Text

    first = results[0]
    columns = _FEB2024_COLUMNS if first.protocol == "feb2024" else _STANDARD_COLUMNS
    shown = Table(
        title=Text(f"{first.collection} · {first.protocol} protocol · {first.tokens:,} tokens of {first.text}"),
        caption="±: half of the 95 % interval over documents",
        caption_justify="left",
    )
    shown.add_column("layer", justify="right")
    for label, _, _ in columns:
        shown.add_column(label, justify="right")
    shown.add_column("density 1e-6–1")
    for result in results:
        cells = [_cell(result, metric, digits) for _, metric, digits in columns]
        name = Text(result.layer).append("\n\npublished" if result.published else "", style="cyan")
        shown.add_row(name, *cells, sparkline(result.histogram["counts"]), end_section=bool(result.published))
    return shown


_STANDARD_COLUMNS = (
    ("ΔCE", "ce_delta", 4),
    ("CE score", "ce_score", 4),
    ("expl. var.", "explained_variance", 4),
    ("L0", "l0", 2),
    ("alive", "alive_fraction", 4),
    (">1/100", "dense_100", 0),
)
_FEB2024_COLUMNS = (
    ("CE with SAE", "ce_sae", 3),
    ("expl. var. unc.", "explained_variance_uncentred", 4),
    ("L1", "l1", 2),
    ("L0", "l0", 2),
    ("alive", "alive_fraction", 4),
)


def _cell(result: Result, name: str, digits: int) -> Text:
    """Value, half its interval, and (if the row has published values) the published one."""
    from rich.text import Text

    if name not in result.metrics:
        return Text("-")
    value, lo, hi = result.metrics[name]
    cell = Text(_number(value, digits))
    if lo is not None and hi is not None:
        cell.append(f"\n±{_number((hi - lo) / 2, digits)}", style="dim")
    elif result.published:
        cell.append("\n")
    if result.published:
        published = result.published.get(name)
        cell.append("\n" + ("" if published is None else _number(published, digits)), style="cyan")
    return cell


def _number(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None else f"{value:,.{digits}f}"


def sparkline(counts: Sequence[int]) -> str:
    """One block character per bin, scaled to the fullest; a bin that is not empty is never blank."""
    top = max(counts, default=0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(" " if count == 0 else bars[min(7, int(8 * count / (top + 1)))] for count in counts)
