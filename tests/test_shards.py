"""The token cache against `tokens.encode`: whatever is cached, damaged, killed or shared, the ids are the same."""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saezoo
from saezoo.entries import Dataset
from saezoo.errors import SaezooError, TextError
from saezoo.files import cache_folder
from saezoo.shards import Ids, TokenCache
from saezoo.tokens import TextSource, encode, text_file

TEXTS = [f"Document {i}: " + "ab cd " * (i * 7 % 11) for i in range(60)]
STEPS = ("open", "write", "flush", "fsync", "chmod", "replace")
MOMENTS = range(1, 360, 17)  # of a kill, in such calls


def letters(words: int = 0) -> Any:
    """A tokenizer of bytes that drops `~`, so that `~` is a document of no tokens; `words` more on request."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(words))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.normalizer = normalizers.Replace("~", "")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = names[-1] if words else "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letters()


def write(path: Path, texts: list[str]) -> TextSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return text_file(path)


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    return write(tmp_path / "text.jsonl", TEXTS)


def small(source: TextSource, tokenizer: Any, root: Path, note: Callable[[str], None] = lambda message: None) -> Any:
    """A cache with 7 documents in each of 9 shards."""
    return TokenCache(source, tokenizer, root, note, shard_documents=7)


def plain(documents: Iterator[Ids]) -> list[list[int]]:
    return [ids.tolist() for ids in documents]


def wanted(source: TextSource, tokenizer: Any) -> list[list[int]]:
    return list(encode(tokenizer, source.documents()))


def meta(cache: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cache.folder / "meta.json").read_text())
    return found


def wait_for_thread() -> None:
    """Until what is being made ahead is there."""
    for thread in working():
        thread.join(60)


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saezoo-tokens"]


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(words | st.just("~"), min_size=1, max_size=25), st.integers(1, 9), st.integers(1, 60), st.integers(0, 9)
)
def test_ids_are_those_of_encode(texts: list[str], n_documents: int, n_tokens: int, start: int) -> None:
    tokenizer = letters()
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "text.jsonl", texts)
        expected = wanted(source, tokenizer)
        limits: dict[str, Any] = {"shard_documents": n_documents, "shard_tokens": n_tokens}
        assert plain(TokenCache(source, tokenizer, Path(folder), **limits).documents(start)) == expected[start:]
        cache = TokenCache(source, tokenizer, Path(folder), **limits)
        (Path(folder) / "text.jsonl").unlink()
        assert plain(cache.documents()) == expected


def test_the_second_time_the_text_is_not_needed(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    expected = wanted(source, tokenizer)
    assert plain(small(source, tokenizer, tmp_path).documents()) == expected
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    (tmp_path / "text.jsonl").unlink()
    assert plain(cache.documents()) == expected
    assert plain(cache.documents(23)) == expected[23:]
    assert plain(cache.documents(99)) == []
    assert notes == []


def test_shards_before_the_start_are_not_read(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    list(small(source, tokenizer, tmp_path).documents())
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    damage(cache.folder / "000002.tokens", "flipped")
    assert plain(cache.documents(21)) == wanted(source, tokenizer)[21:]
    assert notes == []


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_the_text(tmp_path: Path, split: bool) -> None:
    tokenizer = letters()
    tokenizer.split_special_tokens = split
    source = write(tmp_path / "text.jsonl", ["a<|endoftext|>b"])
    expected = wanted(source, tokenizer)
    assert (len(expected[0]) > 3) == split
    assert plain(small(source, tokenizer, tmp_path).documents()) == expected


def test_more_documents_than_one_call_of_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "text.jsonl", [str(i) for i in range(2500)])
    cache = TokenCache(source, tokenizer, tmp_path, shard_documents=1100)
    assert plain(cache.documents()) == wanted(source, tokenizer)
    assert [shard["documents"] for shard in meta(cache)["shards"]] == [1100, 1100, 300]


def test_what_lies_on_the_disk(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    expected = wanted(source, tokenizer)[7:14]
    list(cache.documents())
    tokens, ends = (np.fromfile(cache.folder / f"000001.{kind}", dtype) for kind, dtype in KINDS)
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert ends.tolist() == list(itertools.accumulate(map(len, expected)))
    about = {key: value for key, value in meta(cache).items() if key != "shards"}
    assert about == {"version": 1, "text": "file:text.jsonl", "vocab": 257, "dtype": "uint16", "complete": True}
    assert len(list(cache.folder.iterdir())) == 2 * 9 + 1
    assert notes == [f"token cache: tokenising file:text.jsonl into {cache.folder}"]


KINDS = (("tokens", "<u2"), ("ends", "<i8"))


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    tokenizer = letters(words=70_000)
    source = write(tmp_path / "text.jsonl", ["ab", "a<69999>b"])
    found = list(small(source, tokenizer, tmp_path).documents())
    assert [ids.tolist() for ids in found] == wanted(source, tokenizer)
    assert found[1].dtype == np.uint32 and found[1].max() == 70_255


def test_a_text_without_documents(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "text.jsonl", [" "])
    for _ in range(2):
        cache = small(source, tokenizer, tmp_path)
        assert plain(cache.documents()) == []
    assert meta(cache)["complete"] and [path.name for path in cache.folder.iterdir()] == ["meta.json"]


def test_ids_cannot_be_written_over(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    ids = next(small(source, tokenizer, tmp_path).documents())
    assert type(ids) is np.ndarray and ids.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_each_text_and_tokenizer_has_its_own_folder(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    other_text = write(tmp_path / "other.jsonl", ["x"])
    lines = text_file(
        Path(shutil.copy(tmp_path / "text.jsonl", tmp_path / "text.txt"))
    )  # the same bytes, read as one document
    whole = letters()
    whole.split_special_tokens = True
    caches = [small(text, tokenizer, tmp_path) for text in (source, other_text, lines)]
    caches += [small(source, other, tmp_path) for other in (letters(words=1), whole)]
    caches += [TokenCache(source, tokenizer, tmp_path, shard_documents=8)]
    assert len({cache.folder for cache in caches}) == 6
    assert small(replace(source, name="renamed"), letters(), tmp_path).folder == caches[0].folder


def test_truncation_left_by_an_earlier_call_has_no_say(source: TextSource, tmp_path: Path) -> None:
    expected, used = wanted(source, letters()), letters()
    used("some text", truncation=True, max_length=3, padding="max_length")
    cache = small(source, used, tmp_path)
    assert cache.folder == small(source, letters(), tmp_path).folder
    assert plain(cache.documents()) == expected


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()
    if how != "missing":
        path.write_bytes(content if how == "flipped" else content[:-8] if how == "cut" else b"")


@pytest.mark.parametrize("kind", ["tokens", "ends"])
@pytest.mark.parametrize("how", ["missing", "flipped", "cut", "empty"])
def test_a_damaged_shard_is_made_again(source: TextSource, tokenizer: Any, tmp_path: Path, kind: str, how: str) -> None:
    cache = small(source, tokenizer, tmp_path)
    list(cache.documents())
    before = meta(cache)
    damage(cache.folder / f"000003.{kind}", how)
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    assert len(notes) == (how != "flipped")  # sizes are looked at on opening
    assert plain(cache.documents()) == wanted(source, tokenizer)
    assert notes[0] == "token cache: shard 000003 is damaged; tokenising it again"
    assert notes[1:] == [f"token cache: tokenising file:text.jsonl into {cache.folder}"]
    assert meta(cache) == before


def test_damage_behind_what_was_made_ahead(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    """The text must be read again from its start, since the encoder is past the damaged shard already."""
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    documents = cache.documents()
    found = [next(documents).tolist()]
    wait_for_thread()
    damage(cache.folder / "000001.tokens", "flipped")
    assert found + plain(documents) == wanted(source, tokenizer)
    assert notes[1:] == ["token cache: shard 000001 is damaged; tokenising it again"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "x"}', b'{"version": 1, "shards": [{"a": 1}]}'])
def test_a_damaged_list_of_shards(source: TextSource, tokenizer: Any, tmp_path: Path, content: bytes) -> None:
    cache = small(source, tokenizer, tmp_path)
    list(cache.documents())
    (cache.folder / "meta.json").write_bytes(content)
    notes: list[str] = []
    assert plain(small(source, tokenizer, tmp_path, notes.append).documents()) == wanted(source, tokenizer)
    assert notes[0] == "token cache: meta.json is damaged; tokenising again"
    assert len(meta(cache)["shards"]) == 9


def test_a_cache_of_a_later_version(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    cache = small(source, tokenizer, tmp_path)
    list(cache.documents())
    path = cache.folder / "meta.json"
    path.write_text(json.dumps({**meta(cache), "version": 2}))
    with pytest.raises(TextError) as caught:
        small(source, tokenizer, tmp_path)
    message = f"{path} is of version 2, this saezoo reads up to 1; update saezoo, or delete {cache.folder}"
    assert str(caught.value) == message


def test_one_shard_is_made_ahead_and_no_more(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    cache = small(source, tokenizer, tmp_path)
    documents = cache.documents()
    for n_shards in (2, 3, 4):
        assert len(list(itertools.islice(documents, 7))) == 7
        wait_for_thread()
        assert len(meta(cache)["shards"]) == n_shards
    documents.close()
    assert not meta(cache)["complete"]


def test_a_repeated_run_makes_nothing(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    cache = small(source, tokenizer, tmp_path)
    first = plain(itertools.islice(cache.documents(), 17))
    wait_for_thread()
    before = meta(cache)
    notes: list[str] = []
    again = small(source, tokenizer, tmp_path, notes.append)
    assert plain(itertools.islice(again.documents(), 17)) == first
    assert not working() and meta(cache) == before and notes == []


def test_a_partial_cache_is_gone_on_with(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    list(itertools.islice(small(source, tokenizer, tmp_path).documents(), 17))
    assert plain(small(source, tokenizer, tmp_path).documents()) == wanted(source, tokenizer)


def test_caches_that_take_turns(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    """As two processes would, each finds shards of the other; and two walks over one cache share what they make."""
    one, other = (small(source, tokenizer, tmp_path) for _ in range(2))
    walks = [cache.documents() for cache in (one, other, other)]
    found: list[list[list[int]]] = [[], [], []]
    for turn, size in itertools.product(range(10), (1, 11, 5, 13)):
        which = (turn + size) % 3
        found[which] += plain(itertools.islice(walks[which], size))
    for mine, walk in zip(found, walks, strict=True):
        assert mine + plain(walk) == wanted(source, tokenizer)
    assert [shard["documents"] for shard in meta(one)["shards"]] == [7] * 8 + [4]


def test_shards_of_another_process_are_adopted(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    late = small(source, tokenizer, tmp_path)
    documents = late.documents()
    found = [next(documents).tolist()]
    wait_for_thread()
    list(small(source, tokenizer, tmp_path).documents())
    before = [path.stat().st_ino for path in sorted(late.folder.iterdir())]
    assert found + plain(documents) == wanted(source, tokenizer)
    assert [path.stat().st_ino for path in sorted(late.folder.iterdir())] == before  # not written once more


def test_shards_of_another_text_are_not(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    """As when a data set without a revision changes while one process is reading it and another begins."""
    other = small(write(tmp_path / "other.jsonl", TEXTS[::-1]), tokenizer, tmp_path)
    list(other.documents())
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    documents = cache.documents()
    found = [next(documents).tolist()]
    wait_for_thread()
    for path in other.folder.glob("00000[2-8].*"):
        shutil.copy(path, cache.folder)
    shutil.copy(other.folder / "meta.json", cache.folder)
    assert found + plain(documents) == wanted(source, tokenizer)
    assert len(notes) == 1 and plain(small(source, tokenizer, tmp_path).documents()) == wanted(source, tokenizer)


@dataclass(frozen=True)
class Overtaken(TextSource):
    """While the first shard of this text is being made, another process makes all."""

    other: Callable[[], object] = list

    def documents(self) -> Iterator[str]:
        yield from TEXTS
        self.other()


def test_what_others_have_listed_meanwhile_stays_listed(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    other = small(source, tokenizer, tmp_path)
    overtaken = Overtaken(source.name, source.path, other=lambda: list(other.documents()))
    cache = small(overtaken, tokenizer, tmp_path)
    documents = cache.documents()
    found = [next(documents).tolist()]
    assert len(meta(cache)["shards"]) == 9 and not working()
    assert found + plain(documents) == wanted(source, tokenizer)


@dataclass(frozen=True)
class Endless(TextSource):
    """One document, then long ones of no tokens for ever."""

    def documents(self) -> Iterator[str]:
        return itertools.chain(["a" * 100], itertools.repeat("~" * 10_000))


def endless(tokenizer: Any, root: Path) -> Iterator[Ids]:
    """After the first document, its thread works on a shard that never gets full."""
    spec = Dataset("owner/endless", "f" * 40, None, "train", "text", None, ())
    cache = TokenCache(Endless("endless", dataset=spec), tokenizer, root, shard_documents=10**9, shard_tokens=100)
    return cache.documents()


@pytest.mark.parametrize("how", ["close", "collect"])
def test_the_thread_stops_with_the_iterator(tokenizer: Any, tmp_path: Path, how: str) -> None:
    documents: Any = endless(tokenizer, tmp_path)
    assert len(next(documents)) == 100
    assert len(working()) == 1
    if how == "close":
        documents.close()
    del documents
    gc.collect()
    assert not working()


def test_what_goes_wrong_in_the_thread_comes_out(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "text.jsonl", [str(i) for i in range(2000)])
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    documents = TokenCache(source, tokenizer, tmp_path, shard_documents=900).documents()
    assert len(list(itertools.islice(documents, 900))) == 900
    with pytest.raises(TextError, match=r'text\.jsonl:2001: not a JSON object with a "text" field$'):
        list(documents)
    assert not working()


class Halved(TextSource):
    """Has half of a surrogate pair in its second document, as a data set may."""

    def documents(self) -> Iterator[str]:
        yield from ("a", "\ud83d")


def test_a_text_that_cannot_be_encoded(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "text.jsonl", TEXTS)
    cache = small(Halved("mine", path=tmp_path / "text.jsonl"), tokenizer, tmp_path)
    with pytest.raises(TextError, match="^mine: document 2 is not valid text; leave it out$"):
        list(cache.documents())


def test_a_file_that_changes_between_opening_and_reading(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    cache = small(source, tokenizer, tmp_path)
    write(tmp_path / "text.jsonl", TEXTS[1:])
    with pytest.raises(TextError, match=r"^file:text\.jsonl was changed while it was being read; start again$"):
        list(cache.documents())
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("name, message", [("absent.txt", "no file .*absent.txt"), (".", ".* cannot be read: .*")])
def test_a_file_that_cannot_be_read(tokenizer: Any, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TextError, match=f"^{message}"):
        small(text_file(tmp_path / name), tokenizer, tmp_path)


def from_dataset(folder: Path, texts: list[Any], revision: str | None) -> TextSource:
    """Parquet in a folder: `datasets` reads it by the same code as the hub's."""
    import pandas as pd

    folder.mkdir(exist_ok=True)
    pd.DataFrame({"text": texts}).to_parquet(folder / "train.parquet", row_group_size=10)
    return TextSource("dataset:mine", dataset=Dataset(str(folder), revision, None, "train", "text", None, ()))


@pytest.mark.parametrize("revision, said", [("a" * 40, 0), (None, 1)])
def test_a_data_set_with_empty_documents(tokenizer: Any, tmp_path: Path, revision: str | None, said: int) -> None:
    source = from_dataset(tmp_path / "set", ["", *TEXTS[:10], "", "", "end", ""], revision)
    expected = wanted(source, tokenizer)
    assert plain(small(source, tokenizer, tmp_path).documents()) == expected
    shutil.rmtree(tmp_path / "set")
    notes: list[str] = []
    cache = small(source, tokenizer, tmp_path, notes.append)
    assert plain(cache.documents()) == expected and expected[0] == expected[-1] == []
    note = f"token cache: dataset:mine has no pinned revision; if it has changed, delete {cache.folder}"
    assert notes == [note] * said


def test_a_null_in_a_data_set(tokenizer: Any, tmp_path: Path) -> None:
    source = from_dataset(tmp_path / "set", ["a", None], None)
    with pytest.raises(TextError, match=r"^dataset:mine: document 2 is not valid text; leave it out$"):
        list(small(source, tokenizer, tmp_path).documents())


def test_a_data_set_that_has_become_shorter(tokenizer: Any, tmp_path: Path) -> None:
    source = from_dataset(tmp_path / "set", TEXTS, None)
    list(itertools.islice(small(source, tokenizer, tmp_path).documents(), 15))
    from_dataset(tmp_path / "set", TEXTS[:9], None)
    cache = small(source, tokenizer, tmp_path)
    done = 7 * len(meta(cache)["shards"])
    with pytest.raises(TextError) as caught:
        list(cache.documents())
    wrong = f"dataset:mine has 9 documents, but {done} were tokenised before: it has changed; delete "
    assert str(caught.value) == wrong + str(cache.folder)


def test_old_temporary_files_are_removed(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    cache = small(source, tokenizer, tmp_path)
    cache.folder.mkdir()
    for name in (".000001.tokens.old", ".000001.tokens.new"):
        (cache.folder / name).write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(cache.folder / ".000001.tokens.old", (hours_ago, hours_ago))
    list(cache.documents())
    assert [path.name for path in cache.folder.glob(".*")] == [".000001.tokens.new"]  # may be another process's


def test_a_folder_that_cannot_be_written(source: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaezooError, match=r"^cannot write .*meta\.json: .*; choose a place that can be written$"):
        list(small(source, tokenizer, tmp_path / "file").documents())


def test_a_shard_that_does_not_fit(tokenizer: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up."""
    source = write(tmp_path / "text.jsonl", ["a", "b" * 5000])
    cache = TokenCache(source, tokenizer, tmp_path, shard_documents=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SaezooError, match=r"^cannot write .*000001\.tokens: File too large; choose a place"):
            list(cache.documents())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert plain(TokenCache(source, tokenizer, tmp_path, shard_documents=1).documents()) == wanted(source, tokenizer)


@pytest.mark.parametrize(
    "environment, wanted_root",
    [
        ({"SAEZOO_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own/tokens"),
        ({"SAEZOO_CACHE": "~/own"}, "~/own/tokens"),
        ({"SAEZOO_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/saezoo/tokens"),
        ({}, "~/.cache/saezoo/tokens"),
    ],
)
def test_where_caches_lie(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted_root: str) -> None:
    for name in ("SAEZOO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("tokens") == Path(wanted_root).expanduser()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """This file as a program, for what needs processes of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(saezoo.__file__).parents[1])}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how, code", [("end", 0), ("interrupt", -signal.SIGINT)])
def test_a_process_ends_though_its_thread_is_busy(tmp_path: Path, how: str, code: int) -> None:
    done = run(how, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().split("\n")[-1] == ("KeyboardInterrupt" if code else "")


@pytest.fixture(scope="module")
def hundreds(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    texts = [f"{i} " + "abc " * (i * 31 % 17) for i in range(300)]
    return write(tmp_path_factory.mktemp("hundreds") / "text.jsonl", texts)


def by_sixteen(source: TextSource, tokenizer: Any, root: Path) -> list[list[int]]:
    return plain(TokenCache(source, tokenizer, root, shard_documents=16).documents())


def test_a_kill_at_any_moment_leaves_a_valid_cache(hundreds: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    done = run("kill", tmp_path, hundreds.path)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), done.stderr
    expected = wanted(hundreds, tokenizer)
    listed = []
    for moment in MOMENTS:
        listed += [len(json.loads(path.read_text())["shards"]) for path in tmp_path.glob(f"{moment}/*/meta.json")]
        assert by_sixteen(hundreds, tokenizer, tmp_path / str(moment)) == expected
    assert len(set(listed)) > 8  # they were killed far apart


def test_processes_that_share_a_cache(hundreds: TextSource, tokenizer: Any, tmp_path: Path) -> None:
    done = run("share", tmp_path, hundreds.path)
    assert done.stdout.split() == ["0"] * 4, done.stderr
    (path,) = tmp_path.glob("*/meta.json")
    listed = json.loads(path.read_text())
    assert [shard["documents"] for shard in listed["shards"]] == [16] * 18 + [12] and listed["complete"]
    assert by_sixteen(hundreds, tokenizer, tmp_path) == wanted(hundreds, tokenizer)


def kill_at(moment: int) -> None:
    """Have this process killed just before the `moment`th step of writing a file in its background threads."""
    count = itertools.count(1)

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in STEPS and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(hook)


def fork(work: Callable[[], bool]) -> int:
    """A child that ends with status 0 if `work` says so; forked before the tokenizer has made any threads."""
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)
    return child


def program(how: str, root: Path, text: Path | None = None) -> None:
    if text is None:
        documents = endless(letters(), root)
        next(documents)
        if how == "interrupt":
            signal.raise_signal(signal.SIGINT)
        return globals().update(kept=documents)  # so that it is still there when the interpreter ends
    source, tokenizer = text_file(text), letters()

    def killed(moment: int) -> bool:
        kill_at(moment)
        return bool(by_sixteen(source, tokenizer, root / str(moment)))

    def shared() -> bool:
        return by_sixteen(source, tokenizer, root) == wanted(source, tokenizer)

    if how == "kill":
        children = [fork(lambda moment=moment: killed(moment)) for moment in MOMENTS]  # type: ignore[misc]
    else:
        children = [fork(shared) for _ in range(4)]
    for child in children:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]), *map(Path, sys.argv[3:]))
