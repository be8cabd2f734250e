"""Other projects' SAEs: written, loaded and run by their own code, then loaded and run by saezoo.

    python benchmarks/formats.py --peer-python PYTHON --openai CHECKOUT --out DIR

PYTHON has SAELens, dictionary_learning and sparsify; CHECKOUT is one of openai/sparse_autoencoder, which is no package.
For each kind a small SAE with random weights is saved and loaded by the peer's own functions and run on fixed inputs.
DIR keeps a folder for each: the peer's files, and `expected.safetensors` with inputs x, features f and reconstructions
x_hat; tests/golden/formats was made so. Prints the largest difference from saezoo, relative to the largest value, and
whether the same features fire; appends to results/formats.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, versions

D, F, N, K = 12, 40, 64, 5
PACKAGES = ("torch", "sae_lens", "dictionary_learning", "eai-sparsify")
PLACES = {"sparsify": "h.3"}
"""Case -> folder inside of it that holds the SAE."""
Peer = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


def randomise(module: Any) -> Any:
    """Random weights: parameters of any peer's module, thresholds above 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
            if tensor.is_floating_point() and tensor.ndim:
                scale = 0.3 if tensor.ndim == 2 else 0.1
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
                if name == "threshold":
                    tensor.abs_()
    return module


def inputs() -> Any:
    """x [N, D]: of different norms, and with a mean, as residual streams have."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(N, D, generator=generator) + 0.5
    return x_ND * torch.linspace(0.3, 3, N)[:, None]


def saelens_cases() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Every architecture for inference, b_dec on the input or not, inputs normalised or not."""
    from sae_lens import SAE
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "gated": (GatedSAE, GatedSAEConfig, {}),
    }
    for name, (kind, config, options) in classes.items():
        for case, more in (
            ("", {}),
            ("_free", {"apply_b_dec_to_input": False}),
            ("_normalised", {"normalize_activations": "layer_norm"}),
        ):

            def make(
                folder: Path, kind: Any = kind, config: Any = config, options: dict[str, Any] = options | more
            ) -> Any:
                randomise(kind(config(d_in=D, d_sae=F, **options))).save_model(folder)
                sae = SAE.load_from_disk(folder)
                return lambda x: (f := sae.encode(x), sae.decode(f))

            yield f"saelens_{name}{case}", make


def dictionary_cases() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """All classes that its `load_dictionary` knows; AutoEncoder without the normalisation that changes its weights."""
    import torch
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    made: dict[str, Callable[[], Any]] = {
        "AutoEncoder": lambda: d.AutoEncoder(D, F),
        "AutoEncoderNew": lambda: d.AutoEncoderNew(D, F),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [F // 4, F - F // 4]),
        "JumpReluAutoEncoder": lambda: d.JumpReluAutoEncoder(D, F),
        "GatedAutoEncoder": lambda: d.GatedAutoEncoder(D, F),
    }
    for name, new in made.items():

        def make(folder: Path, name: str = name, new: Callable[[], Any] = new) -> Any:
            sae = randomise(new())
            if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
                sae.threshold.fill_(0.8)
            torch.save(sae.state_dict(), folder / "ae.pt")
            trainer = {
                "dict_class": name,
                "k": K,
                "layer": 3,
                "lm_name": "gpt2",
                "submodule_name": "resid_post_layer_3",
            }
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
            if name == "AutoEncoder":
                loaded = d.AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
            else:
                loaded, _ = load_dictionary(str(folder), "cpu")
            return lambda x: (f := loaded.encode(x), loaded.decode(f))

        yield f"dictionary_learning_{name}", make


def other_cases(openai: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """sparsify's TopK, OpenAI's two kinds, and Gemma Scope as SAELens reads it."""
    import numpy as np
    import torch

    sys.path.insert(0, str(openai))

    def sparsify(folder: Path) -> Any:
        from sparsify import SparseCoder, SparseCoderConfig

        randomise(SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))).save_to_disk(folder)
        sae = SparseCoder.load_from_disk(folder)

        def run(x: Any) -> tuple[Any, Any]:
            values, indices, _ = sae.encode(x)
            return torch.zeros(len(x), F).scatter_(1, indices, values), sae.decode(values, indices)

        return run

    def openai_file(folder: Path, topk: bool) -> Any:
        from sparse_autoencoder.model import Autoencoder, TopK

        kind = {"activation": TopK(K), "normalize": True} if topk else {}
        state = randomise(Autoencoder(F, D, **kind)).state_dict()
        # With today's torch its state_dict has two keys more that its own loader refuses.
        torch.save({k: v for k, v in state.items() if not k.startswith("activation.")}, folder / "3.pt")
        sae = Autoencoder.from_state_dict(torch.load(folder / "3.pt"))

        def run(x: Any) -> tuple[Any, Any]:
            f, info = sae.encode(x)
            return f, sae.decode(f, info)

        return run

    def gemma(folder: Path) -> Any:
        from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader
        from sae_lens.saes.jumprelu_sae import JumpReLUSAE

        generator = torch.Generator().manual_seed(0)
        shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        arrays = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        arrays["threshold"].abs_()
        np.savez(folder / "params.npz", **{name: t.numpy() for name, t in arrays.items()})  # type: ignore[arg-type]
        # The hub's cache as its client lays it out: no network here.
        place = Path(os.environ["HF_HUB_CACHE"]) / "models--google--gemma-scope-2b-pt-res"
        name = "layer_3/width_16k/average_l0_59"
        (place / "snapshots" / ("0" * 40) / name).mkdir(parents=True, exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots" / ("0" * 40) / name / "params.npz").write_bytes((folder / "params.npz").read_bytes())
        # Its loader gives every file the sizes of the published ones, unless told.
        sizes = {"d_in": D, "d_sae": F, "normalize_activations": "none"}
        cfg, state, _ = gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", name, cfg_overrides=sizes)
        sae = JumpReLUSAE.from_dict(cfg)
        sae.load_state_dict(state)
        return lambda x: (f := sae.encode(x), sae.decode(f))

    yield "sparsify", sparsify
    yield "openai_relu", lambda folder: openai_file(folder, False)
    yield "openai_topk", lambda folder: openai_file(folder, True)
    yield "gemma_scope", gemma


def write_peers(out: Path, openai: Path) -> None:
    """Run in the peers' own Python: their files and their outputs."""
    import torch
    from safetensors.torch import save_file

    x_ND = inputs()
    for cases in (saelens_cases(), dictionary_cases(), other_cases(openai)):
        for name, make in cases:
            folder = out / name
            place = folder / PLACES.get(name, "")
            place.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                f_NF, x_hat_ND = make(place)(x_ND)
            found = {"x": x_ND, "f": f_NF, "x_hat": x_hat_ND}
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in found.items()}, folder / "expected.safetensors"
            )
    print(json.dumps(versions(*PACKAGES)))


def compare(folder: Path) -> dict[str, Any]:
    """saezoo on one case: largest differences relative to the largest value, and whether the same features fire."""
    from safetensors.torch import load_file

    from saezoo import load

    expected = load_file(folder / "expected.safetensors")
    place = folder / PLACES.get(folder.name, "")
    sae = load(place / "3.pt" if folder.name.startswith("openai") else place)
    f_NF = sae.encode(expected["x"])
    x_hat_ND = sae(expected["x"])
    row: dict[str, Any] = {"case": folder.name, "activation": sae.config.activation}
    for name, mine in (("f", f_NF), ("x_hat", x_hat_ND)):
        row[name] = float((mine - expected[name]).abs().max() / expected[name].abs().max())
    row["l0"] = float((f_NF > 0).sum(1).float().mean())
    row["same_features_fire"] = bool(((f_NF > 0) == (expected["f"] > 0)).all())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--openai", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="the peers' part alone, in this process")
    args = parser.parse_args()
    if args.write:
        return write_peers(args.out, args.openai)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": cache}
        environment |= {
            "PYTHONWARNINGS": "ignore",
            "SPARSIFY_DISABLE_TRITON": "1",
        }  # its switch for machines without a GPU
        words = [args.peer_python, __file__, "--write", "--openai", str(args.openai), "--out", str(args.out)]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peers = json.loads(done.stdout.splitlines()[-1])
    for folder in sorted(path for path in args.out.iterdir() if (path / "expected.safetensors").is_file()):
        row = compare(folder)
        differences = "  ".join(f"{name} {row[name]:.1e}" for name in ("f", "x_hat"))
        same = "same features" if row["same_features_fire"] else "OTHER FEATURES FIRE"
        print(f"{row['case']:45} {row['activation']:10} {differences}  L0 {row['l0']:5.2f}  {same}")
        append(RESULTS / "formats.csv", row | peers)


if __name__ == "__main__":
    main()
