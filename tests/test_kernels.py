"""The Triton kernels against PyTorch: on a GPU if there is one, else in Triton's interpreter, which needs none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saezoo.codes import nominating_inputs, nominating_weights
from saezoo.trainers.objective import remove_parallel

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Triton decides on import whether it interprets, and other modules may have imported it by now.
    for name in [name for name in sys.modules if f"{name}.".startswith("triton.") and "._C" not in name]:
        del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  (at the first launch it would be too late)
from saezoo.trainers import kernels, updates  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)

HALF = torch.float16
NOT_FROZEN = torch.zeros(1, dtype=torch.int64, device=DEVICE)
NEVER, SOMETIMES, ALWAYS = -1e6, -1.0, 1e3
SHAPES = [(5, 24, 70, SOMETIMES), (3, 768, 33, SOMETIMES), (4, 17, 31, NEVER), (4, 32, 70, ALWAYS)]
"""B, D, F and the bias of every feature."""


class Problem(NamedTuple):
    """An SAE, a batch with its pairs, and a gradient at the output."""

    weights: kernels.Weights
    x_BD: Tensor
    inputs_BD: Tensor
    b_dec_D: Tensor
    grad_BD: Tensor
    f_BF: Tensor
    pairs: kernels.Pairs
    frozen: Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random).to(DEVICE)


def problem(B: int, D: int, F: int, shift: float, *, normalised: bool = True, capacity: int = 1024) -> Problem:
    """Nominated are all active pairs and a quarter of the others."""
    W_dec_FD = gaussian(F, D, seed=1) * 3
    b_enc_F = gaussian(F, seed=2) + shift
    weights = kernels.Weights(gaussian(F, D) / D**0.5, b_enc_F, W_dec_FD, normalised)
    x_BD, b_dec_D = gaussian(B, D, seed=3) * 2, gaussian(D, seed=4)
    f_BF = torch.addmm(b_enc_F, x_BD - b_dec_D, weights.W_enc_FD.T).relu()
    product_BF = ((f_BF > 0) | (gaussian(B, F, seed=5) > 0.67)).to(HALF)
    pairs, frozen = kernels.Pairs(B, F, capacity, DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    kernels.compact(product_BF, pairs, frozen, 1)
    assert not frozen.any()
    return Problem(weights, x_BD, x_BD - b_dec_D, b_dec_D, gaussian(B, D, seed=6), f_BF, pairs, frozen)


def multiplied(weights: kernels.Weights) -> Tensor:
    """The decoder that is meant."""
    return normalize(weights.W_dec_FD) if weights.normalised else weights.W_dec_FD


def l1_F(weights: kernels.Weights, l1: float) -> Tensor:
    return torch.full_like(weights.b_enc_F, l1) * (1 if weights.normalised else weights.W_dec_FD.norm(dim=1))


def slopes_BF(p: Problem, l1: float) -> Tensor:
    return (p.grad_BD @ multiplied(p.weights).T + l1_F(p.weights, l1)).masked_fill(p.f_BF == 0, 0)


def through(p: Problem, l1: float, ghosts: updates.Ghosts | None = None) -> updates.Sums:
    """All that comes before the updates."""
    kernels.decode(p.x_BD, p.inputs_BD, p.b_dec_D, p.weights, p.pairs)
    kernels.slopes(p.grad_BD, p.weights, p.pairs, l1)
    return updates.add_up(p.pairs, p.inputs_BD, p.grad_BD, ghosts)


def dead(p: Problem) -> updates.Ghosts:
    """Every third feature, with some gradients; a row more than needed."""
    F, D = p.weights.W_dec_FD.shape
    row_F = torch.where(torch.arange(F) % 3 == 1, torch.arange(F) // 3, -1).to(DEVICE, torch.int32)
    S = F // 3 + 1
    return updates.Ghosts(row_F, gaussian(S, D, seed=7), gaussian(S, seed=8), gaussian(S, D, seed=9))


def matrix(p: Problem, value_N: Tensor) -> Tensor:
    """What the pairs hold, as [B, F]; NaN elsewhere."""
    out_BF = torch.full_like(p.f_BF, torch.nan)
    for token, (start, count) in enumerate(zip(p.pairs.start_B.tolist(), p.pairs.count_B.tolist(), strict=True)):
        out_BF[token, p.pairs.feature_N[start : start + count].long()] = value_N[start : start + count]
    return out_BF


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(float(wanted.abs().max()), 1e-30)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("B, D", [(3, 24), (2, 768), (4, 7), (1, 1)])
def test_scaled_inputs_are_those_of_codes(B: int, D: int) -> None:
    x_BD, b_dec_D = gaussian(B, D), gaussian(D, seed=1)
    x_BD[-1] = b_dec_D + 1e-6 / D
    inputs_BD, scaled_BK = torch.empty_like(x_BD), torch.zeros(B, D + 8, dtype=HALF, device=DEVICE)
    kernels.scale_inputs(x_BD, b_dec_D, inputs_BD, scaled_BK)
    assert torch.equal(inputs_BD, x_BD - b_dec_D)
    wanted = nominating_inputs(inputs_BD, HALF)
    torch.testing.assert_close(scaled_BK, wanted, rtol=torch.finfo(HALF).eps, atol=0)


@pytest.mark.parametrize("B, F", [(1, 1), (3, 31), (3, 32), (4, 33), (2, 1000), (2, 9000)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_compact_lists_what_is_above_zero(B: int, F: int, density: float) -> None:
    product_BF = torch.rand(B, F, generator=torch.Generator().manual_seed(F)).sub(1 - density).to(DEVICE, HALF)
    pairs, frozen = kernels.Pairs(B, F, B * F, DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    kernels.compact(product_BF, pairs, frozen, 1)
    for row_F, start, count in zip(product_BF, pairs.start_B.tolist(), pairs.count_B.tolist(), strict=True):
        assert torch.equal(pairs.feature_N[start : start + count].long(), (row_F > 0).nonzero()[:, 0])
    spans = sorted(zip(pairs.start_B.tolist(), pairs.count_B.tolist(), strict=True))
    assert all(a + n <= b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert int(pairs.cursor) == int((product_BF > 0).sum()) and not frozen.any()


def test_compact_freezes_when_pairs_do_not_fit_and_writes_nothing_beyond() -> None:
    pairs, frozen = kernels.Pairs(3, 40, 60, DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    whole_N = torch.full((80,), -7, dtype=torch.int32, device=DEVICE)
    pairs.feature_N = whole_N[:60]
    for step in (5, 6):
        kernels.compact(torch.ones(3, 40, dtype=HALF, device=DEVICE), pairs, frozen[:1], step)
    assert frozen.tolist() == [5, 0] and int(pairs.cursor) == 120
    assert sorted(pairs.count_B.tolist()) == [0, 0, 40] and bool((whole_N[60:] == -7).all())


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("B, D, F, shift", SHAPES)
def test_decode(B: int, D: int, F: int, shift: float, normalised: bool) -> None:
    p = problem(B, D, F, shift, normalised=normalised)
    x_hat_BD, figures_2B = kernels.decode(p.x_BD, p.inputs_BD, p.b_dec_D, p.weights, p.pairs)
    wanted_BD = p.f_BF @ multiplied(p.weights) + p.b_dec_D
    close(x_hat_BD, wanted_BD)
    close(figures_2B[0], p.f_BF @ l1_F(p.weights, 1.0))
    close(figures_2B[1], (wanted_BD - p.x_BD).square().sum(1) / p.x_BD.square().sum(1))
    listed_BF = matrix(p, p.pairs.value_N)
    close(listed_BF.nan_to_num(0), p.f_BF)
    assert bool(((listed_BF == 0) | (p.f_BF > 0) | listed_BF.isnan()).all())


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("B, D, F, shift", SHAPES)
def test_slopes(B: int, D: int, F: int, shift: float, normalised: bool) -> None:
    p = problem(B, D, F, shift, normalised=normalised)
    through(p, 0.3)
    close(matrix(p, p.pairs.slope_N).nan_to_num(0), slopes_BF(p, 0.3))


@pytest.mark.parametrize("B, D, F, shift", SHAPES)
def test_pairs_are_in_the_order_of_features_and_added_up(B: int, D: int, F: int, shift: float) -> None:
    p = problem(B, D, F, shift)
    sums = through(p, 0.3)
    feature_N, token_N = (p.f_BF.T > 0).nonzero(as_tuple=True)
    assert torch.equal(sums.key_N[: len(feature_N)].long(), feature_N * B + token_N)
    assert bool((sums.key_N[len(feature_N) :] == p.pairs.none).all())
    assert torch.equal(sums.ends_F1.diff(), (p.f_BF > 0).sum(0, dtype=torch.int32))
    listed_BF = torch.zeros_like(p.f_BF)
    listed_BF[token_N, feature_N] = p.pairs.value_N[sums.order_N[: len(feature_N)]]
    close(listed_BF, p.f_BF)
    close(sums.f_F, p.f_BF.sum(0))
    close(sums.slope_F, slopes_BF(p, 0.3).sum(0))


def test_keys_of_64_bits_where_32_would_overflow() -> None:
    """The same pairs, as if they were among 2^31."""
    p = problem(5, 24, 70, SOMETIMES)
    narrow = through(p, 0.3)
    p.pairs.key_N, p.pairs.none = p.pairs.key_N.long(), 2**63 - 1
    p.pairs.key_N.fill_(p.pairs.none)
    p.pairs.bounds_F1 = p.pairs.bounds_F1.long()
    wide = through(p, 0.3)
    assert torch.equal(wide.ends_F1, narrow.ends_F1)
    assert torch.equal(wide.key_N[: wide.ends_F1[-1]], narrow.key_N[: wide.ends_F1[-1]].long())
    assert torch.equal(wide.slope_F, narrow.slope_F)


def test_the_gradient_of_b_enc_has_the_ghosts_in_it() -> None:
    p = problem(5, 24, 70, SOMETIMES)
    ghosts = dead(p)
    found_F = through(p, 0.3, ghosts).slope_F
    extra_F = torch.where(ghosts.row_F >= 0, ghosts.b_enc_S[ghosts.row_F.clamp(min=0).long()], 0)
    close(found_F, slopes_BF(p, 0.3).sum(0) + extra_F)


def test_count() -> None:
    since_F, window_F = torch.arange(300, device=DEVICE), torch.arange(300, device=DEVICE) * 2
    fires_F = torch.arange(300, device=DEVICE) % 4
    ends_F1 = torch.cat([fires_F.new_zeros(1), fires_F.cumsum(0)]).int()
    for frozen in (0, 7):
        updates.count(ends_F1, since_F, window_F, torch.tensor([frozen], device=DEVICE))
    assert torch.equal(since_F, torch.where(fires_F > 0, 0, torch.arange(300, device=DEVICE) + 1))
    assert torch.equal(window_F, torch.arange(300, device=DEVICE) * 2 + fires_F)


class Optimised:
    """A tensor under torch.optim.Adam, with a history, and the same under ours."""

    def __init__(self, start: Tensor, gradient: Tensor) -> None:
        """`start` is ours; `gradient` is what torch's gets in the second step."""
        self.theirs = start.clone()
        adam = torch.optim.Adam([self.theirs], lr=0.01)
        self.theirs.grad = gaussian(*start.shape, seed=10)
        adam.step()
        start.copy_(self.theirs)
        state = adam.state[self.theirs]
        self.ours = (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
        self._adam, self._gradient = adam, gradient

    def compare(self, found: Tensor) -> None:
        self.theirs.grad = self._gradient
        self._adam.step()
        close(found, self.theirs)
        state = self._adam.state[self.theirs]
        close(self.ours[0], state["exp_avg"])
        close(self.ours[1], state["exp_avg_sq"])


SECOND = updates.Adam(0.01 / (1 - 0.9**2), (1 - 0.999**2) ** 0.5, 0.9, 0.999, 1e-8)


@pytest.mark.parametrize("with_ghosts", [False, True])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("B, D, F, shift", SHAPES)
def test_update_of_the_decoder(B: int, D: int, F: int, shift: float, normalised: bool, with_ghosts: bool) -> None:
    p = problem(B, D, F, shift, normalised=normalised)
    ghosts = dead(p) if with_ghosts else None
    sums = through(p, 0.3, ghosts)
    gradient_FD = p.f_BF.T @ p.grad_BD
    if ghosts is not None:
        gradient_FD[1::3] += ghosts.W_dec_SD[: len(gradient_FD[1::3])]
    optimised = Optimised(p.weights.W_dec_FD, gradient_FD)
    if normalised:
        optimised.theirs.copy_(normalize(optimised.theirs))
        remove_parallel(gradient_FD, optimised.theirs)
    else:
        gradient_FD += (0.3 * p.f_BF.sum(0) / p.weights.W_dec_FD.norm(dim=1))[:, None] * p.weights.W_dec_FD
    updates.update_decoder(p.weights, optimised.ours, sums, SECOND, 0.3, p.frozen)
    optimised.compare(p.weights.W_dec_FD)


@pytest.mark.parametrize("with_ghosts", [False, True])
@pytest.mark.parametrize("B, D, F, shift", SHAPES)
def test_update_of_the_encoder(B: int, D: int, F: int, shift: float, with_ghosts: bool) -> None:
    p = problem(B, D, F, shift)
    ghosts = dead(p) if with_ghosts else None
    sums = through(p, 0.3, ghosts)
    gradient_FD = slopes_BF(p, 0.3).T @ p.inputs_BD
    if ghosts is not None:
        gradient_FD[1::3] += ghosts.W_enc_SD[: len(gradient_FD[1::3])]
    W, b = Optimised(p.weights.W_enc_FD, gradient_FD), Optimised(p.weights.b_enc_F, sums.slope_F.clone())
    scaled_FK = torch.zeros(F, D + 8, dtype=HALF, device=DEVICE)
    updates.update_encoder(p.weights, scaled_FK, W.ours, b.ours, sums, SECOND, p.frozen)
    W.compare(p.weights.W_enc_FD)
    b.compare(p.weights.b_enc_F)
    wanted_FK = nominating_weights(p.weights.W_enc_FD, p.weights.b_enc_F, HALF)
    torch.testing.assert_close(scaled_FK, wanted_FK, rtol=torch.finfo(HALF).eps, atol=1e-6)


def test_updates_of_features_with_whole_blocks_of_pairs() -> None:
    """Features 0 and 2 have more than BLOCK pairs, 1 a few, 3 exactly BLOCK."""
    p = problem(150, 6, 4, ALWAYS)
    assert updates.BLOCK == 128
    p.weights.b_enc_F.copy_(torch.tensor([50.0, -3, 50, 50]))
    p.inputs_BD[128:, 0] = -1e6
    p.inputs_BD[:128, 0] = 0
    p.weights.W_enc_FD[:, 0] = torch.tensor([0.0, 0, 0, 1])
    p.f_BF.copy_(torch.addmm(p.weights.b_enc_F, p.inputs_BD, p.weights.W_enc_FD.T).relu())
    sums = through(p, 0.3)
    assert (sums.ends_F1.diff() >= 128).tolist() == [True, False, True, True] and sums.ends_F1.diff()[3] == 128
    W = Optimised(p.weights.W_enc_FD, slopes_BF(p, 0.3).T @ p.inputs_BD)
    b, scaled_FK = Optimised(p.weights.b_enc_F, sums.slope_F.clone()), torch.zeros(4, 14, dtype=HALF, device=DEVICE)
    updates.update_encoder(p.weights, scaled_FK, W.ours, b.ours, sums, SECOND, p.frozen)
    W.compare(p.weights.W_enc_FD)
    gradient_FD = p.f_BF.T @ p.grad_BD
    decoder = Optimised(p.weights.W_dec_FD, gradient_FD)
    decoder.theirs.copy_(normalize(decoder.theirs))
    remove_parallel(gradient_FD, decoder.theirs)
    updates.update_decoder(p.weights, decoder.ours, sums, SECOND, 0.3, p.frozen)
    decoder.compare(p.weights.W_dec_FD)


def test_rows_that_cannot_be_scaled_nominate_all() -> None:
    p = problem(5, 24, 70, NEVER)
    p.weights.W_enc_FD[3] = 0
    p.weights.b_enc_F[4] = 1e9
    frozen_moments = [torch.zeros_like(tensor) for tensor in (*p.weights[:2], *p.weights[:2])]
    scaled_FK = torch.zeros(70, 32, dtype=HALF, device=DEVICE)
    W_moments, b_moments = tuple(frozen_moments[::2]), tuple(frozen_moments[1::2])
    updates.update_encoder(p.weights, scaled_FK, W_moments, b_moments, through(p, 0.3), SECOND, p.frozen)  # type: ignore[arg-type]
    assert torch.equal(scaled_FK[3:5], nominating_weights(p.weights.W_enc_FD, p.weights.b_enc_F, HALF)[3:5])
    assert bool((scaled_FK[3:5, 24] > 1000).all()) and not scaled_FK[3:5, :24].any()


@pytest.mark.parametrize("D", [1, 24, 768])
def test_update_of_the_bias(D: int) -> None:
    b_dec_D, output_D, input_D = (gaussian(D, seed=seed) for seed in range(3))
    optimised = Optimised(b_dec_D, output_D - input_D)
    updates.update_bias(b_dec_D, optimised.ours, output_D, input_D, SECOND, NOT_FROZEN)
    optimised.compare(b_dec_D)


def test_nothing_changes_while_frozen() -> None:
    p = problem(5, 24, 70, SOMETIMES)
    sums = through(p, 0.3)
    scaled_FK = gaussian(70, 32).to(HALF)
    W, b, d = (tuple(gaussian(*t.shape) for _ in range(2)) for t in (sums.blocks_2CD[0], p.weights.b_enc_F, p.b_dec_D))
    W = (gaussian(70, 24), gaussian(70, 24, seed=1).abs())
    state = [*p.weights[:3], p.b_dec_D, scaled_FK, *W, *b, *d]
    before = [tensor.clone() for tensor in state]
    p.frozen.fill_(3)
    updates.update_decoder(p.weights, W, sums, SECOND, 0.3, p.frozen)
    updates.update_encoder(p.weights, scaled_FK, W, b, sums, SECOND, p.frozen)  # type: ignore[arg-type]
    updates.update_bias(p.b_dec_D, d, p.grad_BD[0], p.grad_BD[1], SECOND, p.frozen)  # type: ignore[arg-type]
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))


def test_same_batch_same_bits_wherever_the_pairs_lie() -> None:
    """On a GPU tokens reserve their place in any order."""
    p = problem(6, 24, 70, SOMETIMES)
    sums = through(p, 0.3)
    start_B, count_B = p.pairs.start_B.tolist(), p.pairs.count_B.tolist()
    feature_N, at = p.pairs.feature_N.clone(), 0
    for token in (3, 1, 5, 0, 4, 2):
        p.pairs.feature_N[at : at + count_B[token]] = feature_N[start_B[token] : start_B[token] + count_B[token]]
        p.pairs.start_B[token] = at
        at += count_B[token]
    again = through(p, 0.3)
    assert torch.equal(again.key_N, sums.key_N) and torch.equal(again.slope_F, sums.slope_F)
    assert torch.equal(again.f_F, sums.f_F)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

class NoDevice:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

def compile_only(*, fn, compile, **others):
    source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
    options = {key: compile[key] for key in ("num_warps", "num_stages")}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(fn.jit_function.__name__)
    return True

driver.set_active(NoDevice())
triton.knobs.runtime.jit_cache_hook = compile_only
from saezoo.trainers import kernels, updates

B, D, F, device = 256, 768, 1024, torch.device("cpu")
kernels.tiles = updates.tiles = lambda D, device, tiles=kernels.tiles: tiles(D, torch.device("cuda"))
x, b, bs, Ws = torch.zeros(B, D), torch.zeros(D), (torch.zeros(F),) * 2, (torch.zeros(F, D),) * 2
frozen, counts = torch.zeros(2, dtype=torch.int64)[1:], torch.zeros(F, dtype=torch.int64)
scaled, adam = torch.zeros(F, D + 8).half(), updates.Adam(0.1, 0.1, 0.9, 0.999, 1e-8)
pairs = kernels.Pairs(B, F, 1024, device)
kernels.scale_inputs(x, b, x, scaled)
kernels.compact(torch.zeros(B, F).half(), pairs, frozen, 1)
for normalised in (True, False):
    weights = kernels.Weights(Ws[0], bs[0], Ws[0], normalised)
    kernels.decode(x, x, b, weights, pairs)
    kernels.slopes(x, weights, pairs, 0.1)
    for ghosts in (None, updates.Ghosts(torch.zeros(F).int(), x, b, x)):
        sums = updates.add_up(pairs, x, x, ghosts)
        updates.update_decoder(weights, Ws, sums, adam, 0.1, frozen)
        updates.update_encoder(weights, scaled, Ws, bs, sums, adam, frozen)
updates.count(sums.ends_F1, counts, counts, frozen)
updates.update_bias(b, (b, b), b, b, adam, frozen)
"""


def test_every_kernel_compiles_for_the_h200_on_any_machine() -> None:
    """From Triton to machine code of sm_90, at GPT-2 small's width."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    defined = [name for module in (kernels, updates) for name in vars(module) if is_kernel(module, name)]
    assert set(done.stdout.split()) == set(defined)


def is_kernel(module: Any, name: str) -> bool:
    """Those launched, not those that only others call."""
    found = vars(module)[name]
    return isinstance(
        found, triton.runtime.interpreter.InterpretedFunction | triton.runtime.JITFunction
    ) and name not in ("_ones", "_add_pairs", "_sum_feature", "_adam", "_norms")
