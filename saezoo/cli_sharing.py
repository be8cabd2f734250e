"""Commands that pass SAEs on: push, add."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from saezoo import terminal
from saezoo.errors import UsageError

_PATH = click.Path(path_type=Path)


@click.command("push")
@click.argument("run", type=_PATH)
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Model repository on the hub; made if need be.")
@click.option("--private", is_flag=True, help="Make it a private one.")
@click.option("--yes", is_flag=True, help="Overwrite files there without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and the card; no network.")
@click.option("--mirror", metavar="URL", help="Another hub.  [default: HF_ENDPOINT, or huggingface.co]")
@click.pass_obj
def push_command(
    registry: Path | None, /, run: Path, repo: str, private: bool, yes: bool, dry_run: bool, mirror: str | None
) -> None:
    """Upload a RUN folder, or one SAE's, with a model card.

    Prints the repository's address.
    """
    from saezoo import sharing

    parcel = sharing.pack(run, repo, registry)
    if dry_run:
        late = parcel.late(None)
        for name, path in sorted({**parcel.files, **late}.items()):
            click.echo(f"{path.stat().st_size:>13,}  {name}")
        terminal.note(f"nothing was uploaded; the card: {late['README.md']}")
        return

    def agree(names: list[str]) -> None:
        if yes:
            return
        what = f"{repo} has {len(names)} of these files, and they would change: {', '.join(names)}"
        if not sys.stdin.isatty():
            raise UsageError(f"{what}; --yes overwrites them")
        click.confirm(f"{what}\nOverwrite them?", abort=True, err=True)

    click.echo(sharing.push(parcel, private=private, mirror=mirror, agree=agree, note=terminal.note))


@click.command("add")
@click.argument("path", type=_PATH)
@click.option("--name", metavar="COLLECTION", help="Name of the new collection.  [default: the run's]")
@click.option("--model", help="Registry model that the SAE reads.  [default: what its configuration says]")
@click.option("--licence", help="Of the weights.  [default: the run's, or unknown]")
@click.pass_obj
def add_command(registry: Path | None, /, path: Path, name: str | None, model: str | None, licence: str | None) -> None:
    """Add a run, or the PATH of one SAE, to a registry file.

    The file is that of `saezoo --registry FILE add`, or SAEZOO_REGISTRY; it is made if need be. Prints its path.
    """
    from saezoo.additions import add

    file = registry or Path(os.environ.get("SAEZOO_REGISTRY") or "saezoo-registry.yaml")
    added, new = add(path, file, name=name, model=model, licence=licence)
    terminal.note(f"{added} {'is in' if new else 'was already in'} {file}; use it: saezoo --registry {file} list")
    click.echo(file)
