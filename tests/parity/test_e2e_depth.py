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
from aitok_jax.tasks.windows import shifted_windows
from aitok_jax.training import optim

pytestmark = cases.find("e2e_depth*")


@pytest.fixture
def case(name):
    return cases.load(name)


@pytest.fixture
def tree(case):
    return rules.from_state_dict(case.state_dict())


@pytest.fixture
def task(case, tree):
    return published.depth_task(case.hp["model"], tree["params"], case["in/img"].shape[-1])


def batch_of(case):
    return {"image": cases.nhwc(case["in/img"]), "depth": case["in/depth"][:, 0]}


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
                "warmup_ratio": 0.1,
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


def test_training_steps(case, tree, task):
    """Three AdamW updates with layer decay and clipping on one batch."""
    optimizer = optimizer_of(case)

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
        cases.check(metrics["silog"], aux)
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


def test_inference(case, tree, task):
    image = cases.nhwc(case["in/test_img"])
    squares = shifted_windows(jnp.asarray(image), case.hp["shift_window"]["shift_size"])
    squares = jnp.concatenate([squares, squares[:, :, ::-1]])
    features = jax.jit(partial(task.solver.apply, method="features"))({"params": tree["params"]}, squares[:1])
    cases.check(features, cases.nhwc(case["out/test_feat"]))
    decoded = jax.jit(lambda params, images: task.decode(params, task.memory(params, images)))(tree["params"], squares)
    cases.check(decoded.logits, case["out/test_steplogits"])
    depth = jax.jit(task.predict)(tree["params"], tree["model_state"], {"image": image})["depth"]
    cases.check(depth, case["out/test_depth"])
