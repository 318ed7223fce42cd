"""Objects as tokens, their losses and the joint model against the published system."""

import cases
import jax
import numpy as np
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.models import losses
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks.instances import InstancesTask

pytestmark = cases.find("losses*")


def instances_task(hp, count, masks=True, **options):
    vocabulary = published.vocabulary(hp)
    return InstancesTask(
        solver=TaskSolver(SwinV2(), TokenTransformer(vocab_size=vocabulary.size)),
        tokenizer=published.tokenizer(hp["insseg_vae"]) if masks else None,
        vocabulary=vocabulary,
        image_size=640,
        num_objects=count,
        **options,
    )


def check_loss(case, task, out, kind, targets, metrics_of):
    length = 5 + task.mask_tokens
    targets = case[f"in/{targets}"].reshape(-1, task.num_objects, length)
    counted = targets >= 0
    crops = np.zeros((*targets.shape[:2], task.mask_size, task.mask_size), np.float32)
    real = counted[..., 0]
    if task.aux_weight and real.any():
        crops[real] = case["in/insseg_mask"]
    logits = case[f"in/{kind}_out_seq"].reshape(*targets.shape, -1)
    state = rules.from_state_dict({f"insseg_head.{k}": v for k, v in case.state_dict("insseg.").items()})["model_state"]

    def loss(logits):
        return task.token_loss(state, logits, np.maximum(targets, 0), counted, crops)

    (total, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    tokens = counted.sum()  # the published head sums over tokens; the model that calls it divides by their number
    cases.check(total * tokens, case[f"out/{out}_loss"])
    cases.check(grad.reshape(case[f"in/{kind}_out_seq"].shape) * tokens, case[f"out/{out}_grad_out_seq"], 1e-3)
    for ours, theirs in metrics_of.items():
        cases.check(metrics.get(ours, 0.0), case[f"out/{out}_{theirs}"])


METRICS = {
    "class_cross_entropy": "cls_ce",
    "box_cross_entropy": "bbox_ce",
    "mask_cross_entropy": "mask_ce",
    "mask_aux": "decoder_aux_ce",
}


@pytest.mark.parametrize("out", ["insseg", "inssegcap", "inssegempty", "inssegw0"])
def test_instance_loss(name, out):
    case = cases.load(name)
    hp, count = case.hp, case.hp["n_all"]
    kind = "inssegw0" if out == "inssegw0" else "insseg"
    weights = hp["insseg_w0" if out == "inssegw0" else "insseg"]
    options = {
        "mask_weight": weights["mask_weight"],
        "aux_weight": weights["decoder_loss_weight"],
        "loss_weight": weights["loss_weight"],
        "box_weight": weights.get("box_weight", 1.0),
        "class_weight": weights.get("cls_weight", 1.0),
        "aux_objects": hp["inssegcap_max_obj"] if out == "inssegcap" else 100,
    }
    targets = {"inssegempty": "insseg_target_seq_empty", "inssegw0": "inssegw0_target_seq"}
    task = instances_task(hp, count, **options)
    check_loss(case, task, out, kind, targets.get(out, "insseg_target_seq"), METRICS)


def test_detection_loss(name):
    case = cases.load(name)
    task = instances_task(
        case.hp, case.hp["n_all"], masks=False, loss_weight=case.hp["det_loss_weight"], aux_weight=0.0
    )
    metrics = {"class_cross_entropy": "cls_ce", "box_cross_entropy": "bbox_ce"}
    check_loss(case, task, "det", "det", "det_target_seq", metrics)


def test_dice(name):
    case = cases.load(name)
    cases.check(losses.dice(case["in/dice_pred"], case["in/insseg_mask"]).mean(), case["out/dice_loss"])
