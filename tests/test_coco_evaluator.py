"""Evaluation of objects: back to the original image, invariance to batch size and devices, pictures."""

import types
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from coco_fakes import CATEGORY_IDS, NAMES, ellipse, ground_truth
from PIL import Image

from aitok_jax.data import object_transforms
from aitok_jax.data.sources import coco as coco_data
from aitok_jax.evaluators import average_precision, evaluate
from aitok_jax.parallel import sharding
from aitok_jax.tasks import paste

SIZE, SLOTS = 96, 8


@dataclass(frozen=True)
class KnownObjects:
    """Returns the objects that `params` holds for the images of the batch."""

    kind: ClassVar[str] = "objects"

    masks: bool = True

    def predict(self, params, model_state, batch):
        del model_state
        outputs = {name: values[batch["id"]] for name, values in params.items()}
        outputs["scores"] = outputs["scores"] * jnp.ones_like(batch["image"][:, :1, 0, 0])
        return outputs if self.masks else {name: v for name, v in outputs.items() if name != "masks"}


class Images:
    """Images of a ground truth, in its order."""

    def __init__(self, coco):
        rng = np.random.default_rng(0)
        self.coco, self.category_ids, self.categories = coco, CATEGORY_IDS, NAMES
        images = coco.dataset["images"]
        self.ids, self.names = [image["id"] for image in images], [image["file_name"] for image in images]
        self.pictures = [rng.integers(0, 256, (i["height"], i["width"], 3), dtype=np.uint8) for i in images]

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        entries = [a for a in self.coco.imgToAnns.get(self.ids[index], []) if not a["iscrowd"]]
        arrays = paste.from_results([a | {"score": 1.0} for a in entries], self.category_ids)
        arrays.setdefault("masks", np.zeros((0, *self.pictures[index].shape[:2]), np.uint8))
        return {"image": self.pictures[index], **arrays}


def predictions(source, noise=0.0, seed=0):
    """The annotated objects in the frame of the input, moved by noise, with objects that are not valid in between."""
    rng = np.random.default_rng(seed)
    shape = (len(source), SLOTS)
    outputs = {
        "boxes": rng.uniform(0, SIZE, (*shape, 4)),
        "classes": rng.integers(0, 3, shape),
        "scores": rng.uniform(0.4, 1, shape).round(2),
        "masks": np.zeros((*shape, 32, 32)),
        "valid": np.zeros(shape, bool),
    }
    for index in range(len(source)):
        example, size = source.read(index), source.pictures[index].shape[:2]
        factor = SIZE / max(size)
        slots = rng.permutation(SLOTS)[: len(example["boxes"])]
        jitter = noise * rng.normal(size=(len(slots), 4))
        outputs["boxes"][index, slots] = (example["boxes"] + jitter) * factor
        outputs["classes"][index, slots] = example["classes"]
        outputs["masks"][index, slots] = ellipse((0, 0, 32, 32), 32, 32)
        outputs["valid"][index, slots] = True
    kinds = {"classes": np.int32, "valid": bool}
    return {name: jnp.asarray(values, kinds.get(name, np.float32)) for name, values in outputs.items()}


def run(source, params, task=None, **options):
    data = types.SimpleNamespace(train=None, eval=source, eval_transform=object_transforms.evaluation(SIZE))
    options = {"batch_size": 4, "prefix": "val", "progress": False} | options
    return evaluate(task or KnownObjects(), params, {}, data, **options)


def test_annotated_objects_score_one():
    source = Images(ground_truth(9))
    result = run(source, predictions(source))
    assert len(result) == 36
    assert result["val/box_ap"] == pytest.approx(1)
    assert result["val/mask_ap50"] == result["val/boundary_ap50"] == pytest.approx(1)
    assert result["val/mask_ap"] > 0.9


def test_the_same_as_scoring_the_objects_in_one_go():
    source = Images(ground_truth(9))
    params = predictions(source, noise=1.5)
    results = []
    for index, picture in enumerate(source.pictures):
        rows = {name: np.asarray(values[index]) for name, values in params.items()}
        height, width = picture.shape[:2]
        scale = np.full(2, SIZE / max(height, width))
        results += paste.to_results(rows, source.ids[index], CATEGORY_IDS, scale, (height, width))
    expected = average_precision.CocoScorer.of(source.coco, results).result(("box", "mask", "boundary"))
    result = run(source, params)
    assert result == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=1e-12)
    assert 0.1 < result["val/box_ap"] < 0.9


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_same_result_for_any_batch_size(batch_size):
    source = Images(ground_truth(9))
    params = predictions(source, noise=1.5)
    assert run(source, params, batch_size=batch_size) == run(source, params, batch_size=9)


def test_same_result_on_eight_devices(tmp_path):
    source = Images(ground_truth(11))
    params = predictions(source, noise=1.5)
    result = run(source, params, batch_size=8, mesh=sharding.make_mesh(), panels_dir=tmp_path, panels=3)
    assert result == run(source, params)
    assert len(list(tmp_path.iterdir())) == 3


def test_detectors_have_no_mask_numbers(tmp_path):
    source = Images(ground_truth(9))
    params = predictions(source, noise=1.5)
    result = run(source, params, KnownObjects(masks=False), panels_dir=tmp_path)
    whole = run(source, params)
    assert result == {name: value for name, value in whole.items() if "/box_" in name}
    assert len(list(tmp_path.iterdir())) == 8


def test_images_without_any_object_found_are_misses():
    source = Images(ground_truth(9))
    params = predictions(source)
    none = params | {"valid": jnp.zeros_like(params["valid"])}
    assert run(source, none)["val/mask_ap"] == 0
    half = params | {"valid": params["valid"].at[:5].set(False)}
    assert 0 < run(source, half)["val/box_ar100"] < 1


def test_only_the_images_of_the_source_count():
    """A source may have some of the images, in another order than the ground truth."""
    source = Images(ground_truth(9))
    for name in ("ids", "names", "pictures"):
        setattr(source, name, getattr(source, name)[7:2:-1])
    result = run(source, predictions(source))
    assert result["val/box_ap"] == pytest.approx(1)
    assert "val/images_left_out" not in result


class BrokenImages(Images):
    """The images 2 and 4 cannot be read, and are skipped."""

    def read_readable(self, index):
        return (index + 1 if index in (2, 4) else index), self.read(index)


def test_unreadable_images_are_left_out_and_counted():
    coco = ground_truth(9)
    broken, params = BrokenImages(coco), predictions(Images(coco))
    params["valid"] = params["valid"].at[jnp.array([2, 4])].set(False)  # what they would have cost
    result = run(broken, params)
    assert result["val/images_left_out"] == 2
    assert result["val/box_ap"] == pytest.approx(1)
    assert run(Images(coco), params)["val/box_ar100"] < 1


def test_images_of_another_size_than_the_json_says_are_refused():
    source = Images(ground_truth(3))
    source.pictures = [picture[:-1] for picture in source.pictures]
    params = predictions(source)
    with pytest.raises(ValueError, match="has a mask of size"):
        run(source, params)


def test_pictures_of_the_first_images(tmp_path):
    source = Images(ground_truth(5))
    params = predictions(source)
    run(source, params, batch_size=2, panels_dir=tmp_path / "panels", panels=3)
    files = sorted(path.name for path in (tmp_path / "panels").iterdir())
    assert files == ["set_0_0.png", "set_0_2.png", "set_1_1.png"]
    assert np.asarray(Image.open(tmp_path / "panels" / files[0])).shape[2] == 3
    none = params | {"valid": jnp.zeros_like(params["valid"])}
    run(source, params | {"scores": 0.1 * params["scores"]}, panels_dir=tmp_path / "unsure", panels=3)
    run(source, none, panels_dir=tmp_path / "none", panels=3)
    folders = [tmp_path / name for name in ("panels", "unsure", "none")]
    sure, unsure, nothing = (np.asarray(Image.open(folder / "set_0_2.png")) for folder in folders)
    np.testing.assert_array_equal(unsure, nothing)
    differs = np.abs(sure[50:].astype(int) - unsure[50:]).max(axis=(0, 2)) > 0  # below the titles
    assert not differs[: len(differs) // 2 - 10].any()
    assert differs[len(differs) // 2 + 10 :].any()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_annotations_as_predictions(split, coco_subset):
    """Real images through reader, input transform, predictions cropped from their masks, and back."""
    source = coco_data.CocoSource(coco_subset / split, coco_subset / "annotations" / f"instances_{split}.json")
    size, slots = 640, 40
    shape = (len(source), slots)
    params = {
        "boxes": np.zeros((*shape, 4), np.float32),
        "classes": np.zeros(shape, np.int32),
        "scores": np.ones(shape, np.float32),
        "masks": np.zeros((*shape, 64, 64), np.float32),
        "valid": np.zeros(shape, bool),
    }
    for index in range(len(source)):
        example = source.read(index)
        count = min(len(example["boxes"]), slots)
        height, width = example["image"].shape[:2]
        params["boxes"][index, :count] = example["boxes"][:count] * size / max(height, width)
        params["classes"][index, :count] = example["classes"][:count]
        crops = object_transforms.crop_masks(example["masks"], example["boxes"][:count], np.arange(count), 64)
        params["masks"][index, :count] = crops
        params["valid"][index, :count] = True
    data = types.SimpleNamespace(eval=source, eval_transform=object_transforms.evaluation(size))
    params = {name: jnp.asarray(values) for name, values in params.items()}
    result = evaluate(KnownObjects(), params, {}, data, batch_size=8, prefix="real", progress=False)
    assert result["real/box_ap"] > 0.999
    assert result["real/mask_ap"] > 0.99
    assert result["real/boundary_ap50"] > 0.999
