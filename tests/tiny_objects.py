"""Tiny instance, detection and joint tasks with random weights and batches, for the tests of tasks with objects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SIZE, OBJECTS, CROP, CODES = 24, 4, 8, 5
MASK_TOKENS, LENGTH = 4, 9  # of an object
VOCABULARY = {"num_bins": 12, "num_classes": 3, "num_spare": 2}
SHARED = {
    "backbone": {
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [2],
        "windows": [3],
        "pretrain_windows": [3],
        "use_shift": [True],
        "patch": 8,
    },
    "transformer": {
        "dim": 16,
        "num_heads": 2,
        "hidden": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_length": OBJECTS * LENGTH,
        "num_tasks": 3,
        "drop_path": 0.0,
        "dropout": 0.0,
    },
}
MASK_TOKENIZER = {
    "hidden": 4,
    "downsample": 4,
    "num_res_blocks": 0,
    "num_codes": CODES,
    "code_dim": 4,
    "objective": "mse",
    "use_norm": True,
    "max_value": 1.0,
    "soft_temperature": 1.0,
}
OWN = {"image_size": SIZE, "num_objects": OBJECTS, "mask_size": CROP, "tokenizer": MASK_TOKENIZER}
CONFIG = {"name": "instances", **SHARED, **OWN, "vocabulary": VOCABULARY}


def batch(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Images with boxes; the first 0, 1, 2, ... slots are real, of the rest every other one has no mask."""
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, SIZE, (count, OBJECTS, 2, 2)), 2).reshape(count, OBJECTS, 4)
    slots = np.arange(OBJECTS)
    real = slots < np.arange(count)[:, None] % (OBJECTS + 1)
    kind = np.where(real, 0, 1 + slots % 2)
    crops = rng.random((count, OBJECTS, CROP, 1)) < rng.random((count, OBJECTS, 1, CROP))
    return {
        "image": rng.random((count, SIZE, SIZE, 3), np.float32),
        "objects/boxes": boxes.astype(np.float32),
        "objects/classes": np.where(real, rng.integers(0, 3, kind.shape), -1).astype(np.int32),
        "objects/kind": kind.astype(np.int32),
        "objects/crops": (crops & (kind != 2)[..., None, None]).astype(np.uint8),
        "id": np.arange(count, dtype=np.int32),
    }


def random_state(task, batches, seed=1):
    """(params, model_state), large enough for everything to matter."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        deviation = 1.0 if name in ("dec_embed", "embedding") else 0.3
        return jnp.asarray(
            (3.0 if name in ("scale", "cluster_size") else 0) + rng.normal(0, deviation, shape.shape), "f4"
        )

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(task.init, jax.random.key(0), batches))


@functools.cache
def _compiled_tokenizer(tokenizer, method):
    return jax.jit(functools.partial(tokenizer.apply, method=method))


def tokenizer_apply(part, state, method, x) -> np.ndarray:
    """A method of the frozen mask tokenizer, row by row, as arrays of one object each."""
    frozen = state[1]["mask_tokenizer"]
    variables = {"params": frozen["params"], **frozen["model_state"]}
    apply = _compiled_tokenizer(part.tokenizer, method)
    return np.concatenate([apply(variables, jnp.asarray(one[None])) for one in x])
