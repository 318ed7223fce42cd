"""A decoding step as a TPU likes it: the formulas of `transformer.DecoderBlock.step`, few operations long.

One token is little work, so what a step takes on a TPU is the number of its operations, a microsecond or two each.
Everything that does not depend on the step is done before the loop: weights are cast and put side by side, vectors
brought to the shape of what they are added to; and attention is one kernel (`decode_kernel`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aitok_jax.models import decode_kernel
from aitok_jax.models.transformer import EPSILON, KeyValue, TokenTransformer

LEAST_ROWS = 2  # a lone one, as a vector, takes twice the operations
Linear = tuple[jax.Array, jax.Array]  # kernel [C,F] and bias [B,F]
Layer = dict[str, Linear]


def prepare(
    transformer: TokenTransformer, params: dict, memory: list[KeyValue], length: int
) -> tuple[Callable, list[jax.Array]]:
    """The step (x [B,D], cache, index) -> (decoder output [B,D], cache), and the empty cache for `length` positions."""
    images, dtype = memory[0][0].shape[0], transformer.dtype
    batch = max(images, LEAST_ROWS)
    memory = [tuple(jnp.broadcast_to(x, (batch, *x.shape[1:])) if images == 1 else x for x in each) for each in memory]
    decoder = params["decoder"]
    layers = [_layer(transformer, decoder[f"blocks_{i}"], batch) for i in range(transformer.decoder_layers)]
    rows = [(decode_kernel.pack(*each), each[0].shape[2]) for each in memory]
    attend = _attend(transformer.num_heads)

    def step(x_BD: jax.Array, cache: list[jax.Array], index: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        x_BD, new = jnp.broadcast_to(x_BD, (batch, transformer.dim)), []
        for layer, (memory_BME, places), kv_BTE in zip(layers, rows, cache, strict=True):
            qkv = _linear(_norm(x_BD, layer["norm1"]), layer["qkv"])
            q_BD, kv_BE = qkv[:, : transformer.dim], qkv[:, transformer.dim :]
            kv_BTE = jax.lax.dynamic_update_slice_in_dim(kv_BTE, kv_BE[:, None], index, axis=1)
            x_BD += _linear(attend(q_BD, kv_BTE, index + 1), layer["proj"])
            q_BD = _linear(_norm(x_BD, layer["norm2"]), layer["q"])
            x_BD += _linear(attend(q_BD, memory_BME, places), layer["crossproj"])
            hidden = jax.nn.gelu(_linear(_norm(x_BD, layer["norm3"]), layer["fc1"]), approximate=False)
            x_BD += _linear(hidden, layer["fc2"])
            new.append(kv_BTE)
        return x_BD[:images], new

    return step, [decode_kernel.empty(batch, length, transformer.dim, dtype) for _ in layers]


def _layer(transformer: TokenTransformer, block: dict, batch: int) -> Layer:
    scale = (transformer.dim // transformer.num_heads) ** -0.5

    def linear(*denses: dict, factor: float = 1.0) -> Linear:
        kernel, bias = (jnp.concatenate([dense[name] for dense in denses], -1) for name in ("kernel", "bias"))
        return (kernel * factor).astype(transformer.dtype), rows(bias * factor, transformer.dtype)

    def rows(vector: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.broadcast_to(vector.astype(dtype), (batch, *vector.shape))

    self_, cross, mlp = block["attn"], block["crossattn"], block["mlp"]
    q, kv = linear(self_["wq"], factor=scale), linear(self_["wk"], self_["wv"])
    layer = {"qkv": tuple(jnp.concatenate(each, -1) for each in zip(q, kv, strict=True))}
    layer |= {"proj": linear(self_["proj"]), "crossproj": linear(cross["proj"]), "q": linear(cross["wq"], factor=scale)}
    layer |= {name: linear(mlp[name]) for name in ("fc1", "fc2")}
    norms = ("norm1", "norm2", "norm3")
    return layer | {name: tuple(rows(block[name][n], jnp.float32) for n in ("scale", "bias")) for name in norms}


def _linear(x: jax.Array, given: Linear) -> jax.Array:
    kernel, bias = given
    return x.astype(kernel.dtype) @ kernel + bias


def _norm(x_BD: jax.Array, given: Linear) -> jax.Array:
    """LayerNorm in float32."""
    scale, bias = given
    x = x_BD.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.maximum(jnp.mean(jnp.square(x), -1, keepdims=True) - jnp.square(mean), 0.0)
    return (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias


def _attend(heads: int) -> Callable:
    """The kernel; within a mesh every device takes its own rows."""
    mesh = jax.sharding.get_abstract_mesh()

    def kernel(q_BD, kv_BTE, length):
        return decode_kernel.attend(q_BD, kv_BTE, length, heads)

    if mesh.empty or mesh.size == 1:
        return kernel
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = {"in_specs": (split, split, whole), "out_specs": split, "check_vma": False}
    return lambda q_BD, kv_BTE, length: jax.shard_map(kernel, **specs)(q_BD, kv_BTE, jnp.asarray(length))
