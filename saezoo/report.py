"""A run folder in words and pictures: report.md, training.png, density.png, published.png."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saezoo import files
from saezoo.plots import densities as _densities
from saezoo.plots import grid as _grid
from saezoo.plots import literal as _drawn
from saezoo.results import Measured, Result, write_text
from saezoo.spreadsheets import original
from saezoo.tables import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Log = dict[str, list[dict[str, float]]]

METRICS = {
    "ce_clean": "CE, model untouched (nats/token)",
    "ce_sae": "CE with SAE (nats/token)",
    "ce_delta": "ΔCE (nats/token)",
    "ce_score": "CE score",
    "kl_sae": "KL with SAE (nats/token)",
    "explained_variance": "explained variance",
    "explained_variance_uncentred": "explained variance, uncentred",
    "l0": "L0 (features/token)",
    "l1": "L1 (units of the activations)",
    "alive_fraction": "alive fraction",
    "dead": "dead (features)",
}
"""What the tables show, and how it is called. Other metrics appear under their own name if they were published."""


class _Curve(NamedTuple):
    column: str
    label: str
    log: bool


_CURVES = (
    _Curve("mse", "mse (term of the loss)", True),
    _Curve("l1", "L1 (term of the loss)", True),
    _Curve("l0", "L0 (features/token)", True),
    _Curve("explained_variance_uncentred", "explained variance, uncentred", False),
    _Curve("dead", "dead features", False),
)

_INTERVALS = (
    "Intervals are 95 % and over documents: what another sample of text of the same kind and size would give for "
    "these same SAEs. They do not cover what another training seed would give."
)
_NO_INTERVALS = "There are no intervals: the text holds too few documents for them."
_BESIDE = (
    "Nor do they cover the scatter of the published values, which come from samples of their own; and of many "
    "published values some lie outside by chance. So *inside* does not prove two SAEs equal, and *below* or *above* "
    "is no error of either."
)
_TRAINING = (
    "One line per layer: each point is a single training batch, so a line's jitter is the scatter between batches; "
    "mse and L1 are terms of the recipe's loss, not the metrics of these names above; explained variance below 0 is "
    "cut off; dead features had not fired for more than the recipe's `dead_after_steps`."
)
_DENSITY = (
    "How many features fire on which fraction of the evaluated tokens; densities below 1e-6 are in the first bar, and "
    "features that never fired in the white one. In the hatched part a feature has more than a 5 % chance of never "
    "firing in this sample. By the post's reading, densities above 1/100 (shaded) are too dense."
)
_PUBLISHED = (
    "Dots are measured, bars their 95 % intervals (none where none is known), diamonds are published; a diamond that "
    "is level with the bar beside it is called *inside* in the tables."
)


def write_report(folder: Path, title: str, facts: Mapping[str, str], results: Sequence[Result]) -> Path:
    """Write report.md and its pictures into a run folder.

    Args:
        folder: the run folder. Its log.csv gives the training curves; columns that it lacks are left out, and so is
            the picture without a log.
        title: heading of the report.
        facts: what was run, on what and how fast, as words; in this order.
        results: the final evaluation, one per SAE.

    Returns the path of report.md. Raises SaezooError if `folder` cannot be written.
    """
    from matplotlib import style

    log = _read_log(folder / "log.csv")
    about = [(literal(key), literal(value)) for key, value in facts.items()]
    parts = [f"# {literal(title)}", markdown_table(("run", ""), about), *_measurements(results)]
    # The user's own matplotlib settings (TeX, sizes) would make another picture than the one that was looked at.
    with style.context("default"):
        if curves := [curve for curve in _CURVES if _finite(log, curve.column)]:
            picture = _picture(folder, "training.png", "training curves", _training(log, curves))
            parts += ["## Training", picture, _TRAINING]
        parts += ["## Density", _picture(folder, "density.png", "density histograms", _densities(results)), _DENSITY]
        if _published_metrics(results):
            picture = _picture(folder, "published.png", "measured and published", _comparison(results))
            parts += ["## Measured and published", picture, _PUBLISHED]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _read_log(path: Path) -> Log:
    """Layer -> its rows; a cell that is missing or no number is NaN. Empty without a log."""
    log: Log = {}
    if not path.is_file():
        return log
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {key: _number(row.get(key)) for key in ("tokens", *(curve.column for curve in _CURVES))}
            if row.get("layer"):  # not the rest of a line that was cut off
                log.setdefault(original(row["layer"]), []).append(numbers)
    return log


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def _finite(log: Log, column: str) -> list[float]:
    return [row[column] for rows in log.values() for row in rows if math.isfinite(row[column])]


def _measurements(results: Sequence[Result]) -> list[str]:
    """What was evaluated on what, and one table per SAE."""
    first, published = results[0], bool(_published_metrics(results))
    sample = f"{first.tokens:,} tokens of {literal(first.text)}, from {first.documents:,} documents, seed {first.seed}"
    known = any(measured.lo is not None for result in results for measured in result.metrics.values())
    words = [_INTERVALS, _BESIDE] if known and published else [_INTERVALS if known else _NO_INTERVALS]
    parts = ["## Evaluation", f"Protocol `{first.protocol}`: {sample}.", " ".join(words)]
    for result in results:
        header = ("metric", "measured [95 % interval]", "published", "the published value lies")
        rows = [(literal(label), *_compared(result, metric)) for metric, label in _shown(result).items()]
        parts.append(f"### Layer {literal(result.layer)}")
        parts.append(
            markdown_table(header, rows) if published else markdown_table(header[:2], [row[:2] for row in rows])
        )
    return parts


def _shown(result: Result) -> dict[str, str]:
    """Metric -> its name in words."""
    names = [metric for metric in METRICS if metric in result.metrics]
    names += [metric for metric, value in result.published.items() if value is not None]
    return {metric: METRICS.get(metric, metric) for metric in names}


def _compared(result: Result, metric: str) -> tuple[str, str, str]:
    """Measured, published, and where the published value lies: from the numbers before they are rounded."""
    value, lo, hi = result.metrics.get(metric, Measured(None))
    published = result.published.get(metric)
    beside = "–" if published is None else f"{published:.6g}"
    if value is None or lo is None or hi is None:
        return _rounded(value), beside, "–"
    measured = "{0:,.{3}f} [{1:,.{3}f}, {2:,.{3}f}]".format(value, lo, hi, digits(value, lo, hi))
    if published is None:
        return measured, beside, "–"
    return measured, beside, "below" if published < lo else "above" if published > hi else "inside"


def digits(value: float, lo: float, hi: float) -> int:
    """Decimals to show: none of counts, else those that give two digits of the interval's width."""
    if value.is_integer() and (hi == lo or hi - lo >= 1):
        return 0
    return 4 if hi <= lo else max(0, 1 - math.floor(math.log10(hi - lo)))


def _rounded(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; foreign text in it must be `literal` already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _picture(folder: Path, name: str, alternative: str, figure: Figure) -> str:
    """Write a figure; returns the Markdown that embeds it."""
    with files.replacing(folder / name) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return f"![{alternative}]({name})"


def _colours(n: int) -> list[Any]:
    """Dark to light, in the order of the layers; ends before the yellow that white swallows."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, n - 1)) for i in range(n)]


def _training(log: Log, curves: Sequence[_Curve]) -> Figure:
    figure, axes = _grid(len(curves) + 1, 3, 4.2, 3.2)
    for axis, curve in zip(axes, curves, strict=False):
        for colour, (layer, rows) in zip(_colours(len(log)), log.items(), strict=True):
            x, y = [row["tokens"] for row in rows], [row[curve.column] for row in rows]
            marker = "." if len(rows) < 20 else None
            axis.plot(x, y, color=colour, linewidth=1.0, marker=marker, label=f"layer {_drawn(layer)}")
        _dress(axis, curve, max(_finite(log, curve.column)))
    axes[-1].axis("off")  # the last panel holds the legend
    columns = 1 if len(log) < 9 else 2
    legend = axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center left", ncols=columns)
    for line in legend.get_lines():
        line.set_linewidth(3)
    return figure


def _dress(axis: Axes, curve: _Curve, highest: float) -> None:
    """Scales and labels of a panel whose lines are drawn."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set(xlabel="training tokens", ylabel=curve.label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if curve.log and highest > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    if curve.column == "dead":
        axis.set_ylim(-0.02 * max(highest, 1), 1.05 * max(highest, 1))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    if curve.column == "explained_variance_uncentred" and highest > 0:
        axis.set_ylim(max(0, axis.get_ylim()[0]), 1.02)  # the first steps can lie far below, and would squeeze the rest


def _published_metrics(results: Sequence[Result]) -> dict[str, str]:
    """Metrics with a published value on any of the SAEs -> their names in words."""
    known = {metric for result in results for metric, value in result.published.items() if value is not None}
    return {metric: label for result in results for metric, label in _shown(result).items() if metric in known}


def _comparison(results: Sequence[Result]) -> Figure:
    metrics = _published_metrics(results)
    places, names = range(len(results)), [_drawn(result.layer) for result in results]
    crowded = len(names) * max(map(len, names)) > 40
    figure, axes = _grid(len(metrics), 3, 4.2, 3.0)
    for axis, (metric, label) in zip(axes, metrics.items(), strict=True):
        found = [result.metrics.get(metric, Measured(None)) for result in results]
        bounds = [(math.nan, math.nan) if a.lo is None or a.hi is None else (a.lo, a.hi) for a in found]
        published = [math.nan if (value := result.published.get(metric)) is None else value for result in results]
        left, right = [i - 0.17 for i in places], [i + 0.17 for i in places]
        values = [math.nan if a.value is None else a.value for a in found]
        axis.plot(left, values, "o", markersize=4, color="C0", label="measured")
        # An interval of its own middle: the measured value need not lie inside a bootstrap's.
        middles, halves = [(lo + hi) / 2 for lo, hi in bounds], [(hi - lo) / 2 for lo, hi in bounds]
        axis.errorbar(left, middles, yerr=halves, fmt="none", capsize=3, color="C0", label="95 % interval")
        axis.plot(right, published, "D", markersize=5, fillstyle="none", color="C1", label="published")
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_xticks(places, names, fontsize=8, rotation=90 if crowded else 0)
        axis.set(xlim=(-0.6, len(results) - 0.4), xlabel="layer", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
