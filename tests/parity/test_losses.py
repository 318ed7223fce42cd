"""The depth head's losses against the published system.

A slice of a case may lack the VQ-VAE, and with it what the auxiliary loss is part of.
"""

import dataclasses

import cases
import jax
import numpy as np
import published
import pytest

from aitok_jax.tasks.maps import MapPart
from aitok_jax.tasks.modalities.depth import Depth

pytestmark = cases.find("losses*")
WITHOUT_AUXILIARY = {"decoder_loss_weight": 0.0, "loss_weight": 1.0}


def depth_part(case, weights):
    hp = case.hp
    vocabulary = published.vocabulary(hp)
    return MapPart(
        modality=Depth(),
        solver=published.heads_only(vocabulary),
        tokenizer=published.tokenizer(hp["depth_vae"]),
        vocabulary=vocabulary,
        image_size=case["in/depth_map"].shape[-1],
        aux_weight=weights["decoder_loss_weight"],
        loss_weight=weights["loss_weight"],
    )


def state_of(case):
    sd = {f"depth_head.{k}": v for k, v in case.state_dict("depth.").items()}
    return published.from_state_dict(sd)["model_state"]


@pytest.mark.parametrize("kind", ["depth", "depthw0"])
def test_depth_loss(name, kind):
    case = cases.load(name)
    weights = case.hp["depth"] if kind == "depth" else case.hp.get("depth_w0", WITHOUT_AUXILIARY)
    state, depth, targets = state_of(case), case["in/depth_map"][:, 0], case["out/depth_target_seq"]
    part = depth_part(case, weights)
    if state:
        np.testing.assert_array_equal(part.targets(state, depth), targets)
        logits = case["in/depth_out_seq"][..., part.vocabulary.codes_of("depth").slice]
        cases.check(part._soft(state, logits)[..., 0], case["out/depth_soft_decoded"])
    else:
        part = dataclasses.replace(part, aux_weight=0.0)
    np.testing.assert_array_equal(targets[:, :-1], case["out/depth_input_seq"])
    (loss, metrics), grad = jax.value_and_grad(
        lambda logits: part.token_loss(state, logits, targets, depth), has_aux=True
    )(case["in/depth_out_seq"])
    cases.check(metrics["cross_entropy"], case[f"out/{kind}_ce"])
    if f"out/{kind}_loss" in case:
        check_total(case, kind, part, loss, metrics, grad)


def check_total(case, kind, part, loss, metrics, grad):
    """The published head sums over tokens; the model that calls it divides by their number."""
    tokens = case["out/depth_target_seq"].size
    total, aux = case[f"out/{kind}_loss"], case[f"out/{kind}_decoder_aux_ce"]
    cases.check(loss * tokens, total)
    if part.aux_weight:
        added = total / tokens / part.loss_weight - case[f"out/{kind}_ce"]
        cases.check(published.logged_auxiliary(metrics["silog"], part.aux_weight, added, aux), aux)
    cases.check(grad * tokens, case[f"out/{kind}_grad_out_seq"], 1e-3)
