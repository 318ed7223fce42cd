"""COCO's numbers: published fixtures, and what must hold for any results."""

import copy
import json

import numpy as np
import pytest
from coco_fakes import SHARED, as_coco, ellipse, encode, ground_truth, perfect_results

from aitok_jax.evaluators.average_precision import CocoScorer, mask_boundary

FAKE = "cocoapi_val2014_fake100"


def load(folder, name):
    path = SHARED / "data" / "eval_fixtures" / folder / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no evaluation fixture {path}")
    return json.loads(path.read_text())


def fake100(kind):
    """(ground truth, results, expected numbers) of COCO's own example results."""
    shape = "bbox" if kind == "box" else "segm"
    coco = as_coco(load(FAKE, "instances_val2014_100"))
    return coco, load(FAKE, f"instances_val2014_fake{shape}100_results"), load(FAKE, "expected"), shape


def recall_at_50_and_75(scorer):
    recall = scorer.curves("boundary").recall[[0, 5], :, 0, -1]
    return np.mean(recall, axis=1, where=recall > -1)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_published_numbers(kind):
    coco, results, expected, shape = fake100(kind)
    numbers = list(CocoScorer.of(coco, results).result([kind]).values())
    np.testing.assert_allclose(numbers, expected["published_12_digit"][shape], atol=1e-9)
    np.testing.assert_allclose(numbers, expected["published_3_digit"][shape], atol=5e-4)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_published_numbers_with_other_area_ranges(kind):
    coco, results, expected, shape = fake100(kind)
    expected = expected["published_custom_area_ranges"]
    ranges = {name: limits for name, limits in expected["ranges"].items() if name != "all"}
    numbers = CocoScorer.of(coco, results, area_ranges=ranges).result([kind])
    names = [f"{kind}_{key.lower()}" for key in expected["keys"]]
    np.testing.assert_allclose([numbers[name] for name in names], expected["values"][shape], atol=1e-9)


def test_boundary_numbers_of_the_original_implementation():
    coco, results, expected, _ = fake100("boundary")
    expected = expected["computed_here_not_published"]
    scorer = CocoScorer.of(coco, results)
    numbers = list(scorer.result(["boundary"]).values())
    np.testing.assert_allclose(numbers, list(expected["boundary_ap"].values()), atol=1e-9)
    others = expected["boundary_faster_coco_eval"]
    np.testing.assert_allclose(recall_at_50_and_75(scorer), [others["AR_50"], others["AR_75"]], atol=1e-9)


def test_boundary_numbers_of_small_example():
    coco = as_coco(load("boundary_ap_small", "gt"))
    expected = load("boundary_ap_small", "expected")
    scorer = CocoScorer.of(coco, load("boundary_ap_small", "dt_rle"))
    names = ["all", "50", "75", "small", "medium", "large"]
    names = [f"AP_{name}" for name in names] + ["AR_all", "AR_second", "AR_third", "AR_small", "AR_medium", "AR_large"]
    boundary = expected["boundary"]
    np.testing.assert_allclose(list(scorer.result(["boundary"]).values()), [boundary[n] for n in names], atol=1e-9)
    np.testing.assert_allclose(recall_at_50_and_75(scorer), [boundary["AR_50"], boundary["AR_75"]], atol=1e-9)
    segmentation = list(expected["segm_pycocotools"].values())
    np.testing.assert_allclose(list(scorer.result(["mask"]).values()), segmentation, atol=1e-9)


@pytest.mark.parametrize("folder", ["torchmetrics_bbox_4img", "torchmetrics_doc_bbox_1img"])
def test_numbers_of_torchmetrics(folder):
    expected = load(folder, "expected")
    scorer = CocoScorer.of(as_coco(load(folder, "gt")), load(folder, "dt"))
    numbers = list(scorer.result(["box"]).values())
    np.testing.assert_allclose(numbers, list(expected["published"].values()), atol=5e-4)
    if "recomputed_pycocotools" in expected:
        np.testing.assert_allclose(numbers, list(expected["recomputed_pycocotools"].values()), atol=1e-9)
        curves = scorer.curves("box")
        precision, recall = curves.precision[..., 0, -1].mean((0, 1)), curves.recall[..., 0, -1].mean(0)
        np.testing.assert_allclose(precision, expected["map_per_class"], atol=5e-4)
        np.testing.assert_allclose(recall, expected["mar_100_per_class"], atol=5e-4)


def test_boundary_of_the_published_example():
    example = load("boundary_ap_small", "expected")["mask_to_boundary_unit"]
    boundary = mask_boundary(np.array(example["mask"]), example["dilation_ratio"])
    np.testing.assert_array_equal(boundary, example["boundary"])


@pytest.mark.parametrize("width", [1, 2, 5])
def test_boundary_is_what_repeated_erosion_takes_away(width):
    rng = np.random.default_rng(width)
    for _ in range(5):
        mask = ellipse(rng.uniform(-10, 40, 4), 31, 47) | ellipse((5, 5, 40, 28), 31, 47)
        mask[rng.integers(31, size=3), rng.integers(47, size=3)] = 0
        eroded = np.pad(mask, 1)
        for _ in range(width):
            shifts = [np.roll(eroded, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            eroded[1:-1, 1:-1] = np.min(shifts, axis=0)[1:-1, 1:-1]
        boundary = mask_boundary(mask, width / np.hypot(31, 47))
        np.testing.assert_array_equal(boundary, mask - eroded[1:-1, 1:-1])
    assert not mask_boundary(np.zeros((9, 9))).any()
    with pytest.raises(ValueError, match=r"\(2, 9, 9\)"):
        mask_boundary(np.zeros((2, 9, 9)))


ALL = ("box", "mask", "boundary")


def noisy_results(coco, seed=0):
    """Moved and doubled objects with wrong classes among them."""
    rng = np.random.default_rng(seed)
    results = []
    for true in perfect_results(coco) * 2:
        image = coco.imgs[true["image_id"]]
        x, y, w, h = np.array(true["bbox"]) + rng.integers(-2, 3, 4)
        category = int(rng.choice(list(coco.cats))) if rng.random() < 0.2 else true["category_id"]
        mask = encode(ellipse((x, y, x + w, y + h), image["height"], image["width"]))
        box = [float(v) for v in (x, y, w, h)]
        results.append(true | {"bbox": box, "segmentation": mask, "score": rng.random(), "category_id": category})
    return results


def test_perfect_results_score_one():
    coco = ground_truth()
    numbers = CocoScorer.of(coco, perfect_results(coco)).result(ALL)
    assert len(numbers) == 36
    for kind in ALL:
        assert numbers[f"{kind}_ap"] == pytest.approx(1)
        assert numbers[f"{kind}_ar100"] == numbers[f"{kind}_ap50"] == pytest.approx(1)
        assert numbers[f"{kind}_ap_large"] == -1  # no such object


def test_no_result_at_all_scores_zero():
    numbers = CocoScorer.of(ground_truth(), []).result(ALL)
    assert {numbers[f"{kind}_{name}"] for kind in ALL for name in ("ap", "ap50", "ar1", "ar100", "ap_small")} == {0.0}


def test_boundary_is_never_better_than_mask():
    coco = ground_truth(20)
    numbers = CocoScorer.of(coco, noisy_results(coco)).result(ALL)
    assert 0 < numbers["boundary_ap"] < numbers["mask_ap"] < 1


def rectangle(x1, y1, x2, y2):
    mask = np.zeros((60, 80), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def one_image(masks, crowd=()):
    """A ground truth of one image; the masks in `crowd` (indices) are crowd regions."""
    entries = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": float(mask.sum())}
        | {"iscrowd": int(i in crowd), "segmentation": encode(mask)}
        for i, mask in enumerate(masks)
    ]
    images = [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 80}]
    return as_coco({"images": images, "annotations": entries, "categories": [{"id": 1, "name": "thing"}]})


def found(*masks):
    """Results of the image, the first the surest."""
    result = {"image_id": 1, "category_id": 1}
    return [result | {"score": 0.9 - 0.1 * i, "segmentation": encode(mask)} for i, mask in enumerate(masks)]


def test_boundaries_do_not_make_up_for_masks():
    """Without its middle a square has a better IoU by boundary (0.56) than by mask (0.51), which then holds."""
    square = rectangle(5, 5, 55, 55)
    holed = square - rectangle(12, 12, 47, 47)
    numbers = CocoScorer.of(one_image([square]), found(holed)).result(["mask", "boundary"])
    assert numbers["mask_ap"] == numbers["boundary_ap"] == pytest.approx(0.1)


def test_objects_of_a_crowd_are_neither_right_nor_wrong():
    """Also by boundary, though those of the objects lie within the crowd's region."""
    coco = one_image([rectangle(0, 0, 50, 60), rectangle(60, 5, 75, 30)], crowd=[0])
    results = found(rectangle(20, 20, 30, 30), rectangle(25, 30, 40, 40), rectangle(60, 5, 75, 30))
    numbers = CocoScorer.of(coco, results).result(["mask", "boundary"])
    assert numbers["mask_ap"] == numbers["boundary_ap"] == pytest.approx(1)


def test_images_without_results_are_misses():
    coco = ground_truth()
    missed = coco.dataset["annotations"][-1]["image_id"]
    found = [r for r in perfect_results(coco) if r["image_id"] != missed]
    scorer = CocoScorer.of(coco, found)
    assert 0 < scorer.result(["box"])["box_ar100"] < 1
    left = CocoScorer(coco, image_ids={r["image_id"] for r in found})
    for image_id in coco.imgs:
        left.add(image_id, [r for r in found if r["image_id"] == image_id])
    assert left.result(["box"])["box_ap"] == pytest.approx(1)


def test_the_order_of_images_does_not_matter():
    coco = ground_truth(12)
    results = [r | {"score": round(r["score"], 1)} for r in noisy_results(coco)]  # ties between images
    numbers = []
    for order in (list(coco.imgs), list(coco.imgs)[::-1]):
        scorer = CocoScorer(coco)
        for image_id in order:
            scorer.add(image_id, [r for r in results if r["image_id"] == image_id])
        numbers.append(scorer.result(ALL))
    assert numbers[0] == numbers[1]


def test_area_of_a_result_is_that_of_what_is_measured():
    coco = ground_truth(12)
    results = noisy_results(coco)
    huge = [r | {"bbox": [0, 0, 5e4, 5e4]} for r in results]
    assert CocoScorer.of(coco, huge).result(["mask"]) == CocoScorer.of(coco, results).result(["mask"])


def test_annotations_without_area_count_by_their_box():
    coco = ground_truth()
    results = perfect_results(coco)
    for annotation in coco.dataset["annotations"]:
        del annotation["area"]
    assert CocoScorer.of(coco, results).result(["box"])["box_ap_small"] == pytest.approx(1)


def test_results_may_come_in_later():
    coco = ground_truth()
    scorer = CocoScorer(coco, [5, 15])
    scorer.add(5, [])
    with pytest.raises(ValueError, match="1 of 2 images have no results: 15"):
        scorer.result()
    scorer.add(15, [r for r in perfect_results(coco) if r["image_id"] == 15])
    scorer.result(["box"])
    assert scorer.leave_out_missing() == 0
    scorer = CocoScorer(coco)
    scorer.add(15, [r for r in perfect_results(coco) if r["image_id"] == 15])
    assert scorer.leave_out_missing() == 6
    assert scorer.result(["box"])["box_ap"] == pytest.approx(1)


def test_nothing_is_printed_and_nothing_is_changed(capsys):
    coco = ground_truth()
    results = noisy_results(coco)
    before = copy.deepcopy((coco.dataset, coco.anns, results))
    CocoScorer.of(coco, results).result(ALL)
    assert capsys.readouterr().out == ""
    assert (coco.dataset, coco.anns, results) == before


def one_result(coco, **changes):
    result = perfect_results(coco)[0]
    return result["image_id"], [result | changes]


def test_results_that_do_not_fit_the_ground_truth_are_refused():
    coco = ground_truth()
    scorer = CocoScorer(coco)
    image_id, results = one_result(coco)
    image = coco.imgs[image_id]
    with pytest.raises(ValueError, match="image id 6, which is not among the 7 images"):
        scorer.add(6, [])
    with pytest.raises(ValueError, match="image id 6, which is not among"):
        CocoScorer.of(coco, [results[0] | {"image_id": 6}])
    with pytest.raises(ValueError, match=f"says image_id {image_id}"):
        scorer.add(next(i for i in coco.imgs if i != image_id), results)
    with pytest.raises(ValueError, match=r"category_id 4, which the ground truth does not have; its 3 .* 3, 7, 90"):
        scorer.add(*one_result(coco, category_id=4))
    turned = encode(np.ones((image["width"] + 1, image["height"]), np.uint8))
    with pytest.raises(
        ValueError, match=rf"\[{image['width'] + 1}, .*\], but the image has the size \[{image['height']}"
    ):
        scorer.add(*one_result(coco, segmentation=turned))
    with pytest.raises(ValueError, match="score nan"):
        scorer.add(*one_result(coco, score=float("nan")))
    scorer.add(image_id, results)
    with pytest.raises(ValueError, match="added before"):
        scorer.add(image_id, results)


def test_what_cannot_be_measured_is_refused():
    coco = ground_truth()
    _, (result,) = one_result(coco)
    boxes_only = {key: value for key, value in result.items() if key != "segmentation"}
    with pytest.raises(ValueError, match=r"no 'segmentation', which mask AP"):
        CocoScorer.of(coco, [boxes_only]).result(["mask"])
    with pytest.raises(ValueError, match="kind='masks' must be one of box, mask, boundary"):
        CocoScorer.of(coco, []).result(["masks"])
    with pytest.raises(ValueError, match="no image of the ground truth has the id 6, 8; it has 7"):
        CocoScorer(coco, [5, 8, 6])
