"""The bundled zoo: what `make demo` shows must be what the registry says."""

from __future__ import annotations

import pytest

from saezoo import evaluate, load, read_registry
from saezoo.results import Result

NAMES = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def measured() -> dict[str, Result]:
    return {result.layer: result for result in evaluate("tiny-res", tokens=49_152)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metric", ["ce_delta", "ce_score", "explained_variance", "l0", "l1"])
def test_published_lies_within_the_interval_of_measured(measured: dict[str, Result], name: str, metric: str) -> None:
    _, lo, hi = measured[name].metrics[metric]
    published = measured[name].published[metric]
    assert lo is not None and hi is not None and published is not None
    assert lo <= published <= hi


@pytest.mark.parametrize("name", NAMES)
def test_the_sae_is_good(measured: dict[str, Result], name: str) -> None:
    """Sparse, alive, and far better than knocking the layer out."""
    metrics = measured[name].metrics
    assert metrics["l0"].known < 32
    assert metrics["alive_fraction"].known > 0.99
    assert metrics["ce_delta"].known < 0.1 * (metrics["ce_mean"].known - metrics["ce_clean"].known)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_registry_says(name: str) -> None:
    [entry] = read_registry().find("tiny-res", name)
    sae = load("tiny-res", name)
    assert (sae.config.d_in, sae.config.d_sae, sae.config.hook) == (entry.d_in, entry.d_sae, entry.hook)
    assert entry.layouts["bundled"].facts["weights"].sha256 is not None
    assert sae.log_sparsity is not None and sae.log_sparsity.shape == (entry.d_sae,)
