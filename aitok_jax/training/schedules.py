"""Learning-rate schedules, those of the published system among them.

A schedule is a function of the number of updates made so far, an integer or an int32 array, and gives the learning rate
of the next update as a float32 scalar.
"""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

OPTIONS = {
    "constant": {},
    "step": {"boundaries": tuple[int, ...], "factor": float},
    "linear": {"end_factor": float},
    "exponential": {"factor": float, "every": int, "steps_per_epoch": int},
    "cosine": {"end_factor": float, "lag": int},
}
"""What each schedule may have besides its name, with types (see `config.typed`)."""


def make_schedule(optim: ConfigDict, train_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      optim: `learning_rate`, `warmup_steps`, `warmup_ratio` and `schedule`, whose `name` is one of
        'constant';
        'step': times `factor` (0.1) from each of the steps `boundaries` on;
        'linear': to `end_factor` (0.01) of the learning rate over `train_steps`;
        'exponential': times `factor` (0.98) every `every` (500) steps. With `steps_per_epoch` > 0 it also counts one
          after iteration 0 of each epoch and then every `every` iterations, as one published tokenizer does;
        'cosine': to `end_factor` (0) over `train_steps`; `lag` (0) updates behind the step (published: 1).
      train_steps: length of the run in updates.

    The warm-up goes linearly from `warmup_ratio` to 1 over `warmup_steps`. It multiplies the schedule's value (mmcv),
    but the cosine's warm-up takes the schedule's place (timm).

    Raises:
      ValueError: unknown schedule, unknown key, or numbers out of range.
    """
    options = dict(optim.schedule)
    name = options.pop("name", None)
    shape = _schedule_factor(name, options, train_steps)
    lag = int(options.pop("lag", 0)) if name == "cosine" else 0
    if options:
        raise ValueError(
            f"optim.schedule {name!r} has no option {sorted(options)}; remove it, as in "
            f"--config.optim.schedule='{{name: {name}}}'"
        )
    warmup_steps, ratio = int(optim.warmup_steps), float(optim.warmup_ratio)
    if warmup_steps < 0 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"optim.warmup_steps={warmup_steps} must be >= 0 and optim.warmup_ratio={ratio} within 0..1")
    peak = float(optim.learning_rate)

    def schedule(step):
        step = jnp.maximum(jnp.asarray(step, jnp.int32) - lag, 0)
        factor = shape(step)
        if warmup_steps:
            warmup = ratio + (1.0 - ratio) * step / warmup_steps
            warmed = warmup if name == "cosine" else warmup * factor
            factor = jnp.where(step < warmup_steps, warmed, factor)
        return jnp.asarray(peak * factor, jnp.float32)

    return schedule


def _schedule_factor(name: str, options: dict, train_steps: int) -> optax.Schedule:
    """The schedule without warm-up as a share of the learning rate; takes its options out of `options`.

    Differences from the end are made in integers, so that the last steps keep float32's full precision.
    """
    if name == "constant":
        return lambda step: jnp.ones((), jnp.float32)
    if name == "step":
        if "boundaries" not in options:
            raise ValueError("optim.schedule.boundaries must be given, the steps that the learning rate falls at")
        boundaries, factor = tuple(options.pop("boundaries")), float(options.pop("factor", 0.1))
        if list(boundaries) != sorted(set(boundaries)):
            raise ValueError(f"optim.schedule.boundaries={boundaries} must increase")
        values = jnp.asarray([factor**k for k in range(len(boundaries) + 1)], jnp.float32)
        return lambda step: values[sum((step >= b).astype(jnp.int32) for b in boundaries) if boundaries else 0]
    if name == "linear":
        end = float(options.pop("end_factor", 0.01))
        return lambda step: end + (1.0 - end) * jnp.maximum(train_steps - step, 0) / train_steps
    if name == "exponential":
        factor, every = float(options.pop("factor", 0.98)), int(options.pop("every", 500))
        per_epoch = int(options.pop("steps_per_epoch", 0))
        if factor <= 0 or every < 1:
            raise ValueError(f"optim.schedule: factor={factor} must be > 0 and every={every} >= 1")
        return lambda step: jnp.exp(_decays(step, every, per_epoch) * math.log(factor))
    if name == "cosine":
        end = float(options.pop("end_factor", 0.0))
        half = math.pi / (2 * train_steps)
        return lambda step: end + (1.0 - end) * jnp.sin(half * jnp.maximum(train_steps - step, 0)) ** 2
    raise ValueError(f"optim.schedule.name={name!r} is unknown; use one of {tuple(OPTIONS)}")


def _decays(step: jax.Array, every: int, per_epoch: int) -> jax.Array:
    """How often an exponential schedule has decayed before update `step`."""
    if not per_epoch:
        return step // every
    epoch, iteration = step // per_epoch, step % per_epoch
    return epoch * math.ceil(per_epoch / every) + (iteration + every - 1) // every
