"""The full suite: the language model is read where the SAE reads it, and every part says its part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saezoo import load
from saezoo.errors import SaezooError, TextError, UsageError, WeightsError
from saezoo.evals.probing import TASKS
from saezoo.evals.suite import STAGES, _Reader, full_suite
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import package_folder
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows, encode, pack

T = 32


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder)


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> Rows:
    texts = [
        f'Word {i}, said "The {i * 37}th man". He ran and ran.\nThen {"on " * (i % 5)}home!' * 4 for i in range(40)
    ]
    parts = list(pack(encode(lm.tokenizer, texts), bos=lm.bos, context=T))
    return Rows(np.concatenate([p.tokens_RT for p in parts]), np.concatenate([p.documents_RT for p in parts]))


def random_sae(d_in: int = 16, hook: str | None = "blocks.1.hook_resid_pre") -> SAE:
    generator = torch.Generator().manual_seed(0)
    w_dec_FD = torch.nn.functional.normalize(torch.randn(40, d_in, generator=generator), dim=1)
    tensors = {"W_enc": w_dec_FD.T, "b_enc": torch.full((40,), -0.02), "W_dec": w_dec_FD, "b_dec": torch.zeros(d_in)}
    return SAE(SAEConfig(d_in, 40, hook, None, T, True, True, True), tensors)


@pytest.mark.parametrize("batch_size", [1, 5, None])
@pytest.mark.parametrize(("hook", "depth"), [("blocks.0.hook_resid_pre", 0), ("blocks.1.hook_resid_post", 2)])
def test_what_is_read_is_the_residual_at_the_hook_without_special_tokens(
    lm: LanguageModel, rows: Rows, batch_size: int | None, hook: str, depth: int
) -> None:
    reader = _Reader(random_sae(hook=hook), lm, rows, batch_size)
    tokens_RT = torch.from_numpy(rows.tokens_RT)
    full_RTD = lm.residuals(tokens_RT, [depth])[depth]
    activations, documents = (torch.cat(parts) for parts in zip(*reader.batches(), strict=True))
    torch.testing.assert_close(activations, full_RTD[tokens_RT != lm.bos])
    assert documents.tolist() == rows.documents_RT[rows.tokens_RT != lm.bos].tolist()
    places = np.array([3, 4, T, 7 * T + 1, rows.tokens_RT.size - 1])
    torch.testing.assert_close(reader.at(places), full_RTD.flatten(0, 1)[places])


def test_words_are_read_where_they_stand_in_the_prompt() -> None:
    lm = load_language_model(package_folder() / "bundled" / "tiny-lm")
    sae = load("tiny-res", 2)
    row = np.array([[lm.bos, 5, 6, 7]])
    x_WD, letter_W = _Reader(sae, lm, Rows(row, row), batch_size=100).words()
    ids = lm.tokenizer("The first letter of the word government", add_special_tokens=False)["input_ids"]
    expected_TD = lm.residuals(torch.tensor([[lm.bos, *ids]]), [2])[2][0]
    [place] = (x_WD - expected_TD[-1]).abs().amax(1).lt(1e-4).nonzero().flatten().tolist()
    assert letter_W[place] == "abcdefghijklmnopqrstuvwxyz".index("g")


def test_everything_is_measured_whatever_the_batch_size(lm: LanguageModel, rows: Rows) -> None:
    begun: list[str] = []
    sae = random_sae()
    first = full_suite(sae, lm, rows, seed=1, on_progress=begun.append)
    assert tuple(begun) == STAGES
    second = full_suite(sae, lm, rows, seed=1, batch_size=3)
    assert list(first.metrics) == [
        *("description_length", "description_levels", "description_loss"),
        *("absorption_full", "absorption_fraction", "absorption_splits", "absorption_letters"),
        *("probing_k1", "probing_k2", "probing_k5", "probing_raw", "probing_tasks"),
        *("neighbour_cosine", "neighbour_close", "meta_explained"),
    ]
    for name, measured in first.metrics.items():
        assert second.metrics[name] == pytest.approx(measured, abs=2e-3), name
    value, lo, hi = first.metrics["description_length"]
    assert value is not None and lo is not None and hi is not None and 0 < lo < value < hi
    assert [row.task for row in first.probing.tasks] == list(TASKS)
    assert (first.metrics["probing_tasks"].value or 0) >= 5
    # Its tokens are single bytes: no word is a token, so absorption is undefined.
    assert first.metrics["absorption_full"].value is None
    assert first.metrics["absorption_letters"].value == 0


@pytest.mark.parametrize(
    ("sae", "kind", "message"),
    [
        (random_sae(d_in=8), UsageError, "the SAE reads width 8, the model has 16"),
        (random_sae(hook=None), UsageError, "the SAE's cfg.json does not say which hook it reads"),
        (random_sae(hook="blocks.2.hook_resid_pre"), UsageError, "the model has 2 layers"),
        (random_sae(hook="blocks.0.mlp.hook_post"), UsageError, "is not supported"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(
    lm: LanguageModel, rows: Rows, sae: SAE, kind: type[SaezooError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        full_suite(sae, lm, rows)


def test_rows_that_do_not_fit_are_refused(lm: LanguageModel) -> None:
    long, empty = (np.full((2, n), token) for n, token in ((65, 1), (8, lm.bos)))
    with pytest.raises(UsageError, match="rows of 65 tokens: the model has 64 positions"):
        full_suite(random_sae(), lm, Rows(long, long))
    with pytest.raises(TextError, match="special tokens only"):
        full_suite(random_sae(), lm, Rows(empty, empty))


def test_activations_that_are_not_finite_are_refused(tiny_model_folder: Path, rows: Rows) -> None:
    lm = load_language_model(tiny_model_folder)
    lm.hf_model.transformer.wte.weight[int(rows.tokens_RT[2, 3])] = torch.inf
    with pytest.raises(WeightsError, match="activations at depth 1 are not finite"):
        full_suite(random_sae(), lm, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_and_a_dead_sae_leave_explicit_gaps(tiny_model_folder: Path, dtype: torch.dtype) -> None:
    lm = load_language_model(tiny_model_folder, dtype=dtype)
    sae = random_sae().to(dtype)
    sae.b_enc[:] = -1000
    tokens_RT = np.arange(6 * T).reshape(6, T) % 90
    metrics = full_suite(sae, lm, Rows(tokens_RT, np.zeros_like(tokens_RT))).metrics
    assert metrics["description_length"] == Measured(0.0)
    undefined = {name for name, measured in metrics.items() if measured.value is None}
    assert undefined == {
        *("absorption_full", "absorption_fraction", "absorption_splits"),
        *("probing_k1", "probing_k2", "probing_k5", "probing_raw"),
    }
