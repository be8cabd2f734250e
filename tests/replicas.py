"""Replicas of the published files, byte layout included, with random weights.

Layouts: `jbloom/GPT2-Small-SAEs-Reformatted` (cfg.json, two safetensors), `jbloom/GPT2-Small-SAEs`
(pickles of the 2024 training code), `openai-community/gpt2`, and huggingface_hub's cache of them.

Shapes: D = d_in (768), F = d_sae (24,576 latents). One (layer, d_in, d_sae, seed, rms) gives the same
weights in both layouts, as it does in the published pair.
"""

import json
import math
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from hubserver import etag_of, is_lfs
from safetensors.torch import save_file
from torch import Tensor

WINDOW_TOKENS = 4_096_000
"""Tokens behind one sparsity estimate: 1000 steps of 4096 (`feature_sampling_window` in the config)."""
EXPECTED_L0 = 40
_CHECKPOINTS = {0: "y1t51byy", 5: "65ufbyeo", 8: "ut7lhl4q"}  # the published run ids that are known
_CONFIG = """{"model_name": "gpt2-small", "hook_point": null, "hook_point_layer": null, "hook_point_head_index": null,
"dataset_path": "Skylion007/openwebtext", "is_dataset_tokenized": false, "context_size": 128,
"use_cached_activations": false, "cached_activations_path": null, "d_in": null, "n_batches_in_buffer": 128,
"total_training_tokens": 300000000, "store_batch_size": 32, "device": "mps", "seed": 42, "dtype": "torch.float32",
"b_dec_init_method": "geometric_median", "expansion_factor": null, "from_pretrained_path": null,
"l1_coefficient": 8e-05, "lr": 0.0004, "lr_scheduler_name": null, "lr_warm_up_steps": 5000, "train_batch_size": 4096,
"use_ghost_grads": false, "feature_sampling_window": 1000, "feature_sampling_method": null, "resample_batches": 1028,
"feature_reinit_scale": 0.2, "dead_feature_window": 5000, "dead_feature_estimation_method": "no_fire",
"dead_feature_threshold": 1e-08, "log_to_wandb": true, "wandb_project": "mats_sae_training_gpt2_small_resid_pre_5",
"wandb_entity": null, "wandb_log_frequency": 100, "n_checkpoints": 10, "checkpoint_path": null, "d_sae": null,
"tokens_per_buffer": 67108864, "run_name": null}"""


def config(layer: int, *, d_in: int = 768, d_sae: int = 24576, hook: str = "resid_pre") -> dict[str, Any]:
    """The 41 keys of a published cfg.json, in order; "device" and "use_ghost_grads" are as false as there."""
    point = f"blocks.{layer}.hook_{hook}"
    own = {
        "hook_point": point,
        "hook_point_layer": layer,
        "cached_activations_path": f"activations/Skylion007_openwebtext/gpt2-small/{point}",
        "d_in": d_in,
        "expansion_factor": d_sae // d_in,
        "checkpoint_path": f"checkpoints/{_CHECKPOINTS.get(layer, f'replica{layer % 10}')}",
        "d_sae": d_sae,
        "run_name": f"{d_sae}-L1-8e-05-LR-0.0004-Tokens-3.000e+08",
    }
    return {**json.loads(_CONFIG), **own}


def weights(layer: int, d_in: int = 768, d_sae: int = 24576, seed: int = 0, rms: float = 1.0) -> dict[str, Tensor]:
    """W_enc [D, F], b_enc [F], W_dec [F, D] with unit rows, b_dec [D], all float32.

    On normal inputs of standard deviation `rms` per coordinate about min(40, F / 8) latents are active:
    each pre-activation is then normal too, and b_enc is the quantile that leaves this share positive.
    """
    random = torch.Generator().manual_seed(1000 * seed + layer)
    W_dec_FD = torch.randn(d_sae, d_in, generator=random)
    W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
    # Gains that differ per latent, so that no test passes with W_dec.T in the place of W_enc.
    gain_F = 0.8 + 0.4 * torch.rand(d_sae, generator=random)
    quantile = NormalDist().inv_cdf(1 - min(EXPECTED_L0 / d_sae, 1 / 8))
    return {
        "W_enc": (W_dec_FD * gain_F[:, None]).T.contiguous(),
        "b_enc": -quantile * rms * gain_F,
        "W_dec": W_dec_FD,
        "b_dec": 0.1 * rms * torch.randn(d_in, generator=random),
    }


def sparsity(layer: int, d_sae: int = 24576, seed: int = 0) -> Tensor:
    """[F] log10 of each latent's firing rate: -10 for those that never fired, else within [-6.62, 0).

    Latent 0 is always dead and latent 1 fired once; one in 20 of the others is dead.
    """
    random = torch.Generator().manual_seed(1000 * seed + layer)
    uniform_F = torch.rand(d_sae, generator=random, dtype=torch.float64)
    fired_F = (0.05 * WINDOW_TOKENS) ** uniform_F  # log-uniform from one token to 5 %
    fired_F = torch.where(torch.rand(d_sae, generator=random) < 0.05, 0.0, fired_F.floor())
    fired_F[:2] = torch.tensor([0.0, 1.0])
    return (fired_F / WINDOW_TOKENS + 1e-10).log10().float()


def write_reformatted(
    folder: Path,
    layer: int,
    *,
    d_in: int = 768,
    d_sae: int = 24576,
    seed: int = 0,
    hook: str = "resid_pre",
    rms: float = 1.0,
) -> None:
    """Write cfg.json, sae_weights.safetensors and sparsity.safetensors into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # `json.dump` with its defaults gives the published 1274, 1277 and 1279 bytes.
    (folder / "cfg.json").write_text(json.dumps(config(layer, d_in=d_in, d_sae=d_sae, hook=hook)))
    save_file(weights(layer, d_in, d_sae, seed, rms), folder / "sae_weights.safetensors")
    save_file({"sparsity": sparsity(layer, d_sae, seed)}, folder / "sparsity.safetensors")


def legacy_name(layer: int, *, d_sae: int = 24576, hook: str = "resid_pre") -> str:
    """The published file name of the pickle."""
    return f"final_sparse_autoencoder_gpt2-small_blocks.{layer}.hook_{hook}_{d_sae}.pt"


def write_legacy(
    path: Path,
    layer: int,
    *,
    d_in: int = 768,
    d_sae: int = 24576,
    seed: int = 0,
    hook: str = "resid_pre",
    rms: float = 1.0,
) -> None:
    """Write the pickle of the 2024 code to `path`, and its `…_log_feature_sparsity.pt` beside it."""
    state = OrderedDict(weights(layer, d_in, d_sae, seed, rms))
    # `nn.Module.state_dict` notes a version per submodule; these four were TransformerLens hook points.
    modules = ("", "hook_sae_in", "hook_hidden_pre", "hook_hidden_post", "hook_sae_out")
    state.__dict__["_metadata"] = OrderedDict((name, {"version": 1}) for name in modules)
    attributes = config(layer, d_in=d_in, d_sae=d_sae, hook=hook)
    attributes |= {"device": torch.device("cuda"), "dtype": torch.float32, "use_ghost_grads": True}
    with mock.patch.object(torch._C, "PyTorchFileWriter", _Writer2024):
        torch.save(sparsity(layer, d_sae, seed), path.with_name(f"{path.stem}_log_feature_sparsity.pt"))
        with _training_config_class() as cls, mock.patch.object(torch.serialization, "location_tag", _cuda_tag):
            cfg = cls()
            vars(cfg).update(attributes)
            torch.save({"cfg": cfg, "state_dict": state}, path)


def _cuda_tag(storage: object) -> str:
    """The location of a storage on the first GPU, where the published tensors were when saved."""
    return "cuda:0"


class _Writer2024(torch._C.PyTorchFileWriter):
    """torch's zip writer without the records torch had not yet in February 2024.

    So the pickle of blocks.11.hook_resid_post gets its published 151,100,656 bytes, its sparsity 100,273.
    """

    def write_record(self, name: str, *content: Any) -> None:
        if name not in (".format_version", ".storage_alignment"):
            super().write_record(name, *content)


@contextmanager
def _training_config_class() -> Iterator[type]:
    """`sae_training.config.LanguageModelSAERunnerConfig`, importable (so picklable) inside the block only."""
    package, module = ModuleType("sae_training"), ModuleType("sae_training.config")
    cls = type("LanguageModelSAERunnerConfig", (), {"__module__": module.__name__})
    vars(module)[cls.__name__] = cls
    sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        yield cls
    finally:
        del sys.modules[package.__name__], sys.modules[module.__name__]


def write_gpt2(
    folder: Path,
    *,
    n_layer: int = 12,
    d: int = 768,
    n_head: int = 12,
    vocab: int = 50257,
    n_positions: int = 1024,
    seed: int = 0,
    tokenizer: Sequence[Path] = (),
) -> None:
    """Write a GPT-2 with random weights as on the hub, and the tokenizer files found in `tokenizer`.

    `tokenizer` lists folders; of each file the first one found is copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = _gpt2_config(n_layer, d, n_head, vocab, n_positions)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = _gpt2_tensors(n_layer, d, vocab, n_positions, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        found = [place / name for place in tokenizer if (place / name).is_file()]
        if found:
            shutil.copyfile(found[0], folder / name)


def _gpt2_config(n_layer: int, d: int, n_head: int, vocab: int, n_positions: int) -> dict[str, Any]:
    """The hub's config.json without its `task_specific_params`."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": vocab - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": vocab - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": n_positions,
        "n_embd": d,
        "n_head": n_head,
        "n_layer": n_layer,
        "n_positions": n_positions,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "vocab_size": vocab,
    }


def _gpt2_tensors(n_layer: int, d: int, vocab: int, n_positions: int, seed: int) -> dict[str, Tensor]:
    """The 4 + 13 per layer tensors of the hub's file: no "transformer." prefix, no lm_head, masks included."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=random)

    def layer_norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(d), f"{name}.bias": torch.zeros(d)}

    # GPT-2 paper, 2.3: what is added to the residual stream is smaller by the root of the number of additions.
    small = 0.02 / math.sqrt(2 * n_layer)
    mask = torch.ones(n_positions, n_positions).tril()[None, None]
    tensors = {"wte.weight": normal(vocab, d), "wpe.weight": normal(n_positions, d), **layer_norm("ln_f")}
    for h in (f"h.{index}" for index in range(n_layer)):
        tensors |= layer_norm(f"{h}.ln_1") | layer_norm(f"{h}.ln_2")
        tensors[f"{h}.attn.bias"] = mask.clone()  # safetensors refuses tensors that share memory
        tensors[f"{h}.attn.c_attn.weight"] = normal(d, 3 * d)  # Conv1D: inputs by outputs
        tensors[f"{h}.attn.c_attn.bias"] = torch.zeros(3 * d)
        tensors[f"{h}.attn.c_proj.weight"] = normal(d, d, std=small)
        tensors[f"{h}.attn.c_proj.bias"] = torch.zeros(d)
        tensors[f"{h}.mlp.c_fc.weight"] = normal(d, 4 * d)
        tensors[f"{h}.mlp.c_fc.bias"] = torch.zeros(4 * d)
        tensors[f"{h}.mlp.c_proj.weight"] = normal(4 * d, d, std=small)
        tensors[f"{h}.mlp.c_proj.bias"] = torch.zeros(d)
    return tensors


def files_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Every file under `folder`, keyed by `prefix` and its path below the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path for path in paths}


def place_in_hub_cache(
    cache: Path, repo_id: str, revision: str, files: Mapping[str, Path], *, repo_type: str = "model"
) -> Path:
    """Lay `files` (keyed by path in the repository) out as huggingface_hub caches them; return the snapshot.

    LFS files are hard-linked where the file system allows it: do not write into them afterwards.
    """
    storage = cache / "--".join([f"{repo_type}s", *repo_id.split("/")])
    snapshot = storage / "snapshots" / revision
    for folder in (storage / "blobs", storage / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(revision)
    for name, source in files.items():
        blob, pointer = storage / "blobs" / etag_of(source), snapshot / name
        if not blob.exists():
            _link_or_copy(source, blob)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return snapshot


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a big file, copy a small one or one on another file system."""
    if is_lfs(source):
        try:
            return os.link(source, target)
        except OSError:
            pass
    shutil.copyfile(source, target)
