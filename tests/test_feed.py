"""The stream of activations: the store calls and where they go on, and what the model makes of them."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from saezoo.activations import activations
from saezoo.entries import Recipe
from saezoo.errors import TrainingError
from saezoo.hooked import hooked_model
from saezoo.lm import LanguageModel, load_language_model
from saezoo.ranks import Ranks
from saezoo.registry import package_folder, read_registry
from saezoo.shards import TokenCache
from saezoo.tokens import builtin, encode, pack_feb2024, text_file
from saezoo.trainers.feed import Call, Cursor, Feed, store_calls

BOS, CONTEXT, START = 256, 8, Cursor(0, 0)
BUNDLED = package_folder() / "bundled" / "tiny-lm"


def recipe(rows: int, skip: int = 0) -> Recipe:
    return replace(read_registry().recipe("feb2024"), store_rows=rows, skip_documents=skip)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    """Of bytes: a text of n letters has n tokens."""
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def cached(tokenizer: Any, folder: Path, lengths: list[int]) -> TokenCache:
    """Of a text with documents of so many tokens, each made of another letter than the next."""
    path = folder / "text.txt"
    path.write_text("<|endoftext|>".join(chr(97 + i % 26) * length for i, length in enumerate(lengths)))
    return TokenCache(text_file(path), tokenizer, folder / "cache")


def calls(
    cache: TokenCache, *, skip: int = 0, rows: int = 2, start: Cursor = START, notes: list[str] | None = None
) -> Iterator[Call]:
    note = (notes if notes is not None else []).append
    return store_calls(cache, "the text", recipe(rows, skip), bos=BOS, context=CONTEXT, start=start, note=note)


LENGTHS = st.lists(st.integers(1, 40) | st.sampled_from([CONTEXT - 1, 2 * CONTEXT - 3, 1030]), min_size=8, max_size=30)


@given(LENGTHS, st.integers(0, 3), st.integers(1, 3), st.integers(1, 20))
@example([2 * CONTEXT - 3] * 10, 0, 2, 1)  # each call ends by dropping a document that it holds no token of
@settings(deadline=None, max_examples=60)
def test_a_run_goes_on_from_any_cursor(tokenizer: Any, lengths: list[int], skip: int, rows: int, position: int) -> None:
    """Over several epochs, also of texts of which a call or an epoch drops much."""
    with tempfile.TemporaryDirectory() as folder:
        cache = cached(tokenizer, Path(folder), [*lengths, 100])  # so that the text is never too short
        whole = list(itertools.islice(calls(cache, skip=skip, rows=rows), 30))
        start = whole[position - 1].after
        rest = list(itertools.islice(calls(cache, skip=skip, rows=rows, start=start), 10))
    for mine, theirs in zip(rest, whole[position:], strict=False):
        assert mine.after == theirs.after
        assert np.array_equal(mine.tokens_RT, theirs.tokens_RT)


def test_the_calls_are_those_of_february_2024(tokenizer: Any, tmp_path: Path) -> None:
    cache = cached(tokenizer, tmp_path, [5, 30, 7, 1, 12, 8, 3, 40, 2, 9, 11])
    documents = encode(tokenizer, text_file(tmp_path / "text.txt").documents())
    packed = list(pack_feb2024(documents, bos=BOS, context=CONTEXT, rows_per_call=2, skip=1))
    found = list(itertools.islice(calls(cache, skip=1), len(packed)))
    assert len(packed) > 2
    assert all(np.array_equal(call.tokens_RT, rows.tokens_RT) for call, rows in zip(found, packed, strict=True))


def test_epochs(tokenizer: Any, tmp_path: Path) -> None:
    """Each begins at the first document, and loses `skip_documents` as the first one did."""
    notes: list[str] = []
    stream = calls(cached(tokenizer, tmp_path, [40, 40, 40, 3]), notes=notes, skip=1)
    found = list(itertools.islice(stream, 6))
    assert [call.after for call in found] == [Cursor(epoch, document) for epoch in range(3) for document in (2, 3)]
    assert all(np.array_equal(a.tokens_RT, b.tokens_RT) for a, b in zip(found, found[2:], strict=False))
    assert notes == [f"end of the text after 4 documents; epoch {epoch} begins" for epoch in (2, 3)]


@pytest.mark.parametrize(("lengths", "skip"), [([3, 5], 0), ([2 * CONTEXT - 2], 0), ([100, 3], 1), ([100, 100], 2)])
def test_text_shorter_than_one_call(tokenizer: Any, tmp_path: Path, lengths: list[int], skip: int) -> None:
    message = "^the text holds fewer than the 16 tokens of one store call; give more$"
    with pytest.raises(TrainingError, match=message):
        next(calls(cached(tokenizer, tmp_path, lengths), skip=skip))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(BUNDLED)


def bundled_calls(lm: LanguageModel, folder: Path) -> Iterator[Call]:
    """Of 4 rows of 32 tokens of the bundled text."""
    cache = TokenCache(builtin("heldout"), lm.tokenizer, folder)
    return store_calls(cache, "", recipe(4), bos=lm.bos, context=32, start=START, note=print)


def feed_of(lm: LanguageModel, folder: Path, *, per_refill: int = 3, centre: bool = True) -> Feed:
    """All depths of the model."""
    stream, depths = bundled_calls(lm, folder), range(lm.n_layers + 1)
    return Feed(lm, stream, depths, centre=centre, per_refill=per_refill, start=START, ranks=Ranks())


@pytest.mark.parametrize(("per_refill", "centre"), [(1, True), (3, True), (3, False)])
def test_blocks_are_the_activations_of_the_calls(
    lm: LanguageModel, tmp_path: Path, per_refill: int, centre: bool
) -> None:
    documents = encode(lm.tokenizer, builtin("heldout").documents())
    rows = pack_feb2024(documents, bos=lm.bos, context=32, rows_per_call=4)
    feed = feed_of(lm, tmp_path, per_refill=per_refill, centre=centre)
    for wanted_NLD in itertools.islice(activations(lm, rows, range(5), centre=centre), 7):
        feed.work_ahead()  # on a CPU there is nothing beside which to work
        x_NLD = next(feed)
        assert x_NLD.shape == (4 * 32, 5, 256) and x_NLD.dtype == torch.float32
        assert torch.equal(x_NLD, wanted_NLD)


def test_the_cursor_is_that_of_the_last_block_taken(lm: LanguageModel, tmp_path: Path) -> None:
    feed = feed_of(lm, tmp_path)
    assert feed.cursor == START
    for call in itertools.islice(bundled_calls(lm, tmp_path), 7):
        next(feed)
        assert feed.cursor == call.after


# |x - x_TL| / |x_TL| of the worst of 4,096 tokens of the bundled text, measured at the depths 0 to 4 of tiny-lm (CPU):
# float32 8e-8, 7e-7, 1e-6, 1e-6, 1e-6 (the same sums in another order); a bfloat16 model against TransformerLens in
# float32 0.004, 0.007, 0.013, 0.015, 0.015 (its unit of rounding is 0.004). The root mean square is half of that.
@pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason="needs transformer-lens")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_residuals_are_those_of_transformer_lens(
    lm: LanguageModel, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    x_NLD = next(feed_of(load_language_model(BUNDLED, dtype=dtype), tmp_path))
    tokens_RT = torch.from_numpy(next(bundled_calls(lm, tmp_path)).tokens_RT)
    _, cache = hooked_model(lm.hf_model).run_with_cache(tokens_RT)
    assert x_NLD.dtype == dtype
    for depth, name in enumerate([*(f"blocks.{i}.hook_resid_pre" for i in range(4)), "blocks.3.hook_resid_post"]):
        wanted_ND = cache[name].flatten(0, 1)
        off_N = (x_NLD[:, depth].float() - wanted_ND).norm(dim=1) / wanted_ND.norm(dim=1)
        assert float(off_N.max()) < tolerance, name
