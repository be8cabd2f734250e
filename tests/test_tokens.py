"""Packing against the packers of February 2024 and of SAELens (tests/golden/packing.json), and text sources."""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saezoo.entries import Dataset
from saezoo.errors import TextError
from saezoo.lm import load_language_model
from saezoo.tokens import Rows, TextSource, builtin, collect, concatenate, encode, pack, pack_feb2024, text_file

GOLDEN = Path(__file__).parent / "golden"
BOS = 0


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "packing.json").read_text())
    return found


@pytest.mark.parametrize("rows_per_call", [4, 12, 32])
def test_feb2024_rows_are_those_of_the_original_store(golden: dict[str, Any], rows_per_call: int) -> None:
    documents = [document["ids"] for document in golden["documents"]]
    calls = list(pack_feb2024(documents, bos=50256, context=128, rows_per_call=rows_per_call, skip=2))
    wanted = golden["historical"][str(rows_per_call)]
    assert [len(call) for call in calls] == [rows_per_call] * wanted["n_calls"]
    assert concatenate(calls).tokens_RT.tolist() == wanted["rows"]


def test_rows_are_those_of_saelens(golden: dict[str, Any]) -> None:
    documents = [document["ids"] for document in golden["documents"]]
    rows = concatenate(list(pack(documents, bos=50256, context=128)))
    assert rows.tokens_RT.tolist() == golden["saelens"]["separator_bos"]["rows"]


def test_a_short_example() -> None:
    """Documents 11 11, 22 22 22 22, 33: each token knows its document, and so does each BOS."""
    rows = concatenate(list(pack([[11, 11], [22, 22, 22, 22], [33]], bos=BOS, context=4)))
    assert rows.tokens_RT.tolist() == [[0, 11, 11, 0], [0, 22, 22, 22], [0, 22, 0, 33]]
    assert rows.documents_RT.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 2, 2]]


def test_a_short_example_of_feb2024() -> None:
    """22's rest opens with a BOS of its own; 33 fits exactly and is flushed by 44, whose row has two; 55 is lost."""
    documents = [[9], [22, 22, 22], [33], [44, 44], [55], [66]]
    calls = list(pack_feb2024(documents, bos=BOS, context=3, rows_per_call=4, skip=1))
    assert [call.tokens_RT.tolist() for call in calls] == [[[0, 22, 22], [0, 22, 0], [0, 33, 0], [0, 44, 44]]]
    assert [call.documents_RT.tolist() for call in calls] == [[[1, 1, 1], [1, 1, 2], [2, 2, 3], [3, 3, 3]]]


def test_feb2024_cuts_documents_to_1024_with_their_bos() -> None:
    rows = concatenate(list(pack_feb2024([[7] * 3000, [8] * 600], bos=BOS, context=512, rows_per_call=3)))
    assert int((rows.tokens_RT == 7).sum()) == 1023


@st.composite
def document_lists(draw: st.DrawFn) -> list[list[int]]:
    """Documents whose tokens are all different, so that they can be told apart in the rows."""
    lengths = draw(st.lists(st.integers(1, 30), max_size=12))
    numbers = itertools.count(1)
    return [list(itertools.islice(numbers, length)) for length in lengths]


def packed(documents: list[list[int]], context: int) -> Rows | None:
    blocks = list(pack(documents, bos=BOS, context=context))
    return concatenate(blocks) if blocks else None


@settings(deadline=None)
@given(document_lists(), st.integers(2, 20))
def test_pack_loses_nothing_but_the_last_unfinished_row(documents: list[list[int]], context: int) -> None:
    rows = packed(documents, context)
    flat = [token for document in documents for token in document]
    kept = [] if rows is None else [int(token) for token in rows.tokens_RT.flatten() if token != BOS]
    assert kept == flat[: len(kept)]
    lost = flat[len(kept) :]
    n_openings = sum(document[0] in lost for document in documents)
    assert len(lost) + n_openings < context


@settings(deadline=None)
@given(document_lists(), st.integers(2, 20))
def test_every_row_starts_with_one_bos_and_none_stands_twice(documents: list[list[int]], context: int) -> None:
    rows = packed(documents, context)
    if rows is not None:
        is_bos = rows.tokens_RT == BOS
        assert is_bos[:, 0].all()
        assert not (is_bos[:, 1:] & is_bos[:, :-1]).any()


@settings(deadline=None)
@given(document_lists(), st.integers(2, 20))
def test_every_token_carries_the_index_of_its_document(documents: list[list[int]], context: int) -> None:
    rows = packed(documents, context)
    owner = {token: index for index, document in enumerate(documents) for token in document}
    if rows is not None:
        for token, index in zip(rows.tokens_RT.flatten(), rows.documents_RT.flatten(), strict=True):
            assert token == BOS or owner[int(token)] == index
        assert_bos_belongs_to_what_follows(rows)


@settings(deadline=None)
@given(document_lists(), st.integers(2, 20), st.integers(1, 5), st.integers(0, 3))
def test_feb2024_rows_start_with_bos_and_know_their_documents(
    documents: list[list[int]], context: int, rows_per_call: int, skip: int
) -> None:
    owner = {token: index for index, document in enumerate(documents) for token in document}
    for call in pack_feb2024(documents, bos=BOS, context=context, rows_per_call=rows_per_call, skip=skip):
        assert call.tokens_RT.shape == (rows_per_call, context)
        assert (call.tokens_RT[:, 0] == BOS).all()
        for token, index in zip(call.tokens_RT.flatten(), call.documents_RT.flatten(), strict=True):
            assert token == BOS or owner[int(token)] == index >= skip


def assert_bos_belongs_to_what_follows(rows: Rows) -> None:
    before_RT, after_RT = rows.documents_RT[:, :-1], rows.documents_RT[:, 1:]
    assert (before_RT == after_RT)[rows.tokens_RT[:, :-1] == BOS].all()


def test_pack_is_lazy() -> None:
    rows = pack(itertools.repeat([1, 2, 3]), bos=BOS, context=4)
    assert [next(rows).tokens_RT.tolist() for _ in range(2)] == [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]


def test_encode_adds_no_special_tokens(tiny_model_folder: Path) -> None:
    lm = load_language_model(tiny_model_folder)
    texts = [f"text {i}" for i in range(150)]  # more than are tokenised at once
    ids = list(encode(lm.tokenizer, texts))
    assert [lm.tokenizer.decode(document) for document in ids] == texts
    assert lm.bos not in itertools.chain(*ids)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("a.txt", b"One document.\nTwo lines.\n", ["One document.\nTwo lines.\n"]),
        ("b.txt", b"one<|endoftext|>two<|endoftext|> \n", ["one", "two"]),
        ("c.md", "Käse\r\n".encode(), ["Käse\r\n"]),
        ("d.jsonl", jsonl(["one", "two\u2028three"]) + b"\n", ["one", "two\u2028three"]),
        ("e.jsonl.xz", lzma.compress(jsonl(["one", "two"])), ["one", "two"]),
        ("f.txt.xz", lzma.compress(b"one"), ["one"]),
    ],
)
def test_documents_of_a_file(tmp_path: Path, name: str, content: bytes, wanted: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    source = text_file(tmp_path / name)
    assert source.name == f"file:{name}"
    assert list(source.documents()) == wanted


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", None, "no file {path}"),
        ("a.txt", b"", "{path} is empty; give a file with text in it"),
        ("a.txt", b" \n\t", "{path} is empty; give a file with text in it"),
        ("a.txt", b"ab\0cd", "{path} is not text: it holds null bytes; give a text or .jsonl file"),
        ("a.txt", b"abc\xff\xfe", "{path} is not UTF-8 text (byte 3); give a text or .jsonl file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', '{path}:2: not a JSON object with a "text" field'),
        ("a.jsonl", b'{"txt": "x"}\n', '{path}:1: not a JSON object with a "text" field'),
        ("a.jsonl", b'\n["text"]\n', '{path}:2: not a JSON object with a "text" field'),
        ("a.jsonl.xz", b"not xz, whatever its name", "{path} cannot be read: Input format not supported by decoder"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "{path}:1: holds half of a surrogate pair, which is no letter"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError) as caught:
        list(text_file(path).documents())
    assert str(caught.value) == message.format(path=path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read: .*Is a directory"):
        list(text_file(tmp_path).documents())


@pytest.mark.parametrize("line", [b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}'])
def test_a_text_field_that_is_not_text_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(TextError, match=':1: not a JSON object with a "text" field'):
        list(text_file(path).documents())


def row(token: int) -> Rows:
    return Rows(np.full((1, 4), token), np.full((1, 4), token))


@pytest.mark.parametrize("tokens, n_rows", [(1, 1), (4, 1), (7, 1), (8, 2), (12, 3), (99, 3)])
def test_collect_takes_whole_rows(tokens: int, n_rows: int) -> None:
    rows = collect([row(1), row(2), row(3)], tokens=tokens, context=4, source="x")
    assert rows.tokens_RT.tolist() == [[token] * 4 for token in range(1, n_rows + 1)]
    assert len(rows.documents_RT) == len(rows) == n_rows


def test_collect_cuts_a_larger_block() -> None:
    block = concatenate([row(1), row(2), row(3)])
    assert collect([block], tokens=8, context=4, source="x").tokens_RT.tolist() == [[1] * 4, [2] * 4]


def test_collect_stops_reading_when_it_has_enough() -> None:
    def endless() -> Iterator[Rows]:
        yield row(1)
        raise AssertionError("read on")

    assert len(collect(endless(), tokens=4, context=4, source="x")) == 1


def test_text_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(TextError) as caught:
        collect(pack([[1, 2]], bos=BOS, context=4), tokens=100, context=4, source="file:a.txt")
    assert str(caught.value) == "file:a.txt is shorter than one row of 4 tokens; give more text"


def test_the_bundled_text_lies_in_the_package() -> None:
    source = builtin("heldout")
    assert source.name == "builtin:heldout"
    assert source.path is not None and source.path.parts[-3:] == ("bundled", "text", "heldout.jsonl.xz")


def dataset_folder(folder: Path, column: str) -> Path:
    """Two parquet files, as on the hub: `datasets` reads a local folder by the same code."""
    import pandas as pd

    (folder / "plain_text").mkdir(parents=True)
    for number in range(2):
        frame = pd.DataFrame({column: [f"document {number}.{i}" for i in range(3)]})
        frame.to_parquet(folder / "plain_text" / f"train-0000{number}-of-00002.parquet")
    return folder


def from_dataset(folder: Path, *, data_files: str | None = "plain_text/train-*.parquet") -> TextSource:
    spec = Dataset(str(folder), None, data_files, "train", "text", None, ())
    return TextSource("dataset:mine", dataset=spec)


def test_a_data_set_is_streamed_in_its_own_order(tmp_path: Path) -> None:
    source = from_dataset(dataset_folder(tmp_path / "set", "text"))
    assert list(source.documents()) == [f"document {n}.{i}" for n in range(2) for i in range(3)]


def test_a_data_set_without_the_column_is_refused(tmp_path: Path) -> None:
    source = from_dataset(dataset_folder(tmp_path / "set", "words"))
    with pytest.raises(TextError, match=r"^data set .*set has no column `text`$"):
        list(source.documents())


def test_a_data_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"^data set .*absent cannot be read: .+") as caught:
        list(from_dataset(tmp_path / "absent", data_files=None).documents())
    assert "\n" not in str(caught.value)
