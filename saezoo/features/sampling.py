"""Draws at random that depend on their key alone: not on the machine, the order of work, or the version of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def splitmix64(words: Words) -> Words:
    """Steele, Lea and Flood's finaliser (OOPSLA 2014, as Vigna's splitmix64.c) of each word."""
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def draw(population: int, most: int, *key: int) -> NDArray[np.int64]:
    """`most` different numbers of 0..population-1, uniformly, in ascending order; all of them if they are no more."""
    if population <= most:
        return np.arange(population)
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part))
    found: dict[int, None] = {}
    start = 0
    while len(found) < most:
        counter = np.arange(start, start + 2 * most, dtype=np.uint64)
        found |= dict.fromkeys((splitmix64(state + counter) % np.uint64(population)).tolist())
        start += 2 * most
    return np.array(sorted(list(found)[:most]), dtype=np.int64)


def others(excluded: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers 0, 1, 2 … without `excluded` (ascending), at these ranks among themselves."""
    found: NDArray[np.int64] = ranks + np.searchsorted(excluded - np.arange(len(excluded)), ranks, side="right")
    return found
