"""`dashboard`, `features`, `cooccur` and `feature`: every feature of some SAEs, as pages and tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saezoo import strict_yaml
from saezoo.errors import UsageError
from saezoo.evals import evaluate
from saezoo.feature_view import Fired
from saezoo.features import table
from saezoo.features.cooccurrence import Cooccurrence
from saezoo.features.describe import token_stats
from saezoo.features.export import BatchFiles, Output, export, place_of
from saezoo.features.neuronpedia import ImportFiles, Release
from saezoo.features.records import About, Feature
from saezoo.features.site import Site, check
from saezoo.features.vocabulary import Vocabulary, vocabulary
from saezoo.gathered import Gathered, OnStage, gathered
from saezoo.lm import LanguageModel, depth_of
from saezoo.sae import SAE

if TYPE_CHECKING:
    import pandas


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
        for _, firings in events.each(range(events.n_features)):
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
