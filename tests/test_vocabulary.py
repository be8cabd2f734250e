"""Token ids as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BOS
from hypothesis import given
from hypothesis import strategies as st

from saezoo.errors import WeightsError
from saezoo.features.vocabulary import vocabulary
from saezoo.registry import package_folder


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


TINY_LM = package_folder() / "bundled" / "tiny-lm"


def test_every_token_of_the_bundled_model_is_known() -> None:
    known = vocabulary(tokenizer(TINY_LM), 4096)
    assert known.special == {0}
    assert known.tokens[0] == BOS.encode()
    assert all(known.tokens)
    assert len(set(known.tokens)) == 4096


@given(st.text())
def test_the_tokens_of_a_text_are_its_bytes(text: str) -> None:
    """Halves of letters included."""
    own = tokenizer_of_the_bundled_model()
    known = vocabulary(own, 4096)
    ids = own(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert b"".join(known.tokens[i] for i in ids) == text.encode()


_kept: list[Any] = []


def tokenizer_of_the_bundled_model() -> Any:
    if not _kept:
        _kept.append(tokenizer(TINY_LM))
    return _kept[0]


def test_ids_beyond_the_tokenizer_are_empty(tiny_model_folder: Path) -> None:
    known = vocabulary(tokenizer(tiny_model_folder), 300)
    assert known.tokens[256] == BOS.encode()
    assert known.tokens[257:] == (b"",) * 43
    assert known.special == {256}


def test_each_byte_has_its_letter(tiny_model_folder: Path) -> None:
    known = vocabulary(tokenizer(tiny_model_folder), 256)
    assert sorted(known.tokens) == [bytes([byte]) for byte in range(256)]


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"一": 0, "a": 1}, unk_token="a")))
    with pytest.raises(
        WeightsError, match=r"token 0, '一', is not spelled as byte-level BPE .* tokenizer like GPT-2's"
    ):
        vocabulary(pieces, 2)
