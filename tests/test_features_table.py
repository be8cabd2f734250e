"""The table of features: every column, what is unknown, and text that would do harm in a spreadsheet or a terminal."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from saezoo.errors import UsageError
from saezoo.features.records import (
    About,
    Coactive,
    Feature,
    Histogram,
    Logits,
    Neighbour,
    TokenStat,
    Weighted,
)
from saezoo.features.table import rich_table, to_csv, to_frame
from saezoo.results import Measured

ABOUT = About(
    collection="small",
    layer="1",
    hook="blocks.1.hook_resid_pre",
    model="tiny",
    d_in=8,
    d_sae=4,
    text="builtin",
    context=16,
    rows=10,
    tokens=150,
    documents=5,
    seed=0,
    features=(0, 1),
)
HISTOGRAM = Histogram(0.0, 1.0, (1,))
LIVE = Feature(
    index=7,
    fires=30,
    density=0.2,
    mean=1.5,
    max=4.25,
    histogram=HISTOGRAM,
    tokens_by_mean=(TokenStat(3, 9.0, 0.1, 1, 1),),
    tokens_by_share=(TokenStat(1, 2.0, 0.75, 20, 25), TokenStat(2, 1.0, 0.125, 5, 9)),
    logits=Logits((Weighted(2, 0.5), Weighted(1, 0.25)), (Weighted(0, -1.5),), HISTOGRAM, 0.1, 0.2, 0.3),
    neighbours=(Neighbour("0", 5, 0.4), Neighbour("1", 9, 0.9), Neighbour("1", 8, 0.8), Neighbour("2", 6, 0.7)),
    coactive=(Coactive(9, 12, 0.5, 3.0),),
    divergence=Measured(0.5, 0.25, 0.75),
)
DEAD = Feature(index=8, fires=0, density=0.0, mean=None, max=None, histogram=None)


def text_of(token: int) -> str:
    return [" zero", " one", ",", "three"][token]


def frame(*features: Feature, **texts: str) -> pd.DataFrame:
    return to_frame(features, ABOUT, texts.get if texts else text_of)  # type: ignore[arg-type]


def test_every_column() -> None:
    assert frame(LIVE).iloc[0].to_dict() == {
        "collection": "small",
        "layer": "1",
        "feature": 7,
        "fires": 30,
        "tokens": 150,
        "density": 0.2,
        "log10_density": math.log10(0.2),
        "mean": 1.5,
        "max": 4.25,
        "dead": False,
        "dense_100": True,
        "dense_10": True,
        "top_tokens": '[" one", ","]',
        "top_token_shares": "[0.75, 0.125]",
        "promoted": '[[",", 0.5], [" one", 0.25]]',
        "suppressed": '[[" zero", -1.5]]',
        "logit_std": 0.1,
        "logit_skew": 0.2,
        "logit_kurtosis": 0.3,
        "nearest": "[[9, 0.9], [8, 0.8]]",
        "nearest_elsewhere": '[["0", 5, 0.4], ["2", 6, 0.7]]',
        "coactive": "[[9, 0.5]]",
        "divergence": 0.5,
        "divergence_lo": 0.25,
        "divergence_hi": 0.75,
    }


def test_a_dead_feature_has_empty_cells() -> None:
    header, row = to_csv(frame(DEAD)).splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    known = {"collection": "small", "layer": "1", "feature": "8", "fires": "0", "tokens": "150", "density": "0.0"}
    known |= {"dead": "True", "dense_100": "False", "dense_10": "False"}
    assert {name: cell for name, cell in cells.items() if cell} == known


@pytest.mark.parametrize(
    ("density", "flags"), [(0.01, (False, False)), (0.0101, (True, False)), (0.1, (True, False)), (0.2, (True, True))]
)
def test_dense_is_above_the_border(density: float, flags: tuple[bool, bool]) -> None:
    row = frame(replace(LIVE, density=density)).iloc[0]
    assert (row["dense_100"], row["dense_10"]) == flags


def test_pandas_reads_back_what_was_written() -> None:
    written = frame(LIVE, DEAD, replace(LIVE, index=9, mean=0.1 + 0.2))
    read = pd.read_csv(io.StringIO(to_csv(written)), dtype={"layer": str})
    for name in written.columns:
        assert read[name].dtype.kind == written[name].dtype.kind, name
    pd.testing.assert_frame_equal(read, written, check_dtype=False, check_exact=True)
    assert read["promoted"].dropna().map(json.loads).tolist() == [[[",", 0.5], [" one", 0.25]]] * 2


def test_a_list_has_ten_tokens_at_most() -> None:
    many = replace(LIVE, tokens_by_share=LIVE.tokens_by_share * 8)
    assert len(json.loads(frame(many)["top_tokens"][0])) == 10


HOSTILE = [
    "=1+1",
    '"',
    "\x1b[2J",
    "\x9b2J",
    "a\r\nb",
    "\u202egnp",
    "\u2028",
    "\U000e0001",
    "[red]x[/red]",
    "é\N{SNOWMAN}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_of_a_token(text: str) -> None:
    """No formula, no new row, no command for the terminal; and the text can be had back."""
    found = to_frame([LIVE], ABOUT, lambda token: text)
    csv_text = to_csv(found)
    assert csv_text.count("\n") == 2
    assert csv_text.replace("\n", "").isprintable()
    cell = pd.read_csv(io.StringIO(csv_text))["top_tokens"][0]
    assert cell.startswith('["')
    assert json.loads(cell) == [text, text]
    shown = printed(found, width=100)
    assert shown.replace("\n", "").isprintable()
    assert json.dumps(text, ensure_ascii=False) in shown or not text.isprintable()


def printed(found: pd.DataFrame, *, width: int, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(rich_table(found, **{"sort": "density", "top": 10, "width": width, **options}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return str(text)


def many() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    features = [replace(LIVE, index=i, density=float(d), mean=float(10 * d)) for i, d in enumerate(rng.random(20))]
    return frame(*features, replace(DEAD, index=20))


@pytest.mark.parametrize("sort", ["density", "mean", "log10_density", "divergence_lo", "dead", "feature"])
def test_the_terminals_table_is_sorted_by_a_column(sort: str) -> None:
    found = many()
    expected = sorted(range(21), key=lambda i: (math.isnan(found[sort][i]), -float(found[sort][i]), i))
    if sort == "feature":
        expected = list(range(21))
    lines = [line for line in printed(found, width=100, sort=sort, top=30).splitlines() if line.startswith("│")]
    assert [int(line.split("│")[1]) for line in lines] == expected


def test_only_the_first_are_shown_and_the_title_says_of_how_many() -> None:
    shown = printed(many(), width=100, top=3)
    assert "3 of 21 features by density" in shown
    assert len([line for line in shown.splitlines() if line.startswith("│")]) == 3


@pytest.mark.parametrize("width", [70, 76, 80, 92, 100, 160])
@pytest.mark.parametrize("sort", ["density", "logit_kurtosis"])
def test_numbers_are_whole_at_any_width(width: int, sort: str) -> None:
    odd = replace(LIVE, index=24_575, density=1.234e-05, mean=1234.5, max=0.00012345, divergence=Measured(0.98765))
    shown = printed(frame(odd), width=width, sort=sort)
    for number in ("24575", "1.234e-05", "1234", "0.0001234", "0.9877", *(["0.3"] if sort == "logit_kurtosis" else [])):
        assert number in shown


def test_unknown_is_an_empty_cell_of_the_terminals_table() -> None:
    (row,) = [line for line in printed(frame(DEAD), width=100).splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["8", "0", "", "", "", "", ""]


@pytest.mark.parametrize("sort", ["absent", "top_tokens", "\x1b[2J"])
def test_a_column_that_cannot_be_sorted_by(sort: str) -> None:
    with pytest.raises(
        UsageError, match=r"features cannot be sorted by `.*`; give one of feature, fires, density, "
    ) as error:
        rich_table(frame(LIVE), sort=sort, top=1, width=100)
    assert str(error.value).isprintable()
