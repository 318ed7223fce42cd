import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from aitok_jax.training import optim


def _config(**changes):
    base = {
        "name": "adamw",
        "learning_rate": 1e-2,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "layer_decay": 1.0,
        "clip_norm": 0.0,
        "warmup_steps": 0,
        "warmup_ratio": 0.1,
        "schedule": {"name": "constant"},
    }
    return ConfigDict(base | changes)


def _rates(config, train_steps, steps):
    return np.asarray(jax.vmap(optim.make_schedule(config, train_steps))(jnp.asarray(steps)))


def _backbone(depths):
    layers = {}
    for stage, blocks in enumerate(depths):
        attention = {"qkv": {"kernel": jnp.ones((2, 6))}, "rpe_mlp_2": {"kernel": jnp.ones((2, 2))}}
        attention |= {"logit_scale": jnp.ones((2, 1, 1)), "q_bias": jnp.ones((2, 1))}
        layers[f"layers_{stage}"] = {f"blocks_{j}": {"attn": attention} for j in range(blocks)}
        if stage + 1 < len(depths):
            layers[f"layers_{stage}"]["downsample"] = {"reduction": {"kernel": jnp.ones((4, 2))}}
    patch = {"proj": {"kernel": jnp.ones((4, 4, 3, 2)), "bias": jnp.ones(2)}}
    heads = {"voc_embed": jnp.ones((5, 2)), "encoder": {"blocks_0": {"attn": {"wq": {"kernel": jnp.ones((2, 2))}}}}}
    return {"backbone": {"patch_embed": patch, **layers, "norm": {"scale": jnp.ones(2)}}, "transformer": heads}


def test_warmup_multiplies_the_step_schedule():
    config = _config(schedule={"name": "step", "boundaries": (2, 6), "factor": 0.5}, warmup_steps=4)
    expected = 1e-2 * np.array([0.1, 0.325, 0.55 / 2, 0.775 / 2, 0.5, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(_rates(config, 8, range(8)), expected, rtol=1e-6)


def test_linear_and_cosine_end_where_they_should():
    linear = _config(schedule={"name": "linear", "end_factor": 0.01})
    np.testing.assert_allclose(_rates(linear, 100, [0, 50, 100, 150]), [1e-2, 5.05e-3, 1e-4, 1e-4], rtol=1e-6)
    cosine = _config(schedule={"name": "cosine", "end_factor": 0.1}, warmup_steps=10, warmup_ratio=0.0)
    np.testing.assert_allclose(_rates(cosine, 100, [0, 5, 50, 100]), [0.0, 5e-3, 5.5e-3, 1e-3], rtol=1e-6)


def test_cosine_lags():
    config = _config(schedule={"name": "cosine", "lag": 1}, warmup_steps=4)
    plain = _config(schedule={"name": "cosine"}, warmup_steps=4)
    np.testing.assert_array_equal(_rates(config, 20, range(1, 20)), _rates(plain, 20, range(19)))


def test_exponential_counts_the_start_of_epochs_only_where_asked():
    plain = _config(schedule={"name": "exponential", "factor": 0.5, "every": 2})
    np.testing.assert_allclose(_rates(plain, 9, range(5)), 1e-2 * 0.5 ** np.array([0, 0, 1, 1, 2]), rtol=1e-6)
    epochs = _config(schedule={"name": "exponential", "factor": 0.5, "every": 2, "steps_per_epoch": 3})
    # Decays follow iterations 0 and 2 of an epoch, so the next epoch's first update already has both.
    expected = 1e-2 * 0.5 ** np.array([0, 1, 1, 2, 3, 3, 4])
    np.testing.assert_allclose(_rates(epochs, 9, range(7)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"name": "poly"}}, "'poly' is unknown; use one of"),
        ({"schedule": {"name": "linear", "end": 0}}, "no option \\['end'\\]"),
        ({"schedule": {"name": "step", "boundaries": (5, 2)}}, "must increase"),
        ({"schedule": {"name": "exponential", "every": 0}}, "every=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"name": "sgd"}, "'sgd' is unknown"),
        ({"name": "adam"}, "use 'adamw'"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ],
)
def test_wrong_options_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(_config(**changes), 10)


def test_adamw_is_the_textbook_update():
    config = _config(clip_norm=1.0)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}
    grads = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])}  # norm 13
    optimizer = optim.make_optimizer(config, 10)
    state = optimizer.init(params)
    expected = {k: np.asarray(v, np.float64) for k, v in params.items()}
    first = {k: np.zeros_like(v) for k, v in expected.items()}
    second = {k: np.zeros_like(v) for k, v in expected.items()}
    for t in range(1, 4):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, decay in (("kernel", 0.1), ("bias", 0.0)):
            g = np.asarray(grads[k], np.float64) / (13 + 1e-6)
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g * g
            step = first[k] / (1 - 0.9**t) / (np.sqrt(second[k] / (1 - 0.999**t)) + 1e-8)
            expected[k] = expected[k] * (1 - 1e-2 * decay) - 1e-2 * step
            np.testing.assert_allclose(params[k], expected[k], rtol=2e-6)


def test_clipping_is_pytorchs():
    grads = {"a": jnp.array([3.0, 4.0])}
    clip = optim.clip_by_global_norm(10.0)
    np.testing.assert_array_equal(clip.update(grads, clip.init(grads))[0]["a"], grads["a"])
    tight = optim.clip_by_global_norm(1e-6)  # scale 1e-6 / (2e-6 + 1e-6)
    np.testing.assert_allclose(tight.update({"a": jnp.array([2e-6])}, tight.init(grads))[0]["a"], 2e-6 / 3, rtol=1e-5)


def test_layer_scale_follows_any_depth_and_scales_update_and_decay():
    params = _backbone([1, 3])
    scales = optim.layer_scales(params, 0.5)
    backbone = scales["backbone"]
    assert backbone["patch_embed"]["proj"]["kernel"] == 0.5**6
    assert backbone["layers_0"]["blocks_0"]["attn"]["qkv"]["kernel"] == 0.5**5
    assert backbone["layers_0"]["downsample"]["reduction"]["kernel"] == 0.5**4
    assert [backbone["layers_1"][f"blocks_{j}"]["attn"]["qkv"]["kernel"] for j in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert backbone["norm"]["scale"] == 1
    assert scales["transformer"]["encoder"]["blocks_0"]["attn"]["wq"]["kernel"] == 1

    def update(config):
        optimizer = optim.make_optimizer(config, 10)
        return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

    scaled, plain = update(_config(layer_decay=0.5)), update(_config())
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(a, b * s, rtol=1e-6), scaled, plain, scales)


def test_layer_decay_without_a_backbone_is_an_error():
    with pytest.raises(ValueError, match=r"found only \['encoder'\]; set optim.layer_decay=1.0"):
        optim.layer_scales({"encoder": {"kernel": jnp.ones((2, 2))}}, 0.9)


def test_decay_mask():
    mask = optim.decay_mask(_backbone([1]))
    attention = mask["backbone"]["layers_0"]["blocks_0"]["attn"]
    assert attention["qkv"]["kernel"]
    assert not attention["rpe_mlp_2"]["kernel"]
    assert not attention["logit_scale"]
    assert not attention["q_bias"]
    assert mask["backbone"]["patch_embed"]["proj"] == {"kernel": True, "bias": False}
    assert not mask["backbone"]["norm"]["scale"]
    assert not mask["transformer"]["voc_embed"]


def _kernels():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    dense = {"kernel": normal(6, 20), "bias": normal(20)}
    tall, same = {"kernel": normal(20, 6)}, {"kernel": normal(6, 20)}
    position = {"rpe_mlp_0": {"kernel": normal(2, 8)}}
    return {"a": dense, "b": tall, "c": same, "conv": {"kernel": normal(3, 3, 2, 4)}, "d": position}


def test_muon_is_that_of_optax_one_matrix_after_the_other():
    """Stacked and turned matrices get what `optax.contrib.muon` gives each alone; the rest gets what Adam gives."""
    params, config = _kernels(), _config(name="muon", weight_decay=0.0)
    axes = optax.contrib.MuonDimensionNumbers
    numbers = jax.tree.map(lambda x: None, params)
    for name in ("a", "b", "c"):
        numbers[name]["kernel"] = axes(0, 1)
    numbers["conv"]["kernel"] = axes((0, 1, 2), 3)
    theirs = optax.contrib.muon(
        1e-2, ns_steps=3, preconditioning="schatten", consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    adam = optim.make_optimizer(_config(name="adam", weight_decay=0.0), 10)
    transforms = [optim.make_optimizer(config, 10), theirs, adam]
    states = [transform.init(params) for transform in transforms]
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: x * (step + 1.0) + jnp.roll(x, step), params)
        results = [jax.jit(t.update)(grads, s, params) for t, s in zip(transforms, states, strict=True)]
        (ours, by_optax, by_adam), states = zip(*results, strict=True)
        for name in ("a", "b", "c", "conv"):
            np.testing.assert_allclose(ours[name]["kernel"], by_optax[name]["kernel"], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(ours["a"]["bias"], by_adam["a"]["bias"])
        kernel = ours["d"]["rpe_mlp_0"]["kernel"]
        np.testing.assert_array_equal(kernel, by_adam["d"]["rpe_mlp_0"]["kernel"])
    assert not np.allclose(ours["a"]["kernel"], by_adam["a"]["kernel"], rtol=0.1)


def test_muon_evens_out_the_singular_values_and_decays():
    params = {"layer": {"kernel": jnp.diag(jnp.array([10.0, 1.0, 0.1, 0.03])) @ jnp.ones((4, 9)) + jnp.eye(4, 9)}}
    update = {}
    for decay in (0.0, 0.5):
        optimizer = optim.make_optimizer(_config(name="muon", learning_rate=1.0, weight_decay=decay), 10)
        update[decay], _ = optimizer.update(params, optimizer.init(params), params)
    values = np.linalg.svd(update[0.0]["layer"]["kernel"], compute_uv=False) / (0.2 * 3)
    assert values.min() > 0.5
    assert values.max() < 1.3
    difference = update[0.0]["layer"]["kernel"] - update[0.5]["layer"]["kernel"]
    np.testing.assert_allclose(difference, 0.5 * params["layer"]["kernel"], rtol=1e-4, atol=1e-5)
