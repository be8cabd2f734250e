"""Draws at random that depend on their key alone: not on the machine, the order of work, or the version of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1


def splitmix64(word: int) -> int:
    """Steele, Lea and Flood's finaliser (OOPSLA 2014, as Vigna's splitmix64.c) of 64 bits."""
    mixed = (word + 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return mixed ^ (mixed >> 31)


def draw(population: int, most: int, *key: int) -> NDArray[np.int64]:
    """`most` different numbers of 0..population-1, uniformly, in ascending order; all of them if they are no more."""
    if population <= most:
        return np.arange(population)
    state = 0
    for part in key:
        state = splitmix64(state ^ part)
    found: set[int] = set()
    while len(found) < most:
        state = splitmix64(state)
        found.add(state % population)
    return np.array(sorted(found), dtype=np.int64)


def others(excluded: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers 0, 1, 2 … without `excluded` (ascending), at these ranks among themselves."""
    found: NDArray[np.int64] = ranks + np.searchsorted(excluded - np.arange(len(excluded)), ranks, side="right")
    return found
