import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from aitok_jax.data.sources import nyu
from aitok_jax.evaluators.maps import mean_map
from aitok_jax.tasks.modalities import Depth, Normals

DEPTH = Depth()


def write_pair(folder, number=0, *, size=(6, 8), image_size=None, depth_mm=None, seed=0):
    """Writes rgb_N.jpg and sync_depth_N.png; gives the millimetres."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*(image_size or size), 3), np.uint8)).save(folder / f"rgb_{number:05}.jpg")
    if depth_mm is None:
        depth_mm = rng.integers(0, 10000, size, np.uint16)
    Image.fromarray(depth_mm).save(folder / f"sync_depth_{number:05}.png")
    return depth_mm


def write_list(root, *lines):
    (root / "list.txt").write_text("".join(line + "\n" for line in lines))


def test_reads_metres_and_rgb(tmp_path):
    mm = write_pair(tmp_path / "a", depth_mm=np.array([[0, 1, 1000], [9999, 40000, 65535]], np.uint16), size=(2, 3))
    Image.new("RGB", (3, 2), (250, 10, 90)).save(tmp_path / "a/rgb_00000.jpg", quality=100)
    example = nyu.NyuSource(DEPTH, tmp_path).read(0)
    assert example["depth"].dtype == np.float32
    np.testing.assert_array_equal(example["depth"], mm / np.float32(1000))
    assert example["image"].dtype == np.uint8
    assert example["image"].shape == (2, 3, 3)
    np.testing.assert_allclose(example["image"][0, 0].astype(int), [250, 10, 90], atol=3)


def test_grey_image_becomes_rgb(tmp_path):
    write_pair(tmp_path / "a")
    Image.new("L", (8, 6), 77).save(tmp_path / "a/rgb_00000.jpg")
    assert nyu.NyuSource(DEPTH, tmp_path).read(0)["image"].shape == (6, 8, 3)


def test_list_keeps_its_order_and_ignores_further_columns(tmp_path):
    for number in (1, 2):
        write_pair(tmp_path / "s", number, seed=number)
    write_list(
        tmp_path, "/s/rgb_00002.jpg /s/sync_depth_00002.png 518.8579", "", "s/rgb_00001.jpg s/sync_depth_00001.png"
    )
    source = nyu.NyuSource(DEPTH, tmp_path, "list.txt")
    assert source.names == ["s/rgb_00002.jpg", "s/rgb_00001.jpg"]
    np.testing.assert_array_equal(
        source.read(1)["depth"], DEPTH.read((tmp_path / "s/sync_depth_00001.png").read_bytes())
    )
    assert nyu.NyuSource(DEPTH, tmp_path, str(tmp_path / "list.txt")).names == source.names


def test_list_is_relative_to_the_subfolder(tmp_path):
    write_pair(tmp_path / "official_splits/test/den", 3)
    write_list(tmp_path, "/den/rgb_00003.jpg /den/sync_depth_00003.png")
    source = nyu.NyuSource(DEPTH, tmp_path, "list.txt", subfolder="official_splits/test")
    assert source.names == ["den/rgb_00003.jpg"]
    assert source.read(0)["depth"].shape == (6, 8)


def test_scan_is_sorted_and_leaves_out_the_test_part(tmp_path):
    for folder in ("b", "a", "deep/er", "official_splits/test/den"):
        write_pair(tmp_path / folder, 1)
    (tmp_path / "a/other.jpg").write_bytes(b"")
    assert nyu.NyuSource(DEPTH, tmp_path).names == ["a/rgb_00001.jpg", "b/rgb_00001.jpg", "deep/er/rgb_00001.jpg"]
    assert nyu.NyuSource(DEPTH, tmp_path, subfolder="official_splits/test").names == ["den/rgb_00001.jpg"]


def test_depth_only_never_opens_the_image(tmp_path):
    write_pair(tmp_path / "a")
    (tmp_path / "a/rgb_00000.jpg").write_bytes(b"no image")
    assert set(nyu.NyuSource(DEPTH, tmp_path, images=False).read(0)) == {"depth"}


def test_cache_decodes_once_and_cannot_be_spoilt(tmp_path):
    write_pair(tmp_path / "a")
    source = nyu.NyuSource(DEPTH, tmp_path, cache=True)
    first = source.read(0)
    (tmp_path / "a/rgb_00000.jpg").unlink()
    again = source.read(0)
    assert again["image"] is first["image"]
    with pytest.raises(ValueError, match="read-only"):
        again["depth"][0, 0] = 1


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such data folder; set data\.root"):
        nyu.NyuSource(DEPTH, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="official_splits/test: no such data folder"):
        nyu.NyuSource(DEPTH, tmp_path, subfolder="official_splits/test")


def test_missing_and_empty_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list file; give its absolute path"):
        nyu.NyuSource(DEPTH, tmp_path, "train.txt")
    write_list(tmp_path, "", "  ")
    with pytest.raises(nyu.DataError, match=r"list\.txt: no pairs found; the list is empty"):
        nyu.NyuSource(DEPTH, tmp_path, "list.txt")
    with pytest.raises(nyu.DataError, match=r"no pairs found; expected <scene>/rgb_\*\.jpg"):
        nyu.NyuSource(DEPTH, tmp_path)


@pytest.mark.parametrize("line", ["/a/rgb_00001.jpg None 518.8579", "/a/rgb_00001.jpg"])
def test_list_line_without_depth(tmp_path, line):
    write_pair(tmp_path / "a")
    write_list(tmp_path, "/a/rgb_00000.jpg /a/sync_depth_00000.png", line)
    with pytest.raises(nyu.DataError, match=r"list\.txt:2: no depth map in .*take the line off the list"):
        nyu.NyuSource(DEPTH, tmp_path, "list.txt")
    source = nyu.NyuSource(DEPTH, tmp_path, "list.txt", on_error="skip")
    assert (source.names, source.skipped) == (["a/rgb_00000.jpg"], {"a/rgb_00001.jpg"})


def test_scan_meets_an_image_without_depth(tmp_path):
    for number in (0, 1):
        write_pair(tmp_path / "a", number)
    (tmp_path / "a/sync_depth_00000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"sync_depth_00000\.png: missing depth map"):
        nyu.NyuSource(DEPTH, tmp_path)
    source = nyu.NyuSource(DEPTH, tmp_path, on_error="skip")
    assert (source.names, source.skipped) == (["a/rgb_00001.jpg"], {"a/rgb_00000.jpg"})


def test_expected_count(tmp_path):
    write_pair(tmp_path / "a")
    assert len(nyu.NyuSource(DEPTH, tmp_path, expected_count=1)) == 1
    with pytest.raises(ValueError, match="1 pairs, but expected_count=24231"):
        nyu.NyuSource(DEPTH, tmp_path, expected_count=nyu.TRAIN_COUNT)


def test_wrong_on_error(tmp_path):
    with pytest.raises(ValueError, match="on_error='ignore' must be 'raise' or 'skip'"):
        nyu.NyuSource(DEPTH, tmp_path, on_error="ignore")


@pytest.mark.parametrize("name", ["rgb_00000.jpg", "sync_depth_00000.png"])
def test_missing_file(tmp_path, name):
    write_pair(tmp_path / "a")
    source = nyu.NyuSource(DEPTH, tmp_path)
    (tmp_path / "a" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"a/{name}: missing file; restore it"):
        source.read(0)


@pytest.mark.parametrize("name", ["rgb_00000.jpg", "sync_depth_00000.png"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.9])
def test_truncated_file(tmp_path, name, keep):
    write_pair(tmp_path / "a", size=(60, 80))
    path = tmp_path / "a" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(nyu.DataError, match=rf"a/{name}: broken image file.*; restore it, or take it off"):
        nyu.NyuSource(DEPTH, tmp_path).read(0)


def test_maps_of_another_modality(tmp_path):
    """Their files have names of their own, also where depth lies beside them."""
    write_pair(tmp_path / "a", 3)
    with pytest.raises(FileNotFoundError, match=r"normals_00003\.png: missing normals map of a/rgb_00003\.jpg"):
        nyu.NyuSource(Normals(), tmp_path)
    Image.new("RGB", (8, 6), (128, 255, 128)).save(tmp_path / "a/normals_00003.png")
    example = nyu.NyuSource(Normals(), tmp_path).read(0)
    assert set(example) == {"image", "normals"}
    np.testing.assert_allclose(example["normals"], np.broadcast_to([0, -1, 0], (6, 8, 3)), atol=0.01)
    Image.new("L", (8, 6)).save(tmp_path / "a/normals_00003.png")
    with pytest.raises(nyu.DataError, match=r"normals_00003\.png: normals must be a picture of 3 x 8 bits"):
        nyu.NyuSource(Normals(), tmp_path).read(0)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_depth_must_have_16_bits(tmp_path, mode):
    write_pair(tmp_path / "a")
    Image.new(mode, (8, 6)).save(tmp_path / "a/sync_depth_00000.png")
    with pytest.raises(nyu.DataError, match=rf"sync_depth_00000\.png: depth must be a 16-bit grey PNG.*mode '{mode}'"):
        nyu.NyuSource(DEPTH, tmp_path).read(0)


def test_sizes_that_differ(tmp_path):
    write_pair(tmp_path / "a", image_size=(6, 9))
    with pytest.raises(nyu.DataError, match=r"rgb_00000\.jpg is 6x9 but .*sync_depth_00000\.png is 6x8"):
        nyu.NyuSource(DEPTH, tmp_path).read(0)


def broken_source(tmp_path, broken, count=4, **options):
    for number in range(count):
        write_pair(tmp_path / "a", number, seed=number)
    for number in broken:
        (tmp_path / f"a/rgb_{number:05}.jpg").write_bytes(b"broken")
    return nyu.NyuSource(DEPTH, tmp_path, **options)


def test_skip_takes_the_next_readable_one_and_logs_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    source = broken_source(tmp_path, [1, 2, 3], on_error="skip")
    assert [source.read_readable(index)[0] for index in (0, 1, 2, 3, 1, 2)] == [0] * 6  # after 3 comes 0
    assert source.skipped == {f"a/rgb_0000{number}.jpg" for number in (1, 2, 3)}
    assert len(lines) == 3
    assert all("broken image file" in line for line in lines)


def test_skip_is_off_by_default(tmp_path):
    source = broken_source(tmp_path, [1])
    with pytest.raises(nyu.DataError, match=r"rgb_00001\.jpg: broken"):
        source.read_readable(1)


def test_all_examples_broken(tmp_path):
    source = broken_source(tmp_path, range(4), on_error="skip")
    with pytest.raises(nyu.DataError, match="all 4 examples are broken"):
        source.read_readable(2)


def test_mean_map(tmp_path):
    maps = [[[1000, 0, 0]], [[2000, 4000, 0]], [[3000, 2000, 0]]]
    for number, depth in enumerate(maps):
        write_pair(tmp_path / "a", number, depth_mm=np.array(depth, np.uint16), size=(1, 3))
    source = nyu.NyuSource(DEPTH, tmp_path)
    mean = mean_map(source, DEPTH)
    assert (mean.dtype, mean.shape) == (np.float32, (1, 1, 3, 1))
    # the last pixel: mean of the 5 annotated values
    np.testing.assert_allclose(mean[0, ..., 0], [[2, 3, 12 / 5]], rtol=1e-6)


def test_mean_map_errors(tmp_path):
    write_pair(tmp_path / "a", 0, depth_mm=np.zeros((6, 8), np.uint16))
    with pytest.raises(nyu.DataError, match="no annotated pixel"):
        mean_map(nyu.NyuSource(DEPTH, tmp_path), DEPTH)
    write_pair(tmp_path / "a", 1, size=(6, 9))
    assert mean_map(nyu.NyuSource(DEPTH, tmp_path), DEPTH).shape == (1, 6, 8, 1)
    (tmp_path / "a/rgb_00000.jpg").unlink()
    write_list(tmp_path, *(f"/a/rgb_0000{i}.jpg /a/sync_depth_0000{i}.png" for i in range(2)))
    with pytest.raises(FileNotFoundError, match="missing file"):
        mean_map(nyu.NyuSource(DEPTH, tmp_path, "list.txt"), DEPTH)
    source = nyu.NyuSource(DEPTH, tmp_path, "list.txt", on_error="skip")
    assert mean_map(source, DEPTH).shape == (1, 6, 9, 1)


def test_real_frames(nyu_frames):
    source = nyu.NyuSource(DEPTH, nyu_frames, "list.txt")
    manifest = json.loads((nyu_frames.parent / "manifest.json").read_text())
    expected = {entry["rgb"].lstrip("/"): entry for entry in manifest if entry["set"] == "nyu_depth_v2"}
    assert len(source) == len(expected) == 19
    assert set(source.names) == set(expected)
    for index, name in enumerate(source.names):
        example, entry = source.read(index), expected[name]
        assert example["image"].shape == (480, 640, 3)
        assert example["depth"].shape == (480, 640)
        seen = example["depth"][example["depth"] > 0]
        assert np.median(seen) == pytest.approx(entry["depth_mm"]["median"] / 1000, abs=1e-3)
        assert seen.max() == pytest.approx(entry["depth_mm"]["max"] / 1000, abs=1e-6)
        assert np.mean(example["depth"] == 0) == pytest.approx(entry["invalid_fraction"], abs=1e-4)


def test_real_frames_list_and_scan_agree(nyu_frames):
    listed, scanned = nyu.NyuSource(DEPTH, nyu_frames, "list.txt"), nyu.NyuSource(DEPTH, nyu_frames)
    assert sorted(listed.names) == scanned.names
    a, b = listed.read(listed.names.index(scanned.names[3])), scanned.read(3)
    for key in ("image", "depth"):
        np.testing.assert_array_equal(a[key], b[key])


def test_import_leaves_tensorflow_alone():
    code = (
        "import sys, aitok_jax.data.sources.nyu, aitok_jax.data.map_transforms, aitok_jax.data.datasets; "
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0
