"""What several commands share: options, and where results go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from saezoo import files, terminal

if TYPE_CHECKING:
    from saezoo.results import Result


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


def check_outputs(csv_path: Path | None, json_path: str | None) -> None:
    """Refuse, before long work, two outputs to stdout and files that cannot be written."""
    if str(csv_path) == "-" and json_path == "-":
        raise click.UsageError("--csv - and --json would both go to stdout; give one of them a file")
    for path in (csv_path, json_path):
        if path is not None and str(path) != "-":
            files.check_writable(Path(path))


def deliver(results: list[Result], csv_path: Path | None, json_path: str | None) -> None:
    """CSV and JSON where asked; the table on stdout unless data goes there."""
    from saezoo import results as forms

    to_stdout = str(csv_path) == "-" or json_path == "-"
    if not to_stdout:
        terminal.print_table(forms.table(results))
    if csv_path is not None:
        write(str(csv_path), forms.to_csv(results))
    if json_path is not None:
        write(json_path, json.dumps(forms.to_json(results), indent=2) + "\n")


def write(path: str, text: str) -> None:
    """To stdout if `path` is `-`, else to the file, complete or not at all."""
    from saezoo import results as forms

    if path == "-":
        click.echo(text, nl=False)
    else:
        forms.write_text(Path(path), text)
        terminal.note(f"wrote {path}")
