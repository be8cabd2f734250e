"""`verify`: measure what was published, by its own protocol, and say what is reproduced."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saezoo import workflows
from saezoo.entries import Entry
from saezoo.errors import UsageError
from saezoo.evals.verdict import Cell, judge
from saezoo.registry import read_registry
from saezoo.results import Result
from saezoo.spreadsheets import frame_csv
from saezoo.workflows import EVAL_TOKENS, Options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Verification:
    """The measurements, and a verdict on each published value."""

    results: list[Result]
    cells: list[Cell]

    @property
    def passed(self) -> bool:
        """Whether something was reproduced and nothing differs; what cannot be measured does not count."""
        verdicts = {cell.verdict for cell in self.cells}
        return "differs" not in verdicts and "reproduced" in verdicts

    def to_csv(self) -> str:
        """One row for each published value; unknown is an empty cell."""
        import pandas as pd

        rows = [
            {
                "collection": self.results[0].collection,
                "layer": cell.layer,
                "metric": cell.metric,
                "published": cell.published,
                "measured": cell.measured.value,
                "measured_lo": cell.measured.lo,
                "measured_hi": cell.measured.hi,
                "allowed_difference": cell.allowed,
                "verdict": cell.verdict,
                "reason": cell.reason,
                "tokens": self.results[0].tokens,
                "text": self.results[0].text,
                "protocol": self.results[0].protocol,
            }
            for cell in self.cells
        ]
        return frame_csv(pd.DataFrame(rows))

    def table(self) -> Table:
        """For the terminal."""
        from rich.table import Table
        from rich.text import Text

        first = self.results[0]
        counts = Counter(cell.verdict for cell in self.cells)
        reasons = dict.fromkeys(f"{c.metric}: {c.reason}" for c in self.cells if c.verdict == "not measurable")
        shown = Table(
            title=Text(f"{first.collection} · {first.protocol} protocol · {first.tokens:,} tokens of {first.text}"),
            caption="\n".join([", ".join(f"{count} {verdict}" for verdict, count in counts.items()), *reasons]),
            caption_justify="left",
        )
        for label in ("layer", "metric", "published", "measured", "difference", "allowed"):
            shown.add_column(label, justify="left" if label == "metric" else "right")
        shown.add_column("verdict")
        for i, cell in enumerate(self.cells):
            last = i + 1 == len(self.cells) or self.cells[i + 1].layer != cell.layer
            shown.add_row(*_texts(cell), end_section=last)
        return shown


_COLOURS = {"reproduced": "green", "differs": "bold red", "not measurable": "dim"}


def _texts(cell: Cell) -> list[Text]:
    from rich.text import Text

    value = cell.measured.value
    numbers = [
        f"{cell.published:g}",
        "-" if value is None else f"{value:.6g}",
        "-" if value is None else f"{value - cell.published:+.2g}",
        "-" if cell.allowed is None else f"{cell.allowed:.2g}",
    ]
    return [Text(cell.layer), Text(cell.metric), *map(Text, numbers), Text(cell.verdict, style=_COLOURS[cell.verdict])]


def verify(
    collection: str,
    layers: str | int = "all",
    *,
    tokens: int | None = None,
    layout: str | None = None,
    batch_size: int | None = None,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    options: Options | None = None,
) -> Verification:
    """Judge every published value of some SAEs: reproduced, differs, or not measurable (see `evals/verdict.py`).

    Args:
        collection: a collection of the registry.
        layers: which of its entries.
        tokens: tokens to run; by default all of the published text if it can be had, else 65,536.
        options: with `text` or `dataset` in place of the text that was published on, that text must be of the same
            kind, which nobody checks.
        layout, batch_size, resume, on_progress: as for `evaluate`.

    Raises UsageError where nothing was published, or on a text that cannot be had.
    """
    options = options or Options()
    entries = read_registry(options.registry).find(collection, layers)
    if not any(value is not None for entry in entries for value in entry.published.values()):
        raise UsageError(f"nothing was published about {collection} {layers}; saezoo eval measures it")
    how = entries[0].definitions
    if options.text is None and options.dataset is None:
        text, dataset = _text_of(entries[0])
        options = dataclasses.replace(options, text=text, dataset=dataset)
    everything = how.text is not None and options.text == how.text.partition(":")[0]
    results = workflows.evaluate(
        collection,
        layers,
        tokens=tokens or (None if everything else EVAL_TOKENS),
        protocol=how.protocol,
        layout=layout,
        batch_size=batch_size,
        resume=resume,
        on_progress=on_progress,
        options=options,
    )
    siblings = read_registry(options.registry).find(collection, "all")
    table = [(name, value) for e in siblings for name, value in e.published.items() if value is not None]
    return Verification(results, judge(results, how.tokens, how.text, table) if results else [])


def _text_of(entry: Entry) -> tuple[str | None, str | None]:
    """(text, data set) which the published values were measured on, or one of the same kind; one of them is None."""
    if entry.definitions.text == "builtin:heldout":
        return "builtin", None
    if entry.dataset_name is not None:
        return None, entry.dataset_name
    raise UsageError(f"what {entry.collection} was measured on is not known; give --text or --dataset")
