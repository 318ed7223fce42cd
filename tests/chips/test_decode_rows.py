"""Steps as a TPU takes them, with the kernel in interpret mode, decode what the plain steps decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import decode, decode_kernel, decode_objects, decode_rows
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.parallel import sharding
from aitok_jax.tasks.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_bins=6, num_classes=3, codes=(("mask", 4), ("depth", 6)), num_spare=2)
MODEL = TokenTransformer(
    dim=128,
    num_heads=4,
    hidden=64,
    encoder_layers=1,
    decoder_layers=2,
    vocab_size=VOCABULARY.size,
    max_length=27,
    num_tasks=3,
)
interpreted = functools.partial(decode_kernel.attend, interpret=True)


@pytest.fixture(scope="module")
def given():
    """Parameters with which tokens differ, and the memory of eight images."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2, 3, 5)), jnp.zeros((1, 2), int), 0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes["params"])
    params["norm"] = {"scale": jnp.ones(128), "bias": jnp.zeros(128)}
    memory = [tuple(jnp.asarray(rng.normal(size=(2, 8, 4, 21, 32)), jnp.float32)) for _ in range(2)]
    return params, memory


def both(monkeypatch, run, *args, mesh=None):
    """By plain steps, and by rows."""
    results = []
    for rows in (False, True):
        monkeypatch.setattr(decode, "on_platform", lambda run, _, *args, rows=rows: run(rows, *args))
        monkeypatch.setattr(decode_objects, "on_platform", decode.on_platform)
        monkeypatch.setattr(decode_rows.decode_kernel, "attend", interpreted)
        with jax.set_mesh(mesh or sharding.make_mesh(1, jax.devices()[:1])):
            results.append(jax.jit(functools.partial(run))(*args))
    return results


@pytest.mark.parametrize("devices", [1, 8])
def test_maps(monkeypatch, given, devices):
    options = {"task": 2, "length": 20, "window": VOCABULARY.codes_of("depth").slice, "soft_input": True}
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    plain, rows = both(monkeypatch, lambda p, m: decode.decode(MODEL, p, m, **options), *given, mesh=mesh)
    np.testing.assert_allclose(rows.logits, plain.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(rows.tokens, plain.tokens)
    assert len(np.unique(rows.tokens)) > 2, "the test needs tokens that differ"


@pytest.mark.parametrize("images", [1, 3])
def test_objects(monkeypatch, given, images):
    params, memory = given
    some = [tuple(x[:images] for x in layer) for layer in memory]
    options = {"task": 0, "num_objects": 3, "mask_tokens": 4, "soft_input": True, "top_p": 0.5}

    def run(params, memory, rngs):
        return decode_objects.decode_objects(MODEL, params, memory, VOCABULARY, **options, rngs_B=rngs)

    plain, rows = both(monkeypatch, run, params, some, jax.random.split(jax.random.key(0), images))
    np.testing.assert_array_equal(rows.tokens, plain.tokens)
    np.testing.assert_allclose(rows.scores, plain.scores, rtol=1e-4)
    np.testing.assert_allclose(rows.mask_logits, plain.mask_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 17, 512, 513, 1100])
def test_only_what_is_filled_counts(length):
    rng = np.random.default_rng(1)
    q, (keys, values) = rng.normal(size=(11, 128)), rng.normal(size=(2, 11, 4, 1100, 32))
    packed = decode_kernel.pack(*(jnp.asarray(x, jnp.float32) for x in (keys, values)))
    found = interpreted(jnp.asarray(q, jnp.float32), packed, length, heads=4)
    logits = np.einsum("bhd,bhkd->bhk", q.reshape(11, 4, 32), keys[:, :, :length])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhk,bhkd->bhd", weights / weights.sum(-1, keepdims=True), values[:, :, :length])
    np.testing.assert_allclose(found, expected.reshape(11, -1), rtol=1e-4, atol=1e-5)


def test_self_check_passes_the_kernel_and_catches_a_wrong_one(monkeypatch):
    assert decode_kernel.self_check(interpret=True) < 1e-5

    def one_too_many(q, kv, length, *args):
        return interpreted(q, kv, length + 1, *args[:1])

    monkeypatch.setattr(decode_kernel, "attend", one_too_many)
    assert decode_kernel.self_check() > 0.1


def test_open_batches_and_narrow_models_take_the_plain_step(given):
    params, memory = given
    options = {"task": 2, "length": 4, "window": VOCABULARY.codes_of("depth").slice, "soft_input": False}

    def program(model, memory):
        return str(jax.make_jaxpr(lambda p, m: decode.decode(model, p, m, **options))(params, memory))

    assert "decode_attention" in program(MODEL, memory)
    (batch,) = jax.export.symbolic_shape("batch")
    opened = [tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in layer) for layer in memory]
    exported = jax.export.export(jax.jit(lambda p, m: decode.decode(MODEL, p, m, **options).tokens))(params, opened)
    np.testing.assert_array_equal(exported.call(params, memory), decode.decode(MODEL, params, memory, **options).tokens)
