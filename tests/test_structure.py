"""Decoder structure: cosines known by construction, and dictionaries whose parts are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saezoo.evals import structure as module
from saezoo.evals.structure import meta_explained, neighbours, structure
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig


def sae_of(decoder_FD: Tensor) -> SAE:
    n, d = decoder_FD.shape
    tensors = {"W_enc": decoder_FD.T.clone(), "b_enc": torch.zeros(n), "W_dec": decoder_FD, "b_dec": torch.zeros(d)}
    return SAE(SAEConfig(d, n, None, None, None, True, False, True), tensors)


def unit_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(
    ("decoder", "cosine", "close"),
    [
        (torch.eye(5), 0.0, 0.0),
        (torch.eye(5).repeat(2, 1), 1.0, 1.0),
        (torch.cat([torch.eye(3), -torch.eye(3)]), 0.0, 0.0),  # opposite is not near
        (torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]), (0.6 + 0.6 - 0.6) / 3, 0.0),
        (torch.tensor([[2.0, 0.0], [0.0, 0.0], [7.0, 0.0]]), 1.0, 1.0),  # a zero row has no direction
        (torch.tensor([[1.0, 0.0], [-5.0, 0.0]]), -1.0, 0.0),
    ],
)
def test_neighbours_known_by_construction(decoder: Tensor, cosine: float, close: float) -> None:
    found = structure(sae_of(decoder), steps=0)
    assert found["neighbour_cosine"].value == pytest.approx(cosine, abs=1e-6)
    assert found["neighbour_close"].value == pytest.approx(close)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(1, 2000), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_blocks_of_any_size_find_what_the_whole_matrix_holds(n: int, d: int, block_bytes: int, seed: int) -> None:
    w_FD = unit_rows(n, d, seed)
    full_FF = (w_FD @ w_FD.T).fill_diagonal_(-math.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block_bytes)
        found_F = neighbours(w_FD)
    torch.testing.assert_close(found_F, full_FF.amax(1).clamp(-1, 1), atol=1e-6, rtol=0)


def test_random_directions_are_as_far_apart_as_expected() -> None:
    """The largest of n - 1 cosines with standard deviation 1/sqrt(d) is about sqrt(2 ln n / d), and below it."""
    found = float(neighbours(unit_rows(2000, 100)).mean())
    assert 0.75 * math.sqrt(2 * math.log(2000) / 100) < found < math.sqrt(2 * math.log(2000) / 100)


def test_rows_that_are_one_part_each_are_explained() -> None:
    """Eight directions, eight times each: sixteen meta-features are enough to hold them all."""
    found = meta_explained(F.normalize(unit_rows(8, 16).repeat(8, 1), dim=1), steps=400)
    assert found is not None and found > 0.98


def test_sums_of_shared_parts_are_explained_better_than_directions_of_their_own() -> None:
    """128 rows that each mix two of 12 parts, beside 128 random rows of the same width."""
    generator = torch.Generator().manual_seed(0)
    pairs_F2 = torch.stack([torch.randperm(12, generator=generator)[:2] for _ in range(128)])
    mixed_FD = F.normalize(unit_rows(12, 64)[pairs_F2].sum(1), dim=1)
    mixed, alone = (meta_explained(w_FD, steps=300) for w_FD in (mixed_FD, unit_rows(128, 64)))
    assert mixed is not None and alone is not None
    assert mixed > 0.9
    assert alone < 0.6


def test_one_seed_gives_one_result_and_the_scale_of_a_row_does_not_matter() -> None:
    rows_FD = unit_rows(40, 12)
    scales_F1 = 2.0 ** torch.arange(40)[:, None].remainder(7)
    torch.manual_seed(1)
    first = structure(sae_of(rows_FD), seed=3, steps=30)
    torch.manual_seed(2)  # the global generator is neither read nor moved
    assert structure(sae_of(rows_FD), seed=3, steps=30) == first
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(2))
    scaled = structure(sae_of(rows_FD * scales_F1), seed=3, steps=30)
    other = structure(sae_of(rows_FD), seed=4, steps=30)
    for name, measured in first.items():
        assert scaled[name].value == pytest.approx(measured.value, rel=1e-4)
    assert other["meta_explained"] != first["meta_explained"]


def test_the_order_of_features_changes_no_neighbour() -> None:
    rows_FD = unit_rows(40, 12)
    order_F = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(neighbours(rows_FD[order_F]), neighbours(rows_FD)[order_F])


def test_no_gradient_is_left_and_inference_mode_does_not_disturb() -> None:
    sae = sae_of(unit_rows(20, 8))
    expected = meta_explained(sae.W_dec.detach(), steps=5)
    with torch.inference_mode():
        assert meta_explained(sae.W_dec.detach(), steps=5) == expected
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_the_number_kept_is_four_a_row_on_average() -> None:
    meta = module._MetaSAE(unit_rows(64, 16), torch.Generator().manual_seed(0))
    row_P, feature_P = meta.chosen(meta.rows_FD)
    assert len(row_P) == 4 * 64
    strength_BM = meta.strengths(meta.rows_FD)
    left_BM = strength_BM.clone()
    left_BM[row_P, feature_P] = 0
    assert left_BM.max() <= strength_BM[row_P, feature_P].min()


def test_only_the_kept_pairs_are_summed() -> None:
    """The sparse reconstruction is the dense formula with everything else set to zero."""
    meta = module._MetaSAE(unit_rows(64, 16), torch.Generator().manual_seed(0))
    x_BD = unit_rows(20, 16, seed=1)
    row_P, feature_P = meta.chosen(x_BD)
    keep_BM = torch.zeros(20, 16, dtype=torch.bool)
    keep_BM[row_P, feature_P] = True
    f_BM = F.relu((x_BD - meta.b_dec_D) @ meta.enc_MD.T + meta.b_enc_M) * keep_BM
    torch.testing.assert_close(meta.reconstruct(x_BD, row_P, feature_P), f_BM @ meta.dec_MD + meta.b_dec_D)


def test_the_final_error_keeps_four_a_row_of_all_rows() -> None:
    """2,100 rows are three blocks: the strongest of all together are kept, not those of each block."""
    meta = module._MetaSAE(unit_rows(2100, 8), torch.Generator().manual_seed(0))
    strength_FM = meta.strengths(meta.rows_FD)
    least = strength_FM.flatten().topk(4 * 2100).values[-1]
    f_FM = F.relu((meta.rows_FD - meta.b_dec_D) @ meta.enc_MD.T + meta.b_enc_M) * (strength_FM >= least)
    expected = (meta.rows_FD - f_FM @ meta.dec_MD - meta.b_dec_D).square().sum()
    assert meta.squared_error() == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("decoder", [torch.ones(1, 4), torch.zeros(3, 4), torch.eye(3)[:1].repeat(2, 1) * 0])
def test_fewer_than_two_directions_have_no_structure(decoder: Tensor) -> None:
    assert set(structure(sae_of(decoder)).values()) == {Measured(None)}


def test_one_direction_many_times_is_near_and_has_no_variance() -> None:
    found = structure(sae_of(torch.tensor([[0.6, 0.8]]).repeat(5, 1)))
    assert found["neighbour_cosine"].value == pytest.approx(1)
    assert found["meta_explained"].value is None
