"""Features that no SAE has, for tests of the site: every field filled, from a seed; and sites made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saezoo.features.records import (
    About,
    Coactive,
    Example,
    Feature,
    Histogram,
    Logits,
    Neighbour,
    Quantile,
    TokenStat,
    Weighted,
)
from saezoo.features.site import Site
from saezoo.results import Measured

WORDS = [
    "<|endoftext|>",
    " the",
    " cat",
    " sat",
    " on",
    " mat",
    "\n",
    "\t",
    ".",
    " dog",
    "Cat",
    " house",
    " of",
    " river",
]
HOSTILE: dict[str, bytes] = {
    "script": b"</script><script>window.hurt=1</script>",
    "image": b"<img src=x onerror='window.hurt=2'>",
    "quotes": "'\"\\`${window.hurt=3}\u2028\u2029".encode(),
    "override": " a\u202eb".encode(),
    "nul": b"\0\x1b[31m",
    "zero width": "x\u200by\ufeff".encode(),
    "first half": b" \xe2\x80",
    "second half": b"\x99",
    "lone byte": b"\xff",
    "hebrew": " שלום".encode(),
    "accent": "\u0301e".encode(),
    "marks": "·↵⇥".encode(),
}
VOCABULARY = [word.encode() for word in WORDS] + list(HOSTILE.values())
FIRST_HOSTILE = len(WORDS)


def about(layer: str = "2", **changes: Any) -> About:
    """Of an SAE with 128 features, each of which has a page."""
    usual = About(
        collection="tiny-res",
        layer=layer,
        hook=f"blocks.{layer}.hook_resid_pre",
        model="tiny-lm",
        d_in=256,
        d_sae=128,
        text="builtin:heldout",
        context=128,
        rows=512,
        tokens=64_990,
        documents=35,
        seed=0,
        features=tuple(range(128)),
        metrics={"ce_delta": Measured(0.4301, 0.29, 0.57), "l0": Measured(21.77, 20.6, 23.0), "l1": Measured(None)},
        published={"ce_delta": 0.4064, "l0": 21.69, "l1": None},
        neuronpedia="gpt2-small/8-res-jb",
        versions={"saezoo": "0.1.0", "torch": "2.13.0"},
    )
    return dataclasses.replace(usual, **changes)


def example(ids: Sequence[int], values: Sequence[float], position: int, *, row: int = 3, document: int = 7) -> Example:
    """A firing in a row of these tokens."""
    return Example(row, position, document, np.array(ids, np.int64), np.array(values, np.float32))


def alive(
    index: int, *, vocabulary: int = len(WORDS), context: int = 64, examples: int = 5, layer: str = "2"
) -> Feature:
    """A feature that fires: the same for the same arguments."""
    random = np.random.default_rng(index)

    def contexts(n: int) -> tuple[Example, ...]:
        ids = random.integers(1, vocabulary, (n, context))
        fires = random.random((n, context)) < 0.08
        values = np.where(fires, random.gamma(2, 2, (n, context)), 0)
        at = random.integers(0, context, n)
        values[np.arange(n), at] = np.sort(random.gamma(2, 3, n) + 0.01)[::-1]
        return tuple(example(ids[i], values[i], int(at[i]), row=int(at[i]) * 7, document=i) for i in range(n))

    def some(n: int) -> list[int]:
        return [int(token) for token in random.integers(1, vocabulary, n)]

    top = contexts(4 * examples)
    ends = np.linspace(max(e.value for e in top), 0.01, 6)
    fires = int(10 ** random.normal(2.4, 0.8)) + 1
    value = float(random.random())
    spread = tuple(int(n) for n in random.poisson(40 * np.exp(-(np.linspace(-3, 3, 50) ** 2) / 2)))
    shares = tuple(TokenStat(token, 4.2 / (i + 1), 0.3 / (i + 1), 12, 25) for i, token in enumerate(some(10)))
    return Feature(
        index=index,
        fires=fires,
        density=fires / 64_990,
        mean=float(random.gamma(2, 1)),
        max=top[0].value,
        histogram=Histogram(0.01, top[0].value, tuple(int(400 * 0.85**i) for i in range(50))),
        top=top,
        quantiles=tuple(Quantile(float(ends[i + 1]), float(ends[i]), fires // 5, contexts(examples)) for i in range(5)),
        tokens_by_mean=shares,
        tokens_by_share=shares,
        logits=Logits(
            tuple(Weighted(token, 0.9 - 0.05 * i) for i, token in enumerate(some(10))),
            tuple(Weighted(token, -0.8 + 0.05 * i) for i, token in enumerate(some(10))),
            Histogram(-0.8, 0.9, spread),
            0.21,
            float(random.normal()),
            float(random.gamma(1, 2)),
        ),
        neighbours=tuple(Neighbour(layer, (index + i) % 128, 0.9 - 0.1 * i) for i in range(1, 6)),
        coactive=tuple(Coactive((index + 9 * i) % 128, 40 - i, 0.3 / i, 2.5 - i) for i in range(1, 6)),
        divergence=Measured(value, max(0.0, value - 0.2), min(1.0, value + 0.2)),
    )


def dead(index: int) -> Feature:
    """A feature that never fired; its decoder direction is known all the same."""
    one = alive(index)
    return Feature(index, 0, 0.0, None, None, None, logits=one.logits, neighbours=one.neighbours)


def features(known: About) -> Iterator[Feature]:
    """Those of `known`: every tenth is dead."""
    for index in known.features:
        yield dead(index) if index % 10 == 9 else alive(index, layer=known.layer)


def hostile(index: int = 0) -> Feature:
    """A feature all of whose tokens would do harm, or mislead, if a page showed them as they come."""
    ids = [0, *range(FIRST_HOSTILE, len(VOCABULARY)), 5000, 2, 3]
    context = example(ids, [0.0] + [1.0 + i for i in range(len(ids) - 1)], 4)
    stats = tuple(TokenStat(token, 1.0, 0.1, 1, 1) for token in ids)
    weighted = tuple(Weighted(token, 0.5) for token in ids)
    one = alive(index)
    assert one.logits is not None
    logits = dataclasses.replace(one.logits, promoted=weighted, suppressed=weighted)
    return dataclasses.replace(
        one, top=(context,), max=20.0, tokens_by_mean=stats, tokens_by_share=stats[1:6], logits=logits
    )


def with_context(context: Example) -> Feature:
    """A feature with this context alone."""
    return dataclasses.replace(alive(0), top=(context,), quantiles=())


def write(out: Path, *abouts: About, first: Feature | None = None, complete: bool = True) -> Path:
    """A site of `abouts`; `first`: what the first feature of the first SAE is."""
    known = abouts or (about(),)
    site = Site(out, known, vocabulary=VOCABULARY, special={0})
    for number, one in enumerate(known):
        stream = features(one)
        if first is not None and number == 0:
            next(stream)
            stream = (feature for group in ([first], stream) for feature in group)
        site.write(one, stream, clusters=[(1, 2, 3), (10, 20)], exclusive=[(5, 6)])
    if complete:
        site.finish()
    return out
