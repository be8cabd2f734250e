"""First-letter absorption: does a feature for "begins with s" stay silent on words that another feature stands for?

Shapes: W words, n words of a split, D d_in, F d_sae, K split features of a letter.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor

from saezoo.evals.intervals import DRAWS
from saezoo.results import Measured
from saezoo.sae import SAE

LETTERS = string.ascii_lowercase
PREFIX = "The first letter of the word"
TEST_SHARE = 0.2
FEWEST_WORDS = 5  # of a letter, in either part: fewer say nothing about a probe
LEAST_F1 = 0.6
FEWEST_LETTERS = 20
MOST_SPLIT = 10
L1_DECAY = 0.01
F1_JUMP = 0.03
LEAST_COSINE = 0.025
LEAST_COSINE_PARTIAL = 0.1
LEAST_SHARE = 0.4
MOST_ABSORBERS = 3
_ENCODE_AT_ONCE = 1024
# scikit-learn 1.8 has `l1_ratio` where 1.7, the last for Python 3.10, has `penalty`.
_L1: dict[str, Any] = {"penalty": "l1"} if LogisticRegression().penalty == "l2" else {"l1_ratio": 1.0}


@dataclass(frozen=True)
class LetterResult:
    """One row of the table of letters."""

    letter: str
    words: int
    """Words of the vocabulary, in both halves."""
    probe_f1: float | None
    """Of the probe on the activation, on the test words; None if the letter has too few words."""
    sparse_f1: float | None
    """Of the probe on the split features."""
    split_features: tuple[int, ...]
    """Strongest first; none if no feature speaks for the letter."""
    asked: int
    """Test words of the letter that the probe recognises: what the two rates are taken over."""
    full: float | None
    fraction: float | None


@dataclass(frozen=True)
class Absorption:
    """What `absorption` found."""

    metrics: dict[str, Measured]
    letters: tuple[LetterResult, ...]


def pieces(tokenizer: Any, vocab: int) -> list[str]:
    """The text of each token of the vocabulary."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab)))
    return [tokenizer.convert_tokens_to_string([token]) for token in tokens]


def prompts(tokenizer: Any, vocab: int, bos: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One prompt [T] for each word that is a token, [W, T], and the word's first letter, 0 for a to 25 for z, [W].

    A word is a token of a space and at least two ASCII letters. The prompt is BOS + "The first letter of the word" +
    the word, and is read at the word. SAEBench reads the word too, inside "{word} has the first letter:"; the model is
    causal, so nothing that follows can reach it there, and ten solved examples stand before it. Here what stands before
    is short and the same for all words, so that the word is all that differs; a small model learns nothing from
    examples.
    """
    words = {i: p for i, p in enumerate(pieces(tokenizer, vocab)) if len(p) > 2 and p[0] == " " and _is_word(p[1:])}
    before = [bos, *tokenizer(PREFIX, add_special_tokens=False)["input_ids"]]
    tokens_WT = np.array([[*before, token] for token in words], dtype=np.int64).reshape(-1, len(before) + 1)
    return tokens_WT, np.array([LETTERS.index(word[1].lower()) for word in words.values()], dtype=np.int64)


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha()


def absorption(sae: SAE, x_WD: Tensor, letter_W: NDArray[np.int64], *, seed: int) -> Absorption:
    """How much of each letter's feature is absorbed by features of single words.

    Chanin et al. 2024 ("A is for absorption", arXiv 2409.14507), in the form of SAEBench, for each letter:

    1. A probe p (logistic regression, balanced) for the letter on the activation, fitted on 80 % of the words.
    2. The letter's split features: the k best of an L1 probe on the features, for the largest k up to which each k
       raises the test F1 of logistic regression on them by more than 0.03.
    3. Over the test words of the letter that the probe recognises, with c_i = f_i W_dec,i . p / |p| and the whole
       projection a = (x - b_dec) . p / |p|:
       full absorption: no split feature fires; a > 0; the feature with the largest c has c >= 0.4 a and a decoder
       cosine with p of at least 0.025;
       absorption fraction: s / (s + m), with m the sum of c over split features and s that of the (up to) three
       largest positive c of others with a cosine of at least 0.1, at most a - m; 0 if m >= a or that sum is below
       0.4 a, 1 if m <= 0.

    `absorption_full` and `absorption_fraction` are means over letters of the means over words, `absorption_splits` of
    the number of split features less one; over letters whose probe reaches F1 0.6 and that have a split feature at
    all. With fewer than 20 such letters (`absorption_letters` says how many) they are undefined, None. Intervals:
    bootstrap over the words of each letter, with probes and letters held fixed.

    Args:
        sae: its features are judged.
        x_WD: what the SAE reads at each word.
        letter_W: the words' letters, 0 to 25.
        seed: of the split, of the L1 probe, and of the bootstrap draws.
    """
    words = _Words(sae, x_WD, letter_W, seed)
    found = [words.judge(letter) for letter in range(len(LETTERS))]
    good = [letter for letter in found if letter[0].full is not None and (letter[0].probe_f1 or 0) >= LEAST_F1]
    names = ("absorption_full", "absorption_fraction")
    metrics = dict.fromkeys((*names, "absorption_splits"), Measured(None))
    if len(good) >= FEWEST_LETTERS:
        for name, rates in zip(names, list(zip(*good, strict=True))[1:], strict=True):
            metrics[name] = _mean_over_letters(rates, seed)
        metrics["absorption_splits"] = Measured(float(np.mean([len(row.split_features) - 1 for row, *_ in good])))
    return Absorption(metrics | {"absorption_letters": Measured(float(len(good)))}, tuple(row for row, *_ in found))


def _test_words(letter_W: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which words are for testing: a fifth of each letter's, rounded up, drawn by the seed."""
    generator = np.random.default_rng(seed)
    test_W = np.zeros(len(letter_W), dtype=bool)
    for letter in range(len(LETTERS)):
        words = generator.permutation(np.flatnonzero(letter_W == letter))
        test_W[words[: math.ceil(TEST_SHARE * len(words))]] = True
    return test_W


def _encode(sae: SAE, x_WD: Tensor) -> sparse.csr_array:
    blocks = [sparse.csr_array(sae.encode(x_BD).double().cpu().numpy()) for x_BD in torch.split(x_WD, _ENCODE_AT_ONCE)]
    return sparse.vstack(blocks, format="csr")


class _Words:
    """All words, as the SAE reads and writes them."""

    def __init__(self, sae: SAE, x_WD: Tensor, letter_W: NDArray[np.int64], seed: int) -> None:
        self.letter_W, self.seed = letter_W, seed
        self.test_W = _test_words(letter_W, seed)
        x_WD = x_WD.to(sae.W_enc.dtype)
        if sae.config.centre:
            x_WD = x_WD - x_WD.mean(-1, keepdim=True)
        self.f_WF = _encode(sae, x_WD)
        self.w_FD = sae.W_dec.double().cpu().numpy()
        self.length_F = np.linalg.norm(self.w_FD, axis=1)
        self.x_WD = (x_WD - sae.b_dec).double().cpu().numpy()
        # What probes are fitted on: one scale for all, so that directions stay what they are.
        train_WD = self.x_WD[~self.test_W]
        origin_D = train_WD.mean(0) if len(train_WD) else 0.0
        unit = float(np.square(train_WD - origin_D).mean()) ** 0.5 if len(train_WD) else 1.0
        self.scaled_WD = (self.x_WD - origin_D) / (unit or 1.0)
        self.scaled_WF = (self.f_WF * (self.length_F / (unit or 1.0))).tocsr()

    def judge(self, letter: int) -> tuple[LetterResult, NDArray[np.float64], NDArray[np.float64]]:
        """The row of one letter, and for each test word asked full absorption (0 or 1) and absorption fraction."""
        mine_W = self.letter_W == letter
        empty = np.zeros(0)
        row = LetterResult(LETTERS[letter], int(mine_W.sum()), None, None, (), 0, None, None)
        if min(int((mine_W & self.test_W).sum()), int((mine_W & ~self.test_W).sum())) < FEWEST_WORDS:
            return row, empty, empty
        model = _balanced(self.scaled_WD[~self.test_W], mine_W[~self.test_W])
        predicted_W = model.predict(self.scaled_WD)
        probe_f1 = float(f1_score(mine_W[self.test_W], predicted_W[self.test_W]))
        split, sparse_f1 = self._split_features(mine_W)
        row = replace(row, probe_f1=probe_f1, sparse_f1=sparse_f1, split_features=tuple(int(i) for i in split))
        asked = np.flatnonzero(mine_W & self.test_W & predicted_W)
        if not len(asked) or not len(split):
            return row, empty, empty
        full_n, fraction_n = self._absorbed(asked, model.coef_[0] / np.linalg.norm(model.coef_[0]), split)
        full, fraction = float(full_n.mean()), float(fraction_n.mean())
        return replace(row, asked=len(asked), full=full, fraction=fraction), full_n, fraction_n

    def _split_features(self, mine_W: NDArray[np.bool_]) -> tuple[NDArray[np.int64], float | None]:
        """The split features of a letter, strongest first, and the test F1 of a probe on them; none if none helps."""
        train_W = ~self.test_W
        lasso = LogisticRegression(
            C=1 / (L1_DECAY * train_W.sum()),
            solver="liblinear",
            class_weight="balanced",
            random_state=self.seed,
            **_L1,
        )
        weight_F = lasso.fit(self.scaled_WF[train_W], mine_W[train_W]).coef_[0]
        ranked_F = np.argsort(-weight_F, kind="stable")[: min(MOST_SPLIT, int((weight_F > 0).sum()))]
        columns_Wk = self.f_WF[:, ranked_F].toarray()
        columns_Wk /= columns_Wk[train_W].std(0)  # a feature that never fires has no weight
        best, count = None, 0
        for k in range(1, len(ranked_F) + 1):
            model = _balanced(columns_Wk[train_W, :k], mine_W[train_W])
            f1 = float(f1_score(mine_W[self.test_W], model.predict(columns_Wk[self.test_W, :k])))
            if best is not None and f1 <= best + F1_JUMP:
                break
            best, count = f1, k
        return ranked_F[:count], best

    def _absorbed(
        self, asked: NDArray[np.int64], probe_D: NDArray[np.float64], split: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Full absorption and absorption fraction of each word in `asked`, for a unit probe."""
        along_F = self.w_FD @ probe_D
        cosine_F = along_F / np.where(self.length_F > 0, self.length_F, 1)
        other_F = np.ones(len(along_F), dtype=bool)
        other_F[split] = False
        whole_n = self.x_WD[asked] @ probe_D
        full_n, fraction_n = np.zeros(len(asked)), np.zeros(len(asked))
        for n, word in enumerate(asked):
            f_F = self.f_WF[[word]].toarray()[0]
            part_F, whole = f_F * along_F, whole_n[n]
            top = int(part_F.argmax())
            silent = not (f_F[split] > 0).any()
            full_n[n] = silent and whole > 0 and part_F[top] >= LEAST_SHARE * whole and cosine_F[top] >= LEAST_COSINE
            rivals = part_F[other_F & (cosine_F >= LEAST_COSINE_PARTIAL) & (part_F > 0)]
            fraction_n[n] = _fraction(whole, float(part_F[split].sum()), float(np.sort(rivals)[-MOST_ABSORBERS:].sum()))
        return full_n, fraction_n


def _fraction(whole: float, main: float, absorbers: float) -> float:
    """The absorption fraction from projections on the probe: whole activation, split features, best three others."""
    if whole <= 0 or main >= whole or absorbers < LEAST_SHARE * whole:
        return 0.0
    if main <= 0:
        return 1.0
    taken = min(absorbers, whole - main)
    return taken / (taken + main)


def _balanced(x_nK: NDArray[np.float64], label_n: NDArray[np.bool_]) -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(x_nK, label_n)


def _mean_over_letters(rates: Sequence[NDArray[np.float64]], seed: int) -> Measured:
    """Mean over letters of the mean over words, and its interval over redrawn words."""
    generator = np.random.default_rng(seed)
    draws_R = np.zeros(DRAWS)
    for rate_n in rates:
        draws_R += rate_n[generator.integers(len(rate_n), size=(DRAWS, len(rate_n)))].mean(1) / len(rates)
    lo, hi = np.quantile(draws_R, [0.025, 0.975])
    return Measured(float(np.mean([rate_n.mean() for rate_n in rates])), float(lo), float(hi))
