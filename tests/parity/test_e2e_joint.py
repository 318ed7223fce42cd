"""One solver for depth and instances against the published system: losses, gradients, prediction.

A slice of a case may lack a part, whose weights are large, and what all parts are needed for.
"""

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.image import IMAGENET_MEAN, IMAGENET_STD
from aitok_jax.tasks import paste, solver
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.objects import ObjectsPart

pytestmark = cases.find("e2e_joint*")
HEADS = {"depth": "depth", "instances": "insseg"}
INSTANCE_LOSSES = {"class_cross_entropy": "cls_ce", "box_cross_entropy": "bbox_ce", "mask_cross_entropy": "mask_ce"}
INSTANCE_LOSSES |= {"mask_aux": "decoder_aux_ce"}


@dataclasses.dataclass(frozen=True)
class Injected(ObjectsPart):
    """Trains on the token sequences that the published system drew, and on images in its own scale."""

    case: Any = None

    def inputs(self, model_state, batch, rng):
        targets = self.case["in/insseg_target_seq"].reshape(len(batch["image"]), self.num_objects, -1)
        counted = targets >= 0
        crops = np.zeros((*targets.shape[:2], self.mask_size, self.mask_size), np.float32)
        crops[counted[..., 0]] = self.case["in/insseg_mask"]
        tokens = jnp.asarray(self.case["in/insseg_input_seq"])
        return solver.Inputs(batch["image"], tokens, (np.maximum(targets, 0), counted, crops))


@pytest.fixture
def case(name):
    return cases.load(name)


@pytest.fixture
def tree(case):
    return jax.tree.map(jnp.asarray, published.from_state_dict(case.state_dict()))


@pytest.fixture
def parts(case, tree):
    model, params = case.hp["model"], tree["params"]
    there = [name for name, head in HEADS.items() if case.state_dict(f"{head}_head.")]
    build = {
        "depth": lambda: published.depth_part(model, params, case["in/depth_img"].shape[-1]),
        "instances": lambda: published.instances_part(model, params, Injected, case=case),
    }
    return {name: build[name]() for name in there}


def test_losses_and_gradients(case, tree, parts):
    first = next(iter(parts.values()))
    task = solver.SolverTask(first.solver, first.vocabulary, parts)
    batches = {name: {"image": cases.nhwc(case[f"in/{HEADS[name]}_img"])} for name in parts}
    if "depth" in parts:
        batches["depth"]["depth"] = case["in/depth"][:, 0]

    @jax.jit
    def step(params):
        loss = jax.value_and_grad(task.loss, has_aux=True)
        return loss(params, tree["model_state"], batches, jax.random.key(0))

    (total, (metrics, _)), grads = step(tree["params"])
    cases.check(total, sum(case[f"out/loss/{HEADS[name]}_loss"] for name in parts))
    if parts.keys() == HEADS.keys():
        cases.check(total, case["out/loss_total"])
    for name, part in parts.items():
        check_metrics(case, part, name, {k: metrics[solver.part_prefix(task, name) + k] for k in logged(part)})
    for key in case.keys("out/grad/"):
        path = rules.locate(key.removeprefix("out/grad/"))
        cases.check(cases.leaf(grads, path[1:]), rules.to_layout(path, case[key]), 1e-3)


def logged(part):
    if part.kind == "objects":
        return [name for name in INSTANCE_LOSSES if part.aux_weight or name != "mask_aux"]
    return ["cross_entropy", *(["silog"] if part.aux_weight else [])]


def check_metrics(case, part, name, ours):
    assert ours
    if name == "instances":
        for metric, theirs in INSTANCE_LOSSES.items():
            cases.check(ours.get(metric, 0.0), case[f"out/loss/insseg_{theirs}"])
        return
    ce, aux = case["out/loss/depth_ce"], case["out/loss/depth_decoder_aux_ce"]
    cases.check(ours["cross_entropy"], ce)
    if part.aux_weight:
        added = case["out/loss/depth_loss"] / part.loss_weight - ce
        cases.check(published.logged_auxiliary(ours["silog"], part.aux_weight, added, aux), aux)


def test_inference(case, tree, parts):
    assert parts
    if "depth" in parts:
        batch = {"image": cases.nhwc(case["in/test_depth_img"])}
        outputs = compiled_predict(parts["depth"])(tree["params"], tree["model_state"], batch)
        cases.check(outputs["depth"], case["out/test_depth"])
    if "instances" in parts:
        check_instances(case, predict_scaled(parts["instances"], tree, cases.nhwc(case["in/test_img"])))


def check_instances(case, outputs):
    meta = case.hp["test_meta"]
    height, width = meta["ori_shape"]
    boxes = np.asarray(outputs["boxes"][0] / meta["scale_factor"])
    cases.check(np.clip(boxes, 0, np.array([[width, height, width, height]])), case["out/test_boxes"][:, :4])
    cases.check(outputs["scores"][0], case["out/test_boxes"][:, 4])
    np.testing.assert_array_equal(outputs["classes"][0], case["out/test_labels"])
    pasted = paste.paste_masks(outputs["masks"][0], boxes, height, width) >= 0.5
    assert np.mean(pasted != case["out/test_masks"].astype(bool)) < 1e-4


def predict_scaled(part, tree, image_in_its_scale):
    """`predict` normalises; the case's image is normalised already, so undo that first."""
    image = image_in_its_scale * IMAGENET_STD.reshape(1, 1, 1, 3) + IMAGENET_MEAN.reshape(1, 1, 1, 3)
    return compiled_predict(part)(tree["params"], tree["model_state"], {"image": image.astype(np.float32)})
