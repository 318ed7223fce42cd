"""One solver for depth and instances: the sum of their losses, their own lengths, prediction by part, errors."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_objects as tiny

from aitok_jax import tasks
from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.parallel import sharding
from aitok_jax.tasks import sequences
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.solver import SolverTask

SIZE, DEPTH_SIZE, K = tiny.SIZE, 16, 6
DEPTH_TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 0, "num_codes": K, "code_dim": 4}
VOCABULARY = {**tiny.VOCABULARY, "codes": [["mask", tiny.CODES], ["depth", K]]}
CONFIG = {
    "name": "solver",
    "shared": {**tiny.SHARED, "vocabulary": VOCABULARY},
    "parts": {
        "depth": {"image_size": DEPTH_SIZE, "pad_to": SIZE, "tokenizer": DEPTH_TOKENIZER, "loss_weight": 0.2},
        "instances": tiny.OWN,
    },
}
TASK = tasks.build(CONFIG)
DEPTH, INSTANCES = TASK.parts["depth"], TASK.parts["instances"]
V = TASK.vocabulary.size


def with_parts(**parts):
    """The configuration with other parts."""
    return CONFIG | {"parts": CONFIG["parts"] | parts}


def make_batch(depths, images):
    rng = np.random.default_rng(5)
    depth = rng.uniform(1, 9, (depths, DEPTH_SIZE, DEPTH_SIZE)).astype(np.float32)
    image = rng.random((depths, DEPTH_SIZE, DEPTH_SIZE, 3), np.float32)
    return {"depth": {"image": image, "depth": depth}, "instances": tiny.batch(images)}


@pytest.fixture(scope="module")
def batch():
    return make_batch(4, 2)


@pytest.fixture(scope="module")
def state(batch):
    return tiny.random_state(TASK, batch)


@pytest.fixture
def all_labels_noise(monkeypatch):
    """Label corruption without chance, so that losses can be compared whatever their keys are."""

    def corrupt(rng, vocabulary, tokens_BNL):
        return tokens_BNL.at[..., CLASS_SLOT].set(vocabulary.noise)

    monkeypatch.setattr(sequences, "corrupt_labels", corrupt)


def test_one_set_of_weights_and_both_tokenizers(state):
    params, frozen = state
    assert set(params) == {"backbone", "transformer"}
    assert set(frozen) == {"depth_tokenizer", "mask_tokenizer"}
    assert list(TASK.parts) == ["depth", "instances"]


def test_loss_is_the_sum_of_the_losses_of_the_parts(state, batch, all_labels_noise):
    """Each is normalised and weighted by itself, although the batches differ in size; no image sees another."""
    loss, (metrics, new_state) = jax.jit(TASK.loss)(*state, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, new_state, state[1])
    alone, expected = {}, {}
    for name, part in TASK.parts.items():
        task = dataclasses.replace(TASK, parts={name: part})
        alone[name], (own, _) = jax.jit(task.loss)(*state, {name: batch[name]}, jax.random.key(1))
        expected |= {f"{name}/{metric}": value for metric, value in own.items()}
    assert set(metrics) == set(expected) >= {"depth/silog", "instances/mask_aux"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, alone["depth"] + alone["instances"], rtol=1e-4)
    np.testing.assert_allclose(
        alone["depth"], 0.2 * (metrics["depth/cross_entropy"] + metrics["depth/silog"]), rtol=1e-4
    )


def test_short_sequences_are_not_padded_to_long_ones(state, batch):
    """Four depth maps of 4 tokens and two images of 36: one pass of the backbone, then each at its own length."""
    program = str(jax.make_jaxpr(jax.grad(TASK.loss, has_aux=True))(*state, batch, jax.random.key(0)))
    tokens = tiny.OBJECTS * tiny.LENGTH
    assert f"f32[4,4,{V}]" in program
    assert f"f32[2,{tokens},{V}]" in program
    assert f"f32[6,{SIZE},{SIZE},3]" in program
    assert not re.search(rf"\[[46],{tokens}[,\]]", program)
    assert not re.search(r"\[[24],3,3,8\]", program)  # no part has a pass of its own


def test_depth_images_are_padded_with_zeros_after_scaling(state, batch):
    part = dataclasses.replace(DEPTH, normalize_image=True)
    images = np.asarray(part.inputs(state[1], batch["depth"], jax.random.key(0)).images)
    assert images.shape == (4, SIZE, SIZE, 3)
    np.testing.assert_array_equal(images[:, DEPTH_SIZE:], 0)
    np.testing.assert_array_equal(images[:, :, DEPTH_SIZE:], 0)
    assert np.abs(images[:, :DEPTH_SIZE, :DEPTH_SIZE]).min() > 0


def test_parts_predict_with_the_weights_of_all(state, batch):
    """Whatever the other part's tokenizer holds."""
    shapes = {"depth": {"depth": (4, 16, 16), "confidence": (4, 16, 16)}}
    shapes["instances"] = {"boxes": (2, 4, 4), "classes": (2, 4), "scores": (2, 4), "valid": (2, 4)}
    shapes["instances"]["masks"] = (2, 4, tiny.CROP, tiny.CROP)
    for (name, part), other in zip(TASK.parts.items(), ("mask_tokenizer", "depth_tokenizer"), strict=True):
        poisoned = state[1] | {other: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state[1][other])}
        outputs = compiled_predict(part)(state[0], poisoned, batch[name])
        assert {key: array.shape for key, array in outputs.items()} == shapes[name]
        for key, array in outputs.items():
            assert np.isfinite(array).all(), key


def test_head_of_the_memory_loss_is_a_parameter_of_the_joint_task(batch):
    """It wants unpadded depth images; prediction does without it."""
    depth = CONFIG["parts"]["depth"] | {"image_size": SIZE, "pad_to": 0, "memory_weight": 0.5}
    task = tasks.build(with_parts(depth=depth))
    rng = np.random.default_rng(6)
    maps = {"depth": rng.uniform(1, 9, (3, SIZE, SIZE)).astype(np.float32)}
    maps["image"] = rng.random((3, SIZE, SIZE, 3), np.float32)
    params, frozen = tiny.random_state(task, batch | {"depth": maps})
    assert params["depth_memory_head"]["kernel"].shape == (16, K)
    run = jax.jit(lambda *args: task.loss(*args)[1][0])
    silent = params | {"depth_memory_head": jax.tree.map(jnp.zeros_like, params["depth_memory_head"])}
    ours, other = (run(p, frozen, batch | {"depth": maps}, jax.random.key(0)) for p in (params, silent))
    differing = {name for name in ours if abs(ours[name] - other[name]) > 1e-5}
    assert differing == {"depth/memory_loss"}
    headless = {name: params[name] for name in ("backbone", "transformer")}
    assert compiled_predict(task.parts["instances"])(headless, frozen, batch["instances"])["valid"].all()


def test_loss_is_the_same_on_any_number_of_devices(all_labels_noise):
    """The examples of both tasks are spread over all devices."""
    batch = make_batch(8, 8)
    state = tiny.random_state(TASK, batch)
    run, results = jax.jit(TASK.loss), []
    for devices in (jax.devices(), jax.devices()[:1]):
        mesh = sharding.make_mesh(devices=devices)
        placed = sharding.shard_batch(batch, mesh)
        assert len(placed["instances"]["objects/boxes"].sharding.device_set) == len(devices)
        params, frozen, key = jax.device_put((*state, jax.random.key(7)), sharding.replicated(mesh))
        loss, (metrics, _) = run(params, frozen, placed, key)
        results.append((loss, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *results)


def test_detection_can_be_the_other_part():
    parts = tasks.build(with_parts(instances=tiny.OWN | {"tokenizer": None})).parts
    assert (parts["instances"].task_id, parts["instances"].mask_tokens, parts["depth"].task_id) == (0, 0, 2)


def test_padded_images_must_come_to_one_size():
    """By image_size or pad_to."""
    for fields, size in (({"pad_to": 0}, 16), ({"pad_to": 32}, 32)):
        parts = {"depth": dataclasses.replace(DEPTH, **fields), "instances": INSTANCES}
        with pytest.raises(ValueError, match=rf"one size, by image_size or pad_to; .*'depth': {size}, 'instances': 24"):
            dataclasses.replace(TASK, parts=parts)
    both = dataclasses.replace(DEPTH, pad_to=0, image_size=SIZE)
    assert dataclasses.replace(TASK, parts={"depth": both, "instances": INSTANCES}).parts["depth"] is both


SHARED = r"task.parts.{name}.{key}: give it once, in task.shared"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_parts(tokenizer={}), r"task: 'tokenizer' is unknown; valid: depth, instances, normals"),
        (with_parts(instance={}), r"task: 'instance' is unknown; did you mean 'instances'"),
        (with_parts(depth=CONFIG["parts"]["depth"] | {"pad": 24}), r"MapPart: .*'pad' is unknown; did you mean"),
        (with_parts(instances=tiny.OWN | {"objects": 4}), r"ObjectsPart: .*'objects' is unknown; did you mean"),
        (
            CONFIG | {"shared": CONFIG["shared"] | {"backbones": {}}},
            r"task.shared: 'backbones' is unknown; did you mean 'backbone'",
        ),
        (
            with_parts(depth=CONFIG["parts"]["depth"] | {"transformer": {"hidden": 8}}),
            SHARED.format(name="depth", key="transformer"),
        ),
        (
            with_parts(instances=tiny.OWN | {"vocabulary": {"num_bins": 11}}),
            SHARED.format(name="instances", key="vocabulary"),
        ),
        (CONFIG | {"name": "solvers"}, r"task.name='solvers' is no task"),
    ],
)
def test_configuration_errors(config, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(config)


def test_shared_entries_belong_to_all_parts():
    for part in TASK.parts.values():
        assert part.solver == TASK.solver
        assert part.vocabulary == TASK.vocabulary
    assert TASK.vocabulary.codes == (("mask", tiny.CODES), ("depth", K))
    again = tasks.build(CONFIG)
    assert (again.parts, again.solver) == (TASK.parts, TASK.solver)
    old = tasks.build({"name": "joint", "shared": CONFIG["shared"], **CONFIG["parts"]})
    assert (old.parts, old.solver, old.vocabulary) == (TASK.parts, TASK.solver, TASK.vocabulary)


def test_parts_may_have_names_of_their_own():
    named = {"near": CONFIG["parts"]["depth"] | {"name": "depth"}, "things": tiny.OWN | {"name": "instances"}}
    task = tasks.build(CONFIG | {"parts": named})
    assert task.parts == {"near": DEPTH, "things": INSTANCES}
    assert isinstance(task, SolverTask)


def test_fresh_linear_layers_keep_the_variance_asked_for(batch):
    """Of both backbone and transformer; embeddings, and everything where it is 0, have the published deviation."""
    wide = {**tiny.SHARED, "vocabulary": VOCABULARY, "transformer": {**tiny.SHARED["transformer"], "hidden": 256}}
    fresh = [
        jax.jit(tasks.build(CONFIG | {"shared": {**wide, **more}}).init)(jax.random.key(0), batch)[0]
        for more in ({}, {"init_variance": 0.5})
    ]
    published, scaled = (jax.tree_util.tree_leaves_with_path(params) for params in fresh)
    linear = 0
    for (path, before), (_, after) in zip(published, scaled, strict=True):
        name, factor = jax.tree_util.keystr(path, simple=True, separator="/"), 1.0
        if name.endswith("kernel") and before.ndim == 2:
            linear, factor = linear + 1, (0.5 / before.shape[0]) ** 0.5 / 0.02
        np.testing.assert_allclose(after, before * factor, rtol=1e-5, err_msg=name)
    assert linear > 10
    with pytest.raises(ValueError, match=r"init_variance=-1\.0 must be above 0"):
        tasks.build(CONFIG | {"shared": {**wide, "init_variance": -1.0}}).init(jax.random.key(0), batch)
    kernel = fresh[1]["transformer"]["decoder"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert np.std(kernel) == pytest.approx((0.5 / 16) ** 0.5, rel=0.15)
