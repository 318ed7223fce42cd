"""Evaluation of mask tokenizers: masks pasted back, misses, invariance, pictures."""

import types
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from coco_fakes import ground_truth
from PIL import Image
from pycocotools import mask as coco_mask

from aitok_jax.data import object_transforms
from aitok_jax.data.sources import coco as coco_data
from aitok_jax.evaluators import evaluate
from aitok_jax.parallel import sharding

SIZE = 32


@dataclass(frozen=True)
class Reconstructor:
    """Returns the mask with its values scaled, and shifted to the right by some cells."""

    kind: ClassVar[str] = "masks"

    scale: float = 1.0
    shift: int = 0

    def predict(self, params, model_state, batch):
        del params, model_state
        mask = batch["instance"]
        return {"instance": self.scale * mask[:, :, [max(i - self.shift, 0) for i in range(mask.shape[2])]]}


class Masks:
    """The objects of a ground truth, cut at their boxes, in the order of the annotations."""

    def __init__(self, coco):
        self.source = types.SimpleNamespace(coco=coco)
        self.annotations = [a for a in coco.dataset["annotations"] if not a["iscrowd"]]
        corners = np.array([a["bbox"] for a in self.annotations])
        self.boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
        self.names = [f"mask {a['id']}" for a in self.annotations]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        x1, y1, x2, y2 = self.boxes[index]
        cut = Image.fromarray(coco_mask.decode(self.annotations[index]["segmentation"])[y1:y2, x1:x2] * np.uint8(255))
        return {"instance": np.asarray(cut.resize((SIZE, SIZE)), np.float32) / 255}


def run(source, task=None, **options):
    data = types.SimpleNamespace(train=None, eval=source, eval_transform=object_transforms.instance(SIZE, train=False))
    options = {"batch_size": 4, "prefix": "masks", "progress": False} | options
    return evaluate(task or Reconstructor(), {}, {}, data, **options)


def rectangle(box, height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def test_unchanged_masks_score_one():
    result = run(Masks(ground_truth(9)))
    assert result["masks/mask_ap"] == pytest.approx(1, abs=0.05)
    assert result["masks/mask_ap50"] == result["masks/boundary_ap50"] == pytest.approx(1)
    assert result["masks/mask_iou"] > 0.95
    assert not any("box" in name for name in result)


def test_rectangles_come_back_but_for_their_corners():
    """Zeros outside of the mask round each corner of the pasted rectangle by one pixel or none."""
    source = Masks(ground_truth(9, shape=rectangle))
    areas = np.array([a["area"] for a in source.annotations])
    assert np.mean(1 - 4 / areas) - 1e-6 <= run(source)["masks/mask_iou"] <= 1


def test_lost_masks_score_zero():
    result = run(Masks(ground_truth(9)), Reconstructor(scale=0.0))
    assert result["masks/mask_ap"] == result["masks/boundary_ap"] == result["masks/mask_iou"] == 0


def test_worse_reconstructions_score_less():
    source = Masks(ground_truth(9))
    results = [run(source, Reconstructor(shift=shift)) for shift in (0, 3, 8)]
    for name in ("masks/mask_ap", "masks/boundary_ap", "masks/mask_iou"):
        assert results[0][name] > results[1][name] > results[2][name], name


def test_annotations_without_example_are_misses():
    source = Masks(ground_truth(9))
    for name in ("annotations", "boxes", "names"):
        setattr(source, name, getattr(source, name)[::2])
    assert run(source)["masks/mask_iou"] > 0.95
    assert run(source)["masks/mask_ar100"] < 0.8


def test_an_empty_box_is_a_miss():
    source = Masks(ground_truth(9))
    read = source.read
    examples = [read(i) for i in range(len(source))]
    source.read = lambda index: examples[index]
    whole = run(source)
    source.boxes[3, 2] = source.boxes[3, 0]
    result = run(source)
    lost = whole["masks/mask_iou"] - result["masks/mask_iou"]
    assert 0.9 / len(source) < lost <= 1 / len(source)
    assert result["masks/mask_ar100"] < whole["masks/mask_ar100"]


def test_same_result_for_any_batch_size_and_devices():
    source = Masks(ground_truth(9))
    reference = run(source, Reconstructor(shift=2), batch_size=len(source))
    for options in ({"batch_size": 1}, {"batch_size": 5}, {"batch_size": 8, "mesh": sharding.make_mesh()}):
        assert run(source, Reconstructor(shift=2), **options) == reference


def test_pictures_of_the_first_images_with_objects(tmp_path):
    source = Masks(ground_truth(9))
    run(source, panels_dir=tmp_path, panels=3)
    of_image = source.source.coco.imgs
    with_objects = sorted({a["image_id"] for a in source.annotations})
    expected = {of_image[i]["file_name"].replace("/", "_").replace(".jpg", ".png") for i in with_objects[:3]}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_real_masks(coco_subset):
    """The ceiling of a tokenizer of 64x64 crops: only cutting, resizing and pasting lose something."""
    images = coco_data.CocoSource(coco_subset / "val2017", coco_subset / "annotations" / "instances_val2017.json")
    data = types.SimpleNamespace(
        eval=coco_data.MaskSource(images), eval_transform=object_transforms.instance(64, train=False)
    )
    result = evaluate(Reconstructor(), {}, {}, data, batch_size=64, prefix="masks", progress=False)
    assert result["masks/mask_ap"] > 0.99
    assert result["masks/boundary_ap50"] > 0.999
    assert result["masks/mask_iou"] > 0.985
