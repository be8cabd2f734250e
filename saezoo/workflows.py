"""What the commands do, as functions: evaluate, reproduce, open a session. The one place that joins all the parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saezoo import hub, tokens
from saezoo.activations import ActivationBuffer, activations
from saezoo.errors import UsageError
from saezoo.evals import Subject
from saezoo.evals import evaluate as run_evals
from saezoo.lm import LanguageModel, depth_of, load_language_model
from saezoo.loading import load, load_entry, named_dtype
from saezoo.registry import Dataset, Entry, Model, Protocol, read_registry
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.tokens import TextSource

if TYPE_CHECKING:
    from saezoo.trainers.trainee import StepLog, Trainee

EVAL_TOKENS = 65_536
_FEB2024_ROWS = 32


@dataclass(frozen=True)
class Options:
    """Where and on what something runs; shared by all workflows."""

    text: str | Path | None = None
    """`builtin`, or a file. None: the bundled held-out text (evaluate) or the entry's data set (reproduce)."""
    dataset: str | None = None
    """A data set of the registry, or a hub id with a `text` column and a `train` split."""
    device: str = "cpu"
    dtype: torch.dtype | str = "float32"
    seed: int = 0
    offline: bool = False
    registry: str | Path | None = None
    note: Callable[[str], None] = lambda message: None
    """Gets one-line remarks for the user."""


def evaluate(
    name: str | Path,
    layers: str | int | None = "all",
    *,
    tokens_wanted: int = EVAL_TOKENS,
    protocol: Protocol = "standard",
    model: str | None = None,
    batch_size: int | None = None,
    layout: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    options: Options | None = None,
) -> list[Result]:
    """Measure SAEs of one collection, or one local SAE folder, on text.

    Args:
        name: a collection, or the folder of one SAE.
        layers: which entries of the collection (`0-3,7`, `all`); ignored for a folder.
        tokens_wanted: tokens to run, special ones included; rounded down to whole rows.
        protocol: `standard`, or `feb2024` (what the post measured: its packing, BOS replaced and scored).
        model: folder or hub id of the language model; needed for a folder whose model is not in the registry.
        batch_size: rows of tokens at once; by default as fits 256 MB of logits.
        layout: which published form of the entries to read.
        on_progress: called with (tokens done, tokens in all).
        options: text, device, dtype, seed, offline, registry.

    Raises SaezooError of some kind for everything a user can get wrong.
    """
    options = options or Options()
    dtype = named_dtype(options.dtype)
    _check_device(options.device)
    saes = _subjects(name, layers, protocol, layout, options, dtype)
    lm, model_name = _model_for(name, layers, model, options, dtype, saes[0].sae)
    source = text_source(options, default=tokens.builtin("heldout"))
    if saes[0].published and protocol == "feb2024" and options.dataset is None:
        options.note(f"published values were measured on OpenWebText, these on {source.name}; --dataset openwebtext")
    context = min(saes[0].sae.config.context_size or 128, lm.n_positions)
    rows = tokens.collect(
        _packed(source, lm, context, protocol), tokens=tokens_wanted, context=context, source=source.name
    )
    total = len(rows) * context
    if total < tokens_wanted // context * context:
        options.note(f"{source.name} gave {total:,} of the {tokens_wanted:,} tokens asked for")
    return run_evals(
        saes,
        lm,
        rows,
        protocol=protocol,
        text=source.name,
        model=model_name,
        seed=options.seed,
        batch_size=batch_size,
        on_progress=None if on_progress is None else lambda done: on_progress(done, total),
    )


def _subjects(
    name: str | Path,
    layers: str | int | None,
    protocol: Protocol,
    layout: str | None,
    options: Options,
    dtype: torch.dtype,
) -> list[Subject]:
    if Path(name).exists() and str(name) not in read_registry(options.registry).collections:
        sae = load(name, device=options.device, dtype=dtype)
        return [Subject(sae, str(name), sae.config.hook or "?")]
    entries = read_registry(options.registry).find(str(name), "all" if layers is None else layers)
    return [
        Subject(
            load_entry(entry, layout=layout, device=options.device, dtype=dtype, offline=options.offline),
            entry.collection,
            entry.name,
            entry.published if entry.definitions.protocol == protocol else {},
        )
        for entry in entries
    ]


def _model_for(
    name: str | Path, layers: str | int | None, model: str | None, options: Options, dtype: torch.dtype, sae: SAE
) -> tuple[LanguageModel, str]:
    """The language model that `sae` reads, and its name."""
    registry = read_registry(options.registry)
    known = registry.models.get(sae.config.model_name or "")
    if model is not None:
        named = registry.models.get(model)
        folder = _fetch(named, options) if named else hub.fetch_named_model(model, offline=options.offline)
        return load_language_model(folder, device=options.device, dtype=dtype), model
    if known is None:
        raise UsageError(f"{name} reads `{sae.config.model_name}`, which the registry does not know; give --model")
    assert sae.config.model_name is not None
    return load_language_model(_fetch(known, options), device=options.device, dtype=dtype), sae.config.model_name


def _fetch(model: Model, options: Options) -> Path:
    return hub.fetch_model(model, offline=options.offline)


def _packed(source: TextSource, lm: LanguageModel, context: int, protocol: Protocol) -> Iterator[tokens.Rows]:
    documents = tokens.encode(lm.tokenizer, source.documents())
    if protocol == "feb2024":
        return tokens.pack_feb2024(documents, bos=lm.bos, context=context, rows_per_call=_FEB2024_ROWS)
    return tokens.pack(documents, bos=lm.bos, context=context)


def text_source(options: Options, *, default: TextSource) -> TextSource:
    """The text that `options` ask for, else `default`. Raises UsageError if they ask for two."""
    if options.text is not None and options.dataset is not None:
        raise UsageError("give --text or --dataset, not both")
    if options.dataset is not None:
        known = {e.dataset_name: e.dataset for es in read_registry(options.registry).collections.values() for e in es}
        spec = known.get(options.dataset) or Dataset(options.dataset, None, None, "train", "text", None, ())
        return TextSource(f"dataset:{options.dataset}", dataset=spec, offline=options.offline)
    if options.text is None:
        return default
    return tokens.builtin("heldout") if str(options.text) == "builtin" else tokens.text_file(Path(options.text))


def reproduce(
    name: str,
    layers: str | int = "all",
    *,
    out: Path,
    tokens_wanted: int | None = None,
    recipe: str | None = None,
    resume: bool = False,
    eval_tokens: int = EVAL_TOKENS,
    on_step: Callable[[int, int, Sequence[str], list[StepLog]], None] | None = None,
    on_eval: Callable[[int, int], None] | None = None,
    options: Options | None = None,
) -> list[Result]:
    """Train entries again by their recipe, from one stream of activations, and measure the result.

    Writes to the folder `out`: one folder per SAE in the published layout, run.json, log.csv, eval.csv, and
    registry.yaml, an overlay by which the new SAEs are used like any others.

    Args:
        name, layers: which entries.
        out: the run folder; must be empty unless `resume`.
        tokens_wanted: activations to train on, the recipe's number by default.
        recipe: the entry's own by default.
        resume: go on from the checkpoint in `out`.
        eval_tokens: tokens of the final evaluation.
        on_step: called after each step with (tokens done, tokens in all, layer names, one log per SAE).
        on_eval: progress of the final evaluation.
        options: text, device, seed and so on.

    Returns the results of the final evaluation, with the published values beside them.
    """
    from saezoo.trainers.train import Job, train

    options = options or Options()
    _check_device(options.device)
    registry = read_registry(options.registry)
    entries = registry.find(name, layers)
    chosen = registry.recipe(recipe) if recipe else entries[0].recipe
    total = chosen.tokens if tokens_wanted is None else tokens_wanted
    _check_run(out, total, resume)
    first = entries[0]
    trained_on = TextSource(f"dataset:{first.dataset_name}", dataset=first.dataset, offline=options.offline)
    source = text_source(options, default=trained_on if first.dataset else tokens.builtin("train"))
    if str(options.text) == "builtin":
        source = tokens.builtin("train")
    job = Job(tuple(entries), chosen, source, total, options.seed)
    lm = load_language_model(_fetch(first.model, options), device=options.device)
    names = [entry.name for entry in entries]
    trainees = train(
        job,
        lm,
        out,
        resume=resume,
        on_step=None if on_step is None else lambda done, logs: on_step(done, total, names, logs),
        note=options.note,
    )
    saes = [_finished(entry, trainee, out) for entry, trainee in zip(entries, trainees, strict=True)]
    (out / "checkpoint.pt").unlink(missing_ok=True)
    results = _measure(saes, entries, lm, eval_tokens, on_eval, options)
    _describe(job, recipe or first.recipe_name, out, results)
    return results


def _check_run(out: Path, total: int, resume: bool) -> None:
    if total <= 0:
        raise UsageError(f"--tokens must be above 0, not {total}")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another --out, or --resume the run in it")


def _finished(entry: Entry, trainee: Trainee, out: Path) -> SAE:
    """The trained SAE, saved in the published layout under `out`/hook."""
    from saezoo.sae import SAEConfig
    from saezoo.weights import NAMES

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
    source = tokens.builtin("heldout")
    context = entries[0].context_size
    rows = tokens.collect(
        _packed(source, lm, context, protocol), tokens=eval_tokens, context=context, source=source.name
    )
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


def _describe(job: Any, recipe_name: str, out: Path, results: list[Result]) -> None:
    """run.json, eval.csv and the registry overlay."""
    from saezoo.results import to_csv, write_text

    run = {"recipe": recipe_name, "versions": results[0].versions, **job.identity()}
    write_text(out / "run.json", json.dumps(run, indent=2) + "\n")
    write_text(out / "eval.csv", to_csv(results))
    write_text(out / "registry.yaml", overlay(job, recipe_name, results))


def overlay(job: Any, recipe_name: str, results: list[Result]) -> str:
    """A registry file that adds the SAEs of a finished run as the collection `<name>-rerun`."""
    import yaml

    first: Entry = job.entries[0]
    recipe = {key: value for key, value in dataclasses.asdict(job.recipe).items() if key != "source"}
    shared = {key: getattr(first, key) for key in ("d_in", "d_sae", "context_size", "prepend_bos", "centre", "dtype")}
    shown = ("ce_sae", "ce_delta", "explained_variance", "explained_variance_uncentred", "l0", "l1", "alive_fraction")
    saes = [
        {
            "layer": entry.layer,
            "name": entry.name,
            "hook": entry.hook,
            "neuronpedia": None,
            "published": {key: float(f"{result.metrics[key].value:.6g}") for key in shown},
            "files": {},
        }
        for entry, result in zip(job.entries, results, strict=True)
    ]
    collection = {
        "title": f"{first.collection} trained again by recipe {recipe_name}",
        "model": first.model_name,
        "dataset": None,
        "recipe": f"{recipe_name}-rerun",
        "hook": first.hook.replace(f"blocks.{first.layer}.", "blocks.{layer}."),
        **shared,
        "licence": first.licence,
        "source": ["rerun"],
        "layouts": {
            "run": {
                "format": "saelens",
                "folder": ".",
                "weights": "{hook}/sae_weights.safetensors",
                "config": "{hook}/cfg.json",
                "sparsity": "{hook}/sparsity.safetensors" if (results and _has_sparsity(job)) else None,
                "source": ["rerun"],
            }
        },
        "published": {
            "protocol": results[0].protocol,
            "sample": f"{results[0].tokens} tokens of {results[0].text}, seed {results[0].seed}",
            "source": ["rerun"],
            "definitions": {key: "docs/metrics.md" for key in shown},
        },
        "saes": saes,
    }
    content = {
        "version": 1,
        "sources": {"rerun": f"saezoo reproduce on {job.source.name}, {job.tokens} tokens, seed {job.seed}"},
        "recipes": {f"{recipe_name}-rerun": {**recipe, "tokens": job.tokens, "source": ["rerun"]}},
        "collections": {f"{first.collection}-rerun": collection},
    }
    return "# Use it: saezoo --registry THIS_FILE list\n" + str(yaml.safe_dump(content, sort_keys=False, width=120))


def _has_sparsity(job: Any) -> bool:
    """Whether the run was long enough to close a sampling window."""
    return bool(job.tokens // job.recipe.batch_size >= job.recipe.sampling_window_steps)


@dataclass(frozen=True)
class Session:
    """The post's three things, ready to use."""

    model: Any
    """The language model in TransformerLens (HookedTransformer below version 4, TransformerBridge from 4 on)."""
    sae: SAE
    activations: Iterator[Tensor]
    """Shuffled batches [batch_size, D] of what the SAE reads; as many as the text gives, then from its start again."""


def load_session(
    name: str,
    layer: int | str,
    *,
    batch_size: int = 4096,
    options: Options | None = None,
) -> Session:
    """Model, SAE and activations of one entry in one call: `load_session("gpt2-small-res", 10)`.

    `options.text` or `options.dataset` name the text of the activations; the bundled one by default.
    """
    from saezoo.hooked import hooked_model

    options = options or Options()
    _check_device(options.device)
    sae = load(
        name, layer, device=options.device, dtype=options.dtype, offline=options.offline, registry=options.registry
    )
    lm, _ = _model_for(name, layer, None, options, named_dtype(options.dtype), sae)
    source = text_source(options, default=tokens.builtin("heldout"))
    return Session(hooked_model(lm.hf_model, lm.tokenizer), sae, _batches(lm, sae, source, batch_size, options.seed))


def _batches(lm: LanguageModel, sae: SAE, source: TextSource, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled activations [batch_size, D], epoch after epoch."""
    assert sae.config.hook is not None
    depth, context = depth_of(sae.config.hook, lm.n_layers), sae.config.context_size or 128
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Iterator[tokens.Rows]:
        while True:
            yield from _in_blocks(_packed(source, lm, context, "standard"), 32)

    buffer = ActivationBuffer(
        activations(lm, rows(), [depth], centre=sae.config.centre),
        half=8,
        batch_size=batch_size,
        mode="fixed",
        permute=lambda n: torch.randperm(n, generator=generator).to(lm.device),
    )
    for x_n1D in buffer:
        if len(x_n1D) == batch_size:
            yield x_n1D[:, 0].to(sae.W_enc.dtype)


def _in_blocks(rows: Iterator[tokens.Rows], size: int) -> Iterator[tokens.Rows]:
    block: list[tokens.Rows] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield tokens.concatenate(block)
            block = []
    if block:
        yield tokens.concatenate(block)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device `{device}` cannot be used: {str(error).splitlines()[0]}") from None
