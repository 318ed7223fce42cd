"""Objects as token sequences: what the solver reads and is to say (arXiv 2301.02229, task solver)."""

import jax
import jax.numpy as jnp

from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.tasks.vocabulary import Vocabulary


def object_tokens(
    vocabulary: Vocabulary, boxes_BN4: jax.Array, classes_BN: jax.Array, codes_BNm: jax.Array | None, image_size: int
) -> jax.Array:
    """int32[B,N,L] tokens of the whole vocabulary, L = 5 + m.

    Args:
        boxes_BN4: f32 x1 y1 x2 y2 in pixels of the padded input; token round(num_bins · v / image_size), clipped.
        classes_BN: int, contiguous from 0; a negative one becomes the noise label.
        codes_BNm: int mask codes, counted from 0; None for detection.
        image_size: side of the padded input in pixels.
    """
    bins = vocabulary.num_bins
    coordinates = jnp.clip(jnp.round(boxes_BN4 * bins / image_size).astype(jnp.int32), 0, bins)
    labels = jnp.where(classes_BN < 0, vocabulary.noise, vocabulary.classes.start + classes_BN)
    parts = [vocabulary.coordinates.start + coordinates, labels[..., None]]
    if codes_BNm is not None:
        parts.append(vocabulary.codes_of("mask").start + codes_BNm)
    return jnp.concatenate(parts, axis=-1).astype(jnp.int32)


def boxes_of(vocabulary: Vocabulary, tokens_BN4: jax.Array, image_size: int) -> jax.Array:
    """The inverse of the first four tokens: f32[B,N,4] pixels of the padded input."""
    return (tokens_BN4 - vocabulary.coordinates.start).astype(jnp.float32) * (image_size / vocabulary.num_bins)


def corrupt_labels(rng: jax.Array, vocabulary: Vocabulary, tokens_BNL: jax.Array) -> jax.Array:
    """Input tokens: every class token becomes a random class or, with p ½, the noise label."""
    which_rng, class_rng = jax.random.split(rng)
    shape, window = tokens_BNL.shape[:2], vocabulary.classes
    random = jax.random.randint(class_rng, shape, window.start, window.stop)
    labels = jnp.where(jax.random.bernoulli(which_rng, 0.5, shape), random, vocabulary.noise)
    return tokens_BNL.at[..., CLASS_SLOT].set(labels)


def target_mask(real_BN: jax.Array, length: int) -> jax.Array:
    """bool[B,N,L]: where the loss looks. Real objects count with all their tokens, noise objects with their label."""
    label_L = (jnp.arange(length) == CLASS_SLOT).reshape(1, 1, -1)
    return real_BN[..., None] | label_L
