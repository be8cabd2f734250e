"""Results as a table of 100 columns, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from saezoo.results import Measured, Result, measured, sparkline, table, to_csv, to_frame, to_json

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


def shown(results: list[Result]) -> str:
    file = io.StringIO()
    Console(width=100, file=file, color_system=None, legacy_windows=False, _environ={}).print(table(results))
    return file.getvalue()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


PUBLISHED_TABLE = """\
        gpt2-small-res · feb2024 protocol · 65,024 tokens of builtin:heldout
┏━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━━━┓
┃     layer ┃ CE with SAE ┃ expl. var. unc. ┃ L1 ┃    L0 ┃   alive ┃ density 1e-6–1 ┃
┡━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━╇━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━━━┩
│         7 │       3.457 │          0.9308 │  - │ 57.29 │  1.0000 │ ▁ █            │
│           │      ±0.050 │         ±0.0100 │    │ ±1.25 │ ±0.0050 │                │
│ published │             │          0.9308 │    │ 57.20 │         │                │
├───────────┼─────────────┼─────────────────┼────┼───────┼─────────┼────────────────┤
│   11-post │       3.457 │          0.9308 │  - │ 57.29 │  1.0000 │ ▁ █            │
│           │      ±0.050 │         ±0.0100 │    │ ±1.25 │ ±0.0050 │                │
└───────────┴─────────────┴─────────────────┴────┴───────┴─────────┴────────────────┘
±: half of the 95 % interval over documents
"""

STANDARD_TABLE = """\
          runs/mine · standard protocol · 65,024 tokens of builtin:heldout
┏━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━━━┓
┃ layer ┃    ΔCE ┃ CE score ┃ expl. var. ┃    L0 ┃  alive ┃ >1/100 ┃ density 1e-6–1 ┃
┡━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━━━┩
│     7 │ 0.1235 │   0.9877 │     0.9000 │ 57.29 │ 1.0000 │  1,234 │ ▁ █            │
└───────┴────────┴──────────┴────────────┴───────┴────────┴────────┴────────────────┘
±: half of the 95 % interval over documents
"""


def unpadded(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_published_table() -> None:
    results = [result(protocol="feb2024"), result(protocol="feb2024", layer="11-post", published={})]
    assert unpadded(shown(results)) == unpadded(PUBLISHED_TABLE)


def test_standard_table() -> None:
    """Of one document there is no interval."""
    metrics = {name: Measured(measured.value) for name, measured in METRICS.items()}
    results = [result(collection="runs/mine", metrics=metrics, published={})]
    assert unpadded(shown(results)) == unpadded(STANDARD_TABLE)


@pytest.mark.parametrize("protocol", ["standard", "feb2024"])
def test_no_number_is_cut_off(protocol: str) -> None:
    text = shown([result(protocol=protocol, layer="11-post")])
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "57.29" in text
    assert "±1.25" in text


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
    assert list(record) == [*to_frame([result()]).columns, "undefined", "breakdowns"]
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
