"""The pass over the text: one clean forward for all SAEs, then each resumes from its own depth.

Shapes: R rows in all, B rows of a batch, T positions, n scored tokens of the batch, M targets of all rows, D d_in,
F d_sae, V vocabulary, N blocks of documents, G groups of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.codes import Code, Dense, of_features, sparse, sparse_nominated
from saezoo.entries import Protocol
from saezoo.errors import SaezooError, TextError, UsageError
from saezoo.evals.head import Clean, Constant, Head
from saezoo.evals.intervals import GROUPS
from saezoo.evals.resuming import States, crc, merge, named
from saezoo.evals.scoring import Scoring
from saezoo.evals.summary import middle_of, summarise, versions
from saezoo.evals.tally import Places, Subject, Tally
from saezoo.lm import LanguageModel, depth_of
from saezoo.products import half_is_faster
from saezoo.ranks import Ranks
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.tokens import Rows

_CPU_BATCH, _GPU_BATCH = 2048, 32_768  # tokens
_SAMPLE = 250_000  # activations for the geometric median, the post's number
_SAMPLE_BYTES = 128 << 20  # of all inputs together: twelve layers of GPT-2 small keep 3,640 activations each
_SPARSE_BELOW = 0.1  # fraction of pairs above 0
_PROBE = 16  # tokens that tell
_ENCODED_AT_ONCE = 1 << 26  # features of tokens, 256 MB in float32
_STOPPED = "stopped; {:,} tokens are done and saved, the same command with --resume goes on from there"


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
    ranks: Ranks | None = None,
    states: Path | None = None,
    resume: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Measure every metric of docs/metrics.md on the same rows for all `subjects`.

    Args:
        subjects: SAEs that read `lm`; their hooks name the layers.
        rows: packed tokens, at most as long as the model's positions.
        protocol: `standard` neither replaces nor scores special tokens (BOS); `feb2024` replaces and scores all.
        seed: of the bootstrap draws and of the sample for the geometric median.
        batch_size: rows at once; by default 2,048 tokens on a CPU and 32,768 on a GPU.
        ranks: the processes that share the rows; all call this with the same arguments, and rank 0 gets the results.
        states: folder for the sums of an evaluation that takes long; removed at its end.
        resume: go on from what an interrupted evaluation left there.
        note: gets one-line remarks.
        on_progress: called with the number of tokens done (of all ranks, about) after each batch.

    Raises UsageError if an SAE does not fit the model, SaezooError if activations or reconstructions are not finite,
    TrainingError if there is nothing to resume.
    """
    ranks = ranks or Ranks()
    run = Evaluation(subjects, lm, rows, protocol=protocol, seed=seed, batch_size=batch_size)
    # Whole batches, so that each is the same on any number of ranks.
    part = ranks.part(-(-len(rows) // run.batch))
    first, last = part.start * run.batch, min(part.stop * run.batch, len(rows))
    about = {"model": model, "text": text, "rank": ranks.rank, "ranks": ranks.size}
    saved = None if states is None else States(states, lambda: run.identity(about), run.tallies)
    start = first + (saved.restore(note) if saved is not None and resume else 0)
    try:
        for done in run.go(start, last):
            if on_progress is not None:
                on_progress(min((done - first) * ranks.size, len(rows)) * run.scoring.context)
            if saved is not None and done < last:
                saved.offer(done - first)
    except KeyboardInterrupt:
        if saved is None:
            raise
        kept = saved.saved() * run.scoring.context
        raise SaezooError(_STOPPED.format(kept) if kept else "stopped; nothing was saved yet") from None
    everyone = ranks.collect(named(run.tallies), None)
    if saved is not None:
        saved.remove()
    if everyone is None:
        return []
    merge(run.tallies, [tensors for tensors, _ in everyone[1:]])
    return run.results(text=text, model=model)


class Evaluation:
    """One evaluation, and what it has seen so far: `tallies`, one for each subject."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        lm: LanguageModel,
        rows: Rows,
        *,
        protocol: Protocol,
        seed: int,
        batch_size: int | None = None,
    ) -> None:
        self.subjects, self.lm, self.protocol = subjects, lm, protocol
        self.scoring = Scoring.of(rows, lm, protocol, seed)
        context = self.scoring.context
        self.depths = [depth_for(subject, lm) for subject in subjects]
        self.batch = batch_size or batch_rows(lm, context)
        self.tallies = [Tally.empty(s.sae.config.d_in, s.sae.config.d_sae, context) for s in subjects]
        reads = [
            (depth, s.sae.config.centre, s.sae.W_enc.dtype) for depth, s in zip(self.depths, subjects, strict=True)
        ]
        # For each subject the first that reads the same activations: one sample of them is enough.
        self._like = [reads.index(read) for read in reads]
        room = _SAMPLE_BYTES // (4 * lm.d_model * max(1, len(set(reads))))
        self._sample_RT = self.scoring.sample(min(_SAMPLE, room))
        with torch.inference_mode():
            self._head = Head(lm)
            zero_D = torch.zeros(lm.d_model, dtype=torch.float64)
            self._zero = [self._constant(zero_D, depth) for depth in self.depths]

    def go(self, first: int, last: int) -> Iterator[int]:
        """Evaluate rows first..last-1; gives, after each batch, the row that comes next."""
        for start in range(first, last, self.batch):
            stop = min(start + self.batch, last)
            with torch.inference_mode():
                self._add(start, stop)
            yield stop

    def identity(self, about: dict[str, Any]) -> dict[str, Any]:
        """What the sums depend on, as JSON values; `about` is added."""
        return about | identity(self.subjects, self.lm, self.scoring, self.batch)

    def results(self, *, text: str = "", model: str = "") -> list[Result]:
        """Metrics and intervals, if all rows are in the tallies."""
        with torch.inference_mode():
            if not self.scoring.scored_RT.any():
                raise TextError(f"{text or 'the text'} holds special tokens only; give one with text in it")
            ce_unigram_N = self.scoring.unigram()
            found = []
            middles = {i: middle_of(torch.cat(self.tallies[i].sample)) for i in sorted(set(self._like))}
            parts = zip(self.subjects, self.tallies, self._like, self.depths, self._zero, strict=True)
            for subject, tally, like, depth, zero in parts:
                mean_D = tally.x_sum_ND.sum(0) / tally.column("tokens").sum()
                ends = {
                    "ce_zero": self.scoring.cross_entropy(zero.log_p_V),
                    "ce_mean": self.scoring.cross_entropy(self._constant(mean_D, depth).log_p_V),
                    "ce_unigram": ce_unigram_N,
                }
                found.append(
                    summarise(subject, tally, middles[like], ends, self.scoring, self.lm, text=text, model=model)
                )
            return found

    def _add(self, first: int, last: int) -> None:
        """One batch: the clean model once, then each SAE."""
        scoring, device = self.scoring, self.lm.device
        scored_BT = scoring.scored_RT[first:last]
        residuals = self.lm.residuals(scoring.tokens_RT[first:last].to(device), [*self.depths, self.lm.n_layers])
        clean = self._head.clean(residuals[self.lm.n_layers][scored_BT.to(device)])
        must_be_finite(clean.lse_n, f"the language model's logits are not finite in rows {first} to {last - 1}")
        target_n, has_target_n = scoring.targets(first, last, device)
        ce_n = self._head.cross_entropy(clean.h_nD, clean.lse_n, target_n)
        batch = _Batch(
            rows=f"rows {first} to {last - 1}",
            scored_BT=scored_BT.to(device),
            sampled_n=self._sample_RT[first:last][scored_BT].to(device),
            places=scoring.places(first, last),
            target_n=target_n,
            clean=clean,
            shared={"tokens": torch.ones_like(ce_n), "targets": has_target_n, "ce_clean": ce_n * has_target_n},
        )
        for i, depth in enumerate(self.depths):
            self._add_sae(i, residuals[depth], batch)

    def _add_sae(self, i: int, resid_BTD: Tensor, batch: _Batch) -> None:
        """One SAE on one batch. What is scored is what is replaced, so the SAE runs once."""
        sae, tally = self.subjects[i].sae, self.tallies[i]
        h_nD = resid_BTD[batch.scored_BT]
        must_be_finite(h_nD, f"the activations at {sae.config.hook} are not finite in {batch.rows}")
        x_nD, y_nD, code = reconstruct(sae, h_nD)
        must_be_finite(y_nD, f"SAE {self.subjects[i].layer} gives values that are not finite in {batch.rows}")
        spliced_BTD = resid_BTD.clone()
        spliced_BTD[batch.scored_BT] = (y_nD + h_nD.mean(-1, keepdim=True) if sae.config.centre else y_nD).to(
            h_nD.dtype
        )
        last_nD = self.lm.run(spliced_BTD, self.depths[i], self.lm.n_layers)[batch.scored_BT]
        above_n, sum_n = code.per_token()
        values = batch.shared | self._losses(last_nD, self._zero[i], batch) | reconstruction_values(x_nD, y_nD)
        groups_n = (batch.places.block_n % GROUPS).to(x_nD.device)
        tally.add(values | {"l0": above_n, "l1": sum_n}, x_nD, code.fires_in(groups_n, GROUPS), batch.places)
        if self._like[i] == i:
            tally.sample.append(x_nD[batch.sampled_n].float().cpu())

    def _losses(self, last_nD: Tensor, zero: Constant, batch: _Batch) -> dict[str, Tensor]:
        """Per token [n], what the language model loses by the reconstruction, and by nothing in its place."""
        clean = batch.clean
        h_nD, lse_n = self._head.changed(last_nD, clean)
        ce_n = self._head.cross_entropy(h_nD, lse_n, batch.target_n)
        return {
            "ce_sae": ce_n * batch.shared["targets"],
            "kl_sae": self._head.kl(clean, h_nD, lse_n),
            "kl_zero": self._head.kl(clean, zero.h_1D, zero.lse_1),
        }

    def _constant(self, resid_D: Tensor, depth: int) -> Constant:
        """The model when the residual at `depth` is the same everywhere: attention over equal values returns that
        value, so every position gives the logits of a row of one token."""
        resid_11D = resid_D.to(self.lm.device, self.lm.residual_dtype)[None, None]
        return self._head.constant(self.lm.run(resid_11D, depth, self.lm.n_layers)[0, 0])


@dataclass(frozen=True)
class _Batch:
    """What all SAEs share of some rows."""

    rows: str
    scored_BT: Tensor
    sampled_n: Tensor
    places: Places
    target_n: Tensor
    clean: Clean
    shared: dict[str, Tensor]


def batch_rows(lm: LanguageModel, context: int) -> int:
    """Rows at once: 2,048 tokens on a CPU, 32,768 on a GPU."""
    return max(1, (_GPU_BATCH if lm.device.type == "cuda" else _CPU_BATCH) // context)


def identity(subjects: Sequence[Subject], lm: LanguageModel, scoring: Scoring, batch: int) -> dict[str, Any]:
    """What a pass over the text depends on, as JSON values."""
    return {
        "subjects": [[s.collection, s.layer, str(s.sae.config)] for s in subjects],
        "parameters": [crc(list(s.sae.parameters())) for s in subjects],
        "weights": crc(list(lm.hf_model.parameters())),
        "rows": crc([scoring.tokens_RT, scoring.document_RT]),
        "protocol": scoring.protocol,
        "seed": scoring.seed,
        "batch": batch,
        "device": str(lm.device),
        "dtype": str(lm.dtype),
        "versions": versions(),
    }


def must_be_finite(tensor: Tensor, message: str) -> None:
    """SaezooError with `message` unless all of it is finite."""
    if not bool(tensor.isfinite().all()):
        raise SaezooError(f"{message}; metrics would mean nothing")


def depth_for(subject: Subject, lm: LanguageModel) -> int:
    """Where in `lm` the SAE reads; UsageError if it does not fit, SaezooError if a parameter is not finite."""
    config = subject.sae.config
    if config.d_in != lm.d_model:
        raise UsageError(f"{subject.layer}: the SAE reads width {config.d_in}, the model has {lm.d_model}")
    if config.hook is None:
        raise UsageError(f"{subject.layer}: cfg.json does not say which hook the SAE reads")
    for name, tensor in subject.sae.named_parameters():
        # A sum is finite only if all terms are. NaN must not get as far as the encoder, where it fires no feature.
        must_be_finite(tensor.sum(), f"{name} of SAE {subject.layer} holds values that are not finite")
    return depth_of(config.hook, lm.n_layers)


def reconstruct(sae: SAE, h_nD: Tensor) -> tuple[Tensor, Tensor, Code]:
    """(x, y, features) of residuals h [n, D]: x is what the SAE reads, centred if it wants that, y its reconstruction.

    The same as `sae.decode(sae.encode(h), h)`; for ReLU all behind the encoder's product is taken from the features
    that fire, and the encoder's product itself by the quickest way.
    """
    x_nD = h_nD.to(sae.W_enc.dtype)
    if sae.config.centre:
        x_nD = x_nD - x_nD.mean(-1, keepdim=True)
    if sae.config.activation != "relu" or sae.config.normalise != "none":
        at_once = max(1, _ENCODED_AT_ONCE // sae.config.d_sae)
        code: Code = of_features(x_nD, (sae.encode(part_nD) for part_nD in torch.split(x_nD, at_once)))
        return x_nD, sae.restore(code.decode(sae.W_dec) + sae.b_dec, x_nD), code
    read_nD = x_nD - sae.b_dec if sae.config.apply_b_dec_to_input else x_nD
    code = encode(read_nD, sae.W_enc, sae.b_enc)
    return x_nD, code.decode(sae.W_dec) + sae.b_dec, code


def encode(x_nD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor) -> Code:
    """ReLU(x W_enc + b_enc), by the way that is quick for so many active features."""
    probe_nF = x_nD[:: max(1, len(x_nD) // _PROBE)] @ W_enc_DF + b_enc_F
    if (probe_nF > 0).sum() > _SPARSE_BELOW * probe_nF.numel() or not bool(x_nD.isfinite().all()):
        return Dense(x_nD, W_enc_DF.T, b_enc_F, W_enc_DF.shape[1])
    nominate = x_nD.dtype == torch.float32 and half_is_faster(x_nD.device)
    return (sparse_nominated if nominate else sparse)(x_nD, W_enc_DF.T, b_enc_F)


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
