"""The command that prepares data, and what is wrong with files or prepared data."""

import json
import shutil
import sys
from pathlib import Path

import coco_files
import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_nyu import write_pair
from test_pipeline import SOLVER, data_config, take
from test_prepared import command, raw_coco, write_coco, write_nyu

from aitok_jax.data import datasets, pipeline
from aitok_jax.data.sources import nyu, prepared
from aitok_jax.image import read_image

ANY = ("--train_count=0", "--test_count=0")


def fails(*arguments):
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as end:
        command(*arguments)
    assert str(end.value).startswith("error: ")
    return str(end.value)


def sources(out, **options):
    folder = prepared.find(out, "nyu")
    return prepared.nyu_sources(folder, train_images=True, counts=(0, 0), **options)


def test_published_counts_are_checked(tmp_path):
    write_nyu(tmp_path / "raw")
    assert "6 pairs, but expected_count=24231" in fails("nyu", tmp_path / "raw", tmp_path / "out")
    assert "3 pairs, but expected_count=654" in fails("nyu", tmp_path / "raw", tmp_path / "out", "--train_count=6")
    assert not (tmp_path / "out").exists()


def test_broken_files_are_listed_and_limited(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_nyu(raw, train=8)
    path = raw / "room_0/rgb_00002.jpg"
    path.write_bytes(path.read_bytes()[:200])
    Image.new("L", (16, 12)).save(raw / "room_1/sync_depth_00003.png")
    (raw / "room_1/sync_depth_00007.png").unlink()
    message = fails("nyu", raw, out, *ANY, "--max_broken=2")
    assert message.startswith("error: 3 broken, more than the 2 allowed; mend them, or leave them out with a higher")
    for part in ("rgb_00002.jpg: broken image file", "must be a 16-bit grey PNG", "rgb_00007.jpg: it has no depth map"):
        assert part in message
    assert prepared.find(out, "nyu") is None
    command("nyu", raw, out, *ANY, "--max_broken=3")
    assert "nyu_pairs: 5 train and 3 test examples; 3 broken, see broken.txt" in capsys.readouterr().out
    assert not (out / "unfinished").exists()
    folder = prepared.find(out, "nyu")
    assert len((folder / "broken.txt").read_text().splitlines()) == 3
    train, _ = sources(out)
    kept = [f"room_{i % 2}/rgb_{i:05}.jpg" for i in (0, 4, 6, 1, 5)]
    assert train.names == kept
    for i, name in enumerate(kept):
        np.testing.assert_array_equal(train.read(i)["image"], read_image(raw / name))


def test_broken_annotations_count_too(tmp_path):
    write_coco(tmp_path / "raw")
    path = tmp_path / "raw/train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 77
    content["annotations"][2]["segmentation"] = coco_files.compressed(coco_files.BOX_MASK) | {"counts": "05"}
    path.write_text(json.dumps(content))
    places = [f"--{s}_{kind}" for s in ("train", "test") for kind in (f"images={s}_images", f"annotations={s}.json")]
    assert "annotation 11: unknown category_id=77" in fails(
        "coco", tmp_path / "raw", tmp_path / "out", *places, *ANY, "--max_broken=0"
    )
    command("coco", tmp_path / "raw", tmp_path / "out", *places, *ANY, "--max_broken=2")
    data = datasets.build(raw_coco(tmp_path / "out"))
    assert data.train.names == ["000000000001.jpg", "000000000004.jpg"]
    assert [entry["id"] for entry in data.train.annotations(0)] == [5]
    assert "annotation 6: broken mask" in (prepared.find(tmp_path / "out", "coco") / "broken.txt").read_text()


def test_broken_images_of_annotations_count_with_theirs(tmp_path):
    """Numbers as text are prepared as numbers, and names of Windows as those of the files."""
    annotations = [coco_files.annotation(i, i) for i in range(1, 9)]
    images, path = coco_files.write(tmp_path, annotations, images=8)
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": None}
    content["images"][1] |= {"id": "2", "width": 40.0, "file_name": r"a\b.jpg"}
    content["annotations"][1] |= {"area": 0, "id": "2", "segmentation": content["annotations"][1]["segmentation"][0]}
    path.write_text(json.dumps(content))
    (images / "a").mkdir()
    (images / "000000000002.jpg").rename(images / "a/b.jpg")
    given = ("folder", images, tmp_path / "out", f"--annotations={path}", "--test_share=0.4")
    assert "2 broken, more than the 0 allowed" in fails(*given)
    command(*given, "--max_broken=2")
    folder = prepared.find(tmp_path / "out", "coco")
    image, annotation = (folder / "broken.txt").read_text().splitlines()
    assert image.endswith("image 1: its height=None must be a whole number of pixels, at least 1")
    assert annotation.endswith("annotation 1: its image_id=1 is of an image that is left out")
    parts = [prepared.PreparedCoco(folder, split) for split in ("train", "test")]
    assert sorted(name for part in parts for name in part.names) == [*(f"{i:012}.jpg" for i in range(3, 9)), "a/b.jpg"]
    (entry,) = [part.coco.anns[2] for part in parts if 2 in part.coco.anns]
    assert (entry["id"], entry["image_id"], entry["area"]) == (2, 2, 120.0)


def test_splits_where_all_is_broken(tmp_path):
    """Each image of the split to evaluate on, or each annotation, is broken; the writer of records is never reached."""
    write_coco(tmp_path / "raw")
    places = [f"--{s}_{kind}" for s in ("train", "test") for kind in (f"images={s}_images", f"annotations={s}.json")]
    given = ("coco", tmp_path / "raw", tmp_path / "out", *places, *ANY, "--max_broken=99")
    images = sorted((tmp_path / "raw/test_images").iterdir())
    sound = {path: path.read_bytes() for path in images}
    for path in images:
        path.write_bytes(b"broken")
    assert "all 5 examples of the split 'test' are broken" in fails(*given)
    for path, content in sound.items():
        path.write_bytes(content)
    path = tmp_path / "raw/test.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["bbox"] = None
    path.write_text(json.dumps(content))
    message = fails(*given)
    assert "no annotation of an object among 5 images" in message
    assert "2 bbox that is not 4 numbers (ids 3, 4) left out" in message
    assert prepared.find(tmp_path / "out", "coco") is None


def test_pairs_that_are_all_broken(tmp_path):
    write_nyu(tmp_path / "raw")
    for path in (tmp_path / "raw/official_splits").rglob("*.jpg"):
        path.write_bytes(b"broken")
    message = fails("nyu", tmp_path / "raw", tmp_path / "out", *ANY, "--max_broken=99")
    assert "all 3 examples of the split 'test' are broken" in message


def test_a_manifest_finds_other_data(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_nyu(raw)
    command("nyu", raw, out, *ANY)
    manifest = f"--manifest={prepared.find(out, 'nyu')}"
    command("nyu", raw, tmp_path / "again", *ANY, manifest)
    write_pair(raw / "room_0", 4, size=(12, 16), seed=77)
    write_pair(raw / "room_0", 9, size=(12, 16))
    (raw / "room_0/rgb_00000.jpg").unlink()
    message = fails("nyu", raw, tmp_path / "other", *ANY, manifest)
    assert "1 files missing, 1 more, 1 with other bytes (the first: room_0/rgb_00004.jpg), of 6" in message
    assert prepared.find(tmp_path / "other", "nyu") is None
    assert "nyu_pairs is there already; delete it" in fails("nyu", raw, out, *ANY)


def test_scenes(tmp_path):
    command("scenes", tmp_path, "--train=3", "--test=2", "--height=48", "--width=64", "--workers=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco_instances", "nyu_pairs"]
    train, test = sources(tmp_path)
    assert (train.names[2], test.names[0]) == ("scene_0000/rgb_00002.jpg", "room/rgb_00000.jpg")
    data = datasets.build(raw_coco(tmp_path))
    assert (len(data.train), len(data.eval)) == (3, 2)
    np.testing.assert_array_equal(data.eval.read(1)["image"], test.read(1)["image"])


def test_own_folder(tmp_path):
    images, depth = tmp_path / "photos", tmp_path / "depth"
    write_coco(tmp_path)
    shutil.move(tmp_path / "train_images", images)
    for path in sorted(images.iterdir()):
        (depth / path.name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((30, 40), 1500, np.uint16)).save(depth / f"{path.stem}.png")
    out, given = tmp_path / "out", (f"--depth={depth}", f"--annotations={tmp_path / 'train.json'}")
    command("folder", images, out, *given, "--test_share=0.4")
    parts = sources(out)
    data = datasets.build(raw_coco(out))
    names = [f"{i:012}.jpg" for i in range(1, 6)]
    assert sorted(parts[0].names + parts[1].names) == names
    assert parts[1].names == data.eval.names
    assert (data.train.names, parts[0].names) == (names[:2], names[:3])  # the third has no objects
    assert parts[0].read(0)["depth"][3, 4] == 1.5
    assert "give --depth=FOLDER or that of other maps, --annotations=JSON, or both" in fails(
        "folder", images, tmp_path / "no"
    )
    assert "must be between 0 and 1" in fails("folder", images, tmp_path / "no", *given, "--test_share=1")
    (depth / names[0]).with_suffix(".png").unlink()
    assert f"{Path(names[0]).stem}.png: missing file" in fails(
        "folder", images, tmp_path / "no", *given, "--test_share=0.4"
    )


@pytest.fixture
def prepared_nyu(tmp_path):
    write_nyu(tmp_path / "raw", train=12)
    command("nyu", tmp_path / "raw", tmp_path / "out", *ANY)
    return tmp_path / "out"


def test_a_corrupt_record_in_the_middle_of_an_epoch(prepared_nyu):
    train, _ = sources(prepared_nyu)
    options = {"batch_size": 2, "seed": 3}
    whole = take(pipeline.train_batches(train, SOLVER, **options), 6)
    bad = int(whole[4]["id"][0])
    (path,) = prepared_nyu.rglob("*train.tfrecord*")
    content = bytearray(path.read_bytes())
    content[train._records._starts[bad] + 40] ^= 255
    path.write_bytes(content)
    batches = pipeline.train_batches(train, SOLVER, **options)
    assert [batch["id"].tolist() for batch in take(batches, 4)] == [batch["id"].tolist() for batch in whole[:4]]
    with pytest.raises(
        nyu.DataError, match=rf"00000-of-00001, record {bad} \(byte \d+\) is corrupt: .*on_error='skip'"
    ):
        next(batches)
    train, _ = sources(prepared_nyu, on_error="skip")
    ids = np.concatenate([batch["id"] for batch in take(pipeline.train_batches(train, SOLVER, **options), 6)])
    expected = np.concatenate([batch["id"] for batch in whole])
    np.testing.assert_array_equal(ids, np.where(expected == bad, (bad + 1) % 12, expected))
    assert train.skipped == {train.names[bad]}


def test_records_of_other_data(prepared_nyu):
    folder = prepared.find(prepared_nyu, "nyu")
    lines = (folder / "manifest_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest_train.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(nyu.DataError, match="prepare the data again"):
        sources(prepared_nyu)[0].read(0)
    (folder / "manifest_train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(nyu.DataError, match="12 records in train but 11 names"):
        sources(prepared_nyu)
    (folder / "manifest_train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="not prepared to the end or not copied whole"):
        sources(prepared_nyu)


def test_configs_that_do_not_fit(prepared_nyu, tmp_path):
    for changes, message in (
        ({"train_list": "train.txt"}, r"data\.train_list has no effect on the prepared data in"),
        ({"render": {"train": 3}}, r"data\.render has no effect"),
        ({"expected_test": 654}, "3 pairs in test, but expected_count=654"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.build(data_config(prepared_nyu, **changes))
    folder = prepared.find(prepared_nyu, "nyu")
    assert prepared.find(folder, "nyu") == folder
    with pytest.raises(ValueError, match="holds the prepared data 'nyu_pairs', but needed is coco_instances"):
        datasets.build(raw_coco(folder))
    shutil.copytree(folder, prepared_nyu / "nyu_pairs/2.0.0")
    with pytest.raises(ValueError, match=r"several prepared data sets: set data\.root to one of .*1\.0\.0, .*2\.0\.0"):
        datasets.build(data_config(prepared_nyu))


def test_keys_of_folders_may_be_missing(prepared_nyu):
    config = data_config(prepared_nyu)
    less = {key: value for key, value in config.items() if not key.startswith(("train_", "test_", "render"))}
    assert len(datasets.build(type(config)(less)).train) == 12


def test_nyu_depth_v2_of_tfds(tmp_path, monkeypatch):
    rng, frames = np.random.default_rng(0), {}
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            path = tmp_path / f"raw/nyudepthv2/{split}/room_{i}/{i}.h5"
            path.parent.mkdir(parents=True)
            image, depth = rng.integers(0, 256, (3, 480, 640), np.uint8), rng.uniform(0.5, 10, (480, 640))
            frames[image.tobytes()] = depth
            with h5py.File(path, "w") as file:
                file["rgb"], file["depth"] = image, depth.astype(np.float32)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda *_: str(tmp_path / "raw"))
    tfds.builder("nyu_depth_v2", data_dir=tmp_path / "out").download_and_prepare()
    train, test = sources(tmp_path / "out")
    assert (train.names, len(test)) == (["train/00000", "train/00001", "train/00002"], 2)
    for source in (train, test):
        for i in range(len(source)):
            example = source.read(i)
            depth = frames[np.ascontiguousarray(example["image"].transpose(2, 0, 1)).tobytes()]
            assert example["depth"].dtype == np.float32
            np.testing.assert_array_equal(example["depth"], depth.astype(np.float32).astype(np.float16))


def test_beam_is_only_needed_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    write_nyu(tmp_path / "raw")
    assert '--beam needs Apache Beam; install ".[prepare]"' in fails(
        "nyu", tmp_path / "raw", tmp_path / "out", *ANY, "--beam"
    )
    command("nyu", tmp_path / "raw", tmp_path / "out", *ANY)
