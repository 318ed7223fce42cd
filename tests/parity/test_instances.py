"""The losses of objects as tokens against the published system."""

import cases
import jax
import numpy as np
import published
import pytest

from aitok_jax.models import losses
from aitok_jax.tasks.objects import ObjectsPart

pytestmark = cases.find("losses*")
METRICS = {"class_cross_entropy": "cls_ce", "box_cross_entropy": "bbox_ce"}
MASK_METRICS = {"mask_cross_entropy": "mask_ce", "mask_aux": "decoder_aux_ce"}


def objects_part(hp, masks=True, **options):
    vocabulary = published.vocabulary(hp)
    solver = published.heads_only(vocabulary)
    return ObjectsPart(
        solver=solver,
        tokenizer=published.tokenizer(hp["insseg_vae"]) if masks else None,
        vocabulary=vocabulary,
        image_size=solver.backbone.stride,  # has no part in losses
        num_objects=hp["n_all"],
        mask_size=hp["insseg_vae"]["mask_size"],
        **options,
    )


def check_loss(case, part, out, kind, targets, metrics_of):
    vae = case.hp["insseg_vae"]
    length = case[f"in/{targets}"].shape[1] // part.num_objects
    assert length - 5 == (vae["token_length"] if part.tokenizer else 0)
    targets = case[f"in/{targets}"].reshape(-1, part.num_objects, length)
    counted = targets >= 0
    crops = np.zeros((*targets.shape[:2], vae["mask_size"], vae["mask_size"]), np.float32)
    real = counted[..., 0]
    if part.aux_weight and real.any():
        crops[real] = case["in/insseg_mask"]
    logits = case[f"in/{kind}_out_seq"].reshape(*targets.shape, -1)
    sd = {f"insseg_head.{k}": v for k, v in case.state_dict("insseg.").items()}
    state = published.from_state_dict(sd)["model_state"]

    def loss(logits):
        return part.token_loss(state, logits, np.maximum(targets, 0), counted, crops)

    (total, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    tokens = counted.sum()  # the published head sums over tokens; the model that calls it divides by their number
    cases.check(total * tokens, case[f"out/{out}_loss"])
    cases.check(grad.reshape(case[f"in/{kind}_out_seq"].shape) * tokens, case[f"out/{out}_grad_out_seq"], 1e-3)
    for ours, theirs in metrics_of.items():
        cases.check(metrics.get(ours, 0.0), case[f"out/{out}_{theirs}"])


@pytest.mark.parametrize("out", ["insseg", "inssegcap", "inssegempty", "inssegw0"])
def test_instance_loss(name, out):
    case = cases.load(name)
    kind = "inssegw0" if out == "inssegw0" else "insseg"
    options = published.object_weights(case.hp["insseg_w0" if out == "inssegw0" else "insseg"])
    if out == "inssegcap":
        options["aux_objects"] = case.hp["inssegcap_max_obj"]
    targets = {"inssegempty": "insseg_target_seq_empty", "inssegw0": "inssegw0_target_seq"}
    part = objects_part(case.hp, **options)
    check_loss(case, part, out, kind, targets.get(out, "insseg_target_seq"), METRICS | MASK_METRICS)


def test_detection_loss(name):
    case = cases.load(name)
    part = objects_part(case.hp, masks=False, loss_weight=case.hp["det_loss_weight"], aux_weight=0.0)
    check_loss(case, part, "det", "det", "det_target_seq", METRICS)


def test_dice(name):
    case = cases.load(name)
    cases.check(losses.dice(case["in/dice_pred"], case["in/insseg_mask"]).mean(), case["out/dice_loss"])
