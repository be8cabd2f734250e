"""Several downloads at once: results, failures, and the lines where nobody looks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest

from saezoo import transfers
from saezoo.transfers import Transfers, size_words


def test_results_come_in_order_and_four_run_at_once() -> None:
    """The first four wait for each other; one after the other they would never end."""
    together = threading.Barrier(transfers.THREADS)

    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            if number < transfers.THREADS:
                together.wait(timeout=30)
            return number

        return work

    assert Transfers().run([job(number) for number in range(9)]) == list(range(9))
    assert Transfers().run([]) == []


def test_the_first_failure_is_raised_and_no_new_job_begins() -> None:
    begun = []

    def fail() -> None:
        begun.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Transfers().run([fail] * 100)
    assert len(begun) <= transfers.THREADS


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of an earlier process count as done, not as speed; before the first byte nothing is shown."""
    monkeypatch.setattr(transfers, "_EVERY", 0.0)
    with Transfers() as view:
        view.expect("a", 50_000, 151_000_000, label="a")
        view.expect("b", 0, 1_000, label="b")
        assert capsys.readouterr().err == ""
        view.update("b", 1_000, 1_000)
    told = capsys.readouterr().err
    assert re.fullmatch(r"downloading 51.0 kB of 151.0 MB, 1 of 2 files, [\d,.]+ MB/s, [\d,]+ s left\n", told)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (1_274, "1,274 B"), (132_360, "132.4 kB"), (151e6, "151.0 MB"), (2.4e9, "2.4 GB")]
)
def test_sizes(size: float, words: str) -> None:
    assert size_words(int(size)) == words
