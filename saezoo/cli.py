"""The command line: parse, call, print. No arithmetic; torch is imported only inside the commands that need it.

stdout carries data (tables, JSON, CSV, paths); progress and remarks go to stderr.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saezoo.entries import Entry
from saezoo.errors import SaezooError
from saezoo.registry import read_registry

if TYPE_CHECKING:
    from saezoo.results import Result


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
    if registry is not None and not registry.is_file():
        raise click.UsageError(f"no registry file {registry}")
    ctx.obj = registry


def _runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that runs a model."""
    for option in reversed(
        [
            click.option("--text", help="`builtin` or a file (.txt, .jsonl).  [default: the bundled text]"),
            click.option("--dataset", help="Registry data set (openwebtext) or hub id, streamed."),
            click.option("--device", default="cpu", show_default=True, help="torch device."),
            click.option(
                "--seed", default=0, type=click.IntRange(0, 2**32), show_default=True, help="Seed of everything random."
            ),
            click.option("--offline", is_flag=True, help="Never touch the network."),
        ]
    ):
        command = option(command)
    return command


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Every registry field, as JSON.")
@click.pass_obj
def list_command(registry: Path | None, as_json: bool) -> None:
    """List all collections and their SAEs."""
    collections = read_registry(registry).collections
    if as_json:
        _print_json([_as_dict(entry) for entries in collections.values() for entry in entries])
        return
    from rich.table import Table

    table = Table()
    for column in ("collection", "layers", "model", "d_in", "d_sae", "recipe", "from"):
        table.add_column(column, overflow="fold")
    for name, entries in collections.items():
        first = entries[0]
        layers = _ranges([entry.name for entry in entries])
        row = (name, layers, first.model_name, str(first.d_in), str(first.d_sae), first.recipe_name, first.origin)
        table.add_row(*row)
    _print_table(table)


@main.command()
@click.argument("collection")
@click.argument("layer")
@click.option("--json", "as_json", is_flag=True, help="Every registry field, as JSON.")
@click.pass_obj
def info(registry: Path | None, collection: str, layer: str, as_json: bool) -> None:
    """Show what is known about one SAE (or several: 0-3,7)."""
    entries = read_registry(registry).find(collection, layer)
    if as_json:
        records = [_as_dict(entry) for entry in entries]
        _print_json(records if len(records) > 1 else records[0])
        return
    for entry in entries:
        _print_table(_info_table(entry))


@main.command()
@click.argument("collection")
@click.argument("layers")
@click.option("--layout", help="Which published form.  [default: the first]")
@click.option("--offline", is_flag=True, help="Only check what is cached.")
@click.pass_obj
def get(registry: Path | None, collection: str, layers: str, layout: str | None, offline: bool) -> None:
    """Download SAEs, verify them, and print where they are."""
    from saezoo import hub

    for entry in read_registry(registry).find(collection, layers):
        fetched = hub.fetch(entry, layout, offline=offline)
        for name, check in fetched.checks.items():
            click.echo(f"{collection} {entry.name}  {name}  {check}", err=True)
        click.echo(fetched.weights)


@main.command("eval")
@click.argument("collection")
@click.argument("layers", required=False)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to run.  [default: 65,536]")
@click.option("--protocol", type=click.Choice(["standard", "feb2024"]), default="standard", show_default=True)
@click.option("--model", help="Language model: folder, hub id or registry name.")
@click.option("--layout", help="Which published form of the SAEs.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows at once.  [default: what fits 256 MB of logits]")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write a CSV; - for stdout.")
@click.option("--json", "json_path", is_flag=False, flag_value="-", help="Write JSON; stdout without a file name.")
@_runtime_options
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
    """Measure SAEs of a COLLECTION (or one local SAE folder) on text."""
    from saezoo import workflows

    if str(csv_path) == "-" and json_path == "-":
        raise click.UsageError("--csv - and --json would both go to stdout; give one of them a file")
    runtime = {key: options.pop(key) for key in ("text", "dataset", "device", "seed", "offline", "dtype")}
    with _progress("evaluating") as progress:
        results = workflows.evaluate(
            collection,
            layers,
            tokens=tokens or workflows.EVAL_TOKENS,
            on_progress=progress,
            options=workflows.Options(registry=registry, note=_note, **runtime),
            **options,
        )
    _deliver(results, csv_path, json_path)


@main.command("reproduce")
@click.argument("collection")
@click.argument("layers")
@click.option("--tokens", type=click.IntRange(min=1), help="Activations to train on.  [default: the recipe's]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder.  [default: runs/COLLECTION]")
@click.option("--recipe", help="A recipe of the registry.  [default: the entry's]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the run folder.")
@click.option("--eval-tokens", type=click.IntRange(min=1), help="Tokens of the final evaluation.")
@_runtime_options
@click.pass_obj
def reproduce_command(
    registry: Path | None,
    /,
    collection: str,
    layers: str,
    tokens: int | None,
    out: Path | None,
    eval_tokens: int | None,
    recipe: str | None,
    resume: bool,
    **runtime: Any,
) -> None:
    """Train SAEs again by their recipe, and compare with what was published."""
    from saezoo import reproduction, workflows

    folder = out or Path("runs") / collection
    with _progress("training") as on_train, _progress("evaluating") as on_eval:
        results = reproduction.reproduce(
            collection,
            layers,
            out=folder,
            tokens=tokens,
            recipe=recipe,
            resume=resume,
            eval_tokens=eval_tokens or workflows.EVAL_TOKENS,
            on_step=_TrainingLine(on_train),
            on_eval=on_eval,
            options=workflows.Options(registry=registry, note=_note, **runtime),
        )
    _deliver(results, None, None)
    _note(f"use them: saezoo --registry {folder / 'registry.yaml'} list")
    click.echo(folder)


def _deliver(results: list[Result], csv_path: Path | None, json_path: str | None) -> None:
    """CSV and JSON where asked; the table on stdout unless data goes there."""
    from saezoo import results as forms

    to_stdout = str(csv_path) == "-" or json_path == "-"
    if not to_stdout:
        _print_table(forms.table(results))
    if csv_path is not None:
        _write(str(csv_path), forms.to_csv(results))
    if json_path is not None:
        _write(json_path, json.dumps(forms.to_json(results), indent=2) + "\n")


def _write(path: str, text: str) -> None:
    from saezoo import results as forms

    if path == "-":
        click.echo(text, nl=False)
    else:
        forms.write_text(Path(path), text)
        _note(f"wrote {path}")


class _Progress:
    """Progress on stderr that appears with the first call: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._task: Any = None
        self._started = time.monotonic()
        self._next_line = self._started + 10

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, status: str = "") -> None:
        if not sys.stderr.isatty():
            self._line(done, total, status)
            return
        if self._bar is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task(self._label, total=total, status="")
            self._bar.start()
        self._bar.update(self._task, completed=done, status=status)
        if done >= total:
            self._bar.stop()

    def _line(self, done: int, total: int, status: str) -> None:
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + 10
        speed = done / (now - self._started)
        left = (total - done) / speed
        _note(f"{self._label} {done / total:.0%}, {speed:,.0f} tokens/s, {left:,.0f} s left  {status}".rstrip())


def _new_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")

    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"), Speed())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _progress(label: str) -> _Progress:
    return _Progress(label)


class _TrainingLine:
    """Shows losses and L0 beside the bar, of the first layer, at most twice a second."""

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
        self._next = 0.0

    def __call__(self, done: int, total: int, names: Sequence[str], logs: list[Any]) -> None:
        if time.monotonic() < self._next and done < total:
            return
        self._next = time.monotonic() + 0.5
        losses, first = logs[0].losses, logs[0]
        status = f"layer {names[0]}: mse {float(losses.mse):.4g} l1 {float(losses.l1):.4g} L0 {float(first.l0):.1f}"
        self._progress(done, total, status)


def _print_table(table: Any) -> None:
    from rich.console import Console

    # Names come from registry files and folders: none of their text is markup.
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = max(100, console.width)
    console.print(table)
    sys.stdout.flush()


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
    sys.stdout.flush()


def _as_dict(entry: Entry) -> dict[str, Any]:
    return dataclasses.asdict(entry)


def _note(message: str) -> None:
    click.echo(message, err=True)


def _ranges(names: list[str]) -> str:
    """0, 1, 2, 11-post -> 0-2, 11-post."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name.isdigit() and runs[-1][-1].isdigit() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _info_table(entry: Entry) -> Any:
    from rich.table import Table

    table = Table(title=f"{entry.collection} {entry.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("what", entry.title)
    table.add_row("model", f"{entry.model_name} ({entry.model.repo or entry.model.folder})")
    table.add_row("hook", entry.hook)
    table.add_row("shape", f"d_in {entry.d_in}, d_sae {entry.d_sae}, {entry.dtype}")
    centred = "residual minus its mean over d_in" if entry.centre else "residual as it is"
    bos = "begin with BOS" if entry.prepend_bos else "no BOS"
    table.add_row("input", f"{centred}; rows of {entry.context_size} tokens, {bos}")
    for name, layout in entry.layouts.items():
        where = f"{layout.repo}@{layout.revision}" if layout.repo else str(layout.folder)
        facts = layout.facts.get("weights")
        table.add_row(f"files: {name}", f"{where}\n{layout.weights}\nsha256 {(facts and facts.sha256) or 'unknown'}")
    table.add_row("licence", entry.licence)
    if entry.neuronpedia:
        table.add_row("neuronpedia", f"https://www.neuronpedia.org/{entry.neuronpedia}")
    for name, value in entry.published.items():
        table.add_row(f"published: {name}", f"{value}   ({entry.definitions.definitions[name]})")
    table.add_row("published how", f"{entry.definitions.protocol} protocol; {entry.definitions.sample}")
    recipe = {k: v for k, v in dataclasses.asdict(entry.recipe).items() if k != "source"}
    table.add_row(f"recipe: {entry.recipe_name}", ", ".join(f"{key} {value}" for key, value in recipe.items()))
    table.add_row("from", entry.origin)
    return table
