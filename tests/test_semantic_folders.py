"""Semantic maps as people have them: with a list of classes, in the layouts of ADE20K and Cityscapes."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_prepared import command

from aitok_jax.data import datasets, own
from aitok_jax.tasks.modalities import Normals, Semantic
from aitok_jax.tasks.modalities.semantic import CITYSCAPES
from configs import common


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def picture(path, labels):
    """An image of its own colours beside its labels."""
    save(path, np.random.default_rng(len(path.name)).integers(0, 255, (*np.shape(labels), 3)))


def find(root, lists, **options):
    return own.find_maps("semantic", str(root), lists, **options)


def read(found):
    """The labels that a run reads, by the names of their images."""
    fields = {key: value for key, value in found.data.items() if key != "root"}
    config = common.maps_data("semantic", found.data["root"], 4, "solver", fit="scale", **fields)
    data = datasets.build(ConfigDict(config), Semantic(**found.fields))
    return [{name: s.read(i)["semantic"] for i, name in enumerate(s.names)} for s in (data.train, data.eval)]


LABELS = np.array([[0, 1, 2, 255]] * 4)


def test_folders_of_the_same_names(tmp_path):
    """Labels count from 0 in the order of classes.txt; 255 is none."""
    for name in ("hall/a", "hall/b", "attic/c"):
        picture(tmp_path / f"images/{name}.jpg", LABELS)
        save(tmp_path / f"semantic/{name}.png", LABELS)
    (tmp_path / "classes.txt").write_text("wall\nfloor\n\nlamp shade\n")
    found = find(tmp_path, tmp_path / "lists")
    assert found.fields == {"classes": ("wall", "floor", "lamp shade")}
    assert (found.train, found.val) == (2, 1)
    for labels in (read(found)[0] | read(found)[1]).values():
        np.testing.assert_array_equal(labels, LABELS)
    from_one = find(tmp_path, tmp_path / "lists", first_label=1)
    np.testing.assert_array_equal(next(iter(read(from_one)[0].values()))[0], [255, 0, 1, 255])


def test_ade20k(tmp_path):
    """0 is none there; what is in `validation` is evaluated on, whatever else is in the folder."""
    for split, names in {"training": ("t1", "t2", "t3"), "validation": ("v1",)}.items():
        for name in names:
            picture(tmp_path / f"images/{split}/ADE_{name}.jpg", LABELS)
            save(tmp_path / f"annotations/{split}/ADE_{name}.png", LABELS)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0\t1\t1\t1\twall\n2\t0\t1\t1\t0\tdoor\n"
    )
    found = find(tmp_path, tmp_path / "lists")
    assert found.fields == {"classes": ("wall", "door")}
    train, val = read(found)
    assert (sorted(train), sorted(val)) == ([f"training/ADE_t{i}.jpg" for i in (1, 2, 3)], ["validation/ADE_v1.jpg"])
    np.testing.assert_array_equal(val["validation/ADE_v1.jpg"][0], [255, 0, 1, 255])


def test_cityscapes(tmp_path):
    """Its 19 train ids; the other pictures of gtFine are passed over."""
    for split, city in {"train": "aachen", "val": "bonn"}.items():
        for i in range(2):
            stem = f"{split}/{city}/{city}_{i:06}_000019_"
            picture(tmp_path / f"leftImg8bit/{stem}leftImg8bit.png", LABELS)
            save(tmp_path / f"gtFine/{stem}gtFine_labelTrainIds.png", np.where(LABELS == 2, 18, LABELS))
            for other in ("labelIds", "color", "instanceIds"):
                save(tmp_path / f"gtFine/{stem}gtFine_{other}.png", 77 + 0 * LABELS)
    found = find(tmp_path, tmp_path / "lists")
    assert found.fields == {"classes": CITYSCAPES}
    assert (len(CITYSCAPES), CITYSCAPES[13]) == (19, "car")
    train, val = read(found)
    assert sorted(val) == [f"val/bonn/bonn_{i:06}_000019_leftImg8bit.png" for i in range(2)]
    assert len(train) == 2
    np.testing.assert_array_equal(next(iter(train.values()))[0], [0, 1, 18, 255])


def test_images_beside_annotations_of_another_kind_are_no_ade20k(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"images/{name}.jpg", LABELS)
        save(tmp_path / f"semantic/{name}.png", LABELS)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "classes.json").write_text(json.dumps(["wall", "floor", "lamp"]))
    found = find(tmp_path, tmp_path / "lists")
    assert found.fields == {"classes": ("wall", "floor", "lamp")}
    np.testing.assert_array_equal(next(iter(read(found)[0].values())), LABELS)


def test_what_is_said_of_a_folder_without_classes(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.jpg", LABELS)
        save(tmp_path / f"{name}.png", LABELS)
    with pytest.raises(ValueError, match=r"classes=\(\) must be .* in classes\.txt there, a name a line"):
        find(tmp_path, tmp_path / "lists")
    for content in ('{"wall": 0}', "[1, 2]"):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(ValueError, match=r"classes\.json holds .*; write the list of the classes' names"):
            find(tmp_path, tmp_path / "lists")
    (tmp_path / "classes.json").write_text("wall, floor")
    with pytest.raises(ValueError, match=r"classes\.json is no JSON"):
        find(tmp_path, tmp_path / "lists")
    (tmp_path / "classes.txt").write_text("wall\nfloor\n")
    with pytest.raises(
        ValueError, match=r"3 of 3 pairs cannot be read.*a\.png: label 2 is beyond the 2 classes, 0 to 1"
    ):
        find(tmp_path, tmp_path / "lists")


def test_labels_are_of_the_models_classes(tmp_path):
    """The reader has the classes of the part, and knows no list of its own."""
    picture(tmp_path / "a/rgb_1.jpg", LABELS)
    save(tmp_path / "a/semantic_1.png", LABELS)
    config = ConfigDict(common.maps_data("semantic", str(tmp_path), 4, "solver", test_subfolder="a"))
    three, two = (datasets.build(config, Semantic(classes=names)) for names in (("a", "b", "c"), ("a", "b")))
    np.testing.assert_array_equal(three.train.read(0)["semantic"], LABELS)
    with pytest.raises(ValueError, match=r"semantic_1\.png: label 2 is beyond the 2 classes"):
        two.train.read(0)
    config.depth_scale = 5.0
    with pytest.raises(ValueError, match=r"data.depth_scale=5.0 is for depth, not for data.modality='semantic'"):
        datasets.build(config, Semantic(classes=("a",)))


def test_prepared(tmp_path):
    """`prepare folder` with maps of every kind gives what the folder gives; the classes come along."""
    for i, room in enumerate("aabbcc"):
        picture(tmp_path / f"photos/{room}/{i}.png", LABELS)
        save(tmp_path / f"labels/{room}/{i}.png", np.minimum(LABELS + i, 255) % 256)
        save(tmp_path / f"bumps/{room}/{i}.png", np.full((4, 4, 3), 100 + i))
    (tmp_path / "labels/classes.txt").write_text("\n".join("abcdefgh"))
    maps = (f"--semantic={tmp_path / 'labels'}", f"--normals={tmp_path / 'bumps'}")
    command("folder", tmp_path / "photos", tmp_path / "out", *maps, "--first_label=1", "--test_share=0.3")
    for modality in (Semantic(classes=tuple("abcdefgh"), first_label=1), Normals()):
        name = modality.name
        config = ConfigDict(common.maps_data(name, str(tmp_path / "out"), 4, "solver"))
        data = datasets.build(config, dataclasses.replace(modality, first_label=0) if name == "semantic" else modality)
        assert (len(data.train), len(data.eval)) == (4, 2)
        for source in (data.train, data.eval):
            for i, image in enumerate(source.names):
                raw = (tmp_path / {"semantic": "labels", "normals": "bumps"}[name] / image).read_bytes()
                np.testing.assert_array_equal(source.read(i)[name], modality.read(raw))
                np.testing.assert_array_equal(
                    source.read(i)["image"], np.asarray(Image.open(tmp_path / "photos" / image))
                )
        found = own.find_maps(name, str(tmp_path / "out"), tmp_path / "lists")
        assert (found.train, found.val) == (4, 2)
        assert found.fields == ({"classes": tuple("abcdefgh")} if name == "semantic" else {})
    config = ConfigDict(common.maps_data("semantic", str(tmp_path / "out"), 4, "solver"))
    with pytest.raises(ValueError, match=r"has classes=\('a', .*\), but the model \('x',\); give both the same"):
        datasets.build(config, Semantic(classes=("x",)))
    config.first_label = 1
    with pytest.raises(ValueError, match=r"data\.first_label has no effect on the prepared data"):
        datasets.build(config, Semantic(classes=tuple("abcdefgh")))
