"""One solver for depth and instances against the published system: losses, gradients, prediction."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.tasks import paste, solving
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.instances import InstancesTask
from aitok_jax.tasks.joint import JointTask

pytestmark = cases.find("e2e_joint*")


@pytest.fixture
def case(name):
    return cases.load(name)


@pytest.fixture
def tree(case):
    return jax.tree.map(jnp.asarray, rules.from_state_dict(case.state_dict()))


def build(case, tree) -> JointTask:
    model = case.hp["model"]
    cfg, head = model["transformer"], model["task_heads"]["insseg"]
    depth = published.depth_task(model, tree["params"], case["in/depth_img"].shape[-1], pad_to=model["padto"])
    instances = InstancesTask(
        solver=depth.solver,
        tokenizer=published.tokenizer(head["vae_cfg"]),
        vocabulary=depth.vocabulary,
        image_size=head["norm_val"],
        num_objects=head["num_query"],
        mask_size=head["vae_cfg"]["mask_size"],
        mask_weight=head["mask_weight"],
        aux_weight=head["decoder_loss_weight"],
        loss_weight=head["loss_weight"],
        soft_input=cfg["soft_transformer"],
        soft_detokenize=cfg["soft_vae"],
        top_p=cfg["top_p"],
    )
    return JointTask(depth=depth, instances=instances)


class Injected:
    """The instance task with the token sequences that the published system drew, and images in its own scale."""

    def __init__(self, case, task):
        self.case, self.task, self.solver, self.task_id = case, task, task.solver, task.task_id

    def prepare(self, model_state, batch, rng):
        targets = self.case["in/insseg_target_seq"].reshape(1, self.task.num_objects, -1)
        counted = targets >= 0
        crops = np.zeros((*targets.shape[:2], self.task.mask_size, self.task.mask_size), np.float32)
        crops[counted[..., 0]] = self.case["in/insseg_mask"]
        return solving.Prepared(
            jnp.asarray(cases.nhwc(self.case["in/insseg_img"])),
            jnp.asarray(self.case["in/insseg_input_seq"]),
            (np.maximum(targets, 0), counted, crops),
        )

    def score(self, *args):
        return self.task.score(*args)


def test_losses_and_gradients(case, tree):
    joint = build(case, tree)
    parts = {"depth": joint.depth, "instances": Injected(case, joint.instances)}
    batches = {"depth": {"image": cases.nhwc(case["in/depth_img"]), "depth": case["in/depth"][:, 0]}, "instances": {}}

    @jax.jit
    def step(params):
        return jax.value_and_grad(
            lambda p: solving.loss(parts, p, tree["model_state"], batches, jax.random.key(0)), has_aux=True
        )(params)

    (total, metrics), grads = step(tree["params"])
    cases.check(total, case["out/loss_total"])
    theirs = {"class_cross_entropy": "cls_ce", "box_cross_entropy": "bbox_ce", "mask_cross_entropy": "mask_ce"}
    for ours, published_name in (theirs | {"mask_aux": "decoder_aux_ce"}).items():
        cases.check(metrics["instances"][ours], case[f"out/loss/insseg_{published_name}"])
    cases.check(metrics["depth"]["cross_entropy"], case["out/loss/depth_ce"])
    cases.check(metrics["depth"]["silog"], case["out/loss/depth_decoder_aux_ce"])
    for key in case.keys("out/grad/"):
        path = rules.locate(key.removeprefix("out/grad/"))
        cases.check(cases.leaf(grads, path[1:]), rules.to_layout(path, case[key]), 1e-3)


def test_depth_inference(case, tree):
    joint = build(case, tree)
    batch = {"image": cases.nhwc(case["in/test_depth_img"])}
    outputs = compiled_predict(joint.depth)(tree["params"], tree["model_state"], batch)
    cases.check(outputs["depth"], case["out/test_depth"])


def test_instance_inference(case, tree):
    task, meta = build(case, tree).instances, case.hp["test_meta"]
    outputs = predict_scaled(task, tree, cases.nhwc(case["in/test_img"]))
    height, width = meta["ori_shape"]
    boxes = np.asarray(outputs["boxes"][0] / meta["scale_factor"])
    cases.check(np.clip(boxes, 0, np.array([[width, height, width, height]])), case["out/test_boxes"][:, :4])
    cases.check(outputs["scores"][0], case["out/test_boxes"][:, 4])
    np.testing.assert_array_equal(outputs["classes"][0], case["out/test_labels"])
    pasted = paste.paste_masks(outputs["masks"][0], boxes, height, width) >= 0.5
    assert np.mean(pasted != case["out/test_masks"].astype(bool)) < 1e-4


def predict_scaled(task, tree, image_in_its_scale):
    """`predict` normalises; the case's image is normalised already, so undo that first."""
    image = image_in_its_scale * solving.IMAGENET_STD.reshape(1, 1, 1, 3) + solving.IMAGENET_MEAN.reshape(1, 1, 1, 3)
    return compiled_predict(task)(tree["params"], tree["model_state"], {"image": image.astype(np.float32)})
