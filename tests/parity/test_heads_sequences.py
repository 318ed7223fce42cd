"""Tokens and targets of known objects against the published system."""

import cases
import numpy as np
import published
import pytest

from aitok_jax.tasks import sequences

pytestmark = cases.find("heads*")


@pytest.mark.parametrize("kind", ["insseg", "det"])
def test_tokens_of_objects(name, kind):
    case = cases.load(name)
    rows = [int(key.removeprefix("in/seq_box")) for key in case.keys("in/seq_box")]
    assert rows
    for row in rows:
        check_tokens(case, row, kind)


def check_tokens(case, row, kind):
    hp, vocabulary = case.hp, vocabulary_of(case.hp)
    codes = case[f"in/seq_masktok{row}"][None] if kind == "insseg" else None
    labels = case[f"in/seq_label{row}"]
    tokens = sequences.object_tokens(vocabulary, case[f"in/seq_box{row}"][None], labels[None], codes, hp["norm_val"])
    theirs = case[f"out/seq_{kind}"][row].reshape(-1, tokens.shape[-1])[: len(labels)]
    np.testing.assert_array_equal(tokens[0], theirs)
    boxes = sequences.boxes_of(vocabulary, tokens[..., :4], hp["norm_val"])
    inside = np.clip(case[f"in/seq_box{row}"], 0, hp["norm_val"])
    np.testing.assert_allclose(boxes[0], inside, atol=0.5001 * hp["norm_val"] / hp["num_bins"])


def vocabulary_of(hp):
    return published.vocabulary({"num_embeddings_depth": 0, **hp})


def test_targets(name):
    case = cases.load(name)
    flat = case["in/targets_seq"]
    tokens = flat.reshape(len(flat), -1, 5 + case.hp["mask_tokens"])
    real = np.arange(tokens.shape[1])[None] < case["in/targets_nobj"][:, None]
    counted = sequences.target_mask(real, tokens.shape[-1])
    ours = np.where(counted, tokens, -100)
    np.testing.assert_array_equal(ours.reshape(flat.shape), case["out/targets_default"])


def test_codes_of_crops(name):
    case = cases.load(name)
    hp = case.hp
    tokenizer = published.tokenizer(hp["vae"])
    tree = published.from_state_dict(case.state_dict("vqvae."))
    size = hp["mask_size"]
    crops = case[f"out/crop_bin_{size}"][..., None].astype(np.float32)
    codes = tokenizer.apply({"params": tree["params"], **tree["model_state"]}, crops, method="encode")
    np.testing.assert_array_equal(codes.reshape(len(codes), -1), case["out/crop_mask_tokens"])
