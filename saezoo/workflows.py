"""What the commands do, as functions: `evaluate` and `load_session`; `reproduce` has its own module."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saezoo import files, hub
from saezoo import tokens as text
from saezoo.activations import ActivationBuffer, activations
from saezoo.entries import Dataset, Entry, Model, Protocol
from saezoo.errors import UsageError
from saezoo.evals import Subject
from saezoo.evals import evaluate as run_evals
from saezoo.evals.intervals import FEWEST
from saezoo.lm import HALF, LanguageModel, depth_of, load_language_model
from saezoo.loading import load, load_entry, named_dtype
from saezoo.ranks import Ranks, join, leave
from saezoo.registry import read_registry
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.tokens import TextSource

EVAL_TOKENS = 65_536
Suite = Literal["standard", "full"]
_FEB2024_ROWS = 32
_SESSION_ROWS = 32  # a small buffer: the first batch waits for four times as many rows


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
    tokens: int | None = EVAL_TOKENS,
    protocol: Protocol = "standard",
    model: str | None = None,
    batch_size: int | None = None,
    layout: str | None = None,
    suite: Suite = "standard",
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    options: Options | None = None,
) -> list[Result]:
    """Measure SAEs of one collection, or one local SAE folder, on text.

    Args:
        name: a collection, or the folder of one SAE.
        layers: which entries of the collection (`0-3,7`, `all`); ignored for a folder.
        tokens: tokens to run, special ones included; rounded down to whole rows. None: all of the text.
        protocol: `standard`, or `feb2024` (what the post measured: its packing, BOS replaced and scored).
        model: folder or hub id of the language model; needed for a folder whose model is not in the registry.
        batch_size: rows of tokens at once; by default 2,048 tokens on a CPU and 32,768 on a GPU.
        layout: which published form of the entries to read.
        suite: `full` adds the metrics of docs/suite.md: description length, absorption, probing, decoder structure.
        resume: go on with the same evaluation, interrupted; what takes over 20 seconds is saved now and then.
        on_progress: called with (tokens done, tokens in all).
        options: text, device, dtype, seed, offline, registry. With half a dtype the SAEs stay in float32 (see `lm.py`).

    Under torchrun the ranks share the rows, and rank 0 alone gets the results; the others get [].
    Raises SaezooError of some kind for everything a user can get wrong.
    """
    with together(options or Options()) as (ranks, options):
        task = prepare(name, layers, tokens=tokens, protocol=protocol, model=model, layout=layout, options=options)
        total = task.rows.tokens_RT.size
        results = run_evals(
            task.subjects,
            task.lm,
            task.rows,
            protocol=protocol,
            text=task.text,
            model=task.model,
            seed=options.seed,
            batch_size=batch_size,
            ranks=ranks,
            states=files.cache_folder("evals"),
            resume=resume,
            note=options.note,
            on_progress=None if on_progress is None or ranks.rank else lambda done: on_progress(done, total),
        )
    if suite == "standard" or not results:
        return results
    pairs = zip(results, task.subjects, strict=True)
    return [_with_full_suite(result, subject, task, options) for result, subject in pairs]


@contextmanager
def together(options: Options) -> Iterator[tuple[Ranks, Options]]:
    """This process's place under torchrun, and its options: a device of its own, and silence but on rank 0."""
    named_dtype(options.dtype)
    check_device(options.device)
    ranks, device = join(options.device, "entries")
    try:
        note = options.note if ranks.rank == 0 else lambda message: None
        yield ranks, dataclasses.replace(options, device=device, note=note)
    finally:
        leave()


def _with_full_suite(result: Result, subject: Subject, task: Task, options: Options) -> Result:
    """`result` with the metrics of docs/suite.md, from the same rows, and the tables behind them."""
    from saezoo.evals.suite import full_suite

    found = full_suite(
        subject.sae,
        task.lm,
        task.rows,
        seed=options.seed,
        on_progress=lambda stage: options.note(f"layer {subject.layer}: {stage}"),
    )
    details = {
        "absorption": [dataclasses.asdict(letter) for letter in found.absorption.letters],
        "probing": [dataclasses.asdict(probed) for probed in found.probing.tasks],
    }
    return dataclasses.replace(result, metrics=result.metrics | found.metrics, details=details)


@dataclass(frozen=True)
class Task:
    """SAEs, the model they read, and rows of text: what every measurement begins with."""

    subjects: list[Subject]
    lm: LanguageModel
    rows: text.Rows
    text: str
    """Name of the source."""
    model: str


def prepare(
    name: str | Path,
    layers: str | int | None,
    *,
    tokens: int | None,
    protocol: Protocol,
    model: str | None,
    layout: str | None,
    options: Options,
) -> Task:
    """Load everything that `evaluate` needs; its arguments."""
    dtype = named_dtype(options.dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    entries = _entries(name, layers, layout, options)
    if entries:
        subjects = [_subject(entry, protocol, layout, options, precise) for entry in entries]
    else:
        sae = load(name, device=options.device, dtype=precise, offline=options.offline)
        subjects = [Subject(sae, str(name), _layer_name(sae.config.hook))]
    lm, model_name = _model_for(str(name), model, options, dtype, subjects[0].sae)
    source = text_source(options, default=text.builtin("heldout"))
    _warn_of_other_text(entries, subjects[0], source, options)
    context = min(subjects[0].sae.config.context_size or 128, lm.n_positions)
    if tokens is not None and tokens < context:
        raise UsageError(f"--tokens {tokens} is less than one row of {context} tokens; give at least {context}")
    most = sys.maxsize if tokens is None else tokens
    rows = text.collect(packed(source, lm, context, protocol), tokens=most, context=context, source=source.name)
    total = len(rows) * context
    if tokens is not None and total < tokens // context * context:
        options.note(f"{source.name} gave {total:,} of the {tokens:,} tokens asked for")
    documents = len(np.unique(rows.documents_RT))
    if documents < FEWEST:
        options.note(f"no intervals: {total:,} tokens of {documents} documents, and they need {FEWEST}; more --tokens")
    return Task(subjects, lm, rows, source.name, model_name)


def _entries(name: str | Path, layers: str | int | None, layout: str | None, options: Options) -> list[Entry]:
    """The registry entries that `name` and `layers` mean; none if `name` is a folder, here or perhaps on the hub."""
    registry = read_registry(options.registry)
    if str(name) in registry.collections:
        return registry.find(str(name), "all" if layers is None else layers)
    if not Path(name).exists() and not hub.is_hub_name(str(name)):
        if Path(name).name != str(name):
            raise UsageError(f"no folder {name}")
        return registry.find(str(name))  # says which collections there are
    if layers not in (None, "all") or layout is not None:
        raise UsageError(f"{name} is a folder with one SAE; leave the layers and the layout out")
    return []


def _subject(entry: Entry, protocol: Protocol, layout: str | None, options: Options, dtype: torch.dtype) -> Subject:
    sae = load_entry(entry, layout=layout, device=options.device, dtype=dtype, offline=options.offline)
    return Subject(sae, entry.collection, entry.name, entry.published if entry.definitions.protocol == protocol else {})


def _warn_of_other_text(entries: list[Entry], subject: Subject, source: TextSource, options: Options) -> None:
    if subject.published and entries[0].dataset_name not in (None, options.dataset):
        options.note(
            f"published values were measured on {entries[0].dataset_name}, these on {source.name};"
            f" --dataset {entries[0].dataset_name} streams it"
        )


def _layer_name(hook: str | None) -> str:
    """`blocks.3.hook_resid_pre` -> 3, `blocks.11.hook_resid_post` -> 11-post: as in the registry."""
    parts = (hook or "?").split(".")
    return parts[1] + ("-post" if parts[-1].endswith("post") else "") if len(parts) > 2 else parts[0]


def _model_for(
    name: str, model: str | None, options: Options, dtype: torch.dtype, sae: SAE
) -> tuple[LanguageModel, str]:
    """The language model that `sae` reads, and its name."""
    registry = read_registry(options.registry)
    if model is not None:
        named = registry.models.get(model)
        folder = fetch_model(named, options) if named else hub.fetch_named_model(model, offline=options.offline)
        return load_language_model(folder, device=options.device, dtype=dtype), model
    known = registry.models.get(sae.config.model_name or "")
    if known is None or sae.config.model_name is None:
        raise UsageError(f"{name} reads `{sae.config.model_name}`, which the registry does not know; give --model")
    return load_language_model(fetch_model(known, options), device=options.device, dtype=dtype), sae.config.model_name


def fetch_model(model: Model, options: Options) -> Path:
    """Folder of a registry model's verified files."""
    return hub.fetch_model(model, offline=options.offline)


def packed(source: TextSource, lm: LanguageModel, context: int, protocol: Protocol) -> Iterator[text.Rows]:
    """Rows of `source` for a protocol, packed as that protocol packs."""
    documents = text.encode(lm.tokenizer, source.documents())
    if protocol == "feb2024":
        return text.pack_feb2024(documents, bos=lm.bos, context=context, rows_per_call=_FEB2024_ROWS)
    return text.pack(documents, bos=lm.bos, context=context)


def text_source(options: Options, *, default: TextSource) -> TextSource:
    """The text that `options` ask for, else `default`. Raises UsageError if they ask for two."""
    if options.text is not None and options.dataset is not None:
        raise UsageError("give --text or --dataset, not both")
    if options.dataset is not None:
        spec = read_registry(options.registry).datasets.get(options.dataset)
        spec = spec or Dataset(options.dataset, None, None, "train", "text", None, ())
        default = TextSource(f"dataset:{options.dataset}", dataset=spec)
    if options.text is None:
        if default.dataset is not None and options.offline:
            raise UsageError(f"{default.name} is streamed from the hub; leave --offline out, or give --text")
        return default
    return text.builtin("heldout") if str(options.text) == "builtin" else text.text_file(Path(options.text))


@dataclass(frozen=True)
class Session:
    """The post's three things, ready to use."""

    model: Any
    """The language model in TransformerLens (HookedTransformer below version 4, TransformerBridge from 4 on)."""
    sae: SAE
    activations: Iterator[Tensor]
    """Shuffled batches [batch_size, D] of what the SAE reads, BOS positions included as in training; endless."""


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
    check_device(options.device)
    sae = load(
        name, layer, device=options.device, dtype=options.dtype, offline=options.offline, registry=options.registry
    )
    dtype = named_dtype(options.dtype)
    lm, _ = _model_for(name, None, options, torch.float32 if dtype in HALF else dtype, sae)
    source = text_source(options, default=text.builtin("heldout"))
    model = hooked_model(lm.hf_model, lm.tokenizer)
    return Session(
        model.to(dtype) if dtype in HALF else model, sae, _batches(lm, sae, source, batch_size, options.seed)
    )


def _batches(lm: LanguageModel, sae: SAE, source: TextSource, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled activations [batch_size, D], epoch after epoch."""
    assert sae.config.hook is not None
    depth, context = depth_of(sae.config.hook, lm.n_layers), sae.config.context_size or 128
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Iterator[text.Rows]:
        while True:
            yield from _in_blocks(packed(source, lm, context, "standard"), _SESSION_ROWS)

    buffer = ActivationBuffer(
        activations(lm, rows(), [depth], centre=sae.config.centre),
        half=max(2, -(-batch_size // (_SESSION_ROWS * context))),
        batch_size=batch_size,
        mode="fixed",
        permute=lambda n: torch.randperm(n, generator=generator).to(lm.device),
    ).fill()
    for x_n1D in buffer:
        if len(x_n1D) == batch_size:
            yield x_n1D[:, 0].to(sae.W_enc.dtype)


def _in_blocks(rows: Iterator[text.Rows], size: int) -> Iterator[text.Rows]:
    block: list[text.Rows] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield text.concatenate(block)
            block = []
    if block:
        yield text.concatenate(block)


def check_device(device: str) -> None:
    """Raise UsageError unless tensors can be made and read on `device`."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"device `{device}` cannot be used here; use cpu, or cuda on a machine with a GPU") from None
