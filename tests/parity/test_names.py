"""Every parameter of the published models has exactly one counterpart of the right shape; nothing is allocated."""

import json

import cases
import jax
import numpy as np
import pytest

import configs
from aitok_jax import tasks
from aitok_jax.convert import rules
from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.models.vqvae import VQVAE

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


def split(variables, prefix: str = "") -> dict[str, tuple[int, ...]]:
    variables = dict(variables)
    params = variables.pop("params")
    return flat_shapes(params, f"{prefix}params") | flat_shapes(variables, f"{prefix}model_state")


def vqvae_shapes(model: VQVAE, size: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return split(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 1), np.float32)), prefix)


def depth_vqvae(prefix=""):
    return vqvae_shapes(VQVAE(), 480, prefix)


def mask_vqvae(prefix=""):
    return vqvae_shapes(VQVAE(downsample=16, objective="mse", use_norm=True, max_value=1.0), 64, prefix)


def solver_shapes(size: int, backbone: SwinV2, vocab_size: int):
    solver = TaskSolver(backbone, TokenTransformer(vocab_size=vocab_size))
    images, tokens = np.zeros((1, size, size, 3), np.float32), np.zeros((1, 4), np.int32)
    return split(jax.eval_shape(lambda rng: solver.init(rng, images, tokens, 2), jax.random.key(0)))


def config_shapes(arg: str):
    """Of the depth task that `configs/nyu.py:arg` builds."""
    task = tasks.build(configs.load("nyu", arg).task)
    size = task.image_size
    batch = {"image": np.zeros((1, size, size, 3), np.float32), "depth": np.zeros((1, size, size), np.float32)}
    params, state = jax.eval_shape(task.init, jax.random.key(0), batch)
    return flat_shapes(params, "params") | flat_shapes(state, "model_state")


SWIN_B = SwinV2()
OURS = {
    "vqvae_depth": depth_vqvae,
    "vqvae_insseg": mask_vqvae,
    "depth_b": lambda: config_shapes(""),
    "depth_l_parallel": lambda: config_shapes("backbone=swin_l,parallel"),
    "det_b": lambda: solver_shapes(640, SWIN_B, 2339),
    "insseg_b": lambda: solver_shapes(640, SWIN_B, 2467) | mask_vqvae("model_state/mask_tokenizer/"),
    "joint_b": lambda: (
        solver_shapes(640, SWIN_B, 2467)
        | mask_vqvae("model_state/mask_tokenizer/")
        | depth_vqvae("model_state/depth_tokenizer/")
    ),
}


@pytest.mark.skipif(not NAMES.is_file(), reason=f"no {NAMES}")
@pytest.mark.parametrize("kind", OURS)
def test_names_and_shapes(kind):
    ours, theirs = OURS[kind](), published_shapes(kind)
    assert sorted(ours) == sorted(theirs)
    wrong = {path: (shape, theirs[path]) for path, shape in ours.items() if shape != theirs[path]}
    assert not wrong
