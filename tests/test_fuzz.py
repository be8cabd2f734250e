"""A small, fixed share of the fuzzing; docs/security.md has the whole of it. Also: the fuzzer finds what is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("not a checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import fuzz  # noqa: E402
import fuzz_targets  # noqa: E402
from fuzz_targets import Target  # noqa: E402

from saezoo.errors import SaezooError  # noqa: E402


@pytest.mark.parametrize("name", fuzz.INPUTS)
def test_no_input_crashes_a_reader(name: str, tmp_path: Path) -> None:
    inputs = 150 if name == "registry" else 1500
    tally = fuzz.fuzz(name, inputs, 20, tmp_path)
    assert tally.crashes == {}
    assert tally.inputs == inputs == tally.refused + tally.accepted
    assert tally.refused > inputs // 10 and tally.accepted > inputs // 50, "the inputs are too much alike"


def test_the_good_files_are_read(tmp_path: Path) -> None:
    """Else their mutations would be refused for nothing."""
    fuzz_targets.use_folder(tmp_path)
    for target in fuzz_targets.targets().values():
        (tmp_path / f"good{target.suffix}").write_bytes(target.seeds[0])
        target.read(tmp_path / f"good{target.suffix}")


def test_more_than_a_million_inputs() -> None:
    assert sum(fuzz.INPUTS.values()) > 1_000_000


def _crashing(path: Path) -> None:
    if b"BAD" in path.read_bytes():
        raise KeyError("BAD")


def _slow(path: Path) -> None:
    if b"BAD" in path.read_bytes():
        time.sleep(5)


def _talking(path: Path) -> None:
    raise SaezooError("two\nlines")


@pytest.mark.parametrize(
    ("read", "found"),
    [(_crashing, "KeyError at test_fuzz.py:"), (_slow, "_Stop at "), (_talking, "a message that is not one printable")],
)
def test_the_fuzzer_finds(
    read: Callable[[Path], None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that crashes, one that hangs, and one that says too much; and makes the input short."""

    def make(random: Random) -> bytes:
        return b"xxxxBADxxxx"

    target = Target(".x", [b"xxxxBADxxxx"], [b"y"], make, read)
    monkeypatch.setattr(fuzz_targets, "targets", lambda: {"mine": target})
    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    tally = fuzz.fuzz("mine", 2, 0, tmp_path)
    ((crash, data),) = tally.crashes.items()
    assert crash.startswith(found)
    assert data == (b"" if read is _talking else b"BAD")
