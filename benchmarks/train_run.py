"""Training end to end, text to trained SAE: saezoo's `reproduce` beside SAELens' own runner, in one run.

    python benchmarks/train_run.py --peer-python PYTHON_WITH_SAELENS [--tokens 1000000]

Both train one SAE of tiny-res on the bundled model and text with loss `standard`, the same sizes and the same number of
tokens; the time is from the start of training to its end, tokenising and filling the buffer included, evaluation not.
The two runs are in fresh processes, one after the other. Appends to results/train_run.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, append, device_name, in_fresh_process, versions

LAYER = "2"


def run_saezoo(tokens: int, product: str, device: str) -> tuple[float, float]:
    """Seconds, and the last mse in the log."""
    import torch

    from saezoo.hub import fetch_model
    from saezoo.lm import load_language_model
    from saezoo.registry import read_registry
    from saezoo.tokens import builtin
    from saezoo.trainers.train import Job, train

    registry = read_registry()
    [entry] = registry.find("tiny-res", LAYER)
    job = Job((entry,), registry.recipe("tiny-standard"), builtin("train"), tokens, 0, product)  # type: ignore[arg-type]
    lm = load_language_model(fetch_model(entry.model), device=device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAEZOO_CACHE"] = folder  # so that tokenising is in the time
        begin = time.perf_counter()
        train(job, lm, Path(folder))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        with (Path(folder) / "log.csv").open(newline="") as file:
            mse = float(list(csv.DictReader(file))[-1]["mse"])
    return seconds, mse


def run_saelens(tokens: int, device: str) -> tuple[float, float]:
    """The same with LanguageModelSAETrainingRunner; mse is not read from it."""
    import sae_lens
    from datasets import Dataset

    from saezoo.hooked import hooked_model
    from saezoo.hub import fetch_model
    from saezoo.lm import load_language_model
    from saezoo.registry import read_registry
    from saezoo.tokens import builtin

    registry = read_registry()
    [entry] = registry.find("tiny-res", LAYER)
    recipe = registry.recipe("tiny-standard")
    lm = load_language_model(fetch_model(entry.model), device=device)
    texts = Dataset.from_dict({"text": list(builtin("train").documents())})
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(
            d_in=entry.d_in,
            d_sae=entry.d_sae,
            device=device,
            l1_coefficient=recipe.l1_coefficient,
            l1_warm_up_steps=recipe.l1_warmup_steps,
        ),
        model_name="gpt2",
        hook_name=entry.hook,
        dataset_path="unused",
        is_dataset_tokenized=False,
        context_size=entry.context_size,
        training_tokens=tokens,
        train_batch_size_tokens=recipe.batch_size,
        store_batch_size_prompts=recipe.store_rows,
        n_batches_in_buffer=recipe.buffer_batches,
        lr=recipe.lr,
        lr_warm_up_steps=recipe.lr_warmup_steps,
        device=device,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
    )
    model = hooked_model(lm.hf_model, lm.tokenizer)
    runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=texts, override_model=model)
    begin = time.perf_counter()
    runner.run()
    return time.perf_counter() - begin, float("nan")


def main() -> None:
    """Run each way in a fresh process, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a python that has sae_lens")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS / "train_run.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run = run_saelens if args.one == "saelens" else lambda n, d: run_saezoo(n, args.one, d)
        seconds, mse = run(args.tokens, args.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": round(seconds, 2), "last_mse": mse, "peak_rss_mib": round(peak)}))
        return
    peer: float | None = None
    for way in ["saelens"] * bool(args.peer_python) + ["dense", "full", "half"]:
        python = args.peer_python if way == "saelens" else sys.executable
        found = in_fresh_process(python, __file__, "--one", way, "--tokens", str(args.tokens), "--device", args.device)
        speed = round(args.tokens / found["seconds"])
        peer = speed if way == "saelens" else peer
        ratio = None if peer is None else round(speed / peer, 2)
        print(f"{way:8} {found['seconds']:8.1f} s, {speed:,} tokens/s, {ratio} x SAELens, {found['peak_rss_mib']} MiB")
        row = {"device": device_name(args.device), "layer": LAYER, "tokens": args.tokens, "way": way}
        append(args.csv, {**row, "tokens_per_s": speed, "over_saelens": ratio, **found, **versions("torch")})


if __name__ == "__main__":
    main()
