"""Files are found where people have them, names are text, and nothing of the user's is written over."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image
from toy_depth import DEPTH, fake_checkpoint, picture

from aitok_jax import paths, visualize
from aitok_jax.data import prepare
from aitok_jax.data.sources import nyu
from aitok_jax.predict.__main__ import main
from aitok_jax.predict.outputs import Results, find_images
from aitok_jax.tasks.modalities import Depth
from aitok_jax.training import checkpoint

MILLIMETRES = np.full((6, 8), 1500, np.uint16)


@pytest.fixture
def predict(monkeypatch):
    """The command line with a toy model."""
    fake_checkpoint(monkeypatch)
    return lambda *words: main(["--checkpoint=anywhere", *map(str, words)])


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    return said


def put(path: Path, size=(30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(*size)).save(path)
    return path


def put_pair(folder: Path, number: int, image: str = ".jpg", depth: str = ".png") -> None:
    put(folder / f"rgb_{number}{image}", (6, 8))
    if depth.lower() == ".npy":
        np.save(folder / "x.npy", MILLIMETRES)
        (folder / "x.npy").rename(folder / f"sync_depth_{number}{depth}")
    else:
        Image.fromarray(MILLIMETRES).save(folder / f"sync_depth_{number}{depth}")


def test_frames_of_any_suffix_and_behind_links(tmp_path, warned):
    root, elsewhere = tmp_path / "data [1]", tmp_path / "disk"
    put_pair(root / "a", 1)
    put_pair(root / "a", 2, ".PNG", ".TIF")
    put_pair(root / "b*", 3, ".webp", ".npy")
    put_pair(elsewhere, 4, ".JPEG")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(root)
    (root / "a" / "._rgb_1.jpg").write_bytes(b"Mac OS X")
    (root / "a" / "rgb_9.txt").write_text("no image")
    source = nyu.NyuSource(Depth(), root)
    assert source.names == ["a/rgb_1.jpg", "a/rgb_2.PNG", "b*/rgb_3.webp", "linked/rgb_4.JPEG"]
    for i in range(4):
        np.testing.assert_array_equal(source.read(i)["depth"], MILLIMETRES / np.float32(1000))
    (line,) = warned
    assert "a/._rgb_1.jpg" in line
    assert "a/rgb_9.txt" in line


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_of_other_systems(ending, tmp_path):
    put_pair(tmp_path, 1)
    put_pair(tmp_path, 2)
    lines = ["rgb_1.jpg sync_depth_1.png", "", "  ", "rgb_2.jpg sync_depth_2.png", ""]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + ending.join(lines).encode())
    assert nyu.NyuSource(Depth(), tmp_path, "list.txt").names == ["rgb_1.jpg", "rgb_2.jpg"]
    (tmp_path / "list.txt").write_bytes(b"rgb_\xff.jpg x.png")
    with pytest.raises(ValueError, match=r"list\.txt: byte 4 is no UTF-8; save the list as UTF-8"):
        nyu.NyuSource(Depth(), tmp_path, "list.txt")


def test_home(tmp_path, monkeypatch, predict):
    monkeypatch.setenv("HOME", str(tmp_path))
    put_pair(tmp_path / "frames", 1)
    assert len(nyu.NyuSource(Depth(), "~/frames")) == 1
    assert checkpoint.locate("~/run") == tmp_path / "run"
    assert predict("--image=~/frames/rgb_1.jpg", "--out=~/out") == 0
    assert (tmp_path / "out" / "rgb_1_depth.npy").exists()


def test_a_folder_of_what_people_have_is_prepared(tmp_path, monkeypatch, warned):
    images, depth, out = tmp_path / "photos", tmp_path / "depth", tmp_path / "out"
    suffixes = {"a": (".JPG", ".png"), "b": (".webp", ".TIFF"), "c": (".bmp", ".npy"), "d": (".tif", ".npz")}
    for name, (suffix, of_depth) in suffixes.items():
        put(images / f"{name}{suffix}", (6, 8))
        (depth / name).parent.mkdir(exist_ok=True)
        if of_depth.startswith(".np"):
            (np.save if of_depth == ".npy" else np.savez)(depth / f"{name}{of_depth}", MILLIMETRES / np.float32(1000))
        else:
            Image.fromarray(MILLIMETRES).save(depth / f"{name}{of_depth}")
    (images / "notes.txt").write_text("x")
    Image.fromarray(MILLIMETRES).save(depth / "without.png")
    (images / "val.txt").write_text("a.JPG\n")
    monkeypatch.setattr(sys, "argv", ["prepare", "folder", str(images), str(out), f"--depth={depth}"])
    prepare.main()
    from aitok_jax.data.sources import prepared

    train, test = prepared.nyu_sources(prepared.find(out, "nyu"), train_images=True, counts=(3, 1))
    assert train.names + test.names == ["b.webp", "c.bmp", "d.tif", "a.JPG"]
    for source in (train, test):
        for i in range(len(source)):
            np.testing.assert_array_equal(source.read(i)["depth"], MILLIMETRES / np.float32(1000))
    assert any("notes.txt" in line for line in warned)
    assert any("without.png" in line for line in warned)


def test_the_scale_of_depth_goes_with_what_was_prepared(tmp_path, monkeypatch, capsys):
    images, depth = tmp_path / "photos", tmp_path / "depth"
    for name in "ab":
        put(images / f"{name}.png", (6, 8))
    depth.mkdir()
    Image.fromarray(np.full((6, 8), 80 * 256, np.uint16)).save(depth / "a.png")  # as KITTI's
    np.save(depth / "b.npy", np.full((6, 8), 80 * 256, np.float32))
    words = ["prepare", "folder", str(images), str(tmp_path / "out"), f"--depth={depth}", "--depth_scale=256"]
    (images / "val.txt").write_text("a.png\n")
    monkeypatch.setattr(sys, "argv", words)
    prepare.main()
    from aitok_jax.data.sources import prepared

    for source in prepared.nyu_sources(prepared.find(tmp_path / "out", "nyu"), train_images=True, counts=(1, 1)):
        assert (source.read(0)["depth"] == 80).all()
    np.save(depth / "b.npy", np.full((6, 8), 80.0, np.float32))
    monkeypatch.setattr(sys, "argv", [*words[:3], str(tmp_path / "again"), words[4]])
    with pytest.raises(
        SystemExit, match=r"b\.npy: depth up to 80 m is beyond 16 bits at 1000 values a metre; give a depth_scale of"
    ):
        prepare.main()


def test_nothing_of_the_users_is_written_over(tmp_path, predict, capsys):
    photo, theirs = put(tmp_path / "frame.jpg"), tmp_path / "frame_depth.png"
    Image.fromarray(MILLIMETRES).save(theirs)
    before = theirs.read_bytes()
    with pytest.raises(SystemExit) as stop:
        predict("--image", photo, "--out", tmp_path)
    assert stop.value.code == 2
    assert (
        "holds files that are no results of ours and would be written over: frame_depth.png;" in capsys.readouterr().err
    )
    assert theirs.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frame.jpg", "frame_depth.png"]
    assert predict("--image", photo, "--out", tmp_path, "--overwrite") == 0
    assert theirs.read_bytes() != before
    assert predict("--image", photo, "--out", tmp_path) == 0  # now they are ours


def test_results_are_never_taken_for_images(tmp_path, predict, capsys):
    put(tmp_path / "frame.jpg")
    for _ in range(3):
        assert predict("--image", tmp_path, "--out", tmp_path) == 0
    assert len(list(tmp_path.glob("*_panel.png"))) == 1
    assert "passed over: " in capsys.readouterr().err
    found, passed_over = find_images([str(tmp_path / "*.*g")])
    assert [path.name for path in found] == ["frame.jpg"]
    assert [path.name for path in passed_over] == ["frame_depth.png", "frame_panel.png"]
    with pytest.raises(ValueError, match=r"frame_panel\.png: nothing but results of ours"):
        find_images([str(tmp_path / "frame_panel.png")])


def test_half_a_line_of_the_index_is_not_read(tmp_path):
    (tmp_path / Results.INDEX).write_text('"a_depth.npy"\n"b_dep')
    assert Results.of(tmp_path) == {"a_depth.npy"}


def test_folders_that_cannot_hold_results(tmp_path, predict, capsys):
    photo = put(tmp_path / "frame.jpg")
    for out in (photo, photo / "deeper"):
        with pytest.raises(SystemExit):
            predict("--image", photo, "--out", out)
        assert f"{photo} is a file; give a folder for the results" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(tmp_path, predict, monkeypatch):
    def full(file, array):
        file.write(b"some bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SystemExit) as stop:
        predict("--image", put(tmp_path / "frame.jpg"), "--out", tmp_path / "out")
    assert "No space left on device: it was not written" in str(stop.value)
    assert "0 of 1 images are done" in str(stop.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [Results.INDEX]


def test_a_kill_leaves_no_half_file(tmp_path):
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    program = (
        "import time; from aitok_jax import paths\n"
        f"with paths.writing({str(target)!r}) as file:\n"
        "    file.write(bytes(10**6)); file.flush(); print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_bytes() == b"old"
    theirs = tmp_path / "x.bin.part"
    theirs.write_bytes(b"of the user")
    with paths.writing(target) as file:
        file.write(b"new")
    assert theirs.read_bytes() == b"of the user"
    theirs.unlink()
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


NAMES = ["a$b$", "50%", "line\nbreak", "\\frac", "漢字", "$\\undefined$", os.fsdecode(b"bytes\xff\xfe"), "_{^"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_are_text(name, tmp_path, predict):
    put(tmp_path / f"{name}.png")
    put(tmp_path / "z.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predict("--image", tmp_path, "--out", tmp_path / "out", "--ply_fov=60") == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}_panel.png", f"{name}_depth.npy", "z_panel.png"} <= made
    assert f"{name}_panel.png" in Results.of(tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_classes_are_text(name):
    image, boxes = picture(30, 40), np.array([[2, 2, 20, 20]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panel = visualize.objects_panel(image, boxes, np.array([0]), np.array([0.5]), None, [name], title=name)
    assert panel.shape[2] == 3
    visualize.map_panel(DEPTH, image, np.ones((30, 40), np.float32), title=name)


def test_names_are_shown_on_one_line():
    assert paths.shown("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert paths.shown(os.fsdecode(b"\xff.jpg")) == "\\xff.jpg"
    assert paths.shown("漢字 é") == "漢字 é"
    assert paths.listed([f"{i}" for i in range(7)]) == "0, 1, 2, 3, 4, and 2 more"
