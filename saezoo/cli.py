"""The command line: parse, call, print. No arithmetic; torch is imported only inside the commands that need it.

stdout carries data (tables, JSON, CSV, paths); progress and remarks go to stderr.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from saezoo import terminal
from saezoo.cli_common import Outputs, deliver, runtime_options
from saezoo.cli_evals import compare_command, eval_command, verify_command
from saezoo.cli_sharing import add_command, push_command
from saezoo.errors import SaezooError
from saezoo.registry import read_registry


class _Group(click.Group):
    """Suggests near commands, and turns every SaezooError into one line on stderr."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"commands: {', '.join(self.commands)}"
            ctx.fail(f"no command `{name}`; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaezooError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            click.echo("Error: no space left where the output goes; free some, or send it elsewhere", err=True)
            os._exit(1)  # an ordinary exit would flush stdout, and fail again


def _version() -> str:
    try:
        return metadata.version("saezoo")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--registry", type=click.Path(path_type=Path), help="Overlay registry file (or SAEZOO_REGISTRY).")
@click.version_option(_version(), prog_name="saezoo")
@click.pass_context
def main(ctx: click.Context, registry: Path | None) -> None:
    """The zoo, the scales and the workshop for sparse autoencoders."""
    if registry is not None and not registry.is_file() and ctx.invoked_subcommand != "add":
        raise click.UsageError(f"no registry file {registry}")
    ctx.obj = registry


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Every registry field, as JSON.")
@click.pass_obj
def list_command(registry: Path | None, as_json: bool) -> None:
    """List all collections and their SAEs."""
    known = read_registry(registry)
    collections = known.collections
    if as_json:
        _print_json([known.describe(entry) for entries in collections.values() for entry in entries])
        return
    from rich.table import Table

    table = Table()
    for column in ("collection", "layers", "model", "d_in", "d_sae", "recipe", "from"):
        table.add_column(column, overflow="fold")
    for name, entries in collections.items():
        first = entries[0]
        layers = terminal.ranges([entry.name for entry in entries])
        row = (name, layers, first.model_name, str(first.d_in), str(first.d_sae), first.recipe_name or "", first.origin)
        table.add_row(*row)
    terminal.print_table(table)


@main.command()
@click.argument("collection")
@click.argument("layer")
@click.option("--json", "as_json", is_flag=True, help="Every registry field, as JSON.")
@click.pass_obj
def info(registry: Path | None, collection: str, layer: str, as_json: bool) -> None:
    """Show what is known about one SAE (or several: 0-3,7)."""
    known = read_registry(registry)
    entries = known.find(collection, layer)
    if as_json:
        records = [known.describe(entry) for entry in entries]
        _print_json(records if len(records) > 1 else records[0])
        return
    for entry in entries:
        terminal.print_table(terminal.info_table(entry, known.describe(entry)["sources"]))


@main.command()
@click.argument("collection")
@click.argument("layers")
@click.option("--layout", help="Which published form.  [default: the first]")
@click.option("--with-model", is_flag=True, help="The language model too: then eval works offline.")
@click.option("--offline", is_flag=True, help="Only check what is cached.")
@click.pass_obj
def get(
    registry: Path | None, /, collection: str, layers: str, layout: str | None, with_model: bool, offline: bool
) -> None:
    """Download SAEs, verify them, and print where they are."""
    from saezoo import hub

    entries = read_registry(registry).find(collection, layers)
    if with_model:
        terminal.note(f"{entries[0].model_name}  {hub.fetch_model(entries[0].model, offline=offline)}")
    for entry in entries:
        fetched = hub.fetch(entry, layout, offline=offline)
        for name, check in fetched.checks.items():
            click.echo(f"{collection} {entry.name}  {name}  {check}", err=True)
        click.echo(fetched.weights)


for _command in (eval_command, verify_command, compare_command):
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


for _command in (push_command, add_command):
    main.add_command(_command)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
    sys.stdout.flush()
