"""What `cooccurrence` finds on tiny-res at other thresholds: the table in docs/cooccurrence.md.

python benchmarks/cooccurrence_tiny.py [--layer 2] [--tokens 400000]
"""

from __future__ import annotations

import argparse
from collections import Counter

from saezoo.features.cooccurrence import cooccurrence
from saezoo.gathered import gathered
from saezoo.workflows import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="2")
    parser.add_argument("--tokens", type=int, default=400_000)
    args = parser.parse_args()
    with gathered("tiny-res", args.layer, tokens=args.tokens, options=Options(offline=True)) as found:
        assert found is not None
        events, scored_P = found.collection.events[0], found.collection.scoring.scored_RT.numpy().reshape(-1)
        W_dec_FD = found.task.subjects[0].sae.W_dec
        for together in (0.2, 0.3, 0.5):
            sizes = Counter(
                len(g.features) for g in cooccurrence(events, scored_P, W_dec_FD, together=together).clusters
            )
            print(f"Jaccard {together} or more: {sum(sizes.values())} clusters, by size {dict(sorted(sizes.items()))}")
        for near in (0.2, -1.0):
            print(f"cosine {near} or more: {len(cooccurrence(events, scored_P, W_dec_FD, near=near).exclusive)} groups")


if __name__ == "__main__":
    main()
