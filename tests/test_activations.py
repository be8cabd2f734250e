"""The shuffle buffer against the one of February 2024 (tests/golden/buffer.json), and activations of a tiny model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saezoo.activations import ActivationBuffer, activations
from saezoo.lm import load_language_model
from saezoo.tokens import Rows

Mode = Literal["bug", "fixed"]

GOLDEN = Path(__file__).parent / "golden"


def numbered(block: int) -> Iterator[Tensor]:
    """Blocks [block, 1, 1] of activations that carry their running number."""
    for start in itertools.count(0, block):
        yield torch.arange(start, start + block)[:, None, None]


def ids(x: Tensor) -> list[int]:
    return [int(number) for number in x.flatten()]


def random_buffer(mode: Mode, *, half: int, block: int, batch_size: int, seed: int) -> ActivationBuffer:
    generator = torch.Generator().manual_seed(seed)
    return ActivationBuffer(
        numbered(block),
        half=half,
        batch_size=batch_size,
        mode=mode,
        permute=lambda n: torch.randperm(n, generator=generator),
    ).fill()


@pytest.mark.parametrize("commit, mode", [("98e4f1b", "bug"), ("07d38a0", "fixed")])
def test_serves_what_the_original_served(commit: str, mode: Mode) -> None:
    golden: dict[str, Any] = json.loads((GOLDEN / "buffer.json").read_text())["versions"][commit]
    refills = golden["refills"]
    permutations = [golden["initial_storage"]["perm_new"]]
    permutations += [refill[name] for refill in refills for name in ("perm_new", "perm_mix", "perm_loader")]
    given_back = iter(permutations)
    buffer = ActivationBuffer(
        numbered(16), half=4, batch_size=12, mode=mode, permute=lambda n: torch.tensor(next(given_back))
    ).fill()
    assert ids(buffer.storage) == refills[0]["storage_after"]  # what b_dec is initialised from
    for refill in refills:
        assert [ids(next(buffer)) for _ in refill["batches"]] == refill["batches"]
        assert ids(buffer.storage) == refill["storage_after"]
    assert next(given_back, None) is None


sizes = st.fixed_dictionaries(
    {
        "half": st.integers(1, 4),
        "block": st.integers(1, 9),
        "batch_size": st.integers(1, 25),
        "seed": st.integers(0, 99),
    }
)


def serve(buffer: ActivationBuffer, refills: int) -> list[int]:
    """Everything served until just before refill number `refills` + 1."""
    served: list[int] = []
    while buffer.refills < refills or len(buffer.state()["served"]):
        served += ids(next(buffer))
    return served


@settings(deadline=None)
@given(sizes, st.integers(1, 6))
def test_fixed_serves_each_activation_once(sizes: dict[str, int], refills: int) -> None:
    buffer = random_buffer("fixed", **sizes)
    served = serve(buffer, refills)
    half = sizes["half"] * sizes["block"]
    assert len(served) == refills * half
    assert sorted(served + ids(buffer.storage)) == list(range((refills + 1) * half))


@settings(deadline=None)
@given(sizes, st.integers(1, 6))
def test_bug_serves_only_what_stays(sizes: dict[str, int], refills: int) -> None:
    buffer = random_buffer("bug", **sizes)
    for done in range(1, refills + 1):
        served = serve(buffer, done)
        assert len(served) == sizes["half"] * sizes["block"]
        assert sorted(served) == sorted(ids(buffer.storage))


def test_bug_loses_half_of_the_data_for_ever() -> None:
    buffer = random_buffer("bug", half=8, block=64, batch_size=100, seed=3)
    times = Counter(serve(buffer, refills=40))
    generated = 41 * 8 * 64
    assert 0.45 < 1 - len(times) / generated < 0.55
    assert max(times.values()) > 4


@pytest.mark.parametrize("mode", ["bug", "fixed"])
def test_the_last_batch_of_a_half_is_smaller(mode: Mode) -> None:
    buffer = random_buffer(mode, half=4, block=16, batch_size=12, seed=0)
    assert [len(next(buffer)) for _ in range(8)] == [12, 12, 12, 12, 12, 4, 12, 12]


@pytest.mark.parametrize("mode", ["bug", "fixed"])
def test_the_order_is_shuffled(mode: Mode) -> None:
    served = serve(random_buffer(mode, half=4, block=16, batch_size=64, seed=0), refills=4)
    assert served != sorted(served)
    assert served != serve(random_buffer(mode, half=4, block=16, batch_size=64, seed=1), refills=4)


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from(["bug", "fixed"]), st.integers(0, 30))
def test_a_restored_buffer_goes_on_identically(sizes: dict[str, int], mode: Mode, before: int) -> None:
    generator = torch.Generator().manual_seed(sizes["seed"])
    taken = 0

    def counted() -> Iterator[Tensor]:
        nonlocal taken
        for block in numbered(sizes["block"]):
            taken += 1
            yield block

    shape: dict[str, Any] = {"half": sizes["half"], "batch_size": sizes["batch_size"], "mode": mode}
    original = ActivationBuffer(counted(), permute=lambda n: torch.randperm(n, generator=generator), **shape).fill()
    for _ in range(before):
        next(original)
    other_generator = torch.Generator()
    rest = itertools.islice(numbered(sizes["block"]), taken, None)
    other = ActivationBuffer(rest, permute=lambda n: torch.randperm(n, generator=other_generator), **shape)
    other.restore(original.state(), torch.device("cpu"))
    other_generator.set_state(generator.get_state())
    for _ in range(20):
        assert ids(next(original)) == ids(next(other))


def test_the_original_may_go_on_after_its_state_was_taken() -> None:
    buffer = random_buffer("fixed", half=1, block=8, batch_size=2, seed=0)
    state = buffer.state()
    served = ids(state["served"])
    next(buffer)
    assert ids(state["served"]) == served


def test_a_restored_buffer_stays_on_its_device() -> None:
    """Checkpoints are read to the CPU; `meta` stands in for a GPU here."""
    blocks = (block.to("meta") for block in numbered(8))
    shape: dict[str, Any] = {"half": 1, "batch_size": 4, "mode": "fixed"}
    buffer = ActivationBuffer(blocks, permute=lambda n: torch.arange(n, device="meta"), **shape)
    buffer.restore(random_buffer("fixed", half=1, block=8, batch_size=4, seed=0).state(), torch.device("meta"))
    assert buffer.storage.device.type == next(buffer).device.type == "meta"


@pytest.mark.parametrize("centre", [False, True])
def test_activations_are_the_hidden_states(tiny_model_folder: Path, centre: bool) -> None:
    lm = load_language_model(tiny_model_folder)
    tokens_RT = torch.randint(0, lm.vocab, (5, 12), generator=torch.Generator().manual_seed(0)).numpy()
    blocks = [Rows(tokens_RT[:3], np.zeros((3, 12), dtype=np.int64)), Rows(tokens_RT[3:], np.zeros((2, 12), np.int64))]
    found = list(activations(lm, iter(blocks), [1, 0], centre=centre))
    assert [tuple(x_NLD.shape) for x_NLD in found] == [(36, 2, 16), (24, 2, 16)]
    hidden = lm.hf_model(torch.from_numpy(tokens_RT), output_hidden_states=True).hidden_states
    wanted_NLD = torch.stack([hidden[1].flatten(0, 1), hidden[0].flatten(0, 1)], dim=1)
    if centre:
        wanted_NLD = wanted_NLD - wanted_NLD.mean(-1, keepdim=True)
    torch.testing.assert_close(torch.cat(found), wanted_NLD, rtol=0, atol=1e-6)
