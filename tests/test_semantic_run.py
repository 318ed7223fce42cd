"""Semantic maps through the package: evaluated over a whole set, predicted with names, written, exported."""

import json
import types
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict
from PIL import Image

from aitok_jax import Predictor, export, tasks
from aitok_jax.data import map_transforms
from aitok_jax.evaluators import evaluate, metric_names
from aitok_jax.predict.__main__ import main as predict
from aitok_jax.tasks.modalities import Semantic
from aitok_jax.tasks.modalities.semantic import palette
from aitok_jax.training import checkpoint
from aitok_jax.visualize import map_panel

NAMES = ("wall", "floor", "chair")
SEMANTIC = Semantic(classes=NAMES)
SIZE = 32


@dataclass(frozen=True)
class Thresholds:
    """Takes what is bright for wall, what is dark for floor."""

    kind: ClassVar[str] = "maps"
    meanings: ClassVar[dict] = {}
    eval_crop: None = None
    modality: Semantic = SEMANTIC

    def predict(self, params, model_state, batch):
        del model_state
        return {"semantic": (batch["image"][..., 0] < params["level"]).astype(jnp.int32)}


class Rooms:
    """Pictures of walls above floors; of some, a chair, and what is not annotated."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.names = [f"rgb_{i}.jpg" for i in range(count)]
        self.labels = np.where(np.arange(12)[:, None] < rng.integers(5, 9, (count, 1, 1)), 0, 1) * np.ones((1, 1, 16))
        self.labels[::2, 4:8, 3:6] = 2
        self.labels[1::2, :, 12:] = 255
        self.pictures = rng.integers(0, 256, (*self.labels.shape, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.names)

    def read(self, index):
        return {"image": self.pictures[index], "semantic": self.labels[index].astype(np.float32)}


def iou(truth, prediction, label):
    keep = truth != 255
    a, b = truth[keep] == label, prediction[keep] == label
    return (a & b).sum() / (a | b).sum()


def test_evaluation_is_over_all_pixels(tmp_path):
    """Also that of the baseline, the class that each pixel has most often in training; whatever the batches."""
    train, source = Rooms(9, 0), Rooms(5, 1)
    data = types.SimpleNamespace(train=train, eval=source, eval_transform=map_transforms.evaluation(SEMANTIC))
    params, options = {"level": jnp.float32(0.5)}, {"prefix": "semantic", "progress": False, "baseline": True}
    results = [evaluate(Thresholds(), params, {}, data, batch_size=size, **options) for size in (2, 5)]
    assert results[0] == pytest.approx(results[1])
    predicted = (source.pictures[..., 0] / 255 < 0.5).astype(int)
    counts = np.stack([(train.labels == label).sum(0) for label in range(3)])
    usual = np.broadcast_to(counts.argmax(0), source.labels.shape)
    for prefix, prediction in {"semantic": predicted, "baseline": usual}.items():
        ious = [iou(source.labels, prediction, label) for label in range(3)]
        for name, value in zip(NAMES, ious, strict=True):
            assert results[0][f"{prefix}/iou_{name}"] == pytest.approx(value, abs=1e-6)
        assert results[0][f"{prefix}/miou"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert all(isinstance(value, float) for value in results[0].values())
    assert metric_names(Thresholds()) == ("miou", "pixel_accuracy", "mean_accuracy")
    evaluate(Thresholds(), params, {}, data, batch_size=2, panels_dir=tmp_path, panels=2, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_panels_name_their_colours():
    image, labels = np.zeros((40, 60, 3), np.uint8), np.ones((40, 60), np.int32)
    plain = map_panel(SEMANTIC, image, labels)
    assert (plain == palette()[1]).all(-1).sum() > 10_000
    labels[:, :30] = 2
    both = map_panel(SEMANTIC, image, labels, truth=np.ones_like(labels))
    names = Semantic(classes=("wall", r"$\wrong{$", "chair"))  # no formula
    assert (map_panel(names, image, labels, truth=np.ones_like(labels)) != both).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights, whose solver has rows for more tasks than the published."""
    solver = {**tiny_runs.PARALLEL, "vocabulary": {"num_bins": 20, "num_classes": 3}}
    task = {"name": "semantic", **solver, "image_size": SIZE, "soft_input": False, "classes": list(NAMES)}
    config = ConfigDict({"task": {**task, "tokenizer": tiny_runs.TOKENIZER}})
    batch = {"image": np.zeros((1, SIZE, SIZE, 3), np.float32), "semantic": np.zeros((1, SIZE, SIZE), np.float32)}
    shapes = jax.eval_shape(tasks.build(config.task).init, jax.random.key(0), {"semantic": batch})
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(3)
    params, state = tree.unflatten(np.float32(rng.normal(0, 0.5, x.shape)) for x in leaves)
    folder = tmp_path_factory.mktemp("semantic") / "run"
    checkpoint.save_inference(folder, {"params": params, "model_state": state}, config)
    return folder


def test_the_solver_has_a_row_for_the_task(run):
    part = Predictor.load(run).parts["semantic"]
    assert (part.task_id, part.solver.transformer.num_tasks) == (4, 5)
    assert (part.tokenizer.channels, part.tokenizer.objective) == (3, "cross_entropy")


def test_predictions_have_names(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    predictor = Predictor.load(run)
    for augment in (False, True):
        result = predictor(image, augment=augment)
        assert result["names"] == list(NAMES)
        assert (result["semantic"].dtype, result["semantic"].shape) == (np.int32, (45, 60))
        assert set(np.unique(result["semantic"])) <= {0, 1, 2}
    plain = predictor(image)["semantic"]
    assert len(np.unique(plain)) > 1, "the test needs weights that say more than one class"
    Image.fromarray(image).save(tmp_path / "room.png")
    words = [f"--checkpoint={run}", "--task=semantic", f"--image={tmp_path / 'room.png'}", f"--out={tmp_path / 'out'}"]
    assert predict(words) == 0
    written = {path.name for path in (tmp_path / "out").glob("room_*")}
    assert written == {f"room_{end}" for end in ("semantic.png", "semantic.json", "confidence.npy", "panel.png")}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/room_semantic.png")), plain)
    assert json.loads((tmp_path / "out/room_semantic.json").read_text()) == list(NAMES)


def test_export(run, tmp_path):
    predictor = Predictor.load(run)
    outputs = export.export(predictor, tmp_path)["outputs"]
    assert (outputs["semantic"]["dtype"], outputs["semantic"]["shape"]) == ("int32", ["batch", SIZE, SIZE])
    assert max(export.compare(predictor, tmp_path).values()) < 1e-5
