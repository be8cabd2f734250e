"""Where the time of `saezoo dashboard` goes, and what memory it takes, at GPT-2 small's shape.

    python benchmarks/dashboard_profile.py --cache REPLICA_CACHE --text TEXT [--layers 8] [--tokens 65536 …]

Replicas with random weights (`gpt2_small_replica.py build`). Each number of tokens in a process of its own. The stages
after the pass are run by one process, one after the other, and once more together as `pages` (all that `Site.write`
does besides them is to make JSON of the features, and to write it). Appends to results/dashboard_profile.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, device_name, in_fresh_process, versions

SECONDS: defaultdict[str, float] = defaultdict(float)


def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its seconds counted."""

    def run(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            SECONDS[stage] += time.perf_counter() - begin

    return run


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run; seconds of each stage."""
    from saezoo import gathered as module
    from saezoo.evals.evaluate import reconstruct
    from saezoo.features import collect, directions
    from saezoo.features.describe import describe
    from saezoo.features.site import Site
    from saezoo.features.vocabulary import vocabulary
    from saezoo.lm import LanguageModel
    from saezoo.workflows import Options

    vars(collect)["reconstruct"] = timed("encoder and decoder", reconstruct)
    LanguageModel.residuals = timed("language model", LanguageModel.residuals)  # type: ignore[method-assign]
    vars(module)["collect"] = timed("the pass", collect.collect)
    options = Options(offline=True, registry=args.cache / "registry.yaml", text=args.text, device=args.device)
    with module.gathered("gpt2-small-res", args.layers, tokens=args.tokens[0], options=options) as found:
        assert found is not None
        after_pass = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        SECONDS["firings and sums"] = SECONDS["the pass"] - SECONDS["encoder and decoder"] - SECONDS["language model"]
        firings = sum(int(events.fires_F.sum()) for events in found.collection.events)
        W_U = directions.unembedding(found.task.lm)
        for i, subject in enumerate(found.task.subjects):
            chosen, decoders = found.abouts[i].features, {s.layer: s.sae.W_dec for s in found.task.subjects}
            near = sorted(decoders)
            events, W_dec = found.collection.events[i], subject.sae.W_dec
            timed("describe", deplete)(describe(*each, found.text) for each in events.each(chosen))
            timed("logits", deplete)(directions.logits(W_dec, W_U, chosen))
            timed("neighbours", deplete)(directions.neighbours(subject.layer, decoders, chosen, near))
            timed("together", found.together)(i)
        with tempfile.TemporaryDirectory() as name:
            abouts = [found.about(i) for i in range(len(found.task.subjects))]
            tokens, special = vocabulary(found.task.lm.tokenizer, found.task.lm.vocab)
            site = Site(Path(name) / "site", abouts, vocabulary=tokens, special=special)
            for i, about in enumerate(abouts):
                timed("all pages", site.write)(about, found.features(i))
        SECONDS["pages"] = SECONDS["all pages"] - sum(SECONDS[name] for name in ("describe", "logits", "neighbours"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stages = ("language model", "encoder and decoder", "firings and sums", "describe", "logits", "neighbours")
    row = {name: round(SECONDS[name], 1) for name in (*stages, "together", "pages")}
    return {"firings": firings} | row | {"pass_mb": after_pass // 1024, "peak_mb": peak // 1024}


def deplete(stream: Any) -> None:
    """Read to the end, and keep nothing."""
    for _ in stream:
        pass


def main() -> None:
    """One process for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--layers", default="8")
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--here", action="store_true")
    args = parser.parse_args()
    os.environ["HF_HUB_CACHE"] = str(args.cache / "hub")
    os.environ["SAEZOO_LOCK"] = str(args.cache / "dashboard.lock")
    if args.here:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(args)))
        return
    for tokens in args.tokens:
        given = ["--cache", str(args.cache), "--text", args.text, "--layers", args.layers, "--device", args.device]
        row = in_fresh_process(sys.executable, __file__, "--here", *given, "--tokens", str(tokens))
        about = {"layers": args.layers, "tokens": tokens, "device": device_name(args.device)}
        append(RESULTS / "dashboard_profile.csv", about | row | versions("torch", "numpy"))
        print(about | row, flush=True)


if __name__ == "__main__":
    main()
