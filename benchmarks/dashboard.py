"""Dashboards: saezoo beside SAEDashboard 0.8.0, same features and tokens, in one run.

    python benchmarks/dashboard.py --peer-python PYTHON_WITH_SAEDASHBOARD [--features 256] [--tokens 65536]
    python benchmarks/dashboard.py --peer-python PYTHON_WITH_SAEDASHBOARD --agree
    python benchmarks/dashboard.py --peer-python … --cache REPLICA_CACHE --collection gpt2-small-res --layer 8 …

SAEDashboard runs as its own NeuronpediaRunner runs it: 128 features at a time, 32 rows at once, activations cached on
disk, one `batch-N.json` for each 128 features. `export` is the same of ours: the pass over the text and the batches;
`site` the pass and the static site. Starting Python and loading are not counted, on any side. Of ours the pass always
encodes all features of the SAE. Prints how many times as long SAEDashboard takes; appends to results/dashboard.csv.
--agree compares every field of the two exports instead, and appends to results/dashboard_agreement.csv. SAEDashboard
correlates within a batch, and counts special tokens when it correlates: for these fields ours is run in the same way,
on each batch as if it were an SAE, with all tokens scored. --cache: of `gpt2_small_replica.py build`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, append, device_name, in_fresh_process, versions

FEATURES_AT_ONCE, ROWS_AT_ONCE = 128, 32  # defaults of SAEDashboard's NeuronpediaRunnerConfig
PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "sae_dashboard")


def task(args: argparse.Namespace) -> Any:
    """What `saezoo dashboard` works on: SAE, language model and rows."""
    from saezoo.workflows import prepare

    return prepare(
        args.collection, args.layer, tokens=args.tokens, protocol="standard", model=None, layout=None,
        options=options(args),
    )  # fmt: skip


def options(args: argparse.Namespace) -> Any:
    """Of both workflows; with a cache of replicas its registry."""
    from saezoo.workflows import Options

    return Options(offline=True, registry=args.cache and args.cache / "registry.yaml", text=args.text)


def run_saedashboard(args: argparse.Namespace) -> dict[str, Any]:
    """In this process; `batch-N.json` into args.out."""
    import torch
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    from saezoo.hooked import hooked_model

    found = task(args)
    model = hooked_model(found.lm.hf_model, found.lm.tokenizer)
    hook = found.subjects[0].sae.config.hook
    with tempfile.TemporaryDirectory() as saved:
        sae = SAE.load_from_disk(found.subjects[0].sae.save(saved), device="cpu", dtype="float32")
    tokens_RT = torch.from_numpy(found.rows.tokens_RT)
    config = NeuronpediaRunnerConfig(sae_set="res", sae_path="", outputs_dir="", n_prompts_total=len(tokens_RT))
    config.n_tokens_in_prompt, config.model_id, config.layer = tokens_RT.shape[1], found.model, int(args.layer)
    config.huggingface_dataset_path = found.text
    vocabulary = vocab_dict(model)
    begin, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        for batch, start in enumerate(range(0, args.features, FEATURES_AT_ONCE)):
            features = list(range(start, min(start + FEATURES_AT_ONCE, args.features)))
            data = SaeVisRunner(vis_config(model, hook, features, Path(cache))).run(sae, model, tokens_RT)
            text = NeuronpediaConverter.convert_to_np_json(model, data, config, vocabulary)
            (args.out / f"batch-{batch}.json").write_text(text, encoding="utf-8")
    return timed(begin, cpu)


def vis_config(model: Any, hook: str, features: list[int], cache: Path) -> Any:
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
        hook_point=hook,
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


def material(found: Any, features: range, folder: Path) -> Any:
    """What `saezoo.features.export` needs of `features`, as if they were an SAE, with all tokens scored; the firings
    go into `folder`."""
    import torch

    from saezoo.features.correlation import Sums
    from saezoo.features.directions import unembedding
    from saezoo.features.events import Events, Writer
    from saezoo.features.records import About
    from saezoo.features.saedashboard import Material

    sae, lm, rows = found.subjects[0].sae, found.lm, found.rows
    layer = int(found.subjects[0].layer)
    tokens_RT, own = torch.from_numpy(rows.tokens_RT), slice(features.start, features.stop)
    (n_rows, context), d_in = tokens_RT.shape, sae.config.d_in
    scored_RT = torch.ones_like(tokens_RT, dtype=torch.bool)
    writer = Writer(folder, len(features))
    x_sum, x2_sum, fx_sum = np.zeros(d_in), np.zeros(d_in), np.zeros((len(features), d_in))
    for start in range(0, n_rows, ROWS_AT_ONCE):
        x_BTD = lm.residuals(tokens_RT[start : start + ROWS_AT_ONCE], [layer])[layer]
        scored_BT = scored_RT[start : start + ROWS_AT_ONCE]
        x_nD = (x_BTD - x_BTD.mean(-1, keepdim=True))[scored_BT]
        f_nF = sae.encode(x_nD)[:, own]
        x_sum += x_nD.double().sum(0).numpy()
        x2_sum += x_nD.double().square().sum(0).numpy()
        fx_sum += (f_nF.T @ x_nD).double().numpy()
        token_N, feature_N = f_nF.nonzero(as_tuple=True)
        place_n = scored_BT.flatten().nonzero().squeeze(1) + start * context
        writer.add(feature_N, place_n[token_N], f_nF[token_N, feature_N])
    writer.flush()
    about = About(
        collection=found.subjects[0].collection,
        layer=str(layer),
        hook=str(sae.config.hook),
        model=found.model,
        d_in=d_in,
        d_sae=len(features),
        text=found.text,
        context=context,
        rows=n_rows,
        tokens=int(scored_RT.sum()),
        documents=len(np.unique(rows.documents_RT)),
        seed=0,
        features=tuple(range(len(features))),
    )
    sums, events = Sums(x_sum, x2_sum, fx_sum), Events([folder], len(features))
    decoder = sae.W_dec.detach()[own]
    return Material(about, events, rows, scored_RT.numpy(), sums, decoder, unembedding(lm), lm.tokenizer)


@contextlib.contextmanager
def gathered(args: argparse.Namespace, *, correlate: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The pass of `saezoo dashboard`, and what it took; loading is not counted."""
    from saezoo import gathered as module
    from saezoo.features.collect import collect

    began: list[tuple[float, float]] = []

    def timed_collect(*arguments: Any, **named: Any) -> Any:
        began.append((time.perf_counter(), time.process_time()))
        return collect(*arguments, **named)

    vars(module)["collect"] = timed_collect  # everything before it is loading
    settings: dict[str, Any] = {"tokens": args.tokens, "features": f"0-{args.features - 1}", "correlate": correlate}
    settings["options"] = options(args)
    with module.gathered(args.collection, args.layer, **settings) as found:
        assert found is not None
        row = {"pass_s": round(time.perf_counter() - began[0][0], 2)}
        yield found, row
        row |= {name: value for name, value in timed(*began[0]).items() if value != ""}


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    """The pass and `batch-N.json` into args.out, in this process."""
    from saezoo.features.export import BatchFiles, export, place_of

    with gathered(args, correlate=True) as (found, row):
        m = found.material(0)
        export(m, [BatchFiles(args.out, m.about, place_of(m.about))])
    return row


def run_site(args: argparse.Namespace) -> dict[str, Any]:
    """The pass and the static site into args.out, in this process."""
    from saezoo.features.site import Site
    from saezoo.features.vocabulary import vocabulary

    with gathered(args, correlate=False) as (found, row):
        about, lm, together = found.about(0), found.task.lm, found.together(0)
        tokens, special = vocabulary(lm.tokenizer, lm.vocab)
        site = Site(args.out, [about], vocabulary=tokens, special=special)
        groups = {name: [group.features for group in getattr(together, name)] for name in ("clusters", "exclusive")}
        site.write(about, found.features(0, together), **groups)
        site.finish()
    return row


def timed(begin: float, cpu: float) -> dict[str, Any]:
    """Since then, of this process: seconds, and processor seconds, which other people's work changes less."""
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return {"pass_s": "", "seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2)}


def run_correlations(args: argparse.Namespace) -> dict[str, Any]:
    """As `run_export`, each batch an SAE of its own and all tokens scored: what SAEDashboard correlates."""
    from saezoo.features.export import BatchFiles, export, place_of

    found = task(args)
    for batch, start in enumerate(range(0, args.features, FEATURES_AT_ONCE)):
        features = range(start, min(start + FEATURES_AT_ONCE, args.features))
        with tempfile.TemporaryDirectory() as folder:
            m = material(found, features, Path(folder))
            export(m, [BatchFiles(args.out / str(batch), m.about, place_of(m.about))])
    return {}


def read(folder: Path) -> dict[int, dict[str, Any]]:
    """Feature -> its fields, from all batches."""
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("batch-*.json")]
    return {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}


def correlations(folder: Path) -> dict[int, dict[str, Any]]:
    """What `run_correlations` wrote, with the numbers that the features have in the SAE."""
    found: dict[int, dict[str, Any]] = {}
    for path in folder.iterdir():
        first = int(path.name) * FEATURES_AT_ONCE
        for feature, fields in read(path).items():
            own = {name: value for name, value in fields.items() if name.startswith("correlated_")}
            own["correlated_features_indices"] = [first + other for other in own["correlated_features_indices"]]
            found[first + feature] = own
    return found


def comparable(feature: dict[str, Any]) -> dict[str, Any]:
    """Every field as a list; of the activations, what does not depend on a draw, nor on the order of equal ones."""
    fields: dict[str, Any] = {name: value if isinstance(value, list) else [value] for name, value in feature.items()}
    activations = fields.pop("activations")
    top = [a for a in activations if a["bin_min"] == -1]
    labels = [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in activations]
    fields["top: bin_max"] = [top[0]["bin_max"]]
    fires = [a for a in top if a["values"][a["qualifying_token_index"]] > 0]  # the rest are any tokens
    fields["top: activations"] = [a["values"][a["qualifying_token_index"]] for a in fires]
    fields["top: tokens"] = sorted("".join(a["tokens"]) + str(a["qualifying_token_index"]) for a in fires)
    rows = {"".join(a["tokens"]): a["values"] for a in fires}
    fields["top: values of common rows"] = rows
    bins = list(dict.fromkeys(labels))
    for i, name in enumerate(("bin_min", "bin_max", "bin_contains")):
        fields[f"intervals: {name}"] = [bin[i] for bin in bins[1:]]
    fields["intervals: rows shown"] = [Counter(labels)[bin] for bin in bins[1:]]
    return fields


def common(ours: Any, theirs: Any) -> tuple[list[Any], list[Any]]:
    """Lists as they are; of rows by their text, the values of those in both."""
    if isinstance(ours, list):
        return ours, theirs
    keys = sorted(set(ours) & set(theirs))
    a, b = ([value for key in keys for value in rows[key]] for rows in (ours, theirs))
    return a, b


def differences(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each field: features of which any value differs, and the largest difference of a number."""
    pairs = [(comparable(ours[feature]), comparable(theirs[feature])) for feature in theirs]
    for name in pairs[0][1]:
        both = [common(a[name], b[name]) for a, b in pairs]
        numbers = [abs(x - y) for a, b in both for x, y in zip(a, b, strict=False) if not isinstance(x, str | None)]
        yield {
            "field": name,
            "features": len(both),
            "differ": sum(a != b for a, b in both),
            "values": sum(len(b) for _, b in both),
            "values_differ": sum(x != y for a, b in both for x, y in zip(a, b, strict=False)),
            "largest": max(numbers) if numbers and not name.endswith("_indices") else "",
        }


def agree(args: argparse.Namespace, folder: Path) -> None:
    """Run all three and compare."""
    for tool, python in (("saedashboard", args.peer_python), ("export", None), ("correlations", None)):
        run(tool, python or sys.executable, args, folder)
    ours, theirs, correlated = (
        read(folder / "export"),
        read(folder / "saedashboard"),
        correlations(folder / "correlations"),
    )
    for feature in ours:
        ours[feature] |= correlated[feature]
    for row in differences(ours, theirs):
        append(args.csv or RESULTS / "dashboard_agreement.csv", {"tokens": args.tokens} | row)
        differ = f"{row['differ']} of {row['features']} features"
        differ += f", {row['values_differ']} of {row['values']} values"
        print(f"{row['field']:32} {differ}, by at most {row['largest']}")


def run(tool: str, python: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One tool in a process of its own, its files in a folder of its name."""
    out = folder / tool
    out.mkdir()
    named = {name: getattr(args, name) for name in ("collection", "layer", "features", "tokens", "text", "cache")}
    given = [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]
    return in_fresh_process(python, __file__, "--tool", tool, "--out", str(out), *given)


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Time all three, one after the other."""
    peers = {"saedashboard": args.peer_python} if args.peer_python else {}
    found: dict[str, dict[str, Any]] = {}
    for tool, python in {"export": sys.executable, "site": sys.executable, **peers}.items():
        load = round(os.getloadavg()[0], 1)
        found[tool] = row = run(tool, python, args, folder)
        what = {"tool": tool, "collection": args.collection, "layer": args.layer, "features": args.features}
        append(args.csv or RESULTS / "dashboard.csv", what | {"tokens": args.tokens, "load_average": load} | row)
        print(tool, f"{row['seconds']} s, {row['cpu_s']} processor seconds", flush=True)
    for tool in ("export", "site") if peers else ():
        wall, cpu = (found["saedashboard"][name] / found[tool][name] for name in ("seconds", "cpu_s"))
        print(f"SAEDashboard takes {wall:.1f} times as long as {tool}, and {cpu:.1f} times the processor's")


TOOLS = {
    "saedashboard": run_saedashboard,
    "export": run_export,
    "site": run_site,
    "correlations": run_correlations,
}


def main() -> None:
    """Time all and print the ratios; with --agree, compare; with --tool, run one and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an interpreter with SAEDashboard and SAELens; left out: saezoo alone")
    parser.add_argument("--collection", default="tiny-res")
    parser.add_argument("--layer", default="2")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--text")
    parser.add_argument("--cache", type=Path, help="of replicas of GPT-2 small")
    parser.add_argument("--agree", action="store_true")
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.cache:
        os.environ["HF_HUB_CACHE"] = str(args.cache / "hub")
        os.environ["SAEZOO_LOCK"] = str(args.cache / "dashboard.lock")
    if args.tool:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(TOOLS[args.tool](args) | {"device": device_name("cpu")} | versions(*PACKAGES)))
        return
    with tempfile.TemporaryDirectory() as name:
        agree(args, Path(name)) if args.agree else compare(args, Path(name))


if __name__ == "__main__":
    main()
