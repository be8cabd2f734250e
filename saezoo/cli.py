"""The command line: parse, call, print. No arithmetic; torch is imported only inside the commands that need it.

stdout carries data (tables, JSON, CSV, paths); progress and remarks go to stderr.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import click

from saezoo.cli_common import Group
from saezoo.cli_evals import compare_command, eval_command, verify_command
from saezoo.cli_features import cooccur_command, dashboard_command, feature_command, features_command
from saezoo.cli_sharing import add_command, push_command
from saezoo.cli_training import ablate_command, reproduce_command, sweep_command
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


_COMMANDS = (
    (list_command, info, get, convert_command, cache),
    (eval_command, verify_command, compare_command),
    (reproduce_command, ablate_command, sweep_command),
    (dashboard_command, features_command, feature_command, cooccur_command),
    (push_command, add_command),
)
for _command in (command for commands in _COMMANDS for command in commands):
    main.add_command(_command)
