"""How long a site of many features takes to write and to open, and how large it is.

    python benchmarks/dashboard_site.py                     # 24,576 features, the tokens of the bundled model
    python benchmarks/dashboard_site.py --tokenizer path/to/gpt2 --vocabulary 50257

Features are made up (tests/sites.py): 45 contexts each, every thirteenth dead. Times are medians of seven in headless
Chromium with an empty profile, from the disk: from the start of the navigation to the frame after the one in which
both the list and the histogram, or the feature's contexts, are there. Appends a row to results/dashboard_site.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, append, versions

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
REPEATS = 7
PAINTED = """
const look = () => document.querySelector(".pick[role]") && document.querySelector(".features tbody tr")
  || document.querySelector(".own") ? requestAnimationFrame(() => { window.painted = performance.now(); })
  : requestAnimationFrame(look);
requestAnimationFrame(look);
"""
UPDATE = """
const begin = performance.now();
current.update(listState.read(arguments[0]));
document.body.offsetHeight;
return performance.now() - begin;
"""
NEXT = """
const begin = performance.now();
const end = () => { document.body.offsetHeight; arguments[0](performance.now() - begin); };
addEventListener("drawn", end, { once: true });
document.getElementById("next").click();
"""


def made_up(n: int, vocabulary: int) -> Iterator[Any]:
    """`n` features: 512 different ones, over and over, with other densities."""
    import numpy as np
    import sites

    pool = [sites.alive(i, vocabulary=vocabulary, context=128, layer="8") for i in range(512)]
    random = np.random.default_rng(0)
    for index in range(n):
        fires = int(10 ** random.normal(2.4, 0.8)) + 1
        one = dataclasses.replace(pool[index % 512], index=index, fires=fires)
        yield sites.dead(index) if index % 13 == 12 else one


def write(out: Path, n: int, tokenizer: Path, size: int) -> dict[str, float]:
    """Write the site; seconds, memory and bytes."""
    import sites
    from transformers import AutoTokenizer

    from saezoo.features.site import Site
    from saezoo.features.vocabulary import vocabulary

    known = vocabulary(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), size)
    about = sites.about("8", d_sae=n, features=tuple(range(n)), tokens=1_000_000)
    features = list(made_up(n, size))
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    site = Site(out, [about], vocabulary=known.tokens, special=known.special)
    site.write(about, features, clusters=[tuple(range(10 * i, 10 * i + 7)) for i in range(n // 80)], exclusive=[])
    site.finish()
    seconds = time.perf_counter() - begin
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    overview = sum((out / "data" / name).stat().st_size for name in ("manifest.js", "tokens.js", "sae0/list.js"))
    return {
        "write_s": round(seconds, 1),
        "memory_grew_mib": round(grew / 1024),
        "bytes": total,
        "bytes_per_feature": round(total / n),
        "overview_bytes": overview,
    }


def opened(out: Path, n: int) -> dict[str, float]:
    """Milliseconds in the browser."""
    from browser import address, browser

    with browser() as window:
        window.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PAINTED})

        def page(route: str) -> float:
            window.open(address(out, route))
            return float(window.until("return window.painted"))

        overview = [page("#/8") for _ in range(REPEATS)]
        sort = [
            window.run(UPDATE, f"sort=-{key}")
            for key in ["density", "token", "divergence", "logit", "max", "mean", "skew"]
        ]
        search = [window.run(UPDATE, f"q={text}") for text in ("t", "th", "the", "+riv", "s", "a", "x")]
        feature = [page(f"#/8/{i * n // REPEATS}") for i in range(REPEATS)]
        following = [window.driver.execute_async_script(NEXT) for _ in range(REPEATS)]
        chromium = window.driver.capabilities["browserVersion"]
    found = {"overview": overview, "sort": sort, "search": search, "feature": feature, "next": following}
    return {f"{name}_ms": round(statistics.median(times)) for name, times in found.items()} | {
        "overview_slowest_ms": round(max(overview)),
        "chromium": chromium,
    }


def main() -> None:
    """Measure, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--features", type=int, default=24_576)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "saezoo" / "bundled" / "tiny-lm")
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = {"features": options.features, "vocabulary": options.vocabulary}
        row |= write(Path(folder), options.features, options.tokenizer, options.vocabulary)
        row |= opened(Path(folder), options.features)
    row |= {"load_average": round(os.getloadavg()[0], 1), **versions()}
    append(RESULTS / "dashboard_site.csv", row)
    print(row)


if __name__ == "__main__":
    main()
