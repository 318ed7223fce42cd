"""`aitok_jax/tasks/README.md`: the modality printed there is trained and predicts, by the commands printed there."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from aitok_jax import main
from aitok_jax.command_line import overrides
from aitok_jax.data import scenes
from aitok_jax.image import save_png
from aitok_jax.predict.__main__ import main as predict
from aitok_jax.tasks.modalities import MODALITIES
from aitok_jax.training.keys import run_options

GUIDE = (Path(main.__file__).parent / "tasks" / "README.md").read_text()
(FILE,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def disparity(tmp_path_factory):
    path = tmp_path_factory.mktemp("modality") / "disparity.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("disparity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {"disparity", 5}.isdisjoint({*MODALITIES, *(kind.task_id for kind in MODALITIES.values())})
    MODALITIES["disparity"] = module.Disparity
    yield module.Disparity()
    del MODALITIES["disparity"]


@pytest.fixture(scope="module")
def trained(disparity, tmp_path_factory):
    """By the first command, a few steps of a tiny model."""
    folder = tmp_path_factory.mktemp("guide")
    scenes.ensure(folder / "frames", train=12, test=4, height=32, width=40, seed=5, workers=1, format="nyu")
    (folder / "photos").mkdir()
    for path in (folder / "frames").glob("scene_*/rgb_0000[12].jpg"):
        (folder / "photos" / path.name).symlink_to(path)
    train, _ = commands(folder)
    given = dict(word.removeprefix("--").split("=", 1) for word in train)
    config = overrides.load(f"{given.pop('config')},size=32,from={tiny_runs.write(folder, 'depth')}")
    workdir = given.pop("workdir")
    changes = {"config.steps": "3", "config.batch_size": "4", **given}
    overrides.override(config, [(key.removeprefix("config."), text) for key, text in changes.items()], run_options)
    main.run(config, workdir)
    return folder


def commands(folder):
    """The words of the two commands after `python -m`, in this folder."""
    lines = [shlex.split(line) for line in COMMANDS.splitlines()]
    places = {name: str(folder / name) for name in ("runs/disparity", "frames", "photos", "predicted")}
    assert [line[:3] for line in lines] == [["python", "-m", f"aitok_jax.{name}"] for name in ("main", "predict")]
    place = re.compile(f"=({'|'.join(places)})(?=/|$)")
    return [[place.sub(lambda found: f"={places[found[1]]}", word) for word in line[3:]] for line in lines]


def test_it_takes_forty_lines():
    assert len([line for line in FILE.splitlines() if line]) <= 40


def test_its_numbers(disparity, tmp_path):
    """A pixel at two metres, and one where nothing was measured."""
    map_ = disparity.read(png(np.array([[2000, 0]], np.uint16), tmp_path))
    np.testing.assert_allclose(map_, [[0.5, 0]])
    np.testing.assert_array_equal(disparity.valid(disparity.finish(disparity.encode(map_))), [[True, False]])
    (loss,) = disparity.auxiliary(disparity.encode(map_[None] + 0.25), map_[None]).values()
    assert float(loss) == pytest.approx(0.25)
    assert disparity.auxiliary(disparity.encode(map_[None]), 0 * map_[None])["l1"] == 0
    assert disparity.zoomed(map_, 2.0)[0, 0] == 0.25


def test_both_stages_are_trained_and_evaluated(trained):
    for stage in ("tokenizer", "disparity"):
        metrics = json.loads((trained / f"runs/disparity/{stage}/metrics.json").read_text())
        assert 0 < metrics["disparity/rmse"] < 10
    assert metrics["baseline/rmse"] > 0
    assert (trained / "runs/disparity/disparity/panels").is_dir()


def test_it_predicts(trained):
    _, words = commands(trained)
    assert predict(words) == 0
    written = sorted((trained / "predicted").glob("*_disparity.npy"))
    assert [np.load(path).shape for path in written] == 2 * [(32, 40)]


def png(values, folder):
    save_png(folder / "depth.png", values)
    return (folder / "depth.png").read_bytes()
