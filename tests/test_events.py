"""Firings on disk: what is written comes back by feature, whatever the parts."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saezoo.features.events import Events, Writer, parts

TOKENS, FEATURES = 100, 12


def written(folder: Path, seed: int, part: int, batch: int, tokens: range = range(TOKENS)) -> torch.Tensor:
    """Random features [TOKENS, FEATURES]; the firings of `tokens` are written to `folder`."""
    f_MF = torch.relu(torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed)) - 0.5)
    f_MF[:, 3] = 0
    writer = Writer(folder, FEATURES, part)
    for start in range(tokens.start, tokens.stop, batch):
        rows_bF = f_MF[start : min(start + batch, tokens.stop)]
        feature_N, token_N = rows_bF.T.nonzero(as_tuple=True)
        writer.add(feature_N, token_N + start, rows_bF[token_N, feature_N])
    writer.flush()
    return f_MF


def assert_same(events: Events, f_MF: torch.Tensor) -> None:
    assert events.fires_F.tolist() == (f_MF > 0).sum(0).tolist()
    for i, firings in enumerate(events.block(0, FEATURES)):
        assert np.array_equal(firings.token_N, f_MF[:, i].nonzero().squeeze(1).numpy())
        assert np.array_equal(firings.value_N, f_MF[firings.token_N, i].numpy())
        assert np.array_equal(events.of(i).token_N, firings.token_N)


@given(st.integers(0, 9), st.integers(1, 900), st.integers(1, 120))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, seed: int, part: int, batch: int) -> None:
    folder = tmp_path_factory.mktemp("events")
    f_MF = written(folder, seed, part, batch)
    assert_same(Events([folder], FEATURES), f_MF)


def test_ranks_write_folders_of_their_own(tmp_path: Path) -> None:
    written(tmp_path / "0", 1, 50, 7, range(0, 49))
    f_MF = written(tmp_path / "1", 1, 60, 9, range(49, TOKENS))
    assert_same(Events([tmp_path / "0", tmp_path / "1"], FEATURES), f_MF)


def test_parts_are_named_after_their_first_token(tmp_path: Path) -> None:
    f_MF = written(tmp_path, 2, 1, 25)
    firsts = [int((f_MF[start : start + 25] > 0).any(1).nonzero()[0]) + start for start in range(0, TOKENS, 25)]
    assert list(parts(tmp_path)) == firsts


def test_nothing_fired(tmp_path: Path) -> None:
    Writer(tmp_path, FEATURES).flush()
    events = Events([tmp_path], FEATURES)
    assert list(tmp_path.iterdir()) == [] and events.fires_F.sum() == 0 and len(events.of(3).token_N) == 0


def test_blocks_hold_a_bounded_number_of_firings(tmp_path: Path) -> None:
    written(tmp_path, 0, 100, 10)
    events = Events([tmp_path], FEATURES)
    for features in (range(FEATURES), [0, 1, 5, 6, 7, 11]):
        blocks = events.blocks(list(features), most=70)
        assert [i for start, stop in blocks for i in range(start, stop)] == list(features)
        assert all(events.fires_F[start:stop].sum() <= 70 or stop == start + 1 for start, stop in blocks)


def test_a_full_disk_leaves_no_part(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    program = f"""
import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
import torch
from saezoo.errors import SaezooError
from saezoo.features.events import Writer
writer = Writer(Path({str(tmp_path)!r}), 3)
writer.add(torch.zeros(9000, dtype=torch.long), torch.arange(9000), torch.ones(9000))
try:
    writer.flush()
except SaezooError as error:
    sys.exit(str(error))
"""
    limit = (20_000, 20_000)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        cwd=Path(sys.modules["saezoo"].__file__ or "").parents[1],
    )
    assert done.returncode == 1 and done.stderr.startswith(f"cannot write {tmp_path}/part-000000000000.safetensors")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
