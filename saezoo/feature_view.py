"""One feature in the terminal, and what fires on a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from saezoo.features.records import About, Example, Feature, Histogram, TokenStat, Weighted
from saezoo.results import Measured

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from saezoo.features.cooccurrence import Cooccurrence
    from saezoo.features.vocabulary import Vocabulary

_BEFORE, _AFTER = 12, 8  # tokens around a firing
_TOP, _DRAWN = 5, 2  # contexts of the top, and of each quantile
_PAIRS, _GROUPS = 15, 10  # rows of the tables of what fires together
_BARS = " ▁▂▃▄▅▆▇█"
_PALE, _DEEP = (255, 243, 224), (255, 152, 0)  # black on either has a contrast above 9


class Fired(NamedTuple):
    """What fires on one token of a sentence."""

    token: int
    value: float
    """Of the feature that was asked for."""
    strongest: tuple[tuple[int, float], ...]
    """Features and their activations, largest first."""


def spelled(token: bytes) -> str:
    """A token for a terminal: what does not print is named, half a character by its bytes."""
    try:
        letters = token.decode()
    except UnicodeDecodeError:
        return "⟨" + token.hex(" ") + "⟩"
    named = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(named.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in letters)


def feature_view(feature: Feature, about: About, vocabulary: Vocabulary) -> list[RenderableType]:
    """Everything that a page of the site has of one feature, shorter."""
    from rich.table import Table

    facts = Table(title=f"{about.collection} {about.layer} · feature {feature.index}", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for label, words in _facts(feature, about, vocabulary):
        facts.add_row(label, words)
    if feature.fires == 0:
        return [facts]
    contexts = Table(show_header=False, box=None, padding=(0, 1, 0, 0), expand=False)
    contexts.add_column(justify="right", no_wrap=True, min_width=6)
    contexts.add_column(no_wrap=True, overflow="ellipsis")
    contexts.add_row("", f"top {min(_TOP, len(feature.top))} of {len(feature.top)} contexts")
    for example in feature.top[:_TOP]:
        contexts.add_row(f"{example.value:.3g}", context(example, feature.max or 1.0, vocabulary))
    for quantile in feature.quantiles:
        contexts.add_row("", f"{quantile.lo:.3g} to {quantile.hi:.3g}: drawn from {quantile.firings:,} firings")
        for example in quantile.examples[:_DRAWN]:
            contexts.add_row(f"{example.value:.3g}", context(example, feature.max or 1.0, vocabulary))
    return [facts, contexts]


def _facts(feature: Feature, about: About, vocabulary: Vocabulary) -> list[tuple[str, str | Text]]:
    rests = f"{about.tokens:,} tokens of {about.text}, {about.documents:,} documents"
    facts: list[tuple[str, str | Text]] = [("measured on", rests)]
    if feature.fires == 0:
        most = 1 - 0.05 ** (1 / about.tokens)
        facts.append(("dead", f"did not fire on these tokens: density below {most:.2g} with 95 % confidence"))
    else:
        facts.append(("density", f"{feature.density:.2e}: 1 in {1 / feature.density:,.0f} tokens"))
        facts.append(("activation", f"mean {feature.mean:.3g}, largest {feature.max:.3g}"))
        facts.append(("", sparkline(feature.histogram)))
        facts.append(("tokens, by mean", _token_stats(feature.tokens_by_mean, vocabulary)))
        facts.append(("tokens, by share", _token_stats(feature.tokens_by_share, vocabulary, share=True)))
        facts.append(("top against middle", _divergence(feature.divergence)))
    if feature.logits is not None:
        facts.append(("promotes", _weighted(feature.logits.promoted, vocabulary)))
        facts.append(("suppresses", _weighted(feature.logits.suppressed, vocabulary)))
        facts.append(("logits", f"std {feature.logits.std:.3g}, excess kurtosis {_known(feature.logits.kurtosis)}"))
    near = ", ".join(f"{n.layer}/{n.feature} ({n.cosine:.2f})" for n in feature.neighbours)
    together = ", ".join(f"{c.feature} (Jaccard {c.jaccard:.2f})" for c in feature.coactive[:5])
    facts += [(label, words) for label, words in (("decoder near", near), ("fires with", together)) if words]
    if about.neuronpedia:
        facts.append(("neuronpedia", f"https://www.neuronpedia.org/{about.neuronpedia}/{feature.index}"))
    return facts


def sparkline(histogram: Histogram | None) -> str:
    """Bars of the counts' logarithms, and the ends."""
    import math

    if histogram is None:
        return ""
    most = math.log1p(max(histogram.counts))
    bars = "".join(_BARS[math.ceil(math.log1p(n) / most * (len(_BARS) - 1))] for n in histogram.counts)
    return f"{histogram.lo:.2g} {bars} {histogram.hi:.2g}  (log counts)"


def context(example: Example, largest: float, vocabulary: Vocabulary) -> Text:
    """A window around the firing, tokens coloured by activation, the firing itself in «»."""
    from rich.text import Text

    first = max(0, example.position - _BEFORE)
    last = min(len(example.tokens_T), example.position + _AFTER + 1)
    line = Text("…" if first else "")
    for place in range(first, last):
        piece = spelled(vocabulary.tokens[int(example.tokens_T[place])])
        value = float(example.values_T[place])
        line.append(f"«{piece}»" if place == example.position else piece, style=_shade(value / largest))
    return line.append("…" if last < len(example.tokens_T) else "")


def _shade(part: float) -> str:
    """A rich style for an activation that is this part of the largest."""
    if part <= 0:
        return ""
    mixed = (round(pale + (deep - pale) * min(part, 1.0)) for pale, deep in zip(_PALE, _DEEP, strict=True))
    return "black on rgb({},{},{})".format(*mixed)


def sentence_view(fired: Sequence[Fired], index: int, vocabulary: Vocabulary) -> list[RenderableType]:
    """The sentence, coloured by the feature, and what fires on each of its tokens."""
    from rich.table import Table
    from rich.text import Text

    largest = max((each.value for each in fired), default=0.0) or 1.0
    line = Text("")
    table = Table(title=f"feature {index} on the sentence, and the strongest features of each token")
    table.add_column("token")
    table.add_column(str(index), justify="right")
    table.add_column("strongest features (activation)", overflow="fold")
    for each in fired:
        piece = spelled(vocabulary.tokens[each.token])
        style = _shade(each.value / largest)
        line.append(piece, style=style)
        strongest = ", ".join(f"{feature} ({value:.3g})" for feature, value in each.strongest)
        table.add_row(Text(piece, style=style), f"{each.value:.3g}" if each.value else "", strongest)
    return [line, table]


def groups_view(found: Cooccurrence, tops: Sequence[str]) -> list[RenderableType]:
    """The strongest pairs, the clusters and the exclusive groups of an SAE; `tops`: a token for each feature."""
    from rich.table import Table

    names = [f"{i} {spelled(top.encode())!r}" if top else str(i) for i, top in enumerate(tops)]

    pairs = Table(title=f"features that fire together, on {found.tokens:,} tokens")
    for label in ("feature", "with", "fires", "fires", "both", "Jaccard", "PMI"):
        pairs.add_column(label, justify="left" if label in ("feature", "with") else "right")
    strongest = sorted(
        ((a, partner) for a, partners in enumerate(found.partners) for partner in partners if a < partner.feature),
        key=lambda pair: (-pair[1].jaccard, pair[0]),
    )
    for a, (b, both, jaccard, pmi) in strongest[:_PAIRS]:
        pairs.add_row(
            names[a],
            names[b],
            f"{found.fires[a]:,}",
            f"{found.fires[b]:,}",
            f"{both:,}",
            f"{jaccard:.2f}",
            f"{pmi:.1f}",
        )
    groups = Table(title=f"{len(found.clusters):,} clusters, {len(found.exclusive):,} exclusive groups")
    for label in ("kind", "features", "mean", "tokens", "two at once", "expected"):
        groups.add_column(label, justify="left" if label in ("kind", "features") else "right", overflow="fold")
    for kind, of_kind in (("cluster", found.clusters), ("exclusive", found.exclusive)):
        for group in of_kind[:_GROUPS]:
            numbers = f"{group.mean:.2f}", f"{group.tokens:,}", f"{group.both:,}", f"{group.expected:,.0f}"
            groups.add_row(kind, ", ".join(names[i] for i in group.features), *numbers)
    return [pairs, groups]


def _token_stats(stats: Sequence[TokenStat], vocabulary: Vocabulary, *, share: bool = False) -> str:
    return ", ".join(
        f"{spelled(vocabulary.tokens[stat.token])!r} " + (f"{stat.share:.0%}" if share else f"{stat.mean:.3g}")
        for stat in stats[:8]
    )


def _weighted(tokens: Sequence[Weighted], vocabulary: Vocabulary) -> str:
    return ", ".join(f"{spelled(vocabulary.tokens[each.token])!r} {each.logit:+.2g}" for each in tokens[:8])


def _divergence(value: Measured) -> str:
    if value.value is None:
        return "unknown: too few firings, or no token twice"
    ends = "" if value.lo is None or value.hi is None else f", 95 % interval {value.lo:.2f} to {value.hi:.2f}"
    return f"divergence {value.value:.2f}{ends} (0: the same tokens, 1: none in common)"


def _known(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
