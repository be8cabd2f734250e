"""Commands that measure: eval, verify, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from saezoo import files, terminal
from saezoo.cli_common import Outputs, deliver, runtime_options, write
from saezoo.errors import VerificationError


@click.command("eval")
@click.argument("collection")
@click.argument("layers", required=False)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to run.  [default: 65,536]")
@click.option("--protocol", type=click.Choice(["standard", "feb2024"]), default="standard", show_default=True)
@click.option(
    "--suite",
    type=click.Choice(["standard", "full"]),
    default="standard",
    show_default=True,
    help="full: description length, absorption, probing and decoder structure too.",
)
@click.option("--model", help="Language model: folder, hub id or registry name.")
@click.option("--layout", help="Which published form of the SAEs.")
@click.option("--dtype", default="float32", show_default=True, help="Of the model: float32, bf16, float64.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows at once.  [default: 2,048 tokens; GPU: 32,768]")
@click.option("--resume", is_flag=True, help="Go on with this evaluation, interrupted.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write a CSV; - for stdout.")
@click.option("--json", "json_path", is_flag=False, flag_value="-", help="Write JSON; stdout without a file name.")
@click.option("--append", is_flag=True, help="Add rows to the CSV, if it has the same columns.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a Markdown table.")
@click.option("--breakdown", type=click.Path(path_type=Path), help="CSV by position, token frequency and document.")
@click.option("--densities", type=click.Path(path_type=Path), help="CSV with a row for each feature.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for pictures, PNG and SVG.")
@runtime_options
@click.pass_obj
def eval_command(
    registry: Path | None,
    /,
    collection: str,
    layers: str | None,
    tokens: int | None,
    csv_path: Path | None,
    json_path: str | None,
    **options: Any,
) -> None:
    """Measure SAEs of a COLLECTION, or one local SAE folder.

    Without --text or --dataset: on the bundled held-out text.
    """
    from saezoo import workflows

    written = {key: options.pop(key) for key in ("append", "markdown", "breakdown", "densities", "plots")}
    outputs = Outputs(csv_path, json=json_path, **written)
    outputs.check()
    runtime = {key: options.pop(key) for key in ("text", "dataset", "device", "seed", "offline", "dtype")}
    with terminal.Progress("evaluating") as progress:
        results = workflows.evaluate(
            collection,
            layers,
            tokens=tokens or workflows.EVAL_TOKENS,
            on_progress=progress,
            options=workflows.Options(registry=registry, note=terminal.note, **runtime),
            **options,
        )
    if results:  # only one of several ranks has them
        deliver(results, outputs)


@click.command("verify")
@click.argument("collection")
@click.argument("layers", default="all")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to run.  [default: the published text's, or 65,536]")
@click.option("--layout", help="Which published form of the SAEs.")
@click.option("--dtype", default="float32", show_default=True, help="Of the model: float32, bf16, float64.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows at once.  [default: 2,048 tokens; GPU: 32,768]")
@click.option("--resume", is_flag=True, help="Go on with this evaluation, interrupted.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the verdicts as CSV; - for stdout.")
@runtime_options
@click.pass_obj
def verify_command(
    registry: Path | None, /, collection: str, layers: str, csv_path: Path | None, **settings: Any
) -> None:
    """Measure what was published, and say what is reproduced.

    Exit code 1 if a value differs by more than both samples' noise allows.
    """
    from saezoo import verification, workflows

    if csv_path is not None and str(csv_path) != "-":
        files.check_writable(csv_path)
    runtime = {key: settings.pop(key) for key in ("text", "dataset", "device", "seed", "offline", "dtype")}
    with terminal.Progress("verifying") as progress:
        found = verification.verify(
            collection,
            layers,
            on_progress=progress,
            options=workflows.Options(registry=registry, note=terminal.note, **runtime),
            **settings,
        )
    if not found.results:  # only one of several ranks has them
        return
    if csv_path is not None:
        write(str(csv_path), found.to_csv())
    if str(csv_path) != "-":
        terminal.print_table(found.table())
    if not found.passed:
        differ = sum(cell.verdict == "differs" for cell in found.cells)
        what = f"{differ} of {len(found.cells)} published values differ" if differ else "nothing could be measured"
        raise VerificationError(f"not verified: {what}")


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to run.  [default: 65,536]")
@click.option("--threshold", default=0.7, show_default=True, help="Cosine from which on a feature is shared.")
@click.option("--model", help="Language model: folder, hub id or registry name.")
@click.option("--dtype", default="float32", show_default=True, help="Of the model: float32, bf16, float64.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write a row per feature of A; - for stdout.")
@click.option(
    "--json", "json_path", is_flag=False, flag_value="-", help="Write the numbers; stdout without a file name."
)
@runtime_options
@click.pass_obj
def compare_command(
    registry: Path | None,
    /,
    a: str,
    b: str,
    tokens: int | None,
    threshold: float,
    model: str | None,
    csv_path: Path | None,
    json_path: str | None,
    **runtime: Any,
) -> None:
    """Match the features of two SAEs and compare their metrics.

    A and B are COLLECTION/LAYER or folders, and read the same model.
    """
    from saezoo import comparison, workflows

    Outputs(csv_path, json=json_path).check()
    with terminal.Progress("comparing") as progress:
        found = comparison.compare(
            a,
            b,
            tokens=tokens or workflows.EVAL_TOKENS,
            threshold=threshold,
            model=model,
            on_progress=lambda stage, done, total: progress(done, total, stage),
            options=workflows.Options(registry=registry, note=terminal.note, **runtime),
        )
    if str(csv_path) != "-" and json_path != "-":
        for table in found.tables():
            terminal.print_table(table)
    if csv_path is not None:
        write(str(csv_path), found.features.to_csv())
    if json_path is not None:
        write(json_path, json.dumps(found.numbers(), indent=2) + "\n")
