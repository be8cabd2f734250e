"""Results as tables: for a terminal of any width, and in Markdown.

The protocol decides which metrics come first; docs/metrics.md and docs/suite.md say what they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from saezoo.results import UNDEFINED, Result, sparkline

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


class _Column(NamedTuple):
    label: str
    digits: int


_DENSITY = "density"
_COLUMNS = {
    "ce_delta": _Column("ΔCE", 4),
    "ce_score": _Column("CE score*", 4),
    "ce_score_mean": _Column("CE score\n(mean)", 4),
    "ce_score_unigram": _Column("CE score\n(unigram)", 4),
    "ce_clean": _Column("CE\nclean", 3),
    "ce_sae": _Column("CE\nwith SAE", 3),
    "ce_mean": _Column("CE\n(mean)", 3),
    "ce_unigram": _Column("CE\n(unigram)", 3),
    "ce_zero": _Column("CE\n(zero)", 3),
    "kl_sae": _Column("KL", 4),
    "explained_variance": _Column("expl.\nvar.", 4),
    "explained_variance_uncentred": _Column("expl. v.\nuncentred", 4),
    "l0": _Column("L0", 2),
    "l1": _Column("L1", 2),
    "cosine": _Column("cosine", 4),
    "norm_ratio": _Column("norm\nratio", 4),
    "alive_fraction": _Column("alive", 4),
    "dense_100": _Column(">1/100", 0),
    "dense_10": _Column(">1/10", 0),
    "encoder_decoder_cosine": _Column("enc·dec\ncosine", 3),
    _DENSITY: _Column("density\n1e-6–1", 0),
    "description_length": _Column("bits per\ntoken", 1),
    "description_levels": _Column("levels", 0),
    "description_loss": _Column("EV lost", 4),
    "absorption_full": _Column("absorbed\n(full)", 3),
    "absorption_fraction": _Column("absorbed\n(part)", 3),
    "absorption_splits": _Column("splits", 2),
    "absorption_letters": _Column("letters", 0),
    "probing_k1": _Column("probe\nk = 1", 3),
    "probing_k2": _Column("probe\nk = 2", 3),
    "probing_k5": _Column("probe\nk = 5", 3),
    "probing_raw": _Column("probe\nraw", 3),
    "probing_tasks": _Column("tasks", 0),
    "neighbour_cosine": _Column("nearest\ncosine", 3),
    "neighbour_close": _Column("nearest\n>0.9", 4),
    "meta_explained": _Column("meta\nEV", 3),
}
_SUITE = tuple(_COLUMNS)[tuple(_COLUMNS).index("description_length") :]
_MAIN = {
    "standard": ("ce_delta", "ce_score", "ce_score_mean", "explained_variance", "l0", "alive_fraction", "dense_100"),
    "feb2024": ("ce_delta", "ce_sae", "explained_variance_uncentred", "l1", "l0", "alive_fraction"),
}
"""What is always shown, by protocol; the rest of `_COLUMNS` where there is room."""
_NOTE = "±: half of the 95 % interval over documents"
_NOTE_SCORE = (
    "* CE score flatters: its baseline, zero ablation, ruins a residual stream; (mean) and (unigram) are milder ones. "
    "Read ΔCE."
)
_MARKDOWN_COLUMNS = 7


def tables(results: Sequence[Result], width: int) -> list[Table]:
    """The results as tables of at most `width` columns of text: the protocol's main metrics in as few tables as hold
    them, what else fits into the last of these, and below those of the full suite, if it was run.

    No number is cut or folded, if `width` is at least 60.
    """
    from rich.text import Text

    first = results[0]
    main, more, suite = _names(results)
    parts = _parts(results, [*main, _DENSITY], more, width)
    shown = [_table(results, part) for part in parts]
    shown[0].title = Text(f"{first.collection} · {first.protocol} protocol · {first.tokens:,} tokens of {first.text}")
    shown[0].caption = "\n".join([_NOTE, *([_NOTE_SCORE] if any("ce_score" in part for part in parts) else [])])
    below = [_table(results, part) for part in _parts(results, suite, [], width) if part]
    if below:
        below[0].title = "full suite"
    return [*shown, *below]


def _names(results: Sequence[Result]) -> tuple[list[str], list[str], list[str]]:
    """The main metrics; others that were measured; those of the full suite that were."""
    measured_names = {name for result in results for name in result.metrics}
    main = list(_MAIN[results[0].protocol])
    found = [name for name in _COLUMNS if name in measured_names and name not in main]
    return main, [name for name in found if name not in _SUITE], [name for name in found if name in _SUITE]


def _parts(results: Sequence[Result], main: Sequence[str], more: Sequence[str], width: int) -> list[list[str]]:
    """`main` in as few parts as fit into `width`, in its order; what of `more` still fits goes into the last."""
    before = _layer_width(results, width) + len("│  │")
    parts, used = [list[str]()], before
    for name in [*main, *more]:
        label, cells = _COLUMNS[name].label, [_cell(result, name).plain for result in results]
        needs = _width("\n".join([label, *cells])) + len("  │")
        if not parts[-1] or used + needs <= width:
            parts[-1].append(name)
            used += needs
        elif name in main:
            parts.append([name])
            used = before + needs
    return parts


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for line in text.split("\n"))


def _layer_width(results: Sequence[Result], width: int) -> int:
    """Of the column of names; one of over a third of the table is folded."""
    longest = _width("\n".join(["layer", *(_layer(result).plain for result in results)]))
    return min(longest, max(len("published"), width // 3))


def _table(results: Sequence[Result], names: Sequence[str]) -> Table:
    from rich.table import Table

    shown = Table(caption_justify="left")
    shown.add_column("layer", justify="right", overflow="fold")
    for name in names:
        shown.add_column(_COLUMNS[name].label, justify="left" if name == _DENSITY else "right")
    for result in results:
        cells = [_cell(result, name) for name in names]
        shown.add_row(_layer(result), *cells, end_section=bool(result.published))
    return shown


def _layer(result: Result) -> Text:
    from rich.text import Text

    return Text(result.layer).append("\n\npublished" if result.published else "", style="cyan")


def _cell(result: Result, name: str) -> Text:
    """Value, half its interval, and (if the row has published values) the published one."""
    from rich.text import Text

    if name == _DENSITY:
        return Text(sparkline(result.histogram["counts"]))
    if name not in result.metrics:
        return Text("-")
    value, lo, hi = result.metrics[name]
    digits = _COLUMNS[name].digits
    cell = Text(_number(value, digits))
    if lo is not None and hi is not None:
        cell.append(f"\n±{_number((hi - lo) / 2, digits)}", style="dim")
    elif result.published:
        cell.append("\n")
    if result.published:
        published = result.published.get(name)
        cell.append("\n" + ("" if published is None else _number(published, digits)), style="cyan")
    return cell


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.4g}"


def to_markdown(results: Sequence[Result]) -> str:
    """GitHub tables, at most seven metrics wide, with intervals in brackets: the metrics of `tables`, all of them."""
    first = results[0]
    about = f"{first.collection}, {first.protocol} protocol: {first.tokens:,} tokens of {first.text}"
    parts = [f"{literal(about)}, {first.documents:,} documents. In brackets the 95 % interval over documents."]
    for names in _names(results):
        for start in range(0, len(names), _MARKDOWN_COLUMNS):
            parts.append(_markdown_table(results, names[start : start + _MARKDOWN_COLUMNS]))
    if "ce_score" in {name for names in _names(results) for name in names}:
        parts.append(literal(_NOTE_SCORE))
    return "\n\n".join(parts) + "\n"


def _markdown_table(results: Sequence[Result], names: Sequence[str]) -> str:
    lines = [["layer", *(literal(_COLUMNS[name].label) for name in names)], ["---:"] * (1 + len(names))]
    lines += [[literal(result.layer), *(_markdown_cell(result, name) for name in names)] for result in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(result: Result, name: str) -> str:
    if name not in result.metrics:
        return "-"
    value, lo, hi = result.metrics[name]
    digits = _COLUMNS[name].digits
    cell = _number(value, digits)
    if lo is not None and hi is not None:
        cell += f" ({_number(lo, digits)} to {_number(hi, digits)})"
    published = result.published.get(name)
    return cell if published is None else f"{cell}<br>published {_number(published, digits)}"


def literal(text: str) -> str:
    """`text` on one line, without anything that GitHub's Markdown takes for markup."""
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(text.split()))
