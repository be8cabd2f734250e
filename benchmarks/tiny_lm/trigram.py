"""Interpolated modified Kneser-Ney trigram over the bundled tokens: the yardstick for the language model.

Run: ``python benchmarks/tiny_lm/trigram.py`` after ``corpus.py`` and ``tokenizer.py``. Fitted on the train split;
every token of every held-out document is scored, with two ``<|endoftext|>`` before the document as context and
``<|endoftext|>`` itself never scored: the same tokens as in ``evaluate.py``.

Method: Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998): three discounts
an order, continuation counts in the lower orders, the lowest order interpolated with the uniform distribution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizer import EOT_ID, VOCAB, Tokens, encode_split

Floats = npt.NDArray[np.float64]


def discounts(counts: Tokens) -> Floats:
    """Chen & Goodman's discounts for counts 0, 1, 2 and 3 or more, from the counts of counts."""
    n = [float(np.count_nonzero(counts == k)) for k in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1])
    return np.array([0.0] + [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)])


class Level:
    """One order: P(token | context) from counts of keys ``context * VOCAB + token`` and a lower order."""

    def __init__(self, keys: Tokens, counts: Tokens) -> None:
        taken = discounts(counts)[np.minimum(counts, 3)]
        self.keys = keys
        self.kept = counts - taken
        self.contexts, starts = np.unique(keys // VOCAB, return_index=True)
        self.totals = np.add.reduceat(counts, starts).astype(np.float64)
        self.backoff = np.add.reduceat(taken, starts) / self.totals

    def probability(self, context: Tokens, token: Tokens, lower: Floats) -> Floats:
        """P(token | context); ``lower`` is the lower order's probability, used alone for an unseen context."""
        key = context * VOCAB + token
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        kept = np.where(self.keys[at] == key, self.kept[at], 0.0)
        where = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        known = self.contexts[where] == context
        mixed = kept / self.totals[where] + self.backoff[where] * lower
        return np.asarray(np.where(known, mixed, lower))


class KneserNey:
    """Trigram and bigram models of documents of token ids."""

    def __init__(self, docs: list[Tokens]) -> None:
        first, second, token = windows(docs)
        trigrams, counts = np.unique((first * VOCAB + second) * VOCAB + token, return_counts=True)
        bigrams, raw = np.unique(second * VOCAB + token, return_counts=True)
        # Of a bigram: the number of different tokens before it. Nothing but EOT precedes a document's start, so
        # there the plain count is taken instead.
        same, before = np.unique(trigrams % VOCAB**2, return_counts=True)
        assert np.array_equal(same, bigrams)
        continuation = np.where(bigrams // VOCAB == EOT_ID, raw, before)
        unigrams, types = np.unique(bigrams % VOCAB, return_counts=True)
        self.three = Level(trigrams, counts)
        self.two = Level(bigrams, continuation)
        self.two_plain = Level(bigrams, raw)
        self.one = Level(unigrams, types)

    def unigram(self, token: Tokens) -> Floats:
        """P(token) from continuation counts, interpolated with 1 / VOCAB."""
        return self.one.probability(np.zeros_like(token), token, np.full(token.shape, 1 / VOCAB))

    def bigram(self, second: Tokens, token: Tokens) -> Floats:
        """P(token | second) of a bigram model in its own right (plain counts)."""
        return self.two_plain.probability(second, token, self.unigram(token))

    def trigram(self, first: Tokens, second: Tokens, token: Tokens) -> Floats:
        """P(token | first, second)."""
        lower = self.two.probability(second, token, self.unigram(token))
        return self.three.probability(first * VOCAB + second, token, lower)


def windows(docs: list[Tokens]) -> tuple[Tokens, Tokens, Tokens]:
    """(token two before, token before, token) of every document token; EOT stands before a document."""
    start = np.full(2, EOT_ID, dtype=np.int64)
    padded = [np.concatenate((start, doc)) for doc in docs]
    columns = [np.concatenate([doc[k : len(doc) - 2 + k] for doc in padded]) for k in range(3)]
    return columns[0], columns[1], columns[2]


def worst_sum(model: KneserNey, first: Tokens, second: Tokens) -> float:
    """Largest distance from 1 of the summed probabilities of all VOCAB tokens, over the given contexts."""
    every = np.arange(VOCAB, dtype=np.int64)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    sums = [model.trigram(np.full(VOCAB, a), np.full(VOCAB, b), every).sum() for a, b in pairs]
    return float(np.max(np.abs(np.array(sums) - 1)))


def main() -> None:
    """Fit, check the sums, and print cross-entropies in nats a token."""
    model = KneserNey(encode_split("train"))
    first, second, token = windows(encode_split("heldout"))
    assert not (token == EOT_ID).any()
    picks = np.random.default_rng(0).integers(0, len(token), 100)
    # Half of the contexts as they occur, half recombined, so that unseen contexts are among them.
    before = np.concatenate((first[picks[:50]], first[picks[50:]]))
    after = np.concatenate((second[picks[:50]], second[picks[:50]]))
    print(f"worst |sum - 1| over 100 contexts: {worst_sum(model, before, after):.1e}")
    for name, probability in (
        ("unigram", model.unigram(token)),
        ("bigram", model.bigram(second, token)),
        ("trigram", model.trigram(first, second, token)),
    ):
        print(f"{name}: {-np.log(probability).mean():.4f} nats a token over {len(token)} held-out tokens")


if __name__ == "__main__":
    main()
