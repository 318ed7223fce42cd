"""One device, eight, sharded parameters and micro-batches: the same losses and codebook, a quarter of the memory."""

import copy
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import configs
from aitok_jax import optim, overview, sharding, tasks, train
from aitok_jax.train_state import TrainState

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
KINDS = {
    "tokenizer": {"name": "depth_tokenizer", "image_size": SIZE, "mask_patch": 8, "tokenizer": TOKENIZER},
    "solver": {
        "name": "depth",
        "image_size": SIZE,
        "input_noise": 0.3,
        "tokenizer": TOKENIZER,
        "backbone": {
            "embed_dim": 8,
            "depths": (1, 1),
            "num_heads": (2, 2),
            "windows": (2, 2),
            "pretrain_windows": (2, 2),
            "use_shift": (True, False),
            "drop_path": 0.1,
        },
        "transformer": {"dim": 16, "num_heads": 2, "hidden": 16, "encoder_layers": 1, "decoder_layers": 1},
        "vocabulary": {"num_bins": 4, "num_classes": 2, "num_mask_codes": 2},
    },
}
# Without randomness, and with losses that are means over the examples: what micro-batches do not change
PLAIN = {
    "tokenizer": {"mask_ratio": 0.0},
    "solver": {"input_noise": 0.0, "aux_weight": 0.0},
}


def run_of(kind, plain=False, **changes):
    fields = copy.deepcopy(KINDS[kind]) | (PLAIN[kind] if plain else {})
    if plain and kind == "solver":
        fields["backbone"]["drop_path"] = 0.0
        fields["transformer"] |= {"drop_path": 0.0, "dropout": 0.0}
    config = {
        "seed": 0,
        "train_steps": STEPS,
        "optim": OPTIM,
        "ema_decay": 0.9,
        "accumulate": 1,
        "fsdp": 1,
        "devices": 8,
    }
    config = ConfigDict({**config, **changes})
    mesh = sharding.make_mesh(config.fsdp, jax.devices()[: config.devices])
    return SimpleNamespace(config=config, task=tasks.build(fields), mesh=mesh)


def batch(step):
    rng = np.random.default_rng(step)
    depth = rng.uniform(1, 9, (BATCH, 4, 4)).repeat(SIZE // 4, 1).repeat(SIZE // 4, 2).astype(np.float32)
    return {"image": (depth[..., None] / 10 * np.ones(3, np.float32)) ** 2, "depth": depth}


def losses(run):
    """The losses of all steps, and the state after them."""
    optimizer = optim.make_optimizer(run.config.optim, STEPS)
    example = sharding.shard_batch(batch(0), run.mesh)
    no_checkpoint = SimpleNamespace(latest_step=lambda: None)
    state, shardings = train.restore_or_init(run, no_checkpoint, optimizer, example)
    step, values = train.make_step(run, optimizer, shardings), []
    for number in range(STEPS):
        state, metrics = step(state, sharding.shard_batch(batch(number), run.mesh))
        values.append(float(metrics["loss"]))
    return np.array(values), state


@pytest.fixture(scope="module", params=["tokenizer", "solver"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def one_device(kind):
    return losses(run_of(kind, devices=1))


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_train_as_one_does(kind, one_device, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 1)
    expected, reference = one_device
    values, state = losses(run_of(kind, fsdp=fsdp))
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    _assert_same_codebooks(state, reference)
    if fsdp > 1:
        sharded = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
        assert sum(leaf.size for leaf in sharded) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_micro_batches_train_as_the_whole_batch_does(kind):
    expected, reference = losses(run_of(kind, plain=True, devices=1))
    values, state = losses(run_of(kind, plain=True, accumulate=2))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    _assert_same_codebooks(state, reference)


@pytest.mark.parametrize("backbone", ["swin_b", "swin_l"])
def test_a_quarter_of_the_memory(backbone):
    """Of the published solvers, by their shapes: parameters, optimizer and moving average on a device."""
    config = configs.load("nyu", f"backbone={backbone}")
    task, optimizer = tasks.build(config.task), optim.make_optimizer(config.optim, config.train_steps)
    images = {"image": np.zeros((1, 480, 480, 3), np.float32), "depth": np.zeros((1, 480, 480), np.float32)}

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


def _assert_same_codebooks(state, reference):
    for ours, theirs in zip(*(jax.tree.leaves(s.model_state) for s in (state, reference)), strict=True):
        shards = [np.asarray(shard.data) for shard in ours.addressable_shards]
        if ours.is_fully_replicated:
            assert all(np.array_equal(shard, shards[0]) for shard in shards)
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=1e-6)
