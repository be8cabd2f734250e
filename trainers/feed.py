"""Text to activations for training: tokens from the cache, one forward pass of the language model for all layers.

Shapes: T context size, N activations of one call of the token store, L layers, D d_model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saezoo.activations import residuals
from saezoo.entries import Recipe
from saezoo.errors import TrainingError
from saezoo.lm import LanguageModel
from saezoo.ranks import Ranks
from saezoo.shards import Ids, TokenCache
from saezoo.tokens import pack_feb2024

CALLS_AT_ONCE = 8
"""Store calls in one forward pass on a GPU: 8 x 4,096 tokens fill it. On a CPU one call is enough to be efficient."""


class Cursor(NamedTuple):
    """Where in the text the next store call begins. A call drops the rest of its last document, so this is all."""

    epoch: int
    document: int


class Call(NamedTuple):
    """The tokens of one store call."""

    tokens_RT: NDArray[np.int64]
    after: Cursor


def store_calls(
    cache: TokenCache,
    name: str,
    recipe: Recipe,
    *,
    bos: int,
    context: int,
    start: Cursor,
    note: Callable[[str], None],
) -> Iterator[Call]:
    """Calls of the token store of February 2024 from `start` on, over as many epochs of the text as are wanted."""
    epoch, first = start
    while True:
        documents = _Counted(cache.documents(first))
        skip = recipe.skip_documents if first == 0 else 0
        calls = 0
        for rows in pack_feb2024(documents, bos=bos, context=context, rows_per_call=recipe.store_rows, skip=skip):
            calls += 1
            yield Call(rows.tokens_RT, Cursor(epoch, first + documents.taken))
        if first == 0 and calls == 0:
            need = recipe.store_rows * context
            raise TrainingError(f"{name} holds fewer than the {need:,} tokens of one store call; give more")
        note(f"end of {name} after {first + documents.taken:,} documents; epoch {epoch + 2} begins")
        epoch, first = epoch + 1, 0


class _Counted(Iterator[Ids]):
    """Counts what is taken: a call may end by dropping a document that it holds no token of."""

    def __init__(self, documents: Iterator[Ids]) -> None:
        self._documents = documents
        self.taken = 0

    def __next__(self) -> Ids:
        ids = next(self._documents)
        self.taken += 1
        return ids


class _Block(NamedTuple):
    x_NLD: Tensor
    after: Cursor
    ready: torch.cuda.Event | None


class Feed:
    """Iterator of blocks [N, L, D] of activations, one per store call.

    Over several ranks each runs the model on its share of the calls, and they exchange what the others need.
    """

    def __init__(
        self,
        lm: LanguageModel,
        calls: Iterator[Call],
        depths: Sequence[int],
        *,
        centre: bool,
        per_refill: int,
        start: Cursor,
        ranks: Ranks,
    ) -> None:
        """`per_refill`: calls that the buffer takes at a time. A forward pass never spans two refills, so that a run
        that goes on from a checkpoint runs the model on the very batches that the uninterrupted one does."""
        self._lm, self._calls, self._depths, self._centre = lm, calls, depths, centre
        self._per_refill, self._made = per_refill, 0
        self._ranks = ranks
        self._blocks: deque[_Block] = deque()
        on_gpu = lm.device.type == "cuda"
        self._side = torch.cuda.Stream(lm.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.cursor = start
        """After the last block that was taken."""

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Tensor:
        if not self._blocks:
            self._run()
        block = self._blocks.popleft()
        if block.ready is not None:
            stream = torch.cuda.current_stream(block.x_NLD.device)
            stream.wait_event(block.ready)
            block.x_NLD.record_stream(stream)
        self.cursor = block.after
        return block.x_NLD

    def work_ahead(self) -> None:
        """On a GPU: begin a forward pass for the next refill on a stream of its own, beside the SAEs' steps."""
        if self._side is not None and len(self._blocks) < self._per_refill:
            with torch.cuda.stream(self._side):
                self._run()

    def _run(self) -> None:
        """One forward pass on each rank, of as many store calls as fit."""
        at_once = 1 if self._side is None else CALLS_AT_ONCE
        size = min(at_once * self._ranks.size, self._per_refill - self._made)
        calls = [next(self._calls) for _ in range(size)]
        self._made = (self._made + size) % self._per_refill
        share = -(-size // self._ranks.size)
        # Every rank runs `share` calls; the last ranks repeat the last call if there are too few.
        mine = [calls[min(self._ranks.rank * share + i, size - 1)] for i in range(share)]
        tokens_RT = torch.from_numpy(np.concatenate([call.tokens_RT for call in mine])).to(self._lm.device)
        x_NLD = residuals(self._lm, tokens_RT, self._depths, centre=self._centre).to(self._lm.dtype)
        blocks = torch.split(self._ranks.exchange(x_NLD), len(x_NLD) // share)
        ready = None
        if self._side is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._side)
        self._blocks.extend(_Block(x, call.after, ready) for x, call in zip(blocks, calls, strict=False))
