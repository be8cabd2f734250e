"""Sets of features of which every two are related, found from the list of related pairs.

Cliques, grown greedily from the strongest pair: no chain of neighbours can make a set whose ends have nothing to do
with each other, as it does in single linkage. Deterministic; each feature is in one set at most.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Pair(NamedTuple):
    """Two related features, `a` below `b`, and how strongly."""

    a: int
    b: int
    weight: float


def cliques(pairs: Sequence[Pair]) -> list[tuple[tuple[int, ...], float]]:
    """(features, mean weight of their pairs) of disjoint sets in which every two are a pair; the strongest seed first.

    The strongest pair of which neither is in a set begins one; to it comes, again and again, the feature that is paired
    with all members and has the largest sum of weights with them. Ties go to the lowest indices. Members are in the
    order in which they came.
    """
    beside: dict[int, dict[int, float]] = {}
    for a, b, weight in pairs:
        beside.setdefault(a, {})[b] = weight
        beside.setdefault(b, {})[a] = weight
    found, taken = [], set[int]()
    for a, b, weight in sorted(pairs, key=lambda pair: (-pair.weight, pair.a, pair.b)):
        if a in taken or b in taken:
            continue
        members, total = [a, b], weight
        open_to = {i: w + beside[b][i] for i, w in beside[a].items() if i in beside[b] and i not in taken}
        while open_to:
            best = min(open_to, key=lambda i: (-open_to[i], i))
            members.append(best)
            total += open_to.pop(best)
            open_to = {i: w + beside[best][i] for i, w in open_to.items() if i in beside[best]}
        taken.update(members)
        found.append((tuple(members), total / (len(members) * (len(members) - 1) / 2)))
    return found
