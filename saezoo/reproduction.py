"""`reproduce`: train entries again by their recipe, measure them, and leave a run folder that can be used at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import yaml

from saezoo import files
from saezoo import results as forms
from saezoo import tokens as text
from saezoo.entries import Entry
from saezoo.errors import UsageError
from saezoo.evals import Subject
from saezoo.evals import evaluate as run_evals
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import read_registry
from saezoo.results import Result
from saezoo.sae import SAE, SAEConfig
from saezoo.tokens import TextSource
from saezoo.trainers import checkpoint
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Trainee
from saezoo.weights import NAMES
from saezoo.workflows import EVAL_TOKENS, Options, check_device, fetch_model, packed, text_source

_PUBLISHED = (
    "ce_sae",
    "ce_delta",
    "ce_score",
    "explained_variance",
    "explained_variance_uncentred",
    "l0",
    "l1",
    "alive_fraction",
)
"""What the overlay of a run gives as published."""


def reproduce(
    name: str,
    layers: str | int = "all",
    *,
    out: Path,
    tokens: int | None = None,
    recipe: str | None = None,
    resume: bool = False,
    eval_tokens: int = EVAL_TOKENS,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_eval: Callable[[int, int], None] | None = None,
    options: Options | None = None,
) -> list[Result]:
    """Train entries again by their recipe, from one stream of activations, and measure the result.

    Writes to the folder `out`: one folder per SAE in the published layout, run.json, log.csv, eval.csv, and
    registry.yaml, an overlay by which the new SAEs are used like any others.

    Args:
        name, layers: which entries.
        out: the run folder; must be empty unless `resume`.
        tokens: activations to train on, the recipe's number by default.
        recipe: the entry's own by default.
        resume: go on from the checkpoint in `out`.
        eval_tokens: tokens of the final evaluation.
        on_step: called after each step.
        on_eval: progress of the final evaluation.
        options: text, device, seed and so on.

    Returns the results of the final evaluation, with the published values beside them.
    """
    options = options or Options()
    check_device(options.device)
    registry = read_registry(options.registry)
    entries = registry.find(name, layers)
    chosen = registry.recipe(recipe) if recipe else entries[0].recipe
    total = chosen.tokens if tokens is None else tokens
    first = entries[0]
    trained_on = TextSource(f"dataset:{first.dataset_name}", dataset=first.dataset)
    source = text_source(options, default=trained_on if first.dataset else text.builtin("train"))
    if str(options.text) == "builtin":
        source = text.builtin("train")
    _check_run(out, total, resume)
    job = Job(tuple(entries), chosen, source, total, options.seed)
    lm = load_language_model(fetch_model(first.model, options), device=options.device)
    trainees = train(job, lm, out, resume=resume, hooks=Hooks(on_step, note=options.note))
    saes = [_finished(entry, trainee, out) for entry, trainee in zip(entries, trainees, strict=True)]
    checkpoint.remove(out)
    results = _measure(saes, entries, lm, eval_tokens, on_eval, options)
    _describe(job, recipe or first.recipe_name, out, results)
    return results


def _check_run(out: Path, total: int, resume: bool) -> None:
    if total <= 0:
        raise UsageError(f"--tokens must be above 0, not {total}")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another --out, or --resume the run in it")
    files.check_writable(out / "run.json")


def _finished(entry: Entry, trainee: Trainee, out: Path) -> SAE:
    """The trained SAE, saved in the published layout under `out`/hook."""
    config = SAEConfig(
        d_in=entry.d_in,
        d_sae=entry.d_sae,
        hook=entry.hook,
        model_name=entry.model_name,
        context_size=entry.context_size,
        prepend_bos=entry.prepend_bos,
        centre=entry.centre,
        apply_b_dec_to_input=True,
    )
    tensors = {key: tensor.detach() for key, tensor in zip(NAMES, trainee.parameters, strict=True)}
    sae = SAE(config, tensors, trainee.log_sparsity_F)
    sae.save(out / entry.hook)
    return sae


def _measure(
    saes: list[SAE],
    entries: list[Entry],
    lm: LanguageModel,
    eval_tokens: int,
    on_eval: Callable[[int, int], None] | None,
    options: Options,
) -> list[Result]:
    """Evaluate by the protocol of the published numbers, on the bundled held-out text."""
    protocol = entries[0].definitions.protocol
    source = text.builtin("heldout")
    context = entries[0].context_size
    rows = text.collect(packed(source, lm, context, protocol), tokens=eval_tokens, context=context, source=source.name)
    total = len(rows) * context
    subjects = [
        Subject(sae, entry.collection, entry.name, entry.published) for sae, entry in zip(saes, entries, strict=True)
    ]
    return run_evals(
        subjects,
        lm,
        rows,
        protocol=protocol,
        text=source.name,
        model=entries[0].model_name,
        seed=options.seed,
        on_progress=None if on_eval is None else lambda done: on_eval(done, total),
    )


def _describe(job: Job, recipe_name: str, out: Path, results: list[Result]) -> None:
    """run.json, eval.csv and the registry overlay."""
    run = {"recipe": recipe_name, "versions": results[0].versions, **job.facts()}
    forms.write_text(out / "run.json", json.dumps(run, indent=2) + "\n")
    forms.write_text(out / "eval.csv", forms.to_csv(results))
    forms.write_text(out / "registry.yaml", overlay(job, recipe_name, results))


def overlay(job: Job, recipe_name: str, results: list[Result]) -> str:
    """A registry file that adds the SAEs of a finished run as the collection `<name>-rerun`."""
    first = job.entries[0]
    recipe = {key: value for key, value in dataclasses.asdict(job.recipe).items() if key != "source"}
    # The built-in registry knows the built-in models; one from an overlay goes along.
    models = {} if first.origin == "built-in" else {first.model_name: dataclasses.asdict(first.model)}
    content = {
        "version": 1,
        "models": {name: {**model, "source": ["rerun"]} for name, model in models.items()},
        "sources": {"rerun": f"saezoo reproduce on {job.source.name}, {job.tokens} tokens, seed {job.seed}"},
        "recipes": {f"{recipe_name}-rerun": {**recipe, "tokens": job.tokens, "source": ["rerun"]}},
        "collections": {f"{first.collection}-rerun": _collection(job, recipe_name, results)},
    }
    return "# Use it: saezoo --registry THIS_FILE list\n" + str(yaml.safe_dump(content, sort_keys=False, width=120))


def _collection(job: Job, recipe_name: str, results: list[Result]) -> dict[str, object]:
    first = job.entries[0]
    shared = {key: getattr(first, key) for key in ("d_in", "d_sae", "context_size", "prepend_bos", "centre")}
    # A run shorter than one sampling window leaves no sparsity behind.
    closed_a_window = job.tokens // job.recipe.batch_size >= job.recipe.sampling_window_steps
    layout = {
        "format": "saelens",
        "folder": ".",
        "weights": "{hook}/sae_weights.safetensors",
        "config": "{hook}/cfg.json",
        "sparsity": "{hook}/sparsity.safetensors" if closed_a_window else None,
        "source": ["rerun"],
    }
    saes = [
        {
            "layer": entry.layer,
            "name": entry.name,
            "hook": entry.hook,
            "neuronpedia": None,
            "published": {key: float(f"{result.metrics[key].value:.6g}") for key in _PUBLISHED},
            "files": {},
        }
        for entry, result in zip(job.entries, results, strict=True)
    ]
    return {
        "title": f"{first.collection} trained again by recipe {recipe_name}",
        "model": first.model_name,
        "dataset": None,
        "recipe": f"{recipe_name}-rerun",
        "hook": first.hook.replace(f"blocks.{first.layer}.", "blocks.{layer}."),
        **shared,
        "dtype": "float32",
        "licence": first.licence,
        "source": ["rerun"],
        "layouts": {"run": layout},
        "published": {
            "protocol": results[0].protocol,
            "sample": f"{results[0].tokens} tokens of {results[0].text}, seed {results[0].seed}",
            "source": ["rerun"],
            "definitions": {key: "docs/metrics.md" for key in _PUBLISHED},
        },
        "saes": saes,
    }
