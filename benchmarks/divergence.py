"""How often the interval of `divergence` holds the truth, and how far its value is off on average.

    OMP_NUM_THREADS=1 python benchmarks/divergence.py

Three parts. `simulated`: 20 top firings and some in the middle, of known distributions over 2,000 tokens. A document
fires a geometric number of times; with probability b a firing repeats the document's theme, a token of the same
distribution (so the truth stays what it is). `tiny-res`: every feature of a layer; the "top" is 20 firings of different
rows drawn at random from the middle three fifths and taken out of them, so that the truth is 0. Beside saezoo's
interval: the delete-one-document jackknife alone, and beside the value that from all pairs of firings (Simpson's
estimator, as if each were a document of its own). Third, what the top examples of tiny-res really give. Prints tables,
appends to results/divergence.csv and divergence_tiny_res.csv. Before all, what a call costs.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from common import RESULTS, append
from scipy.special import stdtrit

from saezoo.features.divergence import Floats, Indices, divergence
from saezoo.workflows import Options, prepare

TOP, VOCABULARY = 20, 2000
CONTEXT = 128  # tokens of a row of tiny-res
DOCUMENTS = ((25, 2), (40, 3), (300, 4), (300, 10))
"""(documents, mean number of firings in the middle in each)."""
Sides = tuple[Indices, Indices, Indices, Indices]


def cases() -> dict[str, tuple[Floats, Floats]]:
    """Pairs of distributions over tokens."""
    rank = np.arange(2, VOCABULARY + 2)
    zipf, steep = 1 / rank, 1 / rank**1.5
    zipf, steep = zipf / zipf.sum(), steep / steep.sum()
    other = np.random.default_rng(1).permutation(VOCABULARY)
    one, two = ((np.arange(VOCABULARY) == 0) * 1.0, np.isin(np.arange(VOCABULARY), (5, 900)) / 2)
    fifty, hundred = ((np.arange(VOCABULARY) < n) / n for n in (50, 100))
    return {
        "the same: Zipf": (zipf, zipf),
        "the same: Zipf, steeper": (steep, steep),
        "the same: two tokens": (two, two),
        "the same: 50 tokens": (fifty, fifty),
        "one token; Zipf": (one, zipf),
        "one token; that half the time, Zipf": (one, (one + zipf) / 2),
        "one token 80 %, Zipf; 30 %, Zipf": (0.8 * one + 0.2 * zipf, 0.3 * one + 0.7 * zipf),
        "Zipf; Zipf of other tokens": (zipf, zipf[other]),
        "half of it Zipf of other tokens": ((steep + steep[other]) / 2, steep),
        "50 tokens; 100 tokens": (fifty, hundred),
        "two tokens; 50 tokens": (two, fifty),
        "one token, rarely two others; these": (0.95 * one + 0.05 * two, two),
    }


def draw(p_V: Floats, q_V: Floats, documents: int, mean: float, b: float, rng: np.random.Generator) -> Sides:
    """(top tokens, their documents, middle tokens, their documents)."""
    n_D = rng.geometric(1 / mean, documents)
    theme_D = rng.random(documents)
    sides = []
    for of, v in ((rng.choice(documents, TOP, p=n_D / n_D.sum()), p_V), (np.repeat(np.arange(documents), n_D), q_V)):
        place = np.where(rng.random(len(of)) < b, theme_D[of], rng.random(len(of)))
        sides += [np.searchsorted(v.cumsum()[:-1], place, side="right"), of]
    return sides[0], sides[1], sides[2], sides[3]


def all_pairs(sides: Sides) -> float:
    """The value from all pairs of firings, whatever their documents."""
    p_V, q_V = (np.bincount(tokens, minlength=VOCABULARY) for tokens in (sides[0], sides[2]))
    n, m = p_V.sum(), q_V.sum()
    pp, qq = (x @ (x - 1) / (x.sum() * (x.sum() - 1)) for x in (p_V, q_V))
    return float(1 - 2 * (p_V @ q_V) / (n * m) / (pp + qq)) if pp + qq else math.nan


def jackknife_half(sides: Sides) -> float:
    """Half the width of the interval by the delete-one-document jackknife alone, from values of each redone."""
    top, top_of, middle, middle_of = sides

    def value(left_out: int) -> float:
        kept, kept_m = top_of != left_out, middle_of != left_out
        found = divergence(top[kept], top_of[kept], middle[kept_m], middle_of[kept_m]).value
        return math.nan if found is None else found

    documents = np.union1d(top_of, middle_of)
    value_D = np.array([value(int(document)) for document in documents])
    n_D = np.bincount(top_of)
    k = n_D.sum() ** 2 / (n_D**2).sum()
    variance = (len(documents) - 1) / len(documents) * ((value_D - value_D.mean()) ** 2).sum()
    return float(stdtrit(k - 1, 0.975) * np.sqrt(k / (k - 1) * variance))


def simulated(samples: int) -> None:
    for (documents, mean), b in ((size, b) for size in DOCUMENTS for b in (0.0, 0.5)):
        for name, (p_V, q_V) in cases().items():
            rng = np.random.default_rng(0)
            truth = float(1 - 2 * (p_V @ q_V) / (p_V @ p_V + q_V @ q_V))
            values, widths, plain = [], [], []
            held, held_alone = list[bool](), list[bool]()
            for _ in range(samples):
                sides = draw(p_V, q_V, documents, mean, b, rng)
                value, lo, hi = divergence(*sides)
                if value is None or lo is None or hi is None:
                    continue
                values.append(value)
                widths.append(hi - lo)
                held.append(lo - 1e-9 <= truth <= hi + 1e-9)
                plain.append(min(max(all_pairs(sides), 0.0), 1.0))
                if len(held_alone) < samples // 4 and documents < 100:
                    held_alone.append(abs(value - truth) <= jackknife_half(sides) + 1e-9)
            row = {"part": "simulated", "what": name, "documents": documents, "firings": mean, "b": b}
            row |= {"samples": len(values), "truth": f"{truth:.3f}", "mean": f"{np.mean(values):.3f}"}
            row |= {"mean_all_pairs": f"{np.nanmean(plain):.3f}", "coverage": f"{np.mean(held):.3f}"}
            row |= {"width": f"{np.mean(widths):.3f}"}
            row["coverage_jackknife"] = f"{np.mean(held_alone):.3f}" if held_alone else ""
            append(RESULTS / "divergence.csv", row)
            print(*row.values(), sep="  ", flush=True)


def firings(layer: int) -> tuple[Indices, Indices, list[tuple[Indices, Floats]]]:
    """(tokens and documents of the held-out text by place, and of each feature the places and the values)."""
    task = prepare("tiny-res", layer, tokens=None, protocol="standard", model=None, layout=None, options=Options())
    sae, lm, rows = task.subjects[0].sae, task.lm, task.rows
    context, parts = rows.tokens_RT.shape[1], []
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            tokens_BT = torch.from_numpy(rows.tokens_RT[start : start + 16])
            f_BTF = sae.encode(lm.residuals(tokens_BT, [layer])[layer]) * (tokens_BT != lm.bos)[..., None]
            feature_P, place_P = f_BTF.flatten(0, 1).T.nonzero(as_tuple=True)
            parts.append((feature_P, place_P + start * context, f_BTF.flatten(0, 1)[place_P, feature_P].double()))
    feature, place, value = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    each = [np.flatnonzero(feature == i) for i in range(sae.config.d_sae)]
    return rows.tokens_RT.ravel(), rows.documents_RT.ravel(), [(place[own], value[own]) for own in each]


def tiny_res(layer: int) -> None:
    """The middle against itself, for every feature that fires in 20 rows of its middle at least."""
    tokens, documents, features = firings(layer)
    rng = np.random.default_rng(0)
    found, seconds = [], 0.0
    for places, values in features:
        order = places[np.argsort(-values, kind="stable")]
        middle = rng.permutation(order[len(order) // 5 : len(order) - len(order) // 5])
        _, first = np.unique(middle // CONTEXT, return_index=True)
        if len(first) < TOP:
            continue
        top = middle[rng.choice(first, TOP, replace=False)]
        rest = np.setdiff1d(middle, top)
        start = time.perf_counter()
        found.append(divergence(tokens[top], documents[top], tokens[rest], documents[rest]))
        seconds += time.perf_counter() - start
    known = [(value, lo, hi) for value, lo, hi in found if value is not None and lo is not None and hi is not None]
    row = {"part": "tiny-res", "what": f"layer {layer}", "documents": len(np.unique(documents)), "firings": "", "b": ""}
    row |= {"samples": len(known), "truth": "0", "mean": f"{np.mean([value for value, _, _ in known]):.3f}"}
    row |= {"mean_all_pairs": "", "coverage": f"{np.mean([lo == 0 for _, lo, _ in known]):.3f}"}
    row |= {"width": f"{np.mean([hi - lo for _, lo, hi in known]):.3f}", "coverage_jackknife": ""}
    append(RESULTS / "divergence.csv", row)
    print(*row.values(), f"{1e3 * seconds / len(found):.2f} ms each", sep="  ", flush=True)


def top_examples(layer: int) -> None:
    """What the features of a layer give: their 20 top rows against their middle, as a dashboard has them."""
    tokens, documents, features = firings(layer)
    found = []
    for places, values in features:
        order = places[np.argsort(-values, kind="stable")]
        _, first = np.unique(order // CONTEXT, return_index=True)
        top, middle = order[np.sort(first)[:TOP]], order[len(order) // 5 : len(order) - len(order) // 5]
        found.append(divergence(tokens[top], documents[top], tokens[middle], documents[middle]))
    known = np.array([value for value, _, _ in found if value is not None])
    ends = np.array([(lo, hi) for _, lo, hi in found if lo is not None and hi is not None])
    row: dict[str, object] = {"layer": layer, "features": len(found), "defined": len(known), "with_interval": len(ends)}
    row["nothing_in_common"] = int((known == 1).sum())
    row |= {f"quantile_{q}": f"{np.quantile(known, q / 100):.3f}" for q in (10, 25, 50)}
    row |= {"surely_above_half": int((ends[:, 0] > 0.5).sum()), "surely_above_0.9": int((ends[:, 0] > 0.9).sum())}
    row |= {"surely_below_half": int((ends[:, 1] < 0.5).sum())}
    row |= {"median_width": f"{np.median(ends[:, 1] - ends[:, 0]):.3f}"}
    append(RESULTS / "divergence_tiny_res.csv", row)
    print(*row.items(), sep="  ", flush=True)


def cost() -> None:
    """Milliseconds of one call, the quickest of 50."""
    p_V, q_V = cases()["half of it Zipf of other tokens"]
    for documents, mean in ((100, 3), (300, 10), (1000, 10), (2000, 50)):
        sides = draw(p_V, q_V, documents, mean, 0.5, np.random.default_rng(0))
        seconds = []
        for _ in range(50):
            start = time.perf_counter()
            divergence(*sides)
            seconds.append(time.perf_counter() - start)
        print(f"{len(sides[2]):7,} firings in the middle, {documents:,} documents: {1e3 * min(seconds):.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    samples = parser.parse_args().samples
    cost()
    simulated(samples)
    for layer in range(4):
        tiny_res(layer)
        top_examples(layer)


if __name__ == "__main__":
    main()
