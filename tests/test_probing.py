"""Sparse probing: labels written out by hand, probes whose accuracy follows from counts, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from saezoo.evals.intervals import FEWEST
from saezoo.evals.probing import COLUMNS, FEWEST_PER_CLASS, KS, PER_CLASS, TASKS, Sample, choose, labels, probe
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows

BOS = "<|endoftext|>"


def rows_of(*texts: list[str], width: int) -> tuple[list[str], Rows]:
    """Pieces of text as a vocabulary of their own, packed with a BOS before each document; no row is cut short."""
    tokens = [(piece, i) for i, pieces in enumerate(texts) for piece in (BOS, *pieces)]
    vocabulary = sorted({piece for piece, _ in tokens})
    ids = np.array([vocabulary.index(piece) for piece, _ in tokens])
    return vocabulary, Rows(ids.reshape(-1, width), np.array([i for _, i in tokens]).reshape(-1, width))


def asked(task: str, *texts: list[str], width: int) -> str:
    """The labels of a task as text: 1, 0 and . for not asked."""
    vocabulary, rows = rows_of(*texts, width=width)
    found = labels(vocabulary, rows, frozenset({vocabulary.index(BOS)}))[task]
    return "".join({1: "1", 0: "0", -1: "."}[int(label)] for label in found)


TEXT = ["He", " said", ",", ' "', "Go", " now", ".", '"', " The", " end", "ing", "\n", " 4", "2", " Go"]


@pytest.mark.parametrize(
    ("task", "expected"),
    #                 BOS He said , " Go now . " The end ing \n 4 2 Go
    [
        ("word_start", "..1...1..110...1"),
        ("capitalised", "..0...0..10....1"),
        ("digit", ".000000000000110"),
        ("next_continues", ".00..00..010...."),
        ("next_punctuation", ".01100110000000."),
        ("next_newline", ".00000000001000."),
        ("sentence_end", "...00..00......."),
        ("in_quotation", "..0...1..000...0"),
        ("second_half", ".000000011111111"),
        ("seen_before", ".000000000000000"),
    ],
)
def test_labels_of_a_text_written_out(task: str, expected: str) -> None:
    assert asked(task, TEXT, width=16) == expected


def test_every_task_has_a_question_and_labels() -> None:
    vocabulary, rows = rows_of(TEXT, width=16)
    assert list(labels(vocabulary, rows, frozenset())) == list(TASKS)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([" end", ".", " The"], "..1."),
        ([" end", ".", " the"], "..0."),
        ([" end", "?", "\n"], "..1."),
        ([" end", '."', " The"], "..1."),
        ([" end", ",", " The"], "..0."),
        ([" U", ".", "S"], "..1."),  # what text alone cannot tell
    ],
)
def test_ends_of_sentences(pieces: list[str], expected: str) -> None:
    assert asked("sentence_end", pieces, width=4) == expected


def test_neighbours_are_not_sought_across_rows() -> None:
    """`ing` opens the second row: there it continues nothing, and `end` is not asked whether it is continued."""
    assert asked("next_continues", [" end", "ing", " a"], width=2) == "..0."
    assert asked("word_start", [" end", "ing", " a"], width=2) == ".1.1"


def test_neighbours_are_not_sought_across_documents() -> None:
    rows = Rows(np.array([[0, 1, 0, 1]]), np.array([[0, 0, 0, 1]]))
    found = labels([" end", "ing"], rows, frozenset())
    assert found["next_continues"].tolist() == [1, 0, -1, -1]
    assert found["word_start"].tolist() == [1, 0, 1, -1]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([[" a", ' "', " b", '"', " c"]], ".0.1.0"),
        ([[" a", " “", " b", "\n", " c", "”", " d"]], ".0.1.1.0"),
        ([[' "', " b", "\n\n", " c", '"', " d"]], "..1.0.1"),  # the mark opens again in the new paragraph
        ([[' "', " b", "\n", "\n", " c"]], "..1..0"),
        ([[' "', " b"], [" c", " d"]], "..1.00"),  # a new document
    ],
)
def test_quotations_open_close_and_end_with_the_paragraph(texts: list[list[str]], expected: str) -> None:
    assert asked("in_quotation", *texts, width=len(expected)) == expected


def test_a_token_is_seen_before_within_its_row_only() -> None:
    assert asked("seen_before", [" a", " b", " a", " a", " a", " b", " b"], width=4) == ".0010101"


def reader(order: list[int], scales: list[float] | None = None) -> SAE:
    """An SAE whose feature i is ReLU of coordinate `order[i]`, times a scale that the decoder undoes."""
    n = len(order)
    rows, scale_F = torch.eye(n)[order], torch.tensor(scales or [1.0] * n)
    tensors = {
        "W_enc": rows.T * scale_F,
        "b_enc": torch.zeros(n),
        "W_dec": rows / scale_F[:, None],
        "b_dec": torch.zeros(n),
    }
    return SAE(SAEConfig(n, n, None, None, None, True, False, True), tensors)


def made(
    n: int, documents: int, answer: Callable[[NDArray[np.int8]], Tensor]
) -> tuple[Tensor, list[Sample], NDArray[np.int64]]:
    """Activations of n tokens in turn labelled 0 and 1: what `answer` says, and four coordinates of noise."""
    label_n = (np.arange(n) % 2).astype(np.int8)
    document_n = np.arange(n) // 2 % documents
    noise_n4 = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    x_nD = torch.cat([answer(label_n)[:, None], noise_n4], dim=1)
    return x_nD, choose({"digit": label_n}, document_n, seed=0), document_n


def found_by(sae: SAE, x_nD: Tensor, samples: list[Sample], document_n: NDArray[np.int64]) -> dict[str, Measured]:
    return probe(sae, samples, lambda places: x_nD[places], document_n, seed=0).metrics


def test_a_feature_that_is_the_label_is_found_and_is_always_right() -> None:
    x_nD, samples, document_n = made(4000, 40, lambda label_n: torch.from_numpy(3.0 * label_n).float())
    result = probe(reader([2, 1, 0, 3, 4]), samples, lambda places: x_nD[places], document_n, seed=0)
    assert result.tasks[0].features[0] == 2
    assert [result.metrics[f"probing_{column}"] for column in COLUMNS] == [Measured(1.0, 1.0, 1.0)] * 4
    assert result.metrics["probing_tasks"] == Measured(1.0)
    assert (result.tasks[0].train, result.tasks[0].test, result.tasks[0].documents) == (1000, 1000, 20)


def test_a_feature_that_is_strong_everywhere_is_not_chosen() -> None:
    """What counts is the difference between the labels, not the size."""
    x_nD, samples, document_n = made(4000, 40, lambda label_n: torch.from_numpy(label_n).float())
    x_nD[:, 1] = 50
    result = probe(reader([0, 1, 2, 3, 4]), samples, lambda places: x_nD[places], document_n, seed=0)
    assert result.tasks[0].features[0] == 0
    assert result.metrics["probing_k1"].value == 1.0


def test_a_feature_that_fires_for_three_of_five_positives_is_right_four_times_in_five() -> None:
    """Never at a 0 and at 60 % of the 1s: firing means 1, silence 0; of a balanced sample 80 % come out right."""
    fires = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0, 0]).repeat(400).float()
    x_nD, samples, document_n = made(4000, 50, lambda label_n: fires)
    test_n, label_n = samples[0].test_n, samples[0].test_labels_n
    expected = float((fires[test_n].numpy() == label_n).mean())
    found = found_by(reader([0, 1, 2, 3, 4]), x_nD, samples, document_n)["probing_k1"]
    assert found.value == pytest.approx(expected)
    assert 0.75 < expected < 0.85
    assert found.lo is not None and found.hi is not None and found.lo < 0.8 < found.hi


def test_without_information_the_probe_is_at_chance() -> None:
    x_nD, samples, document_n = made(4000, 40, lambda label_n: torch.zeros(len(label_n)))
    for name, (value, lo, hi) in found_by(reader([0, 1, 2, 3, 4]), x_nD, samples, document_n).items():
        if name != "probing_tasks":
            assert value is not None and lo is not None and hi is not None
            assert lo < 0.5 < hi and abs(value - 0.5) < 0.06


def test_more_features_or_the_whole_activation_say_more() -> None:
    """The label is the sign of a sum of five coordinates: each helps."""
    x_nD = torch.randn(6000, 5, generator=torch.Generator().manual_seed(1))
    label_n = (x_nD.sum(1) > 0).numpy().astype(np.int8)
    document_n = np.arange(6000) % 60
    found = found_by(reader([0, 1, 2, 3, 4]), x_nD, choose({"digit": label_n}, document_n, seed=0), document_n)
    values = [found[f"probing_{column}"].value or 0 for column in COLUMNS]
    assert values == sorted(values)
    assert values[0] < 0.75 and values[-1] > 0.95


def test_the_order_of_features_and_their_scale_do_not_matter() -> None:
    x_nD, samples, document_n = made(1200, 40, lambda label_n: torch.from_numpy(label_n + 0.0).float() * torch.rand(1))
    expected = found_by(reader([0, 1, 2, 3, 4]), x_nD, samples, document_n)
    assert found_by(reader([4, 0, 3, 1, 2]), x_nD, samples, document_n) == expected
    assert found_by(reader([0, 1, 2, 3, 4], [0.25, 64.0, 1.0, 8.0, 2.0]), x_nD, samples, document_n) == expected
    assert found_by(reader([0, 1, 2, 3, 4]), 4 * x_nD, samples, document_n) == expected


def test_samples_are_balanced_and_documents_are_never_shared() -> None:
    generator = np.random.default_rng(0)
    label_n, document_n = generator.integers(-1, 2, 9000).astype(np.int8), generator.integers(0, 30, 9000)
    [sample] = choose({"digit": label_n}, document_n, seed=5)
    for places, given in ((sample.train_n, sample.train_labels_n), (sample.test_n, sample.test_labels_n)):
        assert len(places) == len(set(places)) == 2 * PER_CLASS
        assert (label_n[places] == given).all() and given.sum() == PER_CLASS
    assert not set(document_n[sample.train_n]) & set(document_n[sample.test_n])
    [again], [other] = (choose({"digit": label_n}, document_n, seed=seed) for seed in (5, 6))
    assert (again.train_n == sample.train_n).all() and (again.test_n == sample.test_n).all()
    assert set(other.test_n) != set(sample.test_n)


@pytest.mark.parametrize(("positives", "defined"), [(2 * FEWEST_PER_CLASS - 2, False), (2 * FEWEST_PER_CLASS, True)])
def test_a_task_with_too_few_tokens_is_undefined_and_counts_in_no_mean(positives: int, defined: bool) -> None:
    """Document 0 and 1 hold half of the positives each."""
    common_n = (np.arange(4000) % 2).astype(np.int8)
    rare_n = np.zeros(4000, dtype=np.int8)
    rare_n[:positives] = 1
    document_n = np.arange(4000) // 2 % 2
    x_nD = torch.stack([torch.from_numpy(common_n), torch.from_numpy(rare_n)], dim=1).float()
    samples = choose({"digit": common_n, "word_start": rare_n}, document_n, seed=0)
    result = probe(reader([0, 1]), samples, lambda places: x_nD[places], document_n, seed=0)
    assert result.metrics["probing_tasks"] == Measured(2.0 if defined else 1.0)
    assert result.metrics["probing_k1"].value == 1.0
    assert (result.tasks[1].accuracy["k1"].value is None) == (not defined)
    assert result.metrics["probing_k1"].lo is None  # two documents are too few for an interval


def test_without_any_task_all_is_undefined_and_nothing_is_read() -> None:
    def never(places: NDArray[np.int64]) -> Tensor:
        raise AssertionError("read")

    samples = choose({"digit": np.full(100, -1, dtype=np.int8)}, np.arange(100), seed=0)
    result = probe(reader([0]), samples, never, np.arange(100), seed=0)
    assert {result.metrics[f"probing_k{k}"] for k in KS} == {Measured(None)}
    assert result.metrics["probing_tasks"] == Measured(0.0)
    assert result.tasks[0].accuracy["raw"] == Measured(None)


@pytest.mark.parametrize("documents", [2 * FEWEST - 2, 2 * FEWEST])
def test_an_interval_needs_ten_test_documents(documents: int) -> None:
    x_nD, samples, document_n = made(4000, documents, lambda label_n: torch.from_numpy(label_n).float())
    found = found_by(reader([0, 1, 2, 3, 4]), x_nD, samples, document_n)["probing_k1"]
    assert (found.lo is not None) == (documents == 2 * FEWEST)


def test_a_dead_sae_is_at_chance_beside_a_raw_probe_that_is_right() -> None:
    x_nD, samples, document_n = made(1200, 40, lambda label_n: torch.from_numpy(label_n).float())
    sae = reader([0, 1, 2, 3, 4])
    sae.b_enc[:] = -100
    found = found_by(sae, x_nD, samples, document_n)
    assert found["probing_k5"].value == 0.5
    assert found["probing_raw"].value == 1.0
