"""Swin-V2 against the published system: every stage, block outputs, position bias, gradients.

A slice of a case may lack the last stages and the gradients.
"""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import published
import pytest
from flax import linen as nn

from aitok_jax.convert import rules
from aitok_jax.models.position_bias import relative_index
from aitok_jax.models.swin_v2 import EPSILON

pytestmark = cases.find("swinv2_*")


def build(hp, shift):
    return published.backbone({**hp, "use_shift": hp["shifts"][shift]})


@pytest.fixture
def params(name):
    return published.from_state_dict(cases.load(name).state_dict())["params"]


def runs(case):
    """(shift, height, width) of what the case has outputs of."""
    found = [
        (shift, h, w) for shift in case.hp["shifts"] for h, w in case.hp["sizes"] if case.keys(f"out/{shift}_{h}x{w}_")
    ]
    assert found
    return found


def test_every_stage(name, params):
    case = cases.load(name)
    for shift, h, w in runs(case):
        model = build(case.hp, shift)
        _, state = jax.jit(lambda p, x, m=model: m.apply({"params": p}, x, capture_intermediates=True))(
            params, cases.nhwc(case[f"in/img_{h}x{w}"])
        )
        inner = state["intermediates"]
        for stage in case.hp["out_indices"]:
            stage_map, _ = inner[f"layers_{stage}"]["__call__"][0]
            normalised = nn.LayerNorm(EPSILON).apply({"params": params[f"norm{stage}"]}, stage_map)
            cases.check(normalised, cases.nhwc(case[f"out/{shift}_{h}x{w}_stage{stage}"]))
        cases.check(inner["patch_embed"]["__call__"][0], cases.nhwc(case[f"out/patch_embed_{h}x{w}"]))
        for key in case.keys(f"out/{shift}_{h}x{w}_block"):
            ours = inner["layers_0"][f"blocks_{key[-1]}"]["__call__"][0]
            cases.check(ours.reshape(case[key].shape), case[key])


def test_position_bias(name, params):
    case = cases.load(name)
    model = build(case.hp, next(iter(case.hp["shifts"])))
    apply = partial(model.apply, capture_intermediates=lambda module, method: method == "_position_bias")
    _, state = jax.jit(apply)({"params": params}, cases.nhwc(case[case.keys("in/img_")[0]]))
    of_offsets = state["intermediates"]["layers_0"]["blocks_0"]["attn"]["_position_bias"][0]
    cases.check(of_offsets[:, relative_index(model.windows[0])], case["out/rpe_bias_layer0_block0"])


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_gradients(name, params, remat):
    """And the last map, which is all that there is of some slices."""
    case = cases.load(name)
    shift, (h, w) = case.hp["grad_case"]["shift"], case.hp["grad_case"]["size"]
    model = build(case.hp, shift).clone(remat=remat)
    weight = cases.nhwc(case["in/grad_weight"]) if "in/grad_weight" in case else 1.0

    @jax.jit
    def gradients(params, image):
        def weighted(params, image):
            last = model.apply({"params": params}, image)
            return jnp.sum(last * weight), last

        return jax.value_and_grad(weighted, (0, 1), has_aux=True)(params, image)

    (_, last), (grads, image_grad) = gradients(params, cases.nhwc(case[f"in/img_{h}x{w}"]))
    cases.check(last, cases.nhwc(case[f"out/{shift}_{h}x{w}_stage{len(model.depths) - 1}"]))
    for key in case.keys("out/grad/"):
        if key == "out/grad/img":
            cases.check(image_grad, cases.nhwc(case[key]), 1e-3)
        else:
            path = rules.locate(key.removeprefix("out/grad/"))
            cases.check(cases.leaf(grads, path[1:]), rules.to_layout(path, case[key]), 1e-3)
