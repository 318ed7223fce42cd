"""State dicts of the published models to the variables of our tasks, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.config import build_dataclass, translated_task
from aitok_jax.convert import rules
from aitok_jax.models.position_bias import relative_coordinates, relative_index
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.transformer import sine_positions
from aitok_jax.tasks.base import variable_shapes

BACKBONE = ("params", "backbone")
MAX_LINES = 20  # of an error


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the names of a file.

    Attributes:
      used: name in the file -> our '/'-joined path.
      recomputed: names of tables that follow from the configuration, and of copies of the transformer under a head.
      unused: names that the model does not have.
      missing: published names of what the model has and the file lacks.
      notes: what lies beside in the file, a line for each.
    """

    used: dict[str, str]
    recomputed: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"used: {name} -> {path}" for name, path in self.used.items()]
        lines += [f"recomputed, not read: {name}" for name in self.recomputed]
        lines += [f"unused: {name}" for name in self.unused] + [f"missing: {name}" for name in self.missing]
        counts = {name: len(getattr(self, name)) for name in ("used", "recomputed", "unused", "missing")}
        return "\n".join([*lines, *self.notes, ", ".join(f"{count} {name}" for name, count in counts.items())])


def convert(state_dict: Mapping[str, np.ndarray], config: ConfigDict) -> tuple[dict, ConfigDict, Report]:
    """A published state dict -> the variables of `config.task`.

    A file that holds nothing of the task but a Swin-V2 (pretrained with SimMIM, say) is converted as that: its tables
    of relative positions are left out, so it may come from windows of another size.

    Returns:
      {'params', 'model_state'} of NumPy arrays in our names, layouts and dtypes; the config to save with them, whose
      task is named 'backbone' where they are a backbone alone; the report. Where something is missing, the variables
      lack it.

    Raises:
      ValueError: shapes or kinds of number that differ, two names of one parameter, or nothing that fits.
    """
    target = flatten_dict(variable_shapes(tasks.build(config.task)))
    found = {name: path for name, path in _located(state_dict).items() if path in target}
    if not found:
        raise ValueError(
            f"nothing in the file fits the task of the config; it holds {_summary(state_dict)}. "
            "Give the config of the same model"
        )
    if all(path[:2] == BACKBONE for path in found.values()):
        target = {path: leaf for path, leaf in target.items() if path[:2] == BACKBONE}
        config = _backbone_config(config)
    _check(state_dict, found, target)
    arrays = {path: rules.to_layout(path, state_dict[name]) for name, path in found.items()}
    arrays = {path: np.array(array, target[path].dtype, order="C") for path, array in arrays.items()}
    variables = {"params": {}, "model_state": {}} | unflatten_dict(arrays)
    return variables, config, _report(state_dict, found, target)


def _located(state_dict: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """Name in the file -> our path, without the derived tables."""
    located, taken = {}, {}
    for name, published in rules.canonical(state_dict).items():
        path = rules.locate(published)
        if path is None:
            continue
        if path in taken:
            raise ValueError(f"{taken[path]} and {name} are both {'/'.join(path)}; take one out of the file")
        located[name], taken[path] = path, name
    return located


def _check(state_dict: Mapping[str, np.ndarray], found: Mapping[str, tuple], target: Mapping[tuple, Any]) -> None:
    wrong = []
    for name, path in found.items():
        array, leaf = state_dict[name], target[path]
        stand_in = np.broadcast_to(np.zeros((), np.int8), leaf.shape)
        expected = rules.from_layout(path, stand_in).shape
        if not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} is of {array.dtype} in the file, but {'/'.join(path)} is {leaf.dtype}")
        elif array.shape != expected:
            wrong.append(f"{name} is {array.shape} in the file, but {'/'.join(path)} here is {expected} in that layout")
    if wrong:
        more = [f"and {len(wrong) - MAX_LINES} more"] if len(wrong) > MAX_LINES else []
        raise ValueError("the file does not fit this config:\n  " + "\n  ".join(wrong[:MAX_LINES] + more))


def _report(state_dict: Mapping, found: Mapping[str, tuple], target: Mapping[tuple, Any]) -> Report:
    canonical = rules.canonical(state_dict)
    recomputed = tuple(name for name in state_dict if rules.locate(canonical[name]) is None)
    return Report(
        used={name: "/".join(path) for name, path in found.items()},
        recomputed=recomputed,
        unused=tuple(name for name in state_dict if name not in found and name not in recomputed),
        missing=tuple(rules.publish(path) for path in target if path not in found.values()),
    )


def _summary(state_dict: Mapping[str, np.ndarray]) -> str:
    groups = sorted({".".join(name.split(".")[:2]) for name in state_dict})
    return ", ".join(groups[:8]) + (", …" if len(groups) > 8 else "")


def _backbone_config(config: ConfigDict) -> ConfigDict:
    backbone = translated_task(config.task)["shared"]["backbone"]
    return ConfigDict({**config.to_dict(), "task": {"name": "backbone", "backbone": backbone}})


def state_dict(variables: Mapping[str, Any], config: ConfigDict) -> dict[str, np.ndarray]:
    """Variables of `config.task` -> all that the published module keeps under its names, in its layouts.

    That is also the tables and copies that a strict `load_state_dict` wants: relative positions, sine positions, the
    loss weights of the instance head and the transformer under every head. What a task has beside the published parts
    (a stem, heads that read the memory) goes under names made in the same way.

    Raises:
      ValueError: batch norm or a learned codebook, which were not published.
    """
    named = {}
    for path, array in flatten_dict(variables).items():
        named[rules.publish(path)] = np.ascontiguousarray(rules.from_layout(path, np.asarray(array)))
    if config.task.name == "backbone":
        return named | relative_tables(build_dataclass(SwinV2, config.task.backbone))
    parts = list(tasks.build(config.task).parts.values())
    if not hasattr(parts[0], "solver"):
        return named
    named |= relative_tables(parts[0].solver.backbone) | _sine_table(parts[0])
    shared = {name: array for name, array in named.items() if name.startswith("transformer.")}
    for head in [head for part in parts for head in _heads(part, alone=len(parts) == 1)]:
        named |= {f"{head}.{name}": array for name, array in shared.items()}
        if head == "insseg_head":
            (objects,) = (part for part in parts if part.kind == "objects")
            named["insseg_head.loss_seq.weight"] = _loss_weights(objects)
    return named


def relative_tables(backbone: SwinV2) -> dict[str, np.ndarray]:
    """The constant buffers of every block: log-spaced offsets f32[1,2w−1,2w−1,2] and int64[w²,w²] rows of them."""
    tables = {}
    for s, blocks in enumerate(backbone.depths):
        window = backbone.windows[s]
        side = 2 * window - 1
        offsets = relative_coordinates(window, backbone.pretrain_windows[s]).reshape(1, side, side, 2)
        index = np.asarray(relative_index(window), np.int64)
        for j in range(blocks):
            block = f"backbone.layers.{s}.blocks.{j}.attn."
            tables |= {f"{block}relative_coords_table": offsets, f"{block}relative_position_index": index}
    return tables


def _sine_table(part: Any) -> dict[str, np.ndarray]:
    transformer, size = part.solver.transformer, getattr(part, "pad_to", 0) or part.image_size
    side = size // part.solver.backbone.stride
    table = sine_positions(side, side, transformer.dim, transformer.position_temperature)
    return {"transformer.enc_embed": table.reshape(1, side, side, -1)}


def _heads(part: Any, alone: bool) -> list[str]:
    """The published set-ups' heads of a part; the one for instances alone has that for detection too."""
    if part.kind == "maps":
        return [f"{part.modality.name}_head"]
    return ["det_head"] * alone + ["insseg_head"] * (part.tokenizer is not None)


def _loss_weights(part: Any) -> np.ndarray:
    vocabulary = part.vocabulary
    weights = np.ones(vocabulary.size, np.float32)
    weights[vocabulary.coordinates.slice] = part.box_weight
    weights[vocabulary.classes.start : vocabulary.noise + 1] = part.class_weight
    weights[vocabulary.codes_of("mask").slice] = part.mask_weight
    return weights
