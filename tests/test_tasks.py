"""Tasks: what trains and what does not, the three soft switches, confidence, sizes, errors, building from configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_maps import CODES, CONFIG, GRID, PART, SIZE, TASK, TOKENIZER, K, example, random_state, whole

from aitok_jax import tasks
from aitok_jax.models import losses
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.base import compiled_predict


@pytest.fixture(scope="module")
def batch():
    return example()


@pytest.fixture(scope="module")
def state(batch):
    return random_state(TASK, batch)


@pytest.fixture(scope="module")
def wide():
    return np.random.default_rng(2).random((2, SIZE, 32, 3), np.float32)


@pytest.fixture(scope="module")
def predicted(state, wide):
    return compiled_predict(PART)(*state, {"image": wide})


@pytest.fixture(scope="module")
def trained(state, batch):
    """((loss, (metrics, new model_state)), gradients)."""
    value = jax.value_and_grad(TASK.loss, has_aux=True)
    return jax.jit(lambda params, frozen: value(params, frozen, {"depth": batch}, jax.random.key(0)))(*state)


def test_gradient_reaches_the_solver_and_the_tokenizer_stays(state, batch, trained):
    (_, (_, new_state)), gradients = trained
    jax.tree.map(np.testing.assert_array_equal, new_state, state[1])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), name
        if not name.endswith("wk/bias"):  # adds one number to all logits of a query
            assert np.abs(gradient).max() > 0, name


def test_targets_are_depth_tokens_row_by_row(state, batch):
    targets = PART.targets(state[1], batch["depth"])
    frozen = state[1]["depth_tokenizer"]
    variables = {"params": frozen["params"], **frozen["model_state"]}
    codes = PART.tokenizer.apply(variables, batch["depth"][..., None], method="encode")
    np.testing.assert_array_equal(targets, CODES.start + codes.reshape(2, GRID**2))


def test_a_token_is_predicted_from_those_before_it(state, batch, trained):
    """The solver reads all targets but the last; output t is compared with target t."""
    targets = PART.targets(state[1], batch["depth"])
    apply = jax.jit(lambda params, tokens: TASK.solver.apply({"params": params}, batch["image"], tokens, 2))
    probabilities = jax.nn.softmax(apply(state[0], targets[:, :-1]))
    expected = -np.log(np.take_along_axis(np.asarray(probabilities), np.asarray(targets)[..., None], -1)).mean()
    np.testing.assert_allclose(trained[0][1][0]["cross_entropy"], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(3)
    return rng.normal(size=(2, GRID**2, TASK.vocabulary.size)).astype(np.float32)


def token_loss(part, state, logits, batch):
    targets = np.full((2, GRID**2), CODES.start + 1)
    value = jax.value_and_grad(lambda l: part.token_loss(state[1], l, targets, batch["depth"]), has_aux=True)
    (loss, metrics), gradient = jax.jit(value)(logits)
    return loss, metrics, gradient


def test_auxiliary_loss_is_a_switch_of_the_loss(state, batch, logits):
    """It adds weight · SiLog of the softly decoded map, whose gradient runs through the depth codes alone."""
    loss, metrics, gradient = token_loss(PART, state, logits, batch)
    off, off_metrics, off_gradient = token_loss(dataclasses.replace(PART, aux_weight=0.0), state, logits, batch)
    assert set(off_metrics) == {"cross_entropy"}
    np.testing.assert_allclose(off, metrics["cross_entropy"], rtol=1e-6)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = -np.log(probabilities[..., CODES.start + 1]).mean()
    np.testing.assert_allclose(off, by_hand, rtol=1e-5)
    np.testing.assert_allclose(loss, off + metrics["silog"], rtol=1e-6)
    half, _, _ = token_loss(dataclasses.replace(PART, aux_weight=3.0, loss_weight=0.5), state, logits, batch)
    np.testing.assert_allclose(half, 0.5 * (off + 3 * metrics["silog"]), rtol=1e-6)

    frozen = state[1]["depth_tokenizer"]
    variables = {"params": frozen["params"], **frozen["model_state"]}
    window = logits[..., CODES.slice].reshape(2, GRID, GRID, K)
    soft = PART.tokenizer.apply(variables, window, method="decode_soft")[..., 0]
    np.testing.assert_allclose(metrics["silog"], losses.silog(soft, batch["depth"], min_prediction=1e-3), rtol=1e-5)
    moved = np.abs(gradient - off_gradient).max((0, 1))
    inside = np.zeros(len(moved), bool)
    inside[CODES.slice] = True
    assert (moved[inside] > 1e-6).all()
    np.testing.assert_allclose(moved[~inside], 0, atol=1e-9)


def test_soft_input_changes_what_comes_after_the_first_token(state, batch):
    frozen, soft, hard = state[0], PART, dataclasses.replace(PART, soft_input=False)
    memory = jax.jit(soft.memory)(frozen, batch["image"])
    a, b = (jax.jit(part.decode)(frozen, memory).logits for part in (soft, hard))
    np.testing.assert_allclose(a[:, 0], b[:, 0], rtol=1e-5, atol=1e-5)
    assert (np.abs(a - b).max(-1)[:, 1:] > 1e-3).all()


def test_soft_detokenization_changes_the_map_only(state, wide, predicted):
    hard = dataclasses.replace(PART, soft_detokenize=False)
    other = compiled_predict(hard)(*state, {"image": wide})
    np.testing.assert_allclose(other["confidence"], predicted["confidence"], rtol=1e-4, atol=1e-5)
    assert np.abs(other["depth"] - predicted["depth"]).max() > 1e-3


def test_wide_images_and_their_mirror_images(state, wide, predicted):
    for name in ("depth", "confidence"):
        assert predicted[name].shape == (2, SIZE, 32)
        assert predicted[name].dtype == jnp.float32
    assert np.abs(np.diff(predicted["depth"], axis=0)).max() > 1e-4
    assert predicted["depth"].min() >= 1e-3
    mirrored = compiled_predict(PART)(*state, {"image": wide[:, :, ::-1]})
    for name in ("depth", "confidence"):
        np.testing.assert_allclose(mirrored[name], predicted[name][:, :, ::-1], rtol=1e-3, atol=1e-4)


def test_confidence_is_the_spread_in_metres(state, wide, predicted):
    params, frozen = state
    assert predicted["confidence"].min() >= 0
    assert predicted["confidence"].max() <= 1
    assert np.ptp(predicted["confidence"]) > 0.01
    transformer = params["transformer"]

    def confidence(**changes):
        changed = params | {"transformer": transformer | changes}
        return compiled_predict(PART)(changed, frozen, {"image": wide})["confidence"]

    codes = np.arange(K).reshape(K, 1, 1)
    depths = np.asarray(PART._apply(frozen, "decode", codes)).mean((1, 2, 3))
    assert np.ptp(depths[[0, 2]]) > 1e-3
    even = {name: jnp.zeros_like(transformer[name]) for name in ("voc_embed", "outp_bias")}
    np.testing.assert_allclose(confidence(**even), 1 / (1 + depths.std()), rtol=1e-4)
    one = even | {"outp_bias": transformer["outp_bias"].at[CODES.start + 2].set(99.0)}
    np.testing.assert_allclose(confidence(**one), 1, atol=1e-4)
    two = one | {"outp_bias": one["outp_bias"].at[CODES.start].set(99.0)}
    np.testing.assert_allclose(confidence(**two), 1 / (1 + np.ptp(depths[[0, 2]]) / 2), rtol=1e-4)


def test_images_are_normalised_where_asked(state, batch, wide, trained, predicted):
    """Colours that normalisation takes to those of a task without it give its loss and its prediction."""
    normalised = dataclasses.replace(PART, normalize_image=True)
    mean, std = (np.array(x, np.float32) / 255 for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    coloured = {"depth": batch | {"image": batch["image"] * std + mean}}
    loss = jax.jit(whole(normalised).loss)(*state, coloured, jax.random.key(0))[0]
    np.testing.assert_allclose(loss, trained[0][0], rtol=1e-4)
    depth = compiled_predict(normalised)(*state, {"image": wide * std + mean})["depth"]
    np.testing.assert_allclose(depth, predicted["depth"], rtol=1e-3, atol=1e-4)


def test_prediction_is_compiled_once_for_equal_parts():
    assert compiled_predict(tasks.build(CONFIG).parts["depth"]) is compiled_predict(PART)


def test_bins_tokenizer_needs_no_state(state, batch):
    bins = dataclasses.replace(PART, tokenizer=BinsTokenizer(downsample=8, num_codes=K))
    loss, (metrics, new_state) = jax.jit(whole(bins).loss)(state[0], {}, {"depth": batch}, jax.random.key(0))
    assert new_state == {}
    assert np.isfinite(loss)
    assert set(metrics) == {"cross_entropy", "silog"}
    built = tasks.build(CONFIG | {"tokenizer": {"kind": "bins", "downsample": 8, "num_codes": K}})
    assert built.parts == {"depth": bins}


def changed(part, **fields):
    solver = TASK.solver
    parts = {"backbone": solver.backbone, "transformer": solver.transformer}
    return {"solver": TaskSolver(**parts | {part: parts[part].clone(**fields)})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 28}, r"image_size=28 .* tokenizer.downsample, 8; the nearest sizes are 24 and 32"),
        (
            changed(
                "backbone",
                depths=(1,) * 3,
                num_heads=(2,) * 3,
                windows=(3,) * 3,
                pretrain_windows=(3,) * 3,
                use_shift=(True,) * 3,
            ),
            r"image_size=24 .* backbone stride, 16; the nearest sizes are 16 and 32",
        ),
        (changed("transformer", max_length=8), "9 tokens of an image of 24 pixels are more than max_length=8"),
        (
            {"tokenizer": VQVAE(**TOKENIZER | {"num_codes": 7})},
            r"num_codes=7 must equal .* 6 codes of depth",
        ),
        (changed("transformer", parallel=True), "parallel .* soft_input=False"),
    ],
)
def test_layout_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PART, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dept"}, r"task: 'dept' is unknown; did you mean 'depth'"),
        ({"name": "dept_tokenizer"}, r"task: .*'dept' is unknown; did you mean 'depth'"),
        ({"soft_imput": True}, "MapPart: .*'soft_imput' is unknown; did you mean 'soft_input'"),
        ({"backbone": CONFIG["backbone"] | {"window": 3}}, "SwinV2: .*'window' is unknown; did you mean 'windows'"),
        ({"transformer": CONFIG["transformer"] | {"heads": 3}}, "TokenTransformer: .*'heads' is unknown"),
        ({"tokenizer": TOKENIZER | {"codes": 3}}, "VQVAE: .*'codes' is unknown"),
        ({"vocabulary": {"bins": 3}}, "Vocabulary: .*'bins' is unknown; did you mean 'num_bins'"),
        ({"tokenizer": TOKENIZER | {"kind": "bin"}}, r"tokenizer.kind='bin' is not one of vqvae, bins"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(CONFIG | changes)


def test_parallel_task_from_a_config():
    transformer = CONFIG["transformer"] | {"parallel": True}
    task = tasks.build(CONFIG | {"transformer": transformer, "soft_input": False})
    assert task.solver.transformer.parallel
    assert task.vocabulary.codes_of("depth").size == K
    assert task.solver.transformer.vocab_size == task.vocabulary.size == 3 + 2 + 2 + 3 + K + 2


def test_task_errors():
    with pytest.raises(ValueError, match=f"vocab_size=99 must equal the vocabulary's {TASK.vocabulary.size}"):
        whole(PART, **changed("transformer", vocab_size=99))
    with pytest.raises(ValueError, match="num_tasks=2 must be more than 2, the row of depth"):
        whole(PART, **changed("transformer", num_tasks=2))
    with pytest.raises(ValueError, match=r"must bring images to one size, .*'a': 24, 'b': 48"):
        dataclasses.replace(TASK, parts={"a": PART, "b": dataclasses.replace(PART, pad_to=48)})
