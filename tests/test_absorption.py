"""First-letter absorption: SAEs in which it is known which words are absorbed, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from saezoo.evals.absorption import (
    FEWEST_LETTERS,
    FEWEST_WORDS,
    LETTERS,
    Absorption,
    _fraction,
    _test_words,
    _Words,
    absorption,
    pieces,
    prompts,
)
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import package_folder
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig

WORDS = 30  # of each letter
MARKED = 12  # of these the first ones of letter a carry a direction of their own


def letters(n: int = 26) -> NDArray[np.int64]:
    return np.repeat(np.arange(n), WORDS)


def activations(n: int = 26) -> Tensor:
    """[W, 26 + MARKED]: a word is the unit vector of its letter; a marked word also has its own unit vector."""
    x_WD = torch.zeros(n * WORDS, 26 + MARKED)
    x_WD[torch.arange(n * WORDS), torch.from_numpy(letters(n))] = 1
    x_WD[torch.arange(MARKED), 26 + torch.arange(MARKED)] = 1
    return x_WD


def absorbing(share: float, *, centre: bool = False) -> SAE:
    """One feature a letter and one a marked word, which takes over `share` of what the feature for `a` should say."""
    d = 26 + MARKED
    w_enc_DF, w_dec_FD = torch.eye(d), torch.eye(d)
    w_enc_DF[26:, 0] = -share  # the feature for `a` hears of the mark
    w_dec_FD[26:, 0] = share
    tensors = {"W_enc": w_enc_DF, "b_enc": torch.zeros(d), "W_dec": w_dec_FD, "b_dec": torch.zeros(d)}
    return SAE(SAEConfig(d, d, None, None, None, True, centre, True), tensors)


def absorbed_share(seed: int) -> float:
    """Of the test words of letter a, the share that is marked."""
    test_W = _test_words(letters(), seed)
    share = float(test_W[:MARKED].sum() / test_W[:WORDS].sum())
    assert 0 < share < 1
    return share


def test_words_taken_over_by_their_own_feature_are_fully_absorbed() -> None:
    found = absorption(absorbing(1.0), activations(), letters(), seed=0)
    rows = {row.letter: row for row in found.letters}
    assert rows["a"].full == rows["a"].fraction == pytest.approx(absorbed_share(0))
    assert rows["a"].split_features == (0,)
    assert {(row.full, row.fraction) for letter, row in rows.items() if letter != "a"} == {(0.0, 0.0)}
    assert found.metrics["absorption_full"].value == pytest.approx(absorbed_share(0) / 26)
    assert found.metrics["absorption_fraction"].value == pytest.approx(absorbed_share(0) / 26)
    assert found.metrics["absorption_letters"] == Measured(26.0)
    assert found.metrics["absorption_splits"] == Measured(0.0)


def test_words_taken_over_by_half_are_half_absorbed_and_none_fully() -> None:
    found = absorption(absorbing(0.5), activations(), letters(), seed=0)
    assert found.letters[0].full == 0.0
    assert found.letters[0].fraction == pytest.approx(absorbed_share(0) / 2, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_below_two_fifths_nothing_is_absorbed(share: float) -> None:
    found = absorption(absorbing(share), activations(), letters(), seed=0)
    assert {(row.full, row.fraction) for row in found.letters} == {(0.0, 0.0)}
    assert found.metrics["absorption_full"] == Measured(0.0, 0.0, 0.0)


def test_a_letter_in_two_features_is_split_not_absorbed() -> None:
    """Words of `a` with and without a mark that all marked words share: one feature each, both are found."""
    x_WD = activations()
    x_WD[:, 26:] = 0
    x_WD[: WORDS // 2, 26] = 1
    sae = absorbing(1.0)
    test_W = _test_words(letters(), 0)
    assert 0 < test_W[: WORDS // 2].sum() < test_W[:WORDS].sum()
    found = absorption(sae, x_WD, letters(), seed=0)
    assert set(found.letters[0].split_features) == {0, 26}
    assert found.letters[0].full == 0.0
    assert found.metrics["absorption_splits"].value == pytest.approx(1 / 26)


def assert_same(found: Absorption, expected: Absorption) -> None:
    for name, measured in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(measured, abs=1e-5)


def test_order_and_scale_of_features_scale_of_activations_and_a_constant_do_not_matter() -> None:
    sae, x_WD = absorbing(0.5), activations()
    expected = absorption(sae, x_WD, letters(), seed=0)
    order_F = torch.randperm(sae.config.d_sae, generator=torch.Generator().manual_seed(0))
    one_F, scale_F = torch.ones(len(order_F)), 2.0 ** (torch.arange(len(order_F)) % 21 - 10)
    for scale, shift, factor in ((one_F, 0.0, 1.0), (scale_F, 0.0, 1.0), (one_F, 2.0, 1.0), (one_F, 0.0, 16.0)):
        tensors = {
            "W_enc": sae.W_enc[:, order_F] * scale,
            "b_enc": sae.b_enc[order_F],
            "W_dec": sae.W_dec[order_F] / scale[:, None],
            "b_dec": torch.linspace(-1, 1, sae.config.d_in) * shift,
        }
        other = SAE(sae.config, tensors)
        assert_same(absorption(other, x_WD * factor + other.b_dec, letters(), seed=0), expected)


def test_a_centred_sae_does_not_see_what_all_coordinates_share() -> None:
    sae, x_WD = absorbing(1.0, centre=True), activations()
    common_W1 = torch.randn(len(x_WD), 1, generator=torch.Generator().manual_seed(0))
    assert_same(absorption(sae, x_WD + common_W1, letters(), seed=0), absorption(sae, x_WD, letters(), seed=0))


@pytest.mark.parametrize("n", [FEWEST_LETTERS - 1, FEWEST_LETTERS])
def test_too_few_letters_leave_it_undefined_and_say_so(n: int) -> None:
    found = absorption(absorbing(1.0), activations(n), letters(n), seed=0)
    assert (found.metrics["absorption_full"].value is None) == (n < FEWEST_LETTERS)
    assert found.metrics["absorption_letters"] == Measured(float(n))
    assert found.letters[25].probe_f1 is None and found.letters[25].words == 0


def test_activations_that_know_no_letters_leave_it_undefined() -> None:
    x_WD = torch.randn(26 * WORDS, 38, generator=torch.Generator().manual_seed(0))
    found = absorption(absorbing(0.0), x_WD, letters(), seed=0)
    assert found.metrics["absorption_letters"] == Measured(0.0)
    assert found.metrics["absorption_fraction"] == Measured(None)


def test_an_sae_without_a_feature_for_a_letter_does_not_look_free_of_absorption() -> None:
    sae = absorbing(0.0)
    sae.b_enc[:] = -100
    found = absorption(sae, activations(), letters(), seed=0)
    assert found.metrics["absorption_full"] == Measured(None)
    assert found.letters[0].split_features == () and found.letters[0].sparse_f1 is None
    assert found.letters[0].probe_f1 == 1.0


def test_no_words_at_all() -> None:
    found = absorption(absorbing(0.0), torch.zeros(0, 38), np.zeros(0, dtype=np.int64), seed=0)
    assert found.metrics["absorption_letters"] == Measured(0.0)
    assert [row.letter for row in found.letters] == list(LETTERS)


def test_the_seed_decides_and_the_interval_holds_the_value() -> None:
    first, again, other = (absorption(absorbing(1.0), activations(), letters(), seed=s) for s in (0, 0, 3))
    assert first == again
    assert first != other
    value, lo, hi = first.metrics["absorption_full"]
    assert value is not None and lo is not None and hi is not None
    assert 0 <= lo < value < hi < 2 / 26


@pytest.mark.parametrize(
    ("whole", "main", "absorbers", "expected"),
    [
        (1.0, 0.0, 0.5, 1.0),
        (1.0, -0.1, 0.4, 1.0),
        (1.0, 0.5, 0.5, 0.5),
        (1.0, 0.5, 5.0, 0.5),  # at most what the split features leave
        (1.0, 0.4, 0.4, 0.5),
        (1.0, 0.5, 0.39, 0.0),
        (1.0, 1.0, 5.0, 0.0),
        (0.0, 0.0, 1.0, 0.0),
        (-1.0, -2.0, 1.0, 0.0),
    ],
)
def test_fraction_by_hand(whole: float, main: float, absorbers: float, expected: float) -> None:
    assert _fraction(whole, main, absorbers) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize(
    ("cosines", "contributions", "full", "fraction"),
    [
        # of four features beside the one for the letter, which is silent; the whole projection is 1
        ([0.8, 0.5, 0.5, 0.5], [0.41, 0, 0, 0], 1, 1),
        ([0.8, 0.5, 0.5, 0.5], [0.39, 0, 0, 0], 0, 0),
        ([0.03, 0.5, 0.5, 0.5], [0.6, 0, 0, 0], 1, 0),  # too far from the probe for the fraction
        ([0.02, 0.5, 0.5, 0.5], [0.6, 0, 0, 0], 0, 0),  # and for full absorption
        ([0.5, 0.5, 0.5, 0.5], [0.14, 0.14, 0.14, 0], 0, 1),  # three together count
        ([0.5, 0.5, 0.5, 0.5], [0.13, 0.13, 0.13, 0.13], 0, 0),  # four do not
        ([0.05, 0.5, 0.5, 0.5], [0.5, 0.3, 0, 0], 1, 0),
        ([-0.5, 0.8, 0.5, 0.5], [-0.9, 0.41, 0, 0], 1, 1),
    ],
)
def test_thresholds_by_hand(
    cosines: list[float], contributions: list[float], full: int, fraction: float, scale: float
) -> None:
    """Coordinate 0 is the probe; feature i > 0 reads coordinate i and has the given cosine with the probe."""
    w_dec_FD = torch.eye(5)
    w_dec_FD[1:, 0] = torch.tensor(cosines)
    w_dec_FD[1:].diagonal(1).copy_((1 - torch.tensor(cosines).square()).sqrt())
    w_enc_DF = torch.eye(5)
    w_enc_DF[0, 0] = 0
    tensors = {"W_enc": w_enc_DF * scale, "b_enc": torch.zeros(5), "W_dec": w_dec_FD / scale, "b_dec": torch.zeros(5)}
    sae = SAE(SAEConfig(5, 5, None, None, None, True, False, True), tensors)
    x_WD = torch.tensor([[1.0, *(c / cosine for c, cosine in zip(contributions, cosines, strict=True))]])
    words = _Words(sae, x_WD, np.zeros(1, dtype=np.int64), 0)
    found = words._absorbed(np.array([0]), np.eye(5)[0], np.array([0]))
    assert [rates.tolist() for rates in found] == [[full], [pytest.approx(fraction)]]


def test_nothing_is_absorbed_where_the_probe_sees_nothing() -> None:
    """The same features, but the whole projection is negative."""
    sae = SAE(
        SAEConfig(2, 2, None, None, None, True, False, True),
        {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.ones(2, 2), "b_dec": torch.zeros(2)},
    )
    words = _Words(sae, torch.tensor([[-1.0, 3.0]]), np.zeros(1, dtype=np.int64), 0)
    assert [rates.tolist() for rates in words._absorbed(np.array([0]), np.eye(2)[0], np.array([0]))] == [[0], [0]]


def test_a_fifth_of_each_letter_is_for_testing() -> None:
    letter_W = np.repeat(np.arange(4), [1, 5, 6, 100])
    test_W = _test_words(letter_W, 0)
    assert [int(test_W[letter_W == letter].sum()) for letter in range(4)] == [1, 1, 2, 20]
    assert math.ceil(0.2 * WORDS) >= FEWEST_WORDS


@pytest.fixture(scope="module")
def tiny_lm() -> LanguageModel:
    return load_language_model(package_folder() / "bundled" / "tiny-lm")


def test_prompts_end_in_every_word_of_the_vocabulary(tiny_lm: LanguageModel) -> None:
    tokens_WT, letter_W = prompts(tiny_lm.tokenizer, tiny_lm.vocab, tiny_lm.bos)
    texts = [tiny_lm.tokenizer.decode(row.tolist()) for row in tokens_WT]
    assert len(texts) == len(set(texts)) > 2000
    for text, letter in zip(texts, letter_W, strict=True):
        before, word = text.rsplit(" ", 1)
        assert before == "<|endoftext|>The first letter of the word"
        assert word.isascii() and word.isalpha() and len(word) > 1
        assert word[0].lower() == LETTERS[letter]


def test_pieces_are_the_text_of_single_tokens(tiny_lm: LanguageModel) -> None:
    found = pieces(tiny_lm.tokenizer, tiny_lm.vocab)
    ids = tiny_lm.tokenizer(" The government, 1999.\n", add_special_tokens=False)["input_ids"]
    assert "".join(found[i] for i in ids) == " The government, 1999.\n"
    assert len(found) == tiny_lm.vocab
