"""`compare`: two SAEs of one model on one text: the features they share, and the differences of their metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saezoo import workflows
from saezoo.errors import UsageError
from saezoo.evals import evaluate
from saezoo.evals.compare import THRESHOLD, Comparison, paired_differences
from saezoo.evals.compare import compare as compare_features
from saezoo.loading import named_dtype
from saezoo.registry import read_registry
from saezoo.results import UNDEFINED, Measured, Result
from saezoo.workflows import EVAL_TOKENS, Options, Task

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = (
    "ce_sae",
    "ce_delta",
    "ce_score_mean",
    "kl_sae",
    "explained_variance",
    "mse",
    "cosine",
    "norm_ratio",
    "l0",
    "l1",
)


@dataclass(frozen=True)
class Compared:
    """Two SAEs on the same tokens."""

    a: Result
    b: Result
    features: Comparison
    differences: dict[str, Measured]
    """Metric of A minus that of B, with the interval of the difference."""

    def numbers(self) -> list[dict[str, Any]]:
        """Everything but the table of features: one record {name, a, b, value, lo, hi} for each number; unknown is
        None."""
        found: list[dict[str, Any]] = [
            {"name": name, "a": None, "b": None, "value": value, "lo": lo, "hi": hi}
            for name, value, lo, hi in self.features.summary()
        ]
        for name, (value, lo, hi) in self.differences.items():
            a, b = self.a.metrics[name].value, self.b.metrics[name].value
            found.append({"name": f"difference.{name}", "a": a, "b": b, "value": value, "lo": lo, "hi": hi})
        return found

    def tables(self) -> list[Table]:
        """For the terminal: what is shared, and the differences."""
        from rich.table import Table
        from rich.text import Text

        title = f"A: {_label(self.a)}   B: {_label(self.b)}   {self.a.tokens:,} tokens of {self.a.text}"
        shared = Table(title=Text(title), show_header=False)
        for label, words in _words(self.features):
            shared.add_row(label, words)
        differing = Table(caption="±: half of the 95 % interval over the same documents", caption_justify="left")
        for label in ("metric", "A", "B", "A - B"):
            differing.add_column(label, justify="left" if label == "metric" else "right")
        for name in SHOWN:
            a, b = (
                UNDEFINED if v is None else f"{v:.4f}" for v in (self.a.metrics[name].value, self.b.metrics[name].value)
            )
            differing.add_row(name, a, b, _plus_minus(self.differences[name], sign=True))
        return [shared, differing]


def compare(
    a: str,
    b: str,
    *,
    tokens: int = EVAL_TOKENS,
    threshold: float = THRESHOLD,
    model: str | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    options: Options | None = None,
) -> Compared:
    """Match the features of two SAEs that read one model, and measure both on the same tokens.

    Args:
        a, b: `COLLECTION/LAYER` of the registry, or the folder of an SAE.
        tokens: tokens to run, special ones included.
        threshold: cosine of one-to-one partners from which on a feature is shared.
        model: folder or hub id of the language model, if the registry does not know it.
        on_progress: called with (what is being done, how much is done, how much there is).

    Raises UsageError for SAEs that do not read the same model, and for every other wrong request.
    """
    options = options or Options()
    workflows.check_device(options.device)
    named_dtype(options.dtype)
    tasks = [_task(name, tokens, model, options) for name in (a, b)]
    if tasks[0].model != tasks[1].model:
        raise UsageError(f"{a} reads {tasks[0].model}, {b} reads {tasks[1].model}; compare SAEs of one model")
    subjects = [task.subjects[0] for task in tasks]
    lm, rows = tasks[0].lm, tasks[0].rows
    features = compare_features(
        subjects[0].sae, subjects[1].sae, lm, rows, threshold=threshold, seed=options.seed, on_progress=on_progress
    )
    total = rows.tokens_RT.size
    result_a, result_b = evaluate(
        subjects,
        lm,
        rows,
        text=tasks[0].text,
        model=tasks[0].model,
        seed=options.seed,
        on_progress=lambda done: on_progress("evaluation", done, total),
    )
    assert result_a.blocks is not None and result_b.blocks is not None
    differences = paired_differences(result_a.blocks, result_b.blocks, seed=options.seed)
    return Compared(result_a, result_b, features, differences)


def _task(name: str, tokens: int, model: str | None, options: Options) -> Task:
    """`COLLECTION/LAYER` if there is such a collection, else a folder."""
    collection, _, layer = name.rpartition("/")
    known = collection in read_registry(options.registry).collections
    where, layers = (collection, layer) if known else (name, None)
    if not known and name in read_registry(options.registry).collections:
        raise UsageError(f"{name} has several SAEs; say which: {name}/LAYER")
    task = workflows.prepare(
        where, layers, tokens=tokens, protocol="standard", model=model, layout=None, options=options
    )
    if len(task.subjects) > 1:
        raise UsageError(f"{name} names {len(task.subjects)} SAEs; compare takes one on each side")
    return task


def _label(result: Result) -> str:
    return f"{result.collection}/{result.layer}"


def _words(found: Comparison) -> list[tuple[str, str]]:
    numbers = found.numbers
    count = {
        name: f"{numbers[name].known:,.0f}" for name in ("features_a", "features_b", "shared", "unique_a", "unique_b")
    }
    return [
        ("features", f"{count['features_a']} in A, {count['features_b']} in B"),
        (f"shared (partners of cosine {found.threshold:g} or more)", count["shared"]),
        ("unique", f"{count['unique_a']} in A, {count['unique_b']} in B"),
        ("mean cosine of partners", _plus_minus(numbers["matched_cosine"])),
        ("mean cosine of nearest neighbours, A to B", _plus_minus(numbers["mmcs_ab"])),
        ("the same for random directions of B's shape", _plus_minus(numbers["mmcs_covariance_ab"])),
        ("mean Jaccard index of what fires together, A to B", _plus_minus(numbers["jaccard_ab"])),
        ("the same with the text shifted", _plus_minus(numbers["jaccard_shifted_ab"])),
        ("nearest by cosine is nearest by firing", _plus_minus(numbers["agreement"])),
        ("matching is best but for at most", f"{numbers['matching_gap'].known:.2g} of the sum"),
    ]


def _plus_minus(value: Measured, *, sign: bool = False) -> str:
    if value.value is None:
        return UNDEFINED
    shown = f"{value.value:+.4f}" if sign else f"{value.value:.4f}"
    return shown if value.lo is None or value.hi is None else f"{shown} ±{(value.hi - value.lo) / 2:.4f}"
