"""The tokenizer of maps: building from configs, what its loss counts, maps of any size."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_maps import SIZE, TOKENIZER, K, example, random_state

from aitok_jax import tasks
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.modalities import Depth, Normals
from aitok_jax.tasks.tokenizer import MapTokenizer, TokenizerTask

TOKENIZER_PART = MapTokenizer(
    Depth(), VQVAE(**TOKENIZER, objective="mse_ignore_zero"), SIZE, mask_ratio=0.0, mask_patch=8
)


def tokenizer_task(part):
    return TokenizerTask("tokenizer", part)


@pytest.fixture(scope="module")
def batch():
    return example()


def test_tokenizer_task_from_a_config():
    config = {"name": "depth_tokenizer", "image_size": SIZE, "tokenizer": TOKENIZER, "mask_ratio": 0.0, "mask_patch": 8}
    assert tasks.build(config).parts == {"depth_tokenizer": TOKENIZER_PART}
    with pytest.raises(ValueError, match=r"MapTokenizer: .*'mask_ration' is unknown; did you mean 'mask_ratio'"):
        tasks.build(config | {"mask_ration": 0.1})
    with pytest.raises(ValueError, match="28×28 must be a multiple of downsample=8"):
        tasks.build(config | {"image_size": 28})
    with pytest.raises(ValueError, match="image_size=24 must be a multiple of mask_patch=16"):
        tasks.build(config | {"mask_ratio": 0.5, "mask_patch": 16})


@pytest.fixture(scope="module")
def tokenizer_state(batch):
    return random_state(tokenizer_task(TOKENIZER_PART), batch)


@pytest.fixture(scope="module")
def tokenizer_predict():
    return compiled_predict(TOKENIZER_PART)


def tokenizer_loss(part, state, batch):
    return jax.jit(tokenizer_task(part).loss)(*state, {"tokenizer": batch}, jax.random.key(0))


def test_tokenizer_loss_counts_annotated_pixels_only(batch, tokenizer_state, tokenizer_predict):
    """Without mask augmentation the reconstruction is the prediction; it is compared where there is annotation."""
    loss, (metrics, new_state) = tokenizer_loss(TOKENIZER_PART, tokenizer_state, batch)
    output, depth = tokenizer_predict(*tokenizer_state, {"depth": batch["depth"]})["depth"], batch["depth"]
    expected = np.square(output - depth)[depth > 0].mean()
    np.testing.assert_allclose(metrics["reconstruction"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["reconstruction"] + metrics["commitment"], rtol=1e-6)
    assert jax.tree.structure(new_state) == jax.tree.structure(tokenizer_state[1])
    moved = new_state["codebook"]["quantizer"]["embedding"] != tokenizer_state[1]["codebook"]["quantizer"]["embedding"]
    assert np.asarray(moved).any()
    assert 1 <= metrics["perplexity"] <= K
    assert 0 < metrics["codebook_usage"] <= 1


def test_tokenizer_is_asked_for_what_was_masked(batch, tokenizer_state, tokenizer_predict):
    """With everything masked, the input is empty and the target is the whole map."""
    part = dataclasses.replace(TOKENIZER_PART, mask_ratio=1.0)
    _, (metrics, _) = tokenizer_loss(part, tokenizer_state, batch)
    depth = batch["depth"]
    output = tokenizer_predict(*tokenizer_state, {"depth": np.zeros_like(depth)})["depth"]
    np.testing.assert_allclose(metrics["reconstruction"], np.square(output - depth)[depth > 0].mean(), rtol=1e-4)


def test_tokenizer_predicts_maps_of_any_size(batch, tokenizer_state, tokenizer_predict):
    cut = batch["depth"][:, :13, :18]
    whole = np.zeros((2, 16, 24), np.float32)
    whole[:, :13, :18] = cut
    ours, padded = (tokenizer_predict(*tokenizer_state, {"depth": d}) for d in (cut, whole))
    assert ours["depth"].shape == cut.shape
    assert ours["codes"].shape == (2, 2, 3)
    np.testing.assert_array_equal(ours["codes"], padded["codes"])
    np.testing.assert_allclose(ours["depth"], padded["depth"][:, :13, :18], rtol=1e-5, atol=1e-6)


def test_tokenizers_fit_their_modality():
    """Channels and objective are its own where none are given."""
    config = {"name": "normals_tokenizer", "image_size": SIZE, "mask_ratio": 0.0, "tokenizer": TOKENIZER}
    (part,) = tasks.build(config).parts.values()
    assert (part.modality, part.tokenizer.channels, part.tokenizer.objective) == (Normals(), 3, "mse_annotated")
    for fields in ({"channels": 1}, {"objective": "cross_entropy"}):
        with pytest.raises(ValueError, match=r"normals has 3 channels: tokenizer.channels="):
            tasks.build(config | {"tokenizer": TOKENIZER | fields})
