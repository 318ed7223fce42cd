"""Aids for solvers with random weights; no published set-up has them, and prediction does not use them.

- `rescale` (`init_variance`): the published standard deviation of 0.02 lets hardly anything through a narrow solver.
- `corrupt` (`input_noise`): a solver of maps otherwise learns to continue the true tokens and to overlook the image.
  (The published instance segmentation corrupts its class labels likewise.)
- memory heads (`memory_weight`): tokens read off the encoder's memory by a linear layer. The decoder starts with no
  idea which memory vector belongs to which token, and without a pretrained backbone takes thousands of steps to use
  the image at all; this teaches the encoder meanwhile.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aitok_jax.models import losses
from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.models.layers import INIT_STD
from aitok_jax.models.swin_v2 import partition
from aitok_jax.tasks import sequences
from aitok_jax.tasks.base import Tree
from aitok_jax.tasks.vocabulary import Vocabulary, Window


def rescale(params: Tree, variance: float) -> Tree:
    """A copy whose linear layers give out `variance` times the variance of their input; 0 leaves them as they are."""
    if variance < 0:
        raise ValueError(f"init_variance={variance} must be above 0, for example 0.5, or 0 for the published weights")

    def rescaled(path, leaf):
        linear = path[-1].key == "kernel" and leaf.ndim == 2
        return leaf * ((variance / leaf.shape[0]) ** 0.5 / INIT_STD) if linear else leaf

    return jax.tree_util.tree_map_with_path(rescaled, params) if variance else dict(params)


def corrupt(rng: jax.Array, tokens_BT: jax.Array, noise: float, window: Window) -> jax.Array:
    """A share `noise` of the tokens becomes random ids of the window."""
    if not noise:
        return tokens_BT
    which_rng, code_rng = jax.random.split(rng)
    random_BT = jax.random.randint(code_rng, tokens_BT.shape, window.start, window.stop)
    return jnp.where(jax.random.bernoulli(which_rng, noise, tokens_BT.shape), random_BT, tokens_BT)


def init_head(features: int, inputs: int, rng: jax.Array) -> Tree:
    """Fresh parameters of a head on the encoder's memory."""
    return nn.Dense(features).init(rng, jnp.zeros((1, 1, inputs)))["params"]


def map_logits(head: Tree, memory_BMD: jax.Array, grid: int, codes: int) -> jax.Array:
    """Logits f32[B,T,K] of a map's codes, each from the memory vectors of its token's patch; T = grid²."""
    side = round(memory_BMD.shape[1] ** 0.5)
    map_BhwD = memory_BMD.reshape(memory_BMD.shape[0], side, side, -1)
    patches = partition(map_BhwD, side // grid).reshape(memory_BMD.shape[0], grid**2, -1)
    return nn.Dense(codes).apply({"params": head}, patches)


def object_loss(
    head: Tree,
    part: Any,
    params: Tree,
    memory_BMD: jax.Array,
    targets_BNL: jax.Array,
    real_BN: jax.Array,
    weight_B: jax.Array | None = None,
) -> jax.Array:
    """Mean cross-entropy of the tokens of the object at every memory vector.

    That of boxes and masks where there is an object, plus that of the classes everywhere. Rows with `weight_B` 0 must
    have no object.
    """
    vocabulary, side = part.vocabulary, part.image_size // part.solver.backbone.stride
    tokens_BML, covered_BM = cell_tokens(vocabulary, targets_BNL, real_BN, part.image_size, side)
    length, dim = tokens_BML.shape[-1], memory_BMD.shape[-1]
    x_BMD = nn.Dense(length * dim).apply({"params": head}, memory_BMD)
    window = slice(vocabulary.coordinates.start, vocabulary.codes_of("mask").stop)
    logits_BMLV = part.solver.transformer.apply(
        {"params": params["transformer"]}, x_BMD.reshape(*tokens_BML.shape, -1), window, method="logits"
    )
    ce_BML = optax.softmax_cross_entropy_with_integer_labels(logits_BMLV, tokens_BML)

    def covered_mean(ce_BMn):
        summed = jnp.sum(jnp.where(covered_BM[..., None], ce_BMn, 0.0))
        return summed / jnp.maximum(jnp.sum(covered_BM) * ce_BMn.shape[-1], 1)

    box, label, mask = ce_BML[..., :CLASS_SLOT], ce_BML[..., CLASS_SLOT], ce_BML[..., CLASS_SLOT + 1 :]
    return covered_mean(box) + losses.mean(label, weight_B) + covered_mean(mask)


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
    boxes_BN4 = sequences.boxes_of(vocabulary, tokens_BNL[..., :CLASS_SLOT], image_size)
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
