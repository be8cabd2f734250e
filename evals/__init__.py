"""Evaluation: `evaluate` measures any number of SAEs of one model in a single pass over the text."""

from saezoo.evals.evaluate import Subject, evaluate

__all__ = ["Subject", "evaluate"]
