"""Sparse probing on labels that the text itself gives: is a property of a token to be read from one to five features?

Shapes: R rows, T positions, V vocabulary, U tokens chosen for some task, n tokens of a task, F d_sae, N documents.
A label is 1, 0, or -1 where the question is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from saezoo.evals.intervals import DRAWS, FEWEST
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.tokens import Rows

KS = (1, 2, 5)
PER_CLASS = 500
FEWEST_PER_CLASS = 50
COLUMNS = (*(f"k{k}" for k in KS), "raw")
_ENCODE_AT_ONCE = 1024

TASKS = {
    "word_start": "a token that begins a word, against one that continues it",
    "capitalised": "of tokens that begin a word: its first letter is a capital",
    "digit": "the token holds a digit, against all others",
    "next_continues": "of tokens that end in a letter: the next one continues the word",
    "next_punctuation": "the next token begins with punctuation, against all others",
    "next_newline": "the next token holds a line break, against all others",
    "sentence_end": "of tokens that end in punctuation: it is . ! or ? and a capital or a line break follows",
    "in_quotation": "of tokens of words: inside double quotation marks that were opened in this paragraph",
    "second_half": "position in the row: second half, against first",
    "seen_before": "the same token occurred earlier in its row",
}
"""Name -> the question. All are of English as GPT-2's tokenizer cuts it; the text has no languages to tell apart."""


@dataclass(frozen=True)
class Sample:
    """The tokens of one task, by their place in the flattened rows; as many with label 1 as with label 0."""

    task: str
    train_n: NDArray[np.int64]
    train_labels_n: NDArray[np.int64]
    test_n: NDArray[np.int64]
    test_labels_n: NDArray[np.int64]


@dataclass(frozen=True)
class TaskResult:
    """One row of the table of tasks."""

    task: str
    question: str
    train: int
    """Tokens the probes were fitted on; 0 if the text has too few and the accuracies are undefined."""
    test: int
    documents: int
    """Documents of the test tokens."""
    features: tuple[int, ...]
    """The five features, best first."""
    accuracy: dict[str, Measured]
    """Of `COLUMNS`: with one, two and five features, and with the whole activation."""


@dataclass(frozen=True)
class Probing:
    """What `probe` found."""

    metrics: dict[str, Measured]
    tasks: tuple[TaskResult, ...]


def labels(pieces_V: Sequence[str], rows: Rows, special: frozenset[int]) -> dict[str, NDArray[np.int8]]:
    """Labels of every token for every task [R * T], from the text of each token of the vocabulary.

    Questions about the next token are asked only where it is in the same row and document. Special tokens are asked
    nothing and are nobody's neighbour.
    """
    token_RT, document_RT = rows.tokens_RT, rows.documents_RT
    here = ~np.isin(token_RT, sorted(special))
    same = np.zeros_like(here)
    same[:, :-1] = here[:, :-1] & here[:, 1:] & (document_RT[:, :-1] == document_RT[:, 1:])
    before = np.roll(same, 1, axis=1)  # the last column of `same` is False

    def of(ask: Callable[[str], bool]) -> NDArray[np.bool_]:
        return np.array([ask(piece) for piece in pieces_V], dtype=bool)[token_RT]

    def following(mark_RT: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.roll(mark_RT, -1, axis=1)

    starts = of(lambda s: s[:1] == " " and s[1:2].isalpha())
    letter_first, letter_last = of(lambda s: s[:1].isalpha()), of(lambda s: s[-1:].isalpha())
    continues = letter_first & before & np.roll(letter_last, 1, axis=1)
    newline, capital = of(lambda s: "\n" in s), of(lambda s: s.lstrip()[:1].isupper())
    punctuation_last = of(lambda s: _is_punctuation(s.rstrip()[-1:]))
    stop = of(lambda s: s.rstrip().rstrip("\"”’')")[-1:] in {".", "!", "?"})
    answers = {
        "word_start": (starts, here & (starts | continues)),
        "capitalised": (capital, here & starts),
        "digit": (of(lambda s: any(c.isdigit() for c in s)), here),
        "next_continues": (following(letter_first), same & letter_last),
        "next_punctuation": (following(of(lambda s: _is_punctuation(s.lstrip()[:1]))), same),
        "next_newline": (following(newline), same),
        "sentence_end": (stop & following(capital | newline), same & punctuation_last),
        "in_quotation": (_inside_quotes(pieces_V, rows, here), here & (starts | continues)),
        "second_half": (np.arange(token_RT.shape[1])[None] >= token_RT.shape[1] / 2, here),
        "seen_before": (_seen_before(token_RT), here),
    }
    return {task: np.where(asked, answer, -1).astype(np.int8).ravel() for task, (answer, asked) in answers.items()}


def _is_punctuation(character: str) -> bool:
    return bool(character) and not character.isalnum() and not character.isspace()


def _inside_quotes(pieces_V: Sequence[str], rows: Rows, here_RT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a double quotation mark is open after each token [R, T]; a new paragraph or document closes it."""
    inside_N = np.zeros(here_RT.size, dtype=bool)
    inside, previous, piece = False, None, ""
    documents = rows.documents_RT.ravel().tolist()
    for i, (token, document, here) in enumerate(
        zip(rows.tokens_RT.ravel().tolist(), documents, here_RT.ravel().tolist(), strict=True)
    ):
        if not here:
            continue
        line_ended = piece.endswith("\n")
        piece = pieces_V[token]
        if document != previous or "\n\n" in piece or (line_ended and piece.startswith("\n")):
            inside, previous = False, document
        for character in piece:
            inside = {'"': not inside, "“": True, "”": False}.get(character, inside)
        inside_N[i] = inside
    return inside_N.reshape(here_RT.shape)


def _seen_before(token_RT: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the same token stands earlier in the row [R, T]."""
    seen_RT = np.ones(token_RT.shape, dtype=bool)
    for row, tokens_T in enumerate(token_RT):
        seen_RT[row, np.unique(tokens_T, return_index=True)[1]] = False
    return seen_RT


def choose(labels: dict[str, NDArray[np.int8]], document_n: NDArray[np.int64], *, seed: int) -> list[Sample]:
    """Balanced samples for each task: at most 500 tokens of each label to fit on, as many of other documents to test.

    Half of the documents, drawn by `seed`, are for fitting. A task with fewer than 50 tokens of a label in either half
    gets an empty sample: it is undefined on this text.
    """
    generator = np.random.default_rng(seed)
    documents = generator.permutation(np.unique(document_n))
    for_train_n = np.isin(document_n, documents[: len(documents) // 2])
    samples = []
    for task, label_n in labels.items():
        halves = [_balanced(label_n, part_n, generator) for part_n in (for_train_n, ~for_train_n)]
        if any(len(half) < 2 * FEWEST_PER_CLASS for half in halves):
            halves = [half[:0] for half in halves]
        train_n, test_n = halves
        samples.append(Sample(task, train_n, label_n[train_n].astype(int), test_n, label_n[test_n].astype(int)))
    return samples


def _balanced(
    label_n: NDArray[np.int8], part_n: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Places, in order, of as many tokens labelled 1 as 0 within a part."""
    classes = [np.flatnonzero(part_n & (label_n == label)) for label in (0, 1)]
    size = min(PER_CLASS, *(len(places) for places in classes))
    return np.sort(np.concatenate([generator.choice(places, size, replace=False) for places in classes]))


def probe(
    sae: SAE,
    samples: Sequence[Sample],
    activations: Callable[[NDArray[np.int64]], Tensor],
    document_n: NDArray[np.int64],
    *,
    seed: int,
) -> Probing:
    """Accuracy, on other documents, of logistic regression on one, two and five features, and on the activation.

    k-sparse probing (Gurnee et al. 2023, "Finding neurons in a haystack", arXiv 2305.01610; SAEBench's sparse probing):
    of the training tokens, feature i gets the score |mean of f_i where the label is 1 - mean where it is 0| |W_dec,i|;
    the k best are standardised (by the training tokens) and fitted with L2-regularised logistic regression (C = 1).
    Labels are balanced, so chance is 0.5.

    Args:
        sae: its features are probed.
        samples: from `choose`.
        activations: what the SAE reads [U, D] at the given places; called once.
        document_n: of every place, for the intervals.
        seed: of the bootstrap draws.

    Returns `probing_k1`, `probing_k2`, `probing_k5` and `probing_raw` (the whole activation), means over tasks, and
    `probing_tasks`, how many tasks they are means of; and the tasks. Undefined tasks count in no mean; without any, the
    means are None. Intervals: percentile bootstrap over test documents; the fitted probes are held fixed.
    """
    places_U = np.unique(np.concatenate([places for s in samples for places in (s.train_n, s.test_n)]))
    if not len(places_U):
        metrics = {f"probing_{column}": Measured(None) for column in COLUMNS}
        return Probing(metrics | {"probing_tasks": Measured(0.0)}, tuple(_row(s, (), {}, document_n) for s in samples))
    x_UD = activations(places_U)
    f_UF = _encode(sae, x_UD)
    if sae.config.centre:
        x_UD = x_UD - x_UD.mean(-1, keepdim=True)
    raw_UD = x_UD.double().cpu().numpy()
    documents, codes_n = np.unique(document_n, return_inverse=True)
    right_KSN = np.zeros((len(COLUMNS), len(samples), len(documents)))  # right answers by column, task and document
    asked_SN = np.zeros((len(samples), len(documents)))
    chosen = []
    for i, sample in enumerate(samples):
        correct, features = _fit(f_UF, raw_UD, places_U, sample)
        chosen.append(features)
        code_n = codes_n[sample.test_n]
        asked_SN[i] = np.bincount(code_n, minlength=len(documents))
        for column, correct_n in enumerate(correct):
            right_KSN[column, i] = np.bincount(code_n, weights=correct_n, minlength=len(documents))
    means, accuracies = _with_intervals(right_KSN, asked_SN, seed)
    metrics = dict(zip((f"probing_{column}" for column in COLUMNS), means, strict=True))
    metrics["probing_tasks"] = Measured(float((asked_SN.sum(1) > 0).sum()))
    rows = [_row(s, chosen[i], accuracies[i], document_n) for i, s in enumerate(samples)]
    return Probing(metrics, tuple(rows))


def _encode(sae: SAE, x_UD: Tensor) -> sparse.csr_array:
    """Features times the length of their decoder row, sparse [U, F]: what each contributes, whatever its scale."""
    length_F = sae.W_dec.norm(dim=1)
    blocks = [sae.encode(x_BD) * length_F for x_BD in torch.split(x_UD, _ENCODE_AT_ONCE)]
    return sparse.vstack([sparse.csr_array(f_BF.double().cpu().numpy()) for f_BF in blocks], format="csr")


def _fit(
    f_UF: sparse.csr_array, raw_UD: NDArray[np.float64], places_U: NDArray[np.int64], sample: Sample
) -> tuple[list[NDArray[np.bool_]], tuple[int, ...]]:
    """For each of `COLUMNS`, which test tokens the probe gets right; and the best features."""
    if not len(sample.test_n):
        return [], ()
    train_n, test_n = np.searchsorted(places_U, sample.train_n), np.searchsorted(places_U, sample.test_n)
    positive_n = sample.train_labels_n == 1
    train_nF = f_UF[train_n]
    score_F = np.abs(train_nF[positive_n].mean(0) - train_nF[~positive_n].mean(0))
    best = np.argsort(-score_F, kind="stable")[: max(KS)]
    best_Uk = f_UF[:, best].toarray()
    correct = []
    for matrix in (*(best_Uk[:, :k] for k in KS), raw_UD):
        predicted_n = _predict(matrix[train_n], sample.train_labels_n, matrix[test_n])
        correct.append(predicted_n == sample.test_labels_n)
    return correct, tuple(int(i) for i in best)


def _predict(train_nK: NDArray[np.float64], label_n: NDArray[np.int64], test_nK: NDArray[np.float64]) -> Any:
    """Labels that logistic regression gives to the test tokens."""
    mean_K, spread_K = train_nK.mean(0), train_nK.std(0)
    spread_K[spread_K == 0] = 1
    model = LogisticRegression(C=1.0, max_iter=1000).fit((train_nK - mean_K) / spread_K, label_n)
    return model.predict((test_nK - mean_K) / spread_K)


def _with_intervals(
    right_KSN: NDArray[np.float64], asked_SN: NDArray[np.float64], seed: int
) -> tuple[list[Measured], list[dict[str, Measured]]]:
    """For each of `COLUMNS` the mean accuracy over tasks; and for each task, the accuracy by column."""
    used = asked_SN.sum(0) > 0
    right_KSN, asked_SN = right_KSN[:, :, used], asked_SN[:, used]
    n = int(used.sum())
    picks_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    weights_RN = np.concatenate([np.ones((1, n)), picks_RN])
    asked_RS = weights_RN @ asked_SN.T
    with np.errstate(invalid="ignore"):
        accuracy_KRS = np.einsum("rn,ksn->krs", weights_RN, right_KSN) / asked_RS
    means = [_interval(np.nanmean(accuracy_RS, axis=1), n) for accuracy_RS in accuracy_KRS]
    accuracies = [
        {
            column: _interval(accuracy_KRS[k, :, task], int((asked_SN[task] > 0).sum()))
            for k, column in enumerate(COLUMNS)
        }
        for task in range(len(asked_SN))
    ]
    return means, accuracies


def _interval(value_R: NDArray[np.float64], documents: int) -> Measured:
    """The first value, and the 95 % interval of the others if there were documents enough to draw from."""
    if not documents:
        return Measured(None)
    if documents < FEWEST:
        return Measured(float(value_R[0]))
    lo, hi = np.nanquantile(value_R[1:], [0.025, 0.975])
    return Measured(float(value_R[0]), float(lo), float(hi))


def _row(
    sample: Sample, features: tuple[int, ...], accuracy: dict[str, Measured], document_n: NDArray[np.int64]
) -> TaskResult:
    return TaskResult(
        task=sample.task,
        question=TASKS.get(sample.task, ""),
        train=len(sample.train_n),
        test=len(sample.test_n),
        documents=len(np.unique(document_n[sample.test_n])),
        features=features,
        accuracy=accuracy or dict.fromkeys(COLUMNS, Measured(None)),
    )
