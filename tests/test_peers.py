"""Other evaluations, run as they are: where they define a metric as saezoo does they agree; where they are wrong, by
how much. `benchmarks/agreement.py` calls them; docs/agreement.md has its table. SAELens: also test_saelens_peer.py.

None of the three is among the test dependencies; what is not installed is skipped.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saezoo.evals.evaluate import reconstruction_values
from saezoo.evals.intervals import bootstrap
from saezoo.evals.metrics import PER_TOKEN

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")  # the peers', at import and in use
ALIKE = 1e-5


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("agreement")


def installed(module: str) -> Any:
    """The module, or a skip that says what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


def ours(x_nD: Tensor, y_nD: Tensor) -> dict[str, float]:
    """saezoo's metrics of a reconstruction alone, every token a document."""
    sums = {name: torch.ones(len(x_nD), dtype=torch.float64) for name in (*PER_TOKEN, "ce_zero", "ce_mean")}
    sums |= {"ce_unigram": sums["ce_zero"]} | reconstruction_values(x_nD, y_nD)
    return {name: m.value for name, m in bootstrap(sums, x_nD.double(), seed=0).items() if m.value is not None}


def one_large_mean() -> tuple[Tensor, Tensor]:
    """Activations of 768 dimensions with variance 1, one with mean 300, and errors of a quarter of the variance."""
    generator = torch.Generator().manual_seed(0)
    x_nD = torch.randn(1024, 768, generator=generator)
    x_nD[:, 0] += 300
    return x_nD, x_nD + 0.5 * torch.randn(1024, 768, generator=generator)


def test_a_large_mean_does_not_flatter_saezoo() -> None:
    found = ours(*one_large_mean())
    assert found["explained_variance"] == pytest.approx(0.75, abs=1e-3)
    assert found["mse"] == pytest.approx(0.25 * 768, rel=1e-2)
    assert found["explained_variance_uncentred"] > 0.997  # which is what not subtracting the mean does


def test_a_large_mean_flatters_saebench(agreement: Any) -> None:
    """It puts E[x^2] where E[x] belongs, so that 0.75 becomes 0.9975; and divides by the number of tokens twice."""
    installed("sae_bench.evals.core.main")
    found = agreement.one_large_mean()
    assert found["truth"] == pytest.approx(0.75, abs=1e-3)
    assert found["explained_variance"] == pytest.approx(0.9975, abs=1e-4)
    assert found["mse"] == pytest.approx(found["true mse"] / 1024, rel=1e-4)


def test_saebench_agrees_on_all_else(agreement: Any) -> None:
    installed("sae_bench.evals.core.main")
    mine, theirs = agreement.run_saezoo("golden"), agreement.run_sae_bench("golden")
    for protocol in ("feb2024", "standard"):
        wrong = {name for name, value in theirs[protocol].items() if not alike(value, mine[protocol][name])}
        assert wrong == {"explained_variance", "mse"}
        tokens = (1152 if protocol == "feb2024" else 1132) / 3  # of a batch; batches differ by the special ones
        assert theirs[protocol]["mse"] * tokens == pytest.approx(mine[protocol]["mse"], rel=5e-3)
        assert len(theirs[protocol]) == 16


def test_saelens_agrees_and_has_a_loader_of_its_own(agreement: Any) -> None:
    """On the same tokens all metrics agree; its own loader gives cross-entropy and sparsity different ones."""
    installed("sae_lens")
    mine, theirs = agreement.run_saezoo("golden"), agreement.run_saelens("golden")
    for protocol in ("feb2024", "standard"):
        assert [name for name, value in theirs[protocol].items() if not alike(value, mine[protocol][name])] == []
    assert theirs["loader"] == {"rows of cross-entropy": 3, "of these also of sparsity": 0}


def test_dictionary_learning_agrees_but_for_its_own_definitions(agreement: Any) -> None:
    """Its score is the mean of the batches' scores, its explained variance another quantity. By default it takes the
    end of text for padding, and leaves out the loss of predicting it."""
    installed("dictionary_learning.evaluation")
    mine, theirs = agreement.run_saezoo("golden")["feb2024"], agreement.run_dictionary_learning("golden")
    other = {name: value for name, value in theirs["feb2024"].items() if not alike(value, mine[name], 1e-6)}
    assert set(other) == {"ce_score", "explained_variance"}
    assert other["ce_score"] == pytest.approx(mine["ce_score"], rel=1e-4)
    padded = theirs["feb2024, end of text is padding"]
    assert mine["ce_clean"] - padded["ce_clean"] > 0.04


def alike(a: float, b: float, relative: float = ALIKE) -> bool:
    return a == pytest.approx(b, rel=relative)


class Always:
    """A dictionary of dictionary_learning that adds 3 to everything; feature i fires where x_i is above 2.5."""

    dict_size = 8

    def __call__(self, x_nD: Tensor, output_features: bool) -> tuple[Tensor, Tensor]:
        return x_nD + 3, torch.relu(x_nD - 2.5)


def batches(n: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        yield torch.randn(64, 8, generator=generator)


def test_dictionary_learning_forgives_a_constant_error() -> None:
    """An error that is the same everywhere has no variance: it says 1, where the truth is far below 0."""
    peer = installed("dictionary_learning.evaluation")
    x_nD = next(batches(1))
    found = peer.evaluate(Always(), batches(1))
    assert found["frac_variance_explained"] == pytest.approx(1)
    assert ours(x_nD, x_nD + 3)["explained_variance"] < -7


def test_dictionary_learning_calls_alive_what_fired_in_one_batch() -> None:
    """Features of density 0.6 %: by default most are called dead, and none is after forty batches."""
    peer = installed("dictionary_learning.evaluation")
    assert peer.evaluate(Always(), batches(1))["frac_alive"] < 0.7
    assert peer.evaluate(Always(), batches(40), n_batches=40)["frac_alive"] == 1
