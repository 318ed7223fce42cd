"""Evaluation of a part on a whole data set: flat names to numbers."""

from typing import Any

from aitok_jax.evaluators import maps, objects, reconstruction
from aitok_jax.evaluators.batches import Evaluation

EVALUATORS = {"maps": maps.evaluate, "objects": objects.evaluate, "masks": reconstruction.evaluate}


def evaluate(part: Any, *args: Any, **options: Any) -> dict[str, float]:
    """Evaluates with the evaluator of the part's kind, which see; the arguments are those of `Evaluation`."""
    return EVALUATORS[part.kind](Evaluation(part, *args, **options))
