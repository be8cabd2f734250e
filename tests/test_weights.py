"""Reading weights: the golden files in both formats, and every damaged or hostile one refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import config, legacy_name, sparsity, weights, write_legacy, write_reformatted
from safetensors.torch import load_file, save_file
from torch import Tensor

from saezoo import load
from saezoo.errors import WeightsError
from saezoo.sae_config import PARAMETERS
from saezoo.weights import Weights, read_legacy, read_saelens

NAMES = PARAMETERS["relu"]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden folder, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "reformatted", tmp_path / "sae"))


def read_folder(folder: Path) -> Weights:
    return read_saelens(folder / "sae_weights.safetensors", folder / "cfg.json", folder / "sparsity.safetensors")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_both_golden_formats_hold_the_same() -> None:
    new = read_folder(GOLDEN / "reformatted")
    old = read_legacy(GOLDEN / "legacy.pt", GOLDEN / "legacy_sparsity.pt")
    truth = load_file(GOLDEN / "saelens_eval_sae.safetensors")
    assert new.log_sparsity is not None
    assert old.log_sparsity is not None
    for found in (new, old):
        torch.testing.assert_close(found.tensors, truth, rtol=0, atol=0)
    torch.testing.assert_close(new.log_sparsity, old.log_sparsity, rtol=0, atol=0)
    artefacts = {"device", "use_ghost_grads", "checkpoint_path"}
    assert {key for key in new.config if new.config[key] != old.config[key]} <= artefacts
    assert (old.config["dtype"], old.config["device"]) == ("torch.float32", "cuda")


def test_both_replicas_hold_the_same(tmp_path: Path) -> None:
    write_reformatted(tmp_path, 11, d_in=64, d_sae=256, hook="resid_post")
    path = tmp_path / legacy_name(11, d_sae=256, hook="resid_post")
    write_legacy(path, 11, d_in=64, d_sae=256, hook="resid_post")
    new, old = read_folder(tmp_path), read_legacy(path, path.with_name(f"{path.stem}_log_feature_sparsity.pt"))
    torch.testing.assert_close(new.tensors, old.tensors, rtol=0, atol=0)
    torch.testing.assert_close(new.tensors, weights(11, 64, 256), rtol=0, atol=0)
    assert new.log_sparsity is not None
    torch.testing.assert_close(new.log_sparsity, sparsity(11, 256), rtol=0, atol=0)
    assert new.config == config(11, d_in=64, d_sae=256, hook="resid_post")
    json.dumps(old.config)


def test_published_shapes(tmp_path: Path) -> None:
    write_reformatted(tmp_path, 0)
    found = read_folder(tmp_path).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert shapes == {"W_enc": (768, 24576), "b_enc": (24576,), "W_dec": (24576, 768), "b_dec": (768,)}
    assert (tmp_path / "sae_weights.safetensors").stat().st_size == 151_096_640
    assert (tmp_path / "sparsity.safetensors").stat().st_size == 98_384


@pytest.mark.parametrize("name", ["malicious.pt", "malicious_nested.pt"])
def test_hostile_pickles_are_refused_unexecuted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (lambda: read_legacy(GOLDEN / name, None), lambda: load(GOLDEN / name)):
        message = refusal(read)
        assert message.endswith("would run code when loaded (io.open); refused, nothing was executed")
        assert name in message
    assert not (tmp_path / "PWNED").exists()


def test_a_hostile_sparsity_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: read_legacy(GOLDEN / "legacy.pt", GOLDEN / "malicious.pt"))
    assert "io.open" in message
    assert list(tmp_path.iterdir()) == []


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("PWNED"),)


def test_a_bare_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"cfg": _Payload(), "state_dict": {}}, protocol=2))
    refusal(lambda: load(tmp_path / "old.pt"))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "saved",
    [
        torch.zeros(3),
        {"state_dict": {}},
        {"cfg": {"d_in": 1}, "state_dict": {}},
        {"cfg": None, "state_dict": {"W_enc": 1}},
        [],
        "text",
        1,
        torch.storage.TypedStorage(3, dtype=torch.float32, _internal=True),  # type: ignore[no-untyped-call]
    ],
    ids=["tensor", "no cfg", "dict cfg", "no tensors", "list", "text", "number", "storage"],
)
def test_other_torch_files(tmp_path: Path, saved: object) -> None:
    torch.save(saved, tmp_path / "old.pt")
    message = refusal(lambda: load(tmp_path / "old.pt"))
    assert message == f"{tmp_path / 'old.pt'} is not a 2024 SAE file: it needs `cfg` and `state_dict`"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle", b"\x80\x02}q\x00."])
def test_corrupt_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old.pt").write_bytes(content)
    message = refusal(lambda: load(tmp_path / "old.pt"))
    assert str(tmp_path / "old.pt") in message


@pytest.mark.parametrize("size", [100, 5000, 100_000, 136_000])
def test_truncated_pickles(tmp_path: Path, size: int) -> None:
    (tmp_path / "old.pt").write_bytes((GOLDEN / "legacy.pt").read_bytes()[:size])
    message = refusal(lambda: load(tmp_path / "old.pt"))
    assert " is corrupt or not a PyTorch file: " in message
    assert message.endswith("; get it again")


@pytest.mark.parametrize("size", [0, 4, 100, 1000, 132_639])
@pytest.mark.parametrize("name", ["sae_weights", "sparsity"])
def test_truncated_safetensors(folder: Path, name: str, size: int) -> None:
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    message = refusal(lambda: read_folder(folder))
    assert message.startswith(f"{path} is corrupt or truncated: ")
    assert message.endswith("; get it again")


def test_a_header_that_promises_too_much(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "is corrupt or truncated" in refusal(lambda: read_folder(folder))


def test_a_missing_file(folder: Path) -> None:
    (folder / "sparsity.safetensors").unlink()
    assert refusal(lambda: read_folder(folder)) == f"no file {folder / 'sparsity.safetensors'}"


@pytest.mark.parametrize("name", NAMES)
def test_transposed_or_cut_tensors(folder: Path, name: str) -> None:
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    assert "has shape " in refusal(lambda: read_folder(folder))


def test_transposed_weights_are_recognised(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update(W_enc=tensors["W_enc"].T, W_dec=tensors["W_dec"].T))
    message = refusal(lambda: read_folder(folder))
    assert message.endswith("W_enc has shape [256, 64], expected [64, 256] (transposed?)")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_numbers(folder: Path, name: str, value: float) -> None:
    change(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    message = refusal(lambda: read_folder(folder))
    assert message.endswith(f": {name} holds NaN or infinite values; get it again or retrain")


def test_integers_are_no_weights(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update(b_enc=tensors["b_enc"].int()))
    assert refusal(lambda: read_folder(folder)).endswith("b_enc is torch.int32, expected floating point")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in NAMES}))
    assert {tensor.dtype for tensor in read_folder(folder).tensors.values()} == {dtype}


def test_missing_and_extra_tensors(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("b_dec"))
    expected = "must hold the tensors W_enc, b_enc, W_dec, b_dec (relu); it holds W_dec, W_enc, b_enc"
    assert refusal(lambda: read_folder(folder)).endswith(expected)
    change(folder, lambda tensors: tensors.update(b_dec=torch.zeros(64), threshold=torch.zeros(256)))
    assert refusal(lambda: read_folder(folder)).endswith("it holds W_dec, W_enc, b_dec, b_enc, threshold")


def test_no_tensors_at_all(folder: Path) -> None:
    save_file({}, folder / "sae_weights.safetensors")
    assert "must hold the tensors" in refusal(lambda: read_folder(folder))


def test_scaling_factor(folder: Path) -> None:
    """SAELens wrote it between April and July 2024; ones change nothing."""
    change(folder, lambda tensors: tensors.update(scaling_factor=torch.ones(256)))
    assert set(read_folder(folder).tensors) == set(NAMES)
    change(folder, lambda tensors: tensors["scaling_factor"][3:4].fill_(1.1))
    assert refusal(lambda: read_folder(folder)).endswith("has a `scaling_factor` other than 1, which is not supported")


def test_sparsity_of_another_sae(folder: Path) -> None:
    save_file({"sparsity": torch.zeros(255)}, folder / "sparsity.safetensors")
    assert refusal(lambda: read_folder(folder)).endswith("its sparsity has shape [255], expected [256]")
    save_file({"other": torch.zeros(256)}, folder / "sparsity.safetensors")
    assert refusal(lambda: read_folder(folder)).endswith("must hold one tensor `sparsity`, not ['other']")


def test_legacy_sparsity_must_be_a_tensor(tmp_path: Path) -> None:
    torch.save([1.0], tmp_path / "s.pt")
    message = refusal(lambda: read_legacy(GOLDEN / "legacy.pt", tmp_path / "s.pt"))
    assert message == f"{tmp_path / 's.pt'} must hold one tensor, not list"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b'"text"', b"[" * 100_000],
    ids=["empty", "cut", "binary", "list", "null", "text", "deep"],
)
def test_config_that_is_no_object(folder: Path, content: bytes) -> None:
    (folder / "cfg.json").write_bytes(content)
    message = refusal(lambda: read_folder(folder))
    assert message.startswith(f"{folder / 'cfg.json'} ")


def test_config_that_is_missing(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    assert refusal(lambda: load(folder)) == f"{folder} is not an SAE folder: it lacks cfg.json"
    (folder / "sae_weights.safetensors").unlink()
    assert refusal(lambda: load(folder)).startswith(f"{folder} is not an SAE folder: it holds none of ")
