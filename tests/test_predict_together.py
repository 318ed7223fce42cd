"""Several tasks of one image, asked for at once."""

import json

import jax
import numpy as np
import pytest
import tiny_runs
from PIL import Image

from aitok_jax import Predictor, tasks
from aitok_jax.predict.__main__ import main
from aitok_jax.predict.outputs import Results
from aitok_jax.tasks import solver
from aitok_jax.tasks.base import compiled_predict, variable_shapes

MAP = {"image_size": 32, "tokenizer": tiny_runs.TOKENIZER}
CODES = [["mask", 5], *([name, 5] for name in ("depth", "normals", "semantic"))]
TASK = {
    "name": "solver",
    "shared": tiny_runs.SHARED | {"vocabulary": tiny_runs.SIZES | {"codes": CODES}},
    "parts": {
        "depth": MAP,
        "normals": MAP,
        "semantic": {**MAP, "classes": ["wall", "floor", "lamp"], "flip": False},
        "instances": {**tiny_runs.OBJECTS, "tokenizer": tiny_runs.MASKS},
    },
}


@pytest.fixture(scope="module")
def predictor():
    task = tasks.build(TASK)
    leaves, tree = jax.tree.flatten(variable_shapes(task))
    rng = np.random.default_rng(8)
    weights = tree.unflatten(np.float32(rng.normal(0, 0.3, x.shape)) for x in leaves)
    return Predictor(task, weights["params"], weights["model_state"], tiny_runs.CATEGORIES)


def photo(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def assert_same(found, alone):
    assert found.keys() == alone.keys()
    for name, values in alone.items():
        if name == "names":
            assert values == found[name]
        else:
            np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


def test_each_task_says_what_it_says_alone(predictor):
    images, names = [photo(48, 64), photo(40, 40)], ("normals", "instances", "depth", "semantic")
    together = predictor(images, names)
    assert [tuple(result) for result in together] == 2 * [names]
    for name in names:
        for found, alone in zip(together, predictor(images, name), strict=True):
            assert_same(found[name], alone)
    (one,) = predictor(images[:1], ("depth",))
    assert_same(one["depth"], together[0]["depth"])
    assert_same(predictor(images[0], names)["normals"], together[0]["normals"])


def test_views_are_averaged_for_each(predictor):
    image, names = photo(48, 64), ("depth", "semantic")
    together = predictor(image, names, augment=True)
    for name in names:
        assert_same(together[name], predictor(image, name, augment=True))


def test_the_backbone_runs_once_for_maps_that_see_images_alike(predictor, monkeypatch):
    runs, memory = [], solver.memory
    monkeypatch.setattr(solver, "memory", lambda *args: runs.append(args) or memory(*args))
    image = photo(32, 32)
    for names, count in (("depth",), 1), (("depth", "normals"), 1), (("depth", "normals", "semantic"), 2):
        runs.clear()
        compiled_predict.cache_clear()
        predictor(image, names)
        assert len(runs) == count


def test_what_cannot_be_asked_together(predictor):
    image = photo(32, 32)
    with pytest.raises(ValueError, match=r"task=\(\) names nothing; give one or more of 'depth', "):
        predictor(image, ())
    with pytest.raises(ValueError, match="task='flow' is not among what this model can be asked for: 'depth', "):
        predictor(image, ("depth", "flow"))
    with pytest.raises(ValueError, match="augment=True is for maps, not for task='instances'"):
        predictor(image, ("depth", "instances"), augment=True)


@pytest.fixture
def command(predictor, monkeypatch, tmp_path):
    monkeypatch.setattr(Predictor, "load", lambda path: predictor)
    for name in "ab":
        Image.fromarray(photo(32, 40)).save(tmp_path / f"{name}.png")
    return [
        "--checkpoint=any",
        "--image",
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        f"--out={tmp_path / 'out'}",
    ]


def test_the_command_writes_files_of_every_task(command, predictor, tmp_path):
    assert main([*command, "--task=depth,normals,instances", "--ply_fov=60"]) == 0
    endings = ["depth.npy", "depth.png", "depth_confidence.npy", "depth_panel.png", "depth_points.ply", "normals.npy"]
    endings += ["normals.png", "normals_confidence.npy", "normals_panel.png", "instances.json", "instances_panel.png"]
    names = {f"{stem}_{ending}" for stem in "ab" for ending in endings}
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == names | {"results.json", "categories.json", Results.INDEX}
    expected = predictor(photo(32, 40), ("depth", "normals"))
    for task in expected:
        for name, file in ((task, f"a_{task}.npy"), ("confidence", f"b_{task}_confidence.npy")):
            np.testing.assert_allclose(np.load(out / file), expected[task][name], atol=1e-5)
    found = [json.loads((out / f"{stem}_instances.json").read_text()) for stem in "ab"]
    assert json.loads((out / "results.json").read_text()) == [*found[0], *found[1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=depth,instances,detection"], "instances and detection are the same objects; give one of them"),
        (["--task=depth,flow"], "task='flow' is not among"),
        (["--task=depth,instances", "--augment"], "--augment is for maps, not for --task=instances"),
        (
            ["--task=normals,instances", "--ply_fov=60"],
            "--ply_fov is for maps of distances, not for --task=normals,inst",
        ),
        (
            ["--task=depth,normals", "--annotations=x.json"],
            "--annotations is for objects, not for --task=depth,normals",
        ),
    ],
)
def test_what_the_command_refuses(command, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
