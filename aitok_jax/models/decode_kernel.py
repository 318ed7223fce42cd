"""Attention of one query an image as a Pallas kernel for TPU, which reads what is filled of the cache alone.

On a TPU a product of one row over 32 channels costs what one of eight rows over 256 does. So all heads go together: a
query becomes one row a head, zero outside its head's channels, and keys and values keep all heads side by side in the
lanes. Blocks of keys beyond the filled ones are neither fetched nor looked at (softmax as in arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aitok_jax.models.self_check import difference

LANES, MOST_KEYS, MOST_ROWS = 128, 512, 8
NEVER = -1e30


def padded_length(length: int) -> int:
    """Positions that a cache needs for `length` of them: whole blocks of keys."""
    block = min(MOST_KEYS, -(-length // 16) * 16)
    return -(-length // block) * block


def pack(keys_BhTd: jax.Array, values_BhTd: jax.Array) -> jax.Array:
    """Keys and values [B,heads,T,d] -> [B, `padded_length`, 2·heads·d], keys first, zeros at the end."""
    b, h, t, d = keys_BhTd.shape
    rows = (x.swapaxes(1, 2).reshape(b, t, h * d) for x in (keys_BhTd, values_BhTd))
    return jnp.pad(jnp.concatenate(list(rows), -1), ((0, 0), (0, padded_length(t) - t), (0, 0)))


def empty(batch: int, length: int, dim: int, dtype: jnp.dtype) -> jax.Array:
    """Room for `length` keys and values, as `pack` would give them."""
    return jnp.zeros((batch, padded_length(length), 2 * dim), dtype)


def self_check(interpret: bool = False) -> float:
    """How far the kernel is from the formula on the default device, relative to the largest value."""
    heads, width, length = 8, 32, 600
    rng = np.random.default_rng(0)
    q_BhTd, *keys_values = rng.normal(size=(3, 2, heads, length, width)).astype(np.float32)
    q_Bhd, worst = q_BhTd[:, :, 0], 0.0
    for filled in (1, MOST_KEYS, length):
        with jax.default_matmul_precision("highest"):
            found = attend(
                jnp.asarray(q_Bhd.reshape(2, -1)), pack(*map(jnp.asarray, keys_values)), filled, heads, interpret
            )
            keys, values = (jnp.asarray(x[:, :, :filled]) for x in keys_values)
            weights = jax.nn.softmax(jnp.einsum("bhd,bhkd->bhk", q_Bhd, keys))
            wanted = jnp.einsum("bhk,bhkd->bhd", weights, values).reshape(2, -1)
        worst = max(worst, difference(found, wanted))
    return worst


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def attend(
    q_BD: jax.Array, kv_BTE: jax.Array, length: jax.Array | int, heads: int, interpret: bool = False
) -> jax.Array:
    """softmax(q·kᵀ)·v over the first `length` positions: f32[B,D].

    Args:
        q_BD: scaled queries, the heads side by side.
        kv_BTE: keys and values as `pack` gives them; what lies beyond `length` is finite.
    """
    b, d = q_BD.shape
    t = kv_BTE.shape[1]
    block, rows = min(MOST_KEYS, t), min(MOST_ROWS, b)

    def filled(i, j, length):
        return i, jnp.minimum(j, jax.lax.div(length[0] - 1, block)), 0

    one = pl.BlockSpec((rows, d), lambda i, j, _: (i, 0))
    return pl.pallas_call(
        functools.partial(_kernel, d // heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(b, rows), t // block),
            in_specs=[one, pl.BlockSpec((rows, block, 2 * d), filled)],
            out_specs=one,
            scratch_shapes=[pltpu.VMEM((rows, heads, n), jnp.float32) for n in (d, LANES, LANES)],
        ),
        out_shape=jax.ShapeDtypeStruct((b, d), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * d * heads,
            transcendentals=b * t * heads,
            bytes_accessed=kv_BTE.size * kv_BTE.dtype.itemsize,
        ),
        interpret=interpret,
        name=f"decode_attention_{pl.cdiv(b, rows)}x{t // block}",
    )(jnp.asarray(length, jnp.int32).reshape(1), q_BD.astype(jnp.float32), kv_BTE)


def _kernel(width: int, length_ref, q_ref, kv_ref, out_ref, sum_ref, top_ref, total_ref) -> None:
    """Of `rows` queries: sum_ref [rows,heads,D], weighted by exp(logit − top); top_ref and total_ref in all lanes."""
    rows, heads, d = sum_ref.shape
    block, j = kv_ref.shape[1], pl.program_id(1)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (heads, d), axis) for axis in (0, 1))
    own = row == jax.lax.div(lane, width)

    @pl.when(j == 0)
    def _():
        sum_ref[...], total_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(total_ref)
        top_ref[...] = jnp.full_like(top_ref, NEVER)

    def look(i, _):
        q = jnp.where(own, jnp.broadcast_to(q_ref[pl.ds(i, 1), :], (heads, d)), 0.0).astype(kv_ref.dtype)
        logits = _dot(q, kv_ref[i, :, :d], 1)
        position = j * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(position < length_ref[0], logits, NEVER)
        before = top_ref[i, :, :1]
        top = jnp.maximum(before, jnp.max(logits, -1, keepdims=True))
        weights, kept = jnp.exp(logits - top), jnp.exp(before - top)
        top_ref[i] = jnp.broadcast_to(top, (heads, LANES))
        total_ref[i] = total_ref[i] * kept + jnp.sum(weights, -1, keepdims=True)
        sum_ref[i] = sum_ref[i] * kept + _dot(weights.astype(kv_ref.dtype), kv_ref[i, :, d:], 0)
        return 0

    @pl.when(j * block < length_ref[0])
    def _():
        jax.lax.fori_loop(0, rows, look, 0)

    def finish(i, _):
        mean = sum_ref[i] / total_ref[i, :, :1]
        out_ref[pl.ds(i, 1), :] = jnp.sum(jnp.where(own, mean, 0.0), 0, keepdims=True)
        return 0

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        jax.lax.fori_loop(0, rows, finish, 0)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contracted = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)
