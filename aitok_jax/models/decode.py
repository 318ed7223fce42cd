"""Decoding: one `lax.scan` over the steps with a key/value cache, or one pass if parallel."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models import decode_kernel, decode_rows
from aitok_jax.models.self_check import trusted
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

    def run(rows: bool, params: dict, memory: list[KeyValue]) -> Decoded:
        start, steps_in = stepping(transformer, params, memory, task, length, rows)
        step = steps_in(window, lambda logits_BK, _: greedy(logits_BK), soft_input)
        _, (tokens_TB, logits_TBK) = jax.lax.scan(step, start, length=length)
        return Decoded(tokens_TB.T, jnp.swapaxes(logits_TBK, 0, 1))

    return on_platform(run, transformer, params, memory)


def on_platform(run: Callable[..., Any], transformer: TokenTransformer, params: dict, memory: list, *args) -> Any:
    """`run(rows, params, memory, *args)`, where `rows` is whether its steps are those for a TPU (`decode_rows`).

    That is chosen by what the program is compiled for; the plain step is taken too in exports, whose batch is open, for
    widths that fill no lanes, and where the kernel is not what it should be on the TPU at hand.
    """
    batch, devices = memory[0][0].shape[0], max(jax.sharding.get_abstract_mesh().size, 1)
    fits = isinstance(batch, int) and batch % devices == 0 and transformer.dim % decode_kernel.LANES == 0
    if not (fits and trusted("decoding", decode_kernel.self_check)):
        return run(False, params, memory, *args)
    kinds = {"tpu": functools.partial(run, True), "default": functools.partial(run, False)}
    return jax.lax.platform_dependent(params, memory, *args, **kinds)


class State(NamedTuple):
    """Between two steps: the number of the next, its input before the position is added, keys and values so far."""

    index: jax.Array
    x_BD: jax.Array
    cache: list[Cache] | list[jax.Array]


def stepping(
    transformer: TokenTransformer, params: dict, memory: list[KeyValue], task: int, length: int, rows: bool = False
) -> tuple[State, Callable]:
    """The state before the first of `length` steps, and the function that makes them, for `lax.scan`.

    `steps_in(window, pick, soft)` is a step whose token is one of the K ids in the slice `window`: of a state, it gives
    (state, (tokens int32[B], logits f32[B,K])). `pick(logits, index)` chooses the tokens, counted from the window's
    start. The next input is their embedding, or with `soft` the embeddings of the window weighted by their
    probabilities. What a window needs of the weights is cut out once, outside the loop. With `rows` the steps
    are those for a TPU (`decode_rows`).
    """
    batch, dtype = memory[0][0].shape[0], transformer.dtype

    def call(method, *args, **kwargs):
        return transformer.apply({"params": params}, *args, **kwargs, method=method)

    if rows:
        one_step, cache = decode_rows.prepare(transformer, params, memory, length)
    else:
        one_step, cache = functools.partial(call, "step", memory=memory), call("empty_cache", batch, length)
    positions_TD = call("positions", task, length)[0]

    def steps_in(window: slice, pick: Callable, soft: bool = False) -> Callable:
        of_window = params | {name: params[name][window] for name in ("voc_embed", "outp_bias")}
        embed_KD = of_window["voc_embed"].astype(jnp.float32)
        head = transformer.clone(vocab_size=embed_KD.shape[0])

        def step(state: State, _=None) -> tuple[State, tuple[jax.Array, jax.Array]]:
            position_1D = jax.lax.dynamic_slice_in_dim(positions_TD, state.index, 1)
            x_BD = state.x_BD.astype(dtype) + position_1D
            out_BD, cache = one_step(x_BD, cache=state.cache, index=state.index)
            logits_BK = head.apply({"params": of_window}, out_BD, method="logits")
            tokens_B = pick(logits_BK, state.index)
            x_BD = jax.nn.softmax(logits_BK) @ embed_KD if soft else embed_KD[tokens_B]
            return State(state.index + 1, x_BD, cache), (tokens_B, logits_BK)

        return step

    x_BD = call("start", task, batch)[:, 0].astype(jnp.float32)
    return State(jnp.zeros((), jnp.int32), x_BD, cache), steps_in
