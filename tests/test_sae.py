"""The SAE against its formula, the golden features, SAELens, and itself after saving."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saezoo import SAE, UsageError, WeightsError, load
from saezoo.lm import LanguageModel
from saezoo.loading import named_dtype
from saezoo.sae_config import SAEConfig

GOLDEN = Path(__file__).parent / "golden"
BOS = 511
needs_saelens = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None,
    reason="sae_lens is not installed (it needs transformer_lens < 4)",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "saelens_eval.safetensors")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    from transformers import GPT2LMHeadModel

    hf_model = GPT2LMHeadModel.from_pretrained(GOLDEN / "saelens_eval_model", attn_implementation="sdpa")
    return LanguageModel(hf_model, SimpleNamespace(all_special_ids=[BOS]))


@pytest.fixture
def sae() -> SAE:
    return load(GOLDEN / "reformatted")


def small(*, centre: bool = False, apply_b_dec_to_input: bool = True) -> SAE:
    """d_in 3, d_sae 5, random weights, decoder rows far from unit norm."""
    random = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (3, 5), "b_enc": (5,), "W_dec": (5, 3), "b_dec": (3,)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return SAE(SAEConfig(3, 5, "blocks.0.hook_resid_pre", None, None, True, centre, apply_b_dec_to_input), tensors)


def altered(folder: Path, **changes: Any) -> Path:
    """A copy of the golden folder with other values in its cfg.json."""
    shutil.copytree(GOLDEN / "reformatted", folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    return folder


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (0, 3)])
def test_formula(shape: tuple[int, ...]) -> None:
    sae, x = small(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae.decode(f), f @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec)
    assert bool((sae.encode(x) >= 0).all())


def test_formula_without_b_dec_on_the_input() -> None:
    sae, x = small(apply_b_dec_to_input=False), torch.ones(2, 3)
    torch.testing.assert_close(sae.encode(x), torch.relu(x @ sae.W_enc + sae.b_enc))


def test_centring_takes_the_mean_off_and_adds_it_back() -> None:
    sae, plain = small(centre=True), small()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(sae.encode(x), plain.encode(x - mean))
    torch.testing.assert_close(sae.encode(x + 7), sae.encode(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(sae(x), plain(x - mean) + mean)


def test_decoder_rows_are_used_as_stored(sae: SAE) -> None:
    stored = load_file(GOLDEN / "saelens_eval_sae.safetensors")["W_dec"]
    norms = stored.norm(dim=1)
    assert norms.min() < 0.98
    assert norms.max() > 1.02
    torch.testing.assert_close(sae.decode(torch.eye(256)), stored + sae.b_dec)


def test_golden_features_and_reconstruction(sae: SAE, golden: dict[str, Tensor]) -> None:
    f = sae.encode(golden["f32.x"])
    torch.testing.assert_close(f, golden["f32.feature_acts"], rtol=0, atol=1e-4)
    assert ((f > 0) != (golden["f32.feature_acts"] > 0)).sum() <= 7
    torch.testing.assert_close(sae(golden["f32.x"]), golden["f32.x_hat"], rtol=0, atol=1e-4)


def cross_entropy(lm: LanguageModel, tokens_BT: Tensor, resid_BTD: Tensor) -> Tensor:
    log_p = lm.resume(resid_BTD, 2).log_softmax(-1)
    return -log_p[:, :-1].gather(-1, tokens_BT[:, 1:, None])[..., 0]


@pytest.mark.parametrize("centred", [False, True])
def test_replace_gives_the_golden_cross_entropy(
    sae: SAE, lm: LanguageModel, golden: dict[str, Tensor], centred: bool
) -> None:
    """Every reader of the residual is a layer norm, so its frame does not matter."""
    tokens_BT = golden["tokens"].long()
    resid_BTD = lm.residuals(tokens_BT, [2])[2]
    if centred:
        resid_BTD = resid_BTD - resid_BTD.mean(-1, keepdim=True)
    ce = cross_entropy(lm, tokens_BT, sae.replace(resid_BTD, hook=object()))
    torch.testing.assert_close(ce, golden["all_tokens.f32.per_token.ce_loss_with_sae"], rtol=0, atol=1e-4)
    keep_BT = tokens_BT == BOS
    ce = cross_entropy(lm, tokens_BT, sae.replace(resid_BTD, keep_BT=keep_BT))
    scored = ~keep_BT[:, :-1]
    truth = golden["no_bos.f32.per_token.ce_loss_with_sae"]
    torch.testing.assert_close(ce[scored], truth[scored], rtol=0, atol=1e-4)


def test_keep_leaves_activations_alone(sae: SAE, golden: dict[str, Tensor]) -> None:
    x_BTD = golden["f32.x"] + 1
    keep_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool)
    keep_BT[:, ::3] = True
    y_BTD = sae.replace(x_BTD, keep_BT=keep_BT)
    assert torch.equal(y_BTD[keep_BT], x_BTD[keep_BT])
    torch.testing.assert_close(y_BTD[~keep_BT], sae(x_BTD)[~keep_BT])


def test_width_mismatch(sae: SAE) -> None:
    with pytest.raises(UsageError, match="^this SAE reads activations of width 64, not 65$"):
        sae.encode(torch.zeros(2, 65))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_reconstruction_has_the_dtype_of_the_input(sae: SAE, dtype: torch.dtype) -> None:
    assert sae(torch.zeros(2, 64, dtype=dtype)).dtype == dtype
    assert sae.encode(torch.zeros(2, 64, dtype=dtype)).dtype == torch.float32


def test_what_a_folder_says_about_itself(sae: SAE) -> None:
    assert sae.config == SAEConfig(
        d_in=64,
        d_sae=256,
        hook="blocks.2.hook_resid_pre",
        model_name="gpt2-small",
        context_size=128,
        prepend_bos=True,
        centre=True,
        apply_b_dec_to_input=True,
    )
    assert repr(sae) == "SAE(d_in=64, d_sae=256, hook=blocks.2.hook_resid_pre)"
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert load(GOLDEN / "legacy.pt").config == sae.config


def test_save_and_load_are_exact_in_float32(sae: SAE, tmp_path: Path) -> None:
    assert sae.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    again = load(tmp_path / "a" / "b")
    assert again.config == sae.config
    torch.testing.assert_close(again.state_dict(), sae.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.log_sparsity, sae.log_sparsity, rtol=0, atol=0)


def test_save_in_float16(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path, dtype=torch.float16)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "torch.float16"
    again = load(tmp_path)
    assert again.W_enc.dtype == torch.float32
    expected = {name: tensor.half().float() for name, tensor in sae.state_dict().items()}
    torch.testing.assert_close(dict(again.state_dict()), expected, rtol=0, atol=0)


def test_save_without_sparsity_and_with_other_settings(tmp_path: Path) -> None:
    sae = small(apply_b_dec_to_input=False)
    again = load(sae.save(tmp_path))
    assert again.config == sae.config
    assert again.log_sparsity is None
    assert not (tmp_path / "sparsity.safetensors").exists()


def test_save_over_what_is_loaded(tmp_path: Path) -> None:
    """The weights are memory-mapped from the very file that is replaced."""
    folder = altered(tmp_path / "sae")
    sae = load(folder)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.save(folder)
    torch.testing.assert_close(dict(load(folder).state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(sae.state_dict()), before, rtol=0, atol=0)


def test_saving_without_sparsity_forgets_the_old_one(tmp_path: Path) -> None:
    folder = altered(tmp_path / "sae")
    sae = load(folder)
    sae.log_sparsity = None
    assert load(sae.save(folder)).log_sparsity is None


@needs_saelens
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saelens_reads_what_we_save(sae: SAE, golden: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    sae.save(tmp_path, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = importlib.import_module("sae_lens")
        theirs = sae_lens.SAE.load_from_disk(tmp_path, dtype="float32")
    ours = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(golden["f32.x"]), ours.encode(golden["f32.x"]), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(theirs(golden["f32.x"]), ours(golden["f32.x"]), rtol=0, atol=1e-4)
    metadata = theirs.cfg.metadata
    assert (metadata.hook_name, metadata.context_size, metadata.prepend_bos) == (sae.config.hook, 128, True)
    assert metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}


@needs_saelens
def test_we_read_what_saelens_saves(sae: SAE, golden: dict[str, Tensor], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = importlib.import_module("sae_lens")
        sae_lens.SAE.load_from_disk(sae.save(tmp_path / "ours")).save_model(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    assert again.config == sae.config
    assert torch.equal(again.encode(golden["f32.x"]), sae.encode(golden["f32.x"]))


def test_todays_saelens_config(tmp_path: Path) -> None:
    """SAELens 6: what is not architecture lies under `metadata`; 2024's keys are gone."""
    folder = altered(tmp_path / "sae")
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": "blocks.2.hook_resid_post",
        "context_size": 64,
        "prepend_bos": False,
        "model_from_pretrained_kwargs": {},
        "sae_lens_version": "6.54.12",
    }
    cfg = {"architecture": "standard", "d_in": 64, "d_sae": 256, "apply_b_dec_to_input": False, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    expected = SAEConfig(64, 256, "blocks.2.hook_resid_post", "gpt2-small", 64, False, False, False)
    assert load(folder).config == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "transcoder"),
        ("architecture", ["standard"]),
        ("activation_fn", "gelu"),
        ("activation_fn_str", "tanh-relu"),
        ("activation_fn_str", ["relu"]),
        ("rescale_acts_by_decoder_norm", True),
        ("normalize_activations", "expected_average_only_in"),
        ("reshape_activations", "hook_z"),
        ("finetuning_scaling_factor", True),
        ("hook_head_index", 3),
        ("hook_point_head_index", 0),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = altered(tmp_path / "sae", **{key: value})
    with pytest.raises(WeightsError) as caught:
        load(folder)
    assert f": `{key}: {value}` is not supported" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metadata", "text"),
        ("model_from_pretrained_kwargs", "text"),
        ("hook_point", 5),
        ("model_name", ["gpt2"]),
        ("context_size", "128"),
        ("context_size", -1),
        ("prepend_bos", "no"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = altered(tmp_path / "sae", **{key: value})
    with pytest.raises(WeightsError, match=key):
        load(folder)


def test_a_config_of_other_sizes(tmp_path: Path) -> None:
    folder = altered(tmp_path / "sae", d_sae=512)
    with pytest.raises(WeightsError, match=r"sae: cfg\.json says d_sae 512, the tensors say 256$"):
        load(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_float32_weights_stay_memory_mapped(tmp_path: Path) -> None:
    folder = altered(tmp_path / "sae")
    sae = load(folder)
    assert str(folder / "sae_weights.safetensors") in Path("/proc/self/maps").read_text()
    before = (folder / "sae_weights.safetensors").read_bytes()
    with torch.no_grad():
        sae.W_enc.zero_()
    assert (folder / "sae_weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_load_in_another_precision(dtype: str) -> None:
    sae = load(GOLDEN / "reformatted", dtype=dtype)
    assert {parameter.dtype for parameter in sae.parameters()} == {named_dtype(dtype)}


@pytest.mark.parametrize("dtype", ["int8", "zeros", "__name__", "", "float8_e4m3fn", torch.int64])
def test_dtypes_that_cannot_be_computed_in(dtype: str | torch.dtype) -> None:
    with pytest.raises(UsageError, match="is not supported; use float32, bfloat16, float16, float64"):
        named_dtype(dtype)


def test_names_that_load_cannot_resolve() -> None:
    with pytest.raises(
        UsageError, match=r"no folder `zzz`; for a registry entry give a layer as well: load\('zzz', 10"
    ):
        load("zzz")
    with pytest.raises(UsageError, match="`0-3` names 4 SAEs of `gpt2-small-res`; load takes one at a time"):
        load("gpt2-small-res", "0-3")
    with pytest.raises(UsageError, match="gpt2-small-res 0 has no layout `newest`; it has: reformatted, original"):
        load("gpt2-small-res", 0, layout="newest")
