"""Decoding of object sequences: one compiled loop, every slot within its window (AIT.md section 6.2)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models.decode import nucleus
from aitok_jax.models.transformer import KeyValue, TokenTransformer
from aitok_jax.sequences import CLASS_SLOT
from aitok_jax.vocab import Vocabulary


@flax.struct.dataclass
class DecodedObjects:
    """tokens int32[B,N,L] of the whole vocabulary; scores f32[B,N], the probability of the class token among the
    classes and the noise label; noise bool[B,N], where the noise label is the most probable of them; mask_logits
    f32[B,N,m,K] (m may be 0); steps int32, the number of tokens that were decoded: later objects are noise, else zero.
    """

    tokens: jax.Array
    scores: jax.Array
    noise: jax.Array
    mask_logits: jax.Array
    steps: jax.Array


def decode_objects(
    transformer: TokenTransformer,
    params: dict,
    memory: list[KeyValue],
    vocabulary: Vocabulary,
    *,
    task: int,
    num_objects: int,
    mask_tokens: int,
    soft_input: bool,
    top_p: float = 0.0,
    rngs_B: jax.Array | None = None,
    early_exit: int = 0,
) -> DecodedObjects:
    """Decodes `num_objects` objects of 5 + `mask_tokens` tokens each.

    Args:
        params: of the transformer.
        memory: keys and values of the images, from `memory_keys_values`.
        mask_tokens: 0 for detection.
        soft_input: feed the probability-weighted embedding after a mask token; boxes and classes are always hard.
        top_p: 0 is greedy; else nucleus sampling with one key of `rngs_B` a row, so that a row's objects do not
            depend on the others.
        early_exit: stop once the last so many objects of every row are noise; 0 decodes all.
    Raises:
        ValueError: where top_p is outside 0..1, or above 0 without keys; for a parallel model, which has no steps.
    """
    check_decoding(top_p, early_exit)
    if transformer.parallel:
        raise ValueError("the parallel model has no steps: objects need parallel=False")
    if top_p > 0 and rngs_B is None:
        raise ValueError(f"top_p={top_p} samples and needs one key a row; pass them, or top_p=0 for greedy decoding")
    slots = vocabulary.object_slots(mask_tokens)
    length, total = len(slots), len(slots) * num_objects
    legal_LV = np.zeros((length, vocabulary.size), bool)
    for row, window in zip(legal_LV, slots, strict=True):
        row[window.slice] = True
    legal_LV = jnp.asarray(legal_LV)
    batch = memory[0][0].shape[0]
    codes = vocabulary.mask_codes

    def call(method, *args):
        return transformer.apply({"params": params}, *args, method=method)

    embed_VD = params["voc_embed"].astype(jnp.float32)
    positions_TD = call("positions", task, total)[0]

    def step(carry):
        index, x_BD, cache, run_B, out = carry
        slot = index % length
        position_1D = jax.lax.dynamic_slice_in_dim(positions_TD, index, 1)
        out_BD, cache = call("step", x_BD.astype(transformer.dtype) + position_1D, memory, cache, index)
        logits_BV = call("logits", out_BD)
        masked_BV = jnp.where(jax.lax.dynamic_slice_in_dim(legal_LV, slot, 1), logits_BV, -jnp.inf)
        tokens_B = _choose(masked_BV, top_p, rngs_B, index)
        score_B, noise_B = _label(logits_BV, tokens_B, vocabulary)
        is_class = slot == CLASS_SLOT
        run_B = jnp.where(is_class, jnp.where(noise_B, run_B + 1, 0), run_B)
        x_BD = embed_VD[tokens_B]
        if soft_input and mask_tokens:
            x_BD = jnp.where(slot > CLASS_SLOT, jax.nn.softmax(masked_BV) @ embed_VD, x_BD)
        new = (tokens_B, score_B, noise_B, logits_BV[:, codes.slice] if mask_tokens else logits_BV[:, :0])
        out = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 1), out, new)
        return index + 1, x_BD, cache, run_B, out

    def unfinished(carry):
        index, _, _, run_B, _ = carry
        if not early_exit:
            return index < total
        finished = jnp.all(run_B >= early_exit) & (index % length == 0)
        return (index < total) & ~finished

    start = (
        jnp.zeros((), jnp.int32),
        call("start", task, batch)[:, 0].astype(jnp.float32),
        call("empty_cache", batch, total),
        jnp.zeros(batch, jnp.int32),
        (
            jnp.zeros((batch, total), jnp.int32),
            jnp.zeros((batch, total)),
            jnp.ones((batch, total), bool),
            jnp.zeros((batch, total, codes.size if mask_tokens else 0)),
        ),
    )
    steps, _, _, _, (tokens, scores, noise, logits) = jax.lax.while_loop(unfinished, step, start)

    def rows(x):
        return x.reshape(batch, num_objects, length, *x.shape[2:])

    class_scores, class_noise = rows(scores)[..., CLASS_SLOT], rows(noise)[..., CLASS_SLOT]
    return DecodedObjects(rows(tokens), class_scores, class_noise, rows(logits)[:, :, CLASS_SLOT + 1 :], steps)


def _choose(masked_BV: jax.Array, top_p: float, rngs_B: jax.Array | None, index: jax.Array) -> jax.Array:
    if top_p == 0:
        return jnp.argmax(masked_BV, -1).astype(jnp.int32)
    kept_BV = nucleus(jax.nn.softmax(masked_BV), top_p)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(rngs_B, index)
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(kept_BV)).astype(jnp.int32)


def _label(logits_BV: jax.Array, tokens_B: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
    """Of a class position: probability of the chosen class, and whether the noise label is more probable than any."""
    classes = vocabulary.classes
    classes_BC, noise_B1 = logits_BV[:, classes.slice], logits_BV[:, vocabulary.noise, None]
    probabilities = jax.nn.softmax(jnp.concatenate([classes_BC, noise_B1], -1))
    chosen_B1 = jnp.clip(tokens_B - classes.start, 0, classes.size - 1)[:, None]
    score_B = jnp.take_along_axis(probabilities, chosen_B1, -1)[:, 0]
    return score_B, jnp.argmax(probabilities, -1) == classes.size


def check_decoding(top_p: float, early_exit: int) -> None:
    """ValueError for options out of their range."""
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in 0..1 (0 is greedy)")
    if early_exit < 0:
        raise ValueError(f"early_exit={early_exit} must be 0 (decode all objects) or a number of noise objects")
