"""Dashboards of tiny-res layer 2: saezoo beside SAEDashboard 0.8.0, same features and tokens, in one run.

    python benchmarks/dashboard.py --peer-python PYTHON_WITH_SAEDASHBOARD [--features 256] [--tokens 65536]
    python benchmarks/dashboard.py --peer-python PYTHON_WITH_SAEDASHBOARD --agree

SAEDashboard runs as its own NeuronpediaRunner runs it: 128 features at a time, 32 rows at once, activations cached on
disk, one `batch-N.json` for each 128 features; loading is not counted. saezoo is one command line, with everything in
it: starting Python, loading, the pass over the text, and the files. Prints how many times as long SAEDashboard takes.
--agree compares every field of the two exports and prints the largest differences. Appends to results/dashboard.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, device_name, in_fresh_process, versions

COLLECTION, LAYER, HOOK = "tiny-res", 2, "blocks.2.hook_resid_pre"
FEATURES_AT_ONCE, ROWS_AT_ONCE = 128, 32  # defaults of SAEDashboard's NeuronpediaRunnerConfig
PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "sae_dashboard")


def task(tokens: int) -> Any:
    """What `saezoo dashboard` works on: SAE, language model and rows."""
    from saezoo.workflows import Options, prepare

    options = Options(offline=True)
    return prepare(COLLECTION, LAYER, tokens=tokens, protocol="standard", model=None, layout=None, options=options)


def run_saedashboard(args: argparse.Namespace) -> dict[str, Any]:
    """In this process; `batch-N.json` into args.out."""
    import torch
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    from saezoo.hooked import hooked_model

    found = task(args.tokens)
    model = hooked_model(found.lm.hf_model, found.lm.tokenizer)
    sae = SAE.load_from_disk(ROOT / "saezoo" / "bundled" / COLLECTION / HOOK, device="cpu", dtype="float32")
    tokens_RT = torch.from_numpy(found.rows.tokens_RT)
    config = NeuronpediaRunnerConfig(sae_set="res", sae_path="", outputs_dir="", n_prompts_total=len(tokens_RT))
    config.n_tokens_in_prompt, config.model_id, config.layer = tokens_RT.shape[1], "tiny-lm", LAYER
    config.huggingface_dataset_path = "builtin:heldout"
    vocabulary = vocab_dict(model)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        for batch, start in enumerate(range(0, args.features, FEATURES_AT_ONCE)):
            features = list(range(start, min(start + FEATURES_AT_ONCE, args.features)))
            data = SaeVisRunner(vis_config(model, features, Path(cache))).run(sae, model, tokens_RT)
            text = NeuronpediaConverter.convert_to_np_json(model, data, config, vocabulary)
            (args.out / f"batch-{batch}.json").write_text(text, encoding="utf-8")
    return {"seconds": round(time.perf_counter() - begin, 2)}


def vis_config(model: Any, features: list[int], cache: Path) -> Any:
    """What NeuronpediaRunner.run makes of its defaults."""
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig

    sequences = SequencesConfig(buffer=None, n_quantiles=5, top_acts_group_size=20, quantile_group_size=5)
    tables = (ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3))
    tokenizer = model.tokenizer
    return SaeVisConfig(
        hook_point=HOOK,
        features=features,
        minibatch_size_features=FEATURES_AT_ONCE,
        minibatch_size_tokens=ROWS_AT_ONCE,
        feature_centric_layout=SaeVisLayoutConfig(columns=[Column(sequences, *tables)]),
        cache_dir=cache,
        ignore_tokens={tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id},
    )


def vocab_dict(model: Any) -> dict[int, str]:
    """Token strings as SAEDashboard writes them: NeuronpediaRunner.get_vocab_dict, which needs a runner."""
    from types import SimpleNamespace

    from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner

    found: dict[int, str] = NeuronpediaRunner.get_vocab_dict(SimpleNamespace(model=model))
    return found


def main() -> None:
    """Time both and print the ratio; with --agree, compare; with --tool, run one and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an interpreter with SAEDashboard and SAELens; left out: saezoo alone")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--agree", action="store_true")
    parser.add_argument("--tool", choices=("saedashboard",))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS / "dashboard.csv")
    args = parser.parse_args()
    if args.tool:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(run_saedashboard(args) | {"device": device_name("cpu")} | versions(*PACKAGES)))
        return


if __name__ == "__main__":
    main()
