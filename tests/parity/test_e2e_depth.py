"""The whole depth system against the published one: losses, gradients, optimiser steps, test-time inference."""

import json
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from ml_collections import ConfigDict

from aitok_jax.convert import rules
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.solver import SolverTask
from aitok_jax.tasks.windows import cut, merge, window_starts
from aitok_jax.training import optim

pytestmark = cases.find("e2e_depth*")


@pytest.fixture
def case(name):
    return cases.load(name)


@pytest.fixture
def tree(case):
    return published.from_state_dict(case.state_dict())


@pytest.fixture
def part(case, tree):
    size, flip = case["in/img"].shape[-1], case.hp["shift_window"]["flip"]
    return published.depth_part(case.hp["model"], tree["params"], size, flip=flip)


def batch_of(case):
    return {"depth": {"image": cases.nhwc(case["in/img"]), "depth": case["in/depth"][:, 0]}}


def optimizer_of(case):
    hp = case.hp["optimizer"]
    return optim.make_optimizer(
        ConfigDict(
            {
                "name": "adamw",
                "learning_rate": hp["lr"],
                "b1": hp["betas"][0],
                "b2": hp["betas"][1],
                "eps": hp["eps"],
                "weight_decay": hp["weight_decay"],
                "layer_decay": hp["layer_decay"],
                "clip_norm": hp["clip_max_norm"],
                "schedule": {"name": "constant"},
                "warmup_steps": 0,
                "warmup_ratio": 1.0,
            }
        ),
        case.hp["steps"],
    )


def compare(ours, case, prefix, tolerance):
    names = case.keys(prefix)
    assert names
    for key in names:
        path = rules.locate(key.removeprefix(prefix))
        cases.check(cases.leaf(ours, path[1:]), rules.to_layout(path, case[key]), tolerance)


def test_training_steps(case, tree, part):
    """AdamW updates with layer decay and clipping on one batch."""
    optimizer = optimizer_of(case)
    task = SolverTask(part.solver, part.vocabulary, {"depth": part})

    @jax.jit
    def step(params, opt_state):
        value = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (metrics, _)), grads = value(params, tree["model_state"], batch_of(case), jax.random.key(0))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, loss, metrics, grads

    params = tree["params"]
    opt_state = optimizer.init(params)
    for i in range(case.hp["steps"]):
        params, opt_state, loss, metrics, grads = step(params, opt_state)
        total, ce, aux = case["out/step_losses"][i]
        cases.check(loss, total)
        cases.check(metrics["cross_entropy"], ce)
        if part.aux_weight:
            added = total / part.loss_weight - ce
            cases.check(published.logged_auxiliary(metrics["silog"], part.aux_weight, added, aux), aux)
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
        cases.check(norm, case["out/step_gradnorm"][i], 1e-3)
        if i == 0:
            cases.check(loss, case["out/loss0/depth_loss"])
            compare(grads, case, "out/grad0/", 1e-3)
            names = json.loads((cases.directory() / f"{case.name}_gradnorm_names.json").read_text())
            norms = [np.linalg.norm(cases.leaf(grads, rules.locate(n)[1:])) for n in names]
            cases.check(norms, case["out/gradnorm0_all"], 1e-3)
            compare(params, case, "out/param1/", 1e-3)
    compare(params, case, f"out/param{case.hp['steps']}/", 1e-3)


def test_inference(case, tree, part):
    image = cases.nhwc(case["in/test_img"])
    _, height, width, _ = image.shape
    starts = published.window_starts(height, width, case.hp["shift_window"]["shift_size"])
    squares = cut(jnp.asarray(image), starts)
    if part.flip:
        squares = jnp.concatenate([squares, squares[:, :, ::-1]])
    features_of = jax.jit(partial(part.solver.apply, method="features"))
    features = features_of({"params": tree["params"]}, part._scaled(squares[:1]))
    cases.check(features, cases.nhwc(case["out/test_feat"]))
    decoded = jax.jit(lambda params, images: part.decode(params, part.memory(params, images)))(tree["params"], squares)
    cases.check(decoded.logits, case["out/test_steplogits"])
    maps = part.detokenize(tree["model_state"], decoded)["map"]
    if part.flip:
        maps = (maps[: len(maps) // 2] + maps[len(maps) // 2 :, :, ::-1]) / 2
    cases.check(part.modality.finish(merge(maps, height, width, starts)), case["out/test_depth"])
    if starts == window_starts(height, width):
        predicted = compiled_predict(part)(tree["params"], tree["model_state"], {"image": image})
        cases.check(predicted["depth"], case["out/test_depth"])
