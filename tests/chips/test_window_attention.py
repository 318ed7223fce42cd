"""Window attention: the formula, its gradients by hand, and the TPU kernels in interpret mode, are one function."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import self_check, window_attention, window_cudnn, window_kernels
from aitok_jax.models.position_bias import collapse, expand, relative_index
from aitok_jax.models.swin_v2 import shift_regions
from aitok_jax.parallel import sharding

SHIFTED = 2, 3  # windows of an image down and across, where they are shifted


def operands(window, heads, width, shifted, images=1, dtype=np.float32):
    """q, k, v, bias, the gradient of the output, and the regions."""
    rng = np.random.default_rng(0)
    down, across = SHIFTED if shifted else (1, 2)
    shape = (images * down * across, window**2, heads, width)
    q, k, v, dout = rng.normal(size=(4, *shape)).astype(np.float32)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    flat = [jnp.asarray(x.reshape(*shape[:2], -1), dtype) for x in (10 * q, k, v, dout)]
    bias = jnp.asarray(16 * rng.random((heads, (2 * window - 1) ** 2)), jnp.float32)
    regions = shift_regions(down * window, across * window, window, window // 2) if shifted else None
    return (*flat[:3], bias), flat[3], regions


def textbook(window, regions, q, k, v, bias):
    """Softmax attention of all heads at once, with the bias gathered."""
    heads = len(bias)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k, precision="highest") + bias[:, relative_index(window)][None]
    if regions is not None:
        apart = np.where(regions[:, :, None] != regions[:, None], -100.0, 0.0)
        logits += np.tile(apart, (len(q) // len(apart), 1, 1))[:, None]
    out = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), v, precision="highest")
    return out.reshape(*out.shape[:2], -1)


def fused(window, regions):
    options = {"regions_WT": regions, "window": window, "interpret": True}
    return (
        functools.partial(window_kernels.forward, **options),
        functools.partial(window_kernels.backward, **options),
    )


def value_and_gradients(attend, args, dout):
    out, pull = jax.vjp(attend, *args)
    return out, *pull(dout.astype(out.dtype))


def largest_difference(attend, window, regions, args, dout):
    """Of the output and all gradients, relative to the largest value of each."""
    found = jax.jit(lambda *args: value_and_gradients(attend, args, dout))(*args)
    wanted = jax.jit(lambda *args: value_and_gradients(functools.partial(textbook, window, regions), args, dout))(*args)
    pairs = zip(found, wanted, strict=True)
    return max(float(jnp.max(jnp.abs(a.astype("f") - b.astype("f"))) / jnp.max(jnp.abs(b))) for a, b in pairs)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("window", "heads", "width"), [(5, 4, 32), (7, 3, 8), (12, 6, 32), (15, 8, 32)])
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_output_and_gradients(kind, window, heads, width, shifted):
    args, dout, regions = operands(window, heads, width, shifted, images=2)
    attend = window_attention.attention(window, regions, fused(window, regions) if kind == "fused" else None)
    assert largest_difference(attend, window, regions, args, dout) < 5e-6


@pytest.mark.parametrize("shifted", [False, True])
def test_published_windows(shifted):
    args, dout, regions = operands(30, 4, 32, shifted)
    attend = window_attention.attention(30, regions, fused(30, regions))
    assert largest_difference(attend, 30, regions, args, dout) < 5e-6


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_bfloat16_stays_within_its_precision(kind):
    args, dout, regions = operands(12, 4, 32, True, dtype=jnp.bfloat16)
    attend = window_attention.attention(12, regions, fused(12, regions) if kind == "fused" else None)
    assert 1e-4 < largest_difference(attend, 12, regions, args, dout) < 2e-2


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_eight_devices_are_one(kind):
    args, dout, regions = operands(4, 4, 32, True, images=8)
    own = fused(4, regions) if kind == "fused" else None

    @jax.jit
    def compute(*args):
        return value_and_gradients(window_attention.attention(4, regions, own), args, dout)

    alone = compute(*args)
    mesh = sharding.make_mesh(2)
    placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in args[:3]]
    with jax.set_mesh(mesh):
        together = compute(*placed, jax.device_put(args[3], sharding.replicated(mesh)))
        program = compute.lower(*placed, args[3]).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), together, alone)
    assert "all-gather" not in program


def test_bias_of_pairs_is_that_of_their_offset():
    table = np.random.default_rng(0).normal(size=(3, 81)).astype(np.float32)
    np.testing.assert_array_equal(expand(table, 5), table[:, relative_index(5)])
    pairs = np.random.default_rng(1).normal(size=(3, 25, 25)).astype(np.float32)
    summed = jnp.zeros((3, 81)).at[:, relative_index(5)].add(pairs)
    np.testing.assert_allclose(collapse(pairs, 5), summed, rtol=1e-5, atol=1e-5)
    program = jax.jit(lambda table: expand(table, 5)).lower(table).as_text()
    assert not {"gather", "scatter"} & set(program.replace('"', " ").replace(".", " ").split())


def wrong(which, position):
    """Kernels of which one gives one of its results with the other sign."""

    def pair(window, regions):
        def flipped(*args):
            results = fused(window, regions)[which](*args)
            if which == 0:
                return -results
            return tuple(-x if i == position else x for i, x in enumerate(results))

        return tuple(flipped if i == which else right for i, right in enumerate(fused(window, regions)))

    return pair


def broken(window, regions):
    def raises(*args):
        raise ValueError("no such chip")

    return raises, raises


def test_self_check_passes_the_kernels_and_catches_a_wrong_sign():
    assert window_attention.self_check(fused) < 1e-5
    for which, position in ((0, 0), (1, 0), (1, 3)):
        assert window_attention.self_check(wrong(which, position)) > 100 * self_check.TRUSTED


def test_self_check_runs_while_a_program_is_traced(monkeypatch, caplog):
    """On a TPU, whose kernels a CPU runs in interpret mode; a wrong one is not used, and said."""
    args, _, _ = operands(5, 4, 32, False)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    cases = ((fused, ""), (wrong(0, 0), "differ from the formula by"), (broken, "cannot be compiled (ValueError: no"))
    for kernels, problem in cases:
        monkeypatch.setattr(window_attention, "_kernels", kernels)
        self_check.trusted.cache_clear()
        program = str(jax.make_jaxpr(window_attention.attention(5, None))(*args))
        assert ("forward_kernel" in program) == (not problem)
        assert problem in caplog.text
        assert bool(caplog.text) == bool(problem)
        caplog.clear()
    self_check.trusted.cache_clear()


def test_chips_with_little_memory_get_the_formula(monkeypatch):
    args, _, _ = operands(30, 4, 32, False)
    assert "forward_kernel" in str(jax.make_jaxpr(window_attention.attention(30, None))(*args))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v4")])
    assert "forward_kernel" not in str(jax.make_jaxpr(window_attention.attention(30, None))(*args))


@pytest.mark.parametrize(("window", "heads", "shifted"), [(6, 4, False), (7, 2, True), (15, 4, True)])
def test_what_cudnn_is_asked_for_is_the_formula(monkeypatch, window, heads, shifted):
    """By XLA's own attention in place of cuDNN's, which needs a GPU: layout, bias, regions, padding and gradients."""
    args, dout, regions = operands(window, heads, 32, shifted, images=2, dtype=jnp.bfloat16)
    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(
        window_cudnn.jax.nn,
        "dot_product_attention",
        lambda q, k, v, bias, scale, implementation: xla(q, k, v, bias, scale=scale),
    )

    def gradients(pair):
        out, pull = jax.vjp(window_attention.attention(window, regions, pair), *args)
        return out, *pull(dout.astype(out.dtype))

    found = gradients(window_attention._cudnn(window, regions))
    wanted = gradients(window_attention._plain(window, regions))
    for ours, formula in zip(found, wanted, strict=True):
        assert self_check.difference(ours.astype(jnp.float32), formula.astype(jnp.float32)) < 3e-2
