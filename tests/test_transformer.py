"""The solver's transformer: positions, causality, memory, tasks, the parallel model, dtypes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models.transformer import TokenTransformer, sine_positions

VOCAB, LENGTH, TASKS, D = 20, 7, 3, 16
TINY = TokenTransformer(
    dim=D,
    num_heads=2,
    hidden=24,
    encoder_layers=1,
    decoder_layers=2,
    vocab_size=VOCAB,
    max_length=LENGTH,
    num_tasks=TASKS,
)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (2, 5))


@pytest.fixture(scope="module")
def params(features, tokens):
    """Weights large enough for every part to matter."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), features, tokens, 0)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def logits():
    """The jitted forward pass (params, features, tokens, task)."""
    return jax.jit(lambda params, features, tokens, task: TINY.apply({"params": params}, features, tokens, task))


def test_sine_positions():
    table = sine_positions(3, 4, 8).reshape(3, 4, 8)
    for row, column in ((0, 0), (2, 3), (1, 2)):
        expected = []
        for place in (row, column):
            for pair in range(2):  # 4 channels an axis: frequencies 1 and 1/100
                expected += [np.sin(place / 100**pair), np.cos(place / 100**pair)]
        np.testing.assert_allclose(table[row, column], expected, rtol=1e-5, atol=1e-6)
    assert table.dtype == np.float32


def test_logits_depend_on_inputs_up_to_their_own_and_on_no_later_one(params, features, tokens):
    """The position vector is added to the input of its position, so its gradient is that of the input."""
    weight = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32)

    def values_T(table):
        return TINY.apply({"params": params | {"dec_embed": table}}, features[:1], tokens[:1], 1)[0] @ weight

    jacobian = np.abs(jax.jit(jax.jacrev(values_T))(params["dec_embed"])).sum(-1)  # outputs, tasks, positions
    np.testing.assert_array_equal(jacobian[:, 1] > 0, np.tril(np.ones((6, LENGTH), bool)))
    np.testing.assert_array_equal(jacobian[:, [0, 2]], 0)


def test_a_token_is_the_input_of_the_next_position(params, features, tokens, logits):
    expected = logits(params, features, tokens, 1)
    assert (expected.shape, expected.dtype) == ((2, 6, VOCAB), jnp.float32)
    other = tokens.copy()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    changed = np.abs(logits(params, features, other, 1) - expected).max(-1) > 1e-4
    np.testing.assert_array_equal(changed, [[False] * 3 + [True] * 3] * 2)


def test_every_image_has_its_own_memory(params, features, tokens, logits):
    both = logits(params, features, tokens, 1)
    swapped = logits(params, features[::-1], tokens[::-1], 1)
    np.testing.assert_allclose(swapped, both[::-1], rtol=1e-4, atol=1e-5)
    assert np.abs(logits(params, features[::-1], tokens, 1) - both).max() > 1e-2


def test_memory_keys_and_values_are_computed_once(params, features, tokens):
    """Given the memory, the decoder does not use the weights that made it."""
    memory = TINY.apply(
        {"params": params}, TINY.apply({"params": params}, features, method="encode"), method="memory_keys_values"
    )
    assert [k.shape for layer in memory for k in layer] == [(2, 2, 6, 8)] * 4

    def value(params):
        return jnp.sum(TINY.apply({"params": params}, memory, tokens, 1, method="decode") ** 2)

    gradient = jax.jit(jax.grad(value))(params)["decoder"]
    for block in gradient.values():
        for name in ("wk", "wv"):
            np.testing.assert_array_equal(block["crossattn"][name]["kernel"], 0)
        assert np.abs(block["crossattn"]["wq"]["kernel"]).max() > 0
        assert np.abs(block["attn"]["wk"]["kernel"]).max() > 0


def test_a_task_for_every_example(params, features, tokens, logits):
    mixed = logits(params, features, tokens, jnp.array([0, 2]))
    np.testing.assert_allclose(mixed[0], logits(params, features, tokens, 0)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[1], logits(params, features, tokens, 2)[1], rtol=1e-4, atol=1e-5)
    assert np.abs(mixed[0] - logits(params, features, tokens, 2)[0]).max() > 1e-2


def test_output_weights_are_the_input_embedding(params):
    """One row of the table is changed: the logit of that token moves, by its own row, and no other."""
    x = np.random.default_rng(4).normal(size=(3, D)).astype(np.float32)
    before = TINY.apply({"params": params}, x, method="logits")
    table = params["voc_embed"].at[7].multiply(2)
    after = TINY.apply({"params": params | {"voc_embed": table}}, x, method="logits")
    bias = params["outp_bias"][7]
    np.testing.assert_allclose(after[:, 7] - bias, 2 * (before[:, 7] - bias), rtol=1e-4)
    np.testing.assert_array_equal(np.delete(after, 7, 1), np.delete(before, 7, 1))
    window = TINY.apply({"params": params}, x, slice(5, 9), method="logits")
    np.testing.assert_allclose(window, before[:, 5:9], rtol=1e-5, atol=1e-6)


def test_parallel_model_does_not_see_tokens(params, features, tokens):
    parallel = TINY.clone(parallel=True)
    shapes = jax.eval_shape(parallel.init, jax.random.key(0), features, tokens, 0)["params"]
    assert shapes.keys() - params.keys() == {"mask_embed"}
    mask = jnp.asarray(np.random.default_rng(5).normal(size=D), jnp.float32)
    apply = jax.jit(lambda mask, tokens: parallel.apply({"params": params | {"mask_embed": mask}}, features, tokens, 1))
    expected = apply(mask, tokens)
    np.testing.assert_array_equal(apply(mask, tokens[::-1]), expected)
    moved = np.abs(apply(-mask, tokens) - expected).max(-1) > 1e-3
    np.testing.assert_array_equal(moved, [[False] + [True] * 5] * 2)  # position 0 has the task embedding


def test_training_draws_from_its_rng_and_evaluation_does_not(params, features, tokens, logits):
    apply = jax.jit(lambda key: TINY.apply({"params": params}, features, tokens, 1, train=True, rngs={"dropout": key}))
    first, again, other = (apply(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    expected = logits(params, features, tokens, 1)
    for a, b in ((first, other), (first, expected), (other, expected)):
        assert np.abs(a - b).max() > 1e-3


def test_remat_changes_nothing_but_memory(params, features, tokens):
    """With dropout on, so that what is computed again must draw the same numbers."""

    def value_and_gradient(model):
        def loss(params):
            return jnp.mean(
                model.apply({"params": params}, features, tokens, 1, train=True, rngs={"dropout": jax.random.key(0)})
                ** 2
            )

        return jax.value_and_grad(loss)

    plain, remat = (value_and_gradient(TINY.clone(remat=policy)) for policy in ("none", "blocks"))
    assert str(jax.make_jaxpr(remat)(params)).count("remat") >= 3 > str(jax.make_jaxpr(plain)(params)).count("remat")
    (expected, plain_gradient), (value, gradient) = jax.jit(plain)(params), jax.jit(remat)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(plain_gradient)
    largest = max(
        np.abs(leaf).max() for leaf in jax.tree.leaves(plain_gradient)
    )  # that of a key's bias is 0 but for rounding
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


def test_bfloat16_computes_close_and_returns_float32(params, features, tokens, logits):
    rough = jax.jit(lambda p: TINY.clone(dtype=jnp.bfloat16).apply({"params": p}, features, tokens, 1))(params)
    expected = logits(params, features, tokens, 1)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rough - expected) / np.linalg.norm(expected) < 0.05
    x = np.random.default_rng(4).normal(size=(3, D)).astype(np.float32)
    exact = TINY.apply({"params": params}, x, method="logits")  # from the last LayerNorm on, everything is float32
    same = TINY.clone(dtype=jnp.bfloat16).apply({"params": params}, x, method="logits")
    np.testing.assert_array_equal(exact, same)


def test_errors(params, features):
    with pytest.raises(ValueError, match="dim=18 must be a multiple of 2·num_heads=4"):
        TINY.clone(dim=18)
    with pytest.raises(ValueError, match="sequence of 8 tokens is longer than max_length=7"):
        TINY.apply({"params": params}, features, np.zeros((2, 7), int), 1)
