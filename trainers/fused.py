"""The training step on a GPU: what `Trainee.step` does, from the active pairs alone, and without waiting for the GPU.

Nominate and decide. One product in half precision (see `codes.py`) marks every pair (token, feature) that can be above
0, and a few more. Only these are computed in float32, which decides. The order of work in a step, kernels in quotes:

    `scale_inputs`    x - b_dec, and its half-precision form        product         the encoder's, in half precision
    `compact`         lists the nominated pairs of each token       `decode`        f of each pair; x_hat
    the loss          and its gradient at x_hat, by autograd        `slopes`        the gradient at each active pair
    `add_up`          sorts pairs by feature, sums what is shared   `count`         firing counters
    `update_bias`     `update_decoder`     `update_encoder`         gradient and Adam of each row at once

Freeze and replay. Storage for pairs is fixed before their number is known, because knowing it means to wait. If they
do not fit, `compact` sets a flag on the device, with which that step and all after it change nothing. The host, LAG
steps ahead, learns of it from the report that each step sends. It still has the batches of the steps whose reports it
has not read, takes those steps again with `Trainee.step`, and goes on with more storage. What `step` returned for them
was wrong: `settle` gives it anew.

The same reports tell what can be known late: the density, by which `step` chooses between this way and `Trainee.step`
(early on most features fire), and the number of features that may be dead LAG steps later, for which the ghosts'
products get rows; rows that no dead feature needs are masked. Decisions rest on the report of LAG steps before, never
on a newer one that happens to be there: same seed, same bits, at any speed.

Shapes: B batch, D d_in, F d_sae, K = D + 8 (see `codes.py`), S rows for dead features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saezoo.codes import nominating_weights
from saezoo.entries import Recipe
from saezoo.trainers import kernels, updates
from saezoo.trainers.objective import Ghost, Losses, feb2024, ghost_activations, normalise_decoder, ramp, standard
from saezoo.trainers.trainee import Parameters, State, StepLog, Trainee

DENSE_ABOVE = 0.05
"""Fraction of pairs above 0 from which on `Trainee.step` should be faster: a pair is five rows of 3 kB, read at about
5 TB/s, so all of 4,096 x 24,576 would take 0.3 s; five dense products of 0.155 TFLOP take 15 ms at 50 TFLOP/s."""
LAG = 8
"""Steps that the host is ahead of the last report that it has read. Their batches are kept."""
_HALF = torch.float16
_GHOST_ROWS = 256  # rows for dead features come in multiples of this, so that few sizes of memory are asked for


class _Facts(NamedTuple):
    """What a step tells about its batch. Plain numbers, as they are stored."""

    batch: int
    nominated: int
    """Pairs."""
    frozen: int
    """Number of the step that froze, or 0."""
    active: int
    """Pairs above 0."""
    may_be_dead: int
    """Features that may get ghost gradients in one of the next LAG steps."""


class _Report:
    """A step's facts, on their way to the host, and its batch, in case that it has to be taken again."""

    def __init__(self, x_BD: Tensor, facts: Tensor) -> None:
        """`facts` [4]: those after `batch`."""
        self.x_BD = x_BD
        self._host = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=facts.is_cuda)
        self._host.copy_(facts, non_blocking=facts.is_cuda)
        self._copied = torch.cuda.Event() if facts.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def read(self) -> _Facts:
        """Waits if the step is not done."""
        if self._copied is not None:
            self._copied.synchronize()
        return _Facts(len(self.x_BD), *(int(fact) for fact in self._host.tolist()))


class _Outlook(NamedTuple):
    """What the next step is prepared for. Plain numbers, as they are stored."""

    density: float
    nominated: float
    """Pairs per token."""
    may_be_dead: int
    """Features at most."""


class FusedTrainee(Trainee):
    """A `Trainee` in float32 whose steps do not wait for the GPU while few features fire. On a CPU the kernels run in
    Triton's interpreter, if it was imported with TRITON_INTERPRET=1.

    A batch given to `step` must not be written to for the next `LAG` steps, or until `settle`.
    """

    def __init__(
        self,
        parameters: Parameters,
        recipe: Recipe,
        *,
        dense_above: float = DENSE_ABOVE,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        if parameters.W_dec.dtype != torch.float32:
            raise ValueError(f"the kernels are for float32, not {parameters.W_dec.dtype}; use Trainee")
        super().__init__(parameters, recipe, product="dense", note=note)
        self._sparse_up_to = dense_above
        self._weights = kernels.Weights(self.W_enc_FD, self.b_enc_F, self.W_dec_FD, recipe.loss == "feb2024")
        self._scaled_FK: Tensor | None = None
        """W_enc and b_enc as they are nominated with; None if they have changed since."""
        self._pairs: kernels.Pairs | None = None
        self._frozen = torch.zeros(1, dtype=torch.int64, device=self.b_enc_F.device)
        self._reports: deque[_Report | _Facts] = deque()
        """Of the last LAG steps; `_Facts` are of a run before this one."""
        self._replayed: dict[int, StepLog] = {}
        self._dense_until = 0
        self._nominated_per_active = 1.5
        self._window_closed_at = -1
        self._outlook = self._look()

    @property
    def parameters(self) -> Parameters:
        """The tensors after all steps so far (for which this waits); views, not copies."""
        self._wait()
        return super().parameters

    def settle(self) -> dict[int, StepLog]:
        """Wait for all steps so far. Returns the logs of those that had to be taken again since the last call, seldom
        any, by number of the step (the first is 1): they replace what `step` returned."""
        self._wait()
        replayed, self._replayed = self._replayed, {}
        return replayed

    def state(self) -> State:
        """Everything that the next step depends on, as `Trainee` has it, and the fact `fused`. Waits for all steps."""
        self._wait()
        tensors, facts = super().state()
        known = [report if isinstance(report, _Facts) else report.read() for report in self._reports]
        ahead = (list(self._outlook), self._dense_until, self._nominated_per_active, [list(facts) for facts in known])
        return State(tensors, {**facts, "fused": list(ahead)})

    def restore(self, state: State) -> None:
        """Go on from a `state`, also from one of `Trainee`."""
        super().restore(state)
        self._reports.clear()
        self._scaled_FK, self._window_closed_at = None, -1
        if "fused" in state.facts:
            outlook, self._dense_until, self._nominated_per_active, known = state.facts["fused"]
            self._outlook = _Outlook(*outlook)
            self._reports.extend(_Facts(*facts) for facts in known)
        else:
            self._outlook = self._look()

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> StepLog:
        """One optimiser step on the activations x [B, D]. The log is to be trusted after `settle`."""
        with torch.cuda.device_of(x_BD):  # type: ignore[no-untyped-call]
            if len(self._reports) >= LAG:
                self._read_one()
            closes = (self.steps + 1) % self.recipe.sampling_window_steps == 0
            if closes or self._wants_dense():
                self._wait()
            if self._wants_dense():
                return self._dense_step(x_BD)
            if closes:
                self._close_window()
            return self._fused_step(x_BD.contiguous())

    def _wants_dense(self) -> bool:
        return self.steps < self._dense_until or self._outlook.density > self._sparse_up_to

    def _read_one(self) -> None:
        report = self._reports.popleft()
        facts = report if isinstance(report, _Facts) else report.read()
        if facts.frozen:
            self._reports.appendleft(report)
            self._replay(0, facts)
            return
        nominated, density = facts.nominated / facts.batch, facts.active / (facts.batch * len(self.b_enc_F))
        self._outlook = _Outlook(density, nominated, facts.may_be_dead)

    def _wait(self) -> None:
        """For all steps so far, and take those again that froze."""
        for i, report in enumerate(self._reports):
            facts = report if isinstance(report, _Facts) else report.read()
            if facts.frozen:
                return self._replay(i, facts)
            self.density = facts.active / (facts.batch * len(self.b_enc_F))

    def _replay(self, first: int, facts: _Facts) -> None:
        """Take the steps of all reports from the first that froze again."""
        batches = [report.x_BD for report in list(self._reports)[first:] if isinstance(report, _Report)]
        self._frozen.zero_()
        self.steps -= len(batches)
        self.window_tokens -= sum(map(len, batches))
        self._dense_until = self.steps + LAG  # as many as if the host had not learnt of it early
        for i, x_BD in enumerate(batches):
            log = self._dense_step(x_BD)
            self._replayed[self.steps] = log
            if i == 0:
                expected = facts.nominated / max(1.0, self.density * facts.batch * len(self.b_enc_F))
                self._nominated_per_active = max(self._nominated_per_active, expected)
        self._outlook = self._look()

    def _dense_step(self, x_BD: Tensor) -> StepLog:
        self._reports.clear()
        self._scaled_FK = None
        for tensor in self._tensors:
            self.adam.state[tensor]["step"].fill_(self.steps)
        log = super().step(x_BD)
        self._outlook = self._look()
        return log

    def _look(self) -> _Outlook:
        """After a step that was waited for."""
        nominated = self._nominated_per_active * self.density * len(self.b_enc_F)
        return _Outlook(self.density, nominated, int(self._count_nearly_dead()))

    def _count_nearly_dead(self) -> Tensor:
        """[1]: `may_be_dead`."""
        limit = self.recipe.dead_after_steps - LAG if self.recipe.ghost != "off" else torch.iinfo(torch.int64).max
        return (self.since_fired_F > limit).sum(0, keepdim=True)

    def _close_window(self) -> None:
        if self._window_closed_at != self.steps:  # else it was before this step froze
            super()._close_window()
        self._window_closed_at = self.steps

    def _storage(self, batch: int) -> kernels.Pairs:
        """For two to four times the pairs expected: by powers of two, so that it seldom changes."""
        F, block = len(self.b_enc_F), updates.BLOCK
        expected, all_pairs = max(1, round(self._outlook.nominated * batch)), -(-batch * F // block) * block
        capacity = min(max(block, 1 << (2 * expected - 1).bit_length()), all_pairs)
        if self._pairs is None or (len(self._pairs.start_B), len(self._pairs.key_N)) != (batch, capacity):
            self._pairs = None  # frees it first
            self._pairs = kernels.Pairs(batch, F, capacity, self.b_enc_F.device)
        return self._pairs

    def _fused_step(self, x_BD: Tensor) -> StepLog:
        recipe, weights, pairs = self.recipe, self._weights, self._storage(len(x_BD))
        if self._scaled_FK is None:
            self._scaled_FK = nominating_weights(self.W_enc_FD, self.b_enc_F, _HALF)
        l1 = recipe.l1_coefficient * ramp(self.steps, recipe.l1_warmup_steps) / len(x_BD)
        dead_F = self.since_fired_F > recipe.dead_after_steps

        inputs_BD, scaled_BK = torch.empty_like(x_BD), self._scaled_FK.new_zeros(len(x_BD), self._scaled_FK.shape[1])
        kernels.scale_inputs(x_BD, self.b_dec_D, inputs_BD, scaled_BK)
        kernels.compact(_product(scaled_BK, self._scaled_FK), pairs, self._frozen, self.steps + 1)
        x_hat_BD, figures_2B = kernels.decode(x_BD, inputs_BD, self.b_dec_D, weights, pairs)
        rows = self._outlook.may_be_dead
        ghosts = _Ghosts(weights, recipe.ghost, inputs_BD, dead_F, rows) if rows else None
        losses, (grad_BD, *rest) = _at_the_output(recipe, x_BD, x_hat_BD, l1 * figures_2B[0].sum(), ghosts)
        kernels.slopes(grad_BD, weights, pairs, l1)
        ghost_gradients = None if ghosts is None else ghosts.gradients(*rest)
        sums = updates.add_up(pairs, inputs_BD, grad_BD, ghost_gradients)
        updates.count(sums.ends_F1, self.since_fired_F, self.window_fires_F, self._frozen)
        self._update(self._scaled_FK, sums, l1)

        active = sums.ends_F1[-1:]
        facts = torch.cat([pairs.cursor, self._frozen, active, self._count_nearly_dead()])
        self._reports.append(_Report(x_BD, facts))
        self.window_tokens += len(x_BD)
        self.steps += 1
        return StepLog(losses, active[0] / len(x_BD), dead_F.sum(), 1 - figures_2B[1].mean())

    def _update(self, scaled_FK: Tensor, sums: updates.Sums, l1: float) -> None:
        group = self.adam.param_groups[0]
        group["lr"] = self.recipe.lr * ramp(self.steps, self.recipe.lr_warmup_steps)
        (beta1, beta2), taken = group["betas"], self.steps + 1
        step_size, root = group["lr"] / (1 - beta1**taken), (1 - beta2**taken) ** 0.5
        adam = updates.Adam(step_size, root, beta1, beta2, group["eps"])
        W_enc, b_enc, W_dec, b_dec = (
            (self.adam.state[tensor]["exp_avg"], self.adam.state[tensor]["exp_avg_sq"]) for tensor in self._tensors
        )
        # b_dec enters twice: in x_hat, and subtracted from what every encoder row (as it was in this step) multiplies.
        output_D, input_D = sums.grad_BD.sum(0), sums.slope_F @ self.W_enc_FD
        updates.update_bias(self.b_dec_D, b_dec, output_D, input_D, adam, self._frozen)
        updates.update_decoder(self._weights, W_dec, sums, adam, l1, self._frozen)
        updates.update_encoder(self._weights, scaled_FK, W_enc, b_enc, sums, adam, self._frozen)


def _product(scaled_BK: Tensor, scaled_FK: Tensor) -> Tensor:
    """The nominations [B, F]. Their margin is for sums in float32, and PyTorch allows cuBLAS others by default."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    product_BF = scaled_BK @ scaled_FK.T
    matmul.allow_fp16_reduced_precision_reduction = allowed
    return product_BF


class _Ghosts:
    """The dead features' part, as products over S rows, of which the first are theirs and the others count nothing."""

    def __init__(self, weights: kernels.Weights, ghost: Ghost, inputs_BD: Tensor, dead_F: Tensor, at_most: int) -> None:
        """`dead_F` are no more than `at_most`."""
        F = len(dead_F)
        S = min(F, -(-at_most // _GHOST_ROWS) * _GHOST_ROWS)
        rank_F = dead_F.cumsum(0) - 1
        self._row_F = torch.where(dead_F, rank_F, -1).int()
        features = torch.arange(F, device=dead_F.device)
        index_S = rank_F.new_zeros(S + 1).scatter_(0, torch.where(dead_F, rank_F, S), features)[:S]
        real_S = features[:S] <= rank_F[-1]
        self.any = real_S[0]
        self._inputs_BD = inputs_BD
        W_enc_SD, b_enc_S, self._W_dec_SD = (tensor[index_S] for tensor in weights[:3])
        normalise_decoder(self._W_dec_SD)
        pre_BS = torch.addmm(b_enc_S, inputs_BD, W_enc_SD.T)
        self._a_BS = ghost_activations(pre_BS, ghost).masked_fill_(~real_S, 0)
        self._passes_BS = self._a_BS.masked_fill(pre_BS <= 0, 0) if ghost == "bug" else self._a_BS

    def decode(self) -> Tensor:
        """[B, D], and 0 if no feature is dead."""
        return self._a_BS @ self._W_dec_SD

    def gradients(self, grad_BD: Tensor) -> updates.Ghosts:
        """What comes back through the ghosts' reconstruction; exp is its own derivative."""
        pre_grad_BS = (grad_BD @ self._W_dec_SD.T) * self._passes_BS
        W_enc_SD, W_dec_SD = pre_grad_BS.T @ self._inputs_BD, self._a_BS.T @ grad_BD
        return updates.Ghosts(self._row_F, W_enc_SD, pre_grad_BS.sum(0), W_dec_SD)


def _at_the_output(
    recipe: Recipe, x_BD: Tensor, x_hat_BD: Tensor, l1: Tensor, ghosts: _Ghosts | None
) -> tuple[Losses, tuple[Tensor, ...]]:
    """Losses, and the gradients of x_hat and, if there are any, of the ghosts' reconstruction, both [B, D]."""
    with torch.enable_grad():
        leaves = [x_hat_BD.detach().requires_grad_()]
        if recipe.loss == "standard":
            losses = standard(x_BD, leaves[0], l1)
        elif ghosts is None:
            losses = feb2024(x_BD, leaves[0], l1, ghost=recipe.ghost, ghost_BD=None)
        else:
            leaves.append(ghosts.decode().requires_grad_())
            # Without a dead feature there is no such term. Its formula would be 0 / 0, of which even 0 times is NaN.
            ghost_BD = torch.where(ghosts.any, leaves[1], 1)
            _, mse, l1, extra = feb2024(x_BD, leaves[0], l1, ghost=recipe.ghost, ghost_BD=ghost_BD)
            extra = torch.where(ghosts.any, extra, 0)
            losses = Losses(mse + l1 + extra, mse, l1, extra)
        gradients = torch.autograd.grad(losses.total, leaves)
    return Losses(*(loss.detach() for loss in losses)), gradients
