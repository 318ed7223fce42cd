"""Annotations as people have them: each fault is read in its one way, or named with its file, id, field and value."""

import json
import math
import re

import numpy as np
import pytest
from coco_files import BOX_MASK, HEIGHT, WIDTH, annotation, compressed, counts, polygon, write
from hostile import tries

from aitok_jax.data.sources import coco
from aitok_jax.data.sources.files import DataError
from aitok_jax.evaluators.average_precision import CocoScorer

NAN, INF = math.nan, math.inf
BOX = polygon(20, 5, 32, 15)
POINTS = [[20, 5], [32, 5], [32, 15], [20, 15]]
CODE = compressed(BOX_MASK)["counts"]
SIZE = [HEIGHT, WIDTH]


def change(folder, function, annotations=None):
    """Writes a file with the annotations 4 and 5, of two images, that a function has changed."""
    images, path = write(folder, annotations or [annotation(4), annotation(5, 2)])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(function(content) or content))
    return images, path


def with_fields(fields):
    return lambda content: content["annotations"][1].update(fields)


def code(value, size=SIZE):
    return {"segmentation": {"size": size, "counts": value}}


def drawn(*values):
    return {"segmentation": [list(values)]}


FAULTS = {
    "id a name": ({"id": "five"}, "annotation [1]: its id='five' must be a whole number"),
    "id a list": ({"id": [5]}, "annotation [1]: its id=[5] must be a whole number"),
    "id null": ({"id": None}, "annotation [1]: its id=None must be a whole number"),
    "id true": ({"id": True}, "annotation [1]: its id=True must be a whole number"),
    "id a fraction": ({"id": 5.5}, "annotation [1]: its id=5.5 must be a whole number"),
    "id of 65 bits": ({"id": 2**64}, f"annotation {2**64}: its id={2**64} must be a whole number"),
    "id given before": ({"id": 4}, "annotation [1]: another one has the id=4"),
    "id given before as text": ({"id": "4"}, "annotation [1]: another one has the id=4"),
    "image a name": ({"image_id": "2.jpg"}, "annotation 5: its image_id='2.jpg' must be a whole number"),
    "image a list": ({"image_id": [2]}, "annotation 5: its image_id=[2] must be a whole number"),
    "image an object": ({"image_id": {"id": 2}}, "annotation 5: its image_id={'id': 2} must be a whole number"),
    "image NaN": ({"image_id": NAN}, "annotation 5: its image_id=nan must be a whole number"),
    "category null": ({"category_id": None}, "annotation 5: its category_id=None must be a whole number"),
    "category a name": ({"category_id": "cup"}, "annotation 5: its category_id='cup' must be a whole number"),
    "box null": ({"bbox": None}, "annotation 5: bbox=None must be x, y, width, height"),
    "box of text": ({"bbox": "1 2 3 4"}, "annotation 5: bbox='1 2 3 4' must be x, y, width, height"),
    "box an object": ({"bbox": {"x": 1}}, "annotation 5: bbox={'x': 1} must be x, y, width, height"),
    "box with null": ({"bbox": [1, 2, None, 4]}, "bbox=[1, 2, None, 4] must be x, y, width, height, but None is no"),
    "box with a list": ({"bbox": [1, 2, [0], 4]}, "bbox=[1, 2, [0], 4] must be x, y, width, height, but [0] is no"),
    "box with NaN": ({"bbox": [1, NAN, 3, 4]}, "bbox=[1, nan, 3, 4] must be x, y, width, height, but nan is no"),
    "box with infinity": ({"bbox": [1, 2, INF, 4]}, "bbox=[1, 2, inf, 4] must be x, y, width, height, but inf is no"),
    "box beyond floats": ({"bbox": [1, 2, 3, 10**400]}, "must be x, y, width, height, but 1000"),
    "box of negative sides": ({"bbox": [9, 9, -3, 4]}, "bbox=[9, 9, -3, 4] must be x, y, width, height, but a side is"),
    "box far away": ({"bbox": [1, 2, 1e300, 4]}, "bbox=[1, 2, 1e+300, 4] is far outside its image of 30x40"),
    "box outside": ({"bbox": [41, 2, 9, 4]}, "annotation 5: bbox=[41, 2, 9, 4] is outside its image of 30x40"),
    "area of text": ({"area": "1_0"}, "annotation 5: its area='1_0' must be a number from 0 to 1e+10"),
    "area NaN": ({"area": NAN}, "annotation 5: its area=nan must be a number from 0"),
    "area negative": ({"area": -1}, "annotation 5: its area=-1 must be a number from 0"),
    "area a list": ({"area": [0]}, "annotation 5: its area=[0] must be a number from 0"),
    "crowd of text": ({"iscrowd": "yes"}, "annotation 5: its iscrowd='yes' must be 0 or 1"),
    "crowd 2": ({"iscrowd": 2}, "annotation 5: its iscrowd=2 must be 0 or 1"),
    "crowd a list": ({"iscrowd": []}, "annotation 5: its iscrowd=[] must be 0 or 1"),
    "mask null": ({"segmentation": None}, "annotation 5: its segmentation must be a list of polygons or a run-length"),
    "mask of text": (
        {"segmentation": "[[1, 2]]"},
        "must be a list of polygons or a run-length code, but is '[[1, 2]]'",
    ),
    "mask [0]": ({"segmentation": [0]}, "annotation 5: degenerate polygon [0]: it needs an x and a y"),
    "polygon null": ({"segmentation": [None]}, "annotation 5: degenerate polygon [None]"),
    "polygon of 2 points": ({"segmentation": [POINTS[:2]]}, "degenerate polygon [[20, 5], [32, 5]]"),
    "polygon with null": (drawn(1, 2, 3, None, 5, 9), "its polygon [1, 2, 3, None, 5, 9] holds None"),
    "polygon with a list": (drawn(1, 2, 3, [4], 5, 9), "its polygon [1, 2, 3, [4], 5, 9] holds [4]"),
    "polygon with true": (drawn(1, 2, 3, True, 5, 9), "its polygon [1, 2, 3, True, 5, 9] holds True"),
    "polygon with NaN": (drawn(1, 2, 3, NAN, 5, 9), "annotation 5: its polygon has the coordinate nan"),
    "polygon with infinity": (drawn(1, 2, 3, -INF, 5, 9), "annotation 5: its polygon has the coordinate -inf"),
    "polygon to 1e7": (drawn(1, 2, 1e7, 2, 5, 9), "its polygon has the coordinate 10000000.0, far outside its image"),
    "polygon to 2e8": (drawn(1, 2, 3, 2e8, 5, 9), "its polygon has the coordinate 200000000.0, far outside its image"),
    "polygon beyond floats": (drawn(1, 2, 3, 10**400, 5, 9), "its polygon has the coordinate 1000"),
    "polygon that is long": (drawn(*[-300, 9, 300, 9] * 9999, 9, 20), "its polygons are more than 4000000 pixels"),
    "polygons outside": (drawn(41, 1, 60, 1, 60, 20), "annotation 5: its polygons are outside its image of 30x40"),
    "code of another size": (code(CODE, [40, 30]), "its mask has size=[40, 30], but its image is 30x40"),
    "code without a size": (code(CODE, None), "its mask has size=None, but its image is 30x40"),
    "counts null": (code(None), "the counts of its mask must be a string, or numbers that add up to 1200 pixels"),
    "counts with null": (code([600, None, 600]), "add up to 1200 pixels, but one is None"),
    "counts negative": (code([1300, -100]), "add up to 1200 pixels, but one is -100"),
    "counts of 2**32 more": (code([2**32 + 600, 600]), f"add up to 1200 pixels, but add up to {2**32 + 1200}"),
    "counts empty": (code([]), "add up to 1200 pixels, but add up to 0"),
    "code empty": (code(""), "broken mask: its counts '' are no compressed code"),
    "code with NUL": (
        code("P\0"),
        r"broken mask: its counts hold characters that no compressed code has (counts='P\x00'",
    ),
    "code that goes on": (code(CODE + "P"), "broken mask: its counts end within a number"),
    "code of high characters": (code("\u0101" + CODE), "are no compressed code"),
    "code of 7 characters": (code("PPPPPP0" + CODE), "its counts hold a number of more than 6 characters"),
    "code with negative counts": (code("OO"), "broken mask: one of its counts is negative"),
    "code too short": (code(CODE[:-2]), "broken mask: its counts are not those of 30x40 pixels"),
    "code of no pixel": (code([1200]), "degenerate mask of zero area, though area=120 and bbox=[20, 5, 12, 10]"),
    "no fields": ({}, "annotation [1]: it has no id, image_id, category_id, bbox, segmentation"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_annotations(name, tmp_path, caplog):
    fields, message = FAULTS[name]
    function = with_fields(fields) if fields else lambda content: content["annotations"].__setitem__(1, "none")
    images, path = change(tmp_path, function)
    with pytest.raises(DataError) as raised:
        coco.CocoSource(images, path)
    said = str(raised.value)
    assert said.startswith(f"{path}: annotation ")
    assert said.endswith("; correct it, or set on_error='skip' to leave it out")
    assert message in said
    source = coco.CocoSource(images, path, on_error="skip")
    assert list(source.coco.anns) == [4]
    assert [len(source.annotations(i)) for i in range(2)] == [1, 0]
    ((label, reason),) = source.reasons.items()
    assert f"{path}: {label}: {reason}; correct it" in said
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert re.fullmatch(rf"instances\.json: 1 of 2 annotations left out: 1 .* \(id {re.escape(label[11:])}\)", line)


READ = {
    "id 5.0": ({"id": 5.0}, "id", 5),
    "id as text": ({"id": "5"}, "id", 5),
    "image 2.0": ({"image_id": 2.0}, "image_id", 2),
    "image as text": ({"image_id": "000000000002"}, "image_id", 2),
    "category as text": ({"category_id": " 7 "}, "category_id", 7),
    "category 7.0 as text": ({"category_id": "7.0"}, "category_id", 7),
    "box as text": ({"bbox": ["20", "5.0", 12, "1e1"]}, "bbox", [20, 5, 12, 10]),
    "area as text": ({"area": "120.5"}, "area", 120.5),
    "area null": ({"area": None}, "area", 120.0),
    "area 0": ({"area": 0}, "area", 120.0),
    "area 0 of a code": ({"area": 0, **code(CODE)}, "area", 120.0),
    "area 0 of counts": ({"area": 0.0, **code(counts(BOX_MASK))}, "area", 120.0),
    "area 0 of a triangle": ({"area": 0, **drawn(20, 5, 32, 5, 32, 15)}, "area", 60.0),
    "crowd null": ({"iscrowd": None}, "iscrowd", 0),
    "crowd false": ({"iscrowd": False}, "iscrowd", 0),
    "crowd as text": ({"iscrowd": "0"}, "iscrowd", 0),
    "one polygon": ({"segmentation": BOX}, "segmentation", [BOX]),
    "one polygon of points": ({"segmentation": POINTS}, "segmentation", [[20, 5, 32, 5, 32, 15, 20, 15]]),
    "polygons of points": ({"segmentation": [POINTS]}, "segmentation", [[20, 5, 32, 5, 32, 15, 20, 15]]),
    "polygon as text": ({"segmentation": [list(map(str, BOX))]}, "segmentation", [BOX]),
    "one code in a list": ({"segmentation": [compressed(BOX_MASK)]}, "segmentation", compressed(BOX_MASK)),
    "size as text": (code(CODE, ["30", 40.0]), "segmentation", compressed(BOX_MASK)),
    "counts as text": (
        code([str(n) for n in counts(BOX_MASK)]),
        "segmentation",
        code(counts(BOX_MASK))["segmentation"],
    ),
    "a polygon partly outside": (drawn(20, 5, 99, 5, 99, 15, 20, 15), "bbox", [20, 5, 12, 10]),
}


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_in_one_way_is_read(name, tmp_path):
    fields, field, value = READ[name]
    source = coco.CocoSource(*change(tmp_path, with_fields(fields)))
    (entry,) = source.annotations(1)
    assert (entry[field], type(entry[field])) == (value, type(value))
    assert not {str, bool} & {type(number) for number in (*entry["bbox"], entry["area"], entry["iscrowd"])}
    assert source.read(1)["boxes"].tolist() == [[20, 5, 32, 15]]
    if field != "bbox" and "triangle" not in name:
        np.testing.assert_array_equal(source.read(1)["masks"][0], BOX_MASK)
    scorer = CocoScorer.of(source.coco, [])
    assert scorer.result(("box", "mask"))["mask_ap"] == 0


def test_a_crowd_as_text_is_one(tmp_path):
    source = coco.CocoSource(*change(tmp_path, with_fields({"iscrowd": "1"})), with_objects=True)
    assert (len(source), source.coco.anns[5]["iscrowd"]) == (1, 1)


def image_fields(fields):
    return lambda content: content["images"][1].update(fields)


SIDE = "must be a whole number of pixels, at least 1"
IMAGE_FAULTS = {
    "height as text": ({"height": "tall"}, f"image 2: its height='tall' {SIDE}"),
    "height null": ({"height": None}, f"image 2: its height=None {SIDE}"),
    "height 80.5": ({"height": 80.5}, f"image 2: its height=80.5 {SIDE}"),
    "height NaN": ({"height": NAN}, f"image 2: its height=nan {SIDE}"),
    "height infinite": ({"height": INF}, f"image 2: its height=inf {SIDE}"),
    "height 2**31": ({"height": 2**31}, f"image 2: its height={2**31} and width=40 are more than 100000000 pixels"),
    "width null": ({"width": None}, f"image 2: its width=None {SIDE}"),
    "width 0": ({"width": 0}, f"image 2: its width=0 {SIDE}"),
    "width -40": ({"width": -40}, f"image 2: its width=-40 {SIDE}"),
    "width a list": ({"width": [40]}, f"image 2: its width=[40] {SIDE}"),
    "width true": ({"width": True}, f"image 2: its width=True {SIDE}"),
    "id a list": ({"id": [2]}, "image [1]: its id=[2] must be a whole number"),
    "id a name": ({"id": "b"}, "image [1]: its id='b' must be a whole number"),
    "name null": ({"file_name": None}, "image 2: its file_name=None must be a text that names a file"),
    "name a number": ({"file_name": 7}, "image 2: its file_name=7 must be a text that names a file"),
    "name empty": ({"file_name": ""}, "image 2: its file_name='' must be a text that names a file"),
    "name with NUL": ({"file_name": "a\0"}, r"image 2: its file_name='a\x00' must be a text that names a file"),
    "name of half a character": ({"file_name": "\ud800"}, r"image 2: its file_name='\ud800' has characters of no file"),
    "name too long": ({"file_name": "é" * 130}, "is longer than the 4000 bytes of a path, or a part of it than 255"),
    "path too long": ({"file_name": "a/" * 2001}, "is longer than the 4000 bytes of a path"),
}


@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_faults_of_images(name, tmp_path, caplog):
    fields, message = IMAGE_FAULTS[name]
    images, path = change(tmp_path, image_fields(fields))
    with pytest.raises(DataError) as raised:
        coco.CocoSource(images, path)
    assert str(raised.value).startswith(f"{path}: image ")
    assert message in str(raised.value)
    source = coco.CocoSource(images, path, on_error="skip")
    assert (source.ids, list(source.coco.anns)) == ([1], [4])
    assert ("an image that is left out" in source.reasons["annotation 5"]) == ("image 2" in source.reasons)
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [re.sub("left out.*", "left out", line) for line in lines] == [
        "instances.json: 1 of 2 images left out",
        "instances.json: 1 of 2 annotations left out",
    ]


@pytest.mark.parametrize("fields", [{"height": "30"}, {"width": 40.0}, {"id": "2"}, {"id": 2.0, "height": "30.0"}])
def test_numbers_of_images_that_can_be_read(fields, tmp_path):
    source = coco.CocoSource(*change(tmp_path, image_fields(fields)))
    assert (source.ids, source.sizes.tolist()) == ([1, 2], [SIZE, SIZE])
    assert source.read(1)["image"].shape == (HEIGHT, WIDTH, 3)
    assert len(source.annotations(1)) == 1


FILE_FAULTS = {
    "deep": ("[" * 100_000, "its JSON is nested too deep"),
    "no object": ("null", "no list 'images'"),
    "images an object": (lambda content: content.update(images={"1": 2}), "no list 'images'"),
    "annotations null": (lambda content: content.update(annotations=None), "no list 'annotations'"),
    "an image a number": (lambda content: content["images"].append(3), "image [2]: images must have id, file_name"),
    "two images of one id": (image_fields({"id": "1"}), "two images have one id"),
    "category null": (
        lambda content: content["categories"].append(None),
        "category [2]: categories must have id, name",
    ),
    "categories of one id": (
        lambda content: content["categories"][1].update(id="7"),
        "two categories have one id; give each its own",
    ),
    "a name twice": (
        lambda content: content["categories"][1].update(name="cup"),
        "2 categories have the name 'cup'; give each its own, or merge them",
    ),
    "name null": (
        lambda content: content["categories"][1].update(name=None),
        "category 2: its name=None must be a text",
    ),
    "name empty": (
        lambda content: content["categories"][1].update(name=" "),
        "category 2: its name=' ' must be a text",
    ),
    "name of lines": (
        lambda content: content["categories"][1].update(name="a\nb"),
        r"category 2: its name='a\nb' must be a text",
    ),
    "name a list": (lambda content: content["categories"][1].update(name=[]), "category 2: its name=[] must be a text"),
    "id null": (lambda content: content["categories"][1].update(id=None), "category [1]: its id=None must be a whole"),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_faults_of_files(name, tmp_path):
    function, message = FILE_FAULTS[name]
    images, path = change(tmp_path, function) if callable(function) else write(tmp_path, [])
    if not callable(function):
        path.write_text(function)
    with pytest.raises(DataError) as raised:
        coco.CocoSource(images, path)
    assert f"{path}: {message}" in str(raised.value)


def deeper(function, frames):
    return deeper(function, frames - 1) if frames else function()


def test_what_is_read_can_be_written(tmp_path):
    """Fields that nobody reads may be nested as deep as they can be prepared, some calls further down."""
    ends = set()
    for depth in range(800, 1000, 3):
        images, path = write(tmp_path, [annotation(4)])
        path.write_text(path.read_text().replace('"iscrowd": 0', '"more": ' + "[" * depth + "]" * depth))
        try:
            content = coco.CocoSource(images, path).content
        except DataError as error:
            ends.add(str(error).removeprefix(f"{path}: "))
        else:
            assert deeper(lambda content=content: json.loads(json.dumps(content)), 30)["images"]
            ends.add("read")
    assert ends == {"read", "its JSON is nested too deep; use an instances JSON"}


def test_categories_named_by_numbers(tmp_path):
    source = coco.CocoSource(*change(tmp_path, lambda content: content["categories"][1].update(name=3)))
    assert source.categories == ["3", "cup"]


def test_file_names_of_windows(tmp_path):
    """A backslash is read as a slash where that is the file there is; another file, one elsewhere too, is as named."""
    images, path = change(tmp_path, image_fields({"file_name": "a\\b.jpg"}))
    (images / "a").mkdir()
    inside = images / "a/b.jpg"
    (images / "000000000002.jpg").rename(inside)
    assert coco.CocoSource(images, path).names[1] == "a/b.jpg"
    assert coco.CocoSource(images, path).read(1)["image"].shape == (HEIGHT, WIDTH, 3)
    (images / "a\\b.jpg").write_bytes(inside.read_bytes())
    assert coco.CocoSource(images, path).names[1] == "a\\b.jpg"
    for name in (str(images / "000000000001.jpg"), "../images/000000000001.jpg"):
        source = coco.CocoSource(*change(tmp_path, image_fields({"file_name": name})))
        np.testing.assert_array_equal(source.read(1)["image"], source.read(0)["image"])


@pytest.mark.parametrize("name", ["a", "/dev/zero", "000000000001.jpg/b"])
def test_names_of_what_is_no_file(name, tmp_path):
    images, path = change(tmp_path, image_fields({"file_name": name}))
    (images / "a").mkdir()
    source = coco.CocoSource(images, path, on_error="skip")
    with pytest.raises(DataError, match=f"{name} is no file|{name}: cannot be read"):
        source.read(1)
    assert source.read_readable(1)[0] == 0


def test_boxes_alone(tmp_path, caplog):
    def strip(content):
        content["annotations"][0].pop("segmentation")
        content["annotations"][1]["segmentation"] = [[NAN] * 6]
        content["annotations"].append(annotation(6, segmentation=None, area=0))
        content["annotations"].append(annotation(7, **code("P\0")))

    images, path = change(tmp_path, strip)
    with pytest.raises(DataError, match=r"annotation 4: it has no segmentation; boxes alone do where .*; 3 more are"):
        coco.CocoSource(images, path)
    with pytest.raises(DataError, match=r"no annotation of an object among 2 images.*2 segmentation missing"):
        coco.CocoSource(images, path, on_error="skip")
    caplog.set_level("INFO")
    source = coco.CocoSource(images, path, masks=False)
    assert len(source.read(0)["boxes"]) == 3
    assert not any("segmentation" in entry for entry in source.content["annotations"])
    assert "instances.json: 2 broken masks not used" in caplog.text
    assert CocoScorer.of(source.coco, []).result(("box",))["box_ap"] == 0
    with pytest.raises(ValueError, match=r"annotation 4: its segmentation must be a list of polygons"):
        CocoScorer.of(source.coco, []).result(("mask",))


@pytest.mark.parametrize(
    ("xs", "y"),
    [((296.65, 297.68), 388.33), ((9.98, 15.52, 15.52, 11.09), 188.56), ((5.34, 150.61, 260.94, 76.95), 100.94)],
)
def test_flat_objects_stay_as_they_are(xs, y, tmp_path):
    """COCO's train2017 has the first two; rounding gives the third an area. No example has them."""
    shape = {"segmentation": [[v for x in (*xs, xs[-1]) for v in (x, y)]], "bbox": [min(xs), y, max(xs) - min(xs), 0.0]}
    annotations = [annotation(4), annotation(5, 1, area=0.0, **shape)]
    source = coco.CocoSource(*write(tmp_path, annotations, images=1, size=(480, 640)))
    assert source.content["annotations"] == annotations
    assert len(source.read(0)["boxes"]) == 1


def test_what_gives_no_example_is_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    annotations = [annotation(4), annotation(5, 2, iscrowd=1), annotation(6, box=(3, 3, 3.5, 9))]
    images, path = write(tmp_path, annotations)
    assert len(coco.CocoSource(images, path, with_objects=True)) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert "instances.json: 1 images without an object (or with crowds alone) are not trained on" in lines
    assert "instances.json: 1 objects below 1 px are not trained on" in lines


@pytest.mark.parametrize("counts", ["P\0", b"P\0", "OO", CODE[:-2], [1300, -100]])
def test_results_that_would_end_the_process(counts, tmp_path):
    """A model's results, and a ground truth that no source has read."""
    source = coco.CocoSource(*change(tmp_path, lambda content: None))
    result = {"image_id": 1, "category_id": 7, "score": 1.0, "bbox": [20, 5, 12, 10], **code(counts)}
    with pytest.raises(ValueError, match=r"a result of image 1: .*; encode the mask with pycocotools"):
        CocoScorer(source.coco).add(1, [result])
    if not isinstance(counts, bytes):
        source.coco.anns[5].update(code(counts))
        with pytest.raises(ValueError, match=r"annotation 5: .*its "):
            CocoScorer.of(source.coco, []).result(("mask",))


def test_mutated_files():
    tried = tries.run("hostile.mutate_annotations", 100)
    assert [one for one in tried if one.verdict in tries.WRONG] == []
    assert {one.verdict for one in tried} == {"read", "refused"}, tries.table(tried)
