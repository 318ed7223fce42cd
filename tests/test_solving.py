"""The dtype of a solver's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from aitok_jax import tasks

CONFIG = tiny_runs.KINDS["depth"]


def with_dtype(**dtype):
    return tasks.build(CONFIG | {name: CONFIG[name] | dtype for name in ("backbone", "transformer")})


def test_arithmetic_is_bfloat16_on_accelerators(monkeypatch):
    """Of backbone and transformer; the tokenizer's codes are decisions, and parameters are float32 anywhere."""

    def dtypes(**dtype):
        task = with_dtype(**dtype)
        networks = (task.solver.backbone, task.solver.transformer, task.parts["depth"].tokenizer)
        assert {network.param_dtype for network in networks} == {jnp.float32}
        return [jnp.dtype(network.dtype).name for network in networks]

    assert dtypes() == dtypes(dtype="auto") == ["float32", "float32", "float32"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtypes() == dtypes(dtype="bfloat16") == ["bfloat16", "bfloat16", "float32"]
    assert dtypes(dtype="float32") == ["float32", "float32", "float32"]
    with pytest.raises(ValueError, match=r"backbone.dtype='float16' must be one of auto, float32, bfloat16"):
        dtypes(dtype="float16")


def test_bfloat16_trains_close_to_float32():
    """And its gradients, as the parameters, are float32."""
    rng = np.random.default_rng(0)
    depth = {"image": rng.random((2, 24, 24, 3), np.float32), "depth": rng.uniform(1, 9, (2, 24, 24)).astype("f4")}
    batch = {"depth": depth}
    shapes = jax.eval_shape(with_dtype().init, jax.random.key(0), batch)
    params, model_state = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype("f4"), shapes)

    def loss(dtype, params):
        return with_dtype(dtype=dtype).loss(params, model_state, batch, jax.random.key(0))[0]

    exact, rough = (jax.jit(loss, static_argnums=0)(dtype, params) for dtype in ("float32", "bfloat16"))
    assert 0 < abs(rough - exact) / exact < 0.02
    gradient = jax.eval_shape(jax.grad(lambda params: loss("bfloat16", params)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
