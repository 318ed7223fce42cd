"""A task whose depth can be computed by hand, for the tests of the Predictor and its command line."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import jax.numpy as jnp
import ml_collections
import numpy as np

from aitok_jax import tasks
from aitok_jax.tasks.modalities import Depth
from aitok_jax.training import checkpoint

SHAPES = []
DEPTH = Depth()


@dataclass(frozen=True)
class ToyPart:
    """Depth = 8 x red, 1 m more with `flip`; confidence = green; remembers the shapes that it was compiled for."""

    kind: ClassVar[str] = "maps"
    answers: ClassVar[tuple[str, ...]] = ("depth",)

    image_size: int = 48
    pad_to: int = 0
    normalize_image: bool = False
    flip: bool = False
    blend: bool = False
    eval_crop: None = None
    modality: Depth = DEPTH

    def predict(self, params, model_state, batch):
        del model_state
        SHAPES.append(batch["image"].shape)
        return {"depth": params["scale"] * batch["image"][..., 0] + self.flip, "confidence": batch["image"][..., 1]}


def toy_task(**fields):
    return SimpleNamespace(parts={"depth": ToyPart(**fields)})


def fake_checkpoint(monkeypatch):
    """Puts a checkpoint of the toy task at any path."""
    config = ml_collections.ConfigDict({"task": {"name": "depth", "image_size": 48}})
    weights = {"params": {"scale": jnp.float32(8)}, "model_state": {}}
    monkeypatch.setattr(checkpoint, "load_inference", lambda path: (config, weights))
    monkeypatch.setattr(tasks, "build", lambda config: toy_task(image_size=config.image_size))


def picture(height, width, seed=0):
    """A smooth image, so that resizing changes little."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    planes = [40 + 150 * rows, 60 + 100 * columns, np.full((height, width), float(seed))]
    return np.stack(planes, -1).astype(np.uint8)
