"""Instances and detection from the Predictor and its command line: a toy model that finds what is white, and small
real ones."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import CATEGORIES

from aitok_jax import tasks, visualize
from aitok_jax.data import object_transforms
from aitok_jax.predict.__main__ import main
from aitok_jax.predict.outputs import Results
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks import paste
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.vocabulary import Vocabulary
from aitok_jax.training import checkpoint

VOCABULARY = Vocabulary(num_classes=4)


@dataclass(frozen=True)
class ToyObjects:
    """Objects as in its parameters, the first of them boxed around what is white; masks are their boxes' left half."""

    kind: ClassVar[str] = "objects"

    image_size: int = 64
    masks: bool = True
    vocabulary: Vocabulary = VOCABULARY

    @property
    def answers(self):
        return ("instances", "detection") if self.masks else ("detection",)

    def predict(self, params, model_state, batch):
        return jax.vmap(lambda image: self.find(params, image))(batch["image"])

    def find(self, params, image):
        white = image.min(-1) > 0.75
        edges = [f(white.any(axis)) for f in (first, last) for axis in (0, 1)]
        boxes = params["boxes"].at[0].set(jnp.stack(edges).astype(jnp.float32))
        masks = jnp.zeros((len(boxes), 4, 4)).at[:, :, :2].set(1.0)
        return {**params, "boxes": boxes} | ({"masks": masks} if self.masks else {})


def first(is_white):
    return jnp.argmax(is_white)


def last(is_white):
    return len(is_white) - jnp.argmax(is_white[::-1])


TOY = {  # in a 64 x 64 input, of which an image of 100 x 200 fills the upper half
    "boxes": [
        [0, 0, 0, 0],
        [8, 4, 16, 20],
        [8, 4, 16, 20],
        [16, 4, 8, 20],
        [0, 40, 9, 60],
        [50, 20, 80, 40],
        [1, 1, 9, 9],
    ],
    "classes": [1, 0, 0, 0, 0, 2, 3],  # the last is none of the categories
    "scores": [0.5, 0.25, 0.9, 0.9, 0.9, 0.75, 0.9],
    "valid": [True, True, False, True, True, True, True],
}


def toy_task(**options):
    return SimpleNamespace(parts={"objects": ToyObjects(**options)})


def toy_predictor(**options):
    params = {name: np.asarray(values) for name, values in TOY.items()}
    params["boxes"], params["scores"] = (params[name].astype(np.float32) for name in ("boxes", "scores"))
    return Predictor(toy_task(**options), params, {}, CATEGORIES)


@pytest.fixture
def toy():
    return toy_predictor()


def picture(height, width):
    """A smooth, dark image."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    planes = [40 + 120 * rows, 60 + 100 * columns, np.zeros((height, width))]
    return np.stack(planes, -1).astype(np.uint8)


def with_rectangle(height, width, x1, y1, x2, y2):
    image = picture(height, width)
    image[y1:y2, x1:x2] = 255
    return image


def test_objects_by_hand(toy):
    found = toy(with_rectangle(100, 200, 100, 50, 150, 100))
    assert toy.tasks == ("instances", "detection")
    assert set(found) == {"boxes", "classes", "names", "scores", "masks"}
    dtypes = {name: values.dtype for name, values in found.items() if name != "names"}
    assert dtypes == {"boxes": np.float32, "classes": np.int32, "scores": np.float32, "masks": bool}
    # invalid, reversed, below the image and of no category: left out; best first; cut at the image's border
    np.testing.assert_allclose(found["scores"], [0.75, 0.5, 0.25])
    np.testing.assert_allclose(found["boxes"][[0, 2]], [[156.25, 62.5, 200, 100], [25, 12.5, 50, 62.5]], atol=1e-3)
    np.testing.assert_array_equal(found["classes"], [2, 1, 0])
    assert found["names"] == ["sofa", "dog", "cup"]
    rows, columns = np.flatnonzero(found["masks"][2][:, 31]), np.flatnonzero(found["masks"][2][37])
    np.testing.assert_allclose([columns.min(), columns.max()], [25, 37], atol=1)  # the left half of the box
    np.testing.assert_allclose([rows.min(), rows.max()], [12, 62], atol=1)


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (64, 64), (40, 25), (250, 251), (17, 64)])
def test_objects_lie_where_they_are_in_the_image(toy, height, width):
    box = [width // 2, height // 4, width - width // 8, height - height // 3]
    found = toy(with_rectangle(height, width, *box))
    row = found["names"].index("dog")
    pixel = max(height, width) / 64  # of the model
    np.testing.assert_allclose(found["boxes"][row], box, atol=1.01 * max(pixel, 1))
    assert found["masks"].shape == (len(found["scores"]), height, width)
    inside = np.zeros((height, width), bool)
    inside[box[1] : box[3], box[0] : (box[0] + box[2]) // 2] = True
    both = (found["masks"][row] & inside).sum() / (found["masks"][row] | inside).sum()
    assert both > 0.7


def test_detection_is_instances_without_masks(toy):
    image = with_rectangle(100, 200, 100, 50, 150, 100)
    instances, detection = toy(image, "instances"), toy(image, "detection")
    masks = instances.pop("masks")
    assert len(masks) == len(instances["scores"])
    assert detection.keys() == instances.keys()
    for name, values in detection.items():
        np.testing.assert_array_equal(values, instances[name])
    detector = toy_predictor(masks=False)
    assert detector.tasks == ("detection",)
    np.testing.assert_array_equal(detector(image)["boxes"], detection["boxes"])
    with pytest.raises(ValueError, match=r"task='instances'.*: 'detection'"):
        detector(image, task="instances")


def test_min_score(toy):
    image = picture(100, 200)
    np.testing.assert_allclose(toy(image, min_score=0.75)["scores"], [0.75])
    nothing = toy(image, min_score=1.0)
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["masks"].shape == (0, 100, 200)
    assert nothing["masks"].dtype == bool
    assert nothing["names"] == []
    assert "masks" not in toy(image, "detection", min_score=1.0)
    with pytest.raises(ValueError, match=r"min_score=50 must be in 0..1"):
        toy(image, min_score=50)


def test_coco_results(toy):
    image = with_rectangle(100, 200, 100, 50, 150, 100)
    results, found = toy.coco_results(image, image_id="room"), toy(image)
    assert [result["category_id"] for result in results] == [90, 2, 7]
    assert {result["image_id"] for result in results} == {"room"}
    for result, box, mask in zip(results, found["boxes"], found["masks"], strict=True):
        np.testing.assert_allclose(result["bbox"], [*box[:2], *(box[2:] - box[:2])], rtol=1e-5)
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask)
    assert "segmentation" not in toy.coco_results(image, "detection")[0]
    with pytest.raises(ValueError, match=r"task='depth'.*: 'instances', 'detection'"):
        toy.coco_results(image, "depth")
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        toy.coco_results(np.zeros((4, 5), np.uint8))


def test_categories():
    unnamed = Predictor(toy_task(), {}, {}).categories
    assert unnamed == [{"id": i + 1, "name": f"class {i}"} for i in range(4)]
    with pytest.raises(ValueError, match=r"6 categories.* 4 classes"):
        Predictor(toy_task(), {}, {}, 2 * CATEGORIES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each of these tasks, with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("detection", "instances", "joint"):
        tiny_runs.write(folder, name)
    return folder


@pytest.mark.parametrize(
    ("kind", "can"),
    [
        ("detection", ("detection",)),
        ("instances", ("instances", "detection")),
        ("joint", ("depth", "instances", "detection")),
    ],
)
def test_a_checkpoint_predicts_as_its_evaluation(runs, kind, can):
    predictor = Predictor.load(runs / kind)
    assert predictor.tasks == can
    assert predictor.categories == CATEGORIES
    config, weights = checkpoint.load_inference(runs / kind)
    part = tasks.build(config.task).parts["instances"]
    image = np.random.default_rng(2).integers(0, 256, (45, 80, 3), dtype=np.uint8)
    example = object_transforms.evaluation(32)({"image": image}, np.random.default_rng(0))
    outputs = compiled_predict(part)(weights["params"], weights["model_state"], {"image": example["image"][None]})
    outputs = {name: np.asarray(values[0]) for name, values in outputs.items()}
    expected = paste.to_results(outputs, 5, [7, 2, 90], example["scale"], example["original_size"])
    assert expected
    assert predictor.coco_results(image, image_id=5) == sorted(expected, key=lambda result: -result["score"])
    found = predictor([image])[0] if kind != "joint" else predictor(image, "instances")
    assert ("masks" in found) == (kind != "detection")


def test_a_list_is_predicted_as_its_images_are(runs):
    """Sampled with the seed of an image alone: neither the place in the batch nor what fills it up matters."""
    predictor = Predictor.load(runs / "joint")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((45, 80), (32, 32), (70, 20))]
    results = predictor.coco_results(images, image_id=["a", "b", "c"])
    found = predictor(images, "instances")
    for name, image, objects_of, arrays in zip("abc", images, results, found, strict=True):
        tiny_runs.assert_same_results(objects_of, predictor.coco_results(image, image_id=name))
        assert arrays["masks"].shape == (len(objects_of), *image.shape[:2])
        np.testing.assert_allclose(arrays["scores"], [result["score"] for result in objects_of], rtol=1e-6)
    assert sum(map(len, results[1:])) > 0
    assert [result["image_id"] for result in predictor.coco_results(images)[2]] == [2] * len(results[2])
    with pytest.raises(ValueError, match=r"2 values of image_id for 3 images"):
        predictor.coco_results(images, image_id=[1, 2])
    with pytest.raises(ValueError, match=r"1 values of image_id for 3 images"):
        predictor.coco_results(images, image_id="abc")
    with pytest.raises(ValueError, match=r"augment=True is for maps, not for task='instances'"):
        predictor(images, "instances", augment=True)


def test_a_joint_model_also_predicts_depth(runs):
    predictor = Predictor.load(runs / "joint")
    image = picture(45, 80)
    maps = predictor(image)
    config, weights = checkpoint.load_inference(runs / "joint")
    depth = {"depth": tasks.build(config.task).parts["depth"]}
    alone = Predictor(SimpleNamespace(parts=depth), weights["params"], weights["model_state"])
    assert maps["depth"].shape == (45, 80)
    np.testing.assert_array_equal(maps["depth"], alone(image)["depth"])
    assert set(predictor(image, "detection")) == {"boxes", "classes", "names", "scores"}
    with pytest.raises(ValueError, match=r"task='edges'.*: 'depth', 'instances', 'detection'"):
        predictor(image, "edges")


@pytest.mark.parametrize(("kind", "task"), [("instances", None), ("joint", "detection"), ("detection", None)])
def test_objects_on_the_command_line(runs, tmp_path, kind, task):
    Image.fromarray(picture(45, 80)).save(tmp_path / "room.png")
    Image.new("RGB", (300, 10)).save(tmp_path / "long.png")
    images = [str(tmp_path / name) for name in ("room.png", "long.png")]
    given = [f"--task={task}"] if task else []
    assert main([f"--checkpoint={runs / kind}", *given, "--image", *images, f"--out={tmp_path / 'out'}"]) == 0
    names = {f"{stem}_{kind}" for stem in ("room", "long") for kind in ("instances.json", "panel.png")}
    together = {"results.json", "categories.json", Results.INDEX}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | together
    results = json.loads((tmp_path / "out" / "room_instances.json").read_text())
    assert results == Predictor.load(runs / kind).coco_results(picture(45, 80), task, image_id="room")
    assert all(("segmentation" in result) == (kind == "instances") for result in results)


def test_the_panel_shows_objects_of_a_high_score(toy, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(Predictor, "load", lambda path: toy)
    monkeypatch.setattr(
        visualize, "objects_panel", lambda *args, **_: shown.append(args) or np.zeros((1, 1, 3), np.uint8)
    )
    Image.fromarray(picture(100, 200)).save(tmp_path / "room.png")
    words = ["--checkpoint=x", f"--image={tmp_path / 'room.png'}", f"--out={tmp_path}"]
    for options, scores in ((), [0.75, 0.5]), (["--min_score=0.7"], [0.75]):
        assert main([*words, *options]) == 0
        _, boxes, classes, panel_scores, masks, names = shown.pop()
        np.testing.assert_allclose(panel_scores, scores)
        assert len(boxes) == len(classes) == len(masks) == len(scores)
        assert names == ["cup", "dog", "sofa"]
        assert len(json.loads((tmp_path / "room_instances.json").read_text())) == 3


@pytest.fixture
def photos(monkeypatch, tmp_path):
    """The toy as any checkpoint, and the command line for photos of two folders, which annotations.json knows."""
    monkeypatch.setattr(Predictor, "load", lambda path: toy_predictor())
    names = ["left/a.png", "right/b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        Image.fromarray(with_rectangle(100, 200, 100, 50, 150, 100)).save(tmp_path / name)
    of_others = {"id": 3, "file_name": "other/b.png", "height": 1, "width": 1}
    images = [{"id": 10 + i, "file_name": name, "height": 100, "width": 200} for i, name in enumerate(names)]
    truth = {"images": [of_others, *images], "categories": CATEGORIES, "annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    words = [
        "--checkpoint=x",
        "--image",
        *(str(tmp_path / name) for name in names),
        f"--out={tmp_path / 'out'}",
        "--batch_size=1",
    ]
    return [*words, f"--annotations={tmp_path / 'annotations.json'}"]


def test_pycocotools_takes_the_results_of_all_images(photos, tmp_path, capsys):
    assert main(photos) == 0
    out = tmp_path / "out"
    assert f"6 files of 2 images in {out}" in capsys.readouterr().out
    truth = COCO(tmp_path / "annotations.json")
    found = truth.loadRes(str(out / "results.json"))
    assert {found.anns[i]["image_id"] for i in found.getAnnIds()} == {10, 11}
    assert found.getCatIds() == [category["id"] for category in CATEGORIES]
    each = [json.loads((out / f"{name}_instances.json").read_text()) for name in "ab"]
    assert json.loads((out / "results.json").read_text()) == [*each[0], *each[1]]
    assert [len(found.getAnnIds(imgIds=[i])) for i in (10, 11)] == [len(results) for results in each] == [3, 3]
    assert found.annToMask(found.anns[1]).shape == (100, 200)
    assert json.loads((out / "categories.json").read_text()) == CATEGORIES


def test_results_have_the_ids_of_the_classes_in_the_annotations(photos, tmp_path, capsys):
    """Of the file's, dog and sofa are the model's, and 7 is not its cup."""
    truth = json.loads((tmp_path / "annotations.json").read_text())
    categories = [{"id": 7, "name": "lamp"}, {"id": 1, "name": "sofa"}, {"id": 5, "name": "dog"}]
    box = {"image_id": 10, "category_id": 5, "bbox": [100, 50, 50, 50], "area": 2500, "iscrowd": 0, "id": 1}
    content = truth | {"categories": categories, "annotations": [box]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert main(photos) == 0
    assert "annotations.json has no category cup: objects of these classes are left out" in capsys.readouterr().err
    out = tmp_path / "out"
    assert [result["category_id"] for result in json.loads((out / "a_instances.json").read_text())] == [1, 5, 8]
    assert [result["category_id"] for result in json.loads((out / "results.json").read_text())] == [1, 5, 1, 5]
    own = [{"id": 8, "name": "cup"}, {"id": 5, "name": "dog"}, {"id": 1, "name": "sofa"}]
    assert json.loads((out / "categories.json").read_text()) == own
    coco = COCO(tmp_path / "annotations.json")
    scorer = COCOeval(coco, coco.loadRes(str(out / "results.json")), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert scorer.stats[1] > 0.99


def test_without_objects_the_list_is_empty_and_that_is_said(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TOY, "valid", [False] * 7)
    assert main(photos) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == []
    assert "no objects: results.json is []" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": 1, "file_name": "left/a.png"}]}, r"right/b.png \(1 of 2 files\)"),
        ({"images": [{"id": 1, "file_name": "left/a.png"}, {"id": 1, "file_name": "right/b.png"}]}, "one id"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}]}, "one file_name"),
        ({"images": [{"id": None, "file_name": "a.png"}]}, "'images' must be a list"),
        ([], "'images' must be a list"),
        (None, "No such file"),
    ],
)
def test_wrong_annotations_stop_before_any_image(photos, content, message, tmp_path, capsys):
    (tmp_path / "annotations.json").unlink()
    if content is not None:
        (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(photos)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_results_of_others_stay(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(SystemExit):
        main(photos)
    assert "results.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize(("option", "message"), [("--min_score=50", "0..1"), ("--task=depth", "'detection'")])
def test_wrong_options_stop_before_any_image(runs, option, message, tmp_path, capsys):
    command = [f"--checkpoint={runs / 'detection'}", option, "--image=a.png", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
