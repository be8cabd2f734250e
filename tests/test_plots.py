"""The pictures of an evaluation: there, complete, readable, and never made up."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from test_report import NAMES, boxes_of, pictures, result, tick_labels

from saezoo import plots
from saezoo.errors import SaezooError
from saezoo.plots import save_plots
from saezoo.results import Measured, Result

Draw = Callable[[Sequence[Result]], Figure]
DRAW: list[Draw] = [plots.densities, plots.cross_entropy, plots.sparsity, plots.by_position, plots.by_frequency]
FILES = ["cross_entropy", "density", "frequency", "position", "sparsity"]


def cell(i: int, layer: int) -> dict[str, Measured]:
    """Metrics of position or tenth `i`: the first is undefined, the last has no interval."""
    if i == 0:
        return {"ce_delta": Measured(None), "l0": Measured(None), "explained_variance_uncentred": Measured(None)}
    delta, half = 0.1 * layer + 0.2 / i, None if i == 9 else 0.05
    ends = (None, None) if half is None else (delta - half, delta + half)
    return {"ce_delta": Measured(delta, *ends), "l0": Measured(50.0 + i), "explained_variance_uncentred": Measured(0.9)}


def measured(layer: int) -> Result:
    """As in test_report.py, with other numbers for each layer and with breakdowns."""
    delta, l0 = 0.1 + 0.05 * (layer % 5), 40.0 + 3 * layer
    metrics = {
        "ce_clean": Measured(3.3, 3.2, 3.4),
        "ce_sae": Measured(3.3 + delta, 3.2 + delta, 3.4 + delta),
        "ce_mean": Measured(8.0 + 0.1 * layer, 7.9, 9.5),
        "ce_unigram": Measured(7.0),
        "ce_delta": Measured(delta, delta - 0.02, delta + 0.03),
        "l0": Measured(l0, l0 - 2, l0 + 1),
        "unseen_density": Measured(4.6e-5),
    }
    cells = [cell(i, layer) for i in range(10)]
    counts = [0, 5, 200, 900, 4000, 6000, 5000, 2000, 500, 300, 100, 20]
    return result(
        NAMES[layer],
        metrics=metrics,
        histogram={"edges": [x / 2 for x in range(-12, 1)], "counts": counts, "never": 100 * layer},
        published={"ce_sae": 3.4, "ce_clean": None},
        breakdowns={"position": cells, "frequency": cells},
    )


def undefined(one: Result) -> Result:
    """Nothing is defined, nothing fired."""
    nothing = dict.fromkeys(one.metrics, Measured(None))
    cells = [dict.fromkeys(cell(1, 0), Measured(None))] * 10
    dead = one.histogram | {"counts": [0] * 12, "never": 24576}
    breakdowns = {"position": cells, "frequency": cells}
    return dataclasses.replace(one, metrics=nothing, published={}, histogram=dead, breakdowns=breakdowns)


def bare(one: Result) -> Result:
    """No intervals and no breakdowns, as of a few documents by an older version."""
    metrics = {name: Measured(found.value) for name, found in one.metrics.items()}
    return dataclasses.replace(one, metrics=metrics, breakdowns={})


def test_files(tmp_path: Path) -> None:
    paths = save_plots([measured(0), measured(1)], tmp_path / "new" / "plots")
    assert sorted(path.name for path in paths) == sorted(
        f"{name}.{ending}" for name in FILES for ending in ("png", "svg")
    )
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == sorted(path.name for path in paths)
    assert pictures(tmp_path / "new" / "plots") == [f"{name}.png" for name in FILES]
    for path in paths:
        if path.suffix == ".svg":
            root = ET.parse(path).getroot()
            assert root.tag.endswith("svg") and len(list(root.iter())) > 100
            known = {element.get("id") for element in root.iter()}
            used = re.findall(r'(?:href="|url\()#([\w-]+)', path.read_text(encoding="utf-8"))
            assert used and set(used) <= known, "nothing that is used was taken out"


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in save_plots([measured(3)], tmp_path / "a")}
    with rc_context({"font.size": 30, "text.usetex": True, "svg.hashsalt": "other"}):
        again = {path.name: path.read_bytes() for path in save_plots([measured(3)], tmp_path / "b")}
    assert first == again


def test_what_was_not_broken_down_has_no_picture(tmp_path: Path) -> None:
    assert [path.name for path in save_plots([bare(measured(0))], tmp_path) if path.suffix == ".svg"] == [
        "density.svg",
        "cross_entropy.svg",
        "sparsity.svg",
    ]


@pytest.mark.parametrize(
    "results",
    [
        [undefined(measured(0))],
        [undefined(measured(0)), bare(measured(1)), measured(2)],
        [result(metrics={}, breakdowns={"position": [{}], "frequency": [{}]})],
        [result("$x^2$"), result("_a"), result("<b>")],
    ],
    ids=["undefined", "mixed", "nothing measured", "strange names"],
)
def test_what_is_missing_does_not_matter(tmp_path: Path, results: list[Result]) -> None:
    paths = save_plots(results, tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)
    assert all(ET.parse(path) for path in paths if path.suffix == ".svg")


@pytest.mark.parametrize("draw", DRAW, ids=lambda draw: draw.__name__)
def test_undefined_is_said_and_not_drawn(draw: Draw) -> None:
    figure = draw([undefined(measured(0))])
    if draw is plots.densities:
        assert "24,576 of 24,576 never fired" in figure.axes[0].get_title()
        return
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == ["undefined"]
        assert not [y for line in axis.get_lines() for y in heights(line) if not math.isnan(y)]


@pytest.mark.parametrize("layers", [1, 2, 4, 12, 13])
@pytest.mark.parametrize("draw", DRAW, ids=lambda draw: draw.__name__)
def test_no_text_is_cut_off_or_covered(draw: Draw, layers: int) -> None:
    figure = draw([measured(i) for i in range(layers)])
    boxes = boxes_of(figure)
    groups = [boxes, *(tick_labels(axis) for panel in figure.axes for axis in (panel.xaxis, panel.yaxis))]
    assert not [pair for group in groups for pair in combinations(group, 2) if Bbox.intersection(*pair)]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize(
    ("draw", "panels"),
    [
        (plots.densities, 5),
        (plots.cross_entropy, 2),
        (plots.sparsity, 1),
        (plots.by_position, 15),
        (plots.by_frequency, 15),
    ],
)
def test_panels(draw: Draw, panels: int) -> None:
    assert len(draw([measured(i) for i in range(5)]).axes) == panels


def heights(line: Any) -> list[float]:
    return [float(y) for y in line.get_ydata()]


def lines_of(axis: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): heights(line) for line in axis.get_lines()}


def test_cross_entropies_and_their_intervals() -> None:
    left, right = plots.cross_entropy([measured(0), undefined(measured(1)), measured(2)]).axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("cross-entropy (nats/token)", "ΔCE (nats/token)")
    assert left.get_xlabel() == right.get_xlabel() == "layer"
    found = lines_of(left)
    assert found["with SAE"] == pytest.approx([3.4, 3.5]), "and nothing for the one that is undefined"
    assert set(found) >= {"model untouched", "with SAE", "mean ablation", "unigram", "published"}
    assert found["published"] == [3.4, 3.4]
    bars: Any = right.collections[0]
    ends = [part[:, 1].tolist() for part in bars.get_segments() if len(part)]
    assert [y for pair in ends for y in pair if not math.isnan(y)] == pytest.approx([0.08, 0.13, 0.18, 0.23])
    assert right.get_ylim()[0] == 0.0


def test_every_sae_is_a_named_point() -> None:
    """Also where many lie at one place: no name covers another, or leaves the panel."""
    results = [measured(i) for i in range(13)] + [dataclasses.replace(measured(0), layer=f"copy {i}") for i in range(5)]
    figure = plots.sparsity([*results, undefined(measured(0))])
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("L0 (features/token)", "ΔCE (nats/token)")
    names = [text for text in axis.texts if isinstance(text, Annotation)]
    assert [text.get_text() for text in names] == [one.layer for one in results]
    assert [text.xy for text in names][:2] == [(40.0, 0.1), (43.0, pytest.approx(0.15))]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in names]  # without the line to the point
    assert not [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]
    assert all(axis.bbox.count_contains(box.corners()) == 4 for box in boxes)


@pytest.mark.parametrize(("draw", "first"), [(plots.by_position, 0), (plots.by_frequency, 1)])
def test_curves_and_their_bands(draw: Draw, first: int) -> None:
    figure = draw([measured(0), measured(1)])
    assert [axis.get_title() for axis in figure.axes[:3]] == list(plots._BY_CELL.values())
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["layer 0", "layer 1"]
    line: Any = figure.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(range(first, first + 10))
    assert math.isnan(heights(line)[0])
    assert heights(line)[1:3] == pytest.approx([0.2, 0.1])
    band: Any = figure.axes[0].collections[0]
    (outline,) = [path.vertices for path in band.get_paths()]
    assert (outline[:, 0].min(), outline[:, 0].max()) == (first + 1, first + 8), "no band where no interval is known"
    assert (outline[:, 1].min(), outline[:, 1].max()) == pytest.approx((0.2 / 8 - 0.05, 0.25))


def test_density_regions() -> None:
    (axis,) = plots.densities([measured(3)]).axes
    patches: list[Any] = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    assert axis.get_title() == "layer 3: 300 of 19,325 never fired"
    spans = {(round(p.get_x(), 3), round(p.get_width(), 3), p.get_hatch()) for p in patches}
    assert {(-2.0, 1.0, None), (-1.0, 1.0, None)} <= spans, "too dense"
    unseen = round(math.log10(4.6e-5) + 6, 3)
    assert (-6.0, unseen, "////") in spans, "the sample is blind there"
    (never,) = [p for p in patches if p.get_x() == -7.25]
    assert (never.get_height(), to_rgb(never.get_facecolor())) == (300, (1, 1, 1))


def test_what_differs_also_differs_in_grey() -> None:
    """The marks of one panel have shapes of their own; the shades are apart."""
    markers = [series.marker for series in plots._CROSS_ENTROPIES]
    assert len(set(markers)) == len(markers)
    (axis,) = plots.densities([measured(0)]).axes
    grey = sorted({round(sum(to_rgb(p.get_facecolor())) / 3, 2) for p in axis.patches if p.get_hatch() is None})
    assert all(b - a > 0.1 for a, b in zip(grey, grey[1:], strict=False))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaezooError, match="cannot write .*density.png: "):
        save_plots([measured(0)], tmp_path / "file")
