"""The same SAE, language model and tokens, evaluated by saezoo and by its peers' own code.

    python benchmarks/agreement.py --peer-python PYTHON

PYTHON has SAELens 6.54.12, TransformerLens 3, sae_bench 0.6.0, dictionary_learning 0.1.0 and nnsight 0.3.7
(docs/agreement.md says how to make it). Each peer runs in a process of its own; its evaluation functions are called as
they are, on batches of several rows. Two tasks: `golden`, the model and SAE of tests/golden, and `tiny-res`, layer 2,
on held-out text; and `one large mean`, made-up activations of which the truth is known. Prints what each gives beside
saezoo, marks what differs by more than 1e-5, and appends to results/agreement.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, ROOT, append, in_fresh_process, versions
from torch import Tensor

TASKS = ("golden", "tiny-res")
PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "sae_bench", "dictionary_learning", "nnsight")
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
    "frac_alive": "alive_fraction",
}
"""SAELens' and SAEBench's names -> saezoo's."""
SAME_DICTIONARY_LEARNING = {
    "loss_original": "ce_clean",
    "loss_reconstructed": "ce_sae",
    "loss_zero": "ce_zero",
    "frac_recovered": "ce_score",
    "frac_variance_explained": "explained_variance",
    "cossim": "cosine",
    "l2_ratio": "norm_ratio",
    "l0": "l0",
    "l1_loss": "l1",
    "frac_alive": "alive_fraction",
}
LEFT_ALONE = {
    "feb2024": tuple(SAME_DICTIONARY_LEARNING),
    "feb2024, end of text is padding": ("loss_original", "loss_reconstructed", "loss_zero", "frac_recovered"),
    "feb2024, one batch": ("frac_alive",),
}
"""What dictionary_learning gives by its defaults: nnsight makes the end of text the padding of a tokenizer without any,
and targets that are padding are left out; `n_batches` is 1."""
Found = dict[str, dict[str, float]]
"""Protocol (`feb2024`: all tokens; `standard`: no special ones) -> metric, under saezoo's name -> value."""


class Setup(NamedTuple):
    """One task, as every tool gets it."""

    lm: Any
    sae: Any
    rows: Any
    bos: int
    batch: int
    """Rows that a peer gets at once."""

    @property
    def tokens_RT(self) -> Tensor:
        return torch.from_numpy(self.rows.tokens_RT)


def setup(task: str) -> Setup:
    """The golden files of the tests, or 8,192 tokens of held-out text for layer 2 of tiny-res."""
    import numpy as np
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    from saezoo.lm import LanguageModel
    from saezoo.sae import SAE
    from saezoo.sae_config import SAEConfig
    from saezoo.tokens import Rows
    from saezoo.workflows import Options, prepare

    if task == "tiny-res":
        found = prepare("tiny-res", 2, tokens=8192, protocol="standard", model=None, layout=None, options=Options())
        return Setup(found.lm, found.subjects[0].sae, found.rows, found.lm.bos, 16)
    golden = ROOT / "tests" / "golden"
    tokens_RT = load_file(golden / "saelens_eval.safetensors")["tokens"].long()
    model = GPT2LMHeadModel.from_pretrained(golden / "saelens_eval_model", attn_implementation="sdpa")
    config = SAEConfig(64, 256, "blocks.2.hook_resid_pre", "golden", 128, True, True, True)
    sae = SAE(config, load_file(golden / "saelens_eval_sae.safetensors"))
    rows = Rows(tokens_RT.numpy(), np.arange(tokens_RT.numel()).reshape(tokens_RT.shape) // 64)
    return Setup(LanguageModel(model, tokenizer_of(model.config.vocab_size)), sae, rows, 511, 3)


def tokenizer_of(vocab: int) -> Any:
    """For a model that has only token ids: the last is the end of text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = {f"w{i}": i for i in range(vocab - 1)} | {end: vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def run_saezoo(task: str) -> Found:
    """Ours, by both protocols."""
    from saezoo.evals import Subject, evaluate

    s = setup(task)
    found: Found = {}
    protocols: tuple[Any, ...] = ("feb2024", "standard")
    for protocol in protocols:
        result = evaluate([Subject(s.sae, task, "2")], s.lm, s.rows, protocol=protocol)[0]
        found[protocol] = {n: m.value for n, m in result.metrics.items() if m.value is not None}
    return found


class FixedRows:
    """As much of SAELens' ActivationsStore as evaluations use: it hands out the given rows in order."""

    def __init__(self, s: Setup) -> None:
        self.tokens_RT, self.store_batch_size_prompts, self._next = s.tokens_RT, s.batch, 0
        self.context_size = s.tokens_RT.shape[1]

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        """The next `batch_size` rows."""
        self._next += batch_size
        return self.tokens_RT[self._next - batch_size : self._next]

    def reset_input_dataset(self) -> None:
        """Start again from the first row."""
        self._next = 0


def named(groups: Any, features: Any) -> dict[str, float]:
    """SAELens' or SAEBench's groups of scalars under saezoo's names."""
    flat = {name: value for group in groups.values() for name, value in group.items()}
    density_F = torch.tensor(features["feature_density"])
    flat["frac_alive"] = float((density_F > 0).double().mean())
    return {ours: float(flat[theirs]) for theirs, ours in SAME.items()}


def peer_sae(s: Setup) -> Any:
    """The SAE as SAELens reads it from the folder that saezoo saves."""
    import tempfile

    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        return SAE.load_from_disk(s.sae.save(Path(folder) / "sae"))


def run_saelens(task: str) -> Found:
    """`sae_lens.evals.run_evals`, everything switched on."""
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from saezoo.hooked import hooked_model

    s = setup(task)
    model, sae = hooked_model(s.lm.hf_model, s.lm.tokenizer), peer_sae(s)
    batches = len(s.tokens_RT) // s.batch
    config = get_eval_everything_config(s.batch, batches, batches)
    found: Found = {}
    masks: dict[str, Any] = {"feb2024": False, "standard": [s.bos]}
    for protocol, excluded in masks.items():
        store: Any = FixedRows(s)
        scaler = ActivationScaler()
        found[protocol] = named(*run_evals(sae, store, model, scaler, config, exclude_special_tokens=excluded))
    found["loader"] = saelens_loader(s, model, sae)
    return found


def saelens_loader(s: Setup, model: Any, sae: Any) -> dict[str, float]:
    """Left to SAELens' own loader: how many of the rows that give its cross-entropy also give its sparsity."""
    from datasets import Dataset
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    data = Dataset.from_dict({"tokens": s.tokens_RT.tolist()})
    store = ActivationsStore.from_sae(model, sae, data, streaming=False, store_batch_size_prompts=s.batch)
    handed_out: list[list[tuple[int, ...]]] = [[]]
    get, reset = store.get_batch_tokens, store.reset_input_dataset

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        batch_BT: Tensor = get(*args, **kwargs)
        handed_out[-1] += [tuple(row) for row in batch_BT.tolist()]
        return batch_BT

    def recorded_reset() -> None:
        handed_out.append([])
        reset()

    patched: Any = store
    patched.get_batch_tokens, patched.reset_input_dataset = recorded, recorded_reset
    run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(s.batch, 1, 1))
    first, second = (set(part) for part in [p for p in handed_out if p][:2])
    return {"rows of cross-entropy": len(first), "of these also of sparsity": len(first & second)}


def run_sae_bench(task: str) -> Found:
    """`sae_bench.evals.core.main.run_evals` with SAEBench's own ReLU SAE."""
    from saezoo.hooked import hooked_model

    ReluSAE = import_module("sae_bench.custom_saes.relu_sae").ReluSAE  # noqa: N806
    CoreEvalConfig = import_module("sae_bench.evals.core.eval_config").CoreEvalConfig  # noqa: N806
    run_evals = import_module("sae_bench.evals.core.main").run_evals

    s = setup(task)
    model, sizes = hooked_model(s.lm.hf_model, s.lm.tokenizer), s.sae.config
    sae = ReluSAE(sizes.d_in, sizes.d_sae, task, 2, torch.device("cpu"), torch.float32, sizes.hook)
    sae.load_state_dict({name: tensor.detach() for name, tensor in s.sae.named_parameters()})
    batches = len(s.tokens_RT) // s.batch
    switches = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    config = CoreEvalConfig(
        batch_size_prompts=s.batch,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=True,
        **{f"compute_{name}": True for name in switches},
    )
    ignored: dict[str, set[int]] = {"feb2024": set(), "standard": {s.bos}}
    return {
        protocol: named(*run_evals(sae, FixedRows(s), model, config, ignore_tokens=tokens))
        for protocol, tokens in ignored.items()
    }


def centred(hf_model: Any) -> Any:
    """A copy whose residual stream has mean 0: what writes to it has its mean over d_model taken off."""
    import copy

    model = copy.deepcopy(hf_model)
    with torch.no_grad():
        writers = [model.transformer.wte.weight, model.transformer.wpe.weight]
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                writers += [layer.weight, layer.bias]
        head = model.lm_head.weight.detach().clone()
        for writer in writers:
            writer -= writer.mean(-1, keepdim=True)
        model.lm_head.weight = torch.nn.Parameter(head)  # it shares the embedding's
    return model


def run_dictionary_learning(task: str) -> Found:
    """`dictionary_learning.evaluation.evaluate` with its own AutoEncoder and loss by nnsight, on a centred model."""
    peer, nnsight = import_module("dictionary_learning"), import_module("nnsight")
    evaluate = import_module("dictionary_learning.evaluation").evaluate

    s = setup(task)
    dictionary = peer.AutoEncoder(s.sae.config.d_in, s.sae.config.d_sae)
    weights = {"encoder.weight": s.sae.W_enc.T, "encoder.bias": s.sae.b_enc, "decoder.weight": s.sae.W_dec.T}
    dictionary.load_state_dict({n: w.detach().clone() for n, w in (weights | {"bias": s.sae.b_dec}).items()})
    hf_model = centred(s.lm.hf_model)
    with torch.no_grad():
        x_RTD = hf_model(s.tokens_RT, output_hidden_states=True).hidden_states[2]

    class Buffer(peer.ActivationBuffer):  # type: ignore[misc, name-defined]
        """Hands out the same rows' activations and tokens, batch by batch; computes nothing."""

        def __init__(self, model: Any) -> None:
            self.model, self.submodule = model, model.transformer.h[1]
            self._x: Iterator[Tensor] = iter(torch.split(x_RTD, s.batch))
            self._tokens: Iterator[Tensor] = iter(torch.split(s.tokens_RT, s.batch))

        def __next__(self) -> Tensor:
            return next(self._x).flatten(0, 1)

        def text_batch(self, batch_size: int | None = None) -> Tensor:
            return next(self._tokens)

    tokenizer, all_batches = s.lm.tokenizer, len(s.tokens_RT) // s.batch
    unused = min(set(range(s.lm.vocab)) - set(s.tokens_RT.flatten().tolist()))
    as_it_comes, apart = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(unused)
    found: Found = {}
    for name, pad, n in (
        ("feb2024", apart, all_batches),
        ("feb2024, end of text is padding", as_it_comes, all_batches),
        ("feb2024, one batch", apart, 1),
    ):
        tokenizer.pad_token = pad
        model = nnsight.LanguageModel(hf_model, tokenizer=tokenizer)
        # max_len would be passed on to a call that transformers 5 no longer has; the rows are no longer than that.
        values = evaluate(dictionary, Buffer(model), max_len=None, n_batches=n)
        found[name] = {SAME_DICTIONARY_LEARNING[theirs]: float(values[theirs]) for theirs in LEFT_ALONE[name]}
    return found


RUN: dict[str, Callable[[str], Found]] = {
    "SAELens": run_saelens,
    "SAEBench": run_sae_bench,
    "dictionary_learning": run_dictionary_learning,
}


def one_large_mean() -> dict[str, float]:
    """SAEBench on activations of which one dimension has mean 300, as GPT-2's residual has; the truth is 0.75."""
    core = import_module("sae_bench.evals.core.main")
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(8, 128, 768, generator=generator)
    x_BTD[..., 0] += 300
    y_BTD = x_BTD + 0.5 * torch.randn(8, 128, 768, generator=generator)

    class Model:
        def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
            return None, {"hook": x_BTD}

    class Sae:
        class cfg:  # noqa: N801
            hook_name, hook_layer, hook_head_index, d_sae = "hook", 0, None, 1

        device = "cpu"

        def encode(self, x: Tensor) -> Tensor:
            return x[..., :1]

        def decode(self, f: Tensor) -> Tensor:
            return y_BTD

    class Store:
        def get_batch_tokens(self, batch_size: int) -> Tensor:
            return torch.zeros(8, 128, dtype=torch.long)

    sae: Any = Sae()
    switches = {f"compute_{n}": n == "variance_metrics" for n in ("l2_norms", "sparsity_metrics", "variance_metrics")}
    found, _ = core.get_sparsity_and_variance_metrics(
        sae, Model(), Store(), n_batches=1, eval_batch_size_prompts=8, model_kwargs={},
        compute_featurewise_density_statistics=True, **switches,
    )  # fmt: skip
    x_nD, y_nD = x_BTD.double().flatten(0, 1), y_BTD.double().flatten(0, 1)
    mse = float((x_nD - y_nD).square().sum(-1).mean())
    truth = 1 - mse / float((x_nD - x_nD.mean(0)).square().sum(-1).mean())
    return {"explained_variance": found["explained_variance"], "truth": truth, "mse": found["mse"], "true mse": mse}


def compare(task: str, peer: str, ours: Found, theirs: Found) -> None:
    """Print and keep each metric that both have."""
    for protocol, values in theirs.items():
        for name, value in values.items():
            known = ours.get(protocol.partition(",")[0], {}).get(name)
            if known is None:
                print(f"{task:10} {peer:20} {protocol:31} {name:26} {value:14.8g}")
                continue
            relative = value / known - 1
            row = {"task": task, "peer": peer, "protocol": protocol, "metric": name}
            append(
                RESULTS / "agreement.csv", row | {"saezoo": known, "peer_value": value, "relative": f"{relative:.3g}"}
            )
            mark = "" if abs(relative) <= 1e-5 else "  <--"
            print(f"{task:10} {peer:20} {protocol:31} {name:26} {known:14.8g} {value:14.8g} {relative:10.1e}{mark}")


def main() -> None:
    """Run all tools and print their numbers side by side; or, with --tool, one, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an interpreter with the peers")
    parser.add_argument("--tool", choices=[*RUN, "one large mean"])
    parser.add_argument("--task", choices=TASKS)
    args = parser.parse_args()
    if args.tool:
        sys.path.insert(0, str(ROOT))
        found = one_large_mean() if args.tool == "one large mean" else RUN[args.tool](args.task)
        print(json.dumps({"found": found, "versions": versions(*PACKAGES)}))
        return
    if not args.peer_python:
        parser.error("--peer-python is missing")
    for task in TASKS:
        ours = run_saezoo(task)
        for peer in RUN:
            theirs = in_fresh_process(args.peer_python, __file__, "--tool", peer, "--task", task)
            compare(task, peer, ours, theirs["found"])
    theirs = in_fresh_process(args.peer_python, __file__, "--tool", "one large mean")
    print(theirs["found"], theirs["versions"])


if __name__ == "__main__":
    main()
