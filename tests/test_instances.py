"""Instance segmentation and detection: what goes in, prediction and its switches, errors, building from configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_objects as tiny

from aitok_jax import tasks
from aitok_jax.image import IMAGENET_MEAN
from aitok_jax.models.decode_objects import CLASS_SLOT
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.objects import DETECTION_ID, INSTANCES_ID

N, L, M, CROP = tiny.OBJECTS, tiny.LENGTH, tiny.MASK_TOKENS, tiny.CROP
LABEL = CLASS_SLOT
TASK = tasks.build(tiny.CONFIG)
PART = TASK.parts["instances"]
DETECTION_TASK = tasks.build(tiny.CONFIG | {"tokenizer": None})
DETECTION = DETECTION_TASK.parts["instances"]
VOCAB = TASK.vocabulary
CODES = VOCAB.codes_of("mask")


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
def predicted(state, batch):
    return compiled_predict(PART)(*state, batch)


@pytest.fixture(scope="module")
def memory(state, batch):
    return jax.jit(PART.memory)(state[0], batch["image"])


@pytest.fixture(scope="module")
def decoded(state, memory):
    return jax.jit(PART.decode)(state[0], memory)


def test_targets_are_the_objects_and_their_masks_codes(state, batch, prepared):
    targets, counted, crops = map(np.asarray, prepared.targets)
    assert (targets.shape, counted.dtype) == ((4, N, L), bool)
    real = batch["objects/kind"] == 0
    np.testing.assert_array_equal(crops, batch["objects/crops"])
    empty = tiny.tokenizer_apply(PART, state, "encode", np.zeros((1, CROP, CROP, 1))).reshape(-1)
    for b, n in np.ndindex(4, N):
        box = np.round(batch["objects/boxes"][b, n] * 12 / tiny.SIZE)
        label = VOCAB.classes.start + batch["objects/classes"][b, n] if real[b, n] else VOCAB.noise
        codes = tiny.tokenizer_apply(PART, state, "encode", crops[b, n].reshape(1, CROP, CROP, 1)).reshape(-1)
        np.testing.assert_array_equal(targets[b, n], [*box, label, *(CODES.start + codes)])
        assert batch["objects/kind"][b, n] != 2 or (codes == empty).all()
        np.testing.assert_array_equal(counted[b, n], np.ones(L, bool) if real[b, n] else np.arange(L) == LABEL)
    assert len(np.unique(targets[..., LABEL + 1 :])) > 2, "the test needs masks of different codes"


def test_noise_is_noise_whatever_class_it_names(state, batch, prepared):
    named = batch | {"objects/classes": np.maximum(batch["objects/classes"], 0)}
    other = PART.inputs(state[1], named, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, other, prepared)


def test_inputs_are_the_targets_with_other_labels(state, batch, prepared):
    """All but the last token, in one row an image; labels change with the key and with nothing else."""
    tokens = np.asarray(prepared.tokens)
    assert tokens.shape == (4, N * L - 1)
    targets = np.asarray(prepared.targets[0]).reshape(4, -1)[:, :-1]
    labels = np.arange(N * L - 1) % L == LABEL
    np.testing.assert_array_equal(tokens[:, ~labels], targets[:, ~labels])
    legal = {*range(VOCAB.classes.start, VOCAB.classes.stop), VOCAB.noise}
    assert set(np.unique(tokens[:, labels])) <= legal
    other = PART.inputs(state[1], batch, jax.random.key(1))
    np.testing.assert_array_equal(other.targets[0], prepared.targets[0])
    assert (other.tokens[:, labels] != tokens[:, labels]).any()


def test_images_are_normalised_and_the_padding_is_zero(state, batch):
    image = batch["image"].copy()
    image[:, 20:] = IMAGENET_MEAN
    ours = np.asarray(PART.inputs(state[1], batch | {"image": image}, jax.random.key(0)).images)
    mean, std = (np.array(x, np.float32) / 255 for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    np.testing.assert_allclose(ours[:, :20], (image[:, :20] - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[:, 20:], 0)


def test_outputs_of_a_prediction(state, predicted, decoded):
    shapes = {
        "boxes": ((4, N, 4), "float32"),
        "classes": ((4, N), "int32"),
        "scores": ((4, N), "float32"),
        "masks": ((4, N, CROP, CROP), "float32"),
        "valid": ((4, N), "bool"),
    }
    assert {name: (array.shape, str(array.dtype)) for name, array in predicted.items()} == shapes
    np.testing.assert_allclose(predicted["boxes"], np.asarray(decoded.tokens[..., :4]) * tiny.SIZE / 12, rtol=1e-6)
    assert predicted["boxes"].min() >= 0
    assert predicted["boxes"].max() <= tiny.SIZE
    np.testing.assert_array_equal(predicted["classes"], decoded.tokens[..., LABEL] - VOCAB.classes.start)
    assert 0 <= predicted["classes"].min() < predicted["classes"].max() < VOCAB.num_classes
    np.testing.assert_allclose(predicted["scores"], decoded.scores, rtol=1e-5)
    assert 0 < predicted["scores"].min() < predicted["scores"].max() < 1
    assert predicted["valid"].all()
    masks = tiny.tokenizer_apply(PART, state, "decode_soft", decoded.mask_logits.reshape(4 * N, 2, 2, -1))
    np.testing.assert_allclose(predicted["masks"], masks.reshape(4, N, CROP, CROP), rtol=1e-4, atol=1e-5)
    assert np.ptp(predicted["masks"]) > 0.1


def test_images_do_not_see_each_other(state, batch, predicted):
    assert np.abs(np.diff(predicted["scores"], axis=0)).min(0).max() > 1e-3
    for i in (0, 3):
        others = np.where((np.arange(4) == i).reshape(4, 1, 1, 1), batch["image"], 0.5)
        for name, array in compiled_predict(PART)(*state, batch | {"image": others}).items():
            np.testing.assert_allclose(array[i], predicted[name][i], rtol=1e-3, atol=1e-4, err_msg=name)


def test_soft_input_changes_what_comes_after_the_first_mask_token(state, memory, decoded):
    a, b = decoded, jax.jit(dataclasses.replace(PART, soft_input=False).decode)(state[0], memory)
    np.testing.assert_array_equal(a.tokens[:, 0, : LABEL + 1], b.tokens[:, 0, : LABEL + 1])
    np.testing.assert_allclose(a.scores[:, 0], b.scores[:, 0], rtol=1e-5)
    change = np.abs(a.mask_logits - b.mask_logits).max((0, -1))
    np.testing.assert_allclose(change[0, 0], 0, atol=1e-5)
    assert (change.reshape(-1)[1:] > 1e-3).all()


def test_soft_detokenization_changes_the_masks_only(state, batch, predicted, decoded):
    hard = compiled_predict(dataclasses.replace(PART, soft_detokenize=False))(*state, batch)
    for name in set(predicted) - {"masks"}:
        np.testing.assert_allclose(hard[name], predicted[name], rtol=1e-5, err_msg=name)
    assert np.abs(hard["masks"] - predicted["masks"]).max() > 0.01
    codes = np.argmax(decoded.mask_logits, -1)
    np.testing.assert_array_equal(codes, decoded.tokens[..., LABEL + 1 :] - CODES.start)
    masks = tiny.tokenizer_apply(PART, state, "decode", codes.reshape(4 * N, 2, 2))
    np.testing.assert_allclose(hard["masks"], masks.reshape(4, N, CROP, CROP), rtol=1e-4, atol=1e-5)


def test_objects_after_an_early_exit_are_not_valid(state, batch):
    """With nothing but noise, decoding ends with the second object."""
    transformer = state[0]["transformer"]
    bias = transformer["outp_bias"].at[VOCAB.noise].set(99.0)
    params = state[0] | {"transformer": transformer | {"outp_bias": bias}}
    parts = (PART, dataclasses.replace(PART, early_exit=2))
    full, early = (compiled_predict(part)(params, state[1], batch) for part in parts)
    assert full["valid"].all()
    np.testing.assert_array_equal(early["valid"], np.broadcast_to(np.arange(N) < 2, (4, N)))
    for name in set(full) - {"valid"}:
        np.testing.assert_allclose(early[name][:, :2], full[name][:, :2], rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.isfinite(early[name]).all(), name


def test_what_an_early_exit_leaves_out_depends_on_the_image_alone():
    """A row ends after its own first two noise objects on end, though decoding goes on to the end of the last row."""
    part = dataclasses.replace(PART, early_exit=2)
    noise = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]], bool)
    kept = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(part._before_exit(noise), np.array(kept, bool))
    assert PART._before_exit(noise).all()


def test_samples_belong_to_the_id_of_the_image(state, batch):
    """The same in any batch; other ids give other samples."""
    predict = compiled_predict(dataclasses.replace(PART, top_p=0.9))
    first = predict(*state, batch)
    order = np.array([2, 0, 3, 1])
    moved = predict(*state, {name: array[order] for name, array in batch.items()})
    np.testing.assert_array_equal(moved["boxes"], first["boxes"][order])
    np.testing.assert_allclose(moved["masks"], first["masks"][order], rtol=1e-3, atol=1e-4)
    other = predict(*state, batch | {"id": batch["id"] + 10})
    assert (other["boxes"] != first["boxes"]).any((1, 2)).all()
    assert len(np.unique(first["boxes"].reshape(4, -1), axis=0)) == 4


def test_detection_has_no_masks(batch):
    """And needs neither a tokenizer nor mask crops; of the solver's tables it reads row 0, as far as it is long."""
    assert (DETECTION.task_id, DETECTION.mask_tokens, PART.task_id) == (DETECTION_ID, 0, INSTANCES_ID)
    params, frozen = tiny.random_state(DETECTION_TASK, {"instances": batch})
    assert frozen == {}
    transformer = params["transformer"]
    read = np.arange(N * L).reshape(1, -1, 1) < N * 5 * (np.arange(3) == DETECTION_ID).reshape(3, 1, 1)
    tables = {
        "dec_embed": jnp.where(read, transformer["dec_embed"], jnp.nan),
        "task_embed": jnp.where(read.any(1), transformer["task_embed"], jnp.nan),
    }
    params = params | {"transformer": transformer | tables}
    boxes_only = {"instances": {name: array for name, array in batch.items() if name != "objects/crops"}}
    loss, (metrics, new_state) = jax.jit(DETECTION_TASK.loss)(params, frozen, boxes_only, jax.random.key(0))
    assert new_state == {}
    assert set(metrics) == {"box_cross_entropy", "class_cross_entropy"}
    real = (batch["objects/kind"] == 0).sum()
    kinds = [metrics[f"{kind}_cross_entropy"] for kind in ("box", "class")]
    expected = np.average(kinds, weights=[4 * real, 4 * N])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    outputs = compiled_predict(DETECTION)(params, frozen, {"image": batch["image"]})
    assert set(outputs) == {"boxes", "classes", "scores", "valid"}
    assert outputs["boxes"].shape == (4, N, 4)
    assert np.isfinite(outputs["scores"]).all()


def changed(part, **fields):
    parts = {"backbone": TASK.solver.backbone, "transformer": TASK.solver.transformer}
    return {"solver": TaskSolver(**parts | {part: parts[part].clone(**fields)})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 28}, r"image_size=28 .* backbone stride, 8; the nearest sizes are 24 and 32"),
        ({"mask_size": 10}, r"mask_size=10 .* tokenizer.downsample, 4; the nearest sizes are 8 and 12"),
        (
            {"tokenizer": VQVAE(**tiny.MASK_TOKENIZER | {"num_codes": 7})},
            r"tokenizer.num_codes=7 must equal the vocabulary's 5 codes of mask",
        ),
        ({"num_objects": 0}, "num_objects=0 must be at least 1"),
        ({"aux_objects": 0}, "aux_objects=0 must be at least 1"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in 0..1"),
        ({"early_exit": -1}, "early_exit=-1 must be 0"),
        ({"num_objects": 5}, r"5 objects are 45 tokens, more than max_length=36; lower num_objects or raise"),
        (changed("transformer", parallel=True), "transformer.parallel must be False"),
    ],
)
def test_layout_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PART, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": 1}, "num_tasks=1 must be more than 1, the row of instances"),
        ({"vocab_size": 99}, f"vocab_size=99 must equal the vocabulary's {VOCAB.size} tokens"),
    ],
)
def test_a_solver_that_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK, **changed("transformer", **fields))


def test_detection_has_room_for_more_objects():
    assert dataclasses.replace(DETECTION, num_objects=7).num_objects == 7
    with pytest.raises(ValueError, match="8 objects are 40 tokens, more than max_length=36"):
        dataclasses.replace(DETECTION, num_objects=8)


def test_vocabulary_of_a_config_has_the_codes_of_the_tokenizer():
    assert CODES.size == tiny.CODES
    assert TASK.solver.transformer.vocab_size == VOCAB.size == 13 + 3 + 2 + tiny.CODES + 128 + 2
    without = {name: entry for name, entry in tiny.CONFIG.items() if name != "tokenizer"}
    assert tasks.build(without).parts == {"instances": DETECTION}
    assert DETECTION.vocabulary.codes_of("mask").size == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft_imput": True}, "ObjectsPart: .*'soft_imput' is unknown; did you mean 'soft_input'"),
        ({"tokenizer": {"codes": 3}}, "VQVAE: .*'codes' is unknown"),
        ({"vocabulary": {"classes": 3}}, "Vocabulary: .*'classes' is unknown; did you mean 'num_classes'"),
        ({"transformer": {"heads": 3}}, "TokenTransformer: .*'heads' is unknown"),
        ({"backbone": {"window": 3}}, "SwinV2: .*'window' is unknown; did you mean 'windows'"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(tiny.CONFIG | changes)
