"""Loss and gradient norm of the first three steps of every configuration, in small, against stored numbers.

The numbers are in first_steps.json. Where they changed on purpose, write them again and say why in the commit:

    python tests/published/test_first_steps.py
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.config import translated
from aitok_jax.training import optim
from aitok_jax.training.state import TrainState

STORED = Path(__file__).with_name("first_steps.json")
STEPS, BATCH, TOLERANCE = 3, 2, 1e-4
RUNS = (
    "nyu",
    "nyu:parallel",
    "nyu:soft=false",
    "nyu:tokenizer=bins",
    "coco",
    "coco:task=detection",
    "coco:soft=false",
    "joint",
    "vqvae_depth",
    "vqvae_mask",
    "quickstart/tokenizer",
    "quickstart/mask_tokenizer",
    "quickstart/joint",
    "quickstart:normals/tokenizer",
    "quickstart:normals/normals",
    "quickstart:semantic/tokenizer",
    "quickstart:semantic/semantic",
    "quickstart:all/all",
)
TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 1, "num_codes": 8, "code_dim": 8}
SOLVER = {"dim": 16, "num_heads": 2, "hidden": 16, "encoder_layers": 1, "decoder_layers": 1, "max_length": 64}
PER_STAGE = ("depths", "num_heads", "windows", "pretrain_windows", "use_shift")


def config_of(run: str) -> ConfigDict:
    """Of 'NAME[:ARGUMENTS][/STAGE]', made small; what a set-up says otherwise stays."""
    name, _, stage = run.partition("/")
    name, _, arg = name.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    config = translated(config.stages[stage] if stage else config).to_dict()
    task = config["task"]
    if "shared" in task:
        task["shared"] = small_solver(task["shared"])
    task["parts"] = {name: small_part(part, frozen="shared" in task) for name, part in task["parts"].items()}
    return ConfigDict({**config, "batch_size": dict.fromkeys(task["parts"], BATCH)})


def small_solver(shared: dict) -> dict:
    backbone = {key: value[:1] if key in PER_STAGE else value for key, value in shared["backbone"].items()}
    backbone |= {"patch": 8, "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    if "stem" in backbone:
        backbone |= {"stem": (4,), "stem_blocks": 1}
    vocabulary = {**shared.get("vocabulary", {}), "num_bins": 20, "num_classes": 5}
    if "codes" in vocabulary:
        vocabulary["codes"] = tuple((name, TOKENIZER["num_codes"]) for name, _ in vocabulary["codes"])
    return {**shared, "backbone": backbone, "vocabulary": vocabulary, "transformer": shared["transformer"] | SOLVER}


def small_part(part: dict, frozen: bool) -> dict:
    """`frozen`: the tokenizer is, so that it may be smaller still."""
    small = {"image_size": 16 if part.get("pad_to") else 32}
    if part.get("pad_to"):
        small["pad_to"] = 32
    if "num_objects" in part:
        small |= {"num_objects": 4, "mask_size": 16}
    if part.get("tokenizer"):
        fields = {"downsample": 8, "num_codes": 8} if part["tokenizer"].get("kind") == "bins" else TOKENIZER
        small["tokenizer"] = (
            part["tokenizer"] | fields | ({"num_res_blocks": 0} if frozen and fields is TOKENIZER else {})
        )
    return part | small


def batch_of(part, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random numbers of the shapes and ranges of a training batch."""
    side = (BATCH, part.image_size, part.image_size)
    if part.kind == "masks":
        return {"instance": np.float32(rng.random(side) < 0.5)}
    batch = {"image": np.float32(rng.random((*side, 3)))}
    if part.kind == "maps":
        annotated = rng.random(side) < 0.9
        depth = np.float32(rng.uniform(0.5, 9.5, side) * annotated)
        vectors = rng.normal(size=(*side, 3))
        vectors *= annotated[..., None] / np.linalg.norm(vectors, axis=-1, keepdims=True)
        maps = {"depth": depth, "normals": np.float32(vectors)}
        if part.modality.name == "semantic":
            maps["semantic"] = np.float32(np.where(annotated, rng.integers(0, part.modality.channels, side), 255))
        return batch | {part.modality.name: maps[part.modality.name]}
    n, size = part.num_objects, part.mask_size
    corners = np.sort(rng.uniform(0, part.image_size, (2, BATCH, n, 2)), axis=0)
    kind = np.int32(rng.integers(0, 3, (BATCH, n)))
    kind[:, 0] = 0
    return batch | {
        "objects/boxes": np.float32(np.concatenate(list(corners), -1)),
        "objects/classes": np.int32(rng.integers(0, 5, (BATCH, n))),
        "objects/kind": kind,
        "objects/crops": np.uint8(rng.random((BATCH, n, size, size)) < 0.5),
    }


def weight(path, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """Random; the counts of a codebook are positive."""
    numbers = rng.uniform(1, 2, shape) if path[-1].key == "cluster_size" else rng.normal(0, 0.3, shape)
    return jnp.asarray(numbers, jnp.float32)


def first_steps(name: str) -> dict[str, list[float]]:
    config = config_of(name)
    task, rng = tasks.build(config.task), np.random.default_rng(0)
    batches = [{part: batch_of(task.parts[part], rng) for part in task.parts} for _ in range(STEPS)]
    optimizer = optim.make_optimizer(config.optim, config.train_steps)
    gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    shapes = jax.eval_shape(task.init, jax.random.key(0), batches[0])
    weights = jax.tree_util.tree_map_with_path(lambda path, x: weight(path, x.shape, rng), shapes)
    state = jax.jit(lambda weights: TrainState.create(*weights, optimizer, config.ema_decay))(weights)

    @jax.jit
    def update(state, grads, model_state):
        return state.apply_gradients(grads, model_state, optimizer, config.ema_decay), optax.global_norm(grads)

    found = {"loss": [], "grad_norm": []}
    for i, batch in enumerate(batches):
        (loss, (_, model_state)), grads = gradient(state.params, state.model_state, batch, jax.random.key(i))
        state, norm = update(state, grads, model_state)
        found["loss"].append(float(loss))
        found["grad_norm"].append(float(norm))
    return found


@pytest.mark.parametrize("run", RUNS)
def test_first_steps(run):
    found, stored = first_steps(run), json.loads(STORED.read_text())[run]
    np.testing.assert_allclose(
        [found["loss"], found["grad_norm"]],
        [stored["loss"], stored["grad_norm"]],
        rtol=TOLERANCE,
        err_msg=f"{run}: training has changed (loss, gradient norm). If nobody meant it, it is a bug: find it. If it "
        "is meant, write the numbers again with `python tests/published/test_first_steps.py` and say why.",
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    STORED.write_text(json.dumps({run: first_steps(run) for run in RUNS}, indent=1) + "\n")
