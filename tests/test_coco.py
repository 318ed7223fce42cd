import numpy as np
import pytest
from coco_files import BOX_MASK, CATEGORIES, HEIGHT, WIDTH, annotation, compressed, counts, make, polygon, write
from PIL import Image

from aitok_jax.data import object_transforms, pipeline
from aitok_jax.data.sources import coco
from aitok_jax.data.sources.nyu import DataError


def test_example_contract(tmp_path):
    source = make(tmp_path, [annotation(1), annotation(2, category_id=2, box=(1, 2, 9, 29)), annotation(3, 2)])
    assert (len(source), source.names, source.ids) == (2, ["000000000001.jpg", "000000000002.jpg"], [1, 2])
    assert (source.categories, source.category_ids) == (["dog", "cup"], [2, 7])
    np.testing.assert_array_equal(source.sizes, [[HEIGHT, WIDTH]] * 2)
    example = source.read(0)
    assert {name: (x.dtype, x.shape) for name, x in example.items()} == {
        "image": (np.uint8, (HEIGHT, WIDTH, 3)),
        "boxes": (np.float32, (2, 4)),
        "classes": (np.int32, (2,)),
        "masks": (np.uint8, (2, HEIGHT, WIDTH)),
    }
    np.testing.assert_array_equal(example["boxes"], [[20, 5, 32, 15], [1, 2, 9, 29]])
    np.testing.assert_array_equal(example["classes"], [1, 0])
    np.testing.assert_array_equal(example["masks"][0], BOX_MASK)
    assert example["masks"][1].sum() == 8 * 27
    np.testing.assert_array_equal(example["image"], np.asarray(Image.open(tmp_path / "images" / source.names[0])))


def test_all_forms_of_masks_agree(tmp_path):
    forms = (
        [polygon(20, 5, 32, 15)],
        [polygon(20, 5, 26, 15), polygon(26, 5, 32, 15)],
        {"size": [HEIGHT, WIDTH], "counts": counts(BOX_MASK)},
        compressed(BOX_MASK),
    )
    source = make(tmp_path, [annotation(i, segmentation=form) for i, form in enumerate(forms)])
    for mask in source.read(0)["masks"]:
        np.testing.assert_array_equal(mask, BOX_MASK)
    for entry in source.annotations(0):
        np.testing.assert_array_equal(source.mask(0, entry), BOX_MASK)


def test_crowd_regions_are_no_objects_but_count_in_the_evaluation(tmp_path):
    crowd = annotation(2, 2, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": counts(BOX_MASK)})
    source = make(tmp_path, [annotation(1), crowd])
    assert len(source.read(0)["boxes"]) == 1
    empty = source.read(1)
    assert (empty["boxes"].shape, empty["classes"].shape) == ((0, 4), (0,))
    assert empty["masks"].shape == (0, HEIGHT, WIDTH)
    assert sorted(source.coco.anns) == [1, 2]
    assert source.coco.annToMask(crowd).sum() == BOX_MASK.sum()
    trained = make(tmp_path, [annotation(1), crowd], with_objects=True)
    assert (trained.names, trained.ids, len(trained)) == (["000000000001.jpg"], [1], 1)


def test_objects_without_extent_are_left_out(tmp_path):
    flat = [polygon(3, 3, 9, 3)]
    source = make(
        tmp_path,
        [
            annotation(1),
            annotation(2, box=(3, 3, 3.9, 9)),
            annotation(3, box=(3, 3, 9, 3.9)),
            annotation(4, box=(3, 3, 9, 7), segmentation=flat, area=0),
            annotation(5, box=(3, 3, 9, 3), segmentation=flat),  # COCO train2017 has such
        ],
    )
    assert source.read(0)["boxes"].tolist() == [[20, 5, 32, 15]]
    assert len(source.annotations(0)) == 5


def test_boxes_end_at_the_image(tmp_path):
    source = make(tmp_path, [annotation(1, box=(-3, -2, 50, 45))])
    np.testing.assert_array_equal(source.read(0)["boxes"], [[0, 0, WIDTH, HEIGHT]])
    assert source.read(0)["masks"].all()


def test_without_masks_no_segmentation_is_needed(tmp_path):
    bare = annotation(1)
    for key in ("segmentation", "area", "iscrowd"):
        del bare[key]
    source = make(tmp_path, [bare], masks=False)
    assert set(source.read(0)) == {"image", "boxes", "classes"}
    assert source.coco.anns[1]["area"] == 120
    with pytest.raises(ValueError, match="make it with masks=True"):
        coco.MaskSource(source)


def test_cache_gives_the_same_and_reads_once(tmp_path):
    annotations = [annotation(1), annotation(2, box=(1, 2, 9, 29))]
    plain = coco.CocoSource(*write(tmp_path, annotations, size=(HEIGHT, WIDTH + 3)))
    cached = coco.CocoSource(*write(tmp_path, annotations, size=(HEIGHT, WIDTH + 3)), cache=True)
    cached.read(0)
    example = plain.read(0)
    (tmp_path / "images" / plain.names[0]).unlink()
    for key, value in cached.read(0).items():
        np.testing.assert_array_equal(value, example[key])
        assert value.dtype == example[key].dtype


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"image_id": 99}, r"annotation 5: its image_id=99 is not among the images"),
        ({"category_id": 3}, r"annotation 5: unknown category_id=3, the JSON lists 2 categories"),
        ({"segmentation": [[1, 1, 5, 5]]}, r"annotation 5: degenerate polygon \[1, 1, 5, 5\].*at least 3 points"),
        ({"segmentation": [[1, 1, 5, 5, 1, 7, 3]]}, r"annotation 5: degenerate polygon .*an x and a y"),
        ({"segmentation": [polygon(1, 1, 9, 1)]}, r"annotation 5: degenerate polygon of zero area"),
        ({"segmentation": [[1, 1, 5, 5, 9, 9]]}, r"annotation 5: degenerate polygon of zero area"),
        ({"segmentation": []}, r"annotation 5: its segmentation must be a list of polygons"),
        ({"segmentation": compressed(BOX_MASK.T)}, r"annotation 5: its mask has size=\[40, 30\], .* is 30x40"),
        ({"segmentation": {"size": [30, 40], "counts": [7, 5]}}, r"annotation 5: the counts .* add up to 1200 pixels"),
        ({"bbox": [1, 2, 3]}, r"annotation 5: bbox=\[1, 2, 3\] must be x, y, width, height"),
    ],
)
def test_broken_annotations(tmp_path, broken, message):
    annotations = [annotation(4), {**annotation(5), **broken}]
    with pytest.raises(DataError, match=r"instances\.json: " + message):
        make(tmp_path, annotations)
    source = make(tmp_path, annotations, on_error="skip")
    assert source.skipped == {"annotation 5"}
    assert len(source.annotations(0)) == len(source.read(0)["boxes"]) == 1
    assert list(source.coco.anns) == [4]


def test_missing_fields_are_named(tmp_path):
    broken = annotation(5)
    del broken["bbox"], broken["segmentation"]
    with pytest.raises(DataError, match="annotation 5: it has no bbox, segmentation"):
        make(tmp_path, [annotation(4), broken])


@pytest.mark.parametrize("code", ["zzzz", "abc", "é"])
def test_broken_compressed_masks_are_named(tmp_path, code):
    with pytest.raises(DataError, match=r"annotation 5: broken mask: .*its counts"):
        make(tmp_path, [annotation(5, segmentation={"size": [HEIGHT, WIDTH], "counts": code})])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "no images"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "images must have id, file_name, height"),
        ('{"images": 3}', "no list 'images'"),
    ],
)
def test_malformed_files(tmp_path, content, message):
    images, path = write(tmp_path, [])
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        coco.CocoSource(images, path)


def test_nothing_to_learn_or_compare_with(tmp_path):
    for annotations in ([], [annotation(1, iscrowd=1)]):
        with pytest.raises(DataError, match="no annotation of an object among 2 images"):
            make(tmp_path, annotations)
    with pytest.raises(DataError, match="no categories"):
        coco.CocoSource(*write(tmp_path, [annotation(1)], categories=[]))
    with pytest.raises(DataError, match="two categories have one id"):
        coco.CocoSource(*write(tmp_path, [annotation(1)], categories=CATEGORIES * 2))


def test_missing_files(tmp_path):
    images, path = write(tmp_path, [annotation(1)])
    with pytest.raises(FileNotFoundError, match="no such annotations file"):
        coco.CocoSource(images, path.with_name("other.json"))
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        coco.CocoSource(images / "other", path)
    with pytest.raises(ValueError, match="on_error='ignore' must be"):
        coco.CocoSource(images, path, on_error="ignore")
    with pytest.raises(DataError, match="2 images, but expected_count=5000"):
        coco.CocoSource(images, path, expected_count=5000)
    with pytest.raises(DataError, match="1 images with objects, but expected_count=2"):
        coco.CocoSource(images, path, with_objects=True, expected_count=2)


def break_image(tmp_path, kind):
    file = tmp_path / "images" / "000000000001.jpg"
    content = file.read_bytes()
    file.unlink()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "size":
        Image.new("RGB", (WIDTH, HEIGHT + 1)).save(file)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, r"000000000001\.jpg: missing file"),
        ("truncated", DataError, r"000000000001\.jpg: broken image file"),
        ("size", DataError, r"000000000001\.jpg is 31x40 but .*instances\.json says 30x40"),
    ],
)
def test_broken_images(tmp_path, kind, error, message):
    source = make(tmp_path, [annotation(1), annotation(2, 2)])
    break_image(tmp_path, kind)
    with pytest.raises(error, match=message):
        source.read(0)
    with pytest.raises(error, match=message):
        next(pipeline.train_batches(source, object_transforms.training(32, 4, 8), batch_size=2, seed=0))
    source.on_error = "skip"
    assert source.read_readable(0)[0] == 1
    (batch,) = pipeline.eval_batches(source, object_transforms.evaluation(32), batch_size=2)
    assert batch["mask"].tolist() == [0, 1]
    batch = next(pipeline.train_batches(source, object_transforms.training(32, 4, 8), batch_size=2, seed=0))
    assert batch["id"].tolist() == [1, 1]
    assert source.skipped == {"000000000001.jpg"}


def test_all_images_broken(tmp_path):
    source = make(tmp_path, [annotation(1)], images=1, on_error="skip")
    break_image(tmp_path, "truncated")
    with pytest.raises(DataError, match="all 1 examples are broken"):
        source.read_readable(0)


def test_masks_as_examples(tmp_path):
    annotations = [
        annotation(1),
        annotation(2, 2, box=(3.4, 4.6, 3.5, 4.7)),  # far below a pixel
        annotation(3, 2, box=(10, 10, 30, 20), segmentation=[[10, 10, 30, 10, 30, 20]]),
        annotation(4, 2, iscrowd=1, segmentation=compressed(BOX_MASK)),
    ]
    source = coco.MaskSource(make(tmp_path, annotations))
    assert len(source) == 3
    assert source.names == ["000000000001.jpg#1", "000000000002.jpg#2", "000000000002.jpg#3"]
    assert [a["id"] for a in source.annotations] == [1, 2, 3]
    np.testing.assert_array_equal(source.images, [0, 1, 1])
    np.testing.assert_array_equal(source.boxes, [[20, 5, 32, 15], [3, 5, 4, 6], [10, 10, 30, 20]])
    examples = [source.read(i)["instance"] for i in range(3)]
    assert all((x.shape, x.dtype) == ((64, 64), np.float32) for x in examples)
    assert all(set(np.unique(x)) <= {0, 1} for x in examples)
    assert examples[0].all()
    y, x = (np.mgrid[:64, :64] + 0.5) / 64
    clear = np.abs(x - y) > 0.1
    np.testing.assert_array_equal(examples[2][clear], (x > y)[clear])
    assert abs(examples[2].mean() - source.source.mask(1, annotations[2])[10:20, 10:30].mean()) < 0.02


def test_mask_source_cache_and_count(tmp_path):
    images = make(
        tmp_path, [annotation(1), annotation(2, 2, box=(10, 10, 30, 20), segmentation=[[10, 10, 30, 10, 30, 20]])]
    )
    plain, cached = coco.MaskSource(images, size=20), coco.MaskSource(images, size=20, cache=True)
    for _ in range(2):
        for i in range(2):
            np.testing.assert_array_equal(cached.read(i)["instance"], plain.read(i)["instance"])
    images.mask = None  # from here on nothing can be decoded
    np.testing.assert_array_equal(cached.read(0)["instance"], np.ones((20, 20)))
    with pytest.raises(DataError, match="2 objects, but expected_count=3"):
        coco.MaskSource(images, expected_count=3)
    with pytest.raises(ValueError, match="mask size 0 must be at least 1"):
        coco.MaskSource(images, size=0)
