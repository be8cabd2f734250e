"""The files of a dashboard's site. tests/test_site_browser.py opens them."""

from __future__ import annotations

import base64
import errno
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sites
from hypothesis import given
from hypothesis import strategies as st

from saezoo.errors import SaezooError
from saezoo.features.pages import AFTER, BEFORE, feature_page, number, ranges, significant
from saezoo.features.serve import serve
from saezoo.features.site import MARK, SHARD, Site, is_site, script


def read(path: Path) -> Any:
    """What a script of data hands over."""
    return value_of(path.read_text(encoding="ascii").removeprefix(f"{MARK}\n"))


def value_of(text: str) -> Any:
    found = re.fullmatch(r'saezoo\.take\("[a-z0-9/]+","([A-Za-z0-9+/]*=*)"\)\n', text)
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


def test_every_feature_is_in_its_shard(tmp_path: Path) -> None:
    known = sites.about(features=tuple(range(0, 300, 2)))
    sites.write(tmp_path, known)
    shards = [read(tmp_path / "data" / "sae0" / f"{i}.js") for i in range(3)]
    assert [len(shard) for shard in shards] == [SHARD, SHARD, 150 - 2 * SHARD]
    assert [feature["index"] for shard in shards for feature in shard] == list(known.features)


def test_the_list_has_a_row_for_each_feature(tmp_path: Path) -> None:
    sites.write(tmp_path, sites.about())
    columns = read(tmp_path / "data" / "sae0" / "list.js")
    assert {len(column) for name, column in columns.items() if name not in ("clusters", "exclusive")} == {128}
    assert columns["clusters"] == [[1, 2, 3], [10, 20]]
    assert columns["fires"][1] == sites.alive(1).fires
    assert [columns[name][9] for name in ("fires", "mean", "max", "divergence", "tokens")] == [0, None, None, None, []]


def test_the_manifest_says_when_the_site_is_complete(tmp_path: Path) -> None:
    known = [sites.about("2"), sites.about("3")]
    site = Site(tmp_path, known, vocabulary=sites.VOCABULARY, special={0})
    states = [read(tmp_path / "data" / "manifest.js")]
    for about in known:
        site.write(about, sites.features(about))
        states.append(read(tmp_path / "data" / "manifest.js"))
    site.finish()
    states.append(read(tmp_path / "data" / "manifest.js"))
    assert [state["complete"] for state in states] == [False, False, False, True]
    written = [[sae["written"] for sae in state["saes"]] for state in states]
    assert written == [[False, False], [True, False], [True, True], [True, True]]


def test_features_other_than_promised_are_a_bug(tmp_path: Path) -> None:
    site = Site(tmp_path, [sites.about()], vocabulary=[], special=set())
    with pytest.raises(ValueError, match="the features of layer 2 are not those that its `About` promises"):
        site.write(sites.about(), [sites.alive(0), sites.alive(2)])


def test_a_site_is_written_again(tmp_path: Path) -> None:
    """What the new one does not have goes; what others put beside it stays."""
    sites.write(tmp_path, sites.about("2"), sites.about("3"))
    (tmp_path / "features.csv").write_text("theirs")
    sites.write(tmp_path, sites.about(features=(4,)))
    left = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "data").rglob("*.js")}
    assert left == {"data/manifest.js", "data/tokens.js", "data/sae0/0.js", "data/sae0/list.js"}
    assert (tmp_path / "features.csv").read_text() == "theirs"


def test_the_same_features_make_the_same_bytes(tmp_path: Path) -> None:
    one, other = (sites.write(tmp_path / name) for name in ("one", "other"))
    for path in one.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (other / path.relative_to(one)).read_bytes()


@pytest.mark.parametrize("name", ["notes.txt", "data/manifest.js", ".hidden"])
def test_a_folder_of_others_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("// theirs\n")
    with pytest.raises(SaezooError, match="holds other files and is no site of saezoo; choose a new or empty folder"):
        sites.write(tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["// theirs\n"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaezooError, match="is a file; a site is a folder: choose another place with --out"):
        sites.write(tmp_path / "file")


def test_what_a_writer_killed_at_its_first_file_leaves_is_empty(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".manifest.js.1234abcd").write_text(MARK)
    assert is_site(sites.write(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaezooError, match="cannot write .*choose a place that can be written"):
        sites.write(tmp_path / "file" / "site")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; the manifest goes on saying that the site is incomplete."""
    site = Site(tmp_path, [sites.about()], vocabulary=[], special=set())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SaezooError, match="no space left on the disk while writing .*0.js; free some"):
        site.write(sites.about(), sites.features(sites.about()))
    monkeypatch.undo()
    assert not read(tmp_path / "data" / "manifest.js")["complete"]


def test_a_killed_writer_leaves_an_incomplete_site(tmp_path: Path) -> None:
    """A real process, a real SIGKILL; the same command again completes it."""
    program = f"""
import os, sites, pathlib
from saezoo.features.site import Site
def features():
    yield from (sites.alive(i) for i in range(100))
    os.kill(os.getpid(), 9)
site = Site(pathlib.Path({str(tmp_path)!r}), [sites.about()], vocabulary=[], special=set())
site.write(sites.about(), features())
"""
    environment = {**os.environ, "PYTHONPATH": f"{Path(sites.__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not read(tmp_path / "data" / "manifest.js")["complete"]
    assert read(sites.write(tmp_path) / "data" / "manifest.js")["complete"]


HARD = st.recursive(st.none() | st.text() | st.integers(-(2**53), 2**53), lambda some: st.lists(some, max_size=3))


@given(HARD)
def test_data_are_inert_text(value: Any) -> None:
    """Letters and digits in one line, and the same value when read."""
    assert value_of(script("name", value)) == value


def test_no_number_is_made_up() -> None:
    page = feature_page(sites.dead(9))
    assert (page["histogram"], page["top"], page["quantiles"], page["byShare"]) == (None, [], [], [])
    assert [number(value) for value in (None, float("nan"), float("inf"), 0.0)] == [None, None, None, 0.0]


@given(st.lists(st.floats(1e-6, 1e7), min_size=1, max_size=50), st.integers(2, 5))
def test_significant_digits_as_python_prints_them(values: list[float], digits: int) -> None:
    """But for halves, which go one way or the other; and what is kept prints with so many digits."""
    found = significant(np.array(values), digits).tolist()
    for value, rounded in zip(values, found, strict=True):
        assert rounded == pytest.approx(value, rel=0.5000001 * 10.0 ** (1 - digits))
        assert rounded == float(f"{rounded:.{digits}g}")


def test_a_context_is_cut_around_its_firing() -> None:
    """Row, document, first position, length of the row, position, ids, pairs of place and value."""
    values = np.zeros(100)
    values[[40, 44, 90]] = [2.0, 1.23456, 5.0]
    context = sites.example(range(100), list(values), 40)
    (cut,) = feature_page(sites.with_context(context))["top"]
    assert cut == [3, 7, 40 - BEFORE, 100, 40, list(range(40 - BEFORE, 41 + AFTER)), [BEFORE, 2.0, BEFORE + 4, 1.23]]


def test_a_context_at_the_beginning_is_not_padded() -> None:
    (cut,) = feature_page(sites.with_context(sites.example([5, 6, 7], [0, 1, 0], 1)))["top"]
    assert cut == [3, 7, 0, 3, 1, [5, 6, 7], [1, 1.0]]


@pytest.mark.parametrize(
    ("numbers", "runs"), [((), []), ((4,), [[4, 5]]), ((0, 1, 2, 7, 9, 10), [[0, 3], [7, 8], [9, 11]])]
)
def test_ranges(numbers: tuple[int, ...], runs: list[list[int]]) -> None:
    assert ranges(numbers) == runs


def test_memory_holds_one_shard(tmp_path: Path) -> None:
    """The features of a shard are not asked for before the one before it is on the disk."""
    known = sites.about(features=tuple(range(3 * SHARD)))
    seen = []

    def stream() -> Iterator[Any]:
        for index in known.features:
            seen.append((index // SHARD, len(list(tmp_path.glob("data/sae0/*.js")))))
            yield sites.dead(index)

    Site(tmp_path, [known], vocabulary=[], special=set()).write(known, stream())
    assert all(shard == on_disk for shard, on_disk in seen)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`serve` in a process of its own, and its port."""
    sites.write(tmp_path / "site")
    (tmp_path / "secret").write_text("not for others")
    (tmp_path / "site" / "link").symlink_to(tmp_path / "secret")
    program = f"""
import pathlib, sys
from saezoo.features.serve import serve
serve(pathlib.Path({str(tmp_path / "site")!r}), lambda line: print(line, file=sys.stderr, flush=True), browser=False)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/ \(end with Ctrl-C\)", process.stderr.readline())
        assert found
        yield process, int(found[1])
        process.kill()


def answer(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_the_server_serves_the_site_and_ends_quietly(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    with socket.create_connection(("127.0.0.1", port)) as impatient:  # goes before the answer comes
        impatient.sendall(b"GET /data/sae0/0.js HTTP/1.0\r\nHost: localhost\r\n\r\n")
        impatient.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    status, body = answer(port, "/")
    assert status == 200 and b"<title>Features</title>" in body
    assert answer(port, "/data/manifest.js")[1].startswith(MARK.encode())
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(10)) == ("", 0)


@pytest.mark.parametrize(
    "path", ["/../secret", "/%2e%2e/secret", "/link", "/data/", "/absent", "/%00", f"/{'x' * 300}"]
)
def test_the_server_serves_nothing_else(server: tuple[subprocess.Popen[str], int], path: str) -> None:
    """Not what lies outside, not what a link leads to, no lists of files."""
    status, body = answer(server[1], path)
    assert status == 404 and b"not for others" not in body


def test_the_server_answers_to_no_other_name(server: tuple[subprocess.Popen[str], int]) -> None:
    """Else a page elsewhere could read the site, by giving its own name this address."""
    assert answer(server[1], "/", Host="evil.example")[0] == 403
    assert answer(server[1], "/", Host=f"localhost:{server[1]}")[0] == 200


def test_only_sites_are_served(tmp_path: Path) -> None:
    with pytest.raises(SaezooError, match="is no site of saezoo; write one first"):
        serve(tmp_path, print, browser=False)


def test_a_port_in_use(server: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    with pytest.raises(SaezooError, match=f"port {server[1]} cannot be used: .*; choose another, or none"):
        serve(tmp_path / "site", print, port=server[1], browser=False)


def test_data_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """Files for others to read have the mode that other new files get."""
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    sites.write(tmp_path / "site")
    modes = {path.stat().st_mode for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert modes == {ordinary.stat().st_mode}
