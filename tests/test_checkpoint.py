import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from aitok_jax.parallel import sharding
from aitok_jax.training import checkpoint
from aitok_jax.training.state import TrainState

OPTIMIZER = optax.adam(1e-2)


def _config(**changes):
    task = ConfigDict({"name": "toy", "width": 4, "sizes": (1, 2)})
    base = {"name": "toy", "seed": 0, "batch_size": 8, "train_steps": 5, "optim": {"name": "adam"}, "task": task}
    base |= {"best_metric": "", "best_mode": "min"}
    return ConfigDict(base | changes)


def _state(width=4, ema_decay=0.5):
    params = {"dense": {"kernel": jnp.arange(3.0 * width).reshape(3, width), "bias": jnp.ones(width)}}
    state = TrainState.create(params, {"count": jnp.array(7)}, OPTIMIZER, ema_decay)
    grads = jax.tree.map(jnp.ones_like, params)
    return state.apply_gradients(grads, state.model_state, OPTIMIZER, ema_decay)


def _abstract(state, mesh):
    shardings = sharding.state_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _save(folder, state, config=None):
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, state, config or _config())
        manager.wait_until_finished()


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_state_comes_back_on_other_devices(tmp_path, monkeypatch, ema_decay):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 1)
    state = _state(ema_decay=ema_decay)
    eight = sharding.make_mesh(fsdp=4)
    _save(tmp_path, jax.device_put(state, sharding.state_shardings(state, eight)))
    for mesh in (eight, sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])):
        with checkpoint.open_manager(tmp_path) as manager:
            restored = checkpoint.restore_latest(manager, _abstract(state, mesh), _config())
        _assert_equal(restored, state)
        kernel = restored.params["dense"]["kernel"]
        assert kernel.sharding.mesh.size == mesh.size
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp")


def test_nothing_to_restore_is_none(tmp_path):
    state = _state()
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint.restore_latest(manager, _abstract(state, sharding.make_mesh())) is None


def test_saved_values_survive_donation(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.device_put(_state(), sharding.replicated(sharding.make_mesh()))
    expected = jax.tree.map(np.array, state)
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, _config())
        for _ in range(20):
            state = update(state)
        manager.wait_until_finished()
        restored = checkpoint.restore_latest(manager, _abstract(state, sharding.make_mesh()))
    _assert_equal(restored, expected)


def test_only_the_latest_are_kept(tmp_path):
    state = _state()
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, state.replace(step=jnp.array(step)), _config())
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [2, 3]


def test_inference_weights_need_no_template(tmp_path):
    state = _state()
    _save(tmp_path, state)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        config, variables = checkpoint.load_inference(path)
        assert config.task.parts.to_dict() == {"toy": {"name": "toy", "width": 4, "sizes": [1, 2]}}
        _assert_equal(variables, {"params": state.ema_params, "model_state": state.model_state})
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
    assert not np.array_equal(variables["params"]["dense"]["bias"], state.params["dense"]["bias"])


def test_absent_checkpoints_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; give a run directory"):
        checkpoint.load_inference(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    _save(tmp_path, _state())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 in .*; there are \[1\]"):
        checkpoint.load_inference(tmp_path, step=9)


def test_weights_alone_cannot_be_resumed(tmp_path):
    state = _state()
    variables = {"params": state.params, "model_state": state.model_state}
    checkpoint.save_inference(tmp_path, variables, _config())
    _assert_equal(checkpoint.load_inference(tmp_path)[1], variables)
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"no training state; train elsewhere with config.start_from"),
    ):
        checkpoint.restore_latest(manager, _abstract(state, sharding.make_mesh()))


def test_another_configuration_is_refused_and_named(tmp_path, caplog):
    state = _state()
    _save(tmp_path, state)
    other = _config(seed=1, train_steps=50, task=ConfigDict({"name": "toy", "width": 5, "sizes": (1, 2)}))
    abstract = _abstract(state, sharding.make_mesh())
    with checkpoint.open_manager(tmp_path) as manager:
        with pytest.raises(ValueError, match="another configuration") as error:
            checkpoint.restore_latest(manager, abstract, other)
        assert "config.task.width: 4 there, 5 now" in str(error.value)
        assert "config.seed: 0 there, 1 now" in str(error.value)
        assert "train_steps" not in str(error.value)
        with caplog.at_level(logging.INFO):
            task = ConfigDict({"name": "toy", "width": 4, "sizes": (1, 2), "dtype": "bfloat16", "remat": "blocks"})
            assert checkpoint.restore_latest(manager, abstract, _config(train_steps=50, task=task)) is not None
        assert "config.train_steps: 5 there, 50 now" in caplog.text
        assert "config.task.remat: None there, 'blocks' now" in caplog.text


def test_other_shapes_name_parameter_and_both_shapes(tmp_path):
    _save(tmp_path, _state(width=4))
    with checkpoint.open_manager(tmp_path) as manager:
        wanted = _abstract(_state(width=5), sharding.make_mesh())
        with pytest.raises(ValueError, match=r"params/dense/kernel: \(3, 4\) in the checkpoint, \(3, 5\) here"):
            checkpoint.restore_latest(manager, wanted)
        wanted = _abstract(_state(ema_decay=0.0), sharding.make_mesh())
        with pytest.raises(ValueError, match="ema_params/dense/bias: only in the checkpoint"):
            checkpoint.restore_latest(manager, wanted)


def _truncate(folder):
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "empty": _empty,
    "truncated state": lambda folder: _truncate(folder / "state"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no data": lambda folder: [shutil.rmtree(path) for path in folder.glob("*/d")],
    "half of config": lambda folder: os.truncate(folder / "config" / "metadata", 40),
    "no metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "all files empty": lambda folder: [os.truncate(path, 0) for path in folder.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    folder, state = tmp_path / "checkpoints", _state()
    steps = {step: state.replace(step=jnp.array(step)) for step in (1, 2)}
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for each in steps.values():
            checkpoint.save(manager, each, _config())
    DAMAGE[damage](folder / "2")
    abstract = _abstract(state, sharding.make_mesh())
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        _assert_equal(checkpoint.restore_latest(manager, abstract, _config()), steps[1])
        assert f"{folder / '2'} cannot be read" in caplog.text
        assert f"going on from {folder / '1'} instead, and keeping the other as 2.damaged" in caplog.text
        assert (folder / "2.damaged").is_dir()
        checkpoint.save(manager, steps[2], _config())
        checkpoint.finish(manager)
        _assert_equal(checkpoint.restore_latest(manager, abstract, _config()), steps[2])
    DAMAGE[damage](folder / "2")
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.restore_latest(manager, abstract, _config())
    assert (folder / "2.damaged+").is_dir()


@pytest.mark.parametrize("damage", ["truncated weights", "empty"])
def test_damaged_weights_give_way_to_those_before(tmp_path, caplog, damage):
    folder, state = tmp_path / "checkpoints", _state()
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2):
            checkpoint.save(manager, state.replace(step=jnp.array(step)), _config())
    if damage == "empty":
        _empty(folder / "2" / "inference")
    else:
        _truncate(folder / "2" / "inference")
    _assert_equal(checkpoint.load_inference(tmp_path)[1]["params"], state.ema_params)
    assert f"{folder / '2'} cannot be read" in caplog.text
    assert f"using {folder / '1'} instead" in caplog.text
    with pytest.raises(checkpoint.DamagedError, match="2 cannot be read"):
        checkpoint.load_inference(tmp_path, step=2)


def test_when_no_checkpoint_can_be_read_nothing_is_touched(tmp_path):
    _save(tmp_path, _state())
    _truncate(tmp_path / "checkpoints" / "1" / "state")
    before = sorted(tmp_path.rglob("*"))
    abstract = _abstract(_state(), sharding.make_mesh())
    with (
        checkpoint.open_manager(tmp_path) as manager,
        pytest.raises(
            checkpoint.DamagedError, match=r"no checkpoint in .* can be read; bring back a copy, or start anew"
        ),
    ):
        checkpoint.restore_latest(manager, abstract, _config())
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_cut_off_save_has_left_is_removed_with_a_warning(tmp_path, caplog):
    left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    _save(tmp_path, _state())
    assert not left.exists()
    assert f"{left} is a save that was cut off; removed" in caplog.text


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_the_best_weights_are_kept_apart(tmp_path, mode, best):
    config = _config(best_metric="toy/rmse", best_mode=mode)
    for step, value in enumerate([0.5, 0.3, float("nan"), 0.9, 0.3], 1):
        state = jax.tree.map(lambda x, step=step: jnp.full_like(x, step), _state())
        checkpoint.save_best(tmp_path, step, {"toy/rmse": value, "toy/other": -step}, state, config)
    _, variables = checkpoint.load_inference(tmp_path / "best")
    assert {float(leaf.flat[0]) for leaf in jax.tree.leaves(variables)} == {best}
    assert [path.name for path in (tmp_path / "best").iterdir()] == [str(best)]
    with pytest.raises(ValueError, match="best_metric='toy/rmse' is not measured; use one of toy/other"):
        checkpoint.save_best(tmp_path, 6, {"toy/other": 1.0}, state, config)
    checkpoint.save_best(tmp_path, 7, {"toy/other": 1.0}, state, _config())
    other = _config(best_metric="toy/other", best_mode=mode)
    (tmp_path / "best" / str(best) / "metrics" / "metrics").write_text("")
    with pytest.raises(checkpoint.DamagedError, match=r"best cannot be read .*delete it, and the same command goes on"):
        checkpoint.save_best(tmp_path, 8, {"toy/other": 1.0}, state, other)
    shutil.rmtree(tmp_path / "best")
    checkpoint.save_best(tmp_path, 8, {"toy/other": 1.0}, state, other)
    assert checkpoint.latest_step(tmp_path / "best") == 8
