"""Evaluating SAEs of GPT-2 small's shape: saezoo in float32 and bfloat16 beside SAELens, same rows, in one run.

    python benchmarks/gpt2_small_replica.py build --cache DIR --tokenizer DIR [DIR …]      (3.5 GB, once)
    python benchmarks/eval.py --cache DIR --text FILE --peer-python PYTHON_WITH_SAELENS

Each tool evaluates the twelve SAEs on the same tokens in a process of its own; SAELens with everything switched on, one
SAE after the other, with its own default of 16 rows at once. The time is that of the evaluation alone; loading is a
column of its own, and so is the whole process's peak of memory. Prints how many times as long SAELens takes, the
worst relative difference of the metrics that both define alike, and by how much bfloat16 changes the loss. The weights
are random: costs mean something here, metrics do not. Appends to results/eval.csv.
--layers and --tokens change the task; --tool runs one tool and prints JSON; --device cuda for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, device_name, in_fresh_process, versions

COLLECTION = "gpt2-small-res"
SAELENS_ROWS = 16  # the default --batch_size_prompts of SAELens' own evaluation
PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens")
# SAELens' name of each metric that both define in the same way -> saezoo's.
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


def run_tool(tool: str, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate with one tool, in this process: seconds, memory, and the metrics of each layer."""
    os.environ["HF_HUB_CACHE"] = str(args.cache / "hub")
    os.environ["SAEZOO_LOCK"] = str(args.cache / "saezoo.lock")  # replicas: not what the user trusts
    start = time.perf_counter()
    import torch

    from saezoo import hub
    from saezoo.lm import load_language_model
    from saezoo.registry import read_registry
    from saezoo.tokens import collect, encode, pack, text_file

    entries = read_registry(args.cache / "registry.yaml").find(COLLECTION, args.layers)
    dtype = torch.bfloat16 if tool == "saezoo bfloat16" else torch.float32
    lm = load_language_model(hub.fetch_model(entries[0].model, offline=True), dtype=dtype, device=args.device)
    source = text_file(args.text)
    context = entries[0].context_size or 128
    packed = pack(encode(lm.tokenizer, source.documents()), bos=lm.bos, context=context)
    rows = collect(packed, tokens=args.tokens, context=context, source=source.name)
    prepare = prepare_saelens if tool == "saelens" else prepare_saezoo
    evaluate_all = prepare(entries, lm, rows)
    ready, cpu = time.perf_counter(), time.process_time()
    metrics = evaluate_all()
    done = time.perf_counter()
    return {
        "load_s": ready - start,
        "eval_s": done - ready,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": device_name(args.device),
        "metrics": metrics,
    } | versions(*PACKAGES)


def prepare_saezoo(entries: Sequence[Any], lm: Any, rows: Any) -> Callable[[], Any]:
    """All SAEs in one pass, every metric and interval."""
    import torch

    from saezoo.evals import Subject, evaluate
    from saezoo.loading import load_entry

    saes = [load_entry(entry, dtype=torch.float32, device=str(lm.device), offline=True) for entry in entries]
    subjects = [Subject(sae, COLLECTION, entry.name) for sae, entry in zip(saes, entries, strict=True)]

    def evaluate_all() -> dict[str, dict[str, float | None]]:
        results = evaluate(subjects, lm, rows)
        return {r.layer: {name: r.metrics[ours].value for name, ours in SAME.items()} for r in results}

    return evaluate_all


def prepare_saelens(entries: Sequence[Any], lm: Any, rows: Any) -> Callable[[], Any]:
    """SAELens' own evaluation, everything switched on, one SAE after the other."""
    import torch
    from sae_lens import SAE  # type: ignore[attr-defined, unused-ignore]
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from saezoo import hub
    from saezoo.hooked import hooked_model

    device = str(lm.device)
    model = hooked_model(lm.hf_model, lm.tokenizer)
    saes = [SAE.load_from_disk(hub.fetch(entry, offline=True).weights.parent, device=device) for entry in entries]
    batches = max(1, len(rows) // SAELENS_ROWS)
    config = get_eval_everything_config(SAELENS_ROWS, batches, batches)

    def evaluate_all() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for sae, entry in zip(saes, entries, strict=True):
            store: Any = FixedRows(torch.from_numpy(rows.tokens_RT).to(device))
            groups, _ = run_evals(sae, store, model, ActivationScaler(), config)
            flat = {name: value for group in groups.values() for name, value in group.items()}
            found[entry.name] = {name: flat[name] for name in SAME}
        return found

    return evaluate_all


class FixedRows:
    """As much of SAELens' ActivationsStore as `run_evals` uses: it hands out the given rows in order."""

    store_batch_size_prompts = SAELENS_ROWS

    def __init__(self, tokens_RT: Any) -> None:
        self._tokens_RT, self._next = tokens_RT, 0
        self.context_size = tokens_RT.shape[1]

    def get_batch_tokens(self, batch_size: int) -> Any:
        """The next `batch_size` rows."""
        self._next += batch_size
        return self._tokens_RT[self._next - batch_size : self._next]

    def reset_input_dataset(self) -> None:
        """Start again from the first row."""
        self._next = 0


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str, str]:
    """The largest relative difference, and where."""
    return max(
        (abs(ours[layer][name] / value - 1), name, layer)
        for layer, values in theirs.items()
        for name, value in values.items()
    )


def largest_shift(ours: dict[str, Any], exact: dict[str, Any]) -> float:
    """Of (loss with the SAE - loss without), nats, over the layers."""
    with_sae, without = "ce_loss_with_sae", "ce_loss_without_sae"
    found: float = max(abs(ours[k][with_sae] - ours[k][without] - v[with_sae] + v[without]) for k, v in exact.items())
    return found


def main() -> None:
    """Run all tools and print their ratios; or, with --tool, one, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), required=True, help="folder of the replicas")
    parser.add_argument("--text", type=lambda text: Path(text).resolve(), required=True, help=".txt or .jsonl")
    parser.add_argument("--layers", default="0-11")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-python", help="an interpreter with SAELens; left out: saezoo alone")
    parser.add_argument("--tool", choices=("saezoo float32", "saezoo bfloat16", "saelens"))
    parser.add_argument("--csv", type=Path, default=RESULTS / "eval.csv")
    args = parser.parse_args()
    if args.tool:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(run_tool(args.tool, args)))
        return
    task = ["--cache", str(args.cache), "--text", str(args.text), "--layers", args.layers]
    task += ["--tokens", str(args.tokens), "--device", args.device]
    peers = {"saelens": args.peer_python} if args.peer_python else {}
    found: dict[str, dict[str, Any]] = {}
    for tool, python in {"saezoo float32": sys.executable, "saezoo bfloat16": sys.executable, **peers}.items():
        found[tool] = row = in_fresh_process(python, __file__, *task, "--tool", tool)
        metrics = row.pop("metrics")
        rounded = {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        what = {
            "tool": tool,
            "layers": args.layers,
            "tokens": args.tokens,
            "load_average": round(os.getloadavg()[0], 1),
        }
        append(args.csv, what | rounded)
        print(tool, *(f"{key}={value}" for key, value in rounded.items()), flush=True)
        row["metrics"] = metrics
    exact, half = found["saezoo float32"], found["saezoo bfloat16"]
    shift = largest_shift(half["metrics"], exact["metrics"])
    print(f"bfloat16: ΔCE differs from float32's by at most {shift:.2g} nats")
    if peers:
        theirs = found["saelens"]
        for tool in ("saezoo float32", "saezoo bfloat16"):
            print(f"SAELens takes {theirs['eval_s'] / found[tool]['eval_s']:.2f} times as long as {tool}")
        print("float32: worst relative difference from SAELens", worst(exact["metrics"], theirs["metrics"]))


if __name__ == "__main__":
    main()
