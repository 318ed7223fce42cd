"""Training batches of real photos with twelve defects among their annotations."""

import itertools
import json
import math

import numpy as np
import pytest
from test_coco_batches import data_config

from aitok_jax.data import datasets, pipeline
from aitok_jax.data.sources.files import DataError

JSON = "annotations/instances_train2017.json"
DEFECTS = [
    ({"id": [1]}, "id that is not a whole number"),
    ({"image_id": "000000000009.jpg"}, "image_id that is not a whole number"),
    ({"category_id": 12}, "category unknown"),
    ({"bbox": [1, 2, math.nan, 4]}, "bbox that is not 4 numbers"),
    ({"bbox": [5000, 2, 9, 9]}, "bbox outside the image"),
    ({"area": "large"}, "area that is not a number from 0 to 1e+10"),
    ({"iscrowd": "no"}, "iscrowd that is not 0 or 1"),
    ({"segmentation": [[1, 2, 3, math.nan, 5, 9]]}, "polygon with a value that is no number"),
    ({"segmentation": [[1, 2, 2e8, 4, 5, 9]]}, "polygon far outside the image"),
    ({"segmentation": [[-9, 2, -5, 4, -7, 9]]}, "polygons outside the image"),
    ({"segmentation": [0]}, "degenerate polygon"),
    ({"segmentation": {"counts": "P\0"}}, "broken compressed mask"),
]


def break_some(content):
    """Gives one object of each of twelve photos a defect, and writes others of theirs differently; their ids."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    of_photo = {image_id: [] for image_id in sizes}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            of_photo[annotation["image_id"]].append(annotation)
    photos = [annotations for annotations in of_photo.values() if len(annotations) > 2][: len(DEFECTS)]
    broken = []
    for (first, second, *_), (fields, _) in zip(photos, DEFECTS, strict=True):
        polygon = second["segmentation"][0]
        second |= {"id": str(second["id"]), "area": 0, "category_id": float(second["category_id"])}
        second["segmentation"][0] = [polygon[i : i + 2] for i in range(0, len(polygon), 2)]
        broken.append(first["id"])
        if isinstance(fields.get("segmentation"), dict):
            fields["segmentation"]["size"] = sizes[first["image_id"]]
        first |= fields
    return broken


def test_training_on_photos_with_defects(coco_subset, tmp_path, caplog):
    content = json.loads((coco_subset / JSON).read_text())
    broken = break_some(content)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    places = {"train_images": "train2017", "test_images": "val2017", "train_annotations": str(path)}
    places |= {"test_annotations": "annotations/instances_val2017.json", "size": 64, "num_objects": 20, "cache": False}
    with pytest.raises(DataError, match=r"instances\.json: annotation .*; correct it, .*; 11 more are broken"):
        datasets.build(data_config(coco_subset, **places))

    data = datasets.build(data_config(coco_subset, **places, on_error="skip"))
    assert len(data.train) == 33
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith("instances.json: 12 of 352 annotations left out: ")
    for number, (fields, kind) in zip(broken, DEFECTS, strict=True):
        place = next(i for i, entry in enumerate(content["annotations"]) if entry["id"] in (number, fields.get("id")))
        label = f"[{place}]" if "id" in fields else str(number)
        assert f"1 {kind} (id {label})" in line
        assert f"annotation {label}" in data.train.skipped
    assert len(data.train.skipped) == 12

    batches = pipeline.train_batches(data.train, data.train_transform, batch_size=11, seed=0)
    epoch = list(itertools.islice(batches, 3))
    assert sorted(np.concatenate([batch["id"] for batch in epoch])) == list(range(33))
    assert all(batch["mask"].all() and batch["objects/crops"].any() for batch in epoch)
    assert data.train.skipped == {label for label in data.train.skipped if label.startswith("annotation")}

    whole = datasets.build(data_config(coco_subset, **places | {"train_annotations": JSON})).train
    for i in range(33):
        left = [n for n, entry in enumerate(whole.annotations(i)) if entry["id"] not in broken]
        for name, wanted in whole.read(i).items():
            np.testing.assert_array_equal(data.train.read(i)[name], wanted if name == "image" else wanted[left])
