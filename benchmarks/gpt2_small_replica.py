"""GPT-2 small and its twelve SAEs at full shape, with random weights: what saezoo costs there, beside SAELens.

    python benchmarks/gpt2_small_replica.py build   --cache DIR --tokenizer DIR [DIR …]
    python benchmarks/gpt2_small_replica.py eval    --cache DIR --text FILE --tokens 2048 8192
    python benchmarks/gpt2_small_replica.py get     --cache DIR
    python benchmarks/gpt2_small_replica.py saelens --cache DIR --text FILE --tokens 2048

`build` (3.5 GB, once) fills a hub cache under DIR with the repository names, revisions, file names and sizes of the
published files, and writes DIR/registry.yaml, an overlay without the published hashes, which these files cannot have.
`eval` and `get` run the command line as a user would; `saelens` needs sae_lens beside saezoo. Each measurement
appends a row to --csv. The weights are random: costs mean something here, metrics do not.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COLLECTION, LAYERS, LEGACY_LAYER = "gpt2-small-res", range(12), 8
CONTEXT = 128
SAELENS_ROWS = 16  # the default --batch_size_prompts of SAELens' own evaluation
PACKAGES = ("saezoo", "torch", "transformers", "transformer_lens", "sae_lens")
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


@dataclass(frozen=True)
class Cost:
    """What one measurement took; `load_s` is the part of `wall_s` before the evaluation, where it is known."""

    wall_s: float
    cpu_s: float
    peak_mib: float | None
    load_s: float | None = None


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new process, so that this one stays small and each call has its own peak of memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def import_from_checkout() -> None:
    """Make `saezoo` and the tests' replicas importable."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def build(cache: Path, tokenizer: Sequence[Path]) -> None:
    """Write model and SAEs, lay them out as the hub client caches them, and write the overlay."""
    import_from_checkout()
    from replicas import files_in, place_in_hub_cache, write_gpt2, write_legacy, write_reformatted

    from saezoo.registry import read_registry

    entries = {entry.layer: entry for entry in read_registry().find(COLLECTION)}
    gpt2, reformatted, original = (cache / "files" / name for name in ("gpt2", "reformatted", "original"))
    original.mkdir(parents=True, exist_ok=True)
    write_gpt2(gpt2, tokenizer=tokenizer)
    scales = residual_scales(gpt2)
    for layer in LAYERS:
        write_reformatted(reformatted / entries[layer].hook, layer, rms=scales[layer])
    legacy = entries[LEGACY_LAYER]
    write_legacy(original / legacy.layouts["original"].weights, LEGACY_LAYER, rms=scales[LEGACY_LAYER])
    placed: list[tuple[Any, Path]] = [
        (legacy.model, gpt2),
        (legacy.layouts["reformatted"], reformatted),
        (legacy.layouts["original"], original),
    ]
    for spec, folder in placed:
        place_in_hub_cache(cache / "hub", spec.repo, spec.revision, files_in(folder))
    write_overlay(ROOT / "registry.yaml", cache / "registry.yaml")


def residual_scales(folder: Path) -> list[float]:
    """Standard deviation of the centred residual stream's coordinates at each depth, on random tokens."""
    import torch

    from saezoo.lm import load_language_model

    lm = load_language_model(folder)
    tokens_BT = torch.randint(lm.vocab, (8, CONTEXT), generator=torch.Generator().manual_seed(0))
    residuals = lm.residuals(tokens_BT, LAYERS)
    return [float((x_BTD - x_BTD.mean(-1, keepdim=True)).std()) for _, x_BTD in sorted(residuals.items())]


def write_overlay(registry: Path, overlay: Path) -> None:
    """The collection and its model as in `registry`, without sizes and hashes."""
    import yaml

    content = yaml.safe_load(registry.read_text(encoding="utf-8"))
    collection = content["collections"][COLLECTION]
    for sae in collection["saes"]:
        sae["files"] = {}
    model = content["models"][collection["model"]]
    model.pop("facts", None)
    kept = {"version": content["version"], "models": {collection["model"]: model}}
    kept["collections"] = {COLLECTION: collection}
    overlay.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def run_cli(cache: Path, *arguments: str, **environment: str) -> tuple[Cost, str]:
    """Run `saezoo …` as a subprocess; its cost and its stdout."""
    command = [sys.executable, "-W", "ignore", "-m", "saezoo", "--registry", str(cache / "registry.yaml"), *arguments]
    return run(command, {"HF_HUB_CACHE": str(cache / "hub"), **environment})


def run(command: Sequence[str], environment: dict[str, str]) -> tuple[Cost, str]:
    """Run `command` in the checkout; its cost and its stdout."""
    with tempfile.TemporaryFile("w+", newline="") as stdout:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"exit {process.returncode}: {' '.join(command)}")
        stdout.seek(0)
        return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024), stdout.read()


def evaluate(args: argparse.Namespace) -> None:
    """`saezoo eval` of --layers for each number of tokens and protocol."""
    for tokens in args.tokens:
        for protocol in args.protocol:
            options = ["--text", str(args.text.resolve()), "--tokens", str(tokens), "--protocol", protocol]
            cost, shown = run_cli(args.cache, "eval", COLLECTION, args.layers, *options, "--offline")
            print(shown)
            record(args.csv, what="saezoo eval", layers=args.layers, tokens=tokens, protocol=protocol, cost=cost)


def get(args: argparse.Namespace) -> None:
    """`saezoo get` of one SAE from a hub on this machine, on a terminal; then again without a network."""
    import_from_checkout()
    from hubserver import HubServer
    from replicas import files_in

    from saezoo.registry import read_registry

    layout = read_registry(args.cache / "registry.yaml").find(COLLECTION, LEGACY_LAYER)[0].layouts["reformatted"]
    assert layout.repo is not None and layout.revision is not None
    arguments = ("get", COLLECTION, str(LEGACY_LAYER))
    with HubServer() as hub, tempfile.TemporaryDirectory(dir=args.cache) as empty:
        hub.add(layout.repo, layout.revision, files_in(args.cache / "files" / "reformatted"))
        environment = {"HF_HUB_CACHE": empty, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = f"{sys.executable} -m saezoo --registry {args.cache / 'registry.yaml'} {' '.join(arguments)}"
        terminal = ["script", "-qec", f"stty cols 100 rows 40; {command}", "/dev/null"]
        # Linux counts the size of the process that starts another into the peak of the other: here, the server's.
        cost, shown = run(terminal, environment)
        print(shown)
        record(args.csv, what="saezoo get", layers=LEGACY_LAYER, cost=replace(cost, peak_mib=None))
        cost, shown = run_cli(args.cache, *arguments, "--offline", **environment)
        print(shown)
        record(args.csv, what="saezoo get --offline", layers=LEGACY_LAYER, cost=replace(cost, peak_mib=None))


def compare(args: argparse.Namespace) -> None:
    """The same rows through saezoo and through SAELens' `run_evals`, for one SAE and for twelve."""
    os.environ["HF_HUB_CACHE"] = str(args.cache / "hub")
    tokens = args.tokens[0]
    for layers in ([LEGACY_LAYER], list(LAYERS)):
        found: dict[str, Any] = {}
        for tool in ("saezoo", "saelens"):
            registry = args.cache / "registry.yaml"
            found[tool], cost = in_fresh_process(peer_run, tool, registry, layers, args.text, tokens)
            record(args.csv, what=f"evaluation, {tool}", layers=len(layers), tokens=tokens, cost=cost)
            found[f"{tool} s"] = cost.wall_s - cost.load_s
        ratio = found["saelens s"] / found["saezoo s"]
        worst = max(
            (abs(found["saezoo"][layer][name] / value - 1), name, layer)
            for layer, values in found["saelens"].items()
            for name, value in values.items()
        )
        print(f"{len(layers)} SAEs, evaluation alone: SAELens takes {ratio:.2f} times as long; worst agreement {worst}")


def peer_run(tool: str, registry: Path, layers: Sequence[int], text: Path, tokens: int) -> tuple[Any, Cost]:
    """Evaluate `layers` with one tool: {layer: {SAELens' metric name: value}} and the cost."""
    import_from_checkout()
    start, cpu_start = time.perf_counter(), time.process_time()
    from saezoo import hub
    from saezoo.lm import load_language_model
    from saezoo.registry import read_registry
    from saezoo.tokens import collect, encode, pack, text_file

    entries = [read_registry(registry).find(COLLECTION, layer)[0] for layer in layers]
    lm = load_language_model(hub.fetch_model(entries[0].model, offline=True))
    source = text_file(text)
    packed = pack(encode(lm.tokenizer, source.documents()), bos=lm.bos, context=CONTEXT)
    rows = collect(packed, tokens=tokens, context=CONTEXT, source=source.name)
    prepare = prepare_saezoo if tool == "saezoo" else prepare_saelens
    evaluate_all = prepare(entries, lm, rows)
    ready, cpu_ready = time.perf_counter(), time.process_time()
    metrics = evaluate_all()
    now = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {tool}: {now - ready:.1f} s, {time.process_time() - cpu_ready:.1f} s of CPU for the evaluation alone")
    return metrics, Cost(now - start, time.process_time() - cpu_start, peak, ready - start)


def prepare_saezoo(entries: Sequence[Any], lm: Any, rows: Any) -> Callable[[], Any]:
    """All SAEs in one pass."""
    import torch

    from saezoo.evals.evaluate import Subject, evaluate
    from saezoo.loading import load_entry

    saes = [load_entry(entry, dtype=torch.float32, offline=True) for entry in entries]
    subjects = [Subject(sae, COLLECTION, entry.name) for sae, entry in zip(saes, entries, strict=True)]

    def evaluate_all() -> dict[int, dict[str, float]]:
        results = evaluate(subjects, lm, rows)
        return {int(r.layer): {name: r.metrics[ours].value for name, ours in SAME.items()} for r in results}

    return evaluate_all


def prepare_saelens(entries: Sequence[Any], lm: Any, rows: Any) -> Callable[[], Any]:
    """SAELens' own evaluation, everything switched on, one SAE after the other."""
    import torch
    from sae_lens import SAE  # type: ignore[attr-defined, unused-ignore]
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from saezoo import hub
    from saezoo.hooked import hooked_model

    model = hooked_model(lm.hf_model, lm.tokenizer)
    saes = [SAE.load_from_disk(hub.fetch(entry, offline=True).weights.parent) for entry in entries]
    batches = max(1, len(rows) // SAELENS_ROWS)
    config = get_eval_everything_config(SAELENS_ROWS, batches, batches)

    def evaluate_all() -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        for sae, entry in zip(saes, entries, strict=True):
            store: Any = FixedRows(torch.from_numpy(rows.tokens_RT))
            groups, _ = run_evals(sae, store, model, ActivationScaler(), config)
            flat = {name: value for group in groups.values() for name, value in group.items()}
            found[entry.layer] = {name: flat[name] for name in SAME}
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


def record(path: Path, *, what: str, layers: object, cost: Cost, tokens: int | None = None, protocol: str = "") -> None:
    """Print one measurement and append it to the CSV."""
    speed = None if tokens is None else round(tokens / (cost.wall_s - (cost.load_s or 0)), 1)
    row: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "what": what,
        "layers": layers,
        "tokens": tokens,
        "protocol": protocol,
        "wall_s": round(cost.wall_s, 1),
        "load_s": None if cost.load_s is None else round(cost.load_s, 1),
        "cpu_s": round(cost.cpu_s, 1),
        "tokens_per_s": speed,
        "peak_rss_mib": None if cost.peak_mib is None else round(cost.peak_mib),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }
    print(" ".join(f"{key}={value}" for key, value in row.items() if value not in (None, "")), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def installed(package: str) -> str:
    """Its version; `checkout` for saezoo if it runs from here without being installed, empty for others."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "checkout" if package == "saezoo" else ""


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("build", "eval", "get", "saelens"))
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), required=True, help="folder of the replicas")
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=[], help="folders with GPT-2's tokenizer files")
    parser.add_argument("--text", type=lambda text: Path(text).resolve(), help=".txt or .jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--protocol", nargs="+", default=["standard"], choices=("standard", "feb2024"))
    parser.add_argument("--layers", default="0-11")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "gpt2_small_replica.csv")
    args = parser.parse_args()
    if args.part in ("eval", "saelens") and args.text is None:
        parser.error(f"{args.part} needs --text")
    if args.part == "build":
        in_fresh_process(build, args.cache, args.tokenizer)
    else:
        {"eval": evaluate, "get": get, "saelens": compare}[args.part](args)


if __name__ == "__main__":
    main()
