"""All features of an SAE as one table: CSV, pandas, and the first of them for the terminal.

docs/features-csv.md has the columns. Lists are JSON in a cell: `frame["promoted"].map(json.loads)`. What a token's text
holds that is not printable is escaped there, so that no cell moves a cursor, breaks a row or looks like a formula.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saezoo.errors import UsageError, shown
from saezoo.features.records import About, Feature, Logits, Weighted
from saezoo.spreadsheets import frame_csv

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

TOKENS = 10
"""In a cell, at most."""
_NO_LOGITS = dict.fromkeys(("promoted", "suppressed", "logit_std", "logit_skew", "logit_kurtosis"))
_NUMBERS = ("mean", "max", "log10_density", "logit_std", "logit_skew", "logit_kurtosis", "divergence")
SORTABLE = ("feature", "fires", "density", *_NUMBERS, "divergence_lo", "divergence_hi", "dead")
"""Columns that the terminal's table can be sorted by."""
_SHOWN = ("feature", "density", "mean", "max", "divergence")
_LISTED = {"top_tokens": 4, "promoted": 3}
"""Columns of the terminal's table that hold tokens, and how many it shows."""
_NUMBERS_WIDTH, _TOKENS_WIDTH = 60, 16


def to_frame(features: Iterable[Feature], about: About, text_of: Callable[[int], str]) -> pandas.DataFrame:
    """One row per feature, in their order; `text_of`: the text of a token. NaN or None is unknown."""
    import pandas as pd

    frame = pd.DataFrame([_row(feature, about, text_of) for feature in features])
    for name in (*_NUMBERS, "divergence_lo", "divergence_hi"):
        frame[name] = frame[name].astype(float)
    return frame


def to_csv(frame: pandas.DataFrame) -> str:
    """CSV text of `to_frame`: floats in full precision, unknown as an empty cell."""
    return frame_csv(frame)


def _row(feature: Feature, about: About, text_of: Callable[[int], str]) -> dict[str, Any]:
    fires, shares = feature.fires, feature.tokens_by_share[:TOKENS]
    own = [near for near in feature.neighbours if near.layer == about.layer]
    others = [near for near in feature.neighbours if near.layer != about.layer]
    row: dict[str, Any] = {"collection": about.collection, "layer": about.layer, "feature": feature.index}
    row |= {"fires": fires, "tokens": about.tokens, "density": feature.density}
    row |= {"log10_density": math.log10(feature.density) if fires else None, "mean": feature.mean, "max": feature.max}
    row |= {"dead": fires == 0, "dense_100": feature.density > 1 / 100, "dense_10": feature.density > 1 / 10}
    row["top_tokens"] = _cell([text_of(stat.token) for stat in shares])
    row["top_token_shares"] = _cell([stat.share for stat in shares])
    row |= _logits(feature.logits, text_of)
    row["nearest"] = _cell([(near.feature, near.cosine) for near in own])
    row["nearest_elsewhere"] = _cell(others)
    row["coactive"] = _cell([(other.feature, other.jaccard) for other in feature.coactive])
    row |= zip(("divergence", "divergence_lo", "divergence_hi"), feature.divergence, strict=True)
    return row


def _logits(logits: Logits | None, text_of: Callable[[int], str]) -> dict[str, Any]:
    if logits is None:
        return dict(_NO_LOGITS)

    def cell(weighted: tuple[Weighted, ...]) -> str | None:
        return _cell([(text_of(token), logit) for token, logit in weighted[:TOKENS]])

    values = cell(logits.promoted), cell(logits.suppressed), logits.std, logits.skew, logits.kurtosis
    return dict(zip(_NO_LOGITS, values, strict=True))


def _cell(values: Sequence[Any]) -> str | None:
    """JSON of a list, None for an empty one."""
    return _json(values) if values else None


def _json(value: Any) -> str:
    """JSON in which every character is printable."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def check_sort(column: str) -> None:
    """UsageError unless it is a column of numbers."""
    if column not in SORTABLE:
        raise UsageError(f"features cannot be sorted by `{shown(column)}`; give one of {', '.join(SORTABLE)}")


def rich_table(frame: pandas.DataFrame, *, sort: str, top: int, width: int) -> Table:
    """The first `top` features by the column `sort`, the largest first (`feature`: the smallest), unknown last.

    At most `width` columns of text, 70 at least. Numbers are never cut; tokens are, or left out without room for them.
    Raises UsageError if `sort` is none of `SORTABLE`.
    """
    from rich.table import Table
    from rich.text import Text

    check_sort(sort)
    chosen = frame.sort_values([sort, "feature"], ascending=[sort == "feature", True], na_position="last")[:top]
    names = list(dict.fromkeys((*_SHOWN, sort)))
    listed = list(_LISTED.items())[: max(0, (width - _NUMBERS_WIDTH) // _TOKENS_WIDTH)]
    table = Table(title=Text(f"{len(chosen):,} of {len(frame):,} features by {sort}"), width=width if listed else None)
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for name, _ in listed:
        table.add_column(name.replace("_", "\n"), no_wrap=True, overflow="ellipsis", ratio=1)
    for row in chosen.to_dict("records"):
        cells = [_number(row[name]) for name in names] + [_tokens(row[name], most) for name, most in listed]
        table.add_row(*map(Text, cells))
    return table


def _number(value: float) -> str:
    """Four digits; unknown is empty."""
    if isinstance(value, (bool, int)):
        return str(value)
    return "" if math.isnan(value) else f"{value:.4g}"


def _tokens(cell: str | None, most: int) -> str:
    """The first tokens of a cell of tokens, or of tokens with a number, in quotes."""
    values = json.loads(cell) if isinstance(cell, str) else []
    return " ".join(_json(value if isinstance(value, str) else value[0]) for value in values[:most])
