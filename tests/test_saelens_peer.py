"""Against the real SAELens: its evaluation of the golden model, and folders of SAEs in both directions."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saezoo.entries import Protocol
from saezoo.evals import Subject, evaluate
from saezoo.hooked import hooked_model
from saezoo.lm import LanguageModel
from saezoo.loading import load
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig
from saezoo.tokens import Rows

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("sae_lens is not installed (it needs transformer_lens < 4)", allow_module_level=True)

GOLDEN = Path(__file__).parent / "golden"
HOOK, BOS, ROWS_PER_BATCH = "blocks.2.hook_resid_pre", 511, 3
# SAELens' name -> ours, for every scalar that both define in the same way. Its explained_variance_legacy and
# relative_reconstruction_bias depend on the batches; saezoo has neither.
SAME = {
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce_sae",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "ce_score",
    "kl_div_with_sae": "kl_sae",
    "kl_div_with_ablation": "kl_zero",
    "kl_div_score": "kl_score",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_norm_in": "norm_in",
    "l2_norm_out": "norm_out",
    "l2_ratio": "norm_ratio",
    "l0": "l0",
    "l1": "l1",
}
MASKS: dict[Protocol, list[int] | bool] = {"feb2024": False, "standard": [BOS]}


class FixedRows:
    """As much of SAELens' ActivationsStore as `run_evals` uses: it hands out the given rows in order."""

    store_batch_size_prompts = ROWS_PER_BATCH

    def __init__(self, tokens_RT: Tensor) -> None:
        self._tokens_RT, self._next = tokens_RT, 0
        self.context_size = tokens_RT.shape[1]

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        self._next += batch_size
        return self._tokens_RT[self._next - batch_size : self._next]

    def reset_input_dataset(self) -> None:
        self._next = 0


class NoTokenizer:
    """The golden model has token ids only."""

    all_special_ids = (BOS,)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    from transformers import GPT2LMHeadModel

    folder = GOLDEN / "saelens_eval_model"
    return LanguageModel(GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa"), NoTokenizer())


@pytest.fixture(scope="module")
def tokens_RT() -> Tensor:
    return load_file(GOLDEN / "saelens_eval.safetensors")["tokens"].long()


@pytest.fixture(scope="module")
def x_BTD() -> Tensor:
    return load_file(GOLDEN / "saelens_eval.safetensors")["f32.x"]


@pytest.fixture(scope="module")
def sae() -> SAE:
    config = SAEConfig(
        d_in=64,
        d_sae=256,
        hook=HOOK,
        model_name="golden",
        context_size=128,
        prepend_bos=True,
        centre=True,
        apply_b_dec_to_input=True,
    )
    return SAE(config, load_file(GOLDEN / "saelens_eval_sae.safetensors"))


@pytest.fixture(scope="module")
def sae_lens() -> Iterator[Any]:
    """The package; importing it warns of deprecations in what it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        import sae_lens.evals

        yield sae_lens


def loaded_by_saelens(sae_lens: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sae_lens.SAE.load_from_disk(folder)


@pytest.fixture(scope="module")
def theirs(
    sae_lens: Any, lm: LanguageModel, tokens_RT: Tensor, sae: SAE, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, float], dict[str, list[float]]]]:
    """What `run_evals` returns for each mask: all scalars in one dict, and the values per feature."""
    from sae_lens.training.activation_scaler import ActivationScaler

    peer = loaded_by_saelens(sae_lens, sae.save(tmp_path_factory.mktemp("sae")))
    model = hooked_model(lm.hf_model)
    batches = len(tokens_RT) // ROWS_PER_BATCH
    config = sae_lens.evals.get_eval_everything_config(ROWS_PER_BATCH, batches, batches)
    found = {}
    for protocol, excluded in MASKS.items():
        store: Any = FixedRows(tokens_RT)
        groups, features = sae_lens.evals.run_evals(
            peer, store, model, ActivationScaler(), config, exclude_special_tokens=excluded
        )
        found[str(protocol)] = {name: v for group in groups.values() for name, v in group.items()}, features
    return found


@pytest.fixture(scope="module")
def ours(lm: LanguageModel, tokens_RT: Tensor, sae: SAE) -> dict[str, Result]:
    rows = Rows(tokens_RT.numpy(), np.arange(tokens_RT.numel()).reshape(tokens_RT.shape) // 64)
    subject = Subject(sae, "golden", "2")
    return {str(protocol): evaluate([subject], lm, rows, protocol=protocol)[0] for protocol in MASKS}


@pytest.mark.parametrize("protocol", MASKS)
@pytest.mark.parametrize("name", SAME)
def test_metric_is_that_of_saelens(name: str, protocol: str, theirs: Any, ours: dict[str, Result]) -> None:
    """Within 1e-5 relative: both compute in float32."""
    expected = theirs[protocol][0][name]
    assert ours[protocol].metrics[SAME[name]].value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("protocol", MASKS)
def test_feature_densities_are_those_of_saelens(protocol: str, theirs: Any, ours: dict[str, Result]) -> None:
    """Dead, alive and dense counts and the histogram, from SAELens' density of each feature."""
    density_F = torch.tensor(theirs[protocol][1]["feature_density"], dtype=torch.float64)
    metrics, histogram = ours[protocol].metrics, ours[protocol].histogram
    assert metrics["dead"].value == histogram["never"] == int((density_F == 0).sum())
    assert metrics["alive_fraction"].value == float((density_F > 0).sum()) / 256
    assert metrics["dense_10"].value == int((density_F > 0.1).sum())
    assert metrics["dense_100"].value == int((density_F > 0.01).sum())
    bins = [math.floor(2 * math.log10(density) + 12) for density in density_F[density_F > 0].tolist()]
    assert histogram["counts"] == [bins.count(k) for k in range(12)]


@pytest.mark.parametrize("protocol", MASKS)
def test_saelens_gives_its_recorded_values(protocol: str, theirs: Any) -> None:
    """The installed version still does what the golden file was made with."""
    recorded = json.loads((GOLDEN / "saelens_eval.json").read_text())["saelens"]
    groups = recorded["no_bos" if protocol == "standard" else "all_tokens"]["f32"]
    flat = {name: value for group in groups.values() for name, value in group.items()}
    assert theirs[protocol][0] == pytest.approx(flat, rel=1e-5)


def test_saelens_reads_what_saezoo_saves(sae_lens: Any, sae: SAE, x_BTD: Tensor, tmp_path: Path) -> None:
    peer = loaded_by_saelens(sae_lens, sae.save(tmp_path))
    assert (peer.cfg.architecture(), peer.cfg.d_in, peer.cfg.d_sae) == ("standard", 64, 256)
    assert peer.cfg.metadata.hook_name == HOOK
    assert peer.cfg.metadata.context_size == 128
    assert peer.cfg.metadata.prepend_bos is True
    assert peer.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    # Fed by SAELens with what it will compute features of: x is centred already, and centred again it may differ.
    f_BTF = sae.encode(x_BTD)
    torch.testing.assert_close(peer.encode(x_BTD - x_BTD.mean(-1, keepdim=True)), f_BTF, rtol=0, atol=0)
    torch.testing.assert_close(peer.decode(f_BTF), sae.decode(f_BTF), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # SAELens' advice on how to load the model
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_saezoo_reads_what_saelens_saves(
    sae_lens: Any, sae: SAE, x_BTD: Tensor, tmp_path: Path, apply_b_dec_to_input: bool, centre: bool
) -> None:
    config = sae_lens.StandardSAEConfig(d_in=64, d_sae=256, apply_b_dec_to_input=apply_b_dec_to_input)
    config.metadata.hook_name = HOOK
    config.metadata.context_size = 128
    config.metadata.model_name = "golden"
    config.metadata.prepend_bos = False
    config.metadata.model_from_pretrained_kwargs = {"center_writing_weights": centre}
    peer = sae_lens.StandardSAE(config)
    peer.load_state_dict({name: tensor.detach() for name, tensor in sae.named_parameters()})
    peer.save_model(tmp_path)
    again = load(tmp_path)
    assert again.config == SAEConfig(64, 256, HOOK, "golden", 128, False, centre, apply_b_dec_to_input)
    with torch.no_grad():
        f_BTF = peer.encode(x_BTD - x_BTD.mean(-1, keepdim=True) if centre else x_BTD)
        torch.testing.assert_close(again.encode(x_BTD), f_BTF, rtol=0, atol=0)
        torch.testing.assert_close(again.decode(f_BTF), peer.decode(f_BTF), rtol=0, atol=0)
