"""Learning-rate schedules and the optimizer: AdamW with layer decay, decay mask and global-norm clipping.

Numbers follow the published system (AIT.md sections 7 and 11). A schedule is a function of the number of updates made
so far, an integer or an int32 array, and gives the learning rate of the next update as a float32 scalar.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

SCHEDULES = ("constant", "step", "linear", "exponential", "cosine")
OPTIMIZERS = ("adam", "adamw", "muon")
_NO_DECAY_LEAVES = ("logit_scale", "voc_embed", "task_embed", "dec_embed", "mask_embed")


def make_schedule(optim: ConfigDict, train_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      optim: `learning_rate`, `warmup_steps`, `warmup_ratio` and `schedule`, whose `name` is one of
        'constant';
        'step': times `factor` (0.1) from each of the steps `boundaries` on;
        'linear': to `end_factor` (0.01) of the learning rate over `train_steps`;
        'exponential': times `factor` (0.98) every `every` (500) steps. With `steps_per_epoch` > 0 it also counts one
          after iteration 0 of each epoch and then every `every` iterations, as the published depth tokenizer does;
        'cosine': to `end_factor` (0) over `train_steps`; `lag` (0) updates behind the step (published: 1).
      train_steps: length of the run in updates.

    The warm-up goes linearly from `warmup_ratio` to 1 over `warmup_steps`. It multiplies the schedule's value (mmcv),
    but the cosine's warm-up takes the schedule's place (timm).

    Raises:
      ValueError: unknown schedule, unknown key, or numbers out of range.
    """
    options = dict(optim.schedule)
    name = options.pop("name")
    shape = _schedule_factor(name, options, train_steps)
    lag = int(options.pop("lag", 0)) if name == "cosine" else 0
    if options:
        raise ValueError(f"optim.schedule {name!r} has no option {sorted(options)}; remove it")
    warmup_steps, ratio = int(optim.warmup_steps), float(optim.warmup_ratio)
    if warmup_steps < 0 or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"optim.warmup_steps={warmup_steps} must be >= 0 and optim.warmup_ratio={ratio} within 0..1")
    peak = float(optim.learning_rate)

    def schedule(step):
        step = jnp.maximum(jnp.asarray(step, jnp.int32) - lag, 0)
        factor = shape(step)
        if warmup_steps:
            warmup = ratio + (1.0 - ratio) * step / warmup_steps
            warmed = warmup if name == "cosine" else warmup * factor
            factor = jnp.where(step < warmup_steps, warmed, factor)
        return jnp.asarray(peak * factor, jnp.float32)

    return schedule


def _schedule_factor(name: str, options: dict, train_steps: int) -> optax.Schedule:
    """The schedule without warm-up as a share of the learning rate; takes its options out of `options`.

    Differences from the end are made in integers, so that the last steps keep float32's full precision.
    """
    if name == "constant":
        return lambda step: jnp.ones((), jnp.float32)
    if name == "step":
        boundaries, factor = tuple(options.pop("boundaries")), float(options.pop("factor", 0.1))
        if list(boundaries) != sorted(set(boundaries)):
            raise ValueError(f"optim.schedule.boundaries={boundaries} must increase")
        values = jnp.asarray([factor**k for k in range(len(boundaries) + 1)], jnp.float32)
        return lambda step: values[sum((step >= b).astype(jnp.int32) for b in boundaries) if boundaries else 0]
    if name == "linear":
        end = float(options.pop("end_factor", 0.01))
        return lambda step: end + (1.0 - end) * jnp.maximum(train_steps - step, 0) / train_steps
    if name == "exponential":
        factor, every = float(options.pop("factor", 0.98)), int(options.pop("every", 500))
        per_epoch = int(options.pop("steps_per_epoch", 0))
        if factor <= 0 or every < 1:
            raise ValueError(f"optim.schedule: factor={factor} must be > 0 and every={every} >= 1")
        return lambda step: jnp.exp(_decays(step, every, per_epoch) * math.log(factor))
    if name == "cosine":
        end = float(options.pop("end_factor", 0.0))
        half = math.pi / (2 * train_steps)
        return lambda step: end + (1.0 - end) * jnp.sin(half * jnp.maximum(train_steps - step, 0)) ** 2
    raise ValueError(f"optim.schedule.name={name!r} is unknown; use one of {SCHEDULES}")


def _decays(step: jax.Array, every: int, per_epoch: int) -> jax.Array:
    """How often an exponential schedule has decayed before update `step`."""
    if not per_epoch:
        return step // every
    epoch, iteration = step // per_epoch, step % per_epoch
    return epoch * math.ceil(per_epoch / every) + (iteration + every - 1) // every


def make_optimizer(optim: ConfigDict, train_steps: int) -> optax.GradientTransformation:
    """Clipping, Adam, AdamW (PyTorch's semantics) or Muon, decay mask, layer decay and schedule, in one transformation.

    Muon is for kernels, with everything else in Adam's hands, at one learning rate. No published set-up has it; a small
    solver from random weights learns in half of the steps.

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
        scale = optax.partition({"adam": scale, "muon": _scale_by_muon()}, _muon_labels)
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


def _muon_labels(params: Mapping) -> Mapping:
    """'muon' for the kernels of linear layers and convolutions, 'adam' for everything else."""

    def label(keys, value):
        matrix = value.ndim >= 2 and keys[-1].key == "kernel" and "rpe_mlp" not in _path(keys)
        return "muon" if matrix else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _scale_by_muon() -> optax.GradientTransformation:
    """Muon: the momentum's singular values all become about 1, scaled to Adam's usual size (arXiv 2502.16982).

    A convolution's kernel is the matrix [height·width·in, out]. Matrices of one shape are orthogonalised together, as
    one batch, and the wide way round, which is several times faster than one after the other. Three iterations after
    scaling by the Schatten norm (arXiv 2506.10935) do about as well as the usual five.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.scale_by_muon(
        ns_steps=3,
        preconditioning="schatten",
        weight_dimension_numbers=lambda stacks: jax.tree.map(lambda _: axes, stacks),
    )

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        matrices = [_wide(leaf) for leaf in leaves]
        stacks, state = muon.update(_stack(matrices), state)
        stacked = {name: iter(0.2 * math.sqrt(stack.shape[2]) * stack) for name, stack in stacks.items()}
        new = [_like(next(stacked[_size(m)]), leaf) for m, leaf in zip(matrices, leaves, strict=True)]
        return structure.unflatten(new), state

    def init(params):
        return muon.init(_stack([_wide(leaf) for leaf in jax.tree.leaves(params)]))

    return optax.GradientTransformation(init, update)


def _wide(kernel: jax.Array) -> jax.Array:
    """[..., in, out] as a matrix that is at least as wide as high."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _like(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
    """The inverse of `_wide`."""
    turned = kernel.size // kernel.shape[-1] > kernel.shape[-1]
    return (matrix.T if turned else matrix).reshape(kernel.shape)


def _stack(matrices: list[jax.Array]) -> dict[str, jax.Array]:
    """By size, [number, rows, columns]."""
    groups: dict[str, list] = {}
    for matrix in matrices:
        groups.setdefault(_size(matrix), []).append(matrix)
    return {size: jnp.stack(group) for size, group in groups.items()}


def _size(matrix: jax.Array) -> str:
    return f"{matrix.shape[0]}x{matrix.shape[1]}"


def _scale_by_layer(rate: float) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, layer_scales(updates, rate)))


def decay_mask(params: Mapping) -> Mapping:
    """True where weight decay applies.

    No decay: parameters with at most one axis, biases, the position MLP (`rpe_mlp_*`), the logit scale and the task,
    vocabulary, position and mask embeddings (AIT.md section 7).
    """

    def decays(keys, value):
        names = _path(keys).split("/")
        return not (
            value.ndim <= 1
            or names[-1].endswith("bias")
            or names[-1] in _NO_DECAY_LEAVES
            or any(name.startswith("rpe_mlp") for name in names)
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Mapping, rate: float) -> Mapping:
    """Factor of the learning rate of every parameter: rate ** (last id - its layer id), a Python float.

    Layer ids (AIT.md section 7): 0 the patch embedding; 1 + j + sum(blocks + 1 of the stages before) block j of a
    stage; sum(blocks + 1 up to and with the stage) the patch merging after it; the last id everything else. The
    numbers of blocks are read from the parameters' names, `backbone/layers_{stage}/blocks_{block}/...`.
    """
    paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
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


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
