"""Files of other projects: told apart, read with their own meaning, converted without a bit lost, refused if in doubt.

tests/golden/formats holds what the projects' own code wrote, and what it computed from it (benchmarks/formats.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from saezoo import SAE, load
from saezoo.cli import main
from saezoo.conversion import Target, convert
from saezoo.errors import SaezooError, UsageError, WeightsError
from saezoo.evals.evaluate import reconstruct

GOLDEN = Path(__file__).parent / "golden" / "formats"
CASES = sorted(path.name for path in GOLDEN.iterdir())
PLACES = {"sparsify": "h.3", "openai_relu": "3.pt", "openai_topk": "3.pt"}
TARGETS: tuple[Target, ...] = ("saelens", "dictionary_learning", "sparsify")


def place(case: str) -> Path:
    return GOLDEN / case / PLACES.get(case, "")


def copied(case: str, folder: Path) -> Path:
    """The case's files, to be spoilt."""
    shutil.copytree(GOLDEN / case, folder / case)
    return folder / case / PLACES.get(case, "")


def differences(sae: SAE, expected: dict[str, Tensor]) -> list[float]:
    """Of features and reconstruction, relative to the largest value."""
    pairs = ((sae.encode(expected["x"]), expected["f"]), (sae(expected["x"]), expected["x_hat"]))
    return [float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs]


def test_there_is_one_of_every_format_and_activation() -> None:
    assert len(CASES) == 23
    assert {load(place(case)).config.activation for case in CASES} == {"relu", "topk", "jumprelu", "batchtopk", "gated"}


@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_projects_own_code_gives(case: str) -> None:
    """float32 on both sides: 2e-7 of the largest value, and the same features fire."""
    expected = load_file(GOLDEN / case / "expected.safetensors")
    sae = load(place(case))
    assert max(differences(sae, expected)) < 5e-7
    assert ((sae.encode(expected["x"]) > 0) == (expected["f"] > 0)).all()


@pytest.mark.parametrize("case", CASES)
def test_evaluation_reconstructs_the_same(case: str) -> None:
    """From the features that fire alone; the sums over tokens are those of the features."""
    expected = load_file(GOLDEN / case / "expected.safetensors")
    x_nD, y_nD, code = reconstruct(load(place(case)), expected["x"])
    torch.testing.assert_close(y_nD, expected["x_hat"], rtol=1e-5, atol=1e-6)
    assert torch.equal(x_nD, expected["x"])
    above_n, sum_n = code.per_token()
    assert torch.equal(above_n, (expected["f"] > 0).sum(1))
    torch.testing.assert_close(sum_n, expected["f"].sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "normalised" not in case and "openai_topk" not in case])
def test_a_normalised_sae_alone_needs_the_activations_to_decode(case: str) -> None:
    sae = load(place(case))
    f_nF = sae.encode(torch.ones(2, 12))
    assert torch.equal(sae.decode(f_nF), sae.decode(f_nF, torch.ones(2, 12)))


def test_decoding_without_the_activations_that_it_needs() -> None:
    sae = load(place("openai_topk"))
    with pytest.raises(UsageError, match=r"^this SAE normalises each token; give decode the activations too: decode"):
        sae.decode(torch.zeros(1, 40))


@pytest.mark.parametrize(
    ("case", "hook", "model", "context"),
    [
        ("dictionary_learning_BatchTopKSAE", "blocks.3.hook_resid_post", "gpt2", 128),
        ("sparsify", "blocks.3.hook_resid_post", None, None),
        ("openai_topk", None, None, None),
        ("gemma_scope", None, None, None),
        ("saelens_topk", None, None, None),
    ],
)
def test_what_the_files_say_about_the_input(
    case: str, hook: str | None, model: str | None, context: int | None
) -> None:
    config = load(place(case)).config
    assert (config.hook, config.model_name, config.context_size) == (hook, model, context)
    assert not config.centre


def everything(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by file and name, JSON by file) of a folder of an SAE."""
    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "expected.safetensors":
            tensors |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    for path in folder.glob("*.pt"):
        tensors |= {f"{path.name}/{k}": v for k, v in torch.load(path, weights_only=True).items()}
    return tensors, {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def same(one: Path, other: Path) -> None:
    """Same tensors, bit for bit, in the same dtypes; same configurations."""
    (tensors, texts), (others, other_texts) = everything(one), everything(other)
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
    assert texts == other_texts


ROUND_TRIPS = [
    (case, to)
    for case in CASES
    for to in TARGETS
    if case.startswith(("dictionary_learning", "sparsify", "saelens")) and not case.startswith(to)
]


@pytest.mark.parametrize(("case", "to"), ROUND_TRIPS)
def test_there_and_back_again(case: str, to: Target, tmp_path: Path) -> None:
    """Either the same files again and the same outputs between, or a refusal that leaves nothing."""
    home: Target = next(target for target in TARGETS if case.startswith(target))
    try:
        between = convert(place(case), tmp_path / "h.3", to)
    except WeightsError as error:
        assert " has no " in str(error) or " has TopK with b_dec on the input only" in str(error)
        assert not list(tmp_path.iterdir())
        return
    expected = load_file(GOLDEN / case / "expected.safetensors")
    assert max(differences(load(between), expected)) < 5e-7
    assert load(between).config == load(place(case)).config
    same(place(case), convert(between, tmp_path / "back", home))


def test_how_many_can_be_converted(tmp_path: Path) -> None:
    """In 24 of 40 cases the other format has no word for the SAE; sparsify has TopK alone."""
    refused = 0
    for i, (case, to) in enumerate(ROUND_TRIPS):
        try:
            convert(place(case), tmp_path / f"{i}", to)
        except WeightsError:
            refused += 1
    assert (refused, len(ROUND_TRIPS)) == (24, 40)


@pytest.mark.parametrize("to", ["dictionary_learning"])
def test_the_published_layout_there_and_back_again(to: Target, tmp_path: Path) -> None:
    """The keys of early 2024, centring and the sparsity among them."""
    source = GOLDEN.parent / "reformatted"
    between = convert(source, tmp_path / "between", to)
    assert load(between).config == load(source).config
    assert load(between).config.centre
    same(source, convert(between, tmp_path / "back", "saelens"))
    assert torch.equal(load(between).log_sparsity, load(source).log_sparsity)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path) -> None:
    words = ["convert", str(place("sparsify")), str(tmp_path / "new"), "--to", "saelens"]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'new'}\n")
    again = CliRunner().invoke(main, words)
    assert (again.exit_code, again.stderr) == (2, f"Error: {tmp_path / 'new'} exists; give a new folder\n")


def spoil(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "`activation: groupmax` is not supported; only TopK autoencoders are"),
        ({"transcode": True}, "`transcode: True` is not supported; only TopK autoencoders are"),
        ({"skip_connection": True}, "`skip_connection: True` is not supported; only TopK autoencoders are"),
        ({"k": 0}, "its configuration says `k: 0`; it must be a whole number above 0"),
        ({"k": "5"}, "its configuration says `k: '5'`; it must be a whole number above 0"),
        ({"k": 41}, "cfg.json says k 41, there are 40 features"),
        ({"d_in": None}, "`d_in` is missing"),
        ({"d_in": 13}, "cfg.json says d_in 13, the tensors say 12"),
    ],
)
def test_sparsify_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied("sparsify", tmp_path)
    spoil(folder / "cfg.json", **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "CrossCoder"}, "`dict_class: CrossCoder` is not supported; AutoEncoder, AutoEncoderNew, "),
        (
            {"dict_class": "AutoEncoder"},
            "ae.pt must hold encoder.weight, encoder.bias, decoder.weight, bias; it lacks ",
        ),
        ({"k": 6}, "ae.pt: k is 5, its configuration says 6"),
        ({"k": "\x13"}, "ae.pt: k is 5, its configuration says "),
        ({"dict_class": {}}, "`dict_class: {}` is not supported; AutoEncoder, AutoEncoderNew, "),
    ],
)
def test_dictionary_learning_refused(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    content = json.loads((folder / "config.json").read_text())
    spoil(folder / "config.json", trainer=content["trainer"] | trainer)
    assert message in refusal(folder)


def test_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    """With -1 the project's own code lets through whatever ReLU does."""
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    assert refusal(folder).endswith("ae.pt: its threshold was never set in training (-1)")


def test_no_description(tmp_path: Path) -> None:
    folder = copied("dictionary_learning_AutoEncoder", tmp_path)
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} is not an SAE folder: it lacks config.json"


@pytest.mark.parametrize("activation", ["Identity", "TopK"])
def test_openai_refused(activation: str, tmp_path: Path) -> None:
    path = copied("openai_relu", tmp_path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"activation": activation, "activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, path)
    assert "is not supported; ReLU and TopK (ReLU) are" in refusal(path)


def test_openai_with_tied_weights(tmp_path: Path) -> None:
    path = copied("openai_relu", tmp_path)
    state = torch.load(path, weights_only=True)
    state["decoder.linear.weight"] = state.pop("decoder.weight")
    torch.save(state, path)
    assert refusal(path).endswith("it lacks decoder.weight; it also holds decoder.linear.weight")


def test_gemma_scope_refused(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    folder = copied("gemma_scope", tmp_path)
    arrays = dict(numpy.load(folder / "params.npz"))
    numpy.savez(folder / "params.npz", **arrays | {"b_enc": numpy.array([object()])})
    assert "params.npz is corrupt or not a .npz of numbers: " in refusal(folder)
    numpy.savez(folder / "params.npz", **{name: arrays[name] for name in arrays if name != "threshold"})
    assert refusal(folder).endswith("it lacks threshold")
    (folder / "params.npz").write_bytes((folder / "params.npz").read_bytes()[:500])
    assert "params.npz is corrupt" in refusal(folder)


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    folder = copied("dictionary_learning_AutoEncoder", tmp_path)
    shutil.copy(place("gemma_scope") / "params.npz", folder)
    assert refusal(folder).endswith("holds several SAEs' files: ae.pt, params.npz; name one of them")
    assert load(folder / "params.npz").config.activation == "jumprelu"


def test_a_folder_of_folders(tmp_path: Path) -> None:
    copied("saelens_topk", tmp_path)
    copied("saelens_gated", tmp_path)
    assert refusal(tmp_path).endswith("; there are SAEs in its folders saelens_gated, saelens_topk")


def test_a_topk_of_saelens_before_version_6(tmp_path: Path) -> None:
    """Its architecture was `standard`: by that word alone it would be read as a ReLU SAE."""
    folder = copied("saelens_topk", tmp_path)
    old = {
        "d_in": 12,
        "d_sae": 40,
        "architecture": "standard",
        "activation_fn_str": "topk",
        "sae_lens_version": "4.0.0",
    }
    (folder / "cfg.json").write_text(json.dumps(old | {"activation_fn_kwargs": {"k": 5}}))
    assert max(differences(load(folder), load_file(folder / "expected.safetensors"))) < 5e-7
    (folder / "cfg.json").write_text(json.dumps(old))
    assert refusal(folder).endswith("its configuration says `k: None`; it must be a whole number above 0")


def test_the_configuration_that_openais_reformatted_saes_were_published_with(tmp_path: Path) -> None:
    """The keys of gpt2-small-attn-out-v5-128k, layer 0, with the sizes of a small case."""
    folder = copied("saelens_topk_normalised", tmp_path)
    published = {
        "architecture": "standard",
        "d_in": 12,
        "d_sae": 40,
        "dtype": "torch.float32",
        "device": "cuda",
        "model_name": "gpt2-small",
        "hook_name": "blocks.0.hook_attn_out",
        "hook_layer": 0,
        "hook_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        "prepend_bos": False,
        "dataset_path": "Skylion007/openwebtext",
        "dataset_trust_remote_code": True,
        "context_size": 64,
        "normalize_activations": "layer_norm",
    }
    (folder / "cfg.json").write_text(json.dumps(published))
    sae = load(folder)
    assert max(differences(sae, load_file(folder / "expected.safetensors"))) < 5e-7
    assert (sae.config.activation, sae.config.k, sae.config.normalise) == ("topk", 5, "layer_norm")
    assert (sae.config.hook, sae.config.context_size, sae.config.centre) == ("blocks.0.hook_attn_out", 64, False)
    assert not sae.config.prepend_bos


def test_a_saved_batchtopk_whose_thresholds_differ(tmp_path: Path) -> None:
    folder = load(place("dictionary_learning_BatchTopKSAE")).save(tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"][3] = 0.5
    save_file(tensors, folder / "sae_weights.safetensors")
    assert "a BatchTopK SAE has one threshold" in refusal(folder)


@pytest.mark.parametrize(
    ("case", "to", "message"),
    [
        (
            "openai_topk",
            "dictionary_learning",
            "dictionary_learning has no word for `normalize_activations: layer_norm`",
        ),
        ("saelens_topk_normalised", "sparsify", "sparsify has no word for `normalize_activations: layer_norm`"),
        (
            "saelens_jumprelu",
            "dictionary_learning",
            "dictionary_learning has no class for jumprelu with b_dec on the input",
        ),
        (
            "gemma_scope",
            "sparsify",
            "sparsify has TopK with b_dec on the input only, not jumprelu without b_dec on the input",
        ),
    ],
)
def test_converting_what_the_other_format_has_no_word_for(case: str, to: Target, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        convert(place(case), tmp_path / "out", to)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_saved_and_read_by_saelens(case: str, tmp_path: Path) -> None:
    """What saezoo saves, SAELens runs with the same result."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    sae = load(place(case))
    theirs = sae_lens.SAE.load_from_disk(sae.save(tmp_path / "sae"))
    expected = load_file(GOLDEN / case / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(expected["x"]), expected["f"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs(expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-6)


def refusal(path: Path) -> str:
    """The message of the error that `load` ends with."""
    with pytest.raises(SaezooError) as caught:
        load(path)
    assert str(caught.value).isprintable()
    return str(caught.value)
