"""Causal self-attention of a long sequence, whose T² logits are not kept: JAX's flash attention on a TPU, cuDNN's on a
CUDA GPU in bfloat16, the formula on all else, which computes them again in the backward pass."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import PartitionSpec

from aitok_jax.models import window_cudnn
from aitok_jax.models.self_check import difference, trusted

LONG = 384  # positions from which it pays
BLOCK = 512  # of queries and of keys, in on-chip memory
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attend(q_BhTd: jax.Array, k_BhTd: jax.Array, v_BhTd: jax.Array) -> jax.Array:
    """softmax(q·kᵀ)·v over the keys that do not come after the query, [B,h,T,d]; q is scaled, softmax in float32.

    Within a mesh (`jax.set_mesh`) every device takes its own rows of the batch. What is compiled for a chip is compared
    with the formula on first use there, and given up with a warning where it differs.
    """
    kinds = _fused(v_BhTd)

    def choose(function: Callable[[Attend], Callable], *args):
        chosen = {platform: function(each) for platform, each in kinds.items()}
        default = function(formula)
        return jax.lax.platform_dependent(*args, **chosen, default=default) if chosen else default(*args)

    @jax.custom_vjp
    def attention(q, k, v):
        return choose(lambda each: each, q, k, v)

    def backward(kept, dout):
        return choose(lambda each: lambda q, k, v, dout: jax.vjp(each, q, k, v)[1](dout), *kept, dout)

    attention.defvjp(lambda *args: (attention(*args), args), backward)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention(q_BhTd, k_BhTd, v_BhTd)
    split = PartitionSpec(mesh.axis_names)
    split_attention = jax.shard_map(attention, in_specs=(split, split, split), out_specs=split, check_vma=False)
    return split_attention(q_BhTd, k_BhTd, v_BhTd)


def formula(q_BhTd: jax.Array, k_BhTd: jax.Array, v_BhTd: jax.Array) -> jax.Array:
    length = q_BhTd.shape[2]
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q_BhTd, k_BhTd, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(causal, logits, jnp.finfo(jnp.float32).min))
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v_BhTd.dtype), v_BhTd)


def _fused(v_BhTd: jax.Array) -> dict[str, Attend]:
    """What there is for the platforms of accelerators; nothing where the batch is open, in exports."""
    if not isinstance(v_BhTd.shape[0], int):
        return {}
    kinds = {"tpu": flash} if trusted("flash attention", self_check) else {}
    has_cudnn = v_BhTd.dtype == jnp.bfloat16 and window_cudnn.available()
    if has_cudnn and trusted("cuDNN's causal attention", _check_cudnn, platform="gpu", allowed=5e-2):
        kinds["cuda"] = cudnn
    return kinds


def _check_cudnn() -> float:
    return self_check(cudnn)


def flash(q_BhTd: jax.Array, k_BhTd: jax.Array, v_BhTd: jax.Array) -> jax.Array:
    """For a TPU. The keys that fill the last block up come after all queries, which do not see them."""
    length = q_BhTd.shape[2]
    filled = ((0, 0), (0, 0), (0, -length % BLOCK), (0, 0))
    sizes = dict.fromkeys(flash_attention.BlockSizes.__dataclass_fields__, BLOCK) | {"block_b": 1}
    sizes = flash_attention.BlockSizes(**sizes)
    args = (jnp.pad(x, filled) for x in (q_BhTd, k_BhTd, v_BhTd))
    return flash_attention.flash_attention(*args, causal=True, block_sizes=sizes)[:, :, :length]


def cudnn(q_BhTd: jax.Array, k_BhTd: jax.Array, v_BhTd: jax.Array) -> jax.Array:
    """For a CUDA GPU; everything in bfloat16."""
    args = (x.astype(jnp.bfloat16).swapaxes(1, 2) for x in (q_BhTd, k_BhTd, v_BhTd))
    out = jax.nn.dot_product_attention(*args, is_causal=True, scale=1.0, implementation="cudnn")
    return out.swapaxes(1, 2).astype(v_BhTd.dtype)


def self_check(fused: Attend = flash) -> float:
    """How far output and gradients are from the formula's on the default device, relative to the largest value."""
    rng = np.random.default_rng(0)
    *args, dout = rng.normal(size=(4, 1, 2, BLOCK + 128, 32)).astype(np.float32)

    def compute(args, function):
        out, pull = jax.vjp(function, *args)
        return out, *pull(jnp.asarray(dout))

    with jax.default_matmul_precision("highest"):
        found, wanted = (jax.jit(functools.partial(compute, function=each))(tuple(args)) for each in (fused, formula))
    return max(difference(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
