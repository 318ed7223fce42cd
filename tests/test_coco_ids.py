"""The ids of images and classes in `predict --annotations`; tests/test_predict_objects.py runs the command."""

import json
from pathlib import Path

import pytest
from tiny_runs import CATEGORIES

from aitok_jax.predict.coco_ids import Annotations
from aitok_jax.predict.predictor import numbered


@pytest.fixture
def annotations(tmp_path):
    def write(categories=None, images=()):
        content = {"images": list(images)} | ({} if categories is None else {"categories": categories})
        (tmp_path / "a.json").write_text(json.dumps(content))
        return Annotations(str(tmp_path / "a.json"))

    return write


def named(**ids):
    return [{"id": number, "name": name} for name, number in ids.items()]


def test_classes_have_the_ids_of_their_names(annotations):
    found, missing = annotations(named(dog=7, cup=2, sofa=1, lamp=90)).of_classes(CATEGORIES)
    assert found == named(cup=2, dog=7, sofa=1)  # in the order of the model
    assert missing == {}


def test_classes_that_the_file_has_not_get_ids_of_their_own(annotations):
    found, missing = annotations(named(lamp=7, dog=5)).of_classes(CATEGORIES)
    assert found == named(cup=8, dog=5, sofa=9)
    assert missing == {8: "cup", 9: "sofa"}


def test_a_file_of_other_classes_is_refused(annotations):
    with pytest.raises(ValueError, match="has the categories lamp, tree, and the model knows cup, dog, sofa: give"):
        annotations(named(lamp=1, tree=2)).of_classes(CATEGORIES)


@pytest.mark.parametrize("categories", [None, []])
def test_a_file_without_categories_changes_nothing(annotations, categories):
    assert annotations(categories).of_classes(CATEGORIES) == (CATEGORIES, {})


def test_classes_without_names_are_numbered_as_in_training(annotations):
    given = annotations(named(dog=7, cup=90, sofa=1))
    assert given.of_classes(numbered(3)) == (named(sofa=1, dog=7, cup=90), {})
    with pytest.raises(ValueError, match="the model knows class 0, class 1:"):
        given.of_classes(numbered(2))


def test_names_may_be_numbers(annotations):
    found, missing = annotations([{"id": 4, "name": 3}]).of_classes([{"id": 1, "name": "3"}])
    assert (found, missing) == ([{"id": 4, "name": "3"}], {})


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ({}, r"'categories' must be a list of \{'id': whole number, 'name': text or whole number\}; give"),
        (["dog"], "'categories' must be a list"),
        ([{"id": "1", "name": "dog"}], "'categories' must be a list"),
        ([{"id": 1}], "'categories' must be a list"),
        (named(dog=1) + named(dog=2), "two categories have one name, or one id; give each its own"),
        (named(dog=1, cup=1), "two categories have one name, or one id"),
    ],
)
def test_categories_that_cannot_be_told_apart(annotations, categories, message):
    with pytest.raises(ValueError, match=message):
        annotations(categories)


def test_files_are_known_by_the_end_of_their_paths(annotations):
    images = [{"id": 3, "file_name": "a.png"}, {"id": "x", "file_name": "left/./b.png"}]
    files = [Path("some/a.png"), Path("left/b.png")]
    assert annotations(images=images).of_files(files) == {files[0]: 3, files[1]: "x"}
    with pytest.raises(ValueError, match=r"no image has the file_name of right/b\.png \(1 of 1 files\)"):
        annotations(images=images).of_files([Path("right/b.png")])
