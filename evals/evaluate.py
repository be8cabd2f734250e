"""The pass over the text: one clean forward for all SAEs, then each resumes from its own depth.

Shapes: R rows in all, B rows of a batch, T positions, n scored tokens of the batch, D d_in, F d_sae, V vocabulary,
N blocks of documents, G groups of documents.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.entries import Protocol
from saezoo.errors import TextError, UsageError
from saezoo.evals import counts, intervals
from saezoo.evals.metrics import PER_TOKEN
from saezoo.geometric_median import geometric_median
from saezoo.lm import LanguageModel, depth_of
from saezoo.results import Measured, Result
from saezoo.sae import SAE
from saezoo.tokens import Rows

_BLOCKS = 2048  # documents are folded into at most this many blocks: bounds memory, keeps the bootstrap valid
_LOGITS_BYTES = 128 << 20  # of one batch, float32; sets the default batch size
_SAMPLE = 250_000  # activations for the geometric median, the post's number
_SAMPLE_BYTES = 1 << 30  # of all SAEs together: twelve of GPT-2 small keep 29,127 each


@dataclass(frozen=True)
class Subject:
    """An SAE to be evaluated, and what to call it."""

    sae: SAE
    collection: str
    layer: str
    published: dict[str, float | None] = field(default_factory=dict)
    """Published values measured by the protocol that will be used."""


@dataclass
class _Tally:
    """The running sums of one SAE."""

    depth: int
    sums_NK: Tensor
    x_sum_ND: Tensor
    fires_GF: Tensor
    sample: list[Tensor]


def evaluate(
    subjects: Sequence[Subject],
    lm: LanguageModel,
    rows: Rows,
    *,
    protocol: Protocol = "standard",
    text: str = "",
    model: str = "",
    seed: int = 0,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Measure every metric of docs/metrics.md on the same rows for all `subjects`.

    Args:
        subjects: SAEs that read `lm`; their hooks name the layers.
        rows: packed tokens, at most as long as the model's positions.
        protocol: `standard` neither replaces nor scores special tokens (BOS); `feb2024` replaces and scores all.
        seed: of the bootstrap draws and of the sample for the geometric median.
        batch_size: rows at once; by default as many as fit 128 MB of logits.
        on_progress: called with the number of tokens done after each batch.

    Raises UsageError if an SAE does not fit the model.
    """
    run = _Pass(subjects, lm, rows, protocol, seed)
    step = batch_size or max(1, min(64, _LOGITS_BYTES // (rows.tokens_RT.shape[1] * lm.vocab * 4)))
    with torch.inference_mode():
        for start in range(0, len(rows), step):
            run.add(start, min(start + step, len(rows)))
            if on_progress is not None:
                on_progress(min(start + step, len(rows)) * rows.tokens_RT.shape[1])
        return [run.result(subject, tally, text, model) for subject, tally in zip(subjects, run.tallies, strict=True)]


class _Pass:
    """State of one evaluation."""

    def __init__(
        self, subjects: Sequence[Subject], lm: LanguageModel, rows: Rows, protocol: Protocol, seed: int
    ) -> None:
        self.subjects, self.lm, self.rows, self.protocol, self.seed = subjects, lm, rows, protocol, seed
        self.tokens_RT = torch.from_numpy(rows.tokens_RT)
        special = torch.tensor(sorted(lm.special_ids))
        self.keep_RT = torch.isin(self.tokens_RT, special)
        if protocol == "feb2024":
            self.keep_RT = torch.zeros_like(self.keep_RT)
        self.block_RT = torch.from_numpy(rows.documents_RT) % _BLOCKS
        self.sample_RT = self._choose_sample()
        self.tallies = [self._tally(subject) for subject in subjects]
        zeros_D = torch.zeros(lm.d_model, dtype=lm.dtype)
        self.log_zero = {tally.depth: _log_softmax(lm.constant_logits(zeros_D, tally.depth)) for tally in self.tallies}

    def _tally(self, subject: Subject) -> _Tally:
        config = subject.sae.config
        if config.d_in != self.lm.d_model:
            raise UsageError(f"{subject.layer}: the SAE reads width {config.d_in}, the model has {self.lm.d_model}")
        if config.hook is None:
            raise UsageError(f"{subject.layer}: cfg.json does not say which hook the SAE reads")
        if self.tokens_RT.shape[1] > self.lm.n_positions:
            raise UsageError(f"rows of {self.tokens_RT.shape[1]} tokens: the model has {self.lm.n_positions} positions")
        return _Tally(
            depth=depth_of(config.hook, self.lm.n_layers),
            sums_NK=torch.zeros(_BLOCKS, len(PER_TOKEN), dtype=torch.float64),
            x_sum_ND=torch.zeros(_BLOCKS, config.d_in, dtype=torch.float64),
            fires_GF=torch.zeros(intervals.GROUPS, config.d_sae, dtype=torch.float64),
            sample=[],
        )

    def _choose_sample(self) -> Tensor:
        """Which scored tokens the geometric median is taken over: a uniform draw, fixed by the seed alone."""
        scored = (~self.keep_RT).flatten().nonzero().squeeze(1)
        room = _SAMPLE_BYTES // (4 * self.lm.d_model * max(1, len(self.subjects)))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = scored[torch.randperm(len(scored), generator=generator)[: min(_SAMPLE, room)]]
        mask = torch.zeros(self.keep_RT.numel(), dtype=torch.bool)
        mask[chosen] = True
        return mask.view_as(self.keep_RT)

    def add(self, start: int, stop: int) -> None:
        """Evaluate rows start..stop-1."""
        device = self.lm.device
        tokens_BT = self.tokens_RT[start:stop].to(device)
        residuals = self.lm.residuals(tokens_BT, [*(tally.depth for tally in self.tallies), self.lm.n_layers])
        log_clean_BTV = _log_softmax(self.lm.logits(residuals[self.lm.n_layers]))
        p_clean_BTV = log_clean_BTV.exp()
        ce_clean_BT = _cross_entropy(log_clean_BTV, tokens_BT)
        for subject, tally in zip(self.subjects, self.tallies, strict=True):
            resid_BTD = residuals[tally.depth]
            spliced_BTD = self._add_reconstruction(subject.sae, tally, resid_BTD, slice(start, stop))
            log_sae_BTV = _log_softmax(self.lm.resume(spliced_BTD, tally.depth))
            log_zero_V = self.log_zero[tally.depth]
            per_token = {
                "ce_clean": ce_clean_BT,
                "ce_sae": _cross_entropy(log_sae_BTV, tokens_BT),
                "ce_zero": _cross_entropy(log_zero_V.expand_as(log_clean_BTV), tokens_BT),
                "kl_sae": _kl(p_clean_BTV, log_clean_BTV, log_sae_BTV),
                "kl_zero": _kl(p_clean_BTV, log_clean_BTV, log_zero_V.expand_as(log_clean_BTV)),
            }
            del log_sae_BTV
            self._add_losses(tally, per_token, slice(start, stop))

    def _add_reconstruction(self, sae: SAE, tally: _Tally, resid_BTD: Tensor, rows: slice) -> Tensor:
        """Add what one batch says about one SAE itself; returns the residual with its reconstruction spliced in.

        What is scored is what is replaced, so the SAE runs once.
        """
        scored_BT = ~self.keep_RT[rows].to(resid_BTD.device)
        h_nD = resid_BTD[scored_BT]
        x_nD = h_nD.to(sae.W_enc.dtype)
        if sae.config.centre:
            x_nD = x_nD - x_nD.mean(-1, keepdim=True)
        f_nF = sae.encode(x_nD)
        y_nD = sae.decode(f_nF)
        fires_nF = (f_nF > 0).float()
        values = reconstruction_values(x_nD, y_nD) | {"l0": fires_nF.sum(-1), "l1": f_nF.sum(-1)}
        values["tokens"] = torch.ones_like(values["l1"])
        block_n = self._add_values(tally, values, rows)
        tally.x_sum_ND.index_add_(0, block_n, x_nD.double().cpu())
        groups_Gn = F.one_hot(block_n % intervals.GROUPS, intervals.GROUPS).T.to(f_nF.device, torch.float32)
        tally.fires_GF += (groups_Gn @ fires_nF).double().cpu()
        tally.sample.append(x_nD[self.sample_RT[rows][scored_BT.cpu()].to(x_nD.device)].float().cpu())
        spliced_BTD = resid_BTD.clone()
        if sae.config.centre:
            y_nD = y_nD + h_nD.mean(-1, keepdim=True)
        spliced_BTD[scored_BT] = y_nD.to(resid_BTD.dtype)
        return spliced_BTD

    def _add_losses(self, tally: _Tally, per_token: dict[str, Tensor], rows: slice) -> None:
        """Add the [B, T] losses of the language model."""
        scored_BT = ~self.keep_RT[rows].to(self.lm.device)
        has_target_BT = scored_BT.clone()
        has_target_BT[:, -1] = False
        losses = per_token | {"targets": has_target_BT}
        self._add_values(tally, {name: value[scored_BT] for name, value in losses.items()}, rows)

    def _add_values(self, tally: _Tally, values: dict[str, Tensor], rows: slice) -> Tensor:
        """Add one value per scored token [n] to each sum; returns the block of each token [n]."""
        block_n = self.block_RT[rows][~self.keep_RT[rows]]
        for name, value_n in values.items():
            tally.sums_NK[:, PER_TOKEN.index(name)].index_add_(0, block_n, value_n.double().cpu())
        return block_n

    def result(self, subject: Subject, tally: _Tally, text: str, model: str) -> Result:
        """Metrics and intervals from the sums."""
        sums = {name: tally.sums_NK[:, k] for k, name in enumerate(PER_TOKEN)}
        if sums["tokens"].sum() == 0:
            raise TextError(f"{text or 'the text'} holds special tokens only; give one with text in it")
        mean_D = tally.x_sum_ND.sum(0) / sums["tokens"].sum()
        sums["ce_mean"] = self._ce_of_constant(mean_D, tally.depth)
        metrics = intervals.bootstrap(sums, tally.x_sum_ND, seed=self.seed)
        tokens_G = torch.zeros(intervals.GROUPS, dtype=torch.float64)
        tokens_G.index_add_(0, torch.arange(_BLOCKS) % intervals.GROUPS, sums["tokens"])
        metrics |= counts.feature_counts(tally.fires_GF, tokens_G)
        metrics |= _median_distances(torch.cat(tally.sample), mean_D, subject.sae.b_dec)
        config = subject.sae.config
        return Result(
            collection=subject.collection,
            layer=subject.layer,
            hook=config.hook or "",
            model=model,
            protocol=self.protocol,
            text=text,
            context=self.tokens_RT.shape[1],
            rows=len(self.rows),
            tokens=int(sums["tokens"].sum()),
            documents=len(np.unique(self.rows.documents_RT)),
            seed=self.seed,
            device=str(self.lm.device),
            dtype=str(subject.sae.W_enc.dtype).removeprefix("torch."),
            versions=_versions(),
            metrics=metrics,
            histogram=counts.histogram(tally.fires_GF.sum(0), float(sums["tokens"].sum())),
            published=subject.published,
        )

    def _ce_of_constant(self, resid_D: Tensor, depth: int) -> Tensor:
        """Sum per block [N] of the cross-entropy when the residual is `resid_D` at every position."""
        log_V = _log_softmax(self.lm.constant_logits(resid_D.to(self.lm.dtype), depth)).cpu()
        scored_RT = (~self.keep_RT)[:, :-1]
        losses = -log_V[self.tokens_RT[:, 1:]][scored_RT].double()
        return torch.zeros(_BLOCKS, dtype=torch.float64).index_add_(0, self.block_RT[:, :-1][scored_RT], losses)


def reconstruction_values(x_nD: Tensor, y_nD: Tensor) -> dict[str, Tensor]:
    """Per token [n], in float64: how the reconstruction y differs from x."""
    x, y = x_nD.double(), y_nD.double()
    e2, x2 = (y - x).square().sum(-1), x.square().sum(-1)
    norm_in, norm_out = x2.sqrt(), y.square().sum(-1).sqrt()
    return {
        "e2": e2,
        "x2": x2,
        "unexplained": e2 / x2,
        "cosine": (x * y).sum(-1) / (norm_in * norm_out).clamp(min=1e-30),
        "norm_in": norm_in,
        "norm_out": norm_out,
        "norm_ratio": norm_out / norm_in,
    }


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32, or in float64 if the model runs in it."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(log_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """-log p of the next token at each position [B, T]; 0 at the last, which has none."""
    loss_BT = -log_BTV[:, :-1].gather(-1, tokens_BT[:, 1:, None])[..., 0]
    return F.pad(loss_BT, (0, 1))


def _kl(p_BTV: Tensor, log_p_BTV: Tensor, log_q_BTV: Tensor) -> Tensor:
    """KL(p || q) at each position [B, T]; row by row, so that no third tensor of the size of the logits is needed."""
    rows = zip(p_BTV, log_p_BTV, log_q_BTV, strict=True)
    return torch.stack([(p_TV * (log_p_TV - log_q_TV)).sum(-1) for p_TV, log_p_TV, log_q_TV in rows])


def _median_distances(sample_nD: Tensor, mean_D: Tensor, b_dec_D: Tensor) -> dict[str, Measured]:
    """Where b_dec lies: distances to the geometric median of x, beside that of the mean."""
    median_D = geometric_median(sample_nD, ftol=1e-9)
    spread = (sample_nD - median_D).norm(dim=1).median()
    to_b_dec = (b_dec_D.float().cpu() - median_D).norm()
    to_mean = (mean_D.float() - median_D).norm()
    values = {
        "gm_distance_b_dec": to_b_dec,
        "gm_distance_b_dec_relative": to_b_dec / spread,
        "gm_distance_mean": to_mean,
        "gm_distance_mean_relative": to_mean / spread,
        "gm_spread": spread,
        "gm_sample": torch.tensor(len(sample_nD)),
    }
    return {name: Measured(float(value)) for name, value in values.items()}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    try:
        packages["saezoo"] = version("saezoo")
    except ImportError:  # PackageNotFoundError: run from a checkout that is not installed
        packages["saezoo"] = "checkout"
    return packages | {"python": platform.python_version()}
