"""The optimizer: AdamW with layer decay, decay mask and global-norm clipping, as of the published system."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from aitok_jax.training import muon
from aitok_jax.training.muon import path_of
from aitok_jax.training.schedules import make_schedule

OPTIMIZERS = ("adam", "adamw", "muon")
_NO_DECAY_LEAVES = ("logit_scale", "voc_embed", "task_embed", "dec_embed", "mask_embed")


def make_optimizer(optim: ConfigDict, train_steps: int) -> optax.GradientTransformation:
    """Clipping, Adam, AdamW (PyTorch's semantics) or Muon, decay mask, layer decay and schedule, in one transformation.

    Muon (`training.muon`) is for kernels, with everything else in Adam's hands, at one learning rate.

    Args:
      optim: `name` (of OPTIMIZERS), `learning_rate`, `b1`, `b2`, `eps`, `weight_decay` (not with 'adam'; decoupled and
        scaled with the parameter's learning rate), `layer_decay` (1 = off), `clip_norm` (0 = off), and what
        `make_schedule` takes.
      train_steps: length of the run in updates.

    Raises:
      ValueError: unknown optimizer, weight decay with Adam, numbers out of range; at `update`, layer decay for
        parameters without a backbone.
    """
    if optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={optim.name!r} is unknown; use one of {OPTIMIZERS}")
    if optim.name == "adam" and optim.weight_decay:
        raise ValueError(f"optim.weight_decay={optim.weight_decay}: 'adam' has none; set it to 0, or use 'adamw'")
    if optim.clip_norm < 0 or not 0 < optim.layer_decay <= 1:
        raise ValueError(f"optim: clip_norm={optim.clip_norm} must be >= 0, layer_decay={optim.layer_decay} in (0, 1]")
    parts = []
    if optim.clip_norm:
        parts.append(clip_by_global_norm(optim.clip_norm))
    scale = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    if optim.name == "muon":
        scale = optax.partition({"adam": scale, "muon": muon.scale_by_muon()}, muon.labels)
    parts.append(scale)
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))
    if optim.layer_decay < 1:
        parts.append(_scale_by_layer(optim.layer_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(optim, train_steps)))
    return optax.chain(*parts)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by max_norm / (norm + 1e-6) where that is below 1, as PyTorch's clip_grad_norm_ does."""

    def update(updates, params=None):
        scale = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(update)


def _scale_by_layer(rate: float) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, layer_scales(updates, rate)))


def decay_mask(params: Mapping) -> Mapping:
    """True where weight decay applies.

    No decay: parameters with at most one axis, biases, the position MLP (`rpe_mlp_*`), the logit scale and the task,
    vocabulary, position and mask embeddings.
    """

    def decays(keys, value):
        names = path_of(keys).split("/")
        return not (
            value.ndim <= 1
            or names[-1].endswith("bias")
            or names[-1] in _NO_DECAY_LEAVES
            or any(name.startswith("rpe_mlp") for name in names)
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Mapping, rate: float) -> Mapping:
    """Factor of the learning rate of every parameter: rate ** (last id - its layer id), a Python float.

    Layer ids: 0 the patch embedding; 1 + j + sum(blocks + 1 of the stages before) block j of a
    stage; sum(blocks + 1 up to and with the stage) the patch merging after it; the last id everything else. The
    numbers of blocks are read from the parameters' names, `backbone/layers_{stage}/blocks_{block}/...`.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    depths = _depths(paths)
    if not depths:
        raise ValueError(
            f"optim.layer_decay={rate} needs parameters named backbone/layers_*/blocks_*, found only "
            f"{sorted({path.split('/')[0] for path in paths})}; set optim.layer_decay=1.0"
        )
    last = sum(depths) + len(depths)
    scales = [rate ** (last - layer_id(path, depths)) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), scales)


def layer_id(path: str, depths: list[int]) -> int:
    """Layer id of the parameter at the '/'-joined `path` for a backbone with `depths` blocks per stage."""
    starts = [sum(depths[:stage]) + stage for stage in range(len(depths) + 1)]
    if path.startswith("backbone/patch_embed/"):
        return 0
    if match := re.match(r"backbone/layers_(\d+)/blocks_(\d+)/", path):
        return starts[int(match[1])] + 1 + int(match[2])
    if match := re.match(r"backbone/layers_(\d+)/downsample/", path):
        return starts[int(match[1]) + 1]
    return starts[-1]


def _depths(paths: list[str]) -> list[int]:
    blocks = {m.groups() for path in paths if (m := re.match(r"backbone/layers_(\d+)/blocks_(\d+)/", path))}
    stages = [int(stage) for stage, _ in blocks]
    return [stages.count(stage) for stage in range(max(stages, default=-1) + 1)]
