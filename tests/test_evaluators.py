"""Evaluation: averages over images, invariance to batch size and devices, the baseline, panels."""

import types
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aitok_jax.data import map_transforms
from aitok_jax.evaluators import batches, evaluate
from aitok_jax.evaluators.metrics import inside
from aitok_jax.parallel import sharding
from aitok_jax.tasks.modalities import Depth, Normals
from aitok_jax.tasks.modalities.depth import EIGEN_CROP

DEPTH, NORMALS = Depth(), Normals()


@dataclass(frozen=True)
class ToyPart:
    """Predicts depth from the red channel."""

    kind: ClassVar[str] = "maps"
    eval_crop: tuple[int, int, int, int] | None = None
    modality: Depth = DEPTH
    confident: bool = True

    def predict(self, params, model_state, batch):
        del model_state
        maps = {"depth": params["scale"] * batch["image"][..., 0]}
        return maps | {"confidence": batch["image"][..., 1]} if self.confident else maps


class Examples:
    """Random pictures and depth maps with holes."""

    def __init__(self, count, seed=0, shape=(24, 32)):
        rng = np.random.default_rng(seed)
        self.pictures = rng.integers(1, 256, (count, *shape, 3), dtype=np.uint8)
        self.depths = rng.uniform(0.5, 12, (count, *shape)).astype(np.float32)
        self.depths[rng.random(self.depths.shape) < 0.1] = 0
        self.names = [f"room_{i % 2}/rgb_{i:05d}.jpg" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        return {"image": self.pictures[index], "depth": self.depths[index]}


PARAMS = {"scale": jnp.float32(9.0)}


def run(source, part=None, train=None, **options):
    data = types.SimpleNamespace(train=train, eval=source, eval_transform=map_transforms.evaluation(DEPTH))
    options = {"batch_size": 4, "prefix": "val", "progress": False} | options
    return evaluate(part or ToyPart(), PARAMS, {}, data, **options)


def depth_metrics(prediction, depth, modality=DEPTH, crop=None):
    return modality.metrics(prediction, depth, modality.measured(depth) & inside(crop, *depth.shape[1:])[None])


def expected(source, rows, **options):
    predictions = 9.0 * (source.pictures[rows, ..., 0].astype(np.float32) / 255)
    values = depth_metrics(predictions, source.depths[rows], **options)
    return {f"val/{name}": float(np.mean(np.asarray(value, np.float64))) for name, value in values.items()}


def test_averages_metrics_of_images():
    source = Examples(7)
    result = run(source, ToyPart(confident=False))
    reference = expected(source, np.arange(7))
    assert set(result) == set(reference)
    for name, value in reference.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_confidence_quality_is_measured():
    source = Examples(3)
    error = np.abs(9.0 * source.pictures[..., 0] / 255 - source.depths)
    source.pictures[..., 1] = np.clip(255 - 20 * error, 0, 255)
    assert run(source)["val/confidence_spearman"] > 0.95


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_same_result_for_any_batch_size(batch_size):
    source = Examples(7)
    result, reference = run(source, batch_size=batch_size), run(source, batch_size=7)
    for name, value in reference.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 3), (2, 8), (8, 8)])
def test_same_result_on_any_number_of_devices(tmp_path, devices, batch_size):
    source = Examples(11)
    reference = run(source)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    result = run(source, batch_size=batch_size, mesh=mesh, panels_dir=tmp_path, panels=2)
    for name, value in reference.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)
    assert len(list(tmp_path.iterdir())) == 2


def test_crop_and_maximum_come_from_the_part():
    source = Examples(3)
    result = run(source, ToyPart(eval_crop=(2, 20, 3, 30), modality=Depth(max_depth=6.0), confident=False))
    reference = expected(source, np.arange(3), crop=(2, 20, 3, 30), modality=Depth(max_depth=6.0))
    np.testing.assert_allclose(result["val/rmse"], reference["val/rmse"], rtol=1e-6)
    assert not np.isclose(result["val/rmse"], run(source)["val/rmse"], rtol=1e-3)


def test_images_without_depth_are_left_out_and_counted():
    source = Examples(5)
    source.depths[[1, 4]] = 0
    result = run(source, batch_size=2)
    assert result["val/images_without_depth"] == 2
    np.testing.assert_allclose(result["val/rmse"], expected(source, np.array([0, 2, 3]))["val/rmse"], rtol=1e-6)
    assert np.isfinite(list(result.values())).all()


def test_data_without_any_depth_is_an_error():
    source = Examples(3)
    source.depths[:] = 0
    with pytest.raises(ValueError, match="none of the 3 evaluation images has a pixel to measure depth on"):
        run(source)


def test_crop_outside_the_image_is_an_error():
    with pytest.raises(ValueError, match=r"\(45, 471, 41, 601\) does not fit .* 24x32"):
        run(Examples(2), ToyPart(eval_crop=EIGEN_CROP))


def test_baseline_is_the_mean_training_map():
    source, train = Examples(3), Examples(4, seed=1)
    result = run(source, train=train, baseline=True)
    mean = train.depths.sum(0, dtype=np.float64) / np.maximum((train.depths > 0).sum(0), 1)
    mean = np.tile(mean[None].astype(np.float32), (3, 1, 1))
    reference = depth_metrics(mean, source.depths)
    np.testing.assert_allclose(result["baseline/rmse"], np.mean(reference["rmse"]), rtol=1e-5)
    np.testing.assert_allclose(result["val/rmse"], run(source)["val/rmse"])
    assert not any(name.startswith("baseline") for name in run(source, train=train))
    assert not any(name.startswith("baseline") for name in run(source, baseline=True))


@dataclass(frozen=True)
class ToyNormals:
    """Predicts the direction that the parameters hold."""

    kind: ClassVar[str] = "maps"
    eval_crop: None = None
    modality: Normals = NORMALS

    def predict(self, params, model_state, batch):
        del model_state
        return {"normals": jnp.broadcast_to(params["direction"].reshape(1, 1, 1, 3), batch["normals"].shape)}


class Directions(Examples):
    """Random pictures, all surfaces of which point one way, but for those that are not annotated."""

    def __init__(self, count, direction, holes=0.1):
        super().__init__(count)
        self.maps = np.where(self.depths[..., None] > 12 * holes, np.float32(direction), 0)

    def read(self, index):
        return {"image": self.pictures[index], "normals": self.maps[index]}


def test_another_modality(tmp_path):
    """Towards the camera is predicted, where surfaces point at right angles to it; the mean map is in the middle."""
    half = np.sqrt(0.5)
    train = Directions(2, (0, 0, -1))
    train.maps[0, ..., 1:] = [-1, 0]
    train.maps[1, ..., 1:] = [0, -1]
    source = Directions(3, (0, -1, 0))
    data = types.SimpleNamespace(train=train, eval=source, eval_transform=map_transforms.evaluation(NORMALS))
    options = {"batch_size": 2, "prefix": "val", "progress": False, "baseline": True, "panels_dir": tmp_path}
    result = evaluate(ToyNormals(), {"direction": jnp.array([0.0, 0.0, -1.0])}, {}, data, panels=2, **options)
    names = {"mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"}
    assert set(result) == {f"{part}/{name}" for part in ("val", "baseline") for name in names}
    for name, degrees in {"val": 90, "baseline": 45}.items():
        assert result[f"{name}/mean_angle"] == pytest.approx(degrees, abs=1e-3)
        assert result[f"{name}/median_angle"] == pytest.approx(degrees, abs=1e-3)
        assert result[f"{name}/within_30"] == 0
    assert len(list(tmp_path.iterdir())) == 2
    right = evaluate(ToyNormals(), {"direction": jnp.array([0.0, -half, -half])}, {}, data, **options)
    assert right["val/mean_angle"] == pytest.approx(45, abs=1e-3)


def test_baseline_of_another_size_is_resized():
    train = Examples(2, shape=(48, 64))
    train.depths[:] = 3.0
    source = Examples(2)
    source.depths[:] = 5.0
    np.testing.assert_allclose(run(source, train=train, baseline=True)["baseline/rmse"], 2.0, rtol=1e-5)


def test_panels_of_the_first_examples(tmp_path):
    run(Examples(5), batch_size=2, panels_dir=tmp_path / "panels", panels=3)
    files = sorted(path.name for path in (tmp_path / "panels").iterdir())
    assert files == ["room_0_rgb_00000.png", "room_0_rgb_00002.png", "room_1_rgb_00001.png"]
    assert np.asarray(Image.open(tmp_path / "panels" / files[0])).shape[2] == 3


def test_progress_bar_counts_batches(capsys):
    run(Examples(5), batch_size=2, progress=True)
    assert "val" in (shown := capsys.readouterr().err)
    assert "/3" in shown


def test_next_batch_starts_before_the_last_is_used():
    started = []
    results = batches.run_batches(lambda batch: started.append(batch) or batch, [{"i": i} for i in range(3)])
    assert next(results)[1] == {"i": 0}
    assert len(started) == 2
    assert [result["i"] for _, result in results] == [1, 2]
