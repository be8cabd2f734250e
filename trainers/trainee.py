"""One SAE in training: its parameters, optimiser and firing statistics, and what one step does to them.

Shapes: B batch, D d_in, F d_sae, S features under ghost gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saezoo.codes import SPARSE_BLOCK, Code, Dense, Gradients, sparse, sparse_nominated
from saezoo.entries import Recipe
from saezoo.errors import TrainingError
from saezoo.ranks import Ranks
from saezoo.trainers.objective import (
    Losses,
    feb2024,
    ghost_activations,
    normalise_decoder,
    ramp,
    remove_parallel,
    standard,
)

Product = Literal["dense", "full", "half"]
"""`dense`: every product in full. `full`, `half`: while few features fire only the encoder's, in full or in half
precision (see `codes.py`). The results are the same."""

DENSE_ABOVE = 0.1
"""Fraction of pairs above 0 from which on the dense products are taken. An estimate for 2 CPU cores, from the time of
a sparse step at 0.006 and of a dense one: equal time at about 0.2; 0.1 also keeps the pairs' memory below f's."""
_SMALLEST_BLOCK = 256
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FACTS = ("steps", "window_tokens", "density", "block")


class Parameters(NamedTuple):
    """The trained tensors, in the published layout."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class StepLog(NamedTuple):
    """What one step showed, as tensors on the device (reading them costs a synchronisation)."""

    losses: Losses
    l0: Tensor
    dead: Tensor
    """Features that had not fired for more than `dead_after_steps` steps; they got the ghost gradients."""
    explained_variance_uncentred: Tensor


def initial_parameters(
    d_sae: int,
    b_dec: Tensor,
    generator: torch.Generator,
    encoder: Literal["kaiming", "decoder"] = "kaiming",
    features: slice = slice(None),
) -> Parameters:
    """W_dec rows of norm 1, directions Kaiming-uniform; b_enc zero; W_enc the decoder's transpose, or Kaiming-uniform
    as PyTorch did it for this shape: within +-sqrt(6/F). Of these only `features`, but the same whatever they are."""

    def uniform(rows: int, columns: int) -> Iterator[Tensor]:
        bound = math.sqrt(6 / columns)  # kaiming_uniform_ takes the second dimension for the fan-in
        for _ in range(rows):
            yield torch.empty(columns).uniform_(-bound, bound, generator=generator)

    d_in, kept = len(b_dec), range(d_sae)[features]
    rows = (row for i, row in enumerate(uniform(d_sae, d_in)) if i in kept)
    W_dec = torch.stack(list(rows))
    normalise_decoder(W_dec)
    tied = encoder == "decoder"
    W_enc = W_dec.T.clone() if tied else torch.stack([row[features] for row in uniform(d_in, d_sae)])
    tensors = (W_enc, torch.zeros(len(W_dec)), W_dec, b_dec.clone())
    return Parameters(*(t.to(b_dec.device, b_dec.dtype) for t in tensors))


class State(NamedTuple):
    """An SAE in training, as it is stored."""

    tensors: dict[str, Tensor]
    """W_enc and W_dec as [F, D], b_enc [F], b_dec [D]; `.exp_avg` and `.exp_avg_sq` of each; counters [F]."""
    facts: dict[str, Any]


class Pass(NamedTuple):
    """Forward and backward of one batch, before anything has changed."""

    losses: Losses
    gradients: Gradients
    b_dec_D: Tensor
    fires_F: Tensor
    l0: Tensor
    dead: Tensor
    error_BD: Tensor


class _Output(NamedTuple):
    """What all features give together; numbers are scalars."""

    x_hat_BD: Tensor
    """Without b_dec."""
    ghost_BD: Tensor | None
    l1: Tensor
    l0: Tensor
    dead: Tensor


class Trainee:
    """One SAE in training. `step` is the order of operations of the code of 28 January 2024."""

    def __init__(
        self,
        parameters: Parameters,
        recipe: Recipe,
        *,
        product: Product = "full",
        dense_above: float = DENSE_ABOVE,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`parameters`: all features, or those of this rank if the `ranks` share features."""
        self.recipe = recipe
        self._ranks = ranks
        self._product = product
        self._dense_above = -1.0 if product == "dense" else dense_above
        self._note = note
        # [F, D]: a feature's encoder and decoder are rows, which every sparse product reads and writes whole.
        self.W_enc_FD = parameters.W_enc.detach().T.contiguous()
        self.b_enc_F, self.W_dec_FD, self.b_dec_D = (
            t.detach().clone() for t in (parameters.b_enc, parameters.W_dec, parameters.b_dec)
        )
        self._tensors = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D)
        self.adam = torch.optim.Adam(self._tensors, lr=recipe.lr, fused=True)
        for tensor in self._tensors:
            moments = {moment: torch.zeros_like(tensor) for moment in _MOMENTS}
            self.adam.state[tensor] = {"step": torch.zeros((), device=tensor.device), **moments}
        self.steps = 0
        n_features, device = self.b_enc_F.numel(), self.b_enc_F.device
        self.since_fired_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.window_fires_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.window_tokens = 0
        self.log_sparsity_F: Tensor | None = None
        """log10(frequency + 1e-10) over the last complete window; None before the first."""
        self.density = 1.0
        """Fraction of (token, feature) pairs above 0 in the last step."""
        self.block = n_features
        """Features at once in dense products."""

    @property
    def parameters(self) -> Parameters:
        """The tensors as they are now; views, not copies."""
        return Parameters(self.W_enc_FD.T, self.b_enc_F, self.W_dec_FD, self.b_dec_D)

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> StepLog:
        """One optimiser step on the activations x [B, D]."""
        recipe = self.recipe
        if recipe.loss == "feb2024":
            normalise_decoder(self.W_dec_FD)
        if (self.steps + 1) % recipe.sampling_window_steps == 0:
            self._close_window()
        dead_F = self.since_fired_F > recipe.dead_after_steps

        done = self._within_memory(x_BD, dead_F)

        self.density = float(done.fires_F.sum()) / (len(x_BD) * len(done.fires_F))
        self.since_fired_F += 1
        self.since_fired_F[done.fires_F > 0] = 0
        self.window_fires_F += done.fires_F
        self.window_tokens += len(x_BD)

        if recipe.loss == "feb2024":
            remove_parallel(done.gradients.W_dec_FD, self.W_dec_FD)
        for tensor, gradient in zip(self._tensors, (*done.gradients, done.b_dec_D), strict=True):
            tensor.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = recipe.lr * ramp(self.steps, recipe.lr_warmup_steps)
        self.adam.step()
        self.adam.zero_grad()  # the memory is wanted elsewhere
        self.steps += 1
        unexplained = (done.error_BD.square().sum(1) / x_BD.square().sum(1)).mean()
        return StepLog(done.losses, done.l0, done.dead, 1 - unexplained)

    def _within_memory(self, x_BD: Tensor, dead_F: Tensor) -> Pass:
        """`differentiate`, with blocks of half as many features each time that memory runs out."""
        while True:
            try:
                return self.differentiate(x_BD, dead_F)
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                    raise
            if self._ranks.shares_features:  # to begin again, all would have to
                raise TrainingError(f"out of memory on {x_BD.device}; train fewer layers at once, or on more ranks")
            if self.block // 2 < _SMALLEST_BLOCK:
                raise TrainingError(
                    f"out of memory on {x_BD.device}, even {self.block} features at a time; train fewer layers at once"
                )
            self.block //= 2
            self._note(f"out of memory on {x_BD.device}; going on with {self.block:,} features at a time")

    @torch.no_grad()
    def differentiate(self, x_BD: Tensor, dead_F: Tensor) -> Pass:
        """Losses and exact gradients on x [B, D]; `dead_F` get ghost gradients. Changes nothing."""
        recipe, inputs_BD = self.recipe, x_BD - self.b_dec_D
        code = self._encode(inputs_BD)
        # L1 = sum_i l1_F sum_b f_bi, so l1_F is also its derivative by every f_bi > 0.
        l1 = recipe.l1_coefficient * ramp(self.steps, recipe.l1_warmup_steps) / len(x_BD)
        l1_F = torch.full_like(self.b_enc_F, l1)
        norm_F = self.W_dec_FD.norm(dim=1) if recipe.loss == "standard" else None
        if norm_F is not None:
            l1_F *= norm_F
        ghosts = _Ghosts(self, inputs_BD, dead_F) if recipe.ghost != "off" and bool(dead_F.any()) else None

        out = self._add_up(code, l1_F, ghosts, dead_F)
        x_hat_BD = out.x_hat_BD + self.b_dec_D
        losses, grad_BD, ghost_grad_BD = _at_the_output(recipe, x_BD, x_hat_BD, out.l1, out.ghost_BD)

        gradients = code.gradients(grad_BD, self.W_dec_FD, l1_F)
        if norm_F is not None:
            gradients.W_dec_FD.addcmul_((l1_F * code.sums_F / norm_F.square())[:, None], self.W_dec_FD)
        if ghosts is not None and ghost_grad_BD is not None:
            ghosts.add_gradients(ghost_grad_BD, gradients)
        # b_dec enters twice: in x_hat, and subtracted from what every encoder row multiplies.
        b_dec_D = grad_BD.sum(0) - self._ranks.add_up(gradients.b_enc_F @ self.W_enc_FD)
        return Pass(losses, gradients, b_dec_D, code.fires_F, out.l0, out.dead, x_hat_BD - x_BD)

    @torch.no_grad()
    def loss_of_each(self, x_BD: Tensor) -> Tensor:
        """Reconstruction and L1 of each input [B], as the recipe has them; without ghosts."""
        f_BF = torch.addmm(self.b_enc_F, x_BD - self.b_dec_D, self.W_enc_FD.T).relu_()
        e2_B = (torch.addmm(self.b_dec_D, f_BF, self.W_dec_FD) - x_BD).square().sum(1)
        if self.recipe.loss == "standard":
            loss_B: Tensor = e2_B + self.recipe.l1_coefficient * (f_BF @ self.W_dec_FD.norm(dim=1))
            return loss_B
        mse_B = e2_B / (x_BD.shape[1] * x_BD.norm(dim=1)).clamp(min=torch.finfo(x_BD.dtype).tiny)
        loss_B = mse_B + self.recipe.l1_coefficient * f_BF.sum(1)
        return loss_B

    @torch.no_grad()
    def forget(self, features_S: Tensor) -> None:
        """Begin these features anew: their moments and how long they have not fired become 0."""
        for tensor in (self.W_enc_FD, self.b_enc_F, self.W_dec_FD):
            for moment in _MOMENTS:
                self.adam.state[tensor][moment][features_S] = 0
        self.since_fired_F[features_S] = 0

    def _add_up(self, code: Code, l1_F: Tensor, ghosts: _Ghosts | None, dead_F: Tensor) -> _Output:
        """What all features give together; if ranks share them, added up in one all-reduce."""
        x_hat_BD, l1 = code.decode(self.W_dec_FD), l1_F @ code.sums_F
        ghost_BD = None if ghosts is None else ghosts.decode()
        l0, dead = code.fires_F.sum() / len(x_hat_BD), dead_F.sum()
        if not self._ranks.shares_features:
            return _Output(x_hat_BD, ghost_BD, l1, l0, dead)
        numbers_3 = torch.stack([l1, l0.to(l1), dead.to(l1)])
        parts = [x_hat_BD.flatten(), numbers_3]
        if self.recipe.ghost != "off" and self.steps > self.recipe.dead_after_steps:
            parts.append((torch.zeros_like(x_hat_BD) if ghost_BD is None else ghost_BD).flatten())
        sizes = [len(part) for part in parts]
        summed, numbers_3, *rest = torch.split(self._ranks.add_up(torch.cat(parts)), sizes)
        # Where nobody has a dead feature there is no ghost term at all.
        ghost_BD = rest[0].view_as(x_hat_BD) if rest and float(numbers_3[2]) > 0 else None
        return _Output(summed.view_as(x_hat_BD), ghost_BD, *numbers_3)

    def _encode(self, inputs_BD: Tensor) -> Code:
        if self.density > self._dense_above:
            return Dense(inputs_BD, self.W_enc_FD, self.b_enc_F, self.block)
        encode = sparse if self._product == "full" else sparse_nominated
        return encode(inputs_BD, self.W_enc_FD, self.b_enc_F, min(self.block, SPARSE_BLOCK))

    def _close_window(self) -> None:
        frequency_F = self.window_fires_F / max(1, self.window_tokens)
        self.log_sparsity_F = (frequency_F + 1e-10).log10().float()
        self.window_fires_F.zero_()
        self.window_tokens = 0

    def settle(self) -> dict[int, StepLog]:
        """Wait for all steps so far; the logs, by number of the step, of those that had to be taken again."""
        return {}

    def state(self) -> State:
        """Everything that the next step depends on. The tensors are the SAE's own, not copies."""
        tensors = dict(zip(_NAMES, self._tensors, strict=True))
        for name, tensor in zip(_NAMES, self._tensors, strict=True):
            tensors |= {f"{name}.{moment}": self.adam.state[tensor][moment] for moment in _MOMENTS}
        tensors |= {"since_fired": self.since_fired_F, "window_fires": self.window_fires_F}
        if self.log_sparsity_F is not None:
            tensors["log_sparsity"] = self.log_sparsity_F
        facts = {key: getattr(self, key) for key in _FACTS}
        return State(tensors, facts)

    def restore(self, state: State) -> None:
        """Go on from a `state`."""
        saved = dict(state.tensors)
        log_sparsity_F = saved.pop("log_sparsity", None)
        for name, mine in self.state().tensors.items():
            if name != "log_sparsity":
                mine.copy_(saved[name])
        self.log_sparsity_F = None if log_sparsity_F is None else log_sparsity_F.to(self.b_enc_F.device)
        for key in _FACTS:
            setattr(self, key, state.facts[key])
        for tensor in self._tensors:
            self.adam.state[tensor]["step"].fill_(self.steps)


def _at_the_output(
    recipe: Recipe, x_BD: Tensor, x_hat_BD: Tensor, l1: Tensor, ghost_BD: Tensor | None
) -> tuple[Losses, Tensor, Tensor | None]:
    """Losses, and the gradients of x_hat and of the ghosts' reconstruction, both [B, D]."""
    wanted = [x_hat_BD] if ghost_BD is None else [x_hat_BD, ghost_BD]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in wanted]
        if recipe.loss == "standard":
            losses = standard(x_BD, leaves[0], l1)
        else:
            ghost = None if ghost_BD is None else leaves[1]
            losses = feb2024(x_BD, leaves[0], l1, ghost=recipe.ghost, ghost_BD=ghost)
        gradients = torch.autograd.grad(losses.total, leaves)
    return Losses(*(loss.detach() for loss in losses)), gradients[0], gradients[1] if len(wanted) == 2 else None


class _Ghosts:
    """The dead features' part: products over them alone."""

    def __init__(self, trainee: Trainee, inputs_BD: Tensor, dead_F: Tensor) -> None:
        self._ghost = trainee.recipe.ghost
        self._inputs_BD = inputs_BD
        self._index_S = dead_F.nonzero(as_tuple=True)[0]
        self._W_dec_SD = trainee.W_dec_FD[self._index_S]
        W_enc_SD, b_enc_S = trainee.W_enc_FD[self._index_S], trainee.b_enc_F[self._index_S]
        self._pre_BS = torch.addmm(b_enc_S, inputs_BD, W_enc_SD.T)
        self._a_BS = ghost_activations(self._pre_BS, self._ghost)

    def decode(self) -> Tensor:
        return self._a_BS @ self._W_dec_SD

    def add_gradients(self, grad_BD: Tensor, gradients: Gradients) -> None:
        """Add to `gradients` what comes back through the ghosts' reconstruction; exp is its own derivative."""
        pre_grad_BS = (grad_BD @ self._W_dec_SD.T) * self._a_BS
        if self._ghost == "bug":
            pre_grad_BS.masked_fill_(self._pre_BS <= 0, 0)
        gradients.W_dec_FD.index_add_(0, self._index_S, self._a_BS.T @ grad_BD)
        gradients.W_enc_FD.index_add_(0, self._index_S, pre_grad_BS.T @ self._inputs_BD)
        gradients.b_enc_F.index_add_(0, self._index_S, pre_grad_BS.sum(0))
