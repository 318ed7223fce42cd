"""Decoding: one `lax.scan` over the steps with a key/value cache, or one pass if parallel (AIT.md section 4)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models.transformer import KeyValue, TokenTransformer
from aitok_jax.vocab import Window


@flax.struct.dataclass
class Decoded:
    """tokens int32[B,T], counted from the start of the window, and their logits f32[B,T,K]."""

    tokens: jax.Array
    logits: jax.Array


def nucleus(probabilities: jax.Array, top_p: float) -> jax.Array:
    """Keeps the most probable entries until their sum exceeds `top_p` (that one included), renormalised.

    top_p 0 keeps the most probable entry alone, 1 keeps all.
    """
    if top_p == 1:
        return probabilities
    order = jnp.argsort(-probabilities)
    ranked = jnp.take_along_axis(probabilities, order, -1)
    keep_ranked = jnp.cumsum(ranked, -1) - ranked <= top_p
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order), -1)
    kept = jnp.where(keep, probabilities, 0.0)
    return kept / jnp.sum(kept, -1, keepdims=True)


def choose(logits_BK: jax.Array, top_p: float, rng: jax.Array | None) -> jax.Array:
    """Next tokens int32[B]: the most probable where top_p is 0, else a sample of the nucleus."""
    if top_p == 0:
        return jnp.argmax(logits_BK, -1).astype(jnp.int32)
    kept_BK = nucleus(jax.nn.softmax(logits_BK), top_p)
    return jax.random.categorical(rng, jnp.log(kept_BK)).astype(jnp.int32)


def decode(
    transformer: TokenTransformer,
    params: dict,
    memory: list[KeyValue],
    *,
    task: int,
    length: int,
    window: Window,
    soft_input: bool,
    top_p: float = 0.0,
    rng: jax.Array | None = None,
) -> Decoded:
    """Decodes `length` tokens of one vocabulary window.

    Autoregressive models run one scan; the next input is the chosen token's embedding, or with `soft_input` the
    embeddings of the window weighted by their probabilities (the soft token). The parallel model takes one pass.

    Args:
        params: of the transformer.
        memory: keys and values of the images, from `memory_keys_values`.
        top_p: 0 is greedy; else nucleus sampling, which needs `rng`.
    Raises:
        ValueError: where top_p is outside 0..1, or above 0 without an rng.
    """
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in 0..1 (0 is greedy)")
    if top_p > 0 and rng is None:
        raise ValueError(f"top_p={top_p} samples and needs an rng; pass one, or top_p=0 for greedy decoding")

    def call(method, *args):
        return transformer.apply({"params": params}, *args, method=method)

    keys = None if rng is None else jax.random.split(rng, length)
    if transformer.parallel:
        batch = memory[0][0].shape[0]
        tokens = jnp.zeros((batch, length - 1), jnp.int32)
        logits = call("decode", memory, tokens, task, False, window.slice)
        if keys is None:
            return Decoded(choose(logits, top_p, None), logits)
        tokens = jax.vmap(lambda l, key: choose(l, top_p, key), (1, 0), 1)(logits, keys)
        return Decoded(tokens, logits)
    return _scan(call, transformer, params, memory, task, length, window, soft_input, top_p, keys)


def _scan(call, transformer, params, memory, task, length, window, soft_input, top_p, keys) -> Decoded:
    batch = memory[0][0].shape[0]
    embed_KD = params["voc_embed"][window.slice].astype(jnp.float32)

    def step(carry, xs):
        x_BD, cache = carry
        index, position_1D, key = xs
        out_BD, cache = call("step", x_BD.astype(transformer.dtype) + position_1D, memory, cache, index)
        logits_BK = call("logits", out_BD, window.slice)
        tokens_B = choose(logits_BK, top_p, key)
        x_BD = jax.nn.softmax(logits_BK) @ embed_KD if soft_input else embed_KD[tokens_B]
        return (x_BD, cache), (tokens_B, logits_BK)

    positions_T1D = jnp.swapaxes(call("positions", task, length), 0, 1)
    start = (call("start", task, batch)[:, 0].astype(jnp.float32), call("empty_cache", batch, length))
    _, (tokens_TB, logits_TBK) = jax.lax.scan(step, start, (jnp.arange(length), positions_T1D, keys))
    return Decoded(tokens_TB.T, jnp.swapaxes(logits_TBK, 0, 1))
