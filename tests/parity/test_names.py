"""Every parameter of the published models has exactly one counterpart of the right shape; nothing is allocated."""

import json

import cases
import config_files
import jax
import numpy as np
import published
import pytest

from aitok_jax import tasks
from aitok_jax.convert import rules

NAMES = cases.directory() / "names.json"


def published_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Our path -> shape after the change of layout, for every published array that is not derived."""
    arrays = json.loads(NAMES.read_text())["state_dicts"][kind]
    shapes = {}
    for name, (shape, dtype) in arrays.items():
        path = rules.locate(name)
        if path is None:
            continue
        stand_in = np.broadcast_to(np.zeros((), dtype), shape)
        assert "/".join(path) not in shapes, f"two published names for {path}"
        shapes["/".join(path)] = rules.to_layout(path, stand_in).shape
    return shapes


def flat_shapes(tree, prefix: str) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join((prefix, *(key.key for key in path))): leaf.shape for path, leaf in leaves}


def example(part) -> dict[str, np.ndarray]:
    """A batch to initialize with."""
    side = (1, part.image_size, part.image_size)
    size = getattr(part, "pad_to", 0) or part.image_size
    batch = {"image": np.zeros((1, size, size, 3), np.float32), "instance": np.zeros(side, np.float32)}
    return batch | ({part.modality.name: np.zeros(side, np.float32)} if part.kind == "maps" else {})


@pytest.mark.parametrize("kind", cases.full_models())
def test_names_and_shapes(kind):
    theirs, task = published_shapes(kind), tasks.build(config_files.load(*published.SET_UPS[kind]).task)
    batches = {name: example(part) for name, part in task.parts.items()}
    params, state = jax.eval_shape(task.init, jax.random.key(0), batches)
    ours = flat_shapes(params, "params") | flat_shapes(state, "model_state")
    assert sorted(ours) == sorted(theirs)
    wrong = {path: (shape, theirs[path]) for path, shape in ours.items() if shape != theirs[path]}
    assert not wrong
