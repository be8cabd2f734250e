"""Description length: bits counted by hand, and what must not change them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saezoo.evals.description_length import LEVELS, NAMES, TOLERANCE, Batches, _jackknife, description_length, entropy
from saezoo.evals.intervals import GROUPS
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig


def reader(n: int, *, scale: float = 1.0, order: list[int] | None = None, centre: bool = False) -> SAE:
    """An SAE whose feature i is ReLU of coordinate `order[i]` (i by default), and writes it back; n coordinates."""
    rows = scale * torch.eye(n)[order or list(range(n))]
    tensors = {"W_enc": rows.T, "b_enc": torch.zeros(n), "W_dec": rows / scale**2, "b_dec": torch.zeros(n)}
    return SAE(SAEConfig(n, n, None, None, None, True, centre, True), tensors)


def batches(x_nD: Tensor, size: int = 7) -> Batches:
    """Each token a document of its own."""

    def give() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(x_nD), size):
            part = x_nD[start : start + size]
            yield part, torch.arange(start, start + len(part))

    return give


def value(measured: Measured) -> float:
    assert measured.value is not None
    return measured.value


def test_two_features_that_fire_half_the_time_cost_two_bits() -> None:
    x_nD = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0], [3.0, 5.0]]).repeat(16, 1)
    found = description_length(reader(2), batches(x_nD))
    assert value(found["description_length"]) == pytest.approx(2.0, abs=1e-12)
    assert value(found["description_levels"]) == 1
    assert value(found["description_loss"]) == pytest.approx(0.0, abs=1e-12)


def test_five_equally_frequent_values_cost_log_five() -> None:
    """0 to 4: with one or two levels the 1 would be read as 0 or 2, so four levels are needed."""
    found = description_length(reader(1), batches(torch.arange(5.0).repeat(20)[:, None]))
    assert value(found["description_length"]) == pytest.approx(math.log2(5), abs=1e-12)
    assert value(found["description_levels"]) == 4


def test_always_on_with_one_value_and_never_on_cost_nothing() -> None:
    x_nD = torch.stack([torch.full((64,), 2.0), torch.full((64,), -1.0), torch.arange(64.0) % 2], dim=1)
    found = description_length(reader(3), batches(x_nD))
    assert value(found["description_length"]) == pytest.approx(1.0, abs=1e-12)


def test_a_rare_feature_costs_its_binary_entropy() -> None:
    x_nD = (torch.arange(160) % 16 == 0).float()[:, None]
    p = 1 / 16
    expected = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert value(description_length(reader(1), batches(x_nD))["description_length"]) == pytest.approx(expected)


def by_hand(x_nD: Tensor) -> tuple[float, int] | None:
    """(bits, levels) by the definition, one number at a time, for `reader`."""
    rows: list[list[float]] = x_nD.double().tolist()
    f = [[max(0.0, v) for v in row] for row in rows]
    n, width = len(f), len(f[0])
    largest = [max(row[i] for row in f) for i in range(width)]
    means = [sum(row[i] for row in rows) / n for i in range(width)]
    variance = sum((row[i] - means[i]) ** 2 for row in rows for i in range(width))
    before = sum((x - y) ** 2 for row, out in zip(rows, f, strict=True) for x, y in zip(row, out, strict=True))
    for levels in LEVELS:
        symbols = [[round(levels * v / m) if m else 0 for v, m in zip(row, largest, strict=True)] for row in f]
        after = sum(
            (row[i] - q[i] * largest[i] / levels) ** 2
            for row, q in zip(rows, symbols, strict=True)
            for i in range(width)
        )
        if (after - before) / variance <= TOLERANCE:
            counts = [Counter(q[i] for q in symbols).values() for i in range(width)]
            return -sum(c / n * math.log2(c / n) for column in counts for c in column), levels
    return None


@given(st.lists(st.lists(st.integers(-6, 12), min_size=3, max_size=3), min_size=4, max_size=40))
@settings(deadline=None, max_examples=60)
def test_it_is_the_definition(values: list[list[int]]) -> None:
    """Whole numbers to 12 over a maximum: shares that lie on a rounding border are the same in single precision."""
    x_nD = torch.tensor(values, dtype=torch.float64)
    if float((x_nD - x_nD.mean(0)).square().sum()) == 0:
        return
    sae = reader(3).double()
    found, expected = description_length(sae, batches(x_nD)), by_hand(x_nD)
    if expected is None:
        assert found["description_length"].value is None
    else:
        assert value(found["description_length"]) == pytest.approx(expected[0], abs=1e-9)
        assert value(found["description_levels"]) == expected[1]


def signals(n: int = 400, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator).abs() * (torch.rand(n, width, generator=generator) < 0.3)


def assert_same(found: dict[str, Measured], expected: dict[str, Measured]) -> None:
    """Equal up to the rounding of single precision."""
    for name in NAMES:
        assert value(found[name]) == pytest.approx(value(expected[name]), rel=1e-4)
    for end in ("lo", "hi"):
        there = getattr(expected["description_length"], end)
        assert getattr(found["description_length"], end) == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_the_batch_size_does_not_matter(size: int) -> None:
    x_nD = signals()
    expected, found = (description_length(reader(6), batches(x_nD, s)) for s in (50, size))
    assert_same(found, expected)


def test_neither_the_order_of_features_nor_their_scale_nor_that_of_activations_matters() -> None:
    x_nD = signals()
    expected = description_length(reader(6), batches(x_nD))
    for sae, x in (
        (reader(6, order=[3, 1, 5, 0, 2, 4]), x_nD),
        (reader(6, scale=4.0), x_nD),
        (reader(6), 8 * x_nD),
    ):
        found = description_length(sae, batches(x))
        assert_same(found, expected)


def test_a_centred_sae_does_not_see_what_all_coordinates_share() -> None:
    x_nD = signals()
    sae = reader(6, centre=True)
    expected, found = (description_length(sae, batches(x)) for x in (x_nD, x_nD + 2 * torch.arange(400.0)[:, None] % 7))
    assert_same(found, expected)


def test_a_feature_that_carries_more_costs_more() -> None:
    """Information per token grows with each independent feature; half-silent ones add one bit each."""
    x_nD = (torch.arange(256)[:, None] >> torch.arange(8)[None] & 1).float()
    bits = [value(description_length(reader(k), batches(x_nD[:, :k]))["description_length"]) for k in range(1, 9)]
    assert bits == pytest.approx([1.0 * k for k in range(1, 9)], abs=1e-9)


def test_the_interval_needs_documents_in_every_group_and_holds_the_value() -> None:
    few = description_length(reader(6), batches(signals(GROUPS - 1)))["description_length"]
    assert (few.lo, few.hi) == (None, None)
    bits, lo, hi = description_length(reader(6), batches(signals()))["description_length"]
    assert bits is not None and lo is not None and hi is not None
    assert 0 < lo < bits < hi < 2 * bits


@pytest.mark.parametrize(
    "x_nD",
    [torch.zeros(0, 2), torch.ones(40, 2), torch.zeros(40, 2), torch.full((40, 2), math.inf)],
    ids=["no tokens", "constant", "zero", "infinite"],
)
def test_what_has_no_variance_has_no_description_length(x_nD: Tensor) -> None:
    assert description_length(reader(2), batches(x_nD)) == dict.fromkeys(NAMES, Measured(None))


def test_what_no_number_of_levels_can_send_is_undefined() -> None:
    """One value of 300 sets the scale; 4,000 values below 1 are all rounded away, and were 1.5 % of the variance."""
    x_nD = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    outlier = torch.full((1, 1), 300.0)
    assert value(description_length(reader(1), batches(x_nD, 500))["description_levels"]) <= 16
    found = description_length(reader(1), batches(torch.cat([x_nD, outlier]), 500))
    assert found == dict.fromkeys(NAMES, Measured(None))


def test_entropy_of_counts() -> None:
    """Half silent, a quarter each of two symbols: 1.5 bits; all one symbol: none."""
    assert entropy(torch.tensor([[1, 1], [4, 0]]), 4.0) == pytest.approx(1.5)


def drawn(documents: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Counts [G, F, S] and tokens [G] of documents of 64 tokens, each with firing rates of its own; S = 2."""
    rates_NF = torch.logspace(-2.5, -0.7, 20, dtype=torch.float64) * torch.empty(
        documents, 20, dtype=torch.float64
    ).exponential_(generator=generator)
    fires_NF = torch.binomial(torch.full_like(rates_NF, 64), rates_NF.clamp(max=0.9), generator=generator)
    high_NF = torch.binomial(fires_NF, torch.full_like(fires_NF, 0.3), generator=generator)
    counts_NFS = torch.stack([fires_NF - high_NF, high_NF], dim=2)
    group_N = torch.arange(documents) % GROUPS
    counts_GFS = torch.zeros(GROUPS, 20, 2, dtype=torch.float64).index_add_(0, group_N, counts_NFS)
    return counts_GFS, torch.bincount(group_N, minlength=GROUPS) * 64.0


def test_the_interval_covers_the_truth_as_often_as_it_claims() -> None:
    """300 samples of 128 documents, against the entropy of 100,000; 95 % claimed, 3 standard errors are 3.8 %."""
    generator = torch.Generator().manual_seed(0)
    counts_GFS, tokens_G = drawn(100_000, generator)
    truth = entropy(counts_GFS.sum(0), float(tokens_G.sum()))
    found = [_jackknife(*drawn(128, generator)) for _ in range(300)]
    covered = sum(m.lo <= truth <= m.hi for m in found if m.lo is not None and m.hi is not None)
    assert 0.91 < covered / 300 < 0.985
