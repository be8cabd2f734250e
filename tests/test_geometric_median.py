"""The geometric median against the routine of February 2024 and against what it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from saezoo import geometric_median as module
from saezoo.geometric_median import geometric_median

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "geometric_median.safetensors")


def cloud(seed: int, n: int = 60, d: int = 4) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "case, precision, tolerance",
    [("cloud", "f32", 1e-4), ("cloud", "f64", 1e-9), ("bimodal", "f32", 2e-2), ("bimodal", "f64", 1e-8)],
)
def test_result_of_2024(golden: dict[str, Tensor], case: str, precision: str, tolerance: float) -> None:
    median_D = geometric_median(golden[f"{case}.points"].to(DTYPES[precision]))
    assert median_D.dtype == DTYPES[precision]
    assert float((median_D - golden[f"{case}.{precision}.median"]).abs().max()) < tolerance


def test_b_dec_of_the_recorded_training_run() -> None:
    run = load_file(GOLDEN / "train_feb2024.safetensors")
    torch.testing.assert_close(geometric_median(run["in.storage"]), run["in.b_dec_init"], atol=2e-6, rtol=0)


def test_an_odd_number_of_points_on_a_line_has_their_median() -> None:
    along_N1 = torch.tensor([[-9.0], [-1.0], [2.0], [3.0], [400.0]], dtype=torch.float64)
    direction_D = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(along_N1 * direction_D), 2 * direction_D, atol=1e-3, rtol=0)


def test_symmetric_points_have_their_centre() -> None:
    half_ND = cloud(0) * torch.tensor([1.0, 10.0, 0.1, 3.0])
    centre_D = torch.tensor([5.0, -2.0, 0.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(torch.cat([centre_D + half_ND, centre_D - half_ND])), centre_D)


def test_far_points_pull_no_harder_than_near_ones() -> None:
    points_ND = cloud(1, n=101)
    far_ND = torch.full((10, 4), 3000.0, dtype=torch.float64)
    moved = float((geometric_median(torch.cat([points_ND, far_ND])) - geometric_median(points_ND)).norm())
    assert moved < 1 < float((torch.cat([points_ND, far_ND]).mean(0) - points_ND.mean(0)).norm())


def test_no_other_point_is_nearer_on_average() -> None:
    points_ND = cloud(2)
    median_D = geometric_median(points_ND)
    least = (points_ND - median_D).norm(dim=1).mean()
    for step_D in 1e-3 * cloud(3, n=20):
        assert (points_ND - median_D - step_D).norm(dim=1).mean() > least


def test_equal_points_are_their_own_median() -> None:
    points_ND = torch.full((7, 3), 2.5)
    assert torch.equal(geometric_median(points_ND), points_ND[0])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.floats(-50, 50), st.floats(0.01, 100))
def test_it_moves_and_scales_with_the_points(seed: int, shift: float, scale: float) -> None:
    points_ND = cloud(seed)
    wanted_D = geometric_median(points_ND) * scale + shift
    torch.testing.assert_close(geometric_median(points_ND * scale + shift), wanted_D, rtol=1e-6, atol=1e-6 * scale)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_the_order_of_the_points_does_not_matter(seed: int) -> None:
    points_ND = cloud(seed)
    shuffled_ND = points_ND[torch.randperm(len(points_ND), generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(geometric_median(shuffled_ND), geometric_median(points_ND), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 59, 60])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole_D = geometric_median(cloud(4))
    monkeypatch.setattr(module, "_CHUNK", chunk)
    torch.testing.assert_close(geometric_median(cloud(4)), whole_D, rtol=1e-12, atol=1e-12)


def test_a_looser_tolerance_stops_earlier(golden: dict[str, Tensor]) -> None:
    points_ND, exact_D = golden["cloud.points"].double(), golden["cloud.f64.median"]
    loose, looser = (float((geometric_median(points_ND, ftol=ftol) - exact_D).norm()) for ftol in (1e-9, 1e-3))
    assert loose < 1e-3 < looser


def test_no_iterations_give_the_mean() -> None:
    torch.testing.assert_close(geometric_median(cloud(5), max_iterations=0), cloud(5).mean(0))
