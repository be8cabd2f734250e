"""Commands that train: reproduce, ablate, sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from saezoo import terminal
from saezoo.cli_common import Outputs, deliver, runtime_options


def _precision_options(command: Callable[..., None]) -> Callable[..., None]:
    """How products are taken; none of it changes what is trained, but for rounding."""
    product = click.option(
        "--product",
        type=click.Choice(["auto", "dense", "full", "half"]),
        default="auto",
        show_default=True,
        help="The encoder's product: half precision nominates, full decides; dense takes every product.",
    )
    model_dtype = click.option(
        "--model-dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="The language model's; auto: bfloat16 on a GPU.",
    )
    return product(model_dtype(command))


@click.command("reproduce")
@click.argument("collection")
@click.argument("layers")
@click.option("--tokens", type=click.IntRange(min=1), help="Activations to train on.  [default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder.  [default: runs/COLLECTION]")
@click.option("--recipe", help="A recipe of the registry.  [default: the entry's]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the run folder.")
@click.option("--plan", "only_plan", is_flag=True, help="Measure this machine, print what the run needs, and stop.")
@click.option("--eval-tokens", type=click.IntRange(min=1), help="Tokens of the final evaluation.")
@_precision_options
@click.option(
    "--share",
    type=click.Choice(["entries", "features"]),
    default="entries",
    show_default=True,
    help="Under torchrun: what the ranks divide.",
)
@click.option("--tensorboard", is_flag=True, help="Log to RUN FOLDER/tensorboard too.")
@click.option("--wandb", metavar="PROJECT", help="Log to Weights & Biases too.")
@runtime_options
@click.pass_obj
def reproduce_command(
    registry: Path | None,
    /,
    collection: str,
    layers: str,
    tokens: int | None,
    out: Path | None,
    recipe: str | None,
    resume: bool,
    only_plan: bool,
    eval_tokens: int | None,
    **settings: Any,
) -> None:
    """Train SAEs again by their recipe.

    Without --text or --dataset: on what the entries were trained on. Ends with an evaluation beside the published one.
    """
    from saezoo import reproduction, watching, workflows

    means = {key: settings.pop(key) for key in ("product", "model_dtype", "share", "tensorboard", "wandb")}
    chosen: dict[str, Any] = {"tokens": tokens, "recipe": recipe, "means": reproduction.Means(**means)}
    if only_plan:
        options = workflows.Options(registry=registry, note=terminal.note, **settings)
        terminal.print_table(watching.plan_table(*reproduction.plan(collection, layers, options=options, **chosen)))
        return
    folder = out or Path("runs") / collection
    with watching.Watch() as watch, terminal.Progress("evaluating") as on_eval:
        results = reproduction.reproduce(
            collection,
            layers,
            out=folder,
            resume=resume,
            eval_tokens=eval_tokens or workflows.EVAL_TOKENS,
            on_step=watch,
            on_eval=on_eval,
            options=workflows.Options(registry=registry, note=watch.note, **settings),
            **chosen,
        )
    if results:  # only one of several ranks has them
        deliver(results, Outputs())
        terminal.note(f"report: {folder / 'report.md'}; use them: saezoo --registry {folder / 'registry.yaml'} list")
        click.echo(folder)


def _study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that train a grid."""
    options = [
        click.option("--tokens", type=click.IntRange(min=1), help="To train each cell on.  [default: the recipe's]"),
        click.option("--recipe", help="That cells are made from.  [default: the entry's]"),
        click.option("--resume", is_flag=True, help="Go on; cells that are complete are not run again."),
        click.option("--plan", "only_plan", is_flag=True, help="Measure this machine, print the cost, and stop."),
        click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="Refuse if it would take longer."),
        click.option("--eval-tokens", type=click.IntRange(min=1), help="Tokens of the evaluations.  [default: 65,536]"),
    ]
    command = _precision_options(runtime_options(command))
    for option in reversed(options):
        command = option(command)
    return command


@click.command("ablate")
@click.argument("collection")
@click.argument("layers")
@click.option("--vary", multiple=True, required=True, metavar="FACTOR=LEVEL,…", help="A factor; several times.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Of each variant.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/COLLECTION-ablation]")
@_study_options
@click.pass_obj
def ablate_command(
    registry: Path | None, /, collection: str, layers: str, vary: tuple[str, ...], out: Path | None, **settings: Any
) -> None:
    """Train every combination of some choices; say what differs.

    Several seeds of each, which count up from --seed; intervals are over them.

    \b
    Factors: ghost=off,bug,fixed    warmup=STEPS       b_dec=zero,mean,geometric_median
             buffer=bug,fixed       resample=off,on    dead_after=STEPS
             d_sae=FEATURES         l1=COEFFICIENT     lr=RATE    scale=FACTOR (of activations)
    The first level of each is what the others are compared with; a factor with one
    level is set to it. The activations of a seed are made once, for all its cells.
    """
    _run_study(registry, collection, layers, vary, out or Path("runs") / f"{collection}-ablation", **settings)


@click.command("sweep")
@click.argument("collection")
@click.argument("layers")
@click.option("--l1", metavar="COEFFICIENT,…", help="L1 coefficients.  [default: the recipe's]")
@click.option("--lr", metavar="RATE,…", help="Learning rates.  [default: the recipe's]")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Of each variant.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/COLLECTION-sweep]")
@_study_options
@click.pass_obj
def sweep_command(
    registry: Path | None,
    /,
    collection: str,
    layers: str,
    l1: str | None,
    lr: str | None,
    out: Path | None,
    **settings: Any,
) -> None:
    """Train with several L1 coefficients and learning rates.

    Draws ΔCE against L0. The same as ablate --vary l1=… --vary lr=… .
    """
    vary = [f"{name}={levels}" for name, levels in (("l1", l1), ("lr", lr)) if levels is not None]
    if not vary:
        raise click.UsageError("nothing to sweep; give --l1 or --lr, e.g. --l1 2e-4,4e-4,8e-4")
    _run_study(registry, collection, layers, vary, out or Path("runs") / f"{collection}-sweep", **settings)


def _run_study(
    registry: Path | None,
    collection: str,
    layers: str,
    vary: Sequence[str],
    out: Path,
    *,
    only_plan: bool,
    hours: float | None,
    resume: bool,
    **settings: Any,
) -> None:
    from saezoo import reproduction, watching, workflows
    from saezoo.ablation import plan as plans
    from saezoo.ablation import report, run, study

    means = reproduction.Means(**{key: settings.pop(key) for key in ("product", "model_dtype")})
    chosen = {key: settings.pop(key) for key in ("tokens", "recipe", "seeds", "eval_tokens")}
    chosen["eval_tokens"] = chosen["eval_tokens"] or workflows.EVAL_TOKENS
    options = workflows.Options(registry=registry, note=terminal.note, **settings)
    if only_plan or hours is not None:
        planned = study.plan_study(collection, layers, vary=vary, means=means, options=options, **chosen)
        plan = plans.plan_of(planned, out, means=means, options=options)
        if only_plan:
            terminal.print_table(watching.study_plan_table(planned, plan))
        study.check_disk(planned, out)
        if hours is not None:
            plans.check_time(plan, hours)
    if only_plan:
        return
    with terminal.Progress("training") as progress:
        found, rows = run.ablate(
            collection,
            layers,
            vary=vary,
            out=out,
            resume=resume,
            on_step=lambda seen: progress(
                seen.done, seen.total, f"stream {seen.stream} of {seen.streams}, {seen.cells} cells"
            ),
            means=means,
            options=options,
            **chosen,
        )
    if rows:  # only one of several ranks has them
        terminal.print_table(*report.study_tables(found, rows))
        terminal.note(f"report: {out / 'report.md'}")
        click.echo(out)
