"""GPT-2 small and its twelve SAEs at full shape, with random weights: what saezoo costs there.

    python benchmarks/gpt2_small_replica.py build   --cache DIR --tokenizer DIR [DIR …]
    python benchmarks/gpt2_small_replica.py eval    --cache DIR --text FILE --tokens 2048 8192
    python benchmarks/gpt2_small_replica.py get     --cache DIR

`build` (3.5 GB, once) fills a hub cache under DIR with the repository names, revisions, file names and sizes of the
published files, and writes DIR/registry.yaml, an overlay without the published hashes, which these files cannot have.
`eval` and `get` run the command line as a user would; `benchmarks/eval.py` compares with SAELens. Each measurement
appends a row to --csv. The weights are random: costs mean something here, metrics do not.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
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
PACKAGES = ("saezoo", "torch", "transformers", "transformer_lens", "sae_lens")


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
    lock = str(cache / "saezoo.lock")  # replicas: not what the user trusts
    return run(command, {"HF_HUB_CACHE": str(cache / "hub"), "SAEZOO_LOCK": lock, **environment})


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
        environment["SAEZOO_LOCK"] = str(Path(empty) / "saezoo.lock")
        command = f"{sys.executable} -m saezoo --registry {args.cache / 'registry.yaml'} {' '.join(arguments)}"
        terminal = ["script", "-qec", f"stty cols 100 rows 40; {command}", "/dev/null"]
        # Linux counts the size of the process that starts another into the peak of the other: here, the server's.
        cost, shown = run(terminal, environment)
        print(shown)
        record(args.csv, what="saezoo get", layers=LEGACY_LAYER, cost=replace(cost, peak_mib=None))
        cost, shown = run_cli(args.cache, *arguments, "--offline", **environment)
        print(shown)
        record(args.csv, what="saezoo get --offline", layers=LEGACY_LAYER, cost=replace(cost, peak_mib=None))


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
    parser.add_argument("part", choices=("build", "eval", "get"))
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), required=True, help="folder of the replicas")
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=[], help="folders with GPT-2's tokenizer files")
    parser.add_argument("--text", type=lambda text: Path(text).resolve(), help=".txt or .jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--protocol", nargs="+", default=["standard"], choices=("standard", "feb2024"))
    parser.add_argument("--layers", default="0-11")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "gpt2_small_replica.csv")
    args = parser.parse_args()
    if args.part == "eval" and args.text is None:
        parser.error(f"{args.part} needs --text")
    if args.part == "build":
        in_fresh_process(build, args.cache, args.tokenizer)
    else:
        {"eval": evaluate, "get": get}[args.part](args)


if __name__ == "__main__":
    main()
