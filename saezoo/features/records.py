"""What a dashboard says about a feature, as records. docs/dashboards.md has the definitions.

Shapes: T positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saezoo.results import Measured


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width between the smallest and the largest value; the last bin has both of its ends."""

    lo: float
    hi: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A firing, and the row of text it is in."""

    row: int
    position: int
    """Of the firing in its row."""
    document: int
    tokens_T: NDArray[np.int64]
    """Ids, special tokens included."""
    values_T: NDArray[np.float32]
    """The feature on each token of the row; 0 where it does not fire, and on special tokens, which do not count."""

    @property
    def value(self) -> float:
        return float(self.values_T[self.position])


@dataclass(frozen=True)
class Quantile:
    """Examples drawn at random from a fifth of the firings."""

    lo: float
    """Smallest activation of these firings."""
    hi: float
    firings: int
    examples: tuple[Example, ...]
    """In the order of their activation, largest first."""


class TokenStat(NamedTuple):
    """How a feature fires on one kind of token."""

    token: int
    mean: float
    """Activation over all occurrences of the token in the text, with 0 where the feature does not fire."""
    share: float
    """Of the feature's summed activation."""
    fires: int
    occurrences: int


class Weighted(NamedTuple):
    """A token, and what one unit of the feature adds to its logit."""

    token: int
    logit: float


@dataclass(frozen=True)
class Logits:
    """What the feature's decoder direction adds to the logits, the final layer norm taken as linear."""

    promoted: tuple[Weighted, ...]
    """Largest first."""
    suppressed: tuple[Weighted, ...]
    """Smallest first."""
    histogram: Histogram
    std: float
    skew: float | None
    kurtosis: float | None
    """Excess: 0 for a normal distribution. None, like `skew`, if all logits are equal."""


class Neighbour(NamedTuple):
    """A feature whose decoder direction is near."""

    layer: str
    feature: int
    cosine: float


class Coactive(NamedTuple):
    """A feature of the same SAE that fires on the same tokens."""

    feature: int
    both: int
    """Tokens on which both fire."""
    jaccard: float
    """`both` / tokens on which either fires."""
    pmi: float
    """log2 of `both` against what independence would give."""


@dataclass(frozen=True)
class Feature:
    """Everything that a page shows of one feature. For a feature that never fired (`fires` 0) what needs firings is
    None or empty."""

    index: int
    fires: int
    density: float
    """`fires` / scored tokens."""
    mean: float | None
    """Activation over the tokens on which it fires."""
    max: float | None
    histogram: Histogram | None
    """Of the activations above 0: 50 bins."""
    top: tuple[Example, ...] = ()
    """The rows with the largest activations, each with its largest firing."""
    quantiles: tuple[Quantile, ...] = ()
    """Five, the one with the largest activations first; fewer if it fired fewer than five times."""
    tokens_by_mean: tuple[TokenStat, ...] = ()
    """Among tokens that occur often enough for a mean."""
    tokens_by_share: tuple[TokenStat, ...] = ()
    logits: Logits | None = None
    """None if its decoder direction is 0."""
    neighbours: tuple[Neighbour, ...] = ()
    """The nearest in each layer of the site that is its own or next to it, nearest first within a layer."""
    coactive: tuple[Coactive, ...] = ()
    divergence: Measured = Measured(None)
    """How far the tokens of the top examples differ from those of the middle three quantiles: 0 the same, 1 none in
    common."""


@dataclass(frozen=True)
class About:
    """One SAE, and what its dashboards rest on."""

    collection: str
    layer: str
    hook: str
    model: str
    d_in: int
    d_sae: int
    text: str
    context: int
    rows: int
    tokens: int
    """Scored ones."""
    documents: int
    seed: int
    features: tuple[int, ...]
    """Those that have a page, in their order."""
    metrics: dict[str, Measured] = field(default_factory=dict)
    """Measured on these tokens; names as in docs/metrics.md."""
    published: dict[str, float | None] = field(default_factory=dict)
    neuronpedia: str | None = None
    """`gpt2-small/8-res-jb`: where the same features have pages; None: nowhere known."""
    versions: dict[str, str] = field(default_factory=dict)
