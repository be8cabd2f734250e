"""One pass over a text for every feature of some SAEs: what all commands that look at features begin with."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saezoo import files, workflows
from saezoo.errors import SaezooError, UsageError, shown
from saezoo.evals.summary import versions
from saezoo.features import correlation, directions
from saezoo.features.collect import Collection, collect
from saezoo.features.cooccurrence import Cooccurrence, cooccurrence
from saezoo.features.describe import Text, describe
from saezoo.features.records import About, Feature
from saezoo.features.saedashboard import Material
from saezoo.lm import depth_of
from saezoo.registry import read_registry
from saezoo.workflows import EVAL_TOKENS, Options, Task

OnStage = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""


@dataclass(frozen=True)
class Gathered:
    """The pass over the text, done; features are described when they are asked for."""

    task: Task
    collection: Collection
    text: Text
    abouts: list[About]
    """Of each SAE, but for the metrics."""
    seed: int
    on_stage: OnStage

    def about(self, i: int) -> About:
        """The i-th SAE, and what its dashboards rest on."""
        return dataclasses.replace(self.abouts[i], metrics=self.collection.sums[i].metrics(self.seed))

    def together(self, i: int) -> Cooccurrence:
        """What of the i-th SAE fires together, and what never does."""
        subject = self.task.subjects[i]
        return cooccurrence(
            self.collection.events[i],
            self.collection.scoring.scored_RT.numpy().reshape(-1),
            subject.sae.W_dec,
            on_progress=lambda done, total: self.on_stage(f"co-activation, layer {subject.layer}", done, total),
        )

    def features(self, i: int, together: Cooccurrence | None = None) -> Iterator[Feature]:
        """Those of the i-th SAE that are asked for, in their order."""
        subject, events = self.task.subjects[i], self.collection.events[i]
        chosen = self.abouts[i].features
        logits = directions.logits(subject.sae.W_dec, directions.unembedding(self.task.lm), chosen)
        decoders = {other.layer: other.sae.W_dec for other in self.task.subjects}
        neighbours = directions.neighbours(subject.layer, decoders, chosen, self._near(i))
        for done, (index, firings) in enumerate(events.each(chosen), start=1):
            yield dataclasses.replace(
                describe(index, firings, self.text),
                logits=next(logits),
                neighbours=next(neighbours),
                coactive=() if together is None else together.partners[index],
            )
            self.on_stage(f"features of layer {subject.layer}", done, len(chosen))

    def material(self, i: int) -> Material:
        """What exports of the i-th SAE are made from."""
        sums, lm = self.collection.sums[i], self.task.lm
        parts = (sums.x_sum_ND.sum(0), sums.x2_sum_D, sums.fx_sum_FD)
        return Material(
            about=self.abouts[i],
            events=self.collection.events[i],
            rows=self.task.rows,
            scored_RT=self.collection.scoring.scored_RT.numpy(),
            sums=correlation.Sums(*(part.numpy() for part in parts)),
            W_dec_FD=self.task.subjects[i].sae.W_dec,
            W_U_DV=directions.unembedding(lm),
            tokenizer=lm.tokenizer,
        )

    def _near(self, i: int) -> list[str]:
        """The i-th SAE's layer, and those next to it among those here."""
        subjects = self.task.subjects
        order = sorted(range(len(subjects)), key=lambda j: depth_of(str(subjects[j].sae.config.hook), 1 << 20))
        place = order.index(i)
        return [subjects[j].layer for j in order[max(0, place - 1) : place + 2]]


@contextlib.contextmanager
def gathered(
    name: str | Path,
    layers: str | int | None,
    *,
    tokens: int | None = EVAL_TOKENS,
    features: str | None = None,
    model: str | None = None,
    layout: str | None = None,
    batch_size: int | None = None,
    correlate: bool = False,
    resume: bool = False,
    on_begin: Callable[[list[About]], None] = lambda abouts: None,
    on_stage: OnStage = lambda stage, done, total: None,
    options: Options | None = None,
) -> Iterator[Gathered | None]:
    """The firings of SAEs on a text, kept on disk until the block ends without an error.

    Arguments as for `workflows.evaluate`; `features`: those wanted, `0-99,512`; `correlate` as for `collect`;
    `on_begin` is called before the text is read, with everything but the metrics. Under torchrun the ranks share the
    rows, and rank 0 alone gets the result; the others get None.
    """
    with workflows.together(options or Options()) as (ranks, options):
        task = workflows.prepare(
            name, layers, tokens=tokens, protocol="standard", model=model, layout=layout, options=options
        )
        abouts = [_about(task, i, features, options) for i in range(len(task.subjects))]
        if ranks.rank == 0:
            on_begin(abouts)
        total = task.rows.tokens_RT.size
        collection = collect(
            task.subjects,
            task.lm,
            task.rows,
            files.cache_folder("dashboards"),
            seed=options.seed,
            batch_size=batch_size,
            correlate=correlate,
            ranks=ranks,
            resume=resume,
            note=options.note,
            on_progress=lambda done: None if ranks.rank else on_stage("reading the text", done, total),
        )
        if collection is None:
            yield None
            return
        text = Text.of(collection.scoring)
        # Python's collector would go over the half a million objects of the libraries again and again: a fifth of the
        # time of a site of 24,576 features.
        gc.freeze()
        try:
            yield Gathered(task, collection, text, abouts, options.seed, on_stage)
        except KeyboardInterrupt:
            raise SaezooError("stopped; the text is read, the same command with --resume goes on from there") from None
        finally:
            gc.unfreeze()
        collection.remove()


def _about(task: Task, i: int, features: str | None, options: Options) -> About:
    """Everything but the metrics, which are not known yet."""
    subject, registry = task.subjects[i], read_registry(options.registry)
    config, known = subject.sae.config, subject.collection in registry.collections
    return About(
        collection=subject.collection,
        layer=subject.layer,
        hook=str(config.hook),
        model=task.model,
        d_in=config.d_in,
        d_sae=config.d_sae,
        text=task.text,
        context=task.rows.tokens_RT.shape[1],
        rows=len(task.rows),
        tokens=int((~np.isin(task.rows.tokens_RT, list(task.lm.special_ids))).sum()),
        documents=len(np.unique(task.rows.documents_RT)),
        seed=options.seed,
        features=tuple(feature_numbers(features, config.d_sae) if features else range(config.d_sae)),
        published=subject.published,
        neuronpedia=registry.find(subject.collection, subject.layer)[0].neuronpedia if known else None,
        versions=versions(),
    )


def feature_numbers(text: str, d_sae: int) -> list[int]:
    """`0-99,512` -> the features, ascending. UsageError for anything else, or beyond the last."""
    found: set[int] = set()
    for piece in text.split(","):
        first, dash, last = (part.strip() for part in piece.partition("-"))
        if not (_is_number(first) and (_is_number(last) if dash else True)):
            raise UsageError(f"--features {shown(text)}: `{shown(piece)}` is no number or range; e.g. 0-99,512")
        start, stop = int(first), int(last or first)
        if start > stop:
            raise UsageError(f"--features {shown(piece)} is empty; give the smaller number first")
        if stop >= d_sae:
            raise UsageError(f"no feature {stop}; there are {d_sae:,}, 0 to {d_sae - 1}")
        found.update(range(start, stop + 1))
    return sorted(found)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
