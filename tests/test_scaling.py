"""One device, eight, sharded parameters and micro-batches: the same losses and codebook, a quarter of the memory."""

import re
from types import SimpleNamespace

import config_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.parallel import overview, sharding
from aitok_jax.training import loop, optim
from aitok_jax.training.state import TrainState

STEPS, BATCH, SIZE = 20, 16, 16
TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 1, "num_codes": 8, "code_dim": 8}
OPTIM = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "layer_decay": 1.0,
    "clip_norm": 1.0,
    "warmup_steps": 2,
    "warmup_ratio": 0.1,
    "schedule": {"name": "constant"},
}
KINDS = {  # without randomness, and with losses that are means over the examples: what micro-batches do not change
    "tokenizer": {"name": "depth_tokenizer", "image_size": SIZE, "mask_ratio": 0.0, "tokenizer": TOKENIZER},
    "solver": {
        "name": "depth",
        "image_size": SIZE,
        "aux_weight": 0.0,
        "tokenizer": TOKENIZER,
        "backbone": {
            "embed_dim": 8,
            "depths": (1, 1),
            "num_heads": (2, 2),
            "windows": (2, 2),
            "pretrain_windows": (2, 2),
            "use_shift": (True, False),
        },
        "transformer": {
            "dim": 16,
            "num_heads": 2,
            "hidden": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "drop_path": 0.0,
            "dropout": 0.0,
        },
        "vocabulary": {"num_bins": 4, "num_classes": 2, "codes": (("mask", 2),)},
    },
}


def run_of(kind, devices=8, fsdp=1, accumulate=1):
    config = {"seed": 0, "train_steps": STEPS, "optim": OPTIM, "ema_decay": 0.9, "accumulate": accumulate}
    config["start_from"] = {}
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    return SimpleNamespace(config=ConfigDict(config), task=tasks.build(KINDS[kind]), mesh=mesh)


def batch(run, step):
    rng = np.random.default_rng(step)
    depth = rng.uniform(1, 9, (BATCH, 4, 4)).repeat(SIZE // 4, 1).repeat(SIZE // 4, 2).astype(np.float32)
    example = {"image": (depth[..., None] / 10 * np.ones(3, np.float32)) ** 2, "depth": depth}
    return dict.fromkeys(run.task.parts, example)


def losses(run, start):
    """The losses of all steps, and the state after them."""
    optimizer = optim.make_optimizer(run.config.optim, STEPS)
    shardings = sharding.state_shardings(start, run.mesh)
    state = jax.device_put(jax.tree.map(jnp.array, start), shardings)
    step, values = loop.make_step(run, optimizer, shardings), []
    for number in range(STEPS):
        state, metrics = step(state, sharding.shard_batch(batch(run, number), run.mesh), loop.random_key(run.config))
        values.append(float(metrics["loss"]))
    return np.array(values), state


@pytest.fixture(scope="module", params=KINDS)
def reference(request):
    """The kind, the state at the start, and what one device makes of it."""
    run = run_of(request.param, devices=1)
    example = sharding.shard_batch(batch(run, 0), run.mesh)
    optimizer = optim.make_optimizer(run.config.optim, STEPS)
    start, _ = loop.restore_or_init(run, None, optimizer, example)
    start = jax.tree.map(np.array, start)
    return request.param, start, *losses(run, start)


@pytest.mark.parametrize("how", [{}, {"fsdp": 4}, {"accumulate": 2}], ids=["data", "fsdp", "micro-batches"])
def test_eight_devices_train_as_one_does(reference, how, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 1)
    kind, start, expected, expected_state = reference
    values, state = losses(run_of(kind, **how), start)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(s.model_state) for s in (state, expected_state)), strict=True):
        shards = [np.asarray(shard.data) for shard in ours.addressable_shards]
        assert not ours.is_fully_replicated or all(np.array_equal(shard, shards[0]) for shard in shards)
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=1e-6)
    if "fsdp" in how:
        whole = sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.is_fully_replicated)
        assert whole < 0.1 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("backbone", ["swin_b", "swin_l"])
def test_a_quarter_of_the_memory(backbone):
    """Of the published solvers, by their shapes: parameters, optimizer and moving average on a device."""
    config = config_files.load("nyu", f"backbone={backbone}")
    task, optimizer = tasks.build(config.task), optim.make_optimizer(config.optim, config.train_steps)
    images = {"image": np.zeros((1, 480, 480, 3), np.float32), "depth": np.zeros((1, 480, 480), np.float32)}
    images = {"depth": images}

    def create():
        return TrainState.create(*task.init(jax.random.key(0), images), optimizer, ema_decay=0.9)

    state = jax.eval_shape(create)
    whole, quarter = (
        overview.state_memory(state, sharding.state_shardings(state, sharding.make_mesh(fsdp))) for fsdp in (1, 4)
    )
    assert whole["parameters"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=1e-4)
    for part in ("parameters", "optimizer", "moving average"):
        assert whole[part] >= 3.8 * quarter[part]


def test_muon_keeps_its_stacks_split():
    """Its state is one stack of matrices of a size, [number, rows, columns]."""
    params = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((256, 512), np.float32)} for i in range(3)}
    optimizer = optim.make_optimizer(ConfigDict({**OPTIM, "name": "muon"}), STEPS)
    state, mesh = jax.eval_shape(optimizer.init, params), sharding.make_mesh(4)
    stack = next(leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3)
    assert stack.shape == (3, 256, 512)
    assert sharding.state_shardings(stack, mesh).shard_shape(stack.shape) == (3, 256, 128)


def test_the_table_shows_what_lies_where():
    params = {"dense": {"kernel": np.zeros((256, 1024), np.float32), "bias": np.zeros(1024, np.float32)}}
    mesh = sharding.make_mesh(4)
    table = overview.parameter_table(params, sharding.state_shardings(params, mesh))
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert rows[1:] == [
        ["dense/bias", "1024", "-", "4.0 KiB", "4.0 KiB"],
        ["dense/kernel", "256×1024", "axis 1 over fsdp", "1.0 MiB", "256.0 KiB"],
        ["2 parameters", "263,168", "1.0 MiB", "260.0 KiB"],
    ]
