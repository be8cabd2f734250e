"""Evaluation: `evaluate` measures any number of SAEs of one model in a single pass over the text."""

from saezoo.evals.evaluate import evaluate
from saezoo.evals.tally import Subject

__all__ = ["Subject", "evaluate"]
