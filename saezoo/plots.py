"""Pictures of an evaluation: densities, cross-entropy, sparsity, and what depends on position and frequency.

They are made to be read in grey too: what differs has another shape or place, not only another colour. An undefined
value is a gap, an unknown interval is no bar.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saezoo import files
from saezoo.results import Measured, Result, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito 2008: for the colour-blind, too
_NEVER = -7.0
"""Where the bar of the features that never fired stands on the axis of log10 density, left of all others."""


class _Series(NamedTuple):
    metric: str
    label: str
    marker: str
    colour: str


_CROSS_ENTROPIES = (
    _Series("ce_clean", "model untouched", "x", "black"),
    _Series("ce_sae", "with SAE", "o", _BLUE),
    _Series("ce_mean", "mean ablation", "^", _ORANGE),
    _Series("ce_unigram", "unigram", "s", _GREEN),
)
_BY_CELL = {
    "ce_delta": "ΔCE (nats/token)",
    "l0": "L0 (features/token)",
    "explained_variance_uncentred": "expl. var., uncentred",
}


def save_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw `results` into `folder`, each picture as PNG and SVG.

    density: how many features fire how often; cross_entropy: CE and ΔCE by layer; sparsity: L0 against ΔCE; position
    and frequency: ΔCE, L0 and explained variance by position in the row and by tenth of the tokens, where known.

    Returns the files' paths. Raises SaezooError if `folder` cannot be written.
    """
    from matplotlib import rc_context, style

    pictures: dict[str, Callable[[Sequence[Result]], Figure]] = {
        "density": densities,
        "cross_entropy": cross_entropy,
        "sparsity": sparsity,
    }
    if any(result.breakdowns.get("position") for result in results):
        pictures["position"] = by_position
    if any(result.breakdowns.get("frequency") for result in results):
        pictures["frequency"] = by_frequency
    paths = []
    # The user's own settings would make another picture than the one that was looked at. The salt: same file again.
    with style.context("default"), rc_context({"svg.hashsalt": "saezoo"}):
        for name, draw in pictures.items():
            figure = draw(results)
            paths += [folder / f"{name}.png", folder / f"{name}.svg"]
            save(figure, *paths[-2:])
    return paths


def grid(panels: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes of `width` x `height` inches."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def literal(text: str) -> str:
    """A name without matplotlib's mathematics in it."""
    return text.replace("$", r"\$")


def densities(results: Sequence[Result]) -> Figure:
    """A histogram of log10 density for each SAE. Shaded: too dense; hatched: so rare that this sample may miss it."""
    from matplotlib.patches import Patch

    shades: dict[str, dict[str, Any]] = {
        "above 1/100": {"color": "0.9"},
        "above 1/10": {"color": "0.78"},
        "may be missed by this sample": {"facecolor": "none", "edgecolor": "0.55", "hatch": "////", "linewidth": 0},
    }
    dense, denser, unsure = shades.values()
    # A picture of one panel must still be as wide as the label below it.
    figure, axes = grid(len(results), 4, max(3.0, 6.4 / len(results)), 2.4, sharex=True, sharey=True)
    for axis, result in zip(axes, results, strict=True):
        edges, counts, never = (result.histogram[key] for key in ("edges", "counts", "never"))
        axis.axvspan(-2, -1, zorder=0, **dense)
        axis.axvspan(-1, 0, zorder=0, **denser)
        unseen = _metric(result, "unseen_density").value
        if unseen is not None and unseen > 10 ** edges[0]:
            axis.axvspan(edges[0], math.log10(unseen), zorder=0, **unsure)
        axis.stairs(counts, edges, fill=True, color=_BLUE)
        if never:
            axis.bar([_NEVER], [never], width=0.5, facecolor="white", edgecolor="black")
        axis.set_title(f"layer {literal(result.layer)}: {never:,} of {never + sum(counts):,} never fired", fontsize=8.5)
        axis.set(xlim=(_NEVER - 0.5, 0))
        axis.set_xticks([_NEVER, *range(-6, 1)], ["never", *map(str, range(-6, 1))], fontsize=8)
    for axis in axes[-4:]:
        axis.tick_params(labelbottom=True)  # the lowest of each column, also where the last row is short
    figure.supxlabel("log10 of the fraction of tokens on which a feature fires", fontsize=10)
    figure.supylabel("features", fontsize=10)
    patches = [Patch(label=label, **shade) for label, shade in shades.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, fontsize=8.5)
    return figure


def cross_entropy(results: Sequence[Result]) -> Figure:
    """Two panels by layer: CE of the model untouched, with the SAE and of the baselines; ΔCE."""
    figure, (left, right) = grid(2, 2, max(4.0, 1.5 + 0.3 * len(results)), 3.8)
    _by_layer(left, results, _CROSS_ENTROPIES, "cross-entropy (nats/token)")
    _by_layer(right, results, [_Series("ce_delta", "with SAE", "o", _BLUE)], "ΔCE (nats/token)")
    low, high = min(0.0, right.get_ylim()[0]), right.get_ylim()[1]
    right.set_ylim(low, high + 0.04 * (high - low))
    marks = {
        label: mark for axis in (left, right) for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if marks:
        place: dict[str, Any] = {"loc": "outside upper center", "ncols": 5, "fontsize": 8.5, "columnspacing": 1}
        labels = sorted(marks, key="published".__eq__)  # last
        figure.legend([marks[label] for label in labels], labels, **place)
    return figure


def sparsity(results: Sequence[Result]) -> Figure:
    """L0 against ΔCE, a point for each SAE, with its name."""
    figure, (axis,) = grid(1, 1, 5.4, 4.2)
    known = []
    for result in results:
        x, y = _metric(result, "l0"), _metric(result, "ce_delta")
        if x.value is None or y.value is None:
            continue
        known.append((x.value, y.value, literal(result.layer)))
        axis.plot(_ends(x), [y.value] * 2, color="0.5", linewidth=1.2)
        axis.plot([x.value] * 2, _ends(y), color="0.5", linewidth=1.2)
        axis.plot([x.value], [y.value], "o", color=_BLUE, markersize=5)
    axis.set(xlabel="L0 (features/token)", ylabel="ΔCE (nats/token)")
    axis.margins(0.12)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    _name(figure, axis, known)
    if not known:
        _say_undefined(axis)
    return figure


def by_position(results: Sequence[Result]) -> Figure:
    """ΔCE, L0 and explained variance by position in the row, a row of panels for each SAE."""
    figure, _ = _by_cell(results, "position", 0)
    figure.supxlabel("position in the row", fontsize=10)
    return figure


def by_frequency(results: Sequence[Result]) -> Figure:
    """ΔCE, L0 and explained variance by tenth of the tokens, from the most frequent ones to the rarest."""
    figure, axes = _by_cell(results, "frequency", 1)
    for axis in axes:
        axis.set_xticks([1, 4, 7, 10])
    figure.supxlabel("tenth of the tokens by how frequent they are: 1 the most frequent, 10 the rarest", fontsize=10)
    return figure


def _by_cell(results: Sequence[Result], by: str, first: int) -> tuple[Figure, list[Axes]]:
    """A row of panels for each SAE, a column for each metric: value and band against the cell, counted from `first`."""
    height = 1.7 if len(results) < 6 else 1.3
    figure, axes = grid(3 * len(results), 3, 3.0, height, sharex=True, sharey="col")
    for axis, (result, metric) in zip(axes, ((r, m) for r in results for m in _BY_CELL), strict=True):
        cells = [cell.get(metric, Measured(None)) for cell in result.breakdowns.get(by, [])]
        places = range(first, first + len(cells))
        values = [math.nan if cell.value is None else cell.value for cell in cells]
        low, high = zip(*map(_ends, cells), strict=True) if cells else ((), ())
        axis.fill_between(places, low, high, color="0.8", linewidth=0)
        axis.plot(places, values, marker="o" if by == "frequency" else None, markersize=3, color=_BLUE, linewidth=1.1)
        if by == "position":  # 0 can be BOS, which is like no other
            axis.plot(places[:1], values[:1], "o", color=_BLUE, markersize=4)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.locator_params(nbins=4, min_n_ticks=2)
        if all(map(math.isnan, values)):
            _say_undefined(axis)
    for axis, label in zip(axes, _BY_CELL.values(), strict=False):
        axis.set_title(label, fontsize=9.5)
    for axis, result in zip(axes[::3], results, strict=True):
        axis.set_ylabel(f"layer {literal(result.layer)}", fontsize=9)
    return figure, axes


def _metric(result: Result, name: str) -> Measured:
    return result.metrics.get(name, Measured(None))


def _ends(measured: Measured) -> tuple[float, float]:
    """Of the interval; NaN, which is not drawn, where it is not known."""
    return (math.nan, math.nan) if measured.lo is None or measured.hi is None else (measured.lo, measured.hi)


def _by_layer(axis: Axes, results: Sequence[Result], shown: Sequence[_Series], label: str) -> None:
    """For each SAE a point for each value that is known, a bar for each interval, a diamond for what was published."""
    names = [literal(result.layer) for result in results]
    for i, series in enumerate(shown):
        places = [k + 0.18 * (i - (len(shown) - 1) / 2) for k in range(len(results))]
        found = [_metric(result, series.metric) for result in results]
        known = [(x, a.value) for x, a in zip(places, found, strict=True) if a.value is not None]
        beside = [result.published.get(series.metric) for result in results]
        published = [(x, value) for x, value in zip(places, beside, strict=True) if value is not None]
        _marks(axis, published, _Series("", "published", "D", "0.35"), markersize=9, fillstyle="none")
        _marks(axis, known, series, markersize=4.5)
        # An interval of its own middle: the measured value need not lie inside a bootstrap's.
        middles, halves = [sum(_ends(a)) / 2 for a in found], [(_ends(a)[1] - _ends(a)[0]) / 2 for a in found]
        axis.errorbar(places, middles, yerr=halves, fmt="none", capsize=2.5, color=series.colour, elinewidth=1.1)
    crowded = len(names) * max(map(len, names)) > 40
    axis.set(xlim=(-0.6, len(names) - 0.4), xlabel="layer", ylabel=label)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if crowded else 0)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    if all(_metric(result, series.metric).value is None for result in results for series in shown):
        _say_undefined(axis)


def _marks(axis: Axes, points: Sequence[tuple[float, float]], series: _Series, **style: Any) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, series.marker, color=series.colour, label=series.label, **style)


def _say_undefined(axis: Axes) -> None:
    axis.text(0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", color="0.4")


def _name(figure: Figure, axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the name of each point (x, y, name) near it, where it covers nothing that is drawn, nor another name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the scales are now what they will be
    dots = figure.dpi / 72  # to a point
    drawn = [line.get_path().transformed(axis.transData).get_extents() for line in axis.get_lines()]
    known = [box for box in drawn if not math.isnan(box.x0 + box.y0)]
    taken = [box.padded(3 * dots if box.width == box.height == 0 else dots) for box in known]
    for right, up, name in points:
        x, y = axis.transData.transform((right, up))
        arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "arrowprops": arrow}
        label = axis.annotate(name, (right, up), (0, 0), textcoords="offset points", **middle)
        extent = label.get_window_extent()
        for step in range(600):  # outwards in a spiral, from above on the right
            angle, distance = math.pi / 4 + 0.7 * step, 9 + step / 6
            over, above = distance * math.cos(angle), distance * math.sin(angle)
            corner = (x + over * dots - extent.width / 2, y + above * dots - extent.height / 2)
            box = Bbox.from_bounds(*corner, extent.width, extent.height)
            if axis.bbox.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                break
        label.set_position((over, above))
        taken.append(box)


def save(figure: Figure, png: Path, svg: Path) -> None:
    """Write a figure to both, each a third to a half as long as matplotlib makes it."""
    from PIL import Image  # matplotlib needs it too

    dots, lines = io.BytesIO(), io.StringIO()
    figure.savefig(dots, format="png", dpi=120)
    figure.savefig(lines, format="svg", metadata={"Date": None})
    with files.replacing(png) as temporary:
        Image.open(dots).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    write_text(svg, _shorter(lines.getvalue()))


def _shorter(svg: str) -> str:
    """Without indents and names of groups; lines to a hundredth of a point."""
    for what, instead in (
        (r"^ +", ""),
        (r' id="[\w.]+_\d+"', ""),
        (r"^L (-?\d+\.\d\d)\d* (-?\d+\.\d\d)\d* $", r"L \1 \2"),
    ):
        svg = re.sub(what, instead, svg, flags=re.MULTILINE)
    return svg
