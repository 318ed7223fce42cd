"""Decoding: one `lax.scan` over the steps with a key/value cache, or one pass if parallel."""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models.transformer import Cache, KeyValue, TokenTransformer


@flax.struct.dataclass
class Decoded:
    """tokens int32[B,T], counted from the start of the window, and their logits f32[B,T,K]."""

    tokens: jax.Array
    logits: jax.Array


def greedy(logits: jax.Array) -> jax.Array:
    """The most probable tokens: f32[..., K] -> int32[...]."""
    return jnp.argmax(logits, -1).astype(jnp.int32)


def decode(
    transformer: TokenTransformer,
    params: dict,
    memory: list[KeyValue],
    *,
    task: int,
    length: int,
    window: slice,
    soft_input: bool,
) -> Decoded:
    """Decodes `length` tokens of one vocabulary window, each the most probable one.

    Autoregressive models run one scan; the next input is the chosen token's embedding, or with `soft_input` the
    embeddings of the window weighted by their probabilities (the soft token). The parallel model takes one pass.

    Args:
        params: of the transformer.
        memory: keys and values of the images, from `memory_keys_values`.
        window: the ids to choose from.
    """
    if transformer.parallel:
        tokens = jnp.zeros((memory[0][0].shape[0], length - 1), jnp.int32)
        logits = transformer.apply({"params": params}, memory, tokens, task, False, window, method="decode")
        return Decoded(greedy(logits), logits)
    start, steps_in = stepping(transformer, params, memory, task, length)
    step = steps_in(window, lambda logits_BK, _: greedy(logits_BK), soft_input)
    _, (tokens_TB, logits_TBK) = jax.lax.scan(step, start, length=length)
    return Decoded(tokens_TB.T, jnp.swapaxes(logits_TBK, 0, 1))


class State(NamedTuple):
    """Between two steps: the number of the next, its input before the position is added, keys and values so far."""

    index: jax.Array
    x_BD: jax.Array
    cache: list[Cache]


def stepping(
    transformer: TokenTransformer, params: dict, memory: list[KeyValue], task: int, length: int
) -> tuple[State, Callable]:
    """The state before the first of `length` steps, and the function that makes them, for `lax.scan`.

    `steps_in(window, pick, soft)` is a step whose token is one of the K ids in the slice `window`: of a state, it gives
    (state, (tokens int32[B], logits f32[B,K])). `pick(logits, index)` chooses the tokens, counted from the window's
    start. The next input is their embedding, or with `soft` the embeddings of the window weighted by their
    probabilities. What a window needs of the weights is cut out once, outside the loop.
    """

    def call(method, *args):
        return transformer.apply({"params": params}, *args, method=method)

    positions_TD = call("positions", task, length)[0]

    def steps_in(window: slice, pick: Callable, soft: bool = False) -> Callable:
        of_window = params | {name: params[name][window] for name in ("voc_embed", "outp_bias")}
        embed_KD = of_window["voc_embed"].astype(jnp.float32)
        head = transformer.clone(vocab_size=embed_KD.shape[0])

        def step(state: State, _=None) -> tuple[State, tuple[jax.Array, jax.Array]]:
            position_1D = jax.lax.dynamic_slice_in_dim(positions_TD, state.index, 1)
            x_BD = state.x_BD.astype(transformer.dtype) + position_1D
            out_BD, cache = call("step", x_BD, memory, state.cache, state.index)
            logits_BK = head.apply({"params": of_window}, out_BD, method="logits")
            tokens_B = pick(logits_BK, state.index)
            x_BD = jax.nn.softmax(logits_BK) @ embed_KD if soft else embed_KD[tokens_B]
            return State(state.index + 1, x_BD, cache), (tokens_B, logits_BK)

        return step

    batch = memory[0][0].shape[0]
    x_BD = call("start", task, batch)[:, 0].astype(jnp.float32)
    return State(jnp.zeros((), jnp.int32), x_BD, call("empty_cache", batch, length)), steps_in
