"""Tasks: what trains and what does not, the three soft switches, confidence, sizes, errors, building from configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax import tasks
from aitok_jax.models import losses
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.tokenizer import DepthTokenizerTask

SIZE, GRID, K = 24, 3, 6
TOKENIZER = {"hidden": 4, "downsample": 8, "num_res_blocks": 0, "num_codes": K, "code_dim": 4}
CONFIG = {
    "name": "depth",
    "image_size": SIZE,
    "tokenizer": TOKENIZER,
    "vocabulary": {"num_bins": 2, "num_classes": 2, "num_mask_codes": 3, "num_spare": 2},
    "backbone": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "windows": [3, 3],
        "pretrain_windows": [3, 3],
        "use_shift": [True, False],
    },
    "transformer": {
        "dim": 16,
        "num_heads": 2,
        "hidden": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_length": GRID**2,
        "num_tasks": 3,
        "drop_path": 0.0,
        "dropout": 0.0,
    },
}
TASK = tasks.build(CONFIG)
TOKENIZER_TASK = DepthTokenizerTask(VQVAE(**TOKENIZER), SIZE, mask_ratio=0.0, mask_patch=8)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 9, (2, SIZE, SIZE)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.2] = 0
    return {"image": rng.random((2, SIZE, SIZE, 3), np.float32), "depth": depth}


def random_state(task, batch):
    """(params, model_state), large enough for every part to matter; the tokenizer decodes to positive depths."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        positive = path[-1].key in ("scale", "cluster_size") or path[-2].key == "layers_8"
        return jnp.asarray((3.0 if positive else 0.0) + rng.normal(0, 0.3, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(task.init, jax.random.key(0), batch))


@pytest.fixture(scope="module")
def state(batch):
    return random_state(TASK, batch)


@pytest.fixture(scope="module")
def wide():
    return np.random.default_rng(2).random((2, SIZE, 32, 3), np.float32)


@pytest.fixture(scope="module")
def predicted(state, wide):
    return compiled_predict(TASK)(*state, {"image": wide})


@pytest.fixture(scope="module")
def trained(state, batch):
    """((loss, (metrics, new model_state)), gradients)."""
    value = jax.value_and_grad(TASK.loss, has_aux=True)
    return jax.jit(lambda params, frozen: value(params, frozen, batch, jax.random.key(0)))(*state)


def test_gradient_reaches_the_solver_and_the_tokenizer_stays(state, batch, trained):
    (_, (_, new_state)), gradients = trained
    jax.tree.map(np.testing.assert_array_equal, new_state, state[1])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), name
        if not name.endswith("wk/bias"):  # adds one number to all logits of a query
            assert np.abs(gradient).max() > 0, name


def test_targets_are_depth_tokens_row_by_row(state, batch):
    targets = TASK.targets(state[1], batch["depth"])
    frozen = state[1]["depth_tokenizer"]
    variables = {"params": frozen["params"], **frozen["model_state"]}
    codes = TASK.tokenizer.apply(variables, batch["depth"][..., None], method="encode")
    np.testing.assert_array_equal(targets, TASK.vocabulary.depth_codes.start + codes.reshape(2, GRID**2))


def test_a_token_is_predicted_from_those_before_it(state, batch, trained):
    """The solver reads all targets but the last; output t is compared with target t."""
    targets = TASK.targets(state[1], batch["depth"])
    apply = jax.jit(lambda params, tokens: TASK.solver.apply({"params": params}, batch["image"], tokens, 2))
    probabilities = jax.nn.softmax(apply(state[0], targets[:, :-1]))
    expected = -np.log(np.take_along_axis(np.asarray(probabilities), np.asarray(targets)[..., None], -1)).mean()
    np.testing.assert_allclose(trained[0][1][0]["cross_entropy"], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(3)
    return rng.normal(size=(2, GRID**2, TASK.vocabulary.size)).astype(np.float32)


def token_loss(task, state, logits, batch):
    targets = np.full((2, GRID**2), task.vocabulary.depth_codes.start + 1)
    value = jax.value_and_grad(lambda l: task.token_loss(state[1], l, targets, batch["depth"]), has_aux=True)
    (loss, metrics), gradient = jax.jit(value)(logits)
    return loss, metrics, gradient


def test_auxiliary_loss_is_a_switch_of_the_loss(state, batch, logits):
    """It adds weight · SiLog of the softly decoded map, whose gradient runs through the depth codes alone."""
    loss, metrics, gradient = token_loss(TASK, state, logits, batch)
    off, off_metrics, off_gradient = token_loss(dataclasses.replace(TASK, aux_weight=0.0), state, logits, batch)
    assert set(off_metrics) == {"cross_entropy"}
    np.testing.assert_allclose(off, metrics["cross_entropy"], rtol=1e-6)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = -np.log(probabilities[..., TASK.vocabulary.depth_codes.start + 1]).mean()
    np.testing.assert_allclose(off, by_hand, rtol=1e-5)
    np.testing.assert_allclose(loss, off + metrics["silog"], rtol=1e-6)
    half, _, _ = token_loss(dataclasses.replace(TASK, aux_weight=3.0, loss_weight=0.5), state, logits, batch)
    np.testing.assert_allclose(half, 0.5 * (off + 3 * metrics["silog"]), rtol=1e-6)

    frozen = state[1]["depth_tokenizer"]
    variables = {"params": frozen["params"], **frozen["model_state"]}
    window = logits[..., TASK.vocabulary.depth_codes.slice].reshape(2, GRID, GRID, K)
    soft = TASK.tokenizer.apply(variables, window, method="decode_soft")[..., 0]
    np.testing.assert_allclose(metrics["silog"], losses.silog(soft, batch["depth"], min_prediction=1e-3), rtol=1e-5)
    moved = np.abs(gradient - off_gradient).max((0, 1))
    inside = np.zeros(len(moved), bool)
    inside[TASK.vocabulary.depth_codes.slice] = True
    assert (moved[inside] > 1e-6).all()
    np.testing.assert_allclose(moved[~inside], 0, atol=1e-9)


def test_soft_input_changes_what_comes_after_the_first_token(state, batch):
    frozen, soft, hard = state[0], TASK, dataclasses.replace(TASK, soft_input=False)
    memory = jax.jit(soft.memory)(frozen, batch["image"])
    a, b = (jax.jit(task.decode)(frozen, memory).logits for task in (soft, hard))
    np.testing.assert_allclose(a[:, 0], b[:, 0], rtol=1e-5, atol=1e-5)
    assert (np.abs(a - b).max(-1)[:, 1:] > 1e-3).all()


def test_soft_detokenization_changes_the_map_only(state, wide, predicted):
    hard = dataclasses.replace(TASK, soft_detokenize=False)
    other = compiled_predict(hard)(*state, {"image": wide})
    np.testing.assert_allclose(other["confidence"], predicted["confidence"], rtol=1e-4, atol=1e-5)
    assert np.abs(other["depth"] - predicted["depth"]).max() > 1e-3


def test_wide_images_and_their_mirror_images(state, wide, predicted):
    for name in ("depth", "confidence"):
        assert predicted[name].shape == (2, SIZE, 32)
        assert predicted[name].dtype == jnp.float32
    assert np.abs(np.diff(predicted["depth"], axis=0)).max() > 1e-4
    assert predicted["depth"].min() >= 1e-3
    mirrored = compiled_predict(TASK)(*state, {"image": wide[:, :, ::-1]})
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
        return compiled_predict(TASK)(changed, frozen, {"image": wide})["confidence"]

    codes = np.arange(K).reshape(K, 1, 1)
    depths = np.asarray(TASK._tokenizer(frozen, "decode", codes)).mean((1, 2, 3))
    assert np.ptp(depths[[0, 2]]) > 1e-3
    even = {name: jnp.zeros_like(transformer[name]) for name in ("voc_embed", "outp_bias")}
    np.testing.assert_allclose(confidence(**even), 1 / (1 + depths.std()), rtol=1e-4)
    one = even | {"outp_bias": transformer["outp_bias"].at[TASK.vocabulary.depth_codes.start + 2].set(99.0)}
    np.testing.assert_allclose(confidence(**one), 1, atol=1e-4)
    two = one | {"outp_bias": one["outp_bias"].at[TASK.vocabulary.depth_codes.start].set(99.0)}
    np.testing.assert_allclose(confidence(**two), 1 / (1 + np.ptp(depths[[0, 2]]) / 2), rtol=1e-4)


def test_images_are_normalised_where_asked(state, batch, wide, trained, predicted):
    """Colours that normalisation takes to those of a task without it give its loss and its prediction."""
    normalised = dataclasses.replace(TASK, normalize_image=True)
    mean, std = (np.array(x, np.float32) / 255 for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    loss = jax.jit(normalised.loss)(*state, batch | {"image": batch["image"] * std + mean}, jax.random.key(0))[0]
    np.testing.assert_allclose(loss, trained[0][0], rtol=1e-4)
    depth = compiled_predict(normalised)(*state, {"image": wide * std + mean})["depth"]
    np.testing.assert_allclose(depth, predicted["depth"], rtol=1e-3, atol=1e-4)


def test_prediction_is_compiled_once_for_equal_tasks():
    assert compiled_predict(tasks.build(CONFIG)) is compiled_predict(TASK)


def test_bins_tokenizer_needs_no_state(state, batch):
    bins = dataclasses.replace(TASK, tokenizer=BinsTokenizer(downsample=8, num_codes=K))
    loss, (metrics, new_state) = jax.jit(bins.loss)(state[0], {}, batch, jax.random.key(0))
    assert new_state == {}
    assert np.isfinite(loss)
    assert set(metrics) == {"cross_entropy", "silog"}
    built = tasks.build(CONFIG | {"tokenizer": {"kind": "bins", "downsample": 8, "num_codes": K}})
    assert built == bins


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
        ({"tokenizer": VQVAE(**TOKENIZER | {"num_codes": 7})}, r"num_codes=7 must equal .*num_depth_codes=6"),
        (changed("transformer", vocab_size=99), f"vocab_size=99 must equal the vocabulary's {TASK.vocabulary.size}"),
        (changed("transformer", parallel=True), "parallel .* soft_input=False"),
    ],
)
def test_layout_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dept"}, r"task.name='dept': .*did you mean 'depth'.*depth_tokenizer"),
        ({"soft_imput": True}, "DepthTask: .*'soft_imput' is unknown; did you mean 'soft_input'"),
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
    assert task.vocabulary.num_depth_codes == K
    assert task.solver.transformer.vocab_size == task.vocabulary.size == 3 + 2 + 2 + 3 + K + 2


def test_tokenizer_task_from_a_config():
    config = {"name": "depth_tokenizer", "image_size": SIZE, "tokenizer": TOKENIZER, "mask_ratio": 0.0, "mask_patch": 8}
    assert tasks.build(config) == TOKENIZER_TASK
    with pytest.raises(ValueError, match=r"DepthTokenizerTask: .*'mask_ration' is unknown; did you mean 'mask_ratio'"):
        tasks.build(config | {"mask_ration": 0.1})
    with pytest.raises(ValueError, match="28×28 must be a multiple of downsample=8"):
        tasks.build(config | {"image_size": 28})
    with pytest.raises(ValueError, match="image_size=24 must be a multiple of mask_patch=16"):
        tasks.build(config | {"mask_ratio": 0.5, "mask_patch": 16})


@pytest.fixture(scope="module")
def tokenizer_state(batch):
    return random_state(TOKENIZER_TASK, batch)


@pytest.fixture(scope="module")
def tokenizer_predict():
    return compiled_predict(TOKENIZER_TASK)


def test_tokenizer_loss_counts_annotated_pixels_only(batch, tokenizer_state, tokenizer_predict):
    """Without mask augmentation the reconstruction is the prediction; it is compared where there is annotation."""
    loss, (metrics, new_state) = jax.jit(TOKENIZER_TASK.loss)(*tokenizer_state, batch, jax.random.key(0))
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
    task = dataclasses.replace(TOKENIZER_TASK, mask_ratio=1.0)
    _, (metrics, _) = jax.jit(task.loss)(*tokenizer_state, batch, jax.random.key(0))
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


def test_input_noise_replaces_the_share_of_tokens_asked_for():
    window = TASK.vocabulary.depth_codes
    tokens = jnp.full((200, 100), window.start)
    noisy = dataclasses.replace(TASK, input_noise=0.25)._corrupted(jax.random.key(0), tokens)
    assert ((noisy >= window.start) & (noisy < window.stop)).all()
    assert jnp.mean(noisy != tokens) == pytest.approx(0.25 * (1 - 1 / K), abs=0.01)
    assert TASK._corrupted(jax.random.key(0), tokens) is tokens
    with pytest.raises(ValueError, match=r"input_noise=1.5 must lie in 0..1"):
        dataclasses.replace(TASK, input_noise=1.5)


def test_memory_loss_reads_a_token_off_the_vectors_of_its_patch(batch):
    """Stride 4 and tokens of 8 pixels: 2x2 vectors a token, in the order of `partition`."""
    task = tasks.build({**CONFIG, "backbone": {**CONFIG["backbone"], "patch": 2}, "memory_weight": 1.0})
    params, state = random_state(task, batch)
    targets = task.targets(state, batch["depth"])
    side = task.image_size // 4
    memory = np.random.default_rng(0).normal(size=(len(targets), side, side, task.solver.transformer.dim))
    logits = np.zeros((*targets.shape, task.vocabulary.size), np.float32)
    flat = memory.reshape(len(targets), side**2, -1)
    _, metrics = task.score(params, state, logits, flat, (targets, batch["depth"]))
    head = jax.tree.map(np.asarray, params["depth_memory_head"])
    read = np.zeros((*targets.shape, K), np.float32)
    for t in range(targets.shape[1]):
        row, column = divmod(t, task.grid)
        patch = memory[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(len(targets), -1)
        read[:, t] = patch @ head["kernel"] + head["bias"]
    expected = task._window_loss(state, read, targets, batch["depth"])
    np.testing.assert_allclose(metrics["memory_loss"], expected, rtol=1e-4)


def test_memory_loss_teaches_the_encoder_and_leaves_prediction_alone(batch):
    backbone = {**CONFIG["backbone"], "patch": 4}  # stride 8, as the tokenizer
    task = tasks.build({**CONFIG, "backbone": backbone, "memory_weight": 0.5})
    params, state = random_state(task, batch)
    plain = dataclasses.replace(task, memory_weight=0.0)
    without = {name: params[name] for name in ("backbone", "transformer")}

    def gradients(task, params):
        return jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, state, batch, jax.random.key(0))

    (loss, (metrics, _)), grads = gradients(task, params)
    (plain_loss, _), plain_grads = gradients(plain, without)
    np.testing.assert_allclose(loss, plain_loss + 0.5 * metrics["memory_loss"], rtol=1e-5)
    assert jnp.abs(grads["depth_memory_head"]["kernel"]).max() > 0
    decoder = [g["transformer"]["decoder"]["blocks_0"]["mlp"]["fc1"]["kernel"] for g in (grads, plain_grads)]
    np.testing.assert_allclose(*decoder, rtol=1e-4, atol=1e-7)
    stems = [g["backbone"]["patch_embed"]["proj"]["kernel"] for g in (grads, plain_grads)]
    assert jnp.abs(stems[0] - stems[1]).max() > 1e-6
    np.testing.assert_array_equal(
        compiled_predict(task)(params, state, batch)["depth"], compiled_predict(plain)(without, state, batch)["depth"]
    )
    with pytest.raises(ValueError, match=r"backbone stride 24 must divide tokenizer.downsample=8"):
        tasks.build({**CONFIG, "backbone": {**backbone, "patch": 12}, "memory_weight": 0.5})
