"""What a study found, as tables and words: results.csv, variants.csv, effects.csv, report.md and its pictures.

The report states a difference only where its interval does not hold 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saezoo.ablation import effects
from saezoo.ablation.claims import answers, in_words, spread
from saezoo.ablation.effects import ALL, Effect, Row
from saezoo.ablation.plots import save_study_plots, short_name
from saezoo.ablation.study import METRICS, Study, failures
from saezoo.report import markdown_table
from saezoo.results import write_text
from saezoo.spreadsheets import frame_csv
from saezoo.tables import literal

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = ("ce_delta", "explained_variance", "l0", "dead", "dead_at_end", "dense_10")
"""In tables; CSV files have all metrics."""
_HOW = (
    "± and brackets: 95 % intervals over seeds (Student's t; the independent unit is the seed). Differences are paired:"
    " same seed, same layer, same levels of everything else, averaged over these."
)
_ONE_SEED = "With one seed there are no intervals, so nothing is said about differences."
_PICTURES = {
    "density": "How many features fire on which fraction of the evaluated tokens, by variant: mean over seeds and"
    " layers. The bar on the left: features that never fired there.",
    "dead": "Features that had not fired for more than the recipe's `dead_after_steps`, in training: mean over seeds"
    " and layers; the band is from the lowest to the highest seed.",
    "frontier": "ΔCE against L0, both on the evaluated tokens, by variant and layer: mean over seeds, bars are 95 %"
    " intervals. Lower left is better.",
}


def write_study_report(study: Study, rows: Sequence[Row], out: Path) -> None:
    """Write everything that is made from the cells into the study's folder.

    results.csv has a row for each SAE, variants.csv for each variant, layer and metric, effects.csv for each level that
    is compared with the first of its factor.
    """
    found = effects.effects(rows, study.factors, list(METRICS))
    write_text(out / "results.csv", _results_csv(rows))
    write_text(out / "variants.csv", _variants_csv(rows))
    write_text(out / "effects.csv", _effects_csv(rows, found))
    pictures = save_study_plots(study, rows, out)
    parts = [
        f"# {literal(_title(study))}",
        _facts(study, rows),
        *[f"Diverged, and left out: seed {cell.seed}, {literal(how)}." for cell, how in failures(study, out)],
        _HOW if study.seeds > 1 else _ONE_SEED,
        *_differences(study, rows, found),
        *_claims(study, rows),
        "## Variants",
        markdown_table(*_variant_cells(study, rows)),
    ]
    for name in pictures:
        parts += [f"![{name}]({name}.png)", _PICTURES[name]]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")


def study_tables(study: Study, rows: Sequence[Row]) -> list[Table]:
    """Variants and differences, for a terminal."""
    title = f"{_title(study)} · {_seeds(study)} · {study.job.tokens:,} tokens each"
    shown = [_rich(title, *_variant_cells(study, rows))]
    if study.seeds > 1 and (cells := _difference_cells(study, rows)):
        shown.append(_rich("differences, mean over layers; ±: half of the 95 % interval over seeds", *cells))
    return shown


def _title(study: Study) -> str:
    return f"{study.job.entries[0].collection} {', '.join(entry.name for entry in study.job.entries)}"


def _seeds(study: Study) -> str:
    return "1 seed" if study.seeds == 1 else f"{study.seeds} seeds"


def _facts(study: Study, rows: Sequence[Row]) -> str:
    varied = {name: levels for name, levels in study.factors.items() if len(levels) > 1}
    fixed = {name: levels[0] for name, levels in study.factors.items() if len(levels) == 1}
    facts = {
        "recipe": " ".join([study.recipe, *(f"{name}={level}" for name, level in fixed.items())]),
        "varied": "; ".join(f"{name}: {', '.join(levels)}" for name, levels in varied.items()),
        "trained on": f"{study.job.tokens:,} tokens of {study.job.source.name}, {_seeds(study)}",
        "measured on": f"{study.eval_tokens:,} tokens that training does not read",
        "SAEs": f"{len(rows)} of {len(study.cells) * len(study.job.entries)}",
    }
    return markdown_table(("study", ""), [(key, literal(value)) for key, value in facts.items()])


def _differences(study: Study, rows: Sequence[Row], everything: Sequence[Effect]) -> list[str]:
    """The differences that the intervals support, in words; those that they do not, in a line."""
    if study.seeds < 2:
        return []
    found = _together(everything)
    sure = dict(zip(map(id, found), effects.survivors(found), strict=True))
    supported = [effect for effect in found if effect.verdict != "not known"]
    by_chance = 0.05 * len(found)
    parts = [
        "## What the choices do",
        f"{len(found)} differences were looked at, as means over layers; if nothing differed, about {by_chance:.0f} of"
        f" the intervals would miss 0 by chance. {len(supported)} do. A star marks the {sum(sure.values())} that stand"
        " out also by Holm's method over all.",
    ]
    for factor, level, baseline in dict.fromkeys((e.factor, e.level, e.baseline) for e in found):
        these = [effect for effect in found if (effect.factor, effect.level) == (factor, level)]
        parts.append(f"**{literal(factor)}={literal(level)}** rather than {literal(baseline)}:")
        lines = [
            f"- {METRICS[effect.metric]}: {effect.verdict}, {in_words(effect.difference, '+')}"
            f"{' *' * sure[id(effect)]}{_where_it_turns(rows, effect)}"
            for effect in these
            if effect in supported
        ]
        rest = [effect for effect in these if effect not in supported]
        for words, same in (("equal in every seed", True), ("no difference shown in", False)):
            names = [
                METRICS[effect.metric] + _where_it_turns(rows, effect)
                for effect in rest
                if (not any(effect.by_seed)) == same
            ]
            lines += [f"- {words}: {', '.join(names)}"] if names else []
        parts.append("\n".join(lines))
    return parts


def _where_it_turns(rows: Sequence[Row], effect: Effect) -> str:
    """A mean over other factors hides it if the difference has one sign with some of their levels and the other sign
    with others."""
    within = effects.conditional(rows, effect)
    if not {"more", "less"} <= {each.verdict for each in within.values()}:
        return ""
    return f" (**depends on the other levels**: {literal(spread(within))})"


def _claims(study: Study, rows: Sequence[Row]) -> list[str]:
    found = answers(rows, study.factors)
    if study.seeds < 2 or not found:
        return []
    table = [(literal(answer.claim), f"**{answer.verdict}**", literal(answer.figure)) for answer in found]
    return ["## The post's claims", markdown_table(("claim", "answer", "figure"), table)]


def _together(found: Sequence[Effect]) -> list[Effect]:
    """Of all layers together; of the only one if there is one."""
    several = any(effect.layer == ALL for effect in found)
    return [effect for effect in found if effect.layer == ALL or not several]


def _variant_cells(study: Study, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of variants. Factors that are not varied are left out of their names."""
    means = {metric: effects.variants(rows, metric) for metric in _SHOWN}
    names = {row.cell.variant: short_name(study, row.cell) for row in rows}
    header = ["variant", "layer", *(METRICS[metric] for metric in _SHOWN)]
    cells = []
    for variant, layer in next(iter(means.values())):
        measured = [means[metric][variant, layer] for metric in _SHOWN]
        cells.append([names[variant], layer, *(in_words(value, plus_minus=True) for value in measured)])
    return header, cells


def _difference_cells(study: Study, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    everything = effects.effects(rows, study.factors, _SHOWN)
    found = {(e.factor, e.level, e.metric): e for e in _together(everything)}
    pairs = dict.fromkeys((e.factor, e.level, e.baseline) for e in found.values())
    header = ["level", "rather than", *(METRICS[metric] for metric in _SHOWN)]
    cells = [
        [
            f"{factor}={level}",
            base,
            *(in_words(found[factor, level, metric].difference, "+", plus_minus=True) for metric in _SHOWN),
        ]
        for factor, level, base in pairs
    ]
    return (header, cells) if cells else None


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column a line for each factor, numbers above half their intervals."""
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(row[0].replace(" ", "\n"), row[1], *(cell.replace(" ±", "\n±") for cell in row[2:]))
    return table


def _results_csv(rows: Sequence[Row]) -> str:
    return _csv(
        [
            {**dict(row.cell.levels), "seed": row.cell.seed, "layer": row.layer}
            | {metric: row.metrics.get(metric) for metric in METRICS}
            for row in rows
        ]
    )


def _variants_csv(rows: Sequence[Row]) -> str:
    levels = {row.cell.variant: dict(row.cell.levels) for row in rows}
    found = []
    for metric in METRICS:
        for (variant, layer), (value, lo, hi) in effects.variants(rows, metric).items():
            found.append({**levels[variant], "layer": layer, "metric": metric, "mean": value, "lo": lo, "hi": hi})
    return _csv(found)


def _effects_csv(rows: Sequence[Row], found: Sequence[Effect]) -> str:
    """`within`: levels of the other factors; empty, their mean."""
    lines = [_effect_line(effect, "") for effect in found]
    for effect in _together(found):
        lines += [_effect_line(each, words) for words, each in effects.conditional(rows, effect).items()]
    return _csv(lines)


def _effect_line(effect: Effect, within: str) -> dict[str, Any]:
    value, lo, hi = effect.difference
    line = {key: getattr(effect, key) for key in ("factor", "level", "baseline", "layer", "metric")}
    return {
        **line,
        "within": within,
        "difference": value,
        "lo": lo,
        "hi": hi,
        "p": effect.p,
        "seeds": len(effect.by_seed),
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    return frame_csv(pd.DataFrame(rows))
