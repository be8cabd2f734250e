"""CSV files are opened in spreadsheets, which run a cell's text as a formula if it begins like one.

Names of collections, layers, texts and models come from files of others. So text that begins like a formula gets an
apostrophe before it (OWASP, "CSV Injection"); numbers are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_BEGINNINGS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")  # also full-width


def inert(cell: Any) -> Any:
    """`cell` as it goes into a CSV: text that a spreadsheet would run gets an apostrophe before it.

    Carriage returns become line feeds: writers of CSV leave the former without quotes, and the rest would be a new row.
    """
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", "\n")
    return f"'{text}" if text.startswith(_BEGINNINGS) else text


def original(cell: str) -> str:
    """The text from which `inert` made `cell`, but for carriage returns."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_BEGINNINGS) else cell


def inert_rows(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """`rows` for a `csv.writer`."""
    return [[inert(cell) for cell in row] for row in rows]


def frame_csv(frame: pandas.DataFrame) -> str:
    """CSV text of a table: floats in full precision, unknown as an empty cell."""
    import pandas as pd

    safe = {
        name: column if column.dtype.kind in "iufb" else pd.Series([inert(cell) for cell in column], dtype=object)
        for name, column in frame.reset_index(drop=True).items()
    }
    return str(pd.DataFrame(safe, columns=frame.columns).to_csv(index=False))
