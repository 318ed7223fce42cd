"""Evaluation of a task on a whole data set: flat names to numbers."""

from aitok_jax.evaluators.depth import evaluate

__all__ = ["evaluate"]
