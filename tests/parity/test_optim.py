"""Learning rates and parameter groups of the published system, number for number."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from aitok_jax.convert import rules
from aitok_jax.training import optim

TOLERANCE = 1e-6


def _config_of(hp: dict) -> tuple[ConfigDict, int]:
    """Our configuration and number of steps for the hyper-parameters of one table."""
    if "lr_config" in hp:
        table, lr, steps = hp["lr_config"], hp["base_lr"], hp["max_iters"]
        if table["policy"] == "Step":
            every = table["step"]
            boundaries = every if isinstance(every, list) else list(range(every, steps, every))
            schedule = {"name": "step", "boundaries": boundaries, "factor": table.get("gamma", 0.1)}
        elif table["policy"] == "LinearAnnealing":
            end = table["min_lr_ratio"] if "min_lr_ratio" in table else table["min_lr"] / lr
            schedule = {"name": "linear", "end_factor": end}
        else:
            raise NotImplementedError(f"policy {table['policy']}")
        warmup = table.get("warmup_iters", 0) if table.get("warmup") else 0, table.get("warmup_ratio", 0.1)
    elif "gamma" in hp:
        lr, steps, warmup = hp["lr"], hp["iters_per_epoch"] * hp["epochs_shown"], (0, 1.0)
        schedule = {"name": "exponential", "factor": hp["gamma"], "every": hp["schedule_step"]}
        schedule["steps_per_epoch"] = hp["iters_per_epoch"]
    else:
        lr, steps, warmup = hp["lr"], hp["t_initial"], (hp["warmup_t"], hp["warmup_lr_init"] / hp["lr"])
        schedule = {"name": "cosine", "end_factor": hp["lr_min"] / lr, "lag": 1}
    return ConfigDict(
        {"learning_rate": lr, "warmup_steps": warmup[0], "warmup_ratio": warmup[1], "schedule": schedule}
    ), steps


@cases.find("lr_tables*")
def test_learning_rates(name):
    tables = cases.load(name)
    for name, hp in tables.hp.items():
        expected = tables[f"{name}/lr"]
        steps = tables[f"{name}/iters"] if f"{name}/iters" in tables else np.arange(len(expected))
        config, train_steps = _config_of(hp)
        schedule = jax.jit(jax.vmap(optim.make_schedule(config, train_steps)))
        actual = np.asarray(schedule(jnp.asarray(steps, jnp.int32)), np.float64)
        np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, err_msg=name)


def _ours(name: str) -> str:
    """Our path of a trained parameter inside `params`."""
    root, *path = rules.locate(name)
    assert root == "params", name
    return "/".join(path)


def _ours_tree(shapes: dict[str, list[int]]) -> dict:
    tree = {}
    for name, shape in shapes.items():
        *folders, leaf = _ours(name).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return tree


def _at(tree: dict, path: str):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@cases.find("optim_groups*", ".json")
def test_parameter_groups(name):
    groups = json.loads((cases.directory() / f"{name}.json").read_text())
    meta = groups.pop("meta")
    for model, decays in groups.items():
        for rate, expected in decays.items():
            # Where a model's shapes are not listed under its own name, they are under the start of it (swinv2b_depth).
            shapes = next(meta[key] for key in meta if key.startswith("shapes_") and model.startswith(key[7:]))
            params = _ours_tree({name: shapes[name] for name in expected})
            scales, mask = optim.layer_scales(params, float(rate)), optim.decay_mask(params)
            assert len(jax.tree.leaves(params)) == len(expected), "two published names map to one of ours"
            for name, (scale, weight_decay) in expected.items():
                path = _ours(name)
                assert _at(scales, path) == pytest.approx(scale, rel=TOLERANCE), (model, rate, name)
                assert _at(mask, path) == (weight_decay > 0), (model, rate, name)
