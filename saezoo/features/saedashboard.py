"""Features as SAEDashboard describes them. docs/exports.md defines every field.

Written from the definitions of SAEDashboard 0.8.0 (sae_vis_runner.py, sequence_data_generator.py, utils_fns.py,
neuronpedia/neuronpedia_converter.py); `benchmarks/dashboard.py --agree` compares the two field by field.

Shapes: F features of the SAE, b those of a batch, D d_in, V vocabulary, R rows, T positions of a row, S scored tokens,
N firings of a feature, K activations shown of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saezoo.features.correlation import Correlates, Sums, moments, read, with_features, with_neurons
from saezoo.features.events import Events, Firings
from saezoo.features.records import About
from saezoo.features.sampling import draw, others
from saezoo.tokens import Rows

TOP, INTERVALS, OF_INTERVAL = 20, 5, 5
BINS, LOGITS, NEURONS = 50, 10, 3
_SMALLEST_NORM = 1e-8  # of a decoder row; SAELens clamps there when it folds
_OUT_OF_RANGE = "<|outofrange|>"
_ANOMALIES = {
    "âĢĶ": "—",
    "âĢĵ": "–",
    "âĢľ": "“",
    "âĢĿ": "”",
    "âĢĺ": "‘",
    "âĢĻ": "’",
    "âĢĭ": " ",
    "Ġ": " ",
    "Ċ": "\n",
    "ĉ": "\t",
}
"""Byte-level spellings that SAEDashboard replaces, in this order (neuronpedia_runner.py); all others stay."""


@dataclass(frozen=True)
class Material:
    """What the export of one SAE is made from."""

    about: About
    events: Events
    rows: Rows
    scored_RT: NDArray[np.bool_]
    sums: Sums
    W_dec_FD: Tensor
    W_U_DV: Tensor
    """The unembedding, the final layer norm's gain folded in, centred over D and over V."""
    tokenizer: Any


class Activation(NamedTuple):
    """A row of text that is shown, without its first position."""

    bin_min: float
    """-1 for the largest activations."""
    bin_max: float
    bin_contains: float
    row: int
    token_index: int
    """Of the token that the row is shown for; -1 would be the first position."""
    values: str
    """As a JSON array, rounded."""
    max: float
    max_index: int
    min: float


class Described(NamedTuple):
    """A feature: the fields of SAEDashboard but `activations`, and those."""

    fields: dict[str, Any]
    activations: list[Activation]


class Describer:
    """Features of one SAE, from all of their firings."""

    def __init__(self, material: Material) -> None:
        self._m = material
        about = material.about
        self._scored_S = np.flatnonzero(material.scored_RT)
        self._context = material.rows.tokens_RT.shape[1]
        self._all_tokens = material.rows.tokens_RT.size
        norm_F = material.W_dec_FD.float().norm(dim=-1).clamp(min=_SMALLEST_NORM)
        self._norm_F = norm_F.cpu()
        self._strings = _token_strings(material.tokenizer, material.W_U_DV.shape[1])
        self._moments = moments(material.events)
        scored = len(self._scored_S)
        correlated = with_features(material.events, self._moments, sorted(about.features), scored)
        place = np.searchsorted(np.sort(about.features), about.features)
        self._features = dict(zip(about.features, _rows(correlated, place), strict=True))

    def describe(self, features: Sequence[int]) -> Iterator[Described]:
        """Those of a batch; what all need is computed at once."""
        m, norm_b = self._m, self._norm_F[list(features)]
        direction_bD = m.W_dec_FD[list(features)].float().cpu() / norm_b[:, None]
        logits_bV = direction_bD @ m.W_U_DV.float().cpu()
        neurons = _rows(with_neurons(m.sums, self._moments, features, len(self._scored_S)), np.arange(len(features)))
        ascending = sorted(features)
        firings = dict(zip(ascending, read(m.events, ascending), strict=True))
        for i, feature in enumerate(features):
            value_N = firings[feature].value_N * norm_b[i].numpy()
            folded = Firings(firings[feature].token_N, value_N)
            tables = _alignment(direction_bD[i]) | _correlated("neurons", neurons[i])
            tables |= _correlated("features", self._features[feature])
            fields = {"feature_index": feature, **tables, **self._logits(logits_bV[i]), **self._histogram(folded)}
            about = m.about
            fields |= {"n_prompts_total": about.rows, "n_tokens_in_prompt": about.context, "dataset": about.text}
            yield Described(fields | {"decoder_weights_dist": [], "vector": []}, self._activations(feature, folded))

    def tokens_json(self, row: int) -> str:
        """The token strings of a row but its first, as a JSON array."""
        return to_json([self._strings[token] for token in self._m.rows.tokens_RT[row, 1:].tolist()])

    def _logits(self, logits_V: Tensor) -> dict[str, Any]:
        heights, values = _bars(logits_V.numpy())
        found: dict[str, Any] = {"logits_hist_data_bar_heights": heights, "logits_hist_data_bar_values": values}
        for name, largest in (("pos", True), ("neg", False)):
            top = logits_V.topk(min(LOGITS, len(logits_V)), largest=largest)
            found[f"{name}_str"] = [self._strings[token] for token in top.indices.tolist()]
            found[f"{name}_values"] = _rounded(top.values.numpy())
        return found

    def _histogram(self, firings: Firings) -> dict[str, Any]:
        fires = len(firings.value_N)
        heights, values = _bars(firings.value_N) if fires else ([], [])
        frac_nonzero = _percent(fires / self._all_tokens)
        return {
            "frac_nonzero": frac_nonzero,
            "freq_hist_data_bar_values": values,
            "freq_hist_data_bar_heights": heights,
        }

    def _activations(self, feature: int, firings: Firings) -> list[Activation]:
        largest = firings.value_N.max(initial=0.0)
        groups = [((-1.0, _shown(largest), -1.0), self._top(firings))]
        # torch's linspace, since a firing on a bound is in the interval on either side of it.
        bounds = torch.linspace(0, float(largest), INTERVALS + 1).numpy()
        for interval in reversed(range(INTERVALS if largest > 0 else 1)):
            lo, hi = bounds[interval], bounds[interval + 1]
            inside_N = (firings.value_N >= lo) & (firings.value_N <= hi)
            silent = self._all_tokens - len(inside_N) if interval == 0 else 0
            contains = _percent(float(np.float32((inside_N.sum() + silent) / self._all_tokens)))
            chosen = self._drawn(feature, interval, firings, inside_N)
            groups.append(((_shown(lo), _shown(hi), contains), chosen))
        label = [group for group, tokens in groups for _ in tokens]
        return self._shown_rows(label, np.concatenate([tokens for _, tokens in groups]), firings)

    def _top(self, firings: Firings) -> NDArray[np.int64]:
        """The tokens with the largest activations; of those without any, the earliest."""
        token_N, value_N = firings
        if len(value_N) > TOP:
            high_N = value_N >= np.partition(value_N, -TOP)[-TOP]
            token_N, value_N = token_N[high_N], value_N[high_N]
        top = token_N[np.lexsort((token_N, -value_N))[:TOP]]
        silent = len(self._scored_S) - len(value_N)
        fill = np.arange(max(0, min(TOP - len(top), silent)))
        return np.concatenate([top, self._scored_S[others(self._ordinals(token_N), fill)]])

    def _drawn(self, feature: int, interval: int, firings: Firings, inside_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Tokens of an interval at random; the lowest has those on which the feature does not fire."""
        key = (self._m.about.seed, feature, interval)
        if interval:
            token_N, value_N = firings.token_N[inside_N], firings.value_N[inside_N]
            chosen = draw(len(token_N), OF_INTERVAL, *key)
            token_N, value_N = token_N[chosen], value_N[chosen]
            return token_N[np.lexsort((token_N, -value_N))]
        above_N = self._ordinals(firings.token_N[~inside_N])
        ranks = draw(len(self._scored_S) - len(above_N), OF_INTERVAL, *key)
        return self._scored_S[others(above_N, ranks)]

    def _ordinals(self, token_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of tokens among the scored ones; sorted."""
        return np.searchsorted(self._scored_S, np.sort(token_N))

    def _shown_rows(
        self, labels: list[tuple[float, float, float]], token_K: NDArray[np.int64], firings: Firings
    ) -> list[Activation]:
        inside_N = firings.token_N % self._context > 0  # the first position is not shown
        token_N = firings.token_N[inside_N]
        # Twice, as SAEDashboard: to 4 digits when it collects, to 3 when it converts.
        value_N = np.round(np.round(firings.value_N[inside_N].astype(np.float64), 4), 3)
        row_K, position_K = np.divmod(token_K, self._context)
        first_K, last_K = (np.searchsorted(token_N, (row_K + after) * self._context).tolist() for after in (0, 1))
        place_N, number_N = (token_N % self._context - 1).tolist(), value_N.tolist()
        found = []
        for i, (row, position) in enumerate(zip(row_K.tolist(), position_K.tolist(), strict=True)):
            places, numbers = (part[first_K[i] : last_K[i]] for part in (place_N, number_N))
            texts = ["0.0"] * (self._context - 1)
            for place, number in zip(places, numbers, strict=True):
                texts[place] = repr(number)
            largest = max(numbers, default=0.0)
            where = places[numbers.index(largest)] if largest else 0
            least = min(numbers) if len(numbers) == len(texts) else 0.0
            values = "[" + ", ".join(texts) + "]"
            found.append(Activation(*labels[i], row, position - 1, values, largest, where, least))
        return found


def to_json(value: Any) -> str:
    r"""JSON in ASCII. A backslash is spelt as its number: Neuronpedia's importer replaces the text \u0000, and must not
    find it where a token is a backslash and the word u0000."""
    return json.dumps(value, allow_nan=False).replace("\\\\", "\\u005c")


def _token_strings(tokenizer: Any, vocab: int) -> list[str]:
    """Of every id, as SAEDashboard spells them: the vocabulary's own spelling with `_ANOMALIES` replaced."""
    strings = [_OUT_OF_RANGE] * vocab
    for string, token in tokenizer.get_vocab().items():
        if token < vocab:
            for old, new in _ANOMALIES.items():
                string = string.replace(old, new)
            strings[token] = string
    return strings


def _alignment(direction_D: Tensor) -> dict[str, Any]:
    """The largest entries of a feature's decoder direction, and each one's share of the sum of all sizes."""
    top = direction_D.topk(NEURONS)
    share = top.values.abs() / direction_D.abs().sum().clamp(min=_SMALLEST_NORM)
    return {
        "neuron_alignment_indices": top.indices.tolist(),
        "neuron_alignment_values": _rounded(top.values.numpy()),
        "neuron_alignment_l1": _rounded(share.numpy()),
    }


def _correlated(what: str, found: Correlates) -> dict[str, Any]:
    return {
        f"correlated_{what}_indices": found.index_nK.tolist(),
        f"correlated_{what}_l1": _rounded(found.cosine_nK),
        f"correlated_{what}_pearson": _rounded(found.pearson_nK),
    }


def _rows(found: Correlates, place: NDArray[np.int64]) -> list[Correlates]:
    return [Correlates(*(part[i] for part in found)) for i in place]


def _bars(data_N: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Heights and centres of `BINS` bins between the extremes; equal values are all in the middle one.

    The bins of torch.histc, in its arithmetic; on a busy machine its threads take a hundred times as long."""
    lo, hi = data_N.min(), data_N.max()
    first, width = (lo, hi - lo) if lo < hi else (lo - np.float32(1), np.float32(2))
    bin_N = np.minimum(((data_N - first) * np.float32(BINS) / width).astype(np.int64), BINS - 1)
    centres = torch.linspace(float(lo), float(hi), BINS + 1)[:-1] + (float(hi) - float(lo)) / BINS / 2
    heights: list[int] = np.bincount(bin_N, minlength=BINS).tolist()
    return heights, _rounded(np.round(centres.numpy().astype(np.float64), 5))


def _rounded(values: NDArray[Any]) -> list[float]:
    found: list[float] = np.round(values.astype(np.float64), 3).tolist()
    return found


def _shown(value: float) -> float:
    return float(f"{value:.3f}")


def _percent(share: float) -> float:
    """As it survives SAEDashboard's titles: 5 digits after the point."""
    return float(f"{share:.3%}"[:-1]) / 100
