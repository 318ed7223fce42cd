"""Prepared data gives what the raw folders give."""

import sys

import coco_files
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_coco_batches import data_config as coco_config
from test_nyu import write_pair
from test_pipeline import assert_same, data_config, take

from aitok_jax.data import datasets, pipeline, prepare
from aitok_jax.data.sources import nyu, prepared

TRAINING = [
    coco_files.annotation(11, image_id=2, category_id=2),
    coco_files.annotation(5, image_id=1, segmentation=coco_files.compressed(coco_files.BOX_MASK)),
    coco_files.annotation(6, image_id=1, box=(1, 2, 9, 11)),
    coco_files.annotation(
        7, image_id=4, segmentation={"size": [30, 40], "counts": coco_files.counts(coco_files.BOX_MASK)}
    ),
    coco_files.annotation(
        8,
        image_id=4,
        iscrowd=1,
        segmentation={"size": [30, 40], "counts": coco_files.counts(coco_files.BOX_MASK)},
    ),
    coco_files.annotation(9, image_id=4, box=(3, 3, 3.5, 20)),  # too thin to train on, counts in the evaluation
]
ANY = ("--train_count=0", "--test_count=0")
REAL_COCO = {
    "train_images": "train2017",
    "test_images": "val2017",
    "train_annotations": "annotations/instances_train2017.json",
    "test_annotations": "annotations/instances_val2017.json",
}
TESTED = [coco_files.annotation(3, image_id=3), coco_files.annotation(4, image_id=1, category_id=2)]


def command(*arguments):
    """Runs the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        prepare.main()


def write_nyu(root, train=6, test=3):
    for i in range(train):
        write_pair(root / f"room_{i % 2}", i, size=(12, 16), seed=i)
    for i in range(test):
        write_pair(root / "official_splits/test/den", i, size=(12, 16), seed=100 + i)


def write_coco(root):
    for split, annotations in (("train", TRAINING), ("test", TESTED)):
        images, path = coco_files.write(root / split, annotations, images=5)
        images.rename(root / f"{split}_images")
        path.rename(root / f"{split}.json")


@pytest.fixture(scope="module")
def nyu_roots(tmp_path_factory):
    raw, out = (tmp_path_factory.mktemp(name) for name in ("nyu", "nyu_prepared"))
    write_nyu(raw)
    command("nyu", raw, out, "--train_count=6", "--test_count=3")
    return raw, out


@pytest.fixture(scope="module")
def coco_roots(tmp_path_factory):
    raw, out = (tmp_path_factory.mktemp(name) for name in ("coco", "coco_prepared"))
    write_coco(raw)
    places = [f"--{s}_{kind}" for s in ("train", "test") for kind in (f"images={s}_images", f"annotations={s}.json")]
    command("coco", raw, out, *places, "--train_count=5", "--test_count=5")
    return raw, out


def both(roots, make):
    return [datasets.build(make(root)) for root in roots]


def raw_coco(root, **changes):
    places = {f"{s}_images": f"{s}_images" for s in ("train", "test")}
    places |= {f"{s}_annotations": f"{s}.json" for s in ("train", "test")}
    return coco_config(root, **places, **changes)


def assert_same_batches(raw, ready):
    """In training, on over the end of an epoch, and in evaluation."""
    for part in ("train", "eval"):
        assert getattr(raw, part).names == getattr(ready, part).names
    assert raw.fingerprint() == ready.fingerprint()
    for step in (0, 5):
        options = {"batch_size": 3, "seed": 4, "start_step": step}
        for a, b in zip(
            *(take(pipeline.train_batches(d.train, d.train_transform, **options), 3) for d in (raw, ready)), strict=True
        ):
            assert_same(a, b)
    evaluations = [list(pipeline.eval_batches(d.eval, d.eval_transform, batch_size=2)) for d in (raw, ready)]
    for a, b in zip(*evaluations, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("recipe", ["solver", "tokenizer"])
def test_nyu_batches(nyu_roots, recipe):
    columns = (2, 15) if recipe == "tokenizer" else ()
    raw, ready = both(nyu_roots, lambda root: data_config(root, recipe=recipe, columns=columns, expected_train=6))
    assert isinstance(ready.train, prepared.PreparedNyu)
    assert_same_batches(raw, ready)


def test_coco_batches(coco_roots):
    raw, ready = both(coco_roots, raw_coco)
    assert isinstance(ready.train, prepared.PreparedCoco)
    assert_same_batches(raw, ready)
    for a, b in ((raw.train, ready.train), (raw.eval, ready.eval)):
        assert (a.ids, a.categories, a.category_ids) == (b.ids, b.categories, b.category_ids)
        np.testing.assert_array_equal(a.sizes, b.sizes)
        assert a.coco.anns.keys() == b.coco.anns.keys()
        for key, annotation in a.coco.anns.items():
            other = b.coco.anns[key]
            np.testing.assert_array_equal(a.coco.annToMask(annotation), b.coco.annToMask(other))
            assert annotation | {"segmentation": 0} == other | {"segmentation": 0}


def test_coco_mask_batches(coco_roots):
    raw, ready = both(coco_roots, lambda root: raw_coco(root, name="coco_masks"))
    assert len(ready.train) == 5
    assert_same_batches(raw, ready)


def test_other_files_have_another_fingerprint(tmp_path):
    write_coco(tmp_path)
    before = datasets.build(raw_coco(tmp_path)).fingerprint()
    assert before == datasets.build(raw_coco(tmp_path)).fingerprint()
    path = tmp_path / "train.json"
    path.write_text(path.read_text().replace('"category_id": 2', '"category_id": 7', 1))
    after = datasets.build(raw_coco(tmp_path)).fingerprint()
    assert after["eval"] == before["eval"]
    assert {key for key in after["train"] if after["train"][key] != before["train"][key]} == {"annotations"}
    write_nyu(tmp_path / "nyu")
    before = datasets.build(data_config(tmp_path / "nyu")).fingerprint()
    (tmp_path / "nyu/room_0/rgb_00000.jpg").rename(tmp_path / "nyu/room_0/rgb_00008.jpg")
    (tmp_path / "nyu/room_0/sync_depth_00000.png").rename(tmp_path / "nyu/room_0/sync_depth_00008.png")
    after = datasets.build(data_config(tmp_path / "nyu")).fingerprint()
    assert {key for key in after["train"] if after["train"][key] != before["train"][key]} == {"names"}


def test_tensorflow_datasets_reads_it_too(coco_roots, nyu_roots):
    (folder,) = (coco_roots[1] / "coco_instances").iterdir()
    examples = list(tfds.builder_from_directory(folder).as_dataset(split="train").as_numpy_iterator())
    assert [len(example["objects"]["counts"]) for example in examples] == [2, 1, 0, 3, 0]
    assert examples[3]["objects"]["is_crowd"].tolist() == [False, True, False]
    assert examples[1]["objects"]["label"].tolist() == [0]  # category 2, the first
    (folder,) = (nyu_roots[1] / "nyu_pairs").iterdir()
    (first, *_) = tfds.builder_from_directory(folder).as_dataset(split="test").as_numpy_iterator()
    assert first["depth"].dtype == np.uint16
    np.testing.assert_array_equal(
        first["depth"][..., 0], np.asarray(Image.open(nyu_roots[0] / "official_splits/test/den/sync_depth_00000.png"))
    )


def test_more_than_memory_holds_keeps_its_order(nyu_roots, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 0)  # sorts on the disk
    command("nyu", nyu_roots[0], tmp_path, *ANY)
    ready, whole = (datasets.build(data_config(root)).train for root in (tmp_path, nyu_roots[1]))
    assert ready.names == whole.names
    for i in range(6):
        assert_same(ready.read(i), whole.read(i))


def test_real_files(nyu_frames, coco_subset, tmp_path):
    command("nyu", nyu_frames, tmp_path, "--train_list=list.txt", "--test_list=list.txt", "--test_folder=", *ANY)
    source = nyu.NyuSource(prepared.MODALITY, nyu_frames, "list.txt")
    ready, _ = prepared.nyu_sources(prepared.find(tmp_path, "nyu"), train_images=True, counts=(19, 19))
    command("coco", coco_subset, tmp_path, *ANY)
    raw = coco_config(coco_subset, **REAL_COCO)
    a, b = datasets.build(raw), datasets.build(coco_config(tmp_path, **REAL_COCO))
    for one, other in ((source, ready), (a.train, b.train), (a.eval, b.eval)):
        assert one.names == other.names
        assert len(one) >= 19
        for i in range(0, len(one), 3):
            assert_same(one.read(i), other.read(i))
    assert len(a.eval.coco.anns) == len(b.eval.coco.anns) == 264
