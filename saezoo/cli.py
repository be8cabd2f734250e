"""The command line: parse, call, print. No arithmetic; torch is imported only inside the commands that need it.

stdout carries data (tables, JSON, CSV, paths); progress and remarks go to stderr.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import click

from saezoo import terminal
from saezoo.cli_common import Group, Outputs, deliver, runtime_options
from saezoo.cli_evals import compare_command, eval_command, verify_command
from saezoo.cli_features import cooccur_command, dashboard_command, feature_command, features_command
from saezoo.cli_sharing import add_command, push_command
from saezoo.cli_zoo import cache, convert_command, get, info, list_command


def _version() -> str:
    try:
        return metadata.version("saezoo")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--registry", type=click.Path(path_type=Path), help="Overlay registry file (or SAEZOO_REGISTRY).")
@click.version_option(_version(), prog_name="saezoo")
@click.pass_context
def main(ctx: click.Context, registry: Path | None) -> None:
    """The zoo, the scales and the workshop for sparse autoencoders."""
    if registry is not None and not registry.is_file() and ctx.invoked_subcommand != "add":
        raise click.UsageError(f"no registry file {registry}")
    ctx.obj = registry


for _command in (list_command, info, get, convert_command, cache, eval_command, verify_command, compare_command):
    main.add_command(_command)


@main.command("reproduce")
@click.argument("collection")
@click.argument("layers")
@click.option("--tokens", type=click.IntRange(min=1), help="Activations to train on.  [default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder.  [default: runs/COLLECTION]")
@click.option("--recipe", help="A recipe of the registry.  [default: the entry's]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the run folder.")
@click.option("--plan", "only_plan", is_flag=True, help="Measure this machine, print what the run needs, and stop.")
@click.option("--eval-tokens", type=click.IntRange(min=1), help="Tokens of the final evaluation.")
@click.option(
    "--product",
    type=click.Choice(["auto", "dense", "full", "half"]),
    default="auto",
    show_default=True,
    help="The encoder's product: half precision nominates, full decides; dense takes every product.",
)
@click.option(
    "--model-dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="The language model's; auto: bfloat16 on a GPU.",
)
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


for _command in (dashboard_command, features_command, feature_command, cooccur_command, push_command, add_command):
    main.add_command(_command)
