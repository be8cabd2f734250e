"""The registry file in a run folder, by which the SAEs of that run are used like any others."""

from __future__ import annotations

import dataclasses

import yaml

from saezoo.results import Result
from saezoo.trainers.train import Job

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
            "published": {key: _six_digits(result.metrics[key].value) for key in _PUBLISHED},
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
            "tokens": results[0].tokens,
            "text": results[0].text,
            "source": ["rerun"],
            "definitions": {key: "docs/metrics.md" for key in _PUBLISHED},
        },
        "saes": saes,
    }


def _six_digits(value: float | None) -> float | None:
    """None where there is no value: some metrics have none on very little text."""
    return None if value is None else float(f"{value:.6g}")
