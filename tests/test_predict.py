"""The Predictor, with a toy model whose depth can be computed by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import KINDS
from toy_depth import SHAPES, fake_checkpoint, picture, toy_task

from aitok_jax import tasks
from aitok_jax.image import read_image
from aitok_jax.predict.predictor import Predictor, plan_batches


@pytest.fixture
def predictor():
    return Predictor(toy_task(), {"scale": np.float32(8)}, {})


def test_image_of_the_model_size_is_not_resized(predictor):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    maps = predictor(image)
    assert predictor.tasks == ("depth",)
    assert set(maps) == {"depth", "confidence"}
    depth = np.maximum(8 * image[..., 0].astype(np.float32) / 255, 1e-3)
    np.testing.assert_allclose(maps["depth"], depth, rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"], image[..., 1].astype(np.float32) / 255, rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (97, 131), (131, 97), (200, 61), (1, 1), (48, 49)])
def test_maps_have_the_size_and_place_of_the_image(predictor, height, width):
    image = picture(height, width)
    maps = predictor(image, task="depth")
    for name, channel, scale in (("depth", 0, 8), ("confidence", 1, 1)):
        assert maps[name].dtype == np.float32
        assert maps[name].shape == (height, width)
        tolerance = scale * 0.05
        np.testing.assert_allclose(maps[name], scale * image[..., channel].astype(np.float32) / 255, atol=tolerance)
    assert maps["confidence"].min() >= 0
    assert maps["confidence"].max() <= 1


def test_similar_sizes_compile_once():
    predictor = Predictor(toy_task(image_size=30), {"scale": np.float32(8)}, {})
    SHAPES.clear()
    for width in (1920, 1910, 1930):
        predictor(picture(1080, width))
    predictor(picture(40, 30))
    assert SHAPES == [(1, 30, 54, 3), (1, 40, 30, 3)]


def test_shrinking_antialiases(predictor):
    stripes = np.zeros((480, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    depth = predictor(stripes)["depth"][20:-20, 20:-20]
    np.testing.assert_allclose(depth, 4.0, atol=0.2)


def test_list_of_images(predictor):
    images = [picture(30, 40), picture(60, 50)]
    results = predictor(images)
    assert [maps["depth"].shape for maps in results] == [(30, 40), (60, 50)]
    np.testing.assert_array_equal(results[1]["depth"], predictor(images[1])["depth"])
    assert predictor([]) == []


def test_images_of_one_size_are_predicted_together():
    predictor = Predictor(toy_task(image_size=18), {"scale": np.float32(8)}, {})
    wide, tall = [picture(30, 40 + i, i) for i in range(2)], [picture(50, 30, i) for i in range(7)]
    images = [*tall[:3], *wide, *tall[3:]]
    SHAPES.clear()
    results = predictor(images, batch_size=4)
    # seven tall ones: four, and three filled up to four; two wide ones are half a batch and go one by one
    assert SHAPES == [(4, 30, 18, 3), (1, 18, 24, 3)]
    for image, maps in zip(images, results, strict=True):
        alone = predictor(image)
        for name in ("depth", "confidence"):
            np.testing.assert_allclose(maps[name], alone[name], rtol=1e-6, err_msg=name)
            assert maps[name].shape == image.shape[:2]
            assert maps[name].flags.writeable
    with pytest.raises(ValueError, match=r"batch_size=0 .* at least 1"):
        predictor(images, batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_batches_hold_every_image_once_and_waste_less_than_half(batch_size):
    sizes = list(np.random.default_rng(0).choice(["wide", "tall", "square"], 50, p=[0.7, 0.2, 0.1]))
    planned = plan_batches(sizes, batch_size)
    assert sorted(i for indices, _ in planned for i in indices) == list(range(50))
    for indices, rows in planned:
        assert len({sizes[i] for i in indices}) == 1
        assert rows in (1, batch_size)
        assert rows / 2 < len(indices) <= rows
    assert len(planned) < 50 or batch_size == 1


def test_augmentation(predictor):
    """Mirror image and enlarged corners, whose depth counts more, in batches; the default stays as it is configured."""
    images = [picture(60, 80), picture(48, 48), picture(90, 120)]
    SHAPES.clear()
    results = predictor(images, augment=True)
    # ten views of 48x64: 4, 4, and two one by one; five of 48x48: 4 and 1
    assert SHAPES == [(4, 48, 64, 3), (1, 48, 64, 3), (4, 48, 48, 3), (1, 48, 48, 3)]
    for image, maps in zip(images, results, strict=True):
        red, green, _ = np.moveaxis(image / np.float32(255), -1, 0)
        np.testing.assert_allclose(maps["depth"], (1 + 48 / 44) / 2 * (8 * red + 1), atol=0.1)
        np.testing.assert_allclose(maps["confidence"], green, atol=0.02)
        np.testing.assert_allclose(predictor(image)["depth"], 8 * red, atol=0.1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), "uint8.*float32"),
        (np.zeros((4, 5), np.uint8), r"\[H, W, 3\].*\(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "list"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros((4, 400, 3), np.uint8), "4x400"),
        (Image.new("RGB", (4, 4)), "NumPy array"),
        ("room.jpg", "NumPy array"),
        ([np.zeros((4, 5), np.uint8)], r"\(4, 5\)"),
    ],
)
def test_wrong_images_are_refused(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor(image)


def test_unknown_tasks_are_refused(predictor):
    with pytest.raises(ValueError, match=r"task='instances'.*'depth'"):
        predictor(picture(30, 40), task="instances")
    tokenizer = tasks.build({"name": "depth_tokenizer", "image_size": 32, "tokenizer": KINDS["depth"]["tokenizer"]})
    with pytest.raises(ValueError, match="a run of depth_tokenizer does not predict from images"):
        Predictor(tokenizer, {}, {})
    with pytest.raises(ValueError, match="no objects"):
        predictor.coco_results(picture(30, 40))


def test_load(monkeypatch):
    fake_checkpoint(monkeypatch)
    image = picture(48, 48)
    depth = Predictor.load("x")(image)["depth"]
    np.testing.assert_allclose(depth, 8 * image[..., 0].astype(np.float32) / 255, rtol=1e-6)


def test_exif_orientation(tmp_path):
    image = picture(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.rot90(image, -1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (6, 5), "white").convert(mode).save(file)
    read = read_image(file)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.full((5, 6, 3), 255))


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path):
    Image.fromarray(np.full((5, 6), 0x8012, np.uint16)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.full((5, 6, 3), 0x80))


def test_predicting_needs_no_tensorflow():
    code = "import sys, aitok_jax.predict.predictor; sys.exit('tensorflow' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
