"""What several commands share: options, and where results go."""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saezoo import files, terminal
from saezoo.errors import SaezooError

if TYPE_CHECKING:
    from saezoo.results import Result


class Group(click.Group):
    """Suggests near commands, and turns every SaezooError into one line on stderr."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command is a usage error with the nearest name."""
        name = args[0]
        if self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"commands: {', '.join(self.commands)}"
            ctx.fail(f"no command `{name}`; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a SaezooError, or a full disk under stdout, ends it with one line."""
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


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that runs a model."""
    for option in reversed(
        [
            click.option("--text", help="`builtin` or a file (.txt, .jsonl)."),
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


@dataclass(frozen=True)
class Outputs:
    """Where results go, besides the table; `-` is stdout."""

    csv: Path | None = None
    append: bool = False
    """Add rows to the CSV that is there."""
    json: str | None = None
    markdown: Path | None = None
    breakdown: Path | None = None
    densities: Path | None = None
    plots: Path | None = None
    """A folder."""

    def check(self) -> None:
        """Refuse, before long work, two outputs to stdout and what cannot be written."""
        if self.to_stdout > 1:
            raise click.UsageError("--csv - and --json would both go to stdout; give one of them a file")
        if self.append and (self.csv is None or str(self.csv) == "-"):
            raise click.UsageError("--append needs a file: --csv FILE")
        for path in (self.csv, self.json, self.markdown, self.breakdown, self.densities):
            if path is not None and str(path) != "-":
                files.check_writable(Path(path))
        if self.plots is not None:
            files.check_folder(self.plots)

    @property
    def to_stdout(self) -> int:
        """How many of them go there."""
        return (str(self.csv) == "-") + (self.json == "-")


def deliver(results: list[Result], outputs: Outputs) -> None:
    """Everything that was asked for; the table on stdout unless data goes there."""
    from saezoo import results as forms
    from saezoo import tables

    if not outputs.to_stdout:
        terminal.print_table(*tables.tables(results, terminal.width()))
    if outputs.csv is not None and outputs.append:
        forms.append_csv(outputs.csv, results)
        terminal.note(f"added to {outputs.csv}")
    elif outputs.csv is not None:
        write(str(outputs.csv), forms.to_csv(results))
    if outputs.json is not None:
        write(outputs.json, json.dumps(forms.to_json(results), indent=2) + "\n")
    if outputs.markdown is not None:
        write(str(outputs.markdown), tables.to_markdown(results))
    if outputs.breakdown is not None:
        write(str(outputs.breakdown), forms.breakdown_csv(results))
    if outputs.densities is not None:
        from saezoo.evals.counts import densities_csv

        write(str(outputs.densities), densities_csv(results))
    if outputs.plots is not None:
        from saezoo.plots import save_plots

        for path in save_plots(results, outputs.plots):
            terminal.note(f"wrote {path}")


def write(path: str, text: str) -> None:
    """To stdout if `path` is `-`, else to the file, complete or not at all."""
    from saezoo import results as forms

    if path == "-":
        click.echo(text, nl=False)
    else:
        forms.write_text(Path(path), text)
        terminal.note(f"wrote {path}")


def print_json(value: Any) -> None:
    """Indented JSON on stdout."""
    click.echo(json.dumps(value, indent=2))
    sys.stdout.flush()
