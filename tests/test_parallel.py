"""Features described by several processes are those described by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_describe import text

from saezoo.features import parallel
from saezoo.features.events import Events, Writer
from saezoo.features.parallel import describe_all

N = 40


@pytest.fixture
def events(tmp_path: Path) -> Events:
    random = torch.Generator().manual_seed(0)
    f_MF = torch.relu(torch.randn(640, N, generator=random) - 1)
    f_MF[::16] = 0  # the special token of each row
    writer = Writer(tmp_path, N, 900)
    for start in range(0, 640, 64):
        feature_N, token_N = f_MF[start : start + 64].T.nonzero(as_tuple=True)
        writer.add(feature_N, token_N + start, f_MF[token_N + start, feature_N])
    writer.flush()
    return Events([tmp_path], N)


def test_processes_give_what_one_gives(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "FEWEST", 1)
    monkeypatch.setattr(parallel, "CHUNK", 3)
    chosen = [0, 1, 2, 5, *range(7, N)]
    alone = list(describe_all(events, text(), chosen))
    assert [feature.index for feature in alone] == chosen
    assert list(map(repr, describe_all(events, text(), chosen, workers=2))) == list(map(repr, alone))


def test_who_stops_reading_stops_the_processes(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "FEWEST", 1)
    monkeypatch.setattr(parallel, "CHUNK", 1)
    stream = describe_all(events, text(), range(N), workers=2)
    assert next(iter(stream)).index == 0
    stream.close()  # type: ignore[attr-defined]
