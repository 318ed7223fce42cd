"""The command line of the Predictor, with a toy model whose depth can be computed by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_depth import fake_checkpoint, picture

from aitok_jax import visualize
from aitok_jax.predict import outputs
from aitok_jax.predict.__main__ import main
from aitok_jax.predict.outputs import Results, find_images, name_results
from aitok_jax.predict.predictor import Predictor


@pytest.fixture
def checkpoint(monkeypatch):
    """A checkpoint of the toy task at any path."""
    fake_checkpoint(monkeypatch)
    return "--checkpoint=anywhere"


def test_command_line_writes_everything(checkpoint, tmp_path, capsys):
    image = picture(30, 40)
    Image.fromarray(image).save(tmp_path / "room.png")
    assert main([checkpoint, f"--image={tmp_path / 'room.png'}", "--task=depth", f"--out={tmp_path / 'a' / 'b'}"]) == 0
    out = tmp_path / "a" / "b"
    assert capsys.readouterr().out == f"4 files of 1 images in {out}\n"
    names = {"room_depth.npy", "room_depth.png", "room_confidence.npy", "room_panel.png"}
    assert {path.name for path in out.iterdir()} == names | {Results.INDEX}
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


def test_folders_and_patterns(checkpoint, tmp_path):
    for name in ("a.png", "c.JPG", "b.jpeg", "deep/d.png", "deep/deeper/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(30, 40)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()

    def found(*names):
        return [str(path.relative_to(tmp_path)) for path in find_images([f"{tmp_path}/{name}" for name in names])[0]]

    assert found("") == ["a.png", "b.jpeg", "c.JPG"]
    assert found("deep", "a.png") == ["deep/d.png", "a.png"]
    assert found("*.*p*g") == ["a.png", "b.jpeg"]
    assert found("**/*.png") == ["a.png", "deep/d.png", "deep/deeper/e.png"]
    assert found("missing.png") == ["missing.png"]  # reported when it is read
    with pytest.raises(ValueError, match="empty: no image in this folder"):
        found("empty")
    with pytest.raises(ValueError, match=r"\*\.tif: no image in this pattern"):
        found("*.tif")
    Image.fromarray(picture(30, 40)).save(tmp_path / "x[1].png")
    assert found("x[1].png") == ["x[1].png"]  # a file's name, whatever it looks like
    (tmp_path / "x[1].png").unlink()
    assert main([checkpoint, "--image", str(tmp_path), f"{tmp_path}/deep/*", f"--out={tmp_path / 'out'}"]) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*_panel.png")} == {f"{x}_panel" for x in "abcd"}


def test_results_are_named_after_their_files(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert name_results([a, b, a]) == {a: "a", b: "b"}
    with pytest.raises(ValueError, match=r"A_panel\.png"):
        name_results([a, tmp_path / "A.jpg"])


def test_point_clouds(checkpoint, tmp_path):
    Image.fromarray(picture(30, 40)).save(tmp_path / "room.png")
    assert main([checkpoint, f"--image={tmp_path / 'room.png'}", f"--out={tmp_path / 'out'}", "--ply_fov=60"]) == 0
    header = (tmp_path / "out" / "room_points.ply").read_bytes()[:200]
    assert header.startswith(b"ply\n")
    assert b"element vertex 1200" in header


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ply_fov=180"], "180.0 degrees is impossible"),
        (["--ply_fov=0"], "0.0 degrees"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--min_score=2"], "--min_score=2"),
        (["--annotations=a.json"], "--annotations is for objects, not for --task=depth"),
        (["--image=/nothing/*.png"], "no image in this pattern"),
    ],
)
def test_wrong_options_stop_before_any_image(checkpoint, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([checkpoint, "--image", "a.png", *options, f"--out={tmp_path / 'out'}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_large_images_have_small_panels(checkpoint, tmp_path, monkeypatch):
    shown = []

    def panel(modality, image, prediction, **rest):
        assert modality.name == "depth"
        shown.append((image, prediction, rest))
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(visualize, "map_panel", panel)
    monkeypatch.setattr(outputs, "PANEL_SIDE", 50)
    Image.fromarray(picture(101, 139)).save(tmp_path / "x.png")
    assert main([checkpoint, f"--image={tmp_path / 'x.png'}", f"--out={tmp_path}"]) == 0
    image, depth, rest = shown[0]
    assert image.shape[:2] == depth.shape == rest["confidence"].shape == (34, 47)
    np.testing.assert_allclose(depth, 8 * (image[..., 0] / 255), atol=0.2)
    assert np.load(tmp_path / "x_depth.npy").shape == (101, 139)


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "aitok_jax.predict", "--help"]
    root = Path(__file__).parents[1]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
    assert "--ply_fov" in shown
    assert shown.startswith("usage: python -m aitok_jax.predict")
