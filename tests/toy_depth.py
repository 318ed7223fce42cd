"""A task whose depth can be computed by hand, for the tests of the Predictor and its command line."""

from dataclasses import dataclass

import jax.numpy as jnp
import ml_collections
import numpy as np

from aitok_jax import tasks
from aitok_jax.training import checkpoint

SHAPES = []


@dataclass(frozen=True)
class ToyTask:
    """Depth = 8 x red, 1 m more with `flip`; confidence = green; remembers the shapes that it was compiled for."""

    image_size: int = 48
    flip: bool = False
    eval_crop: None = None
    max_depth: float = 10.0

    def predict(self, params, model_state, batch):
        del model_state
        SHAPES.append(batch["image"].shape)
        return {"depth": params["scale"] * batch["image"][..., 0] + self.flip, "confidence": batch["image"][..., 1]}


def fake_checkpoint(monkeypatch):
    """Puts a checkpoint of the toy task at any path."""
    config = ml_collections.ConfigDict({"task": {"name": "depth", "image_size": 48}})
    weights = {"params": {"scale": jnp.float32(8)}, "model_state": {}}
    monkeypatch.setattr(checkpoint, "load_inference", lambda path: (config, weights))
    monkeypatch.setattr(tasks, "build", lambda config: ToyTask(image_size=config.image_size))


def picture(height, width, seed=0):
    """A smooth image, so that resizing changes little."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    planes = [40 + 150 * rows, 60 + 100 * columns, np.full((height, width), float(seed))]
    return np.stack(planes, -1).astype(np.uint8)
