"""Head losses against the published system."""

import cases
import jax
import numpy as np
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks.depth import DepthTask

pytestmark = cases.find("losses*")


def depth_task(hp, image_size, **weights):
    vocabulary = published.vocabulary(hp)
    return DepthTask(
        solver=TaskSolver(SwinV2(), TokenTransformer(vocab_size=vocabulary.size)),
        tokenizer=published.tokenizer(hp["depth_vae"]),
        vocabulary=vocabulary,
        image_size=image_size,
        **weights,
    )


def state_of(case):
    sd = {f"depth_head.{k}": v for k, v in case.state_dict("depth.").items()}
    return rules.from_state_dict(sd)["model_state"]


@pytest.mark.parametrize("kind", ["depth", "depthw0"])
def test_depth_loss(name, kind):
    case = cases.load(name)
    depth = case["in/depth_map"][:, 0]
    weights = (
        {"aux_weight": 0.0}
        if kind == "depthw0"
        else {"aux_weight": case.hp["depth"]["decoder_loss_weight"], "loss_weight": case.hp["depth"]["loss_weight"]}
    )
    task, state = depth_task(case.hp, depth.shape[-1], **weights), state_of(case)
    targets = task.targets(state, depth)
    np.testing.assert_array_equal(targets, case["out/depth_target_seq"])
    np.testing.assert_array_equal(targets[:, :-1], case["out/depth_input_seq"])
    (loss, metrics), grad = jax.value_and_grad(
        lambda logits: task.token_loss(state, logits, targets, depth), has_aux=True
    )(case["in/depth_out_seq"])
    tokens = targets.size  # the published head sums over tokens; the model that calls it divides by their number
    cases.check(loss * tokens, case[f"out/{kind}_loss"])
    cases.check(metrics["cross_entropy"], case[f"out/{kind}_ce"])
    if task.aux_weight:
        cases.check(task.aux_weight * metrics["silog"], case[f"out/{kind}_decoder_aux_ce"])
    cases.check(grad * tokens, case[f"out/{kind}_grad_out_seq"], 1e-3)


def test_soft_detokenization(name):
    case = cases.load(name)
    task = depth_task(case.hp, case["in/depth_map"].shape[-1])
    logits = case["in/depth_out_seq"][..., task.vocabulary.depth_codes.slice]
    cases.check(task._soft_map(state_of(case), logits), case["out/depth_soft_decoded"])
