"""Pictures of a study: densities by variant, dead features over training, ΔCE against L0.

In all of them the first factor that is varied has the colours and the second the line styles or markers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saezoo.ablation.effects import Row, mean_of
from saezoo.ablation.grid import Cell
from saezoo.ablation.study import Study, lines_of
from saezoo.plots import grid, literal, save
from saezoo.results import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")  # Okabe and Ito 2008
_STYLES, _MARKERS = ("-", "--", ":", "-."), ("o", "^", "s", "D", "v", "P", "X")
_MOST_PANELS = 24
_POINTS = 100
"""Of a curve over training."""


def save_study_plots(study: Study, rows: Sequence[Row], out: Path) -> list[str]:
    """Draw density, dead and frontier into `out`, each as PNG and SVG; returns their names."""
    from matplotlib import rc_context, style

    cells = list(dict.fromkeys(row.cell for row in rows))
    with style.context("default"), rc_context({"svg.hashsalt": "saezoo"}):
        pictures = {
            "density": _density(study, cells, out),
            "dead": _dead(study, cells, out),
            "frontier": _frontier(study, rows),
        }
        for name, figure in pictures.items():
            save(figure, out / f"{name}.png", out / f"{name}.svg")
    return list(pictures)


def _varied(study: Study) -> list[str]:
    return [name for name, levels in study.factors.items() if len(levels) > 1]


def _rest(cell: Cell, factors: Sequence[str]) -> str:
    """Levels of the third factor and all after it."""
    return " ".join(f"{name}={dict(cell.levels)[name]}" for name in factors[2:])


def _look(study: Study, cell: Cell, second: str, shapes: Sequence[str]) -> dict[str, Any]:
    """Colour by the first factor, `second` (linestyle or marker) by the second, or also by the first if it is alone."""
    factors = _varied(study)
    numbers = [study.factors[name].index(dict(cell.levels)[name]) for name in factors[:2]] or [0]
    return {"color": _COLOURS[numbers[0] % len(_COLOURS)], second: shapes[numbers[-1] % len(shapes)]}


def _label(study: Study, cell: Cell) -> str:
    """Levels of the first two factors."""
    return " ".join(f"{name}={dict(cell.levels)[name]}" for name in _varied(study)[:2]) or "all"


def _density(study: Study, cells: Sequence[Cell], out: Path) -> Figure:
    """A panel for each variant, the first 24: counts by log10 density, means over seeds and layers."""
    sums: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in cells:
        for line in lines_of(out, cell, "eval.csv"):
            parts = (part.split(":") for part in line["density_histogram"].split(";"))
            sums[short_name(study, cell)].append({edge: float(count) for edge, count in parts})
    shown = list(sums.items())[:_MOST_PANELS]
    figure, axes = grid(len(shown), 6, 2.3, 1.9, sharex=True, sharey=True)
    for axis, (name, histograms) in zip(axes, shown, strict=True):
        edges = [float(edge) for edge in histograms[0] if edge != "never"]
        counts = [float(np.mean([h[edge] for h in histograms])) for edge in histograms[0] if edge != "never"]
        never = float(np.mean([histogram["never"] for histogram in histograms]))
        axis.axvspan(-2, 0, color="0.9", zorder=0)
        axis.stairs(counts, [*edges, 0.0], fill=True, color=_COLOURS[0])
        axis.bar([-7], [never], width=0.5, facecolor="white", edgecolor="black")
        axis.set_title(literal(name.replace(" ", "\n")), fontsize=8)
        axis.set_xticks([-7, -6, -4, -2, 0], ["never", "-6", "-4", "-2", "0"], fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
    for axis in axes[-6:]:
        axis.tick_params(labelbottom=True)  # the lowest of each column, also where the last row is short
    figure.supxlabel("log10 of the fraction of tokens on which a feature fires; shaded: above 1/100", fontsize=9)
    figure.supylabel("features", fontsize=9)
    return figure


def short_name(study: Study, cell: Cell) -> str:
    """A variant without the factors that are not varied."""
    return " ".join(f"{name}={dict(cell.levels)[name]}" for name in _varied(study)) or "all"


def _dead(study: Study, cells: Sequence[Cell], out: Path) -> Figure:
    """Panels by the third factor and what comes after: dead features against training tokens."""
    factors = _varied(study)
    panels: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        panels[_rest(cell, factors)][_label(study, cell)].append(cell)
    shown = list(panels.items())[:_MOST_PANELS]
    figure, axes = grid(len(shown), 3, 3.8, 2.9, sharex=True, sharey=True)
    for axis, (name, lines) in zip(axes, shown, strict=True):
        for label, group in lines.items():
            _curve(
                axis,
                study,
                [_dead_of(out, cell) for cell in group],
                label,
                _look(study, group[0], "linestyle", _STYLES),
            )
        axis.set_title(literal(name), fontsize=9)
        axis.set_xlabel("training tokens")
        axis.set_ylabel("dead features")
        axis.xaxis.set_major_formatter(_engineering())
    highest = max(axis.dataLim.ymax for axis in axes)
    axes[0].set_ylim(-0.02 * max(highest, 1), 1.05 * max(highest, 1))
    _legend(figure, axes)
    return figure


def _curve(axis: Axes, study: Study, seeds: Sequence[Any], label: str, look: dict[str, Any]) -> None:
    """Mean over seeds, and the band from the lowest to the highest."""
    at = np.linspace(0, study.job.tokens, _POINTS + 1)[1:]
    values = np.stack([np.interp(at, tokens, dead) for tokens, dead in seeds])
    axis.plot(at, values.mean(0), label=literal(label), linewidth=1.3, **look)
    axis.fill_between(at, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)


def _dead_of(out: Path, cell: Cell) -> tuple[list[float], list[float]]:
    """Tokens, and dead features as the mean over layers."""
    found: dict[float, list[float]] = defaultdict(list)
    for line in lines_of(out, cell, "log.csv"):
        found[float(line["tokens"])].append(float(line["dead"]))
    return list(found), [float(np.mean(values)) for values in found.values()]


def _frontier(study: Study, rows: Sequence[Row]) -> Figure:
    """A panel for each layer; variants that differ in the third factor or later look alike."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure, axes = grid(len(layers), 3, 4.0, 3.4)
    for axis, layer in zip(axes, layers, strict=True):
        variants: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row.layer == layer:
                variants[row.cell.variant].append(row)
        for same in variants.values():
            l0, ce = (mean_of([v for row in same if (v := row.metrics.get(m)) is not None]) for m in ("l0", "ce_delta"))
            if l0.value is None or ce.value is None:
                continue
            look = _look(study, same[0].cell, "marker", _MARKERS)
            label = literal(_label(study, same[0].cell))
            axis.errorbar(
                l0.value,
                ce.value,
                xerr=_half(l0),
                yerr=_half(ce),
                **look,
                linestyle="none",
                elinewidth=0.8,
                markersize=5,
                label=label,
            )
        axis.set(xlabel="L0 (features/token)", ylabel="ΔCE (nats/token)")
        axis.set_title(f"layer {literal(layer)}", fontsize=9)
    _legend(figure, axes)
    return figure


def _half(measured: Measured) -> float | None:
    """Of the interval, which is symmetrical."""
    return None if measured.lo is None or measured.hi is None else (measured.hi - measured.lo) / 2


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Each look once, above everything."""
    known: dict[str, Any] = {}
    for axis in axes:
        for mark, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, mark)
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=3, fontsize=8)


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
