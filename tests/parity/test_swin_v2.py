"""Swin-V2 against the published system: every stage, block outputs, position bias, gradients."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.models.swin_v2 import relative_index

pytestmark = cases.find("swinv2_*")


def build(hp, shift):
    return published.backbone({**hp, "use_shift": hp["shifts"][shift]}).clone(out_stages=tuple(hp["out_indices"]))


@pytest.fixture
def params(name):
    return rules.from_state_dict(cases.load(name).state_dict())["params"]


def test_every_stage(name, params):
    case = cases.load(name)
    for shift in case.hp["shifts"]:
        model = build(case.hp, shift)
        for h, w in case.hp["sizes"]:
            maps, state = jax.jit(lambda p, x, m=model: m.apply({"params": p}, x, capture_intermediates=True))(
                params, cases.nhwc(case[f"in/img_{h}x{w}"])
            )
            for stage, ours in zip(case.hp["out_indices"], maps, strict=True):
                cases.check(ours, cases.nhwc(case[f"out/{shift}_{h}x{w}_stage{stage}"]))
            inner = state["intermediates"]
            cases.check(inner["patch_embed"]["__call__"][0], cases.nhwc(case[f"out/patch_embed_{h}x{w}"]))
            for block in (0, 1):
                ours = inner["layers_0"][f"blocks_{block}"]["__call__"][0]
                theirs = case[f"out/{shift}_{h}x{w}_block{block}"]
                cases.check(ours.reshape(theirs.shape), theirs)


def test_position_bias(name, params):
    case = cases.load(name)
    model = build(case.hp, next(iter(case.hp["shifts"])))
    apply = partial(model.apply, capture_intermediates=lambda module, method: method == "_position_bias")
    _, state = jax.jit(apply)({"params": params}, cases.nhwc(case[case.keys("in/img_")[0]]))
    of_offsets = state["intermediates"]["layers_0"]["blocks_0"]["attn"]["_position_bias"][0]
    cases.check(of_offsets[:, relative_index(model.windows[0])], case["out/rpe_bias_layer0_block0"])


@pytest.mark.parametrize("remat", [False, True])
def test_gradients(name, params, remat):
    case = cases.load(name)
    h, w = case.hp["grad_case"]["size"]
    model = build(case.hp, case.hp["grad_case"]["shift"]).clone(remat=remat)
    weight = cases.nhwc(case["in/grad_weight"])

    @jax.jit
    def gradients(params, image):
        return jax.grad(lambda p, x: jnp.sum(model.apply({"params": p}, x)[-1] * weight), (0, 1))(params, image)

    grads, image_grad = gradients(params, cases.nhwc(case[f"in/img_{h}x{w}"]))
    cases.check(image_grad, cases.nhwc(case["out/grad/img"]), 1e-3)
    for key in case.keys("out/grad/"):
        if key != "out/grad/img":
            path = rules.locate(key.removeprefix("out/grad/"))
            cases.check(cases.leaf(grads, path[1:]), rules.to_layout(path, case[key]), 1e-3)
