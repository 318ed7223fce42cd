"""Masks pasted into boxes and decoded objects on the original image, against the published system."""

import cases
import jax
import numpy as np
import published
import pytest
from pycocotools import mask as coco_mask

from aitok_jax.tasks import paste

pytestmark = cases.find("heads*")


@pytest.fixture
def case(name):
    return cases.load(name)


def test_pasted_values(case):
    """All boxes, also reversed and without width."""
    expected_NHW = case["out/paste_values"]
    masks_NSS, boxes_N4 = case["in/paste_masks"][:, 0], case["in/paste_boxes"]
    values_NHW = paste.paste_masks(masks_NSS, boxes_N4, *expected_NHW.shape[1:])
    np.testing.assert_allclose(values_NHW, expected_NHW, atol=2e-6)


def predicted_objects(case, soft, with_masks=True):
    """The decoded tokens as a task's outputs for one image."""
    hp = case.hp
    tokens = case["in/dec_tokens"].reshape(-1, 5 + hp["mask_tokens"])
    outputs = {
        "boxes": tokens[:, :4].astype(np.float32) * hp["norm_val"] / hp["num_bins"],
        "classes": tokens[:, 4],
        "scores": case["in/dec_scores"],
        "valid": np.ones(len(tokens), bool),
    }
    if with_masks:
        tree = published.from_state_dict(case.state_dict("vqvae."))
        variables = {"params": tree["params"], **tree["model_state"]}
        grid = int(np.sqrt(hp["mask_tokens"]))
        codes, method = tokens[:, 5:].reshape(-1, grid, grid), "decode"
        if soft:
            codes, method = case["in/dec_mask_logits"].reshape(len(tokens), grid, grid, -1), "decode_soft"
        model = published.tokenizer(hp["vae"])
        decode = jax.jit(lambda codes: model.apply(variables, codes, method=method))
        outputs["masks"] = np.asarray(decode(codes))[..., 0]
    return outputs


def check_boxes(results, boxes_N5, labels):
    boxes_N4 = np.array([r["bbox"] for r in results])
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    cases.check(boxes_N4, boxes_N5[:, :4])
    cases.check([r["score"] for r in results], boxes_N5[:, 4])
    np.testing.assert_array_equal([r["category_id"] for r in results], labels)


def check_masks(results, outputs, scale, expected_NHW):
    """Equal, but for pixels whose value is at the threshold."""
    masks_NHW = np.moveaxis(coco_mask.decode([r["segmentation"] for r in results]), -1, 0)
    boxes_N4 = outputs["boxes"] / np.tile(scale, 2)[None]
    values_NHW = paste.paste_masks(outputs["masks"], boxes_N4, *expected_NHW.shape[1:])
    surely = np.abs(values_NHW - 0.5) > 1e-4
    np.testing.assert_array_equal(masks_NHW[surely], expected_NHW[surely])
    assert np.mean(masks_NHW != expected_NHW) < 1e-4
    assert 0 < masks_NHW.mean() < 1


@pytest.mark.parametrize("kind", ["hard", "soft", "norescale"])
def test_decoded_instances(case, kind):
    outputs = predicted_objects(case, soft=kind == "soft")
    scale, size = case["in/dec_scale_factor"][:2], case["in/dec_ori_shape"]
    labels = case[f"out/dec_{'hard' if kind == 'norescale' else kind}_labels"]
    if kind == "norescale":
        scale, size = np.ones(2, np.float32), case["in/dec_img_shape"]
    results = paste.to_results(outputs, 7, range(case.hp["num_classes"]), scale, size)
    check_boxes(results, case[f"out/dec_{kind}_boxes"], labels)
    check_masks(results, outputs, scale, case[f"out/dec_{kind}_masks"])


def test_decoded_detections(case):
    outputs = predicted_objects(case, soft=False, with_masks=False)
    scale, size = case["in/dec_scale_factor"][:2], case["in/dec_ori_shape"]
    results = paste.to_results(outputs, 7, range(case.hp["num_classes"]), scale, size)
    check_boxes(results, case["out/det_boxes"], case["out/det_labels"])
