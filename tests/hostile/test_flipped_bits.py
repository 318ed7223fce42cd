"""One flipped bit in what we wrote is noticed, wherever it is."""

import json
import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from aitok_jax import Predictor
from aitok_jax.parallel import sharding
from aitok_jax.training import checkpoint, checksums
from aitok_jax.training.state import TrainState

CONFIG = ConfigDict(
    {"name": "toy", "seed": 0, "batch_size": 8, "task": {"name": "toy"}, "best_metric": "e", "best_mode": "min"}
)
FLIPS = 25


def state(step):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(step), (40, 50)), "bias": jnp.ones(50)}}
    fresh = TrainState.create(params, {"count": jnp.array(7)}, optax.adam(1e-2), 0.5)
    return fresh.replace(step=fresh.step + step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2, and the weights of step 1 as its best."""
    folder = tmp_path_factory.mktemp("run")
    with checkpoint.open_manager(folder, keep=2) as manager:
        for step in (1, 2):
            checkpoint.save(manager, state(step), CONFIG)
        checkpoint.finish(manager)
    checkpoint.save_best(folder, 1, {"e": 0.5}, state(1), CONFIG)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def files(step, *items):
    found = (path for item in items for path in (step / item).rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in found if path.name != "commit_success.txt")


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def restored(run):
    mesh = sharding.make_mesh()
    template = state(0)
    shardings = sharding.state_shardings(template, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
    with checkpoint.open_manager(run, keep=2) as manager:
        return checkpoint.restore_latest(manager, abstract, CONFIG)


def test_a_training_state(run, rng, caplog):
    for _ in range(FLIPS):
        latest = run / "checkpoints" / "2"
        intact = shutil.copytree(latest, run / "intact")
        file = rng.choice(files(latest, "state", "config"))
        flip(file, rng)
        with caplog.at_level(logging.WARNING):
            found = restored(run)
        assert int(found.step) == 1
        np.testing.assert_array_equal(found.params["dense"]["kernel"], state(1).params["dense"]["kernel"])
        assert f"{file} is not as it was written; going on from" in caplog.text
        shutil.rmtree(run / "checkpoints" / "2.damaged")
        intact.rename(latest)
    assert int(restored(run).step) == 2


@pytest.mark.parametrize("place", ["checkpoints/2", "best/1"])
def test_weights(run, place, rng):
    step = run / place
    if place.startswith("checkpoints"):
        shutil.rmtree(run / "checkpoints" / "1")
    for _ in range(FLIPS):
        file = rng.choice(files(step, "inference", "config"))
        content = file.read_bytes()
        flip(file, rng)
        with pytest.raises(checkpoint.DamagedError, match=f"{file} is not as it was written"):
            checkpoint.load_inference(step)
        file.write_bytes(content)
    checkpoint.load_inference(step)


def test_built_in_weights(tmp_path, monkeypatch):
    rng = random.Random(0)
    (step,) = (checkpoint.locate("builtin") / "checkpoints").iterdir()
    copy = shutil.copytree(step, tmp_path / "checkpoints" / step.name)
    for _ in range(40):
        file = rng.choice(files(copy, "inference", "config"))
        content = file.read_bytes()
        flip(file, rng)
        with pytest.raises(checkpoint.DamagedError, match="is not as it was written"):
            Predictor.load(tmp_path)
        file.write_bytes(content)
    assert not checksums.problem(copy, ["inference", "config"])


def test_missing_files_and_checksums(run):
    step = run / "best" / "1"
    file = files(step, "inference")[0]
    content = file.read_bytes()
    file.unlink()
    assert checksums.problem(step, ["inference"]) == f"{file} is missing"
    assert checksums.problem(step, ["config"]) == ""
    file.write_bytes(content)
    sums = step / checksums.FILE
    assert set(json.loads(sums.read_text())) == {
        path.relative_to(step).as_posix()
        for path in step.rglob("*")
        if path.is_file() and path.parent != step and path.name != "commit_success.txt"
    }
    for broken in ("[1]", "{"):
        sums.write_text(broken)
        assert "checksums.json is damaged" in checksums.problem(step, ["inference"])
    sums.unlink()
    assert checksums.problem(step, ["inference"]) == ""  # of a version without checksums
    checkpoint.load_inference(step)


def test_many_chunks(tmp_path, monkeypatch):
    (tmp_path / "inference").mkdir()
    file = tmp_path / "inference" / "x"
    file.write_bytes(bytes(range(256)) * 10)
    whole = checksums._checksum(file)
    monkeypatch.setattr(checksums, "_CHUNK", 7)
    assert checksums._checksum(file) == whole
