"""Gradient accumulation: a batch as several micro-batches, one after the other, in the memory of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aitok_jax.parallel import sharding

Gradient = Callable[..., tuple[tuple[jax.Array, tuple[dict[str, jax.Array], Any]], Any]]


def value_and_grad(task: Any, micro_batches: int, mesh: Mesh, shardings: Any) -> Gradient:
    """(params, model_state, batch, rng) -> ((loss, (metrics, model_state)), gradient), as `jax.value_and_grad` has it.

    Loss, metrics and gradient are means over the micro-batches. That is exact, but for rounding, for losses that are
    means over the examples. Not exact are losses over what the examples have different amounts of, annotated pixels or
    real objects (every micro-batch then counts the same, however many it has), SiLog (a root over a whole batch),
    batch normalisation, and the logged perplexity and usage of a codebook. Every micro-batch draws numbers of its own.

    Args:
      task: has `loss`; where it has `open_step` and `close_step` too, they come before and after the micro-batches and
        make what is summed over a batch exact (the EMA codebook).
      micro_batches: 1 is the plain gradient. Divides the batch's part of every device; micro-batch i holds the rows
        i, i + micro_batches, ... so that no row leaves its device.
      mesh: of the batch.
      shardings: of the parameters, and so of the gradient, which no device ever holds as a whole.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)

    def sharded(grads):
        return jax.lax.with_sharding_constraint(grads, shardings)

    def whole(params, model_state, batch, rng):
        result, grads = gradient(params, model_state, batch, rng)
        return result, sharded(grads)

    def accumulated(params, model_state, batch, rng):
        def add(carry, numbered):
            total, model_state = carry
            index, part = numbered
            (loss, (metrics, model_state)), grads = gradient(params, model_state, part, jax.random.fold_in(rng, index))
            return (sharded(jax.tree.map(jnp.add, total, grads)), model_state), (loss, metrics)

        parts = jax.tree.map(lambda x: _split(x, micro_batches, mesh), batch)
        opened = task.open_step(model_state) if hasattr(task, "open_step") else model_state
        start = (sharded(jax.tree.map(jnp.zeros_like, params)), opened)
        (total, model_state), each = jax.lax.scan(add, start, (jnp.arange(micro_batches), parts))
        if hasattr(task, "close_step"):
            model_state = task.close_step(model_state)
        loss, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), each)
        return (loss, (metrics, model_state)), jax.tree.map(lambda g: g / micro_batches, total)

    return whole if micro_batches == 1 else accumulated


def _split(rows: jax.Array, micro_batches: int, mesh: Mesh) -> jax.Array:
    """[B, ...] -> [micro_batches, B / micro_batches, ...], split over the devices along its second axis."""
    parts = rows.reshape(-1, micro_batches, *rows.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, sharding.AXES)))
