"""The loss of instance segmentation: against NumPy, its gradient, its sums over objects, images and devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_objects as tiny

from aitok_jax import tasks
from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.parallel import sharding
from aitok_jax.tasks import from_scratch
from aitok_jax.tasks.objects import INSTANCES_ID

N, L = tiny.OBJECTS, tiny.LENGTH
LABEL = CLASS_SLOT
TASK = tasks.build(tiny.CONFIG)
PART = TASK.parts["instances"]
VOCAB = TASK.vocabulary
CODES = VOCAB.codes_of("mask")
VALUE = jax.jit(jax.value_and_grad(TASK.loss, has_aux=True))


@pytest.fixture(scope="module")
def batch():
    """Images with 0, 1, 2 and 3 real objects."""
    return tiny.batch(4)


@pytest.fixture(scope="module")
def state(batch):
    return tiny.random_state(TASK, {"instances": batch})


@pytest.fixture(scope="module")
def prepared(state, batch):
    return PART.inputs(state[1], batch, jax.random.key(0))


@pytest.fixture(scope="module")
def trained(state, batch):
    """((loss, (metrics, new model_state)), gradients)."""
    return VALUE(*state, {"instances": batch}, jax.random.key(0))


def numpy_loss(part, state, logits, targets, counted, crops):
    """The published loss, object by object: (loss, metrics)."""
    logits, targets, counted = np.asarray(logits, np.float64), np.asarray(targets), np.asarray(counted)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    ce = -np.log(np.take_along_axis(p / p.sum(-1, keepdims=True), targets[..., None], -1)[..., 0])
    kinds = {"box": [0, 1, 2, 3], "class": [4], "mask": [5, 6, 7, 8]}
    total, metrics, counts = 0.0, {}, {}
    for kind, slots in kinds.items():
        weight = getattr(part, f"{kind}_weight")
        chosen = counted[..., slots]
        counts[kind] = chosen.sum()
        summed = weight * ce[..., slots][chosen].sum()
        metrics[f"{kind}_cross_entropy"] = summed / max(counts[kind], 1)
        total += summed
    aux = []
    for b, n in np.ndindex(targets.shape[:2]):
        if counted[b, n, 0] and n < part.aux_objects:
            codes = logits[b, n, 5:, CODES.slice].reshape(1, 2, 2, -1)
            soft = tiny.tokenizer_apply(PART, state, "decode_soft", codes)[0, ..., 0]
            truth, clipped = crops[b, n], np.clip(soft, 0, 1)
            dice = 1 - (2 * (clipped * truth).sum() + 1) / (clipped.sum() + truth.sum() + 1)
            aux.append(dice + np.square(soft - truth).mean())
    metrics["mask_aux"] = part.aux_weight * part.mask_weight * (np.mean(aux) if aux else 0.0)
    total += metrics["mask_aux"] * counts["mask"]
    return part.loss_weight * total / sum(counts.values()), metrics


def check_loss(ours, expected):
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4)
    assert set(ours[1]) == set(expected[1])
    for name, value in ours[1].items():
        assert (value.shape, value.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(value, expected[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_loss_compares_output_t_with_target_t(state, batch, trained):
    """The solver reads the inputs but the last, as task 1; `loss` splits its key for dropout and `inputs`."""
    key = jax.random.split(jax.random.split(jax.random.key(0))[1], 1)[0]
    prepared = PART.inputs(state[1], batch, key)
    apply = jax.jit(lambda params, images, tokens: TASK.solver.apply({"params": params}, images, tokens, INSTANCES_ID))
    logits = apply(state[0], prepared.images, prepared.tokens).reshape(4, N, L, -1)
    (loss, (metrics, _)), _ = trained
    check_loss((loss, metrics), numpy_loss(PART, state, logits, *map(np.asarray, prepared.targets)))


def test_gradient_reaches_the_solver_and_the_tokenizer_stays(state, trained):
    (_, (_, new_state)), gradients = trained
    assert set(state[0]) == {"backbone", "transformer"}
    jax.tree.map(np.testing.assert_array_equal, new_state, state[1])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), name
        if not name.endswith("wk/bias"):  # adds one number to all logits of a query
            assert np.abs(gradient).max() > 0, name
    rows = np.abs(gradients["transformer"]["dec_embed"]).max((1, 2)) > 0
    np.testing.assert_array_equal(rows, np.arange(3) == INSTANCES_ID)


def test_loss_falls(state, batch, trained):
    """On one batch, with the same key at every step."""
    descend = jax.jit(lambda params, gradients: jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients))
    params, gradients = state[0], trained[1]
    for _ in range(10):
        params = descend(params, gradients)
        (loss, _), gradients = VALUE(params, state[1], {"instances": batch}, jax.random.key(0))
    assert loss < 0.8 * trained[0][0]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(3).normal(0, 2, (4, N, L, VOCAB.size)).astype(np.float32)


@functools.cache
def compiled_value(part):
    def loss(logits, model_state, targets):
        return part.token_loss(model_state, logits, *targets)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value(part, state, logits, targets):
    """((loss, metrics), gradient in the logits)."""
    return compiled_value(part)(logits, state[1], tuple(targets))


@pytest.fixture(scope="module")
def valued(state, logits, prepared):
    return value(PART, state, logits, prepared.targets)


def test_weights_of_the_loss(state, logits, prepared):
    """Every weight has another value; only the first two objects count in the auxiliary loss."""
    weights = {"box_weight": 2.0, "class_weight": 3.0, "mask_weight": 0.5, "aux_weight": 4.0, "loss_weight": 0.25}
    part = dataclasses.replace(PART, aux_objects=2, **weights)
    ours, _ = value(part, state, logits, prepared.targets)
    check_loss(ours, numpy_loss(part, state, logits, *map(np.asarray, prepared.targets)))


def test_memory_loss_teaches_the_encoder_and_leaves_prediction_alone(state, batch, trained):
    """Cross-entropy of boxes and masks where objects are and of classes everywhere, in NumPy from the memory itself."""
    task = tasks.build({**tiny.CONFIG, "memory_weight": 0.5, "loss_weight": 2.0})
    part = task.parts["instances"]
    params, _ = tiny.random_state(task, {"instances": batch})
    params = state[0] | {"instances_memory_head": params["instances_memory_head"]}
    value = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, (metrics, _)), gradients = value(params, state[1], {"instances": batch}, jax.random.key(0))

    prepared = part.inputs(state[1], batch, jax.random.key(0))
    encode = functools.partial(
        task.solver.apply, method=lambda solver, x: solver.transformer.encode(solver.features(x))
    )
    memory = jax.jit(encode)({"params": state[0]}, prepared.images)
    head = jax.tree.map(np.asarray, params["instances_memory_head"])
    x = (np.asarray(memory) @ head["kernel"] + head["bias"]).reshape(4, 9, 5 + part.mask_tokens, -1)
    logits = task.solver.transformer.apply({"params": state[0]["transformer"]}, x, method="logits")
    targets, counted, _ = prepared.targets
    tokens, covered = from_scratch.cell_tokens(VOCAB, targets, counted[..., 0], tiny.SIZE, 3)
    logp = jax.nn.log_softmax(logits[..., : CODES.stop])
    ce = -np.take_along_axis(np.asarray(logp), np.asarray(tokens)[..., None], -1)[..., 0]
    assert 0 < covered.sum() < covered.size
    there = ce[np.asarray(covered)]
    expected = there[:, :4].mean() + ce[..., 4].mean() + there[:, 5:].mean()
    np.testing.assert_allclose(metrics["memory_loss"], expected, rtol=1e-4)

    np.testing.assert_allclose(loss, 2 * (trained[0][0] + 0.5 * expected), rtol=1e-4)
    assert np.abs(gradients["instances_memory_head"]["kernel"]).max() > 0
    decoder, plain = (g["transformer"]["decoder"]["blocks_0"]["mlp"]["fc1"]["kernel"] for g in (gradients, trained[1]))
    np.testing.assert_allclose(decoder, 2 * plain, rtol=1e-3, atol=1e-6)
    found, without = (jax.jit(one.predict)(p, state[1], batch) for one, p in ((part, params), (PART, state[0])))
    jax.tree.map(np.testing.assert_array_equal, found, without)


def test_auxiliary_loss_is_a_switch_of_the_loss(state, logits, prepared, valued):
    """Its gradient runs through the logits of the mask codes of real objects alone."""
    (loss, metrics), gradient = valued
    check_loss((loss, metrics), numpy_loss(PART, state, logits, *map(np.asarray, prepared.targets)))
    (off, off_metrics), off_gradient = value(dataclasses.replace(PART, aux_weight=0.0), state, logits, prepared.targets)
    assert set(off_metrics) == set(metrics) - {"mask_aux"}
    counted = np.asarray(prepared.targets[1])
    np.testing.assert_allclose(loss, off + metrics["mask_aux"] * counted[..., 5:].sum() / counted.sum(), rtol=1e-5)
    inside = np.zeros(gradient.shape, bool)
    inside[:, :, LABEL + 1 :, CODES.slice] = counted[:, :, LABEL + 1 :, None]
    moved = np.abs(gradient - off_gradient)
    assert (moved[inside] > 1e-7).mean() > 0.9
    np.testing.assert_allclose(moved[~inside], 0, atol=1e-9)
    np.testing.assert_array_equal(np.asarray(gradient)[~counted], 0)


def test_order_of_the_objects_does_not_matter(state, batch, logits, prepared, valued):
    """Each image with an order of its own: targets follow, and the loss of logits in that order is the same."""
    orders = np.stack([np.random.default_rng(i).permutation(N) for i in range(4)])

    def permuted(x):
        return np.take_along_axis(np.asarray(x), orders.reshape(4, N, *[1] * (np.ndim(x) - 2)), 1)

    shuffled = {k: permuted(v) if k.startswith("objects/") else v for k, v in batch.items()}
    targets = PART.inputs(state[1], shuffled, jax.random.key(0)).targets
    for ours, expected in zip(targets, prepared.targets, strict=True):
        np.testing.assert_array_equal(ours, permuted(expected))
    (loss, metrics), gradient = value(PART, state, permuted(logits), targets)
    check_loss((loss, metrics), valued[0])
    np.testing.assert_allclose(gradient, permuted(valued[1]), rtol=1e-4, atol=1e-7)


def test_an_image_without_objects_has_a_loss_of_labels_only(state, logits, prepared):
    assert not prepared.targets[1][0, :, 0].any()
    alone = tuple(t[:1] for t in prepared.targets)
    (loss, metrics), gradient = value(PART, state, logits[:1], alone)
    labels = -jax.nn.log_softmax(logits[0, :, LABEL])[:, VOCAB.noise]
    np.testing.assert_allclose(loss, labels.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["class_cross_entropy"], loss, rtol=1e-6)
    for name in ("box_cross_entropy", "mask_cross_entropy", "mask_aux"):
        assert metrics[name] == 0, name
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient[..., LABEL, :]) > 0).any()
    np.testing.assert_array_equal(np.delete(gradient, LABEL, 2), 0)


def test_loss_of_a_batch_is_the_sum_over_its_images(state, logits, prepared, valued):
    """Of images with 0, 1, 2, 3 objects: the mean of their own losses, weighted by their numbers of tokens."""
    counts = np.asarray(prepared.targets[1]).sum((1, 2))
    np.testing.assert_array_equal(counts, N + np.arange(4) * (L - 1))
    for images in ([0, 3], [1, 2]):
        (together, _), _ = value(PART, state, logits[images], [t[np.array(images)] for t in prepared.targets])
        alone = [value(PART, state, logits[i : i + 1], [t[i : i + 1] for t in prepared.targets])[0][0] for i in images]
        np.testing.assert_allclose(together, np.average(alone, weights=counts[images]), rtol=1e-5)


def test_loss_is_the_same_on_any_number_of_devices():
    """One image a device, with 0 to 4 objects each: nothing is normalised per device."""
    batch = {name: array for name, array in tiny.batch(8).items() if name != "id"}
    state = tiny.random_state(TASK, {"instances": batch})
    run, results = jax.jit(TASK.loss), []
    for devices in (jax.devices(), jax.devices()[:1]):
        mesh = sharding.make_mesh(devices=devices)
        placed = sharding.shard_batch({"instances": batch}, mesh)
        assert len(placed["instances"]["image"].sharding.device_set) == len(devices)
        params, frozen, key = jax.device_put((*state, jax.random.key(7)), sharding.replicated(mesh))
        loss, (metrics, _) = run(params, frozen, placed, key)
        results.append((loss, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *results)
