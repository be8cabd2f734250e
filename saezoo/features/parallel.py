"""`describe` for many features, by several processes: threads do not speed up arithmetic on small arrays."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from saezoo.features.describe import Text, describe
from saezoo.features.events import Events
from saezoo.features.records import Feature

CHUNK = 256
"""Features that a process describes at a time."""
FEWEST = 4096
"""Fewer are described sooner than processes start: each imports torch."""


def describe_all(events: Events, text: Text, features: Sequence[int], workers: int = 1) -> Iterator[Feature]:
    """Describe `features`, ascending, in their order.

    With `workers`, and enough features, by so many processes, started anew ("spawn"): a program that calls this needs
    `if __name__ == "__main__":`. At most two chunks of each process wait in memory.
    """
    if workers < 2 or len(features) < FEWEST:
        yield from _described(events, text, features)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (events.folders, events.n_features, text)
    with ProcessPoolExecutor(workers, context, _begin, arguments) as pool:
        chunks = (features[start : start + CHUNK] for start in range(0, len(features), CHUNK))
        waiting: deque[Future[list[Feature]]] = deque()
        for chunk in itertools.islice(chunks, 2 * workers):
            waiting.append(pool.submit(_chunk, chunk))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_chunk, chunk) for chunk in itertools.islice(chunks, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _described(events: Events, text: Text, features: Sequence[int]) -> Iterator[Feature]:
    for start, stop in events.blocks(features):
        for index, firings in zip(range(start, stop), events.block(start, stop), strict=True):
            yield describe(index, firings, text)


_ours: list[tuple[Events, Text]] = []
"""Of a process that describes."""


def _begin(folders: Sequence[Path], n_features: int, text: Text) -> None:
    _ours.append((Events(folders, n_features), text))


def _chunk(features: Sequence[int]) -> list[Feature]:
    return list(_described(*_ours[0], features))
