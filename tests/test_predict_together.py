"""Several tasks of one image, asked for at once."""

import jax
import numpy as np
import pytest
import tiny_runs

from aitok_jax import Predictor, tasks
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
    (one,) = predictor(images[:1], ["depth"])
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
