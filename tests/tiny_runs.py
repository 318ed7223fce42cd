"""Run directories of tiny models with random weights, for the tests of prediction and export."""

import jax
import ml_collections
import numpy as np

from aitok_jax import tasks
from aitok_jax.training import checkpoint

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 2, "name": "dog"}, {"id": 90, "name": "sofa"}]
BACKBONE = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "windows": [4, 4],
    "pretrain_windows": [4, 4],
    "use_shift": [True, False],
}
TRANSFORMER = {"dim": 16, "num_heads": 2, "hidden": 16, "encoder_layers": 1, "decoder_layers": 1, "num_tasks": 3}
TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 0, "num_codes": 5, "code_dim": 4}
MASKS = TOKENIZER | {"objective": "mse"}
SIZES = {"num_bins": 20, "num_classes": 3, "codes": [["mask", 5], ["depth", 5]]}
SHARED = {"backbone": BACKBONE, "transformer": {**TRANSFORMER, "max_length": 108}, "vocabulary": SIZES}
# Weights that were never trained say the same of every object, unless they are sampled
OBJECTS = {"image_size": 32, "num_objects": 12, "mask_size": 16, "top_p": 1.0}
DEPTH = {"image_size": 24, "pad_to": 32, "tokenizer": TOKENIZER}
PARALLEL = SHARED | {"transformer": {**SHARED["transformer"], "parallel": True}}
KINDS = {
    "detection": {"name": "instances", **SHARED, **OBJECTS},
    "instances": {"name": "instances", **SHARED, **OBJECTS, "tokenizer": MASKS},
    "depth": {"name": "depth", **PARALLEL, **DEPTH, "soft_input": False},
    "joint": {
        "name": "joint",
        "shared": SHARED,
        "depth": DEPTH,
        "instances": {**OBJECTS, "tokenizer": MASKS},
    },
}


def write(folder, kind):
    """Writes FOLDER/KIND, a run of one of `KINDS`, and returns its path."""
    image = {"image": np.zeros((1, 32, 32, 3), np.float32)}
    batches = {"instances": image, "depth": {**image, "depth": np.zeros((1, 24, 24), np.float32)}}
    config = ml_collections.ConfigDict({"task": KINDS[kind], "categories": CATEGORIES})
    shapes = jax.eval_shape(tasks.build(config.task).init, jax.random.key(0), batches)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(8)
    params, model_state = tree.unflatten(np.float32(rng.normal(0, 0.3, x.shape)) for x in leaves)
    checkpoint.save_inference(folder / kind, {"params": params, "model_state": model_state}, config)
    return folder / kind


def assert_same_results(found, expected):
    """COCO results, but for rounding, which differs between batches of different sizes."""
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(a["score"], b["score"], atol=1e-5)
        np.testing.assert_allclose(a["bbox"], b["bbox"], rtol=1e-5)
        for name in a.keys() - {"score", "bbox"}:
            assert a[name] == b[name]
