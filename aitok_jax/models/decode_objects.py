"""Decoding of object sequences: one compiled loop over objects, every slot within its window."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models.decode import greedy, on_platform, stepping
from aitok_jax.models.transformer import KeyValue, TokenTransformer

CLASS_SLOT = 4
"""An object's tokens are x1 y1 x2 y2, class [and mask codes]."""


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
    vocabulary: Any,
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
        vocabulary: a `tasks.vocabulary.Vocabulary`.
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
    options = {"task": task, "num_objects": num_objects, "mask_tokens": mask_tokens, "soft_input": soft_input}
    run = functools.partial(_decode, transformer, vocabulary, **options, top_p=top_p, early_exit=early_exit)
    return on_platform(run, transformer, params, memory, rngs_B)


def _decode(
    transformer: TokenTransformer,
    vocabulary: Any,
    rows: bool,
    params: dict,
    memory: list[KeyValue],
    rngs_B: jax.Array | None,
    *,
    task: int,
    num_objects: int,
    mask_tokens: int,
    soft_input: bool,
    top_p: float,
    early_exit: int,
) -> DecodedObjects:
    length, batch = CLASS_SLOT + 1 + mask_tokens, memory[0][0].shape[0]
    start, steps_in = stepping(transformer, params, memory, task, length * num_objects, rows)
    classes, codes = vocabulary.classes, vocabulary.codes_of("mask")

    def pick(logits_BK, index):
        return _choose(logits_BK, top_p, rngs_B, index)

    coordinate = steps_in(vocabulary.coordinates.slice, pick)
    label = steps_in(
        slice(classes.start, vocabulary.noise + 1), lambda logits_BK, index: pick(logits_BK[:, : classes.size], index)
    )
    code = steps_in(codes.slice, pick, soft_input)

    def one_object(carry):
        number, state, run_B, out = carry
        state, (box_4B, _) = jax.lax.scan(coordinate, state, length=CLASS_SLOT)
        state, (class_B, label_logits_BK) = label(state)
        codes_mB, logits_mBK = jnp.zeros((0, batch), jnp.int32), jnp.zeros((0, batch, codes.size), jnp.float32)
        if mask_tokens:  # for detection the vocabulary may have no codes to choose from
            state, (codes_mB, logits_mBK) = jax.lax.scan(code, state, length=mask_tokens)
        score_B, noise_B = _label(label_logits_BK, class_B, classes.size)
        starts = (vocabulary.coordinates.start, classes.start, codes.start)
        tokens = (box_4B, class_B[None], codes_mB)
        tokens_LB = jnp.concatenate([start + ids for start, ids in zip(starts, tokens, strict=True)])
        new = (tokens_LB, score_B, noise_B, logits_mBK)
        out = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, number, 0), out, new)
        return number + 1, state, jnp.where(noise_B, run_B + 1, 0), out

    def unfinished(carry):
        number, _, run_B, _ = carry
        finished = jnp.all(run_B >= early_exit) if early_exit else False
        return (number < num_objects) & ~jnp.asarray(finished)

    out = (
        jnp.zeros((num_objects, length, batch), jnp.int32),
        jnp.zeros((num_objects, batch), jnp.float32),
        jnp.ones((num_objects, batch), bool),
        jnp.zeros((num_objects, mask_tokens, batch, codes.size), jnp.float32),
    )
    carry = (jnp.zeros((), jnp.int32), start, jnp.zeros(batch, jnp.int32), out)
    number, _, _, (tokens_NLB, scores_NB, noise_NB, logits_NmBK) = jax.lax.while_loop(unfinished, one_object, carry)
    return DecodedObjects(
        jnp.moveaxis(tokens_NLB, 2, 0), scores_NB.T, noise_NB.T, jnp.moveaxis(logits_NmBK, 2, 0), number * length
    )


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


def _choose(logits_BK: jax.Array, top_p: float, rngs_B: jax.Array | None, index: jax.Array) -> jax.Array:
    """int32[B]: the most probable where top_p is 0, else a sample of every row's nucleus with the row's own key."""
    if top_p == 0:
        return greedy(logits_BK)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(rngs_B, index)
    kept_BK = nucleus(jax.nn.softmax(logits_BK), top_p)
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(kept_BK)).astype(jnp.int32)


def _label(logits_BK: jax.Array, tokens_B: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Of logits of classes, end of sequence and noise: probability of the class, and whether noise is the likeliest."""
    kept_BC = jnp.concatenate([logits_BK[:, :num_classes], logits_BK[:, -1:]], -1)
    probabilities = jax.nn.softmax(kept_BC)
    score_B = jnp.take_along_axis(probabilities, tokens_B[:, None], -1)[:, 0]
    return score_B, jnp.argmax(probabilities, -1) == num_classes


def check_decoding(top_p: float, early_exit: int) -> None:
    """ValueError for options out of their range."""
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in 0..1 (0 is greedy)")
    if early_exit < 0:
        raise ValueError(f"early_exit={early_exit} must be 0 (decode all objects) or a number of noise objects")
