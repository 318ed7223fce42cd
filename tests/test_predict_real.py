"""Real photographs and odd files through tiny models with random weights: each gives a result of its own size."""

import json

import numpy as np
import pytest
import tiny_objects as tiny
import tiny_runs
from PIL import Image

from aitok_jax import Predictor, tasks
from aitok_jax.image import read_image
from aitok_jax.predict import __main__ as command
from aitok_jax.tasks.base import compiled_predict


@pytest.fixture(scope="module")
def depth():
    """So small that few sizes are told apart: a size takes most of the time to compile."""
    shared = {**tiny.SHARED, "transformer": {**tiny.SHARED["transformer"], "parallel": True}}
    own = {"image_size": 8, "tokenizer": {"kind": "bins", "num_codes": 5, "downsample": 8}}
    options = {"vocabulary": tiny.VOCABULARY, "soft_input": False, "flip": False}
    task = tasks.build({"name": "depth", **shared, **own, **options})
    batch = {"image": np.zeros((1, 8, 8, 3), np.float32), "depth": np.zeros((1, 8, 8), np.float32)}
    return Predictor(task, *tiny.random_state(task, {"depth": batch}))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return Predictor.load(tiny_runs.write(tmp_path_factory.mktemp("run"), "instances"))


@pytest.fixture(scope="module")
def frames(nyu_frames):
    files = sorted(nyu_frames.parent.rglob("rgb_*.jpg"))
    assert len(files) == 56
    return [read_image(file) for file in files]


@pytest.fixture(scope="module")
def photographs(coco_subset):
    files = sorted(coco_subset.rglob("*.jpg"))
    assert len(files) == 67
    return [read_image(file) for file in files]


def assert_depth(images, results):
    for image, maps in zip(images, results, strict=True):
        for name, (low, high) in {"depth": (1e-3, 10), "confidence": (0, 1)}.items():
            assert maps[name].shape == image.shape[:2]
            assert maps[name].dtype == np.float32
            assert low <= maps[name].min() <= maps[name].max() <= high


def assert_objects(images, results):
    for image, found in zip(images, results, strict=True):
        height, width = image.shape[:2]
        assert found["masks"].shape == (len(found["boxes"]), height, width)
        assert (found["boxes"][:, :2] >= 0).all()
        assert (found["boxes"][:, 2:] <= np.array([width, height]) + 1e-3).all()
    assert sum(len(found["boxes"]) for found in results)


def test_frames(depth, frames):
    programs = compiled_predict(depth.parts["depth"])._cache_size()
    assert_depth(frames, depth(frames))
    assert compiled_predict(depth.parts["depth"])._cache_size() == programs + 1  # of one size: fourteen batches of four


def test_photographs(depth, photographs):
    assert_depth(photographs, depth(photographs, batch_size=1))


def test_objects_of_both(objects, frames, photographs):
    images = [*frames[::4], *photographs]
    assert_objects(images, objects(images))


def save_odd_images(folder):
    """One file of each kind that has made trouble somewhere; returns their sizes as they are seen."""
    rng = np.random.default_rng(0)
    rgb = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48)))
    folder.mkdir()
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bit.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(folder / "rgba.png")
    Image.fromarray(rgb).convert("P").save(folder / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rgb[:1]).save(folder / "one_pixel_high.png")
    Image.fromarray(rgb[:1, :1]).save(folder / "one_pixel.png")
    Image.fromarray(rgb).resize((6000, 4000)).save(folder / "large.jpg")
    sizes = dict.fromkeys(("grey", "sixteen_bit", "rgba", "palette"), (48, 64))
    return {**sizes, "turned": (64, 48), "one_pixel_high": (1, 64), "one_pixel": (1, 1), "large": (4000, 6000)}


def test_odd_images(depth, objects, tmp_path, monkeypatch, capsys):
    sizes = save_odd_images(tmp_path / "odd")
    monkeypatch.setattr(Predictor, "load", lambda path: {"depth": depth, "objects": objects}[path])
    out = tmp_path / "out"
    # all but one: depth says why it cannot be
    assert command.main(["--checkpoint=depth", f"--image={tmp_path / 'odd'}", f"--out={out}"]) == 1
    shown = capsys.readouterr().err
    assert "one_pixel_high.png: cannot be predicted: a 1x64 image is longer than 8 times its short side" in shown
    assert "1 of 8 images failed" in shown
    assert len(list(out.glob("*_depth.npy"))) == 7
    for name in sizes.keys() - {"one_pixel_high"}:
        assert np.load(out / f"{name}_depth.npy", mmap_mode="r").shape == sizes[name]
    assert command.main(["--checkpoint=objects", f"--image={tmp_path / 'odd'}", f"--out={out}"]) == 0
    for name, size in sizes.items():
        results = json.loads((out / f"{name}_instances.json").read_text())
        assert all(result["segmentation"]["size"] == list(size) for result in results), name
        assert (out / f"{name}_panel.png").stat().st_size
