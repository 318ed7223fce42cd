"""The Predictor and its command line, with a toy model whose depth can be computed by hand."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from aitok_jax import predict
from aitok_jax.predict import Predictor, main, model_size, read_image

SHAPES = []


@dataclass(frozen=True)
class ToyTask:
    """Depth = 8 x red, confidence = green; remembers the shapes that it was compiled for."""

    image_size: int = 48
    eval_crop: None = None
    max_depth: float = 10.0

    def predict(self, params, model_state, batch):
        del model_state
        SHAPES.append(batch["image"].shape)
        return {"depth": params["scale"] * batch["image"][..., 0], "confidence": batch["image"][..., 1]}


@pytest.fixture
def predictor():
    return Predictor(ToyTask(), {"scale": np.float32(8)}, {})


@pytest.fixture
def checkpoint(monkeypatch):
    """A checkpoint of the toy task at any path."""
    config = ml_collections.ConfigDict({"task": {"name": "depth", "image_size": 48}})
    weights = {"params": {"scale": jnp.float32(8)}, "model_state": {}}
    monkeypatch.setattr(predict.checkpoint, "load_inference", lambda path: (config, weights))
    monkeypatch.setattr(predict.tasks, "build", lambda config: ToyTask(image_size=config.image_size))
    return "--checkpoint=anywhere"


def picture(height, width, seed=0):
    """A smooth image, so that resizing changes little."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    planes = [40 + 150 * rows, 60 + 100 * columns, np.full((height, width), float(seed))]
    return np.stack(planes, -1).astype(np.uint8)


def test_model_size():
    assert model_size(480, 640, 480) == (480, 640)
    assert model_size(960, 1280, 480) == (480, 640)
    assert model_size(640, 480, 480) == (640, 480)
    assert model_size(333, 333, 96) == (96, 96)
    assert model_size(1080, 1920, 480) == (480, 864)
    assert {model_size(480, width, 480)[1] for width in range(480, 3840)} <= set(range(480, 3841, 32))
    for width in range(100, 800, 7):
        assert abs(model_size(100, width, 480)[1] / 480 - width / 100) <= 1 / 30 + 1e-6
    with pytest.raises(ValueError, match=r"10x81 .* crop"):
        model_size(10, 81, 48)


def test_image_of_the_model_size_is_not_resized(predictor):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    maps = predictor(image)
    assert predictor.tasks == ("depth",)
    assert set(maps) == {"depth", "confidence"}
    np.testing.assert_allclose(maps["depth"], 8 * image[..., 0].astype(np.float32) / 255, rtol=1e-6)
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
    predictor = Predictor(ToyTask(image_size=30), {"scale": np.float32(8)}, {})
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
    with pytest.raises(ValueError, match="'depth_tokenizer' cannot predict"):
        Predictor(ToyTask(), {}, {}, "depth_tokenizer")
    with pytest.raises(ValueError, match="no objects"):
        predictor.coco_results(picture(30, 40))


def test_load(checkpoint):
    image = picture(48, 48)
    depth = Predictor.load("x")(image)["depth"]
    np.testing.assert_allclose(depth, 8 * image[..., 0].astype(np.float32) / 255, rtol=1e-6)


def test_command_line_writes_everything(checkpoint, tmp_path):
    image = picture(30, 40)
    Image.fromarray(image).save(tmp_path / "room.png")
    assert main([checkpoint, f"--image={tmp_path / 'room.png'}", "--task=depth", f"--out={tmp_path / 'a' / 'b'}"]) == 0
    out = tmp_path / "a" / "b"
    names = {"room_depth.npy", "room_depth.png", "room_confidence.npy", "room_panel.png"}
    assert {path.name for path in out.iterdir()} == names
    depth, millimetres = np.load(out / "room_depth.npy"), np.asarray(Image.open(out / "room_depth.png"))
    assert depth.dtype == np.float32
    assert millimetres.dtype == np.uint16
    np.testing.assert_array_equal(depth, Predictor.load("x")(image)["depth"])
    np.testing.assert_allclose(millimetres, depth * 1000, atol=0.51)
    assert np.load(out / "room_confidence.npy").shape == (30, 40)
    assert np.asarray(Image.open(out / "room_panel.png")).shape[2] == 3


def test_broken_images_are_named_and_the_rest_goes_on(checkpoint, tmp_path, capsys):
    for name in ("a", "d", "e"):
        Image.fromarray(picture(30, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    content = (tmp_path / "d.png").read_bytes()
    (tmp_path / "d.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (1000, 10)).save(tmp_path / "long.png")
    images = [str(tmp_path / name) for name in ("a.png", "b.jpg", "missing.png", "d.png", "long.png")]
    code = main([checkpoint, "--image", *images, "--image", str(tmp_path / "e.png"), f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().err
    assert code == 1
    assert {path.name for path in (tmp_path / "out").glob("*_depth.npy")} == {"a_depth.npy", "e_depth.npy"}
    assert all(f"{path}: cannot be predicted" in shown for path in images[1:])
    assert "4 of 6 images failed" in shown
    assert "6/6" in shown  # the progress bar


def test_two_images_of_one_name_are_refused_before_any_work(checkpoint, tmp_path, capsys):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(30, 40)).save(tmp_path / folder / "rgb.png")
    images = [str(tmp_path / folder / "rgb.png") for folder in "xy"]
    with pytest.raises(SystemExit) as stop:
        main([checkpoint, "--image", *images, f"--out={tmp_path / 'out'}"])
    assert stop.value.code == 2
    assert "rgb_panel.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([checkpoint, "--image", images[0], images[0], f"--out={tmp_path / 'out'}"]) == 0


def test_command_line_names_a_missing_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"--checkpoint={tmp_path / 'nothing'}", "--image=a.png", "--out=out"])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_unknown_task_on_the_command_line(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main([checkpoint, "--task=edges", "--image=a.png", "--out=out"])
    assert "depth" in capsys.readouterr().err


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
    code = "import sys, aitok_jax.predict; sys.exit('tensorflow' in sys.modules)"
    root = Path(predict.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
