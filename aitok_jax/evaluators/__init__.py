"""Evaluation of a task on a whole data set: flat names to numbers."""

from __future__ import annotations

from typing import Any

from aitok_jax.evaluators import maps, objects, reconstruction

EVALUATORS = {"depth": maps.evaluate, "objects": objects.evaluate, "masks": reconstruction.evaluate}


def evaluate(task: Any, *args: Any, baseline: bool = False, **options: Any) -> dict[str, float]:
    """Evaluates with the evaluator of the task's kind, which see; only depth has a baseline."""
    if task.evaluator == "depth":
        options["baseline"] = baseline
    return EVALUATORS[task.evaluator](task, *args, **options)
