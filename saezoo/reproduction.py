"""`reproduce`: train entries again by their recipe, measure them, and leave a run folder that can be used at once."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from saezoo import checkpoint, files
from saezoo import results as forms
from saezoo import tokens as text
from saezoo.entries import Entry
from saezoo.errors import TrainingError, UsageError
from saezoo.evals import Subject
from saezoo.evals import evaluate as run_evals
from saezoo.lm import LanguageModel, depth_of, load_language_model
from saezoo.overlay import overlay
from saezoo.ranks import Ranks, Share, join, leave, may_be_restarted, started_together
from saezoo.registry import read_registry
from saezoo.report import write_report
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import PARAMETERS, SAEConfig
from saezoo.sinks import Sinks, check_installed, open_sinks
from saezoo.tokens import TextSource
from saezoo.trainers.log import Row
from saezoo.trainers.plan import Plan, best_product, flops_per_token, make_plan, matrix_peak
from saezoo.trainers.train import Hooks, Job, Progress, train
from saezoo.trainers.trainee import Product, Trainee
from saezoo.workflows import EVAL_TOKENS, Options, check_device, fetch_model, packed, text_source


@dataclass(frozen=True)
class Means:
    """How a run is carried out; none of this changes what is trained, but for rounding."""

    product: Product | Literal["auto"] = "auto"
    """How the encoder's product is taken; auto: `half` where the hardware is faster at that, else `full`."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The language model's; auto: bfloat16 on a GPU, float32 on a CPU."""
    share: Share = "entries"
    """Under torchrun: what is divided among the ranks."""
    tensorboard: bool = False
    wandb: str | None = None
    """Project, or None."""


@dataclass(frozen=True)
class Seen:
    """One step of a run, and how fast it is; for whoever watches."""

    progress: Progress
    peak_fraction: float
    """Of the machine's measured matrix-product speed, by the FLOPs of the exact sparse step."""


def reproduce(
    name: str,
    layers: str | int = "all",
    *,
    out: Path,
    tokens: int | None = None,
    recipe: str | None = None,
    resume: bool = False,
    eval_tokens: int = EVAL_TOKENS,
    on_step: Callable[[Seen], None] = lambda seen: None,
    on_eval: Callable[[int, int], None] | None = None,
    means: Means | None = None,
    options: Options | None = None,
) -> list[Result]:
    """Train entries again by their recipe, from one stream of activations, and measure the result.

    Writes to the folder `out`: one folder per SAE in the published layout, run.json, log.csv, eval.csv, report.md with
    its pictures, and registry.yaml, an overlay by which the new SAEs are used like any others.

    Args:
        name, layers: which entries.
        out: the run folder; must be empty unless `resume`.
        tokens: activations to train on, the recipe's number by default.
        recipe: the entry's own by default.
        resume: go on from the last whole checkpoint in `out`. Under `torchrun --max-restarts`, where the same command
            starts the run and goes on with it, also start if there is nothing to go on from.
        eval_tokens: tokens of the final evaluation.
        on_step, on_eval: called after each step; called with the progress of the final evaluation.
        means: precision, division among ranks, where to log.
        options: text, device, seed and so on.

    Returns the results of the final evaluation, with the published values beside them; [] on ranks other than 0.
    """
    means, options = means or Means(), options or Options()
    ranks, device = join(options.device, means.share)
    options = dataclasses.replace(options, device=device)
    try:
        job, recipe_name = job_of(name, layers, tokens, recipe, means, options)
        ranks.check(len(job.entries), job.entries[0].d_sae)
        if ranks.rank == 0:
            _check_folder(out, resume)  # before the model is, perhaps, downloaded
        lm = language_model(job, means, options)
        if ranks.rank == 0:
            rows = unseen_rows(job, lm, eval_tokens)  # now, so that text that cannot be read is noticed
        peak = matrix_peak(lm.device, job.product)
        begin = time.monotonic()
        resume = resume and not (may_be_restarted() and _holds_nothing(out))
        trainees, run = _train(job, lm, out, resume, ranks, peak, on_step, means, options)
        leave()  # all at the same time, not one after the other's evaluation
        if ranks.rank > 0:
            return []
        saes = list(map(trained, job.entries, trainees))
        save(saes, out)
        facts = run | {"wall time": f"{time.monotonic() - begin:,.0f} s, before the evaluation"}
        results = measure(saes, job.entries, job, lm, *rows, on_eval, options)
        _describe(job, recipe_name, out, results, facts)
        checkpoint.remove(out)  # not before: an evaluation that was interrupted can be come back to
        return results
    finally:
        leave()


def plan(
    name: str,
    layers: str | int = "all",
    *,
    tokens: int | None = None,
    recipe: str | None = None,
    means: Means | None = None,
    options: Options | None = None,
) -> tuple[Job, Plan]:
    """What `reproduce` with the same arguments would need on this machine; calibrates for some seconds."""
    means, options = means or Means(), options or Options()
    if started_together() > 1:
        raise UsageError("--plan measures one process; run it without torchrun")
    job, _ = job_of(name, layers, tokens, recipe, means, options)
    lm = language_model(job, means, options)
    return job, make_plan(job.entries, job.recipe, job.tokens, lm, job.product, Ranks())


def job_of(
    name: str, layers: str | int, tokens: int | None, recipe: str | None, means: Means, options: Options
) -> tuple[Job, str]:
    """The job, and its recipe's name."""
    check_device(options.device)
    check_installed(tensorboard=means.tensorboard, wandb=means.wandb is not None)
    registry = read_registry(options.registry)
    entries = registry.find(name, layers)
    first = entries[0]
    chosen = registry.recipe(recipe) if recipe else first.known_recipe
    if first.recipe is None and first.dataset is None and options.text is None and options.dataset is None:
        raise UsageError(f"what {first.collection} was trained on is unknown; give --text or --dataset")
    trained_on = TextSource(f"dataset:{first.dataset_name}", dataset=first.dataset)
    source = text_source(options, default=trained_on if first.dataset else text.builtin("train"))
    if str(options.text) == "builtin":
        source = text.builtin("train")
    product = best_product(torch.device(options.device)) if means.product == "auto" else means.product
    job = Job(tuple(entries), chosen, source, chosen.tokens if tokens is None else tokens, options.seed, product)
    job.check()
    return job, recipe or str(first.recipe_name)


def language_model(job: Job, means: Means, options: Options) -> LanguageModel:
    """The one that the entries read; UsageError if they do not fit it."""
    half = means.model_dtype == "bfloat16" or (means.model_dtype == "auto" and options.device.startswith("cuda"))
    folder = fetch_model(job.entries[0].model, options)
    lm = load_language_model(folder, device=options.device, dtype=torch.bfloat16 if half else torch.float32)
    _check_fit(job.entries, lm)
    return lm


def _check_fit(entries: Sequence[Entry], lm: LanguageModel) -> None:
    for entry in entries:
        depth_of(entry.hook, lm.n_layers)
        name = f"{entry.collection} {entry.name}"
        if not entry.prepend_bos:
            raise UsageError(f"{name} was trained on rows without BOS; saezoo's rows always begin with it")
        if entry.d_in != lm.d_model:
            raise UsageError(f"{name} reads width {entry.d_in}, the model has {lm.d_model}")
        if entry.known_context > lm.n_positions:
            raise UsageError(f"{name} wants rows of {entry.known_context} tokens, the model takes {lm.n_positions}")


def _check_folder(out: Path, resume: bool) -> None:
    if not resume and out.is_dir() and not _holds_nothing(out):
        raise UsageError(f"{out} is not empty; choose another --out, or --resume the run in it")
    files.check_writable(out / "run.json")


def _holds_nothing(out: Path) -> bool:
    """Whether there is no more in the run folder than a run leaves that has not come to its first checkpoint."""
    return {path.name for path in out.glob("[!.]*")} <= {"log.csv", "tensorboard", "wandb"}


def _train(
    job: Job,
    lm: LanguageModel,
    out: Path,
    resume: bool,
    ranks: Ranks,
    peak: float,
    on_step: Callable[[Seen], None],
    means: Means,
    options: Options,
) -> tuple[list[Trainee], dict[str, str]]:
    """The trained SAEs, and what there is to say about how it went."""
    flops = flops_per_token(job.entries, lm) / ranks.size
    last: list[Progress] = []
    sinks = _open_sinks(job, out, resume, means) if ranks.rank == 0 else None

    def step(progress: Progress) -> None:
        last[:] = [progress]
        if ranks.rank > 0:
            return  # one of them shows enough
        on_step(Seen(progress, progress.trained / progress.seconds * flops / peak))

    def row(found: Row) -> None:
        values = {key: float(value) for key, value in vars(found).items() if key not in ("tokens", "layer")}
        if sinks is not None:
            sinks.log(found.tokens, found.layer, values)

    hooks = Hooks(step, row, options.note if ranks.rank == 0 else lambda message: None)
    try:
        trainees = train(job, lm, out, resume=resume, ranks=ranks, hooks=hooks)
    finally:
        if sinks is not None:
            sinks.close()
    return trainees, _account(last[0], flops, peak, lm) if last else {}


def _open_sinks(job: Job, out: Path, resume: bool, means: Means) -> Sinks:
    return open_sinks(
        out,
        tensorboard=means.tensorboard,
        wandb_project=means.wandb,
        run_name=out.name,
        config=job.facts(),
        resumed_at=checkpoint.newest(out) if resume else 0,
    )


def _account(progress: Progress, flops: float, peak: float, lm: LanguageModel) -> dict[str, str]:
    speed = progress.trained / progress.seconds
    saved = progress.saved
    return {
        "language model": str(lm.dtype).removeprefix("torch."),
        "speed": f"{speed:,.0f} tokens/s, {speed * flops / peak:.0%} of the measured matrix-product peak of"
        f" {peak / 1e9:,.0f} GFLOP/s",
        "machine": _machine(lm.device),
        "checkpoints": f"{progress.saving:.1%} of the time"
        + ("" if saved is None else f"; the last one {saved.bytes / 1e6:,.0f} MB in {saved.seconds:.1f} s"),
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def trained(entry: Entry, trainee: Trainee) -> SAE:
    """The trained SAE, for activations as they are: f(c x) / c is that of b_enc / c and b_dec / c."""
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
    tensors = {key: tensor.contiguous() for key, tensor in zip(PARAMETERS["relu"], trainee.parameters, strict=True)}
    for key in ("b_enc", "b_dec"):
        tensors[key] = tensors[key] / trainee.recipe.input_scale
    return SAE(config, tensors, trainee.log_sparsity_F)


def save(saes: Sequence[SAE], out: Path) -> None:
    """In the published layout, each under `out`/hook."""
    for sae in saes:
        sae.save(out / str(sae.config.hook))


def unseen_rows(job: Job, lm: LanguageModel, eval_tokens: int) -> tuple[str, text.Rows]:
    """What the result will be measured on: files of the data set that training never reads, if the registry names
    some, else the bundled held-out text."""
    first, dataset = job.entries[0], job.source.dataset
    source = text.builtin("heldout")
    if dataset is not None and dataset.heldout_files is not None:
        heldout = dataclasses.replace(dataset, data_files=dataset.heldout_files)
        source = TextSource(f"{job.source.name}:heldout", dataset=heldout)
    context = first.known_context
    found = packed(source, lm, context, first.definitions.protocol)
    return source.name, text.collect(found, tokens=eval_tokens, context=context, source=source.name)


def measure(
    saes: Sequence[SAE],
    entries: Sequence[Entry],
    job: Job,
    lm: LanguageModel,
    source_name: str,
    rows: text.Rows,
    on_eval: Callable[[int, int], None] | None,
    options: Options,
) -> list[Result]:
    """Evaluate by the protocol of the published numbers, in float32."""
    first = job.entries[0]
    if lm.dtype != torch.float32:
        lm = load_language_model(fetch_model(first.model, options), device=options.device)
    total = len(rows) * first.known_context
    subjects = [
        Subject(sae, entry.collection, entry.name, entry.published) for sae, entry in zip(saes, entries, strict=True)
    ]
    try:
        return run_evals(
            subjects,
            lm,
            rows,
            protocol=first.definitions.protocol,
            text=source_name,
            model=first.model_name,
            seed=options.seed,
            on_progress=None if on_eval is None else lambda done: on_eval(done, total),
        )
    except KeyboardInterrupt:
        raise TrainingError(
            "stopped in the evaluation after the training; the same command with --resume goes on there"
        ) from None


def _describe(job: Job, recipe_name: str, out: Path, results: list[Result], facts: dict[str, str]) -> None:
    """run.json, eval.csv, the registry overlay and the report."""
    run: dict[str, Any] = {"recipe": recipe_name, "versions": results[0].versions, **job.facts(), **facts}
    forms.write_text(out / "run.json", json.dumps(run, indent=2) + "\n")
    forms.write_text(out / "eval.csv", forms.to_csv(results))
    forms.write_text(out / "registry.yaml", overlay(job, recipe_name, results))
    told = {
        "recipe": recipe_name,
        "tokens": f"{job.tokens:,}",
        "text": job.source.name,
        "seed": str(job.seed),
        "encoder's product": job.product,
        **facts,
        "versions": ", ".join(f"{key} {value}" for key, value in results[0].versions.items()),
    }
    names = ", ".join(entry.name for entry in job.entries)
    write_report(out, f"{job.entries[0].collection} {names}, trained again", told, results)
