"""Decoding of objects: the cached loop against a slow one, windows, scores, sampling, early exit, errors."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models.decode_objects import decode_objects, nucleus
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks.vocabulary import Vocabulary

VOCAB = Vocabulary(num_bins=6, num_classes=4, codes=(("mask", 5), ("depth", 3)), num_spare=2)
MASKS = VOCAB.codes_of("mask")
OBJECTS, D, LABEL = 3, 16, 4
MANY = 12  # objects, for early exits
KINDS = {"detection": (0, 0), "instances": (1, 2)}  # task id, mask tokens
MODEL = TokenTransformer(
    dim=D,
    num_heads=2,
    hidden=24,
    encoder_layers=1,
    decoder_layers=2,
    vocab_size=VOCAB.size,
    max_length=7 * MANY,
    num_tasks=2,
)


@pytest.fixture(scope="module")
def params():
    """Weights for which the inputs of the steps decide the tokens."""
    args = (jnp.zeros((1, 2, 3, 5)), jnp.zeros((1, 2), int), 0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *args)["params"]
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
def compiled(kind="instances", model=MODEL, **options):
    task, mask_tokens = KINDS[kind]
    options = {"num_objects": OBJECTS, "soft_input": False} | options

    def run(params, memory, rngs_B=None):
        shared = {"task": task, "mask_tokens": mask_tokens, "rngs_B": rngs_B}
        return decode_objects(model, params, memory, VOCAB, **shared, **options)

    return jax.jit(run)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def rows(memory, index):
    return jax.tree.map(lambda array: array[index], memory)


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@functools.cache
def teacher(task):
    return jax.jit(lambda p, m, tokens_BT: MODEL.apply({"params": p}, m, tokens_BT, task, method="decode"))


def windows(kind, count=OBJECTS):
    return ([VOCAB.coordinates] * LABEL + [VOCAB.classes] + [MASKS] * KINDS[kind][1]) * count


def check_against(decoded, logits_BTV, kind):
    """Tokens, scores, noise and mask logits that the logits of all steps stand for."""
    logits, slots = np.asarray(logits_BTV), windows(kind)
    tokens = np.stack([w.start + logits[:, t, w.slice].argmax(-1) for t, w in enumerate(slots)], 1)
    length = len(slots) // OBJECTS
    np.testing.assert_array_equal(decoded.tokens, tokens.reshape(-1, OBJECTS, length))
    labels = np.exp(logits[:, LABEL::length, [*range(VOCAB.classes.start, VOCAB.classes.stop), VOCAB.noise]])
    probabilities = labels / labels.sum(-1, keepdims=True)
    np.testing.assert_allclose(decoded.scores, probabilities[..., :-1].max(-1), rtol=1e-4)
    np.testing.assert_array_equal(decoded.noise, probabilities.argmax(-1) == VOCAB.num_classes)
    codes = logits[..., MASKS.slice].reshape(-1, OBJECTS, length, MASKS.size)
    mask_logits = codes[:, :, LABEL + 1 :]
    assert decoded.mask_logits.shape == mask_logits.shape
    np.testing.assert_allclose(decoded.mask_logits, mask_logits, rtol=1e-4, atol=1e-4)
    assert decoded.steps == len(slots)


def test_hard_decoding_equals_a_slow_loop(params, memory, kind):
    """Without a cache: every step is a teacher-forced pass over all tokens before it."""
    decoded, slots = compiled(kind)(params, memory), windows(kind)
    forced, tokens = teacher(KINDS[kind][0]), np.zeros((3, len(slots)), int)
    for t, window in enumerate(slots):
        logits = forced(params, memory, tokens[:, :-1])
        tokens[:, t] = window.start + np.argmax(logits[:, t, window.slice], -1)
    check_against(decoded, logits, kind)
    assert len(np.unique(tokens)) > 5, "the test needs tokens that differ"
    assert (np.asarray(logits).argmax(-1) != tokens).any(), "the test needs the windows to matter"
    assert 0 < np.mean(decoded.noise) < 1, "the test needs noise and objects"


def test_detection_without_mask_codes_in_the_vocabulary(params, memory):
    """The windows after the missing codes are those of depth, which detection does not see."""
    bare = dataclasses.replace(VOCAB, codes=(("mask", 0), ("depth", 8)))
    shared = {"task": 0, "num_objects": OBJECTS, "mask_tokens": 0, "soft_input": False}
    decoded = jax.jit(lambda p, m: decode_objects(MODEL, p, m, bare, **shared))(params, memory)
    np.testing.assert_array_equal(decoded.tokens, compiled("detection")(params, memory).tokens)
    assert decoded.mask_logits.shape == (3, OBJECTS, 0, 0)


@functools.cache
def embedded(task):
    """Logits of all steps for input vectors [B,T,D], position 0 included."""

    def forward(params, memory, x_BTD):
        def blocks(model):
            y = x_BTD + params["dec_embed"][task, None, : x_BTD.shape[1]]
            for block, keys_values in zip(model.decoder.blocks, memory, strict=True):
                y = block(y, keys_values, False)
            return model.logits(y)

        return MODEL.apply({"params": params}, method=blocks)

    return jax.jit(forward)


def test_soft_decoding_equals_a_slow_loop(params, memory, kind):
    """After a mask token the expected embedding over its window goes in; after boxes and classes the token's own."""
    decoded, slots = compiled(kind, soft_input=True)(params, memory), windows(kind)
    table, task = np.asarray(params["voc_embed"]), KINDS[kind][0]
    x = np.zeros((3, len(slots) + 1, D), np.float32)
    x[:, 0] = params["task_embed"][task]
    for t, window in enumerate(slots):
        logits = embedded(task)(params, memory, x[:, :-1])
        own = np.asarray(logits[:, t, window.slice])
        soft = np.asarray(jax.nn.softmax(own)) @ table[window.slice]
        x[:, t + 1] = soft if window == MASKS else table[window.start + own.argmax(-1)]
    check_against(decoded, logits, kind)
    hard = compiled(kind)(params, memory)
    if kind == "instances":
        change = np.abs(decoded.mask_logits - hard.mask_logits).max((0, 3))
        np.testing.assert_allclose(change[0, 0], 0, atol=1e-5)  # no mask token came before it
        assert (change.reshape(-1)[1:] > 1e-3).all()
    else:
        np.testing.assert_array_equal(decoded.tokens, hard.tokens)


def test_nucleus_keeps_the_boundary_token():
    p = jnp.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.15, 0.1, 0.5]])
    for top_p, kept in ((0.0, [0.5]), (0.3, [0.5]), (0.55, [0.5, 0.25]), (0.8, [0.5, 0.25, 0.15]), (1.0, p[0])):
        ours = nucleus(p, top_p)
        expected = np.where(np.isin(p, np.array(kept, np.float32)), p, 0)
        np.testing.assert_allclose(ours, expected / expected.sum(-1, keepdims=True), rtol=1e-6, err_msg=top_p)


@pytest.fixture(scope="module")
def sampled(params, memory):
    """Three images, each with the key of its number."""
    return compiled(soft_input=True, top_p=0.7)(params, memory, keys(0, 1, 2))


def test_sampled_tokens_lie_in_the_windows_of_their_slots(sampled):
    tokens = sampled.tokens.reshape(3, -1)
    for t, window in enumerate(windows("instances")):
        assert ((tokens[:, t] >= window.start) & (tokens[:, t] < window.stop)).all()


def test_a_row_alone_is_the_row_in_the_batch(params, memory, sampled):
    greedy = compiled(soft_input=True)(params, memory)
    for together, top_p in ((sampled, 0.7), (greedy, 0.0)):
        run = compiled(soft_input=True, top_p=top_p) if top_p else compiled(soft_input=True)
        assert len(np.unique(together.tokens.reshape(3, -1), axis=0)) == 3
        for i in range(3):
            alone = run(params, rows(memory, slice(i, i + 1)), keys(i) if top_p else None)
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
            np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(alone.mask_logits[0], together.mask_logits[i], rtol=1e-4, atol=1e-4)


def test_sampling_has_one_key_a_row(params, memory, sampled):
    sample = compiled(soft_input=True, top_p=0.7)
    again, other = (sample(params, memory, keys(*k)).tokens for k in ((0, 1, 2), (0, 8, 2)))
    np.testing.assert_array_equal(again, sampled.tokens)
    np.testing.assert_array_equal(other[::2], sampled.tokens[::2])
    assert (other[1] != sampled.tokens[1]).any()
    one_image = rows(memory, np.zeros(3, int))
    tokens = sample(params, one_image, keys(4, 4, 9)).tokens
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[2] != tokens[1]).any()


def test_a_tiny_nucleus_is_greedy(params, memory):
    """And the keys then make no difference."""
    greedy = compiled("detection")(params, memory)
    sampled = compiled("detection", top_p=1e-6)(params, memory, keys(0, 1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sampled, greedy)


def test_samples_stay_in_the_nucleus_of_their_window(params, memory):
    tail_cut, not_greedy = False, False
    tokens = compiled("detection", top_p=0.5)(params, memory, keys(0, 1, 2)).tokens.reshape(3, -1)
    logits = teacher(0)(params, memory, tokens[:, :-1])
    for t, window in enumerate(windows("detection")):
        probabilities = jax.nn.softmax(logits[:, t, window.slice])
        allowed = np.asarray(nucleus(probabilities, 0.5)) > 0
        assert np.take_along_axis(allowed, np.asarray(tokens[:, t, None]) - window.start, -1).all()
        tail_cut |= not allowed.all()
        not_greedy |= (window.start + np.argmax(probabilities, -1) != tokens[:, t]).any()
    assert tail_cut
    assert not_greedy


@pytest.fixture(scope="module")
def from_a_bias(params, memory):
    """(bias, 3000 samples of one object): logits are the bias alone; other windows than the slot's are far above."""
    bias = np.random.default_rng(5).normal(size=VOCAB.size).astype(np.float32)
    bias[VOCAB.classes.slice], bias[VOCAB.noise] = np.log([1, 2, 3, 4]), np.log(10)
    bias[VOCAB.end_of_sequence] = bias[MASKS.slice] = bias[VOCAB.codes_of("depth").slice] = 50
    flat = params | {"voc_embed": jnp.zeros_like(params["voc_embed"]), "outp_bias": jnp.asarray(bias)}
    many = rows(memory, np.zeros(3000, int))
    return bias, compiled("detection", top_p=1.0, num_objects=1)(flat, many, keys(*range(3000)))


def test_samples_follow_the_probabilities(from_a_bias):
    """All steps draw from one distribution, each for itself."""
    bias, decoded = from_a_bias
    expected, tokens = jax.nn.softmax(bias[VOCAB.coordinates.slice]), decoded.tokens[:, 0]
    for slot in range(4):
        frequency = np.bincount(tokens[:, slot], minlength=7) / 3000
        np.testing.assert_allclose(frequency, expected, atol=0.04)
    agree = np.mean(tokens[:, 0] == tokens[:, 1])
    assert agree == pytest.approx(np.sum(np.square(expected)), abs=0.04)
    classes = np.bincount(tokens[:, LABEL] - VOCAB.classes.start) / 3000
    np.testing.assert_allclose(classes, [0.1, 0.2, 0.3, 0.4], atol=0.04)


def test_score_of_a_sampled_class_is_its_probability_among_classes_and_noise(from_a_bias):
    _, decoded = from_a_bias
    classes = decoded.tokens[..., LABEL] - VOCAB.classes.start
    np.testing.assert_allclose(decoded.scores, (classes + 1) / 20, rtol=1e-4)
    assert decoded.noise.all()


def runs_of_noise(noise_BN):
    """int[B,N]: how many of the objects up to this one are noise without a break."""
    runs, run = np.zeros(noise_BN.shape, int), 0
    for n, noise_B in enumerate(noise_BN.T):
        run = runs[:, n] = np.where(noise_B, run + 1, 0)
    return runs


@pytest.mark.parametrize("early_exit", [1, 2])
def test_early_exit_waits_for_all_rows_and_changes_nothing_before(params, memory, early_exit):
    often = params | {
        "dec_embed": 0.5 * params["dec_embed"],  # so that the images matter more
        "outp_bias": params["outp_bias"].at[VOCAB.noise].add(4.875),
    }
    full = compiled(num_objects=MANY)(often, memory)
    early = compiled(num_objects=MANY, early_exit=early_exit)(often, memory)
    runs = runs_of_noise(np.asarray(full.noise))
    done = (runs >= early_exit).all(0)
    count = int(np.argmax(done)) + 1
    length = full.tokens.shape[-1]
    assert done.any(), "the test needs all rows to end"
    assert (runs[:, : count - 1] >= early_exit).any(), "the test needs a row that is finished before another"
    ever = (np.cumsum(full.noise, 1) >= early_exit).all(0)
    assert np.argmax(ever) + 1 < count, "the test needs an object after noise"
    assert early.steps == count * length
    assert full.steps == MANY * length
    for name in ("tokens", "scores", "mask_logits"):
        ours, whole = getattr(early, name), getattr(full, name)
        assert ours.shape == whole.shape
        np.testing.assert_allclose(ours[:, :count], whole[:, :count], rtol=1e-5, atol=1e-5, err_msg=name)
        assert (np.asarray(ours[:, count:]) == 0).all(), name
    np.testing.assert_array_equal(early.noise[:, :count], full.noise[:, :count])


def test_early_exit_does_not_come_before_the_objects_do(params, memory):
    for bias, count in ((-99.0, MANY), (99.0, 3)):
        biased = params | {"outp_bias": params["outp_bias"].at[VOCAB.noise].set(bias)}
        decoded = compiled(num_objects=MANY, early_exit=3)(biased, memory)
        assert decoded.steps == count * 7
        np.testing.assert_array_equal((np.asarray(decoded.tokens) > 0).any((0, 2)), np.arange(MANY) < count)


def test_errors(params, memory):
    with pytest.raises(ValueError, match=rf"sequence of {7 * (MANY + 1)} tokens .* max_length={7 * MANY}"):
        compiled(num_objects=MANY + 1)(params, memory)
    with pytest.raises(ValueError, match=r"top_p=0\.5 samples and needs one key a row"):
        compiled(top_p=0.5)(params, memory)
    for top_p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"top_p={top_p} must lie in 0\.\.1"):
            compiled(top_p=top_p)(params, memory, keys(0, 1, 2))
    with pytest.raises(ValueError, match=r"early_exit=-1 must be 0"):
        compiled(early_exit=-1)(params, memory)
    with pytest.raises(ValueError, match=r"needs? parallel=False"):
        compiled(model=MODEL.clone(parallel=True))(params, memory)


def test_caches_are_updated_in_place(params, memory):
    """No loop of the compiled program copies a cache, which would be most of its time."""
    text = compiled(soft_input=True).lower(params, rows(memory, slice(0, 1))).compile().as_text()
    loops = text.split("\nENTRY ")[0]
    cache = rf"f32\[(1,)?{MODEL.num_heads},{OBJECTS * 7},{D // MODEL.num_heads}\]\S*"
    assert re.search(rf"= {cache} (fusion|dynamic-update-slice)\(", loops), "the test needs to find the caches"
    assert not re.search(rf"= {cache} copy\(", loops)
