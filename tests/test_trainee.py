"""The training step against the training function of February 2024 (tests/golden/train_feb2024.*)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saezoo.entries import Recipe
from saezoo.registry import read_registry
from saezoo.trainers.trainee import Parameters, Product, State, StepLog, Trainee, initial_parameters

Ghost = Literal["off", "bug", "fixed"]

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f64": torch.float64}
GHOSTS: dict[str, Ghost] = {"off": "off", "buggy": "bug", "fixed": "fixed"}
MOMENTS = ("exp_avg", "exp_avg_sq")
SAVED = (1, 10, 30, 50, 100, 150, 200, 250, 300)


class Run(NamedTuple):
    """A repetition of one recorded run."""

    logs: list[StepLog]
    parameters: dict[int, Parameters]
    """After each saved step."""
    since_fired: Tensor
    """[steps, F]"""
    log_sparsity: list[Tensor]
    """Of each window, in order."""
    trainee: Trainee


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "train_feb2024.safetensors")


def recipe(ghost: Ghost = "off", **changes: Any) -> Recipe:
    base = read_registry().recipe("feb2024")
    sizes: dict[str, Any] = {"lr": 0.002, "l1_coefficient": 0.012, "dead_after_steps": 20, "sampling_window_steps": 50}
    return dataclasses.replace(base, ghost=ghost, **{**sizes, **changes})


def fresh(golden: dict[str, Tensor], ghost: Ghost, dtype: torch.dtype, product: Product = "dense") -> Trainee:
    start = (golden["in.b_dec_init" if name == "b_dec" else f"in.{name}"] for name in Parameters._fields)
    parameters = Parameters(*(tensor.to(dtype) for tensor in start))
    return Trainee(parameters, recipe(ghost), product=product, dense_above=1.0)


def copied(parameters: Parameters) -> Parameters:
    return Parameters(*(parameter.detach().clone() for parameter in parameters))


def repeat(
    golden: dict[str, Tensor], variant: str, precision: str, product: Product = "dense", steps: int = 300
) -> Run:
    trainee = fresh(golden, GHOSTS[variant], DTYPES[precision], product)
    logs: list[StepLog] = []
    parameters: dict[int, Parameters] = {}
    since_fired: list[Tensor] = []
    windows: list[Tensor] = []
    for step, x_BD in enumerate(golden["in.X"][:steps].to(DTYPES[precision]), start=1):
        logs.append(trainee.step(x_BD))
        since_fired.append(trainee.since_fired_F.clone())
        if step in SAVED:
            parameters[step] = copied(trainee.parameters)
        if step % 50 == 0:
            assert trainee.log_sparsity_F is not None
            windows.append(trainee.log_sparsity_F)
    return Run(logs, parameters, torch.stack(since_fired), windows, trainee)


@pytest.fixture(
    scope="module",
    params=[f"{run} {way}" for run in ("off.f64", "off.f32", "buggy.f64", "buggy.f32") for way in get_args(Product)],
)
def repeated(request: pytest.FixtureRequest, golden: dict[str, Tensor]) -> tuple[str, float, Run]:
    """Name of the recorded run, the tolerance that the golden data allow it, and our repetition."""
    name, product = request.param.split()
    variant, precision = name.split(".")
    return name, 1e-9 if precision == "f64" else 1e-4, repeat(golden, variant, precision, product)


def worst_relative(found: Parameters, golden: dict[str, Tensor], prefix: str) -> float:
    wanted = [golden[f"{prefix}.{name}"] for name in Parameters._fields]
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


def test_weights_are_those_of_2024_at_every_saved_step(
    golden: dict[str, Tensor], repeated: tuple[str, float, Run]
) -> None:
    name, tolerance, run = repeated
    for step in SAVED:
        assert worst_relative(run.parameters[step], golden, f"{name}.step{step:03d}") < tolerance, step


def test_firing_counters_are_identical(golden: dict[str, Tensor], repeated: tuple[str, float, Run]) -> None:
    name, _, run = repeated
    assert torch.equal(run.since_fired, golden[f"{name}.steps_since_fired"].long())


def test_losses_of_every_step(golden: dict[str, Tensor], repeated: tuple[str, float, Run]) -> None:
    name, tolerance, run = repeated
    found = torch.tensor([[float(loss) for loss in log.losses] for log in run.logs], dtype=torch.float64)
    torch.testing.assert_close(found, golden[f"{name}.losses"], rtol=tolerance, atol=0)


def test_l0_and_explained_variance_and_ghosts_of_every_step(
    golden: dict[str, Tensor], repeated: tuple[str, float, Run]
) -> None:
    name, tolerance, run = repeated
    l0 = torch.tensor([float(log.l0) for log in run.logs], dtype=torch.float64)
    explained = torch.tensor([float(log.explained_variance_uncentred) for log in run.logs], dtype=torch.float64)
    assert torch.equal(l0, golden[f"{name}.l0"])
    torch.testing.assert_close(explained, golden[f"{name}.logged"][:, 6], rtol=tolerance, atol=tolerance)
    dead_after_22_steps = [int(log.dead) for log in run.logs[20:22]]
    assert dead_after_22_steps == [0, 7]  # the window of 20 steps is first exceeded in step 22


def test_log_sparsity_of_every_window(golden: dict[str, Tensor], repeated: tuple[str, float, Run]) -> None:
    """The first window covers 49 steps, the later ones 50: a window ends before the forward pass."""
    name, _, run = repeated
    torch.testing.assert_close(torch.stack(run.log_sparsity), golden[f"{name}.log_sparsity"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("product", get_args(Product))
def test_fixed_ghosts_follow_until_rounding_takes_over(golden: dict[str, Tensor], product: Product) -> None:
    """The corrected ghost gradients amplify rounding errors: the golden README says how far two codes can agree."""
    run = repeat(golden, "fixed", "f64", product, steps=50)
    for step, tolerance in ((1, 1e-12), (10, 1e-12), (30, 1e-10), (50, 1e-3)):
        assert worst_relative(run.parameters[step], golden, f"fixed.f64.step{step:03d}") < tolerance, step


def restored(golden: dict[str, Tensor], variant: str, precision: str, step: int) -> Trainee:
    """As the float64 run was after `step`."""
    dtype, prefix = DTYPES[precision], f"{variant}.f64.step{step:03d}"
    trainee = fresh(golden, GHOSTS[variant], dtype)
    tensors = trainee.state().tensors
    for name in Parameters._fields:
        kept = {name: f"{prefix}.{name}"} | {f"{name}.{kind}": f"{prefix}.adam_{kind}.{name}" for kind in MOMENTS}
        for mine, theirs in kept.items():
            tensors[mine] = golden[theirs].T if name == "W_enc" else golden[theirs]
    tensors["since_fired"] = golden[f"{variant}.f64.steps_since_fired"][step - 1]
    state = State(tensors, {**trainee.state().facts, "steps": step})
    trainee.restore(state)
    return trainee


@pytest.mark.parametrize(
    "variant, precision, more, tolerance",
    [
        ("buggy", "f64", 1, 1e-10),
        ("buggy", "f64", 5, 1e-10),
        ("buggy", "f32", 1, 1e-4),
        ("buggy", "f32", 5, 1e-4),
        ("fixed", "f64", 1, 1e-10),
        ("fixed", "f64", 5, 1e-8),
        ("fixed", "f32", 1, 1e-4),
        ("fixed", "f32", 5, 1e-2),
    ],
)
@pytest.mark.parametrize("step", [30, 50, 100])
def test_single_transitions(
    golden: dict[str, Tensor], variant: str, precision: str, step: int, more: int, tolerance: float
) -> None:
    trainee = restored(golden, variant, precision, step)
    for x_BD in golden["in.X"][step : step + more].to(DTYPES[precision]):
        trainee.step(x_BD)
    after = copied(trainee.parameters)
    assert worst_relative(after, golden, f"{variant}.f64.step{step + more:03d}") < tolerance
    assert torch.equal(trainee.since_fired_F, golden[f"{variant}.f64.steps_since_fired"][step + more - 1].long())


@pytest.mark.parametrize("ghost", ["off", "bug", "fixed"])
def test_a_restored_trainee_goes_on_with_the_same_bits(golden: dict[str, Tensor], ghost: Ghost) -> None:
    original = fresh(golden, ghost, torch.float32)
    for x_BD in golden["in.X"][:55]:
        original.step(x_BD)
    saved = original.state()
    other = fresh(golden, ghost, torch.float32)
    other.restore(State({name: tensor.clone() for name, tensor in saved.tensors.items()}, saved.facts))
    for x_BD in golden["in.X"][55:110]:
        original.step(x_BD)
        other.step(x_BD)
    mine, theirs = original.state(), other.state()
    assert mine.facts == theirs.facts
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def test_warm_up_reaches_the_optimiser(golden: dict[str, Tensor]) -> None:
    start = fresh(golden, "off", torch.float32).parameters
    trainee = Trainee(start, recipe(lr=0.01, lr_warmup_steps=4))
    rates = []
    for x_BD in golden["in.X"][:6]:
        trainee.step(x_BD)
        rates.append(trainee.adam.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_initial_parameters() -> None:
    b_dec = torch.arange(24.0)
    parameters = initial_parameters(1500, b_dec, torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in parameters] == [(24, 1500), (1500,), (1500, 24), (24,)]
    bound = (6 / 1500) ** 0.5
    assert float(parameters.W_enc.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(parameters.W_enc.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    torch.testing.assert_close(parameters.W_dec.norm(dim=1), torch.ones(1500))
    assert torch.equal(parameters.b_dec, b_dec) and parameters.b_dec is not b_dec
    assert not parameters.b_enc.any()


def test_the_encoder_can_start_as_the_decoder() -> None:
    parameters = initial_parameters(32, torch.zeros(8), torch.Generator().manual_seed(0), "decoder")
    assert torch.equal(parameters.W_enc, parameters.W_dec.T)


def test_initial_parameters_depend_on_the_generator_alone() -> None:
    starts = [initial_parameters(32, torch.zeros(8), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(starts[0].W_enc, starts[1].W_enc) and torch.equal(starts[0].W_dec, starts[1].W_dec)
    assert not torch.equal(starts[0].W_enc, starts[2].W_enc)


@pytest.mark.parametrize("encoder", ["kaiming", "decoder"])
def test_a_share_of_the_features_starts_as_it_does_in_the_whole(encoder: Literal["kaiming", "decoder"]) -> None:
    def start(features: slice) -> Parameters:
        return initial_parameters(32, torch.zeros(8), torch.Generator().manual_seed(3), encoder, features)

    whole, parts = start(slice(None)), [start(slice(0, 8)), start(slice(8, 32))]
    assert torch.equal(torch.cat([part.W_enc for part in parts], dim=1), whole.W_enc)
    assert torch.equal(torch.cat([part.W_dec for part in parts]), whole.W_dec)
