"""Objects as token sequences: what the solver reads and is to say (AIT.md section 6.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aitok_jax.tasks.vocabulary import Vocabulary

CLASS_SLOT = 4  # x1 y1 x2 y2 class [mask codes]


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
        parts.append(vocabulary.mask_codes.start + codes_BNm)
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


def cell_tokens(
    vocabulary: Vocabulary, tokens_BNL: jax.Array, real_BN: jax.Array, image_size: int, side: int
) -> tuple[jax.Array, jax.Array]:
    """The object at each cell of a grid over the image: the smallest real one whose box holds the cell's centre.

    A box narrower than a cell counts as wide as one, so that no object falls between the centres.

    Args:
        tokens_BNL: of `object_tokens`.
        image_size: side of the padded input in pixels; side: of the grid in cells.
    Returns:
        int32[B,M,L], its tokens, M = side²; the noise label (and any box and mask) where there is none; and bool[B,M],
        where there is one.
    """
    boxes_BN4 = boxes_of(vocabulary, tokens_BNL[..., :CLASS_SLOT], image_size)
    low_BN2, high_BN2 = boxes_BN4[..., :2], boxes_BN4[..., 2:]
    cell = image_size / side
    half_BN2 = jnp.maximum(high_BN2 - low_BN2, cell) / 2
    y, x = jnp.divmod(jnp.arange(side**2), side)
    centres_M2 = (jnp.stack([x, y], -1) + 0.5) * cell
    distance_BNM2 = jnp.abs(centres_M2.reshape(1, 1, -1, 2) - jnp.expand_dims((low_BN2 + high_BN2) / 2, 2))
    holds_BNM = jnp.all(distance_BNM2 <= jnp.expand_dims(half_BN2, 2), -1) & real_BN[..., None]
    area_BN1 = jnp.prod(high_BN2 - low_BN2, -1, keepdims=True)
    smallest_BM = jnp.argmin(jnp.where(holds_BNM, area_BN1, jnp.inf), axis=1)
    covered_BM = jnp.any(holds_BNM, axis=1)
    tokens_BML = jnp.take_along_axis(tokens_BNL, smallest_BM[..., None], axis=1)
    labels_BM = jnp.where(covered_BM, tokens_BML[..., CLASS_SLOT], vocabulary.noise)
    return tokens_BML.at[..., CLASS_SLOT].set(labels_BM), covered_BM
