"""A hub that misbehaves: after every fault the right bytes are loaded, or there is one line that says why not.

Through the real client's protocol, in many threads. The numbers of faults are those in docs/getting.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_registry
from hubserver import Fault, HubServer
from huggingface_hub import constants
from replicas import files_in, weights, write_reformatted

from saezoo import DownloadError, download, read_registry
from saezoo.entries import Entry
from saezoo.loading import load_entry

HOOK = "blocks.1.hook_resid_pre"
COMMIT = "a" * 40
NAMES = ("sae_weights.safetensors", "cfg.json", "sparsity.safetensors")
SIZES = {"sae_weights.safetensors": 17_000, "cfg.json": 1_275, "sparsity.safetensors": 300}
"""About: where faults are placed; the replicas' exact sizes are asserted to be no smaller than that by a tenth."""


@dataclass(frozen=True)
class Scenario:
    """Faults of one download, and whether the SAE can be loaded in spite of them."""

    faults: tuple[Fault, ...]
    loads: bool = True
    times: int = 1
    """Requests that meet them."""
    cdn: bool = False
    """Large files come from another host, and that is the one that misbehaves."""


def tenths(name: str) -> list[int]:
    return [SIZES[name] * tenth // 10 for tenth in range(10)]


def fault(name: str, kind: Any, at: int = 0, **settings: Any) -> Fault:
    return Fault(name, kind, at, **settings)


def one(name: str, kind: Any, at: int = 0, **settings: Any) -> Scenario:
    return Scenario((fault(name, kind, at, **settings),))


def often(name: str, kind: Any, at: int, times: int, *, loads: bool, **settings: Any) -> Scenario:
    return Scenario((fault(name, kind, at, times=times, **settings),), loads, times)


LARGE = "sae_weights.safetensors"
STATUS = [(status, method) for status in (408, 429, 500, 502, 503, 504) for method in ("HEAD", "GET")]
SCENARIOS: dict[str, list[Scenario]] = {
    "connection closed at every 10 % of each file": [one(name, "drop", at) for name in NAMES for at in tenths(name)],
    "the same, twice in a row": [often(name, "drop", at, 2, loads=True) for name in NAMES for at in tenths(name)],
    "connection reset at every 10 % of each file": [one(name, "reset", at) for name in NAMES for at in tenths(name)],
    "closed at the same byte every time": [often(LARGE, "drop", at, 4, loads=False) for at in (0, 5000)],
    "closed, then the rest asked for and the whole sent": [
        Scenario((fault(LARGE, "drop", at), fault(LARGE, "whole")), times=2) for at in tenths(LARGE)[1:]
    ],
    "one bit flipped, once": [one(name, "flip", at) for name in NAMES for at in tenths(name)],
    "one bit flipped, in two downloads": [often(LARGE, "flip", at, 2, loads=False) for at in tenths(LARGE)],
    "Content-Length too short": [one(name, "short", at) for name in NAMES for at in tenths(name)[1:]],
    "Content-Length too long": [one(name, "long", more) for name in NAMES for more in (1, 10_000)],
    "status 408, 429, 500, 502, 503 or 504": [one(name, "status", s, method=m) for name in NAMES for s, m in STATUS],
    "429, 503 with Retry-After: 1": [one(LARGE, "status", s, retry_after=1, method="GET") for s in (429, 503)],
    "429, 503 with Retry-After: 3600": [
        often(LARGE, "status", s, 1, loads=False, retry_after=3600, method=m)
        for s in (429, 503)
        for m in ("HEAD", "GET")
    ],
    "stale ETag, once": [one(name, "etag", method="HEAD") for name in NAMES],
    "stale ETag, always": [often(name, "etag", 0, 3, loads=False, method="HEAD") for name in NAMES],
    "a trickle": [one(name, "trickle", SIZES[name] // 5) for name in NAMES],
    "silence in the middle": [one(name, "stall", SIZES[name] // 2) for name in NAMES],
    "redirected to another host, which closes": [
        dataclasses.replace(one(LARGE, "drop", at), cdn=True) for at in tenths(LARGE)
    ],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    write_reformatted(folder, 1, d_in=32, d_sae=64)
    found = files_in(folder)
    assert all(0.9 * SIZES[name] <= found[name].stat().st_size <= 1.2 * SIZES[name] for name in NAMES)
    return found


@dataclass(frozen=True)
class Place:
    """Two servers, and a repository of its own for each scenario."""

    hub: HubServer
    cdn: HubServer
    entry: Entry
    published: dict[str, Path]

    def publish(self, number: int, scenario: Scenario) -> Entry:
        """The same files under names of their own, so that a fault is met by this download only."""
        repo = f"owner/number{number}"
        self.hub.add(repo, COMMIT, {f"{number}/{name}": path for name, path in self.published.items()})
        server = self.cdn if scenario.cdn else self.hub
        server.faults += [dataclasses.replace(f, file=f"{number}/{f.file}") for f in scenario.faults]
        [layout] = self.entry.layouts.values()
        weights, config, sparsity = (f"{number}/{name}" for name in NAMES)
        names: dict[str, Any] = {"weights": weights, "config": config, "sparsity": sparsity}
        layout = dataclasses.replace(layout, repo=repo, revision=COMMIT, **names)
        return dataclasses.replace(self.entry, layouts={"only": layout})


@pytest.fixture
def place(
    published: dict[str, Path], small_registry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.02, 0.04))
    small_registry["collections"]["small"] |= {"d_in": 32, "d_sae": 64}
    del small_registry["collections"]["small"]["layouts"]["original"]
    entry = read_registry(write_registry(tmp_path / "mine.yaml", small_registry)).find("small", 1)[0]
    with HubServer() as hub, HubServer() as cdn:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield Place(hub, cdn, entry, published)


def check_cache(cache: Path) -> None:
    """Whatever has a final name is whole and right."""
    for blob in cache.glob("models--*/blobs/*"):
        assert blob.suffix == ".incomplete" or etag_of_content(blob) == blob.name
    for pointer in cache.glob("models--*/snapshots/*/*/*"):
        assert pointer.is_file(), pointer


def etag_of_content(blob: Path) -> str:
    """As the server gives it: by the length of the name, since a blob has no suffix."""
    from saezoo import files

    return files.sha256(blob) if len(blob.name) == 64 else files.git_sha1(blob)


def attempt(entry: Entry, right: dict[str, torch.Tensor], *, offline: bool = False) -> str:
    """`loaded`, or the message of the refusal. Fails if anything but the right weights is loaded."""
    try:
        sae = load_entry(entry, dtype=torch.float32, offline=offline)
    except DownloadError as error:
        assert "\n" not in str(error)
        return str(error)
    torch.testing.assert_close(dict(sae.state_dict()), right, rtol=0, atol=0)
    return "loaded"


@pytest.mark.parametrize("kind", SCENARIOS)
def test_a_fault_never_leads_to_a_wrong_byte(place: Place, kind: str, tmp_path: Path) -> None:
    """Every scenario of that kind; then, without faults, each can be loaded, and again offline."""
    scenarios = SCENARIOS[kind]
    if any(scenario.cdn for scenario in scenarios):
        place.cdn.share(place.hub)
    entries = [place.publish(number, scenario) for number, scenario in enumerate(scenarios)]
    right = weights(1, 32, 64)
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda entry: attempt(entry, right), entries))
    check_cache(tmp_path / "cache")
    served = place.hub.served + place.cdn.served
    wrong = {o for o, s in zip(outcomes, scenarios, strict=True) if (o == "loaded") is not s.loads}
    assert wrong == set()
    place.hub.faults.clear()
    place.cdn.faults.clear()
    assert [attempt(entry, right) for entry in entries] == ["loaded"] * len(entries)
    assert [attempt(entry, right, offline=True) for entry in entries] == ["loaded"] * len(entries)
    check_cache(tmp_path / "cache")
    assert served == sum(scenario.times for scenario in scenarios)


PAGE = Path(__file__).parents[1] / "docs" / "getting.md"


def test_the_page_counts_them() -> None:
    rows = re.findall(r"^\| (.*?) \| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {kind: (int(downloads), int(faults)) for kind, downloads, faults in rows if kind in SCENARIOS}
    counted = {kind: (len(many), sum(one.times for one in many)) for kind, many in SCENARIOS.items()}
    assert shown == counted
    total = tuple(map(sum, zip(*counted.values(), strict=True)))
    assert f"{total[0]} downloads" in PAGE.read_text(encoding="utf-8")
    assert total[0] >= 200
