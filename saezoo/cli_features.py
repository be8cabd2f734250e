"""Commands that look at features: dashboard, features, feature, cooccur."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from saezoo import files, terminal
from saezoo.cli_common import runtime_options, write
from saezoo.errors import UsageError


def _pass_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that reads a text for all features."""
    command = runtime_options(command)
    for option in reversed(
        [
            click.option("--tokens", type=click.IntRange(min=1), help="Tokens to run.  [default: 65,536]"),
            click.option("--model", help="Language model: folder, hub id or registry name."),
            click.option("--layout", help="Which published form of the SAEs."),
            click.option("--dtype", default="float32", show_default=True, help="Of the model: float32, bf16, float64."),
            click.option(
                "--batch-size", type=click.IntRange(min=1), help="Rows at once.  [default: 2,048 tokens; GPU: 32,768]"
            ),
            click.option("--resume", is_flag=True, help="Go on with the same command, interrupted."),
        ]
    ):
        command = option(command)
    return command


class Stages(ExitStack):
    """One line or bar of progress for each thing that is being done."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._shown:
            unit = "features" if stage.startswith("features") else "tokens"
            self._shown[stage] = self.enter_context(terminal.Progress(stage, unit))
        self._shown[stage](done, total)

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, terminal.Progress] = {}


def _runtime(registry: Path | None, settings: dict[str, Any]) -> Any:
    """`workflows.Options` from the settings of `runtime_options`, which are taken out."""
    from saezoo import workflows

    runtime = {key: settings.pop(key) for key in ("text", "dataset", "device", "seed", "offline", "dtype")}
    return workflows.Options(registry=registry, note=terminal.note, **runtime)


@click.command("dashboard")
@click.argument("collection", required=False)
@click.argument("layers", required=False)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="[default: dashboards/COLLECTION]")
@click.option("--features", help="Those that get a page: 0-99,512.  [default: all]")
@click.option("--batches", type=click.Path(path_type=Path, file_okay=False), help="Write SAEDashboard's JSON too.")
@click.option(
    "--neuronpedia", type=click.Path(path_type=Path, file_okay=False), help="Write what Neuronpedia imports too."
)
@click.option("--release", type=click.Path(path_type=Path), help="YAML that says whose the import is.")
@click.option("--evaluate", "with_evaluation", is_flag=True, help="Measure cross-entropy on the same text too.")
@click.option("--serve", "serving", is_flag=True, help="Open the site in a browser; alone: the one at --out.")
@_pass_options
@click.pass_obj
def dashboard_command(
    registry: Path | None,
    /,
    collection: str | None,
    layers: str | None,
    out: Path | None,
    serving: bool,
    tokens: int | None,
    **settings: Any,
) -> None:
    """Write a page for every feature, as a static site.

    Without --text or --dataset: on the bundled held-out text.
    """
    if collection is None and (out is None or not serving):
        raise UsageError("say which COLLECTION, or which site to open: --serve --out FOLDER")
    if collection is not None:
        from saezoo import dashboard, workflows

        out = out or Path("dashboards") / Path(collection).name
        options = _runtime(registry, settings)
        exports = dashboard.Exports(**{key: settings.pop(key) for key in ("batches", "neuronpedia", "release")})
        with Stages() as stages:
            abouts = dashboard.dashboard(
                collection,
                layers,
                out=out,
                exports=exports,
                tokens=tokens or workflows.EVAL_TOKENS,
                on_stage=stages,
                options=options,
                **settings,
            )
        if not abouts:  # only one of several ranks has them
            return
        pages = sum(len(about.features) for about in abouts)
        terminal.note(f"{pages:,} features on {abouts[0].tokens:,} tokens; open this in a browser, or give --serve:")
        click.echo(out / "index.html")
    if serving:
        from saezoo.features.serve import serve

        assert out is not None
        serve(out, terminal.note)


@click.command("features")
@click.argument("collection")
@click.argument("layers", required=False)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write a row per feature; - for stdout.")
@click.option("--sort", default="density", show_default=True, help="Column that the table is sorted by.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(min=1), help="Rows of the table.")
@_pass_options
@click.pass_obj
def features_command(
    registry: Path | None,
    /,
    collection: str,
    layers: str | None,
    csv_path: Path | None,
    sort: str,
    top: int,
    tokens: int | None,
    **settings: Any,
) -> None:
    """A row for every feature: density, tokens, logits, neighbours.

    The table shows the first of them; --csv writes all.
    """
    from saezoo import dashboard, workflows
    from saezoo.features import table

    table.check_sort(sort)
    if csv_path is not None and str(csv_path) != "-":
        files.check_writable(csv_path)
    options = _runtime(registry, settings)
    with Stages() as stages:
        frame = dashboard.feature_table(
            collection,
            layers,
            tokens=tokens or workflows.EVAL_TOKENS,
            on_stage=stages,
            options=options,
            **settings,
        )
    if frame is None:  # only one of several ranks has it
        return
    if str(csv_path) != "-":
        terminal.print_table(table.rich_table(frame, sort=sort, top=top, width=terminal.width()))
    if csv_path is not None:
        write(str(csv_path), table.to_csv(frame))


@click.command("cooccur")
@click.argument("collection")
@click.argument("layer", required=False)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the pairs; - for stdout.")
@click.option("--groups", type=click.Path(path_type=Path), help="CSV of clusters and of exclusive groups.")
@_pass_options
@click.pass_obj
def cooccur_command(
    registry: Path | None,
    /,
    collection: str,
    layer: str | None,
    csv_path: Path | None,
    groups: Path | None,
    tokens: int | None,
    **settings: Any,
) -> None:
    """Which features of one SAE fire together, and which never do."""
    from saezoo import dashboard, feature_view, workflows

    for path in (csv_path, groups):
        if path is not None and str(path) != "-":
            files.check_writable(path)
    options = _runtime(registry, settings)
    with Stages() as stages:
        together = dashboard.cooccur(
            collection,
            layer,
            tokens=tokens or workflows.EVAL_TOKENS,
            on_stage=stages,
            options=options,
            **settings,
        )
    if together is None:  # only one of several ranks has it
        return
    if str(csv_path) != "-":
        terminal.print_table(*feature_view.groups_view(together.found, together.tops))
    if csv_path is not None:
        write(str(csv_path), together.found.pairs_csv())
    if groups is not None:
        write(str(groups), together.found.groups_csv())


@click.command("feature")
@click.argument("collection")
@click.argument("layer")
@click.argument("index", required=False)
@click.option("--text", "sentence", help="A sentence of your own: what fires on it?")
@click.option("--corpus", help="Text to measure on: `builtin` or a file (.txt, .jsonl).")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of it to run.  [default: 65,536]")
@click.option("--model", help="Language model: folder, hub id or registry name.")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**32), show_default=True, help="Seed of the draws.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("--resume", is_flag=True, help="Go on with the same command, interrupted.")
@click.pass_obj
def feature_command(
    registry: Path | None,
    /,
    collection: str,
    layer: str,
    index: str | None,
    sentence: str | None,
    corpus: str | None,
    tokens: int | None,
    model: str | None,
    resume: bool,
    **runtime: Any,
) -> None:
    """One feature in the terminal, and what fires on a sentence.

    COLLECTION LAYER INDEX, or FOLDER INDEX.
    """
    from saezoo import dashboard, feature_view, workflows

    where, number = (layer, index) if index is not None else (None, layer)
    if not str(number).isdecimal():
        raise UsageError(f"`{number}` is no feature; give its number, e.g. saezoo feature tiny-res 2 17")
    options = workflows.Options(registry=registry, note=terminal.note, text=corpus, **runtime)
    with Stages() as stages:
        found = dashboard.feature(
            collection,
            where,
            int(str(number)),
            sentence=sentence,
            tokens=tokens or workflows.EVAL_TOKENS,
            model=model,
            resume=resume,
            on_stage=stages,
            options=options,
        )
    terminal.print_table(*feature_view.feature_view(found.feature, found.about, found.vocabulary))
    if found.fired is not None:
        terminal.print_table(*feature_view.sentence_view(found.fired, found.feature.index, found.vocabulary))
