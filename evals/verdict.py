"""Whether a measurement reproduces a published value: from our interval, and from the published value's own noise.

If both were measured on the same tokens they must agree to the digits that were published. Otherwise both scatter: ours
by its interval's standard error s, a value from fewer tokens by s times the root of the ratio of the numbers of tokens,
since documents are as long for both. The difference allowed is t sqrt(s^2 + s_published^2) and half a unit of the last
published digit, where t is Student's quantile at which, in a table of so many cells, a true value is called different
in any of them with a probability of 5 % (Bonferroni). The published value's own noise is unknown; it is taken to be
that of our documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from saezoo.results import Measured, Result

Verdict = Literal["reproduced", "differs", "not measurable"]
_SAME = 1e-5
"""Relative: what another processor's float32 may give on the same tokens."""
_DEPENDS_ON_TOKENS = ("alive_fraction", "dead", "unseen_density")
_FALSE_ALARM = 0.05


@dataclass(frozen=True)
class Cell:
    """One published value and what became of it."""

    layer: str
    metric: str
    published: float
    measured: Measured
    allowed: float | None
    """Largest difference that is no difference."""
    verdict: Verdict
    reason: str
    """Why it is not measurable; else how it was judged."""


def judge(
    results: list[Result], tokens: int | None, text: str | None, table: Sequence[tuple[str, float]] = ()
) -> list[Cell]:
    """Every published value of `results`, which share text and protocol.

    `tokens`: scored tokens that each published value rests on, None if unknown; `text`: the source of all of them, if
    it is known and can be had; `table`: all of (metric, value) that was published with them, which tells how many
    digits were (3.951 beside 3.8895 is 3.9510).
    """
    pairs = [(r, name, value) for r in results for name, value in r.published.items() if value is not None]
    digits: dict[str, int] = {}
    for name, value in [*table, *((name, value) for _, name, value in pairs)]:
        digits[name] = max(digits.get(name, 0), _decimals(value))
    same = tokens == results[0].tokens and text == results[0].text
    found: list[Cell] = []
    for result, name, value in pairs:
        here = result.metrics.get(name, Measured(None))
        half_unit = 0.5 * 10.0 ** -digits[name]
        if same and here.value is not None:
            allowed: float | None = half_unit + _SAME * abs(value)
            reason = "the same tokens: all digits published"
        else:
            allowed, reason = _allowed(result, name, here, tokens, half_unit, len(pairs))
        verdict: Verdict = "not measurable"
        if allowed is not None:
            verdict = "reproduced" if abs(here.known - value) <= allowed else "differs"
        found.append(Cell(result.layer, name, value, here, allowed, verdict, reason))
    return found


def _allowed(
    result: Result, name: str, here: Measured, tokens: int | None, half_unit: float, cells: int
) -> tuple[float | None, str]:
    """The difference that chance allows, and how it was found; or None, and why there is none."""
    from scipy.stats import t

    if here.value is None:
        return None, "not measured here" if name not in result.metrics else "undefined on this text"
    if name in _DEPENDS_ON_TOKENS:
        return None, "depends on the number of tokens"
    if here.lo is None or here.hi is None:
        return None, f"{result.documents} documents give no interval; more --tokens"
    if tokens is None:
        return None, "the published value's number of tokens is unknown"
    freedom = result.documents - 1
    error = (here.hi - here.lo) / (2 * float(t.ppf(0.975, freedom)))
    both = error * (1 + result.tokens / tokens) ** 0.5
    quantile = float(t.ppf(1 - _FALSE_ALARM / (2 * cells), freedom))
    return quantile * both + half_unit, f"{quantile:.2f} standard errors of both"


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return max(0, -int(exponent))
