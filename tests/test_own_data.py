"""Somebody's folder: what is found in it, how it is divided, and frames of any size at the model's scale."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_nyu import write_pair

from aitok_jax.config import translated
from aitok_jax.data import datasets, own, pipeline, splits
from aitok_jax.data.sources import nyu
from aitok_jax.data.sources.files import DataError
from aitok_jax.image import model_size, nearest, read_image, read_shape, resize
from aitok_jax.tasks.modalities import Depth
from configs import common

DEPTH = Depth()


def picture(path, seed, size=(24, 32)):
    """A picture with its own large shapes, as photographs have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def test_whole_folders_are_held_out():
    numbers = [*range(5), *range(100, 105)]  # two runs
    names = [f"{room}/{i:04}.jpg" for room in "abcdefghij" for i in numbers]
    chosen = splits.choose(names, 0.2)
    folders = {name[0] for name in chosen}
    assert len(chosen) == 20
    assert chosen == {name for name in names if name[0] in folders}
    more = splits.choose([*names, "a/9999.jpg"], 0.2)
    assert {name[0] for name in more} == folders, "one more frame moves no folder to the other side"


def test_runs_of_consecutive_names_are_held_out():
    numbers = [*range(100, 120), *range(300, 304), *range(500, 516)]
    names = [f"IMG_{n}.jpg" for n in numbers]
    assert splits.choose(names, 0.1) == {f"IMG_{n}.jpg" for n in range(300, 304)}


def test_of_one_walk_the_end_is_held_out():
    names = [f"frame{n}.png" for n in range(5, 25)]
    assert splits.choose(names, 0.1) == {"frame23.png", "frame24.png"}
    assert splits.choose(["a.jpg", "b.jpg"], 0.1) == {"b.jpg"}


@pytest.mark.parametrize(("names", "share", "message"), [(["a"], 0.1, "too few"), (["a", "b"], 1.0, "between 0 and 1")])
def test_what_cannot_be_divided(names, share, message):
    with pytest.raises(ValueError, match=message):
        splits.choose(names, share)


def test_lists_win(tmp_path):
    names = [f"s/{i}.jpg" for i in range(4)]
    assert splits.listed(tmp_path, names) is None
    (tmp_path / "val.txt").write_text("/s/1.jpg s/1.png\ns/2\n")
    assert splits.listed(tmp_path, names) == {"s/1.jpg", "s/2.jpg"}
    (tmp_path / "train.txt").write_text("s/2.jpg\n")
    with pytest.raises(ValueError, match=r"s/2\.jpg in both train\.txt and val\.txt"):
        splits.listed(tmp_path, names)
    (tmp_path / "val.txt").unlink()
    assert splits.listed(tmp_path, names) == {"s/0.jpg", "s/1.jpg", "s/3.jpg"}
    (tmp_path / "train.txt").write_text("\n".join(names))
    with pytest.raises(ValueError, match=r"train\.txt leave no image to evaluate on; correct the lists"):
        splits.listed(tmp_path, names)
    (tmp_path / "train.txt").write_text("s/9.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt lists s/9\.jpg, of which there is no image"):
        splits.listed(tmp_path, names)


def test_near_duplicates_across_the_split_are_counted(tmp_path, caplog):
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    image = read_image(tmp_path / "0.png")
    Image.fromarray(image[:, ::-1]).save(tmp_path / "mirrored.png")
    Image.fromarray(image).resize((64, 48)).save(tmp_path / "larger.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    train = [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "broken.png"]
    val = [tmp_path / name for name in ("2.png", "mirrored.png", "larger.jpg", "3.png")]
    assert splits.near_duplicates(train, val) == [(val[1], train[0]), (val[2], train[0])]
    assert splits.warn_of_near_duplicates(train, val) == 2
    assert "2 of 4 images to evaluate on look like one to train on" in caplog.text


def test_a_head_tells_the_shape(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_shape(tmp_path / "turned.jpg") == read_image(tmp_path / "turned.jpg").shape[:2] == (30, 20)


def test_nearest_takes_the_pixels_in_the_middle():
    array = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(nearest(array, 2, 3), array)
    np.testing.assert_array_equal(nearest(np.arange(9).reshape(1, 9), 1, 3), [[1, 4, 7]])
    np.testing.assert_array_equal(nearest(array, 4, 3)[:, 0], [0, 0, 3, 3])


def frames(root, sizes):
    for i, size in enumerate(sizes):
        write_pair(root / f"scene{i}", i, size=size, seed=i)


def data_of(root="", **changes):
    fields = common.maps_data("depth", str(root), size=16, recipe="solver", test_subfolder="") | changes
    run = {"name": "depth", "task": {"name": "depth", "image_size": 16}, "data": fields, "batch_size": 2}
    return datasets.build(translated(ConfigDict(run)).data.depth)


def test_frames_of_any_size_train_and_evaluate(tmp_path):
    sizes = [(30, 40), (20, 40), (64, 48), (30, 40), (15, 20), (33, 44)]
    frames(tmp_path, sizes)
    data = data_of(tmp_path, fit="scale")
    batch = next(pipeline.train_batches(data.train, data.train_transform, batch_size=4, seed=0))
    assert batch["image"].shape == (4, 16, 16, 3)
    batches = list(pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2))
    assert len(batches) == pipeline.eval_steps(data.eval, 2) == 4
    seen = [int(i) for batch in batches for i, real in zip(batch["id"], batch["mask"], strict=True) if real]
    assert sorted(seen) == list(range(6))
    for batch in batches:
        for row, index in enumerate(batch["id"]):
            assert batch["image"][row].shape[:2] == model_size(*sizes[index], 16)
            image = read_image(tmp_path / f"scene{index}/rgb_{index:05}.jpg")
            seen_image = resize(image, *model_size(*sizes[index], 16)) / np.float32(255)
            np.testing.assert_allclose(batch["image"][row], seen_image, atol=1e-6)
            full = DEPTH.read((tmp_path / f"scene{index}/sync_depth_{index:05}.png").read_bytes())
            np.testing.assert_array_equal(batch["depth"][row], nearest(full, *model_size(*sizes[index], 16)))


def test_frames_of_other_sizes_are_refused_where_they_are_cropped(tmp_path):
    frames(tmp_path, [(30, 40)])
    data = data_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"rgb_00000\.jpg is 30x40, .* short side has 16 pixels: set data\.fit='scale'"
    ):
        next(pipeline.eval_batches(data.eval, data.eval_transform, batch_size=1))
    with pytest.raises(ValueError, match=r"data\.fit='no' must be one of"):
        data_of(tmp_path, fit="no")


def test_a_broken_frame_among_sizes_is_skipped(tmp_path):
    frames(tmp_path, [(30, 40), (64, 48), (20, 40), (10, 100), (64, 48)])
    cut = (tmp_path / "scene1/rgb_00001.jpg").read_bytes()[:-300]
    (tmp_path / "scene1/rgb_00001.jpg").write_bytes(cut)  # the head is whole
    source = nyu.NyuSource(DEPTH, tmp_path, scale=16, on_error="skip")
    data = data_of(tmp_path, fit="scale", on_error="skip")
    batches = list(pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2))
    assert sorted(i for batch in batches for i in batch["id"][batch["mask"] > 0]) == [0, 2, 4]
    assert "longer than 8 times its short side" in data.eval.reasons["scene3/rgb_00003.jpg"]
    assert [index for group in source.groups() for index in group] == [0, 1, 4, 2]
    with pytest.raises(DataError, match=r"scene3/rgb_00003\.jpg: a 10x100 image is longer than 8 times"):
        nyu.NyuSource(DEPTH, tmp_path, scale=16).groups()


@pytest.mark.parametrize("layout", ["beside", "folders", "given", "nyu"])
def test_maps_are_found(tmp_path, layout):
    root, images, maps = tmp_path / "my data", tmp_path / "my data", tmp_path / "my data"
    if layout != "nyu" and layout != "beside":
        images = root / "images" if layout == "folders" else root
        maps = root / "depth" if layout == "folders" else tmp_path / "elsewhere"
    for i in range(10):
        name = f"rgb_{i}" if layout == "nyu" else f"walk 1/IMG {i}"
        picture(images / f"{name}.jpg", i)
        target = maps / (f"sync_depth_{i}.npy" if layout == "nyu" else f"{name}.npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, np.full((24, 32), 1.0 + i, np.float32))
    options = {"maps": str(maps)} if layout == "given" else {}
    found = own.find_maps("depth", str(root), tmp_path / "lists", share=0.2, **options)
    assert (found.train, found.val) == (8, 2)
    data = data_of(fit="scale", **found.data)
    assert (len(data.train), len(data.eval)) == (8, 2)
    assert [float(data.eval.read(i)["depth"].max()) for i in range(2)] == [9.0, 10.0]


def test_what_is_not_found(tmp_path):
    with pytest.raises(ValueError, match=r"as in --config\.data\.root=my_frames"):
        own.find_maps("depth", "", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"set --config\.data\.root"):
        own.find_maps("depth", str(tmp_path / "no"), tmp_path)
    picture(tmp_path / "a.jpg", 0)
    with pytest.raises(DataError, match="no image with a depth map; expected are"):
        own.find_maps("depth", str(tmp_path), tmp_path / "lists")
    with pytest.raises(FileNotFoundError, match=r"no instances JSON; name one by --config\.data\.annotations"):
        own.find_objects(str(tmp_path), tmp_path / "lists")
    (tmp_path / "x.json").write_text("[1]")
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(FileNotFoundError, match=r"several instances JSONs \(.*one\.json, .*two\.json\)"):
        own.find_objects(str(tmp_path), tmp_path / "lists")


def test_broken_pairs_are_said_or_left_out(tmp_path, caplog):
    frames(tmp_path, [(30, 40)] * 8)
    (tmp_path / "scene3/sync_depth_00003.png").write_bytes(b"no picture")
    message = r"1 of 8 pairs cannot be read, the first because .*scene3/sync_depth_00003\.png: .*data\.on_error=skip"
    with pytest.raises(DataError, match=message):
        own.find_maps("depth", str(tmp_path), tmp_path / "lists")
    found = own.find_maps("depth", str(tmp_path), tmp_path / "lists", on_error="skip")
    assert found.train + found.val == 7
    assert "left out scene3/rgb_00003.jpg" in caplog.text


def test_a_folder_to_evaluate_on(tmp_path):
    names = ["a/1.png", "b/1.png", "b/2.png"]
    for i, name in enumerate(names):
        picture(tmp_path / name, i)
    assert own.to_evaluate(tmp_path, names, 0.1, "b") == {"b/1.png", "b/2.png"}
    with pytest.raises(ValueError, match="val='c' holds 0 of 3 images"):
        own.to_evaluate(tmp_path, names, 0.1, "c")


def test_objects_are_divided(tmp_path):
    entries = [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(1, 11)]
    for entry in entries:
        picture(tmp_path / entry["file_name"], entry["id"])
    boxes = [
        {"id": i, "image_id": i, "category_id": 7, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0} for i in range(1, 11)
    ]
    boxes = [box | {"segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]]} for box in boxes]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 7, "name": "mug"}]}
    (tmp_path / "mugs.json").write_text(json.dumps(content))
    found = own.find_objects(str(tmp_path), tmp_path / "lists", share=0.2)
    assert (found.train, found.val, found.categories) == (8, 2, ["mug"])
    parts = [json.loads((tmp_path / f"lists/instances_{part}.json").read_text()) for part in ("train", "val")]
    assert (
        [entry["id"] for entry in parts[1]["images"]] == [box["image_id"] for box in parts[1]["annotations"]] == [9, 10]
    )
    assert len(parts[0]["annotations"]) == 8
