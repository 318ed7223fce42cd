"""Batches that the devices do not divide: filled up by rows that count nowhere, they train as on one device."""

import jax
import numpy as np
import pytest
import tiny_maps
import tiny_objects as tiny

from aitok_jax import tasks
from aitok_jax.data import pipeline
from aitok_jax.models import losses
from aitok_jax.parallel import sharding
from aitok_jax.training import accumulate

REAL, DEVICES = (3, 5), 8  # examples of the first part and, in joint tasks, of the second
MAPS = {"image_size": 16, "mask_ratio": 0.5, "mask_patch": 4}
DEPTH = {"image_size": tiny.SIZE, "tokenizer": tiny_maps.TOKENIZER, "memory_weight": 0.5, "input_noise": 0.3}
CODES = [["mask", tiny.CODES], *([name, tiny_maps.K] for name in ("depth", "normals", "semantic"))]
TRANSFORMER = tiny.SHARED["transformer"] | {"num_tasks": 4}
SHARED = tiny.SHARED | {"transformer": TRANSFORMER, "vocabulary": tiny.VOCABULARY | {"codes": CODES}}
CLASSES = {"classes": ("wall", "floor", "chair")}
SOLVERS = {
    "joint": {"depth": DEPTH, "instances": tiny.OWN | {"memory_weight": 0.5}},
    "depth": {"depth": DEPTH},
    "normals": {"normals": DEPTH | {"memory_weight": 0.0}},
    "semantic": {"semantic": DEPTH | {"memory_weight": 0.5, **CLASSES}},
    "detection": {"instances": tiny.OWN | {"tokenizer": None, "memory_weight": 0.5}},
}
TOKENIZERS = {name: ("depth", {"objective": name}) for name in losses.RECONSTRUCTION if name != "cross_entropy"}
TOKENIZERS |= {
    "restarts": ("depth", {"restart_threshold": 3.0}),
    "normals tokenizer": ("normals", {}),
    "semantic tokenizer": ("semantic", {}),
    "mask tokenizer": ("mask", tiny.MASK_TOKENIZER),
}


def solver(parts):
    return tasks.build({"name": "solver", "shared": SHARED, "parts": parts})


def tokenizer(kind, fields):
    own = {"image_size": 16} if kind == "mask" else MAPS
    own = own | {"tokenizer": tiny_maps.TOKENIZER | fields} | (CLASSES if kind == "semantic" else {})
    return tasks.build({"name": "tokenizer", "parts": {kind: own}})


TASKS = {name: (solver, (parts,)) for name, parts in SOLVERS.items()}
TASKS |= {name: (tokenizer, given) for name, given in TOKENIZERS.items()}


def rows(task, part, count):
    """Examples of a part, no two alike."""
    size, rng = task.parts[part].image_size, np.random.default_rng(4)
    if part == "instances":
        return tiny.batch(count, seed=4)
    holes = rng.random((count, size, size)) < rng.random((count, 1, 1))
    depth = np.where(holes, 0, rng.uniform(1, 9, (count, size, size)))
    normals = rng.normal(size=(count, size, size, 3))
    maps = {
        "depth": depth,
        "normals": np.where(holes[..., None], 0, normals / np.linalg.norm(normals, axis=-1, keepdims=True)),
        "semantic": np.where(holes, 255, rng.integers(0, 3, depth.shape)),
        "mask": rng.random((count, size, 1)) < rng.random((count, 1, size)),
    }
    image = rng.random((count, size, size, 3), np.float32)
    return {"image": image, {"mask": "instance"}.get(part, part): maps[part].astype(np.float32)}


def stepper(task, state, devices):
    """A function of a host batch: loss, metrics, new model state and gradients on so many devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    gradient = accumulate.value_and_grad(task, 1, mesh, sharding.state_shardings(state[0], mesh))

    def step(params, model_state, batches, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradient(params, model_state, batches, key)

    jitted, key = jax.jit(step), jax.random.key(7)
    placed = jax.device_put((*state, key), sharding.replicated(mesh))
    return lambda batches: jax.device_get(jitted(*placed[:2], sharding.shard_batch(batches, mesh), placed[2]))


def assert_close(ours, expected, tolerance):
    """To a share of each number, or of the largest in the tree, where large ones add up to a small one."""
    largest = max((np.abs(b).max() for b in jax.tree.leaves(expected)), default=0)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize("name", TASKS)
def test_filled_rows_count_nowhere(name):
    """Loss, metrics, gradients and codebook are those of the real rows on one device, whatever fills the batch up."""
    build, given = TASKS[name]
    task = build(*given)
    real, fillings = {}, [{}, {}]
    for part, count in zip(task.parts, REAL, strict=False):
        more = rows(task, part, count + 1)
        real[part] = {key: x[:count] for key, x in more.items()}
        for filled, example in zip(fillings, (real[part], more), strict=True):
            filled[part] = pipeline.fill_up(example, DEVICES, real=count)
    state = tiny_maps.random_state(task, *real.values()) if build is tokenizer else tiny.random_state(task, real)
    on_all = stepper(task, state, DEVICES)
    ours, other = map(on_all, fillings)
    jax.tree.map(np.testing.assert_array_equal, ours, other)
    (loss, (metrics, moved)), gradients = ours
    (expected_loss, (expected_metrics, expected_moved)), expected_gradients = stepper(task, state, 1)(real)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=key)
    assert_close(moved, expected_moved, 1e-6)
    # Rounding makes as much of a difference between one device and eight where the batch divides
    assert_close(gradients, expected_gradients, 1e-6 if build is tokenizer else 3e-5)
