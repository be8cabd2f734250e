"""Results as tables of any width, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from saezoo import terminal
from saezoo.errors import SaezooError, UsageError
from saezoo.evals.counts import densities, densities_csv
from saezoo.evals.intervals import wilson
from saezoo.results import (
    Blocks,
    Measured,
    Result,
    append_csv,
    breakdown_csv,
    measured,
    sparkline,
    to_csv,
    to_frame,
    to_json,
)
from saezoo.tables import tables, to_markdown

METRICS = {
    "ce_sae": Measured(3.4567891, 3.4, 3.5),
    "ce_delta": Measured(0.1234567, 0.1, 0.15),
    "ce_score": Measured(0.98765, 0.98, 0.99),
    "kl_sae": Measured(0.1, None, None),
    "explained_variance": Measured(0.9, 0.1 + 0.2, 1.0),
    "explained_variance_uncentred": Measured(0.93081234, 0.92, 0.94),
    "l0": Measured(57.29, 56.0, 58.5),
    "l1": Measured(None),
    "alive_fraction": Measured(1.0, 0.99, 1.0),
    "dense_100": Measured(1234.0, 1200.0, 1300.0),
}
HISTOGRAM = {"edges": [-2.0, -1.5, -1.0, 0.0], "counts": [1, 0, 50], "never": 3}
ABOUT = "collection layer hook model protocol text context rows tokens documents seed device dtype"


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "collection": "gpt2-small-res",
        "layer": "7",
        "hook": "blocks.7.hook_resid_pre",
        "model": "gpt2-small",
        "protocol": "standard",
        "text": "builtin:heldout",
        "context": 128,
        "rows": 512,
        "tokens": 65024,
        "documents": 37,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "versions": {"torch": "2.13.0", "saezoo": "0.1.0"},
        "metrics": METRICS,
        "histogram": HISTOGRAM,
        "published": {"l0": 57.2, "explained_variance_uncentred": 0.9308, "ce_sae": None},
    }
    return Result(**(values | changes))


def shown(results: list[Result], width: int = 100) -> str:
    file = io.StringIO()
    console = Console(width=width, file=file, color_system=None, legacy_windows=False, markup=False, _environ={})
    for table in tables(results, width):
        console.print(table)
    return file.getvalue()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


PUBLISHED_TABLE = """\
               gpt2-small-res · feb2024 protocol · 65,024 tokens of builtin:heldout
┏━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━┓
┃           ┃         ┃       CE ┃  expl. v. ┃           ┃       ┃         ┃ density ┃           ┃
┃     layer ┃     ΔCE ┃ with SAE ┃ uncentred ┃        L1 ┃    L0 ┃   alive ┃ 1e-6–1  ┃ CE score* ┃
┡━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━┩
│         7 │  0.1235 │    3.457 │    0.9308 │ undefined │ 57.29 │  1.0000 │ ▁ █     │    0.9877 │
│           │ ±0.0250 │   ±0.050 │   ±0.0100 │           │ ±1.25 │ ±0.0050 │         │   ±0.0050 │
│ published │         │          │    0.9308 │           │ 57.20 │         │         │           │
├───────────┼─────────┼──────────┼───────────┼───────────┼───────┼─────────┼─────────┼───────────┤
│   11-post │  0.1235 │    3.457 │    0.9308 │ undefined │ 57.29 │  1.0000 │ ▁ █     │    0.9877 │
│           │ ±0.0250 │   ±0.050 │   ±0.0100 │           │ ±1.25 │ ±0.0050 │         │   ±0.0050 │
└───────────┴─────────┴──────────┴───────────┴───────────┴───────┴─────────┴─────────┴───────────┘
±: half of the 95 % interval over documents
* CE score flatters: its baseline, zero ablation, ruins a residual stream; (mean) and (unigram)
are milder ones. Read ΔCE.
"""

STANDARD_TABLE = """\
      runs/mine · standard protocol · 65,024 tokens of builtin:heldout
┏━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━━┳━━━━━━━━┓
┃       ┃        ┃           ┃ CE score ┃  expl. ┃       ┃        ┃        ┃
┃ layer ┃    ΔCE ┃ CE score* ┃   (mean) ┃   var. ┃    L0 ┃  alive ┃ >1/100 ┃
┡━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━━╇━━━━━━━━┩
│     7 │ 0.1235 │    0.9877 │        - │ 0.9000 │ 57.29 │ 1.0000 │  1,234 │
└───────┴────────┴───────────┴──────────┴────────┴───────┴────────┴────────┘
±: half of the 95 % interval over documents
* CE score flatters: its baseline, zero ablation, ruins a residual stream;
(mean) and (unigram) are milder ones. Read ΔCE.
┏━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━┓
┃       ┃ density ┃       CE ┃        ┃  expl. v. ┃           ┃
┃ layer ┃ 1e-6–1  ┃ with SAE ┃     KL ┃ uncentred ┃        L1 ┃
┡━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━┩
│     7 │ ▁ █     │    3.457 │ 0.1000 │    0.9308 │ undefined │
└───────┴─────────┴──────────┴────────┴───────────┴───────────┘
"""


def unpadded(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_published_table() -> None:
    results = [result(protocol="feb2024"), result(protocol="feb2024", layer="11-post", published={})]
    assert unpadded(shown(results)) == unpadded(PUBLISHED_TABLE)


def test_standard_table_of_80_columns() -> None:
    """Of one document there is no interval. What does not fit goes below, beside what else fits there."""
    metrics = {name: Measured(measured.value) for name, measured in METRICS.items()}
    results = [result(collection="runs/mine", metrics=metrics, published={})]
    assert unpadded(shown(results, 80)) == unpadded(STANDARD_TABLE)


def headers(results: list[Result], width: int) -> list[list[str]]:
    """Labels of each table's columns but the first, on one line."""
    return [[" ".join(str(c.header).split()) for c in table.columns[1:]] for table in tables(results, width)]


def test_a_wide_terminal_shows_more() -> None:
    metrics = dict.fromkeys(["ce_clean", "ce_mean", "kl_sae", "ce_score_mean", "l1", "cosine", *METRICS], Measured(1.0))
    (narrow,), (wide,) = headers([result(metrics=metrics)], 100), headers([result(metrics=metrics)], 200)
    assert set(narrow) < set(wide)
    assert wide[:3] == ["ΔCE", "CE score*", "CE score (mean)"]
    assert {"CE (mean)", "KL", "L1", "cosine"} <= set(wide) - set(narrow)


def test_the_suite_has_tables_of_its_own() -> None:
    metrics = METRICS | {"probing_k1": Measured(0.6, 0.5, 0.7), "absorption_full": Measured(None)}
    assert [table.title for table in tables([result()], 80)][1:] == [None]
    last = tables([result(metrics=metrics)], 80)[-1]
    assert last.title == "full suite"
    assert headers([result(metrics=metrics)], 80)[-1] == ["absorbed (full)", "probe k = 1"]
    assert "undefined" in shown([result(metrics=metrics)], 80)
    assert "0.600" in shown([result(metrics=metrics)], 80)


def test_the_caveat_stands_where_the_score_does() -> None:
    assert "* CE score flatters" in shown([result()])
    without = result(protocol="feb2024", metrics={"ce_delta": Measured(0.1)})
    assert "flatters" not in shown([without])


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
cells = st.tuples(numbers, numbers, numbers).map(lambda ends: Measured(*ends))
names = st.sampled_from(
    [*METRICS, "ce_score_mean", "ce_clean", "cosine", "description_length", "probing_k1", "meta_explained"]
)
results_of = st.builds(
    result,
    protocol=st.sampled_from(["standard", "feb2024"]),
    layer=st.text("abc 11-post", min_size=1, max_size=40),
    metrics=st.dictionaries(names, cells),
    published=st.dictionaries(names, numbers, max_size=3),
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(one=results_of, width=st.sampled_from([80, 100, 131, 200]))
def test_tables_hold_every_number_once_and_whole(one: Result, width: int) -> None:
    text = shown([one], width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    labels = [label for part in headers([one], width) for label in part]
    assert len(labels) == len(set(labels))
    words = set(re.split(r"[\s│┃]+", text))
    for name in ("ce_delta", "l0", "alive_fraction", "description_length"):  # shown by either protocol
        value = one.metrics.get(name, Measured(0.0)).value
        digits = {"l0": 2, "description_length": 1}.get(name, 4)
        assert name not in one.metrics or value is None or abs(value) >= 1e7 or f"{value:,.{digits}f}" in words


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdout", "columns", "width"), [(Terminal, 80, 80), (Terminal, 200, 200), (io.StringIO, 200, 100)]
)
def test_a_pipe_gets_plain_text_of_100_columns(
    monkeypatch: pytest.MonkeyPatch, stdout: type[io.StringIO], columns: int, width: int
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", file := stdout())
    assert terminal.width() == width
    terminal.print_table(*tables([result(), result(layer="8")], terminal.width()))
    assert ("\x1b[" in file.getvalue()) == (stdout is Terminal)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert plain == shown([result(), result(layer="8")], width)


@pytest.mark.parametrize("protocol", ["standard", "feb2024"])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_number_is_cut_off(protocol: str, width: int) -> None:
    text = shown([result(protocol=protocol, layer="11-post")], width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert "57.29" in text
    assert "±1.25" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_long_name_is_folded_and_no_number_is(width: int) -> None:
    text = shown([result(layer="0123456789" * 20)], width)
    assert max(len(line) for line in text.splitlines()) <= width
    words = re.split(r"[\s│┃]+", text)
    assert {"0.1235", "±0.0250", "0.9877", "57.29", "±1.25", "1.0000", "1,234", "published"} <= set(words)
    assert "".join(re.findall(r"\d{12,}", text)).startswith("0123456789" * 3)


@pytest.mark.parametrize("protocol", ["standard", "feb2024"])
def test_what_was_not_measured_is_a_dash(protocol: str) -> None:
    text = shown([result(protocol=protocol, metrics={"l0": Measured(None)}, published={})])
    assert "undefined" in text
    assert " - " in text


@pytest.mark.parametrize("name", ["[red]", "a[/b]", "[bold]x"])
def test_names_are_not_markup(name: str) -> None:
    assert name in shown([result(collection=name)])
    assert name in shown([result(layer=name)])
    assert name in shown([result(text=f"file:{name}")])


def test_markdown() -> None:
    one = result(metrics={"ce_delta": METRICS["ce_delta"], "l0": METRICS["l0"], "l1": Measured(None)})
    assert to_markdown([one, result(layer="11|post", metrics={}, published={})]) == MARKDOWN


MARKDOWN = """\
gpt2-small-res, standard protocol: 65,024 tokens of builtin:heldout, 37 documents. In brackets the 95 % interval over \
documents.

| layer | ΔCE | CE score\\* | CE score (mean) | expl. var. | L0 | alive | \\>1/100 |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 7 | 0.1235 (0.1000 to 0.1500) | - | - | - | 57.29 (56.00 to 58.50)<br>published 57.20 | - | - |
| 11\\|post | - | - | - | - | - | - | - |

| layer | L1 |
| ---: | ---: |
| 7 | undefined |
| 11\\|post | - |

\\* CE score flatters: its baseline, zero ablation, ruins a residual stream; (mean) and (unigram) are milder ones. \
Read ΔCE.
"""


def test_markdown_tables_are_at_most_eight_columns_wide_and_hold_each_metric_once() -> None:
    metrics = METRICS | {"probing_k1": Measured(0.6, 0.5, 0.7), "ce_clean": Measured(3.0)}
    text = to_markdown([result(metrics=metrics)])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert max(line.count("|") for line in lines) <= 9
    labels = [cell for line in lines if line.startswith("| layer") for cell in line.split(" | ")[1:]]
    assert len(labels) == len(set(labels)) == len(metrics) + 1  # ce_score_mean is a dash: it is always shown
    assert "probe k = 1" in text


@pytest.mark.parametrize(
    ("name", "escaped"),
    [("a|b", "a\\|b"), ("*a*_b_", "\\*a\\*\\_b\\_"), ("<b>&", "\\<b\\>\\&"), ("a\nb", "a b"), ("[x](y)", "\\[x\\](y)")],
)
def test_names_are_no_markdown(name: str, escaped: str) -> None:
    text = to_markdown([result(collection=name, layer=name)])
    assert text.startswith(f"{escaped}, standard protocol")
    assert text.count(f"\n| {escaped} |") == text.count("\n| layer |") > 0


def test_append_makes_a_file_and_adds_to_it(tmp_path: Path) -> None:
    path, one, two = tmp_path / "new" / "all.csv", result(), result(layer="8", published={})
    append_csv(path, [one])
    assert path.read_text() == to_csv([one])
    append_csv(path, [two])
    assert path.read_text() == to_csv([one, two])
    assert [file.name for file in path.parent.iterdir()] == ["all.csv"]


@pytest.mark.parametrize(
    "change", [lambda t: t.rstrip("\n"), lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")]
)
def test_append_to_a_file_that_an_editor_saved(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "all.csv"
    path.write_bytes(change(to_csv([result()])).encode())
    append_csv(path, [result(layer="8")])
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    assert [row["layer"] for row in rows] == ["7", "8"]
    assert None not in rows[1] and None not in rows[1].values()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("collection,hook\n", "its column 2 is 'hook', here it is 'layer'"),
        ("collection,layer\n1,2\n", "its column 3 is missing, here it is 'hook'"),
        ("@,more\n", "its column @ is 'more', here it is missing"),
        ("\n", "its column 1 is missing, here it is 'collection'"),
    ],
)
def test_append_refuses_other_columns(tmp_path: Path, header: str, message: str) -> None:
    path, ours = tmp_path / "all.csv", to_csv([result()]).splitlines()[0]
    before = header.replace("@", ours)
    path.write_text(before)
    with pytest.raises(UsageError) as caught:
        append_csv(path, [result()])
    count = str(len(ours.split(",")) + 1)
    assert str(caught.value) == f"cannot append to {path}: {message.replace('@', count)}; give a new file"
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["all.csv"]


def test_append_refuses_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="all.csv: it is not text in UTF-8; give a new file$"):
        append_csv(path, [result()])
    with pytest.raises(SaezooError, match="cannot write .*: "):
        append_csv(tmp_path, [result()])


def blocks() -> Blocks:
    """Three blocks of documents: one of two tokens, an empty one, one of a token without a target. Two features."""
    sums = {
        "tokens": [2.0, 0.0, 1.0],
        "targets": [2.0, 0.0, 0.0],
        "ce_clean": [6.0, 0.0, 0.0],
        "ce_sae": [7.0, 0.0, 0.0],
    }
    sums |= {"kl_sae": [1.0, 0.0, 2.0], "cosine": [1.8, 0.0, 0.5], "norm_in": [6.0, 0.0, 4.0], "l0": [5.0, 0.0, 3.0]}
    sums |= {"unexplained": [0.5, 0.0, 0.75]}
    fires_GF = torch.zeros(32, 2, dtype=torch.float64)
    fires_GF[::2, 1] = 1
    columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in sums.items()}
    return Blocks(columns, torch.zeros(3, 4), fires_GF, torch.full((32,), 4.0, dtype=torch.float64))


def test_breakdown_csv() -> None:
    cell = {"tokens": Measured(9.0), "l0": Measured(1.5, 1.0, 2.0), "ce_delta": Measured(None)}
    rows = rows_of(breakdown_csv([result(breakdowns={"position": [cell, cell], "frequency": [cell]}, blocks=blocks())]))
    assert [(row["by"], row["key"], row["tokens"]) for row in rows] == [
        ("position", "0", "9"),
        ("position", "1", "9"),
        ("frequency", "1", "9"),
        ("document", "0", "2"),
        ("document", "2", "1"),
    ]
    assert (rows[0]["l0"], rows[0]["l0_lo"], rows[0]["l0_hi"], rows[0]["ce_delta"]) == (
        "1.5",
        "1.0",
        "2.0",
        "undefined",
    )
    first, last = rows[3:]
    assert [float(first[name]) for name in ("ce_clean", "ce_sae", "ce_delta", "l0")] == [3.0, 3.5, 0.5, 2.5]
    assert (first["explained_variance_uncentred"], first["l0_lo"]) == ("0.75", "")
    assert [last[name] for name in ("ce_clean", "ce_delta", "l0")] == ["undefined", "undefined", "3.0"]


def test_breakdown_of_what_was_not_broken_down() -> None:
    assert breakdown_csv([result()]) == "collection,layer,by,key,tokens\n"


def test_densities() -> None:
    """The interval's own tests are in test_intervals.py."""
    frame = densities(result(blocks=blocks()))
    about, found = ["collection", "layer", "feature"], ["fires", "tokens", "density", "density_lo", "density_hi"]
    assert list(frame) == about + found
    assert frame[["feature", "fires", "tokens", "density"]].values.tolist() == [[0, 0, 128, 0], [1, 16, 128, 0.125]]
    lo_F, hi_F = wilson(blocks().fires_GF, blocks().tokens_G)
    assert (frame["density_lo"].tolist(), frame["density_hi"].tolist()) == (lo_F.tolist(), hi_F.tolist())
    rows = rows_of(densities_csv([result(blocks=blocks()), result(layer="8", blocks=blocks())]))
    assert [(row["layer"], row["feature"]) for row in rows] == [("7", "0"), ("7", "1"), ("8", "0"), ("8", "1")]
    with pytest.raises(ValueError, match="not known"):
        densities(result())


@pytest.mark.parametrize(
    ("counts", "bars"),
    [
        ([], ""),
        ([0, 0], "  "),
        ([1], "▅"),
        ([0, 1, 1000], " ▁█"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
        ([10**9, 10**9], "██"),
    ],
)
def test_sparkline(counts: list[int], bars: str) -> None:
    assert sparkline(counts) == bars


def test_csv_columns() -> None:
    metrics = [f"{name}{suffix}" for name in METRICS for suffix in ("", "_lo", "_hi", "_published")]
    expected = [*ABOUT.split(), "torch_version", "saezoo_version", *metrics, "density_histogram"]
    assert list(to_frame([result()]).columns) == expected
    assert to_csv([result()]).splitlines()[0] == ",".join(expected)


def test_csv_cells() -> None:
    (row,) = rows_of(to_csv([result()]))
    assert (row["layer"], row["tokens"], row["seed"]) == ("7", "65024", "0")
    assert row["explained_variance_lo"] == "0.30000000000000004"
    assert float(row["ce_sae"]) == METRICS["ce_sae"].value
    assert (row["kl_sae_lo"], row["l1"], row["ce_sae_published"], row["l1_lo"]) == ("", "undefined", "", "")
    assert (row["l0_published"], row["explained_variance_uncentred_published"]) == ("57.2", "0.9308")
    assert row["density_histogram"] == "never:3;-2:1;-1.5:0;-1:50"


def test_csv_of_several_results() -> None:
    rows = rows_of(to_csv([result(), result(layer="11-post", published={})]))
    assert [row["layer"] for row in rows] == ["7", "11-post"]
    assert [row["l0_published"] for row in rows] == ["57.2", ""]


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a\nb", "ü"])
def test_csv_quotes(name: str) -> None:
    assert rows_of(to_csv([result(collection=name)]))[0]["collection"] == name


def test_json() -> None:
    (record,) = to_json([result()])
    assert list(record) == [*to_frame([result()]).columns, "undefined", "breakdowns", "details"]
    assert record["undefined"] == ["l1"]
    assert json.loads(json.dumps([record], allow_nan=False)) == [record]
    assert (record["l1"], record["kl_sae_lo"], record["ce_sae_published"]) == (None, None, None)
    assert record["explained_variance_lo"] == 0.1 + 0.2
    assert record["density_histogram"] == HISTOGRAM


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_undefined(value: float) -> None:
    """A score divides by a difference that can be 0."""
    assert measured(value, 0.0, 1.0) == Measured(None)
    assert measured(1.0, value, 1.0) == Measured(1.0)
    assert measured(1.0, 0.5, 2.0) == Measured(1.0, 0.5, 2.0)
    with pytest.raises(ValueError, match="undefined"):
        _ = Measured(None).known
