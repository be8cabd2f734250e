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


class Measured(NamedTuple):
    """A number and its 95 % interval; None where the interval is not known."""

    value: float
    lo: float | None = None
    hi: float | None = None


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
    """CSV text; floats in full precision, unknown as an empty cell."""
    return str(to_frame(results).to_csv(index=False))


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """JSON-ready records: the CSV's columns with NaN as null, and the histogram as lists."""
    records = []
    for result in results:
        row = result.flat()
        row["density_histogram"] = result.histogram
        records.append({key: None if _is_nan(value) else value for key, value in row.items()})
    return records


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, complete or not at all."""
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def table(results: Sequence[Result]) -> Table:
    """The table for the terminal, at most 100 columns: the protocol decides which metrics it shows."""
    return _published_table(results) if results[0].protocol == "feb2024" else _standard_table(results)


def _standard_table(results: Sequence[Result]) -> Table:
    from rich.table import Table

    columns = (
        ("ΔCE", "ce_delta", 4),
        ("CE score", "ce_score", 4),
        ("KL", "kl_sae", 4),
        ("expl. var.", "explained_variance", 4),
        ("L0", "l0", 1),
        ("alive", "alive_fraction", 4),
        (">1/100", "dense_100", 0),
    )
    shown = Table(title=_title(results), caption=_caption(results), caption_justify="left")
    shown.add_column("layer", justify="right")
    for label, _, _ in columns:
        shown.add_column(label, justify="right")
    shown.add_column("log10 density")
    for result in results:
        row = [result.layer]
        row += [_cell(result, name, digits) for _, name, digits in columns]
        shown.add_row(*row, sparkline(result.histogram["counts"]))
    return shown


def _published_table(results: Sequence[Result]) -> Table:
    from rich.table import Table

    columns = (
        ("CE with SAE", "ce_sae", 3),
        ("expl. var. (uncentred)", "explained_variance_uncentred", 4),
        ("L1", "l1", 2),
        ("L0", "l0", 2),
        ("alive", "alive_fraction", 4),
    )
    shown = Table(title=_title(results), caption=_caption(results), caption_justify="left")
    shown.add_column("layer", justify="right")
    for label, _, _ in columns:
        shown.add_column(label, justify="right")
    for result in results:
        shown.add_row(result.layer, *(_cell(result, name, digits) for _, name, digits in columns))
    return shown


def _title(results: Sequence[Result]) -> str:
    first = results[0]
    return f"{first.collection} · {first.protocol} protocol · {first.tokens:,} tokens of {first.text}"


def _caption(results: Sequence[Result]) -> str:
    lines = ["second line of a cell: 95 % interval over documents"]
    if any(result.published for result in results):
        lines.append("third line: the published value")
    return "; ".join(lines)


def _cell(result: Result, name: str, digits: int) -> str:
    if name not in result.metrics:
        return "-"
    value, lo, hi = result.metrics[name]
    lines = [_number(value, digits)]
    lines.append("" if lo is None or hi is None else f"[dim]{_number(lo, digits)}–{_number(hi, digits)}[/dim]")
    if result.published:
        published = result.published.get(name)
        lines.append("" if published is None else f"[cyan]{_number(published, digits)}[/cyan]")
    return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def sparkline(counts: Sequence[int]) -> str:
    """One block character per bin, scaled to the fullest; a bin that is not empty is never blank."""
    top = max(counts, default=0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(" " if count == 0 else bars[min(7, int(8 * count / (top + 1)))] for count in counts)
