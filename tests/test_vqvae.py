"""The VQ-VAE and the bins tokenizer: sizes, transposed convolution, objectives, normalisation, mask augmentation."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aitok_jax.models import conv
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.models.vqvae import OBJECTIVES, VQVAE, Conv, Layout, mask_patches

TINY = {"hidden": 4, "downsample": 4, "num_res_blocks": 1, "num_codes": 8, "code_dim": 4}
SMALLEST = TINY | {"hidden": 16, "downsample": 2, "num_res_blocks": 0}


@pytest.fixture(scope="module")
def depth():
    """Smooth maps f32[4,8,8,1] in metres, some of it not annotated."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:8, :8] / 8
    across, down = rng.uniform(-1, 1, (2, 4, 1, 1))
    maps = 2 + rng.uniform(0, 4, (4, 1, 1)) + down * rows + across * columns
    maps[rng.random(maps.shape) < 0.1] = 0
    return maps[..., None].astype(np.float32)


def scattered(x, kernel, bias):
    """Transposed convolution, stride 2, padding 1: every input pixel adds its kernel; the rim is cut off."""
    b, h, w, _ = x.shape
    out = np.zeros((b, 2 * h + 2, 2 * w + 2, kernel.shape[-1]))
    for i in range(h):
        for j in range(w):
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bc,yxcf->byxf", x[:, i, j], kernel)
    return out[:, 1:-1, 1:-1] + bias


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4)])
def test_transposed_convolution_scatters(height, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    params = {"kernel": rng.normal(size=(4, 4, 3, 5)), "bias": rng.normal(size=5)}
    ours = Conv(5, conv.up, Layout(4, 4, 1)).apply({"params": params}, x)
    np.testing.assert_allclose(ours, scattered(x, **params), rtol=1e-4, atol=1e-4)
    flipped = params["kernel"][::-1, ::-1]  # lax correlates
    padding = ((2, 2), (2, 2))
    lax = jax.lax.conv_transpose(x, flipped, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(ours, lax + params["bias"].reshape(1, 1, 1, -1), rtol=1e-4, atol=1e-4)


def strided(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=conv.LAYOUT)


def dilated(x, kernel):
    flipped = kernel[::-1, ::-1]
    return jax.lax.conv_transpose(x, flipped, (2, 2), ((2, 2), (2, 2)), dimension_numbers=conv.LAYOUT)


@pytest.mark.parametrize(("ours", "reference"), [(conv.down, strided), (conv.up, dilated)])
@pytest.mark.parametrize(("height", "width"), [(2, 4), (6, 10)])
def test_gradients_of_convolutions(ours, reference, height, width):
    """Gradients of input and kernel are written by hand; the reference has XLA's."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, height, width, 3), (4, 4, 3, 5)))
    expected, pull = jax.vjp(reference, x, kernel)
    y, ours_pull = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    weight = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for gradient, theirs in zip(ours_pull(weight), pull(weight), strict=True):
        np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("downsample", "height", "width"), [(2, 6, 4), (8, 8, 24), (32, 64, 32)])
def test_grid_sizes_and_widths(downsample, height, width):
    model = VQVAE(**TINY | {"downsample": downsample})
    maps = jax.ShapeDtypeStruct((2, height, width, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), maps)
    codes = jax.eval_shape(lambda v, x: model.apply(v, x, method="encode"), variables, maps)
    decoded = jax.eval_shape(lambda v, c: model.apply(v, c, method="decode"), variables, codes)
    assert (codes.shape[1:], codes.dtype) == (model.grid(height, width), jnp.int32)
    assert codes.shape == (2, height // downsample, width // downsample)
    assert (decoded.shape, decoded.dtype) == (maps.shape, jnp.float32)
    kernels = [variables["params"]["encoder"][f"layers_{2 * i}"]["kernel"] for i in range(downsample.bit_length() - 1)]
    assert [k.shape[-1] for k in kernels] == [4 * 2**i for i in range(len(kernels))]


def batch_of(objective, depth):
    return near_and_far(depth, 2) if objective == "cross_entropy" else depth


def near_and_far(depth, classes):
    """One-hot f32[B,H,W,classes]: 0 up to 4 m, 1 beyond; zeros where nothing was measured."""
    return np.where(depth > 0, np.eye(classes, dtype=np.float32)[(depth[..., 0] > 4).astype(int)], np.float32(0))


def trained(model, x, positive=False):
    """(loss of every step, variables after): Adam on one batch."""
    variables = dict(model.init(jax.random.key(0), x))
    params = variables.pop("params")
    if positive:  # SiLog has no value where the prediction is not positive
        last = max(params["decoder"], key=lambda name: int(name.split("_")[1]))
        params["decoder"][last]["bias"] += 3.0
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, opt_state):
        def loss(params):
            rngs = {"restart": jax.random.key(1)}
            variables = {"params": params, **state}
            result, new = model.apply(variables, x, train=True, mutable=list(state), rngs=rngs)
            return result.loss, new

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    opt_state, values = optimizer.init(params), []
    for _ in range(25):
        params, variables, opt_state, value = step(params, variables, opt_state)
        values.append(float(value))
    return values, {"params": params, **variables}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective, depth):
    channels = 2 if objective == "cross_entropy" else 1
    model = VQVAE(**SMALLEST, objective=objective, channels=channels, restart_threshold=0.01)
    values, _ = trained(model, batch_of(objective, depth), positive=objective == "silog")
    assert np.isfinite(values).all()
    assert np.mean(values[-3:]) < 0.9 * np.mean(values[:3]), values


def test_classification_ignores_missing_labels_and_decodes_to_logits(depth):
    """The loss is -log of the softmax at the right class, mean over the pixels that have one."""
    model = VQVAE(**SMALLEST, objective="cross_entropy", channels=3)
    classes = near_and_far(depth, 3)
    variables = model.init(jax.random.key(0), classes)
    apply = jax.jit(lambda classes, target: model.apply(variables, classes, target))
    result = apply(classes, classes)
    logits = np.asarray(result.output, np.float64)
    assert logits.shape == classes.shape
    right = (logits * classes).sum(-1) - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(result.reconstruction_loss, -right[depth[..., 0] > 0].mean(), rtol=1e-5)
    decoded = model.apply(variables, model.apply(variables, classes, method="encode"), method="decode")
    np.testing.assert_allclose(decoded, result.output, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(apply(classes, 0 * classes).reconstruction_loss, 0)
    with pytest.raises(ValueError, match="objective='cross_entropy' finds missing pixels by their 0"):
        VQVAE(**SMALLEST, objective="cross_entropy", channels=3, use_norm=True)


def test_normalisation_and_its_inverse(depth):
    """use_norm is the same network on 2(x/max − ½), whose output y means max(y/2 + ½)."""
    plain = VQVAE(**SMALLEST, objective="mse")
    normed = plain.clone(use_norm=True, max_value=8.0)
    variables = plain.init(jax.random.key(0), depth)
    inner = plain.apply(variables, 2 * (depth / 8 - 0.5))
    outer = normed.apply(variables, depth)
    np.testing.assert_array_equal(outer.quantized.codes, inner.quantized.codes)
    np.testing.assert_allclose(outer.output, 8 * (inner.output / 2 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(outer.reconstruction_loss, inner.reconstruction_loss, rtol=1e-5)
    codes = outer.quantized.codes
    np.testing.assert_allclose(normed.apply(variables, codes, method="decode"), outer.output, rtol=1e-4, atol=1e-4)


def test_soft_decoding_is_sharpened_by_its_temperature(depth):
    cold, warm = (VQVAE(**SMALLEST, soft_temperature=t) for t in (50.0, 0.5))
    variables = cold.init(jax.random.key(0), depth)
    variables["codebook"]["quantizer"]["embedding"] *= 5
    logits = np.random.default_rng(0).permuted(np.tile(np.arange(8.0), (2, 2, 3, 1)), axis=-1).astype(np.float32)
    hard = cold.apply(variables, logits.argmax(-1), method="decode")
    np.testing.assert_allclose(cold.apply(variables, logits, method="decode_soft"), hard, atol=1e-5)
    half = warm.apply(variables, logits, method="decode_soft")
    assert np.abs(half - hard).max() > 1e-3
    p = np.exp(logits / 2) / np.exp(logits / 2).sum(-1, keepdims=True)
    np.testing.assert_allclose(half, warm.apply(variables, p, method="decode_probabilities"), atol=1e-5)


def test_bfloat16_computes_close_and_returns_float32(depth):
    model = VQVAE(**SMALLEST)
    variables = model.init(jax.random.key(0), depth)
    codes = np.arange(8).reshape(2, 2, 2)
    exact = model.apply(variables, codes, method="decode")
    rough = model.clone(dtype=jnp.bfloat16).apply(variables, codes, method="decode")
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"downsample": 12}, "downsample=12 .* power of two"),
        ({"downsample": 1}, "downsample=1 "),
        ({"objective": "l2"}, "objective='l2' .* mse_ignore_zero"),
    ],
)
def test_wrong_options(fields, message):
    with pytest.raises(ValueError, match=message):
        VQVAE(**TINY | fields)


@pytest.mark.parametrize("model", [VQVAE(**TINY), BinsTokenizer(downsample=4)])
def test_wrong_map_sizes(model):
    with pytest.raises(ValueError, match=r"8×10 .*multiple of downsample=4"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 10, 1)), method="encode")


@pytest.mark.parametrize(("ratio", "hidden"), [(0.0, 0), (0.3, 4), (0.5, 6), (1.0, 12)])
def test_mask_patches_hides_whole_patches(ratio, hidden):
    maps = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (16, 6, 8, 2)).astype(np.float32))
    masked = mask_patches(jax.random.key(0), maps, patch=2, ratio=ratio)
    kept = np.asarray(masked == maps).reshape(16, 3, 2, 4, 2, 2)
    zero = np.asarray(masked == 0).reshape(kept.shape)
    np.testing.assert_array_equal(kept, ~zero)
    patches = zero.all((2, 4, 5))
    np.testing.assert_array_equal(patches, zero.any((2, 4, 5)))
    np.testing.assert_array_equal(patches.sum((1, 2)), hidden)  # ⌈ratio · 12⌉
    if 0 < ratio < 1:
        assert len(np.unique(patches.reshape(16, -1), axis=0)) > 8
        assert patches.any(0).all(), "no patch is always kept"
        other = mask_patches(jax.random.key(1), maps, patch=2, ratio=ratio)
        assert (other != masked).any()


def test_mask_patches_errors():
    maps = jnp.ones((1, 6, 8, 1))
    with pytest.raises(ValueError, match=r"6×8 .* mask patch 4"):
        mask_patches(jax.random.key(0), maps, patch=4, ratio=0.5)
    with pytest.raises(ValueError, match=r"mask_ratio=1\.5"):
        mask_patches(jax.random.key(0), maps, patch=2, ratio=1.5)


def bins(method, *args, **fields):
    return BinsTokenizer(downsample=4, num_codes=20, **fields).apply({}, *args, method=method)


def test_bins_round_trip_of_constant_maps():
    metres = np.linspace(0.01, 10, 37).astype(np.float32)
    maps = np.broadcast_to(metres.reshape(-1, 1, 1, 1), (37, 8, 12, 1))
    codes = bins("encode", maps)
    assert (codes.shape, codes.dtype) == ((37, 2, 3), jnp.int32)
    assert np.abs(bins("decode", codes) - maps).max() <= 0.25 + 1e-5  # half a bin of 10 m / 20
    np.testing.assert_array_equal(bins("encode", np.full((1, 4, 4, 1), 99.0, np.float32)), 19)


def test_bins_leave_out_what_is_not_annotated():
    rng = np.random.default_rng(0)
    maps = np.full((2, 16, 16, 1), 7.3, np.float32)
    maps[0][rng.random((16, 16, 1)) < 0.6] = 0
    maps[1] = 0
    codes = bins("encode", maps)
    np.testing.assert_array_equal(codes[0], 14)
    np.testing.assert_array_equal(codes[1], 0)


def test_bins_soft_decoding():
    codes = np.random.default_rng(0).integers(0, 20, (2, 3, 2))
    one_hot = np.eye(20, dtype=np.float32)[codes]
    np.testing.assert_allclose(bins("decode_soft", 1e3 * one_hot), bins("decode", codes), rtol=1e-5)
    np.testing.assert_allclose(bins("decode_soft", 0 * one_hot), 5.0, rtol=1e-5)  # the mean of all centres
    two = np.full((1, 1, 1, 20), -1e9, np.float32)
    two[..., [4, 6]] = 0, 2
    p = 1 / (1 + np.exp(-2 * 0.5))
    np.testing.assert_allclose(bins("decode_soft", two, soft_temperature=0.5), 2.25 + p * 1.0, rtol=1e-5)


def test_bins_have_the_interface_of_the_vqvae():
    """What a task calls and reads of a tokenizer."""
    for name in ("encode", "decode", "decode_soft", "decode_probabilities"):
        ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (BinsTokenizer, VQVAE))
        assert len(ours) == len(theirs), name
    fields = ("downsample", "num_codes", "soft_temperature")
    assert all(field in c.__dataclass_fields__ for field in fields for c in (BinsTokenizer, VQVAE))
