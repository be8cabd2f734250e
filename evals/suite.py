"""The `full` suite: what needs only the model, the SAE and text, beyond the metrics of `evaluate`.

Description length, first-letter absorption, sparse probing on labels from the text, and decoder structure:
docs/suite.md has the definitions. Here the language model is read; the modules work on activations.

Shapes: R rows, B rows of a batch, T positions, n scored tokens, D d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saezoo.errors import TextError, UsageError, WeightsError
from saezoo.evals import probing
from saezoo.evals.absorption import Absorption, absorption, pieces, prompts
from saezoo.evals.description_length import description_length
from saezoo.evals.structure import structure
from saezoo.lm import LanguageModel, depth_of
from saezoo.results import Measured
from saezoo.sae import SAE
from saezoo.tokens import Rows

_FEATURES_BYTES = 256 << 20  # of one batch's features, float32; sets the default batch size
STAGES = ("description length", "absorption", "sparse probing", "decoder structure")


@dataclass(frozen=True)
class SuiteResult:
    """What the suite says about one SAE."""

    metrics: dict[str, Measured]
    """Name -> value with its 95 % interval; a value of None is undefined. Columns of docs/suite.md."""
    absorption: Absorption
    """By letter."""
    probing: probing.Probing
    """By task."""


def full_suite(
    sae: SAE,
    lm: LanguageModel,
    rows: Rows,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Run the whole suite on one SAE.

    Args:
        sae: its hook names the depth at which it reads `lm`.
        lm: the language model, with its tokenizer.
        rows: packed tokens of the text.
        seed: of every split, draw and initial weight.
        batch_size: rows at once; by default as many as fit 256 MB of features.
        on_progress: called with the name of each of `STAGES` as it begins.

    Raises UsageError if the SAE does not fit the model or its rows, TextError if the text holds special tokens only,
    WeightsError if the model's activations are not finite.
    """
    reader = _Reader(sae, lm, rows, batch_size)
    begin = on_progress or (lambda stage: None)
    with torch.inference_mode():
        begin(STAGES[0])
        metrics = description_length(sae, reader.batches)
        begin(STAGES[1])
        letters = absorption(sae, *reader.words(), seed=seed)
        begin(STAGES[2])
        documents_N = rows.documents_RT.ravel()
        samples = probing.choose(
            probing.labels(pieces(lm.tokenizer, lm.vocab), rows, lm.special_ids), documents_N, seed=seed
        )
        tasks = probing.probe(sae, samples, reader.at, documents_N, seed=seed)
        begin(STAGES[3])
        metrics |= letters.metrics | tasks.metrics | structure(sae, seed=seed)
    return SuiteResult(metrics, letters, tasks)


class _Reader:
    """What the SAE reads, from the language model."""

    def __init__(self, sae: SAE, lm: LanguageModel, rows: Rows, batch_size: int | None) -> None:
        config = sae.config
        if config.d_in != lm.d_model:
            raise UsageError(f"the SAE reads width {config.d_in}, the model has {lm.d_model}")
        if config.hook is None:
            raise UsageError("the SAE's cfg.json does not say which hook it reads")
        if rows.tokens_RT.shape[1] > lm.n_positions:
            raise UsageError(f"rows of {rows.tokens_RT.shape[1]} tokens: the model has {lm.n_positions} positions")
        if np.isin(rows.tokens_RT, sorted(lm.special_ids)).all():
            raise TextError("the text holds special tokens only; give one with text in it")
        self.lm, self.rows, self.depth = lm, rows, depth_of(config.hook, lm.n_layers)
        width = rows.tokens_RT.shape[1]
        self.tokens = width * (batch_size or max(1, min(64, _FEATURES_BYTES // (width * config.d_sae * 4))))
        self.special = torch.tensor(sorted(lm.special_ids))

    def _rows(self, tokens_RT: NDArray[np.int64]) -> Iterator[tuple[slice, Tensor]]:
        """Places of some rows, and the residual [B, T, D] there."""
        step = max(1, self.tokens // tokens_RT.shape[1])
        for start in range(0, len(tokens_RT), step):
            part = slice(start, start + step)
            tokens_BT = torch.from_numpy(tokens_RT[part]).to(self.lm.device)
            x_BTD = self.lm.residuals(tokens_BT, [self.depth])[self.depth]
            if not x_BTD.isfinite().all():
                raise WeightsError(f"the model's activations at depth {self.depth} are not finite; use float32")
            yield part, x_BTD

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(activations [n, D], documents [n]) of all but special tokens."""
        documents_RT = torch.from_numpy(self.rows.documents_RT)
        scored_RT = ~torch.isin(torch.from_numpy(self.rows.tokens_RT), self.special)
        for part, x_BTD in self._rows(self.rows.tokens_RT):
            yield x_BTD[scored_RT[part].to(x_BTD.device)], documents_RT[part][scored_RT[part]]

    def at(self, places_U: NDArray[np.int64]) -> Tensor:
        """Activations [U, D] at places of the flattened rows, which must ascend."""
        row_U, position_U = np.divmod(places_U, self.rows.tokens_RT.shape[1])
        wanted_R = np.unique(row_U)
        inner_U = torch.from_numpy(np.searchsorted(wanted_R, row_U))
        found = []
        for part, x_BTD in self._rows(self.rows.tokens_RT[wanted_R]):
            mine_U = (inner_U >= part.start) & (inner_U < part.stop)
            found.append(x_BTD[inner_U[mine_U] - part.start, torch.from_numpy(position_U)[mine_U]])
        return torch.cat(found)

    def words(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Activations [n, D] of the words of the vocabulary, each at the end of one prompt, and their letters [n]."""
        tokens_WT, letter_W = prompts(self.lm.tokenizer, self.lm.vocab, self.lm.bos)
        found = [x_BTD[:, -1] for _, x_BTD in self._rows(tokens_WT)]
        return torch.cat(found) if found else torch.zeros(0, self.lm.d_model), letter_W
