"""Evaluation of a part on a whole data set: flat names to numbers."""

from typing import Any

from aitok_jax.evaluators import maps, objects, reconstruction
from aitok_jax.evaluators.batches import Evaluation

_NAMES = {"maps": maps.metric_names, "objects": objects.metric_names, "masks": reconstruction.metric_names}
EVALUATORS = {"maps": maps.evaluate, "objects": objects.evaluate, "masks": reconstruction.evaluate}


def evaluate(part: Any, *args: Any, **options: Any) -> dict[str, float]:
    """Evaluates with the evaluator of the part's kind, which see; the arguments are those of `Evaluation`."""
    return EVALUATORS[part.kind](Evaluation(part, *args, **options))


def metric_names(part: Any) -> tuple[str, ...]:
    """The metrics that an evaluation of a part always has, without their prefix."""
    return tuple(_NAMES[part.kind](part))


def check_data(part: Any, data: Any) -> None:
    """ValueError where an evaluation would have nothing to measure on, or training nothing to learn from."""
    if part.kind == "maps":
        maps.check_data(part, data)
