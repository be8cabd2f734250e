"""The test infrastructure itself: the real hub client against `HubServer`, and the replicas' layouts."""

import hashlib
import json
import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hubserver import Fault, HubServer, etag_of
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from replicas import (
    config,
    files_in,
    place_in_hub_cache,
    sparsity,
    weights,
    write_gpt2,
    write_legacy,
    write_reformatted,
)
from safetensors.torch import load_file

REPO, COMMIT, NAME = "owner/name", "f" * 40, "folder/big.safetensors"
CONFIG_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small git file and an LFS file of more than one of the client's 10 MiB chunks."""
    folder = tmp_path_factory.mktemp("repo")
    (folder / "folder").mkdir()
    (folder / "folder" / "cfg.json").write_text("{}")
    (folder / NAME).write_bytes(bytes(range(256)) * 45_000)
    return files_in(folder)


@pytest.fixture
def hub(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server with the two files; usable under HF_HUB_OFFLINE=1, which a careful user exports for tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Else the client asks the real hub once for a list of agents, whatever `endpoint` says (2.4.0, _detect_agent.py).
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubServer() as server:
        server.add(REPO, COMMIT, files)
        yield server


def download(hub: HubServer, cache: Path, name: str = NAME, *, revision: str = COMMIT) -> Path:
    return Path(hf_hub_download(REPO, name, revision=revision, cache_dir=cache, endpoint=hub.url))


def asked(hub: HubServer) -> list[tuple[str, str | None]]:
    """Method and range of the requests for files."""
    files = [request for request in hub.requests if "/resolve/" in request.path]
    return [(request.method, request.headers.get("range")) for request in files]


def test_download_names_the_blob_after_its_sha256(hub: HubServer, files: dict[str, Path], tmp_path: Path) -> None:
    path = download(hub, tmp_path)
    assert path.read_bytes() == files[NAME].read_bytes()
    assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert asked(hub) == [("HEAD", None), ("GET", None)]


def test_a_pinned_file_in_the_cache_asks_nothing(hub: HubServer, tmp_path: Path) -> None:
    first = download(hub, tmp_path, "folder/cfg.json")
    hub.requests.clear()
    assert download(hub, tmp_path, "folder/cfg.json") == first
    assert hub.requests == []


def test_a_branch_is_resolved_and_remembered(hub: HubServer, tmp_path: Path) -> None:
    path = download(hub, tmp_path, "folder/cfg.json", revision="main")
    assert path.parts[-3] == COMMIT
    assert (tmp_path / "models--owner--name" / "refs" / "main").read_text() == COMMIT


def test_a_dropped_download_is_resumed(hub: HubServer, files: dict[str, Path], tmp_path: Path) -> None:
    """Whole chunks of 10 MiB are kept and the rest is asked for, one second later, in the same call."""
    hub.faults.append(Fault(NAME, "drop", at=11_000_000))
    path = download(hub, tmp_path)
    assert asked(hub) == [("HEAD", None), ("GET", None), ("GET", f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-")]
    assert path.read_bytes() == files[NAME].read_bytes()


def test_a_reset_download_is_not_retried_and_leaves_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault(NAME, "reset", at=11_000_000))
    with pytest.raises(Exception, match="(?i)reset"):
        download(hub, tmp_path)
    assert list((tmp_path / "models--owner--name" / "blobs").iterdir()) == []
    download(hub, tmp_path)
    assert asked(hub)[-1] == ("GET", None)


def test_the_client_does_not_notice_a_flipped_byte(hub: HubServer, tmp_path: Path) -> None:
    """So whoever needs the promised bytes must hash them: the blob keeps its name."""
    hub.faults.append(Fault(NAME, "flip", at=5))
    path = download(hub, tmp_path)
    assert path.read_bytes()[5] == 4
    assert path.resolve().name != hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_503_is_survived(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(Fault(NAME, "status", at=503))
    download(hub, tmp_path)
    assert asked(hub) == [("HEAD", None), ("HEAD", None), ("GET", None)]


@pytest.mark.parametrize(
    ("repo", "revision", "name", "error"),
    [
        (REPO, COMMIT, "absent.json", EntryNotFoundError),
        (REPO, "e" * 40, NAME, RevisionNotFoundError),
        ("owner/absent", COMMIT, NAME, RepositoryNotFoundError),
    ],
)
def test_what_is_missing_is_named(
    hub: HubServer, tmp_path: Path, repo: str, revision: str, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        hf_hub_download(repo, name, revision=revision, cache_dir=tmp_path, endpoint=hub.url)


def test_snapshot_download_and_environment(hub: HubServer, files: dict[str, Path], tmp_path: Path) -> None:
    """HF_ENDPOINT is read when huggingface_hub is imported, hence another process."""
    whole = Path(snapshot_download(REPO, cache_dir=tmp_path / "a", endpoint=hub.url))
    assert {name: etag_of(path) for name, path in files_in(whole).items()} == {n: etag_of(p) for n, p in files.items()}
    program = f"from huggingface_hub import hf_hub_download; hf_hub_download('{REPO}', '{NAME}')"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "b"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert (tmp_path / "b" / "hub" / "models--owner--name" / "snapshots" / COMMIT / NAME).is_file()


def test_the_client_finds_what_is_placed_in_its_cache(files: dict[str, Path], tmp_path: Path) -> None:
    snapshot = place_in_hub_cache(tmp_path, REPO, COMMIT, files)
    for name, source in files.items():
        for revision in (COMMIT, "main"):
            found = hf_hub_download(REPO, name, revision=revision, cache_dir=tmp_path, local_files_only=True)
            assert Path(found) == snapshot / name
        assert Path(found).resolve().name == etag_of(source)
        assert Path(found).read_bytes() == source.read_bytes()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "absent", revision=COMMIT, cache_dir=tmp_path, local_files_only=True)


def test_reformatted_replica(tmp_path: Path) -> None:
    write_reformatted(tmp_path, 8, d_in=64, d_sae=512)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (64, 512), "b_enc": (512,), "W_dec": (512, 64), "b_dec": (64,)}
    x_BD = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))
    active_BF = (x_BD - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"] > 0
    assert active_BF.sum(1).float().mean().item() == pytest.approx(40, rel=0.15)
    log_rate_F = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert log_rate_F.min() == -10
    assert ((log_rate_F == -10) | (log_rate_F > -6.613)).all()
    assert log_rate_F.max() < 0


@pytest.mark.parametrize(("layer", "hook", "size"), [(0, "pre", 1274), (11, "pre", 1277), (11, "post", 1279)])
def test_config_has_the_published_length(layer: int, hook: str, size: int) -> None:
    cfg = config(layer, hook=f"resid_{hook}")
    assert len(cfg) == 41
    assert len(json.dumps(cfg)) == size


def test_legacy_replica_imports_what_the_published_pickle_imports(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    write_legacy(path, 2, d_in=64, d_sae=256)
    with zipfile.ZipFile(path) as archive:
        opcodes = list(pickletools.genops(archive.read("old/data.pkl")))
    assert {str(argument).replace(" ", ".") for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "torch.device",
        "torch.FloatStorage",
        "torch.float32",
        "torch._utils._rebuild_tensor_v2",
        CONFIG_CLASS,
        "collections.OrderedDict",
    }
    assert "cuda:0" in [argument for _, argument, _ in opcodes]
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == [CONFIG_CLASS]
    assert "sae_training" not in sys.modules


def test_legacy_replica_holds_the_reformatted_weights(tmp_path: Path) -> None:
    class Inert:
        """Stands in for the config class of the 2024 code."""

    path = tmp_path / "old.pt"
    write_legacy(path, 2, d_in=64, d_sae=256)
    with torch.serialization.safe_globals([(Inert, CONFIG_CLASS)]):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    known = vars(loaded["cfg"]) | {"device": "mps", "dtype": "torch.float32", "use_ghost_grads": False}
    assert known == config(2, d_in=64, d_sae=256)
    assert list(known) == list(config(2))
    torch.testing.assert_close(dict(loaded["state_dict"]), weights(2, 64, 256), rtol=0, atol=0)
    log_rate_F = torch.load(tmp_path / "old_log_feature_sparsity.pt", weights_only=True)
    torch.testing.assert_close(log_rate_F, sparsity(2, 256), rtol=0, atol=0)


def test_gpt2_replica_loads_without_missing_keys(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_gpt2(tmp_path, n_layer=2, d=32, n_head=4, vocab=100, n_positions=16)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert model(torch.arange(16)[None]).logits.isfinite().all()
    names = load_file(tmp_path / "model.safetensors")
    assert len(names) == 4 + 13 * 2
    assert tuple(names["h.0.attn.bias"].shape) == (1, 1, 16, 16)
