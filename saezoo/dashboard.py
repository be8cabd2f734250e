"""`dashboard`, `features`, `cooccur` and `feature`: every feature of some SAEs, from one pass over a text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saezoo import files, strict_yaml, workflows
from saezoo.errors import UsageError, shown
from saezoo.evals import evaluate
from saezoo.evals.summary import versions
from saezoo.feature_view import Fired
from saezoo.features import correlation, directions, table
from saezoo.features.collect import Collection, collect
from saezoo.features.cooccurrence import Cooccurrence, cooccurrence
from saezoo.features.describe import Text, token_stats
from saezoo.features.export import BatchFiles, Output, export, place_of
from saezoo.features.neuronpedia import ImportFiles, Release
from saezoo.features.parallel import describe_all
from saezoo.features.records import About, Feature
from saezoo.features.saedashboard import Material
from saezoo.features.site import Site, check
from saezoo.features.vocabulary import Vocabulary, vocabulary
from saezoo.lm import LanguageModel, depth_of
from saezoo.registry import read_registry
from saezoo.sae import SAE
from saezoo.workflows import EVAL_TOKENS, Options, Task

if TYPE_CHECKING:
    import pandas

OnStage = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""


@dataclass(frozen=True)
class Gathered:
    """The pass over the text, done; features are described when they are asked for."""

    task: Task
    collection: Collection
    text: Text
    chosen: tuple[int, ...]
    """The features that are asked for, ascending."""
    seed: int
    neuronpedia: tuple[str | None, ...]
    """Of each SAE: where Neuronpedia has the same features."""
    workers: int
    """Processes that describe features."""
    on_stage: OnStage

    def about(self, i: int) -> About:
        """The i-th SAE, and what its dashboards rest on."""
        subject, scoring = self.task.subjects[i], self.collection.scoring
        config = subject.sae.config
        return About(
            collection=subject.collection,
            layer=subject.layer,
            hook=str(config.hook),
            model=self.task.model,
            d_in=config.d_in,
            d_sae=config.d_sae,
            text=self.task.text,
            context=scoring.context,
            rows=len(scoring.tokens_RT),
            tokens=self.text.scored,
            documents=len(torch.unique(scoring.document_RT)),
            seed=self.seed,
            features=self.chosen or tuple(range(config.d_sae)),
            metrics=self.collection.sums[i].metrics(self.seed),
            published=subject.published,
            neuronpedia=self.neuronpedia[i],
            versions=versions(),
        )

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
        chosen = self.about(i).features
        logits = directions.logits(subject.sae.W_dec, directions.unembedding(self.task.lm), chosen)
        decoders = {other.layer: other.sae.W_dec for other in self.task.subjects}
        neighbours = directions.neighbours(subject.layer, decoders, chosen, self._near(i))
        described = describe_all(events, self.text, chosen, self.workers)
        for done, feature in enumerate(described, start=1):
            yield dataclasses.replace(
                feature,
                logits=next(logits),
                neighbours=next(neighbours),
                coactive=() if together is None else together.partners[feature.index],
            )
            self.on_stage(f"features of layer {subject.layer}", done, len(chosen))

    def material(self, i: int) -> Material:
        """What exports of the i-th SAE are made from."""
        sums, lm = self.collection.sums[i], self.task.lm
        parts = (sums.x_sum_ND.sum(0), sums.x2_sum_D, sums.fx_sum_FD)
        return Material(
            about=self.about(i),
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
    workers: int = 1,
    on_stage: OnStage = lambda stage, done, total: None,
    options: Options | None = None,
) -> Iterator[Gathered | None]:
    """The firings of SAEs on a text, kept on disk until the block ends without an error.

    Arguments as for `workflows.evaluate`; `features`: those wanted, `0-99,512`; `correlate` as for `collect`, `workers`
    as for `describe_all`. Under torchrun the ranks share the rows, and rank 0 alone gets the result; the others get
    None.
    """
    with workflows.together(options or Options()) as (ranks, options):
        task = workflows.prepare(
            name, layers, tokens=tokens, protocol="standard", model=model, layout=layout, options=options
        )
        chosen = tuple(feature_numbers(features, min(s.sae.config.d_sae for s in task.subjects))) if features else ()
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
        pages = tuple(_neuronpedia(subject.collection, subject.layer, options) for subject in task.subjects)
        yield Gathered(task, collection, Text.of(collection.scoring), chosen, options.seed, pages, workers, on_stage)
        collection.remove()


def _neuronpedia(collection: str, layer: str, options: Options) -> str | None:
    registry = read_registry(options.registry)
    return registry.find(collection, layer)[0].neuronpedia if collection in registry.collections else None


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


@dataclass(frozen=True)
class Exports:
    """What other systems read, besides the site."""

    batches: Path | None = None
    """Folder for SAEDashboard's `batch-N.json`, in a folder for each SAE."""
    neuronpedia: Path | None = None
    """Folder for the files that Neuronpedia imports."""
    release: Path | None = None
    """YAML file of a `neuronpedia.Release`: whose they are."""

    def outputs(self, about: About) -> list[Output]:
        """Those of one SAE. Refuses what cannot be written."""
        found: list[Output] = []
        if self.batches is not None:
            found.append(BatchFiles(self.batches / about.layer, about, place_of(about)))
        if self.neuronpedia is not None:
            if self.release is None:
                raise UsageError("--neuronpedia needs --release FILE, which says whose it is (docs/exports.md)")
            release = strict_yaml.read(self.release, Release)
            found.append(ImportFiles(self.neuronpedia, about, place_of(about), release))
        return found


def dashboard(
    name: str | Path,
    layers: str | int | None = "all",
    *,
    out: Path,
    exports: Exports | None = None,
    with_evaluation: bool = False,
    batch_size: int | None = None,
    on_stage: OnStage = lambda stage, done, total: None,
    **settings: Any,
) -> list[About]:
    """Write dashboards of SAEs as a static site.

    Args:
        out: folder of the site: new, empty, or a site, which is replaced.
        exports: what other systems read.
        with_evaluation: run the standard evaluation on the same rows too; its metrics go on the overview.
        on_stage: called with (what is being done, how much is done, how much there is).
        settings: as for `gathered`.

    Returns what each SAE's dashboards rest on; under torchrun on rank 0 alone.
    Raises SaezooError of some kind for everything a user can get wrong.
    """
    exports = exports or Exports()
    check(out)
    correlate = exports.batches is not None or exports.neuronpedia is not None
    with gathered(name, layers, correlate=correlate, batch_size=batch_size, on_stage=on_stage, **settings) as found:
        if found is None:
            return []
        abouts = [found.about(i) for i in range(len(found.task.subjects))]
        outputs = [exports.outputs(about) for about in abouts]
        if with_evaluation:
            abouts = _evaluated(abouts, found, batch_size)
        tokens, special = vocabulary(found.task.lm.tokenizer, found.task.lm.vocab)
        site = Site(out, abouts, vocabulary=tokens, special=special)
        for i, about in enumerate(abouts):
            together = found.together(i)
            groups = {name: [group.features for group in getattr(together, name)] for name in ("clusters", "exclusive")}
            site.write(about, found.features(i, together), **groups)
            if outputs[i]:
                export(found.material(i), outputs[i], functools.partial(_stage, on_stage, about))
        site.finish()
    return abouts


def _stage(on_stage: OnStage, about: About, done: int) -> None:
    on_stage(f"features of layer {about.layer} exported", done, len(about.features))


def _evaluated(abouts: list[About], found: Gathered, batch_size: int | None) -> list[About]:
    """`abouts` with the metrics of the standard evaluation."""
    task, total = found.task, found.task.rows.tokens_RT.size
    results = evaluate(
        task.subjects,
        task.lm,
        task.rows,
        text=task.text,
        model=task.model,
        seed=found.seed,
        batch_size=batch_size,
        on_progress=lambda done: found.on_stage("evaluation", done, total),
    )
    return [dataclasses.replace(a, metrics=r.metrics) for a, r in zip(abouts, results, strict=True)]


def feature_table(
    name: str | Path,
    layers: str | int | None = "all",
    *,
    on_stage: OnStage = lambda stage, done, total: None,
    **settings: Any,
) -> pandas.DataFrame | None:
    """One row for each feature of each SAE; columns in docs/features-csv.md. `settings`: as for `gathered`."""
    import pandas as pd

    with gathered(name, layers, on_stage=on_stage, **settings) as found:
        if found is None:
            return None
        tokens = vocabulary(found.task.lm.tokenizer, found.task.lm.vocab).tokens
        frames = []
        for i in range(len(found.task.subjects)):
            features = found.features(i, found.together(i))
            text_of = functools.partial(_text_of, tokens)
            frames.append(table.to_frame(features, found.about(i), text_of))
        return pd.concat(frames, ignore_index=True)


def _text_of(tokens: Sequence[bytes], token: int) -> str:
    return tokens[token].decode(errors="backslashreplace")


@dataclass(frozen=True)
class Together:
    """What of one SAE fires together."""

    found: Cooccurrence
    tops: tuple[str, ...]
    """Of each feature, the token with the largest share of its activation; empty if it never fired."""


def cooccur(
    name: str | Path,
    layer: str | int | None,
    *,
    on_stage: OnStage = lambda stage, done, total: None,
    **settings: Any,
) -> Together | None:
    """What of one SAE fires together, and what never does. `settings`: as for `gathered`."""
    with gathered(name, layer, on_stage=on_stage, **settings) as found:
        if found is None:
            return None
        _only_one(name, found)
        tokens, events = vocabulary(found.task.lm.tokenizer, found.task.lm.vocab).tokens, found.collection.events[0]
        tops = []
        for start, stop in events.blocks(range(events.n_features)):
            for firings in events.block(start, stop):
                stats = token_stats(firings, found.text)[1] if len(firings.token_N) else ()
                tops.append(_text_of(tokens, stats[0].token) if stats else "")
        return Together(found.together(0), tuple(tops))


def _only_one(name: str | Path, found: Gathered) -> None:
    if len(found.task.subjects) > 1:
        raise UsageError(f"{name} has {len(found.task.subjects)} SAEs; say which layer")


@dataclass(frozen=True)
class Shown:
    """One feature, and what fires on a sentence."""

    feature: Feature
    about: About
    vocabulary: Vocabulary
    fired: list[Fired] | None
    """For each token of the sentence; None without one."""


def feature(
    name: str | Path,
    layer: str | int | None,
    index: int,
    *,
    sentence: str | None = None,
    **settings: Any,
) -> Shown:
    """One feature on a text, and on a sentence. `settings`: as for `gathered`."""
    with gathered(name, layer, features=str(index), **settings) as found:
        if found is None:
            raise UsageError("`saezoo feature` is for one process; leave torchrun out")
        subject, lm = found.task.subjects[0], found.task.lm
        _only_one(name, found)
        fired = None if sentence is None else fires_on(sentence, subject.sae, lm, index)
        (described,) = found.features(0, found.together(0))
        return Shown(described, found.about(0), vocabulary(lm.tokenizer, lm.vocab), fired)


STRONGEST = 5
"""Features shown for each token of a sentence."""


def fires_on(sentence: str, sae: SAE, lm: LanguageModel, index: int) -> list[Fired]:
    """For each token of the sentence: the feature's activation, and the strongest features. The row begins with BOS if
    the SAE's rows do; BOS itself is left out."""
    ids = lm.tokenizer(sentence, add_special_tokens=False)["input_ids"]
    if not sentence.strip() or not ids:
        raise UsageError("--text is empty; give a sentence")
    start = [lm.bos] if sae.config.prepend_bos else []
    if len(start) + len(ids) > lm.n_positions:
        raise UsageError(f"--text has {len(ids):,} tokens; the model reads at most {lm.n_positions - len(start):,}")
    depth = depth_of(str(sae.config.hook), lm.n_layers)
    tokens_1T = torch.tensor([start + ids], device=lm.device)
    f_TF = sae.encode(lm.residuals(tokens_1T, [depth])[depth][0, len(start) :])
    top = f_TF.topk(min(STRONGEST, f_TF.shape[1]), dim=1)
    fired = []
    for token, f_F, features, values in zip(ids, f_TF, top.indices.tolist(), top.values.tolist(), strict=True):
        strongest = tuple(pair for pair in zip(features, values, strict=True) if pair[1] > 0)
        fired.append(Fired(token, float(f_F[index]), strongest))
    return fired
