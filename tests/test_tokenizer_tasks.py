"""The mask tokenizer's task: what it is trained for, what it predicts, errors, building from a config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_objects as tiny

from aitok_jax import tasks
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.tokenizer import MaskTokenizer, TokenizerTask

SIZE, K = tiny.CROP, tiny.CODES
PART = MaskTokenizer(VQVAE(**tiny.MASK_TOKENIZER), SIZE)
TASK = TokenizerTask("masks", PART)
VALUE = jax.jit(jax.value_and_grad(TASK.loss, has_aux=True))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    masks = rng.random((6, SIZE, 1)) < rng.random((6, 1, SIZE))
    return {"instance": masks.astype(np.float32)}


@pytest.fixture(scope="module")
def state(batch):
    return tiny.random_state(TASK, {"masks": batch})


@pytest.fixture(scope="module")
def trained(state, batch):
    """((loss, (metrics, new model_state)), gradients)."""
    return VALUE(*state, {"masks": batch}, jax.random.key(0))


@pytest.fixture(scope="module")
def predicted(state, batch):
    return compiled_predict(PART)(*state, batch)


def test_loss_is_the_error_of_all_pixels_and_the_commitment(batch, trained, predicted):
    """Background counts as much as the object; the network's space is twice as wide as 0..1."""
    (loss, (metrics, _)), _ = trained
    expected = np.square(2 * (predicted["instance"] - batch["instance"])).mean()
    np.testing.assert_allclose(metrics["reconstruction"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["reconstruction"] + metrics["commitment"], rtol=1e-6)
    assert set(metrics) == {"reconstruction", "commitment", "perplexity", "codebook_usage"}
    used = len(np.unique(predicted["codes"]))
    assert metrics["codebook_usage"] == pytest.approx(used / K)
    assert 1 < metrics["perplexity"] <= used


def test_training_moves_parameters_and_codebook(state, batch, trained):
    (first, (_, new_state)), gradients = trained
    assert jax.tree.structure(new_state) == jax.tree.structure(state[1])
    moved = new_state["codebook"]["quantizer"]["embedding"] != state[1]["codebook"]["quantizer"]["embedding"]
    assert np.asarray(moved).any()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
    descend = jax.jit(lambda params, gradients: jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    params, frozen = state
    for _ in range(20):
        params = descend(params, gradients)
        (loss, (_, frozen)), gradients = VALUE(params, frozen, {"masks": batch}, jax.random.key(0))
    assert loss < 0.9 * first


def test_prediction_tokenizes_and_detokenizes(state, batch, predicted):
    variables = {"params": state[0], **state[1]}
    codes = PART.tokenizer.apply(variables, batch["instance"][..., None], method="encode")
    assert (predicted["codes"].shape, predicted["codes"].dtype) == ((6, 2, 2), jnp.int32)
    np.testing.assert_array_equal(predicted["codes"], codes)
    assert len(np.unique(codes)) > 1, "the test needs different codes"
    assert (predicted["instance"].shape, predicted["instance"].dtype) == ((6, SIZE, SIZE), jnp.float32)
    decoded = PART.tokenizer.apply(variables, codes, method="decode")[..., 0]
    np.testing.assert_allclose(predicted["instance"], decoded, rtol=1e-4, atol=1e-5)


def test_masks_do_not_see_each_other(state, batch, predicted):
    turned = compiled_predict(PART)(*state, {"instance": batch["instance"][::-1]})
    for name, array in turned.items():
        np.testing.assert_allclose(array[::-1], predicted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_dead_codes_restart_from_the_masks(state, batch):
    """The key decides which encoder outputs they become."""
    part = dataclasses.replace(PART, tokenizer=PART.tokenizer.clone(restart_threshold=99.0))
    loss = jax.jit(TokenizerTask("masks", part).loss)
    tables = []
    for seed in (0, 0, 1):
        _, (_, new_state) = loss(*state, {"masks": batch}, jax.random.key(seed))
        tables.append(np.asarray(new_state["codebook"]["quantizer"]["embedding"]))
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


def test_task_from_a_config():
    config = {"name": "mask_tokenizer", "image_size": SIZE, "tokenizer": tiny.MASK_TOKENIZER}
    assert tasks.build(config) == TokenizerTask("mask_tokenizer", PART)
    assert (PART.kind, MaskTokenizer(PART.tokenizer).image_size) == ("masks", 64)
    with pytest.raises(ValueError, match=r"MaskTokenizer: .*'image_sizes' is unknown; did you mean 'image_size'"):
        tasks.build(config | {"image_sizes": 8})
    with pytest.raises(ValueError, match=r"VQVAE: .*'codes' is unknown"):
        tasks.build(config | {"tokenizer": {"codes": 8}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "10×10 must be a multiple of downsample=4"),
        ({"tokenizer": {"channels": 3}}, r"tokenizer.channels=3 must be 1"),
        (
            {"tokenizer": {"objective": "cross_entropy", "use_norm": False}},
            r"tokenizer.objective='cross_entropy' must be one of mse, l1, smooth_l1 for masks",
        ),
        (
            {"tokenizer": {"objective": "mse_ignore_zero", "use_norm": False}},
            r"'mse_ignore_zero' must be one of mse, l1, smooth_l1",
        ),
    ],
)
def test_layout_errors(changes, message):
    changes = {name: PART.tokenizer.clone(**value) if name == "tokenizer" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PART, **changes)
