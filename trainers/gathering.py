"""A run as one set of tensors, whatever ranks it is spread over: for checkpoints that any number of ranks resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saezoo.activations import ActivationBuffer
from saezoo.checkpoint import Checkpoint
from saezoo.entries import Recipe
from saezoo.errors import TrainingError
from saezoo.ranks import Ranks, first_line
from saezoo.trainers.trainee import Parameters, Product, State, Trainee

_WHOLE = ("b_dec", "b_dec.exp_avg", "b_dec.exp_avg_sq")
"""Held whole by every rank; all other tensors of a trainee are [F, …] and are put end to end."""
_BUFFER = ("storage", "served")


def run_state(
    trainees: Sequence[Trainee], buffer: ActivationBuffer, generator: torch.Generator, ranks: Ranks
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Tensors and facts of the whole run, by names that do not depend on the ranks; None but on rank 0."""
    mine = _flat(trainees)
    if ranks.rank == 0 or not ranks.shares_features:  # ranks that share features have the same buffer
        mine |= {f"buffer.{key}": value for key, value in buffer.state().items()}
    found = ranks.collect(mine, _facts(trainees))
    if found is None:
        return None, {}
    tensors = {"generator": generator.get_state()}
    for name in (f"buffer.{key}" for key in _BUFFER):
        tensors[name] = _end_to_end([theirs.pop(name) for theirs, _ in found if name in theirs], 1)
    states = _joined(found, ranks)
    tensors |= {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.tensors.items()}
    return tensors, {"trainees": [state.facts for state in states]}


def whole_trainees(recipe: Recipe, product: Product, trainees: Sequence[Trainee], ranks: Ranks) -> list[Trainee]:
    """On rank 0, every SAE with all its features, on its device; [] elsewhere."""
    if ranks.size == 1:
        return list(trainees)
    found = ranks.collect(_flat(trainees), _facts(trainees))
    device = trainees[0].b_dec_D.device
    whole: list[Trainee] = []
    for state in [] if found is None else _joined(found, ranks):
        tensors = {key: tensor.to(device) for key, tensor in state.tensors.items()}
        parameters = Parameters(tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
        whole.append(Trainee(parameters, recipe, product=product))
        whole[-1].restore(state)
    return whole


def restore(
    saved: Checkpoint,
    trainees: Sequence[Trainee],
    buffer: ActivationBuffer,
    generator: torch.Generator,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Put this rank's part of a checkpoint back."""
    generator.set_state(saved.tensors["generator"])
    numbers = ranks.entries(range(len(saved.facts["trainees"])))
    layers = slice(numbers[0], numbers[-1] + 1)
    buffer.restore({key: saved.tensors[f"buffer.{key}"][:, layers] for key in _BUFFER}, device)
    for number, trainee in zip(numbers, trainees, strict=True):
        tensors = {key: saved.tensors[f"{number}.{key}"] for key in _names(saved.tensors, number)}
        features = ranks.features(len(tensors["b_enc"]))
        part = {key: tensor if key in _WHOLE else tensor[features] for key, tensor in tensors.items()}
        trainee.restore(State(part, saved.facts["trainees"][number]))


@contextlib.contextmanager
def watch(ranks: Ranks) -> Iterator[None]:
    """One clear line, instead of a traceback, on the ranks that wait for one that died."""
    try:
        yield
    except RuntimeError as error:
        if ranks.size == 1 or not _is_of_a_collective(error):
            raise
        raise TrainingError(
            f"rank {ranks.rank}: another rank has ended or does not answer ({first_line(error)}); unless that rank says"
            " otherwise, the same command with --resume goes on from the last checkpoint"
        ) from None


def _is_of_a_collective(error: RuntimeError) -> bool:
    words = ("gloo", "Connection", "NCCL", "peer", "Timed out", "timeout", "Broken pipe", "Socket")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def _flat(trainees: Sequence[Trainee]) -> dict[str, Tensor]:
    return {f"{i}.{key}": tensor for i, t in enumerate(trainees) for key, tensor in t.state().tensors.items()}


def _facts(trainees: Sequence[Trainee]) -> list[dict[str, Any]]:
    return [trainee.state().facts for trainee in trainees]


def _names(tensors: dict[str, Tensor], number: int) -> list[str]:
    return [key.removeprefix(f"{number}.") for key in tensors if key.startswith(f"{number}.")]


def _joined(found: list[tuple[dict[str, Tensor], Any]], ranks: Ranks) -> list[State]:
    """The SAEs' states, in the order of the job's entries."""
    if not ranks.shares_features:
        return [_state(tensors, facts, i) for tensors, facts in found for i in range(len(facts))]
    states: list[State] = []
    for i, facts in enumerate(found[0][1]):
        parts = [_state(*theirs, i).tensors for theirs in found]
        joined = {
            key: parts[0][key] if key in _WHOLE else _end_to_end([part[key] for part in parts], 0) for key in parts[0]
        }
        density = sum(theirs[i]["density"] for _, theirs in found) / len(found)
        states.append(State(joined, {**facts, "density": density, "block": len(joined["b_enc"])}))
    return states


def _end_to_end(parts: list[Tensor], dim: int) -> Tensor:
    """On the CPU if there are several: all together may be more than rank 0's GPU holds."""
    return parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts], dim)


def _state(tensors: dict[str, Tensor], facts: list[dict[str, Any]], number: int) -> State:
    return State({key: tensors[f"{number}.{key}"] for key in _names(tensors, number)}, facts[number])
