import itertools

import numpy as np
import pytest
from coco_files import CATEGORIES, HEIGHT, WIDTH, annotation, make, write
from ml_collections import ConfigDict

from aitok_jax.data import datasets, object_transforms, pipeline
from aitok_jax.data.sources import coco

TRAINING = object_transforms.training(32, 6, 8)


def mask_ends(mask):
    """x1 y1 x2 y2 around the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def training_source(tmp_path):
    return make(tmp_path, [annotation(i, i, box=(i, i, i + 20, i + 12)) for i in range(1, 6)], images=5)


def test_training_batches(tmp_path):
    options = {"batch_size": 4, "seed": 3}
    source = training_source(tmp_path)
    batches = list(itertools.islice(pipeline.train_batches(source, TRAINING, **options), 4))
    assert {name: (x.dtype, x.shape) for name, x in batches[0].items()} == {
        "image": (np.float32, (4, 32, 32, 3)),
        "objects/boxes": (np.float32, (4, 6, 4)),
        "objects/classes": (np.int32, (4, 6)),
        "objects/kind": (np.int32, (4, 6)),
        "objects/crops": (np.uint8, (4, 6, 8, 8)),
        "id": (np.int32, (4,)),
        "mask": (np.float32, (4,)),
    }
    ids = np.concatenate([batch["id"] for batch in batches])
    assert sorted(ids[:5]) == sorted(ids[5:10]) == list(range(5))
    for slot, position in ((2, 6), (0, 4)):  # the second batch
        index = int(batches[1]["id"][slot])
        wanted = TRAINING(source.read(index), np.random.default_rng((3, position)))
        for name, value in wanted.items():
            np.testing.assert_array_equal(batches[1][name][slot], value)


def test_resume_and_hosts(tmp_path):
    source, options = training_source(tmp_path), {"batch_size": 4, "seed": 3}
    whole = list(itertools.islice(pipeline.train_batches(source, TRAINING, **options), 3))
    resumed = next(pipeline.train_batches(source, TRAINING, start_step=2, **options))
    shares = [
        next(pipeline.train_batches(source, TRAINING, start_step=2, process_index=i, process_count=2, **options))
        for i in range(2)
    ]
    for name, value in whole[2].items():
        np.testing.assert_array_equal(resumed[name], value)
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), value)


def test_evaluation_batches(tmp_path):
    source = training_source(tmp_path)
    batches = list(pipeline.eval_batches(source, object_transforms.evaluation(32), batch_size=4))
    assert set(batches[0]) == {"image", "scale", "original_size", "id", "mask"}
    assert np.concatenate([batch["id"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batches[1]["mask"].tolist() == [1, 0, 0, 0]
    np.testing.assert_array_equal(batches[0]["original_size"], [[HEIGHT, WIDTH]] * 4)


def data_config(root, **changes):
    values = dict(name="coco", root=str(root), train_images="images", train_annotations="instances.json")
    values |= dict(test_images="images", test_annotations="instances.json", size=32, num_objects=6, mask_size=8)
    values |= dict(jitter=(0.5, 2.0), order="random", on_error="raise", cache=True, expected_train=0, expected_test=0)
    values |= dict(render={}, also_root="", also_count=0)
    return ConfigDict({**values, **changes})


def test_build(tmp_path):
    write(tmp_path, [annotation(1), annotation(2), annotation(3, 2)], images=3)
    data = datasets.build(data_config(tmp_path, expected_train=2, expected_test=3))
    assert (len(data.train), len(data.eval)) == (2, 3)
    batch = next(pipeline.train_batches(data.train, data.train_transform, batch_size=2, seed=0))
    assert batch["objects/crops"].shape == (2, 6, 8, 8)
    batch = next(pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2))
    assert batch["image"].shape == (2, 32, 32, 3)

    data = datasets.build(data_config(tmp_path, mask_size=0))
    assert not data.train.masks
    assert "objects/crops" not in next(pipeline.train_batches(data.train, data.train_transform, batch_size=2, seed=0))

    masks = data_config(tmp_path, name="coco_masks", mask_size=16, expected_train=3, expected_test=3)
    with masks.unlocked():
        del masks.size, masks.num_objects, masks.jitter
    data = datasets.build(masks)
    instance = {"instance": np.arange(256, dtype=np.float32).reshape(16, 16)}
    firsts = [
        {float(transform(instance, np.random.default_rng(i))["instance"][0, 0]) for i in range(20)}
        for transform in (data.train_transform, data.eval_transform)
    ]
    assert firsts == [{0, 15}, {0}]
    batch = next(pipeline.train_batches(data.train, data.train_transform, batch_size=4, seed=0))
    assert {name: x.shape for name, x in batch.items()} == {"instance": (4, 16, 16), "id": (4,), "mask": (4,)}
    assert (
        sum(batch["mask"].sum() for batch in pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2)) == 3
    )


def test_objects_from_left_to_right(tmp_path):
    """Real ones, also where there are more of them than slots; the published order is random."""
    write(tmp_path, [annotation(i + 1, box=(x, 5, x + 9, 15)) for i, x in enumerate((20, 2, 11, 6))])
    for slots in (3, 6):
        lefts = {}
        for order in object_transforms.ORDERS:
            data = datasets.build(data_config(tmp_path, jitter=(1.0, 1.0), order=order, num_objects=slots))
            batch = next(pipeline.train_batches(data.train, data.train_transform, batch_size=30, seed=0))
            assert (batch["objects/kind"][:, : min(slots, 4)] == object_transforms.REAL).all()
            lefts[order] = batch["objects/boxes"][:, : min(slots, 4), 0]
        assert (np.diff(lefts["left_to_right"]) > 0).all()
        assert 0.3 < (np.diff(lefts["random"]) > 0).mean() < 0.7


def test_build_errors(tmp_path):
    write(tmp_path, [annotation(1)])
    write(tmp_path / "test", [annotation(1)], categories=CATEGORIES[:1])
    other = {"test_images": "test/images", "test_annotations": "test/instances.json"}
    for changes, message in (
        (other, "lists 2 categories and .* 1, not the same ones"),
        ({"jitter": (2.0, 1.0)}, "jitter="),
        ({"expected_train": 117266}, "1 images with objects, but expected_count=117266"),
        ({"expected_test": 5000}, "2 images, but expected_count=5000"),
        ({"name": "coco_masks", "expected_test": 7}, "1 objects, but expected_count=7"),
        ({"name": "lvis"}, "must be 'nyu' .*, 'coco' .* or 'coco_masks'"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.build(data_config(tmp_path, **changes))


def test_built_in_scenes(tmp_path):
    scenes = {"train_images": "", "test_images": "", "size": 48}
    scenes |= {f"{split}_annotations": f"annotations/instances_{split}.json" for split in ("train", "test")}
    render = {"train": 2, "test": 1, "height": 48, "width": 64, "seed": 0, "workers": 1}
    data = datasets.build(data_config(tmp_path / "scenes", render=render, **scenes))
    assert not list((tmp_path / "scenes").rglob("*depth*"))
    assert len(data.train) == 2
    example = data.eval.read(0)
    assert example["image"].shape == (48, 64, 3)
    for mask, box in zip(example["masks"], example["boxes"], strict=True):
        np.testing.assert_array_equal(box, mask_ends(mask))


@pytest.mark.parametrize(("split", "images", "instances", "crowd"), [("train", 34, 352, 4), ("val", 33, 264, 4)])
def test_real_images(coco_subset, split, images, instances, crowd):
    """Counts of the published JSON; every mask has the area and the box that the JSON gives for it."""
    arguments = coco_subset / f"{split}2017", coco_subset / "annotations" / f"instances_{split}2017.json"
    source = coco.CocoSource(*arguments)
    assert len(source) == images
    assert len(coco.CocoSource(*arguments, with_objects=True)) == images - 1
    assert (len(source.categories), source.category_ids[:12][-2:]) == (80, [11, 13])
    assert len(source.coco.anns) == instances
    assert len(coco.MaskSource(source)) == instances - crowd
    assert sum(len(source.annotations(i)) for i in range(images)) == instances - crowd
    ends, areas = [], []
    for i in range(images):
        example, entries = source.read(i), source.annotations(i)
        assert example["image"].shape[:2] == tuple(source.sizes[i])
        for box, mask, label, entry in zip(*(example[k] for k in ("boxes", "masks", "classes")), entries, strict=True):
            assert source.category_ids[label] == entry["category_id"]
            assert source.categories[label] == source.coco.cats[entry["category_id"]]["name"]
            np.testing.assert_array_equal(mask, source.coco.annToMask(entry))
            x, y, w, h = entry["bbox"]
            np.testing.assert_allclose(box, [x, y, x + w, y + h], atol=1e-3)
            areas.append((mask.sum(), entry["area"]))
            ends.append(np.abs(box - mask_ends(mask)).max())
    assert len(ends) == instances - crowd
    assert np.mean(np.array(ends) < 1.5) > 0.95  # the spikes of a few polygons are thinner than a pixel
    assert np.median(ends) < 0.6
    assert max(ends) < 8
    pixels, given = np.array(areas, float).T
    np.testing.assert_allclose(pixels.sum(), given.sum(), rtol=1e-3)
    np.testing.assert_allclose(pixels, given, rtol=0.03, atol=20)


def test_real_images_as_training_examples(coco_subset):
    source = coco.CocoSource(
        coco_subset / "train2017", coco_subset / "annotations" / "instances_train2017.json", with_objects=True
    )
    batch = next(pipeline.train_batches(source, object_transforms.training(320), batch_size=8, seed=0))
    kind, boxes, crops = (batch[f"objects/{name}"] for name in ("kind", "boxes", "crops"))
    assert (boxes >= 0).all()
    assert (boxes <= 320).all()
    assert {object_transforms.REAL, object_transforms.DUPLICATE, object_transforms.BAD} == set(np.unique(kind))
    assert not crops[kind == object_transforms.BAD].any()
    large = (kind == object_transforms.REAL) & (boxes[..., 2:] - boxes[..., :2] > 20).all(-1)
    assert 0.4 < crops[large].mean() < 0.9
    assert 0.3 < batch["image"].mean() < 0.6
