"""Commands about what there is: list, info, get, convert, and the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import click

from saezoo import terminal
from saezoo.cli_common import Group, print_json
from saezoo.errors import DownloadError, UsageError
from saezoo.registry import read_registry
from saezoo.transfers import size_words


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Every registry field, as JSON.")
@click.pass_obj
def list_command(registry: Path | None, as_json: bool) -> None:
    """List all collections and their SAEs."""
    known = read_registry(registry)
    collections = known.collections
    if as_json:
        print_json([known.describe(entry) for entries in collections.values() for entry in entries])
        return
    from rich.table import Table

    table = Table()
    overlaid = any(entries[0].origin != "built-in" for entries in collections.values())
    for column in ("collection", "SAEs", "model", "d_in x d_sae", "recipe", *(["from"] if overlaid else [])):
        table.add_column(column, overflow="fold", no_wrap=column == "collection")
    for name, entries in collections.items():
        first, widths = entries[0], sorted({entry.d_sae for entry in entries})
        d_sae = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}-{widths[-1]:,}"
        layers = terminal.ranges([entry.name for entry in entries])
        table.add_row(
            name,
            layers,
            first.model_name,
            f"{first.d_in} x {d_sae}",
            first.recipe_name or "",
            *([Path(first.origin).name] if overlaid else []),
        )
    terminal.print_table(table)


@click.command()
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
        print_json(records if len(records) > 1 else records[0])
        return
    for entry in entries:
        terminal.print_table(terminal.info_table(entry, known.describe(entry)["sources"]))


@click.command()
@click.argument("collection")
@click.argument("layers", default="all")
@click.option("--layout", help="Which published form.  [default: the first]")
@click.option("--with-model", is_flag=True, help="The language model too: then eval works offline.")
@click.option("--mirror", metavar="URL", help="Another hub, for this download.  [default: HF_ENDPOINT]")
@click.option("--offline", is_flag=True, help="Only check what is cached.")
@click.pass_obj
def get(
    registry: Path | None,
    /,
    collection: str,
    layers: str,
    layout: str | None,
    with_model: bool,
    mirror: str | None,
    offline: bool,
) -> None:
    """Download SAEs, verify them, and print where they are."""
    from saezoo import hub

    if mirror is not None and not re.match(r"https?://[^/]", mirror):
        raise click.UsageError(f"--mirror `{mirror}` is no URL; it begins with https://")
    if mirror is not None and offline:
        raise click.UsageError("give --mirror or --offline, not both")
    mirror = None if mirror is None else mirror.rstrip("/")
    entries = read_registry(registry).find(collection, layers)
    if with_model:
        folder = hub.fetch_model(entries[0].model, offline=offline, mirror=mirror)
        terminal.note(f"{entries[0].model_name}  {folder}")
    everything = hub.fetch_all(entries, layout, offline=offline, mirror=mirror)
    for entry, fetched in zip(entries, everything, strict=True):
        for name, check in fetched.checks.items():
            terminal.note(f"{collection} {entry.name}  {name}  {check}")
        click.echo(fetched.weights)


@click.command("convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["saelens", "dictionary_learning", "sparsify"]), help="Format.")
def convert_command(source: str, target: Path, to: Literal["saelens", "dictionary_learning", "sparsify"]) -> None:
    """Write the SAE at SOURCE (a folder, a file, or owner/repository/folder) into the new folder TARGET.

    No bit of a weight changes, and converting back gives the same files' contents again.
    """
    from saezoo import conversion
    from saezoo.loading import locate

    path = locate(source)
    if path is None:
        raise UsageError(f"no file or folder {source}")
    click.echo(conversion.convert(path, target, to))


@click.group(cls=Group)
def cache() -> None:
    """What lies on this machine: list it, check it, remove what is not needed."""


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Every file, as JSON.")
@click.pass_obj
def cache_ls(registry: Path | None, as_json: bool) -> None:
    """List what saezoo has downloaded or made, with its size and last use."""
    from saezoo import cache as cached

    known = read_registry(registry)
    found = cached.contents(known)
    for repo, problem in cached.broken(known):
        terminal.note(f"not listed: {repo}: {problem}")
    if as_json:
        print_json([item.describe() for item in found])
        return
    terminal.print_table(cached.table(found))
    terminal.note(f"{size_words(sum(item.bytes for item in found))} in {len(found)} items")


@cache.command("verify")
@click.pass_obj
def cache_verify(registry: Path | None) -> None:
    """Read every downloaded file again and check its hash.

    Exit code 1 if one is damaged. Nothing is changed.
    """
    from saezoo import cache as cached

    checked = list(cached.verified(read_registry(registry)))
    for item in checked:
        click.echo(f"{item.repo}/{item.file}  {item.check or 'DAMAGED'}")
        if item.problem is not None:
            terminal.note(item.problem)
    if damaged := sum(item.problem is not None for item in checked):
        raise DownloadError(f"{damaged} of {len(checked)} files are damaged")
    hashed = sum(item.check not in ("not verifiable", "registry size") for item in checked)
    unknown = f"; of {len(checked) - hashed} none is known" if hashed < len(checked) else ""
    terminal.note(f"{hashed} files have the hash that they should have{unknown}")


@cache.command("prune")
@click.option("--older-than", type=click.IntRange(min=0), metavar="DAYS", help="Also what was not used for so long.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def cache_prune(registry: Path | None, older_than: int | None, yes: bool) -> None:
    """Remove revisions that no registry entry names, and halves of downloads.

    Shows what would go, and asks. Only repositories that the registry or the lock file names are touched.
    """
    from saezoo import cache as cached

    plan = cached.prunable(read_registry(registry), older_than=older_than)
    for line in plan.lines:
        click.echo(line)
    if not plan.lines:
        terminal.note("nothing to remove")
        return
    if not yes:
        click.confirm(f"Remove these, {size_words(plan.bytes)}?", abort=True, err=True)
    plan.execute()
    terminal.note(f"removed {size_words(plan.bytes)}")
