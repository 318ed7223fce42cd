"""A tiny depth task with random weights and batches, for the tests of tasks with maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax import tasks

SIZE, GRID, K = 24, 3, 6
TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 0, "num_codes": K, "code_dim": 4}
CONFIG = {
    "name": "depth",
    "image_size": SIZE,
    "tokenizer": TOKENIZER,
    "vocabulary": {"num_bins": 2, "num_classes": 2, "codes": [["mask", 3]], "num_spare": 2},
    "backbone": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "windows": [3, 3],
        "pretrain_windows": [3, 3],
        "use_shift": [True, False],
    },
    "transformer": {
        "dim": 16,
        "num_heads": 2,
        "hidden": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_length": GRID**2,
        "num_tasks": 3,
        "drop_path": 0.0,
        "dropout": 0.0,
    },
}
TASK = tasks.build(CONFIG)
PART = TASK.parts["depth"]
CODES = TASK.vocabulary.codes_of("depth")


def whole(part, **fields):
    """A task of this part alone."""
    return dataclasses.replace(TASK, **{"solver": part.solver, "parts": {"depth": part}, **fields})


def example():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 9, (2, SIZE, SIZE)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.2] = 0
    return {"image": rng.random((2, SIZE, SIZE, 3), np.float32), "depth": depth}


def random_state(task, batch):
    """(params, model_state), large enough for every part to matter; the tokenizer decodes to positive depths."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        positive = path[-1].key in ("scale", "cluster_size") or path[-2].key == "layers_8"
        return jnp.asarray((3.0 if positive else 0.0) + rng.normal(0, 0.3, shape.shape), jnp.float32)

    batches = dict.fromkeys(task.parts, batch)
    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(task.init, jax.random.key(0), batches))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
