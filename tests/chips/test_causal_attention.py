"""Causal attention of long sequences: what is taken on a chip, in interpret mode, is the formula."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from aitok_jax.models import causal_attention, self_check
from aitok_jax.models.layers import Widths
from aitok_jax.models.transformer import Attention
from aitok_jax.parallel import sharding


def operands(length, width, batch=2, heads=2, dtype=jnp.float32):
    *args, dout = np.random.default_rng(0).normal(size=(4, batch, heads, length, width)).astype(np.float32)
    return tuple(jnp.asarray(x, dtype) for x in args), jnp.asarray(dout, dtype)


def textbook(q, k, v):
    """Each query by itself, over the keys up to its own."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for t in range(q.shape[2]):
        weights = np.exp(np.einsum("bhd,bhkd->bhk", q[:, :, t], k[:, :, : t + 1]))
        out[:, :, t] = np.einsum("bhk,bhkd->bhd", weights / weights.sum(-1, keepdims=True), v[:, :, : t + 1])
    return out


def value_and_gradients(attend, args, dout):
    out, pull = jax.vjp(attend, *args)
    return out, *pull(dout)


def largest_difference(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return max(float(jnp.max(jnp.abs(a.astype("f") - b.astype("f"))) / jnp.max(jnp.abs(b))) for a, b in pairs)


@pytest.mark.parametrize("length", [1, 37, 600])
def test_the_formula_is_causal_attention(length):
    args, _ = operands(length, 8)
    np.testing.assert_allclose(causal_attention.formula(*args), textbook(*args), atol=2e-5)


@pytest.mark.parametrize(("length", "width", "dtype", "bound"), [(512, 32, "f4", 5e-6), (900, 32, jnp.bfloat16, 2e-2)])
def test_flash_attention_is_the_formula(length, width, dtype, bound):
    args, dout = operands(length, width, batch=1, dtype=dtype)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(lambda *args: value_and_gradients(causal_attention.flash, args, dout))(*args)
    exact = [x.astype(jnp.float32) for x in args]
    assert largest_difference(found, value_and_gradients(causal_attention.formula, exact, dout.astype("f"))) < bound


def test_gradients_of_what_is_taken_here():
    args, dout = operands(520, 16)
    found = jax.jit(lambda *args: value_and_gradients(causal_attention.attend, args, dout))(*args)
    assert largest_difference(found, value_and_gradients(causal_attention.formula, args, dout)) < 5e-6


def test_eight_devices_take_their_own_rows():
    args, dout = operands(512, 8, batch=8)
    mesh = sharding.make_mesh()

    def split(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return value_and_gradients(causal_attention.attend, args, dout)

    rows = sharding.batch_sharding(mesh)
    program = jax.jit(split, in_shardings=(rows,) * 3, out_shardings=rows).lower(*args).compile()
    assert largest_difference(program(*args), value_and_gradients(causal_attention.formula, args, dout)) < 5e-6
    assert "all-gather" not in program.as_text()


def test_the_decoder_is_the_same_short_and_long(monkeypatch):
    layer = Attention(Widths(dim=16, num_heads=2, hidden=32, drop_path=0.0, dropout=0.0, dtype=jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 16)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    short = layer.apply(variables, x, method=Attention.causal)
    monkeypatch.setattr(causal_attention, "LONG", 40)
    np.testing.assert_allclose(layer.apply(variables, x, method=Attention.causal), short, atol=1e-6)
    assert np.abs(layer.apply(variables, x) - short).max() > 1e-3  # without a mask it is another one


def test_a_wrong_one_is_noticed_and_given_up(monkeypatch, caplog):
    assert causal_attention.self_check(causal_attention.formula) == 0
    assert causal_attention.self_check(lambda q, k, v: causal_attention.formula(-q, k, v)) > 0.1
    monkeypatch.setattr(self_check.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(self_check.jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5e")])
    monkeypatch.setattr(causal_attention, "self_check", lambda: 0.3)
    args, _ = operands(8, 8)
    assert causal_attention._fused(args[2]) == {}
    assert "flash attention differ from the formula by 3.0e-01" in caplog.text
