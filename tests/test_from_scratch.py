"""Aids for solvers of maps with random weights: input noise and the memory loss, with its loss computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_maps import CODES, CONFIG, GRID, PART, TASK, K, example, random_state, softmax, whole

from aitok_jax import tasks
from aitok_jax.tasks import from_scratch
from aitok_jax.tasks.base import compiled_predict


@pytest.fixture(scope="module")
def batch():
    return example()


@pytest.fixture(scope="module")
def state(batch):
    return random_state(TASK, batch)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(3)
    return rng.normal(size=(2, GRID**2, TASK.vocabulary.size)).astype(np.float32)


def test_input_noise_replaces_the_share_of_tokens_asked_for():
    tokens = jnp.full((200, 100), CODES.start)
    noisy = from_scratch.corrupt(jax.random.key(0), tokens, 0.25, CODES)
    assert ((noisy >= CODES.start) & (noisy < CODES.stop)).all()
    assert jnp.mean(noisy != tokens) == pytest.approx(0.25 * (1 - 1 / K), abs=0.01)
    assert from_scratch.corrupt(jax.random.key(0), tokens, 0.0, CODES) is tokens
    with pytest.raises(ValueError, match=r"input_noise=1.5 must lie in 0..1"):
        dataclasses.replace(PART, input_noise=1.5)


def silog_by_hand(p, t):
    """sqrt of the mean of e² minus half the squared mean, e = log t - log p, over what is annotated."""
    e = np.log(t[t > 0]) - np.log(np.maximum(p[t > 0], 1e-3))
    return np.sqrt(np.mean(e**2) - 0.5 * np.mean(e) ** 2)


def window_loss_by_hand(part, state, logits_BTK, codes_BT, depth):
    """Cross-entropy of the codes, plus SiLog of the map that the expected embeddings decode to, times its weight."""
    ce = -np.log(np.take_along_axis(softmax(logits_BTK), codes_BT[..., None], -1)).mean()
    frozen = state["depth_tokenizer"]
    table = np.asarray(frozen["model_state"]["codebook"]["quantizer"]["embedding"])
    expected = softmax(part.tokenizer.soft_temperature * logits_BTK) @ table
    expected = expected.reshape(len(logits_BTK), part.grid, part.grid, -1).astype(np.float32)
    variables = {"params": frozen["params"], **frozen["model_state"]}
    soft = part.tokenizer.apply(variables, expected, method=lambda vqvae, x: vqvae.decoder(x))
    return ce + part.aux_weight * silog_by_hand(np.asarray(soft)[..., 0], depth)


def test_window_loss_equals_one_by_hand(state, batch, logits):
    """Here of all tokens: cross-entropy over the whole vocabulary, SiLog of the codes alone."""
    part = dataclasses.replace(PART, aux_weight=0.7)
    targets = np.asarray(PART.targets(state[1], batch["depth"]))
    loss, metrics = part.token_loss(state[1], logits, targets, batch["depth"])
    ce = -np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)).mean()
    window = logits[..., CODES.slice]
    silog = window_loss_by_hand(part, state[1], window, targets - CODES.start, batch["depth"])
    silog += np.log(np.take_along_axis(softmax(window), targets[..., None] - CODES.start, -1)).mean()
    np.testing.assert_allclose(loss, ce + silog, rtol=1e-4)
    np.testing.assert_allclose(0.7 * metrics["silog"], silog, rtol=1e-4)


def test_memory_loss_reads_a_token_off_the_vectors_of_its_patch(batch):
    """Stride 4 and tokens of 8 pixels: 2x2 vectors a token, in the order of `partition`."""
    fields = {"backbone": {**CONFIG["backbone"], "patch": 2}, "memory_weight": 0.4, "aux_weight": 0.7}
    task = tasks.build({**CONFIG, **fields})
    part = task.parts["depth"]
    params, state = random_state(task, batch)
    targets = part.targets(state, batch["depth"])
    side = part.image_size // 4
    memory = np.random.default_rng(0).normal(size=(len(targets), side, side, part.solver.transformer.dim))
    logits = np.zeros((*targets.shape, part.vocabulary.size), np.float32)
    flat = memory.reshape(len(targets), side**2, -1)
    loss, metrics = part.score(params, state, logits, flat, (targets, batch["depth"]))
    head = jax.tree.map(np.asarray, params["depth_memory_head"])
    read = np.zeros((*targets.shape, K), np.float32)
    for t in range(targets.shape[1]):
        row, column = divmod(t, part.grid)
        patch = memory[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(len(targets), -1)
        read[:, t] = patch @ head["kernel"] + head["bias"]
    expected = window_loss_by_hand(part, state, read, np.asarray(targets) - CODES.start, batch["depth"])
    np.testing.assert_allclose(metrics["memory_loss"], expected, rtol=1e-4)
    without = np.log(part.vocabulary.size) + 0.7 * metrics["silog"]
    np.testing.assert_allclose(loss, without + 0.4 * expected, rtol=1e-4)


def test_memory_loss_teaches_the_encoder_and_leaves_prediction_alone(batch):
    backbone = {**CONFIG["backbone"], "patch": 4}  # stride 8, as the tokenizer
    task = tasks.build({**CONFIG, "backbone": backbone, "memory_weight": 0.5})
    part = task.parts["depth"]
    params, state = random_state(task, batch)
    plain = dataclasses.replace(part, memory_weight=0.0)
    without = {name: params[name] for name in ("backbone", "transformer")}

    def gradients(part, params):
        value = jax.jit(jax.value_and_grad(whole(part).loss, has_aux=True))
        return value(params, state, {"depth": batch}, jax.random.key(0))

    (loss, (metrics, _)), grads = gradients(part, params)
    (plain_loss, _), plain_grads = gradients(plain, without)
    np.testing.assert_allclose(loss, plain_loss + 0.5 * metrics["memory_loss"], rtol=1e-5)
    assert jnp.abs(grads["depth_memory_head"]["kernel"]).max() > 0
    decoder = [g["transformer"]["decoder"]["blocks_0"]["mlp"]["fc1"]["kernel"] for g in (grads, plain_grads)]
    np.testing.assert_allclose(*decoder, rtol=1e-4, atol=1e-7)
    stems = [g["backbone"]["patch_embed"]["proj"]["kernel"] for g in (grads, plain_grads)]
    assert jnp.abs(stems[0] - stems[1]).max() > 1e-6
    np.testing.assert_array_equal(
        compiled_predict(part)(params, state, batch)["depth"], compiled_predict(plain)(without, state, batch)["depth"]
    )
    with pytest.raises(ValueError, match=r"backbone stride 24 must divide tokenizer.downsample=8"):
        tasks.build({**CONFIG, "backbone": {**backbone, "patch": 12}, "memory_weight": 0.5})
