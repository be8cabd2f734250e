"""What an evaluation says of SAEs, models and texts on which it, or one of its metrics, has no meaning."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_metrics import CONFIG, random_sae

from saezoo.errors import SaezooError, UsageError
from saezoo.evals import Subject, evaluate
from saezoo.lm import LanguageModel, load_language_model
from saezoo.results import Measured, Result, to_csv, to_json
from saezoo.sae import SAE
from saezoo.tokens import Rows


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_language_model(tiny_model_folder)


def rows(n: int, context: int, documents: int) -> Rows:
    tokens_RT = torch.randint(0, 256, (n, context), generator=torch.Generator().manual_seed(0))
    document_RT = (torch.arange(n) * documents // n)[:, None].expand(n, context)
    return Rows(tokens_RT.numpy(), document_RT.numpy())


def run(lm: LanguageModel, sae: SAE, where: Rows) -> Result:
    return evaluate([Subject(sae, "tiny", "1")], lm, where)[0]


def changed(**tensors: Callable[[torch.Tensor], torch.Tensor]) -> SAE:
    weights = {name: tensor.clone().float() for name, tensor in random_sae().named_parameters()}
    return SAE(CONFIG, weights | {name: change(weights[name]) for name, change in tensors.items()})


def never_nan(result: Result) -> None:
    """Neither in what is shown nor in what is written."""
    numbers = [number for value in result.metrics.values() for number in value if number is not None]
    assert all(math.isfinite(number) for number in numbers)
    assert "nan" not in to_csv([result]).lower() and "inf" not in to_csv([result]).lower()
    json.dumps(to_json([result]), allow_nan=False)


def test_rows_of_one_token_have_no_cross_entropy(lm: LanguageModel) -> None:
    found = run(lm, changed(), rows(40, 1, 40))
    losses = {name for name in found.metrics if name.startswith("ce_")}
    assert {name for name, value in found.metrics.items() if value.value is None} == losses
    assert found.metrics["kl_sae"].known > 0
    never_nan(found)
    assert to_json([found])[0]["undefined"] == [name for name in found.metrics if name in losses]
    assert ",undefined," in to_csv([found])


def test_one_document_has_no_interval(lm: LanguageModel) -> None:
    found = run(lm, changed(), rows(10, 20, 1))
    assert {(value.lo, value.hi) for value in found.metrics.values()} == {(None, None)}
    never_nan(found)


def test_one_token_in_all(lm: LanguageModel) -> None:
    """It is its own mean: no variance is there to be explained."""
    found = run(lm, changed(), rows(1, 1, 1))
    assert found.tokens == 1
    assert found.metrics["explained_variance"] == Measured(None)
    never_nan(found)


def test_an_sae_of_dead_features(lm: LanguageModel) -> None:
    """It says b_dec, always: that has a loss, a variance, and no feature."""
    found = run(lm, changed(b_enc=lambda b: b - 1e6), rows(40, 20, 40))
    assert (found.metrics["dead"].value, found.metrics["alive_fraction"].value, found.metrics["l0"].value) == (32, 0, 0)
    assert found.metrics["ce_sae"].value is not None and found.metrics["explained_variance"].value is not None
    assert found.histogram["never"] == 32 and sum(found.histogram["counts"]) == 0
    never_nan(found)


def test_an_sae_of_zeros(lm: LanguageModel) -> None:
    found = run(lm, changed(**dict.fromkeys(("W_enc", "W_dec", "b_dec", "b_enc"), torch.zeros_like)), rows(40, 20, 40))
    assert found.metrics["encoder_decoder_cosine"] == Measured(None)
    assert found.metrics["norm_out"].value == 0
    never_nan(found)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "b_enc"])
def test_weights_that_are_not_finite(lm: LanguageModel, name: str, value: float) -> None:
    sae = changed(**{name: lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)})
    with pytest.raises(SaezooError) as caught:
        run(lm, sae, rows(4, 20, 4))
    assert str(caught.value) == f"{name} of SAE 1 holds values that are not finite; metrics would mean nothing"


def test_activations_that_are_not_finite(lm: LanguageModel) -> None:
    hf_model = copy.deepcopy(lm.hf_model)
    hf_model.transformer.h[0].mlp.c_proj.bias.data[2] = math.inf
    broken = LanguageModel(hf_model, lm.tokenizer)
    with pytest.raises(SaezooError) as caught:
        run(broken, changed(), rows(4, 20, 4))
    assert str(caught.value) == "the language model's logits are not finite in rows 0 to 3; metrics would mean nothing"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_in": 24}, "1: the SAE reads width 24, the model has 16"),
        ({"hook": "blocks.7.hook_resid_pre"}, "hook `blocks.7.hook_resid_pre`: the model has 2 layers, 0 to 1"),
        ({"hook": "blocks.0.attn.hook_z"}, "hook `blocks.0.attn.hook_z` is not supported; use"),
        ({"hook": None}, "1: cfg.json does not say which hook the SAE reads"),
    ],
)
def test_an_sae_of_another_model(lm: LanguageModel, config: dict[str, object], message: str) -> None:
    sae = changed()
    sae.config = replace(CONFIG, **config)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        run(lm, sae, rows(4, 20, 4))
    assert str(caught.value).startswith(message)


def test_a_tokenizer_of_another_model(lm: LanguageModel) -> None:
    where = rows(4, 20, 4)
    where.tokens_RT[2, 3] = 300
    with pytest.raises(UsageError) as caught:
        run(lm, changed(), where)
    assert str(caught.value) == "token 300 of a model with 257: its folder holds another model's tokenizer"
