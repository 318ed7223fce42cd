"""Decoding: the cache, soft tokens, one-pass parallel, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models.decode import decode
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks.vocabulary import Vocabulary

VOCAB = Vocabulary(num_bins=2, num_classes=3, codes=(("mask", 4), ("depth", 6)), num_spare=2)
WINDOW = VOCAB.codes_of("depth").slice
TASK, LENGTH, D = 2, 8, 16
MODEL = TokenTransformer(
    dim=D,
    num_heads=2,
    hidden=24,
    encoder_layers=1,
    decoder_layers=2,
    vocab_size=VOCAB.size,
    max_length=LENGTH,
    num_tasks=3,
)
PARALLEL = MODEL.clone(parallel=True)


@pytest.fixture(scope="module")
def params():
    """Weights for which the inputs of the steps decide the tokens; `mask_embed` is for the parallel model."""
    args = (jnp.zeros((1, 2, 3, 5)), jnp.zeros((1, 2), int), TASK)
    shapes = jax.eval_shape(PARALLEL.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(3)

    def leaf(path, shape):
        deviation = {"bias": 0.0, "scale": 0.0, "voc_embed": 0.5, "dec_embed": 1.0}.get(path[-1].key, 0.2)
        return jnp.asarray((path[-1].key == "scale") + rng.normal(0, deviation, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module")
def memory(params):
    features = np.random.default_rng(0).normal(size=(3, 2, 3, 5)).astype(np.float32)
    encoded = MODEL.apply({"params": params}, features, method="encode")
    return MODEL.apply({"params": params}, encoded, method="memory_keys_values")


@functools.cache
def compiled(model, **options):
    def run(params, memory):
        options_ = {"task": TASK, "length": LENGTH, "window": WINDOW, "soft_input": False} | options
        return decode(model, params, memory, **options_)

    return jax.jit(run)


@pytest.fixture(scope="module")
def hard(params, memory):
    return compiled(MODEL)(params, memory)


@pytest.fixture(scope="module")
def soft(params, memory):
    return compiled(MODEL, soft_input=True)(params, memory)


def test_cached_decoding_equals_full_recompute(params, memory, hard):
    """Teacher forcing with the decoded tokens gives the logits of every step."""
    inputs = WINDOW.start + hard.tokens[:, :-1]
    full = jax.jit(lambda p, m, t: MODEL.apply({"params": p}, m, t, TASK, method="decode"))(params, memory, inputs)
    np.testing.assert_allclose(hard.logits, full[..., WINDOW], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(hard.tokens, np.argmax(hard.logits, -1))
    assert (hard.tokens.shape, hard.tokens.dtype, hard.logits.shape) == ((3, LENGTH), jnp.int32, (3, LENGTH, 6))
    assert len(np.unique(hard.tokens)) > 2, "the test needs tokens that differ"
    assert (full.argmax(-1) != WINDOW.start + hard.tokens).any(), "the test needs the window to matter"


def test_soft_input_feeds_the_expected_embedding(params, memory, soft):
    """The logits of step 1 are those of an embedding table whose row holds the expectation of step 0."""
    probabilities = jax.nn.softmax(soft.logits[:1, 0])
    row = probabilities @ params["voc_embed"][WINDOW]
    one = [tuple(array[:1] for array in layer) for layer in memory]

    def full(params):
        x = jnp.concatenate([params["task_embed"][TASK].reshape(1, 1, D), row[:, None]], 1)
        x += params["dec_embed"][TASK, :2][None]

        def blocks(model):
            y = x
            for block, keys_values in zip(model.decoder.blocks, one, strict=True):
                y = block(y, keys_values, False)
            return model.logits(y, WINDOW)

        return MODEL.apply({"params": params}, method=blocks)

    np.testing.assert_allclose(soft.logits[:1, :2], jax.jit(full)(params), rtol=1e-4, atol=1e-4)


def test_soft_token_at_zero_temperature_is_the_hard_token(params, memory, hard, soft):
    np.testing.assert_allclose(soft.logits[:, 0], hard.logits[:, 0], rtol=1e-5, atol=1e-5)
    assert (np.abs(soft.logits - hard.logits).max((0, 2))[1:] > 1e-2).all()
    norm = {name: 1e4 * value for name, value in params["norm"].items()}
    cold = params | {"norm": norm, "outp_bias": 1e4 * params["outp_bias"]}
    soft_cold, hard_cold = compiled(MODEL, soft_input=True)(cold, memory), compiled(MODEL)(cold, memory)
    np.testing.assert_array_equal(soft_cold.tokens, hard_cold.tokens)
    np.testing.assert_allclose(soft_cold.logits, hard_cold.logits, rtol=1e-3, atol=1.0)
    np.testing.assert_array_equal(hard_cold.tokens, hard.tokens)  # arg-max knows no temperature


def test_images_do_not_see_each_other(params, memory, soft):
    assert np.abs(np.diff(soft.logits, axis=0)).max() > 1e-2
    for i in range(3):
        alone = compiled(MODEL, soft_input=True)(params, [tuple(a[i : i + 1] for a in layer) for layer in memory])
        np.testing.assert_allclose(alone.logits[0], soft.logits[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(alone.tokens[0], soft.tokens[i])


def test_one_parallel_pass_equals_step_by_step(params, memory):
    ours = compiled(PARALLEL)(params, memory)

    @jax.jit
    def step(x, cache, index):
        out, cache = PARALLEL.apply({"params": params}, x, memory, cache, index, method="step")
        return PARALLEL.apply({"params": params}, out, WINDOW, method="logits"), cache

    cache = PARALLEL.apply({"params": params}, 3, LENGTH, method="empty_cache")
    for t in range(LENGTH):
        token = params["task_embed"][TASK] if t == 0 else params["mask_embed"]
        x = np.broadcast_to(token + params["dec_embed"][TASK, t], (3, D))
        logits, cache = step(x, cache, t)
        np.testing.assert_allclose(ours.logits[:, t], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(ours.tokens[:, t], logits.argmax(-1))
    assert len(np.unique(ours.tokens)) > 2


@pytest.mark.parametrize("model", [MODEL, PARALLEL])
def test_errors(params, memory, model):
    with pytest.raises(ValueError, match=rf"sequence of {LENGTH + 1} tokens .* max_length={LENGTH}"):
        compiled(model, length=LENGTH + 1)(params, memory)
