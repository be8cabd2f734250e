"""What several test modules need: a tiny model with a tokenizer, and an overlay registry of small replicas."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

BOS = "<|endoftext|>"

# Tiny matrices: on a busy machine several threads mostly wait for each other, twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SAEZOO_CACHE"] = tempfile.mkdtemp(prefix="saezoo-tests-")  # never the user's
os.environ["SAEZOO_LOCK"] = str(Path(os.environ["SAEZOO_CACHE"]) / "saezoo.lock")


@pytest.fixture(autouse=True)
def own_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' repositories share names, not contents."""
    monkeypatch.setenv("SAEZOO_LOCK", str(tmp_path / "saezoo.lock"))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 2 layers, d_model 16 and 64 positions with random weights, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bos = len(letters)
        sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": bos + 1}
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=bos, eos_token_id=bos))
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def small_registry() -> dict[str, Any]:
    """An overlay, fresh for each test: collection `small`, laid out as gpt2-small-res, d_in 64 and d_sae 256."""
    source = {"source": ["test"]}
    layouts = {
        "reformatted": {
            "format": "saelens",
            "repo": "owner/reformatted",
            "revision": "a" * 40,
            "weights": "{hook}/sae_weights.safetensors",
            "config": "{hook}/cfg.json",
            "sparsity": "{hook}/sparsity.safetensors",
            **source,
        },
        "original": {
            "format": "legacy",
            "repo": "owner/original",
            "revision": "b" * 40,
            "weights": "final_sparse_autoencoder_gpt2-small_{hook}_256.pt",
            "config": None,
            "sparsity": "final_sparse_autoencoder_gpt2-small_{hook}_256_log_feature_sparsity.pt",
            **source,
        },
    }
    sizes = {"d_in": 64, "d_sae": 256, "context_size": 128, "prepend_bos": True, "centre": True, "dtype": "float32"}
    collection = {
        "title": "Small replicas",
        "model": "gpt2-small",
        "dataset": None,
        "recipe": "feb2024",
        "hook": "blocks.{layer}.hook_resid_pre",
        **sizes,
        "licence": "MIT",
        **source,
        "layouts": layouts,
        "published": {"protocol": "standard", "sample": "none", "definitions": {"l0": "features above 0"}, **source},
        "saes": [{"layer": layer, "neuronpedia": None, "published": {}, "files": {}} for layer in range(3)],
    }
    return {"version": 1, "sources": {"test": "made by the tests"}, "collections": {"small": collection}}


def write_registry(path: Path, content: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path
