"""Semantic maps: what they are for the VQ-VAE, their numbers against others' rules, files, and the scenes' classes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aitok_jax.data import scenes
from aitok_jax.evaluators.batches import Mean
from aitok_jax.models import losses
from aitok_jax.predict.views import NUM_VIEWS, average_views
from aitok_jax.scenes.render import LABELS, render
from aitok_jax.scenes.rooms import sample_room
from aitok_jax.tasks.modalities import Semantic
from aitok_jax.tasks.modalities.semantic import palette

NAMES = ("wall", "floor", "chair", "lamp")
SEMANTIC = Semantic(classes=NAMES)


def test_semantic_for_the_vqvae():
    map_ = np.float32([[[0, 3, 255], [2, 2, 1]]])
    seen = SEMANTIC.encode(map_)
    assert (SEMANTIC.channels, seen.dtype) == (4, np.float32)
    np.testing.assert_array_equal(seen[0, 0], [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(jax.jit(SEMANTIC.encode)(map_), seen)
    np.testing.assert_array_equal(SEMANTIC.valid(map_)[0], [[True, True, False], [True, True, True]])
    finished = SEMANTIC.finish(jnp.asarray(3 * seen - 1))
    assert finished.dtype == jnp.int32
    np.testing.assert_array_equal(finished[0][SEMANTIC.valid(map_)[0]], map_[0][SEMANTIC.valid(map_)[0]])
    assert SEMANTIC.legend == {"names": list(NAMES)}
    assert SEMANTIC.mirror(map_) is map_


def test_the_auxiliary_loss_is_the_cross_entropy_of_what_is_annotated():
    rng = np.random.default_rng(0)
    raw, map_ = rng.normal(size=(2, 3, 5, 4)).astype(np.float32), rng.integers(0, 4, (2, 3, 5)).astype(np.float32)
    map_[0, 1] = 255
    chances = np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)
    right = np.take_along_axis(chances, np.minimum(map_, 3).astype(int)[..., None], -1)[..., 0]
    found = SEMANTIC.auxiliary(jnp.asarray(raw), map_)
    np.testing.assert_allclose(found["pixel_cross_entropy"], -np.log(right[map_ != 255]).mean(), rtol=1e-5)
    none = losses.real_rows(jnp.asarray(map_), jnp.zeros(2), SEMANTIC.missing)
    assert SEMANTIC.auxiliary(jnp.asarray(raw), none)["pixel_cross_entropy"] == 0


def test_codes_of_one_class_agree_whatever_their_logits():
    values = 9 * np.float32([[1, 0, 0, 0], [3, 0, 0, 0], [0, 1, 0, 0]])
    chances = np.float32([[[0.5, 0.5, 0], [0.5, 0, 0.5]]])
    np.testing.assert_allclose(
        SEMANTIC.spread(jnp.asarray(chances), jnp.asarray(values)), [[0, np.sqrt(0.5)]], atol=2e-3
    )


def reference(truth, prediction, classes):
    """Mean IoU as mmsegmentation and torchmetrics have it: histograms of all images together, NaN where both are empty.

    Also by sets of pixels, as scikit-learn's `jaccard_score(average="macro")`.
    """
    keep = truth != 255
    truth, prediction = truth[keep].astype(int), prediction[keep].astype(int)
    both = np.bincount(truth[truth == prediction], minlength=classes)
    union = np.bincount(truth, minlength=classes) + np.bincount(prediction, minlength=classes) - both
    ious = np.where(union > 0, both / np.maximum(union, 1), np.nan)
    labels = sorted({*truth, *prediction})
    jaccard = [np.sum((truth == k) & (prediction == k)) / np.sum((truth == k) | (prediction == k)) for k in labels]
    np.testing.assert_allclose(np.nanmean(ious), np.mean(jaccard), rtol=1e-12)
    return ious


def measured(modality, prediction, truth, batch):
    """As the evaluator does it: batches of images, means, and what is made of these."""
    mean = Mean()
    for start in range(0, len(truth), batch):
        part = slice(start, start + batch)
        columns = modality.metrics(jnp.asarray(prediction[part]), truth[part], modality.valid(truth[part]))
        mean.add(columns, np.ones(len(truth[part]), bool))
    return modality.overall(mean.result())


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_the_reference(seed):
    """Confusions add up over the whole set; images of few pixels count less, whatever the batches."""
    rng, names = np.random.default_rng(seed), tuple("abcdefg")
    truth = rng.integers(0, 5, (7, 12, 9)).astype(np.float32)  # f is predicted only, g is not there at all
    prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 6, truth.shape)).astype(np.int32)
    truth[rng.random(truth.shape) < rng.random((7, 1, 1))] = 255
    ious = reference(truth, prediction, 7)
    assert np.isnan(ious[6])
    assert ious[5] == 0
    for batch in (1, 4, 7):
        found = measured(Semantic(classes=names), prediction, truth, batch)
        assert abs(found["miou"] - np.nanmean(ious)) < 1e-6
        for i, name in enumerate(names[:6]):
            assert abs(found[f"iou_{name}"] - ious[i]) < 1e-6
        assert "iou_g" not in found
        valid = truth != 255
        assert abs(found["pixel_accuracy"] - np.mean((prediction == truth)[valid])) < 1e-6
        each = [np.mean(prediction[truth == k] == k) for k in range(5)]
        assert abs(found["mean_accuracy"] - np.mean(each)) < 1e-6


def test_a_known_value():
    """IoU of wall 2/4, floor 1/2, chair 0; lamp is not there."""
    truth, prediction = np.float32([[[0, 0, 0, 1, 1, 255]]]), np.int32([[[0, 0, 2, 0, 1, 3]]])
    found = measured(SEMANTIC, prediction, truth, 1)
    assert found == pytest.approx(
        {
            "miou": 1 / 3,
            "pixel_accuracy": 3 / 5,
            "mean_accuracy": (2 / 3 + 1 / 2) / 2,
            "iou_wall": 0.5,
            "iou_floor": 0.5,
            "iou_chair": 0,
        }
    )
    cropped = SEMANTIC.metrics(prediction, truth, np.array([[[True, True, False, False, False, False]]]))["confusion"]
    np.testing.assert_array_equal(cropped, [np.diag([2, 0, 0, 0])])
    np.testing.assert_array_equal(SEMANTIC.error(prediction, truth)[0, 0, :5], [0, 0, 1, 1, 0])
    assert SEMANTIC.summary(np.float32([0, 0, 1, 1, 0])) == "40.0 % wrong"


def test_resized_maps_hold_classes_alone():
    """A pixel gets the class that has most of it, not the one between."""
    map_ = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [3, 3, 2, 2], [3, 0, 3, 3]], np.int32)
    np.testing.assert_array_equal(SEMANTIC.resized(map_, 2, 2), [[0, 2], [3, 2]])
    large = SEMANTIC.resized(map_, 13, 17)
    assert (large.shape, large.dtype, set(np.unique(large))) == ((13, 17), np.int32, {0, 2, 3})
    assert SEMANTIC.resized(map_, 4, 4) is map_


def test_views_are_averaged_as_votes():
    maps = [np.full((44, 66), label, np.int32) for label in (2, *[0] * (NUM_VIEWS - 1))]
    maps[0][:20] = 0
    views = [{"semantic": map_, "confidence": np.ones((44, 66), np.float32)} for map_ in maps]
    found = average_views(views, SEMANTIC)["semantic"]
    assert (found.dtype, set(np.unique(found))) == (np.int32, {0})
    views[1:] = views[:1] * (NUM_VIEWS - 1)
    assert set(np.unique(average_views(views, SEMANTIC)["semantic"])) == {0, 2}


def test_semantic_files(tmp_path):
    """Indexed, with names beside them, and what is written comes back."""
    map_ = np.array([[0, 1, 2], [3, 0, 1]], np.int32)
    SEMANTIC.write(tmp_path / "room", map_)
    assert {path.name for path in tmp_path.iterdir()} == {f"room_semantic{suffix}" for suffix in SEMANTIC.writes}
    assert json.loads((tmp_path / "room_semantic.json").read_text()) == list(NAMES)
    picture = Image.open(tmp_path / "room_semantic.png")
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), palette()[map_])
    read = SEMANTIC.read((tmp_path / "room_semantic.png").read_bytes())
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, map_)


def test_colours_differ():
    assert len({tuple(color) for color in palette()[:40]}) == 40
    assert palette().shape == (256, 3)
    (tile,) = SEMANTIC.tiles([np.float32([[1, 255]])])
    np.testing.assert_array_equal(tile.values, [[palette()[1], (128, 128, 128)]])


def png(tmp_path, array, mode=None):
    picture = Image.fromarray(array)
    picture = picture if mode is None else picture.convert(mode)
    picture.save(tmp_path / "labels.png")
    return (tmp_path / "labels.png").read_bytes()


def test_grey_labels_are_read(tmp_path):
    labels = np.array([[0, 1, 255], [3, 4, 2]])
    np.testing.assert_array_equal(
        Semantic(classes=(*NAMES, "door")).read(png(tmp_path, labels.astype(np.uint8))), labels
    )
    from_one = Semantic(classes=NAMES, first_label=1)
    for kind in (np.uint8, np.uint16):
        read = from_one.read(png(tmp_path, labels.astype(kind)))
        np.testing.assert_array_equal(read, [[255, 0, 255], [2, 3, 1]])


def test_other_pictures_are_no_labels(tmp_path):
    with pytest.raises(ValueError, match=r"label 4 is beyond the 4 classes, 0 to 3; name all classes, or write 255"):
        SEMANTIC.read(png(tmp_path, np.uint8([[0, 4], [1, 255]])))
    for mode in ("RGB", "RGBA", "1"):
        with pytest.raises(ValueError, match=rf"one number a pixel, but Pillow reads mode '{mode}'; write the numbers"):
            SEMANTIC.read(png(tmp_path, np.zeros((4, 4), np.uint8), mode))


@pytest.mark.parametrize("classes", [(), ("a", "b", "a"), tuple(map(str, range(256)))])
def test_classes_are_a_list_of_names(classes):
    with pytest.raises(ValueError, match=r"classes=.* must be 1 to 255 different names"):
        Semantic(classes=classes)


def test_labels_of_scenes_are_those_of_their_objects_and_surfaces():
    """Masks have the class of the object; beside them floors point up, ceilings down and walls to the side."""
    for seed in range(6):
        scene = render(seed, 96, 128)
        for mask, label in zip(scene.masks, scene.classes, strict=True):
            assert {LABELS[i] for i in scene.labels[mask]} == {LABELS[3:][label]}
        assert (scene.labels.shape, scene.labels.dtype) == ((96, 128), np.uint8)
        room = scene.labels < 3
        assert not (room & scene.masks.any(0)).any()
        up = -scene.normals[..., 1]  # but for the camera's pitch, up to 25 degrees, and roll
        walls, floor, ceiling = (scene.labels == label for label in range(3))
        assert np.mean(up[floor] > 0.85) > 0.99
        assert not ceiling.any() or np.mean(up[ceiling] < -0.85) > 0.95
        assert np.mean(np.abs(up[walls]) < 0.6) > 0.97
        assert walls.sum() > 100


def test_what_is_fixed_belongs_to_the_face_that_it_is_fixed_to():
    for seed in range(8):
        world, _ = sample_room(np.random.default_rng(seed))
        fixed = world.solid_object < 0
        center, faces = world.solids.center[fixed], world.solid_face[fixed]
        distance = np.concatenate([center, world.room - center], 1)[np.arange(len(faces)), faces % 2 * 3 + faces // 2]
        assert distance.max() < 0.07
        assert {4, 5} - set(faces) <= {4}, "a lamp is under every ceiling"


def test_labels_that_scenes_write_come_back(tmp_path):
    scenes.write(tmp_path, train=2, test=1, height=48, width=64, seed=2, workers=1)
    assert (tmp_path / "classes.txt").read_text().split() == list(LABELS)
    for index, path in enumerate(sorted(tmp_path.glob("scene_*/semantic_*.png"))):
        expected = render(scenes._scene_seed("train", 2, index), 48, 64).labels
        np.testing.assert_array_equal(Semantic(classes=LABELS).read(path.read_bytes()), expected)
    assert index == 1
