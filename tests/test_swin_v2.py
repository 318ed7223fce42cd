"""The backbone: windows, shifts and their mask, position tables, sizes, remat, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import swin_v2
from aitok_jax.models.layers import DropPath, Widths
from aitok_jax.models.position_bias import relative_coordinates, relative_index
from aitok_jax.models.swin_v2 import PatchMerging, SwinV2

TINY = SwinV2(
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    windows=(4, 2),
    pretrain_windows=(4, 2),
    use_shift=(True, False),
)
ONE_STAGE = SwinV2(8, (2,), num_heads=(2,), windows=(4,), pretrain_windows=(4,), use_shift=(True,), drop_path=0.5)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((3, 24, 40, 3), np.float32)


@pytest.fixture(scope="module")
def variables(images):
    """Of both models; large enough for attention to matter."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), images)
    shapes["params"]["norm0"] = shapes["params"]["patch_embed"]["norm"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def test_relative_coordinates():
    third = 1 / 3  # log2(1 + 1) / log2(8): an offset of one when the pre-training window is 9
    table = relative_coordinates(2, 9).reshape(3, 3, 2)
    np.testing.assert_allclose(table[..., 0], np.array([[-third] * 3, [0] * 3, [third] * 3]), atol=1e-6)
    np.testing.assert_allclose(table[..., 1], np.array([[-third, 0, third]] * 3), atol=1e-6)
    corner = relative_coordinates(8, 8)[-1]
    # the farthest offset, 7, of the pre-training window becomes 8
    np.testing.assert_allclose(corner, np.log2(9) / 3, rtol=1e-6)


def test_relative_index_finds_query_minus_key():
    window = 3
    offsets = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 2, indexing="ij"), -1).reshape(-1, 2)
    places = np.stack(np.divmod(np.arange(window**2), window), -1)
    np.testing.assert_array_equal(offsets[relative_index(window)], places[:, None] - places[None])


def test_partition_gives_squares_in_reading_order():
    x = np.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    windows = swin_v2.partition(x, 2)
    assert windows.shape == (12, 4, 1)
    np.testing.assert_array_equal(windows[1, :, 0], [2, 3, 8, 9])
    np.testing.assert_array_equal(windows[6, :, 0], [24, 25, 30, 31])
    np.testing.assert_array_equal(swin_v2.unpartition(windows, 2, 4, 6), x)


@pytest.mark.parametrize(("height", "width", "window", "shift"), [(6, 9, 3, 1), (4, 8, 4, 2), (5, 5, 5, 2)])
def test_shift_regions_separate_what_the_roll_brought_together(height, width, window, shift):
    regions = swin_v2.shift_regions(height, width, window, shift)
    wrapped = np.zeros((1, height, width, 2), bool)
    wrapped[:, height - shift :, :, 0] = True  # after the roll these rows and columns come from the other border
    wrapped[:, :, width - shift :, 1] = True
    parts = swin_v2.partition(wrapped, window)
    together = (parts[:, :, None] == parts[:, None]).all(-1)
    np.testing.assert_array_equal(regions[:, :, None] == regions[:, None], together)
    assert regions.shape == (height * width // window**2, window**2)


def patch_influence(model, variables, image):
    """A function of (row, column): bool[h, w] of patches, does the last map there depend on the patch?"""
    weight = np.random.default_rng(2).normal(size=model.embed_dim).astype(np.float32)
    h, w, _ = image.shape

    @jax.jit
    def influence(row, column):
        gradient = jax.grad(lambda image: model.apply(variables, image[None])[0, row, column] @ weight)(image)
        return jnp.abs(gradient).reshape(h // 4, 4, w // 4, 4, 3).sum((1, 3, 4)) > 0

    return influence


def test_windows_and_shifted_windows(images, variables):
    """A block sees its window, a second, shifted one the neighbouring windows, and none sees the opposite border."""
    image = np.concatenate([images[0], images[1, :8]])  # 8×10 patches, 8×12 with padding
    expected = np.zeros((8, 10), bool)
    expected[4:, 4:8] = True
    plain = patch_influence(ONE_STAGE.clone(depths=(1,)), variables, image)
    np.testing.assert_array_equal(plain(5, 7), expected)
    shifted = patch_influence(ONE_STAGE, variables, image)
    expected = np.zeros((8, 10), bool)
    expected[:, :8] = True  # its shifted window, rows and columns 2 to 5, meets four windows
    np.testing.assert_array_equal(shifted(3, 4), expected)
    expected = np.zeros((8, 10), bool)
    expected[:4, :4] = True  # the corner shares its shifted window with nothing but itself
    np.testing.assert_array_equal(shifted(0, 1), expected)


@pytest.mark.parametrize(
    ("stages", "height", "width", "expected"),
    [(2, 24, 40, (3, 5)), (2, 20, 28, (3, 4)), (3, 36, 20, (3, 2)), (4, 64, 96, (2, 3)), (1, 4, 8, (1, 2))],
)
def test_stride_and_sizes(stages, height, width, expected):
    model = SwinV2(
        embed_dim=4,
        depths=(1,) * stages,
        num_heads=(2,) * stages,
        windows=(3,) * stages,
        pretrain_windows=(3,) * stages,
        use_shift=(True,) * stages,
    )
    assert model.stride == 4 * 2 ** (stages - 1)
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    last, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert (last.shape, last.dtype) == ((2, *expected, 4 * 2 ** (stages - 1)), jnp.float32)
    assert [k for k in variables["params"] if k.startswith("norm")] == [f"norm{stages - 1}"]


@pytest.mark.parametrize(("height", "width"), [(22, 40), (24, 37), (21, 39), (3, 5)])
def test_sizes_that_are_no_multiple_of_the_patch_are_filled_up_with_zeros(images, variables, height, width):
    """At the right and bottom; with a stem too, which sees beyond its patch."""
    image = images[:, :height, :width]
    padded = np.pad(image, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)))
    stem = TINY.clone(stem=(6,), stem_blocks=1)
    weights = jax.jit(stem.init)(jax.random.key(0), padded)
    for model, its in ((TINY, variables), (stem, weights)):
        apply = jax.jit(model.apply)
        np.testing.assert_allclose(apply(its, image), apply(its, padded), rtol=1e-5, atol=1e-5)


def test_stem_takes_its_part_of_the_patch():
    plain, stem = TINY, TINY.clone(stem=(6, 10))
    image = jax.ShapeDtypeStruct((1, 24, 40, 3), jnp.float32)
    shapes = {m: jax.eval_shape(m.init_with_output, jax.random.key(0), image) for m in (plain, stem)}
    assert shapes[plain][0].shape == shapes[stem][0].shape == (1, 3, 5, 16)
    assert stem.stride == plain.stride
    embed = shapes[stem][1]["params"]["patch_embed"]
    kernels = [embed[name]["kernel"].shape for name in ("stem_0", "stem_1", "proj")]
    assert kernels == [(3, 3, 3, 6), (3, 3, 6, 10), (1, 1, 10, 8)]
    assert shapes[plain][1]["params"]["patch_embed"].keys() == {"proj", "norm"}
    with pytest.raises(ValueError, match="patch=4 must be a multiple of 2\\^3"):
        TINY.clone(stem=(4, 4, 4))


def test_stem_blocks_are_residual():
    """A block whose LayerNorm gives zeros changes nothing; it sees its neighbours, beyond the patch."""
    plain, blocks = TINY.clone(stem=(6,)), TINY.clone(stem=(6,), stem_blocks=2)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 40, 3)), jnp.float32)
    params = jax.jit(blocks.init)(jax.random.key(0), image)["params"]
    embed = params["patch_embed"]
    kernels = [embed[name]["kernel"].shape for name in ("stem_0", "stem_1", "stem_2", "proj")]
    assert kernels == [(3, 3, 3, 6), (3, 3, 6, 6), (3, 3, 6, 6), (2, 2, 6, 8)]
    silent = embed | {f"stem_norm_{i}": jax.tree.map(jnp.zeros_like, embed[f"stem_norm_{i}"]) for i in (1, 2)}
    without = {name: value for name, value in embed.items() if name[-2:] not in ("_1", "_2")}
    maps = [
        jax.jit(module.apply)({"params": params | {"patch_embed": chosen}}, image)
        for module, chosen in ((blocks, silent), (plain, without), (blocks, embed))
    ]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-6)
    assert np.abs(maps[2] - maps[1]).max() > 1e-3
    for wrong in ({"stem_blocks": 2}, {"stem": (6,), "stem_blocks": -1}):
        with pytest.raises(ValueError, match=f"stem_blocks={wrong['stem_blocks']} come after a stem"):
            TINY.clone(**wrong)


def test_patch_merging_order():
    """Rows, then columns: (0,0), (1,0), (0,1), (1,1); odd sizes are padded with zeros."""
    x = np.arange(1.0, 7, dtype=np.float32).reshape(1, 2, 3, 1)
    kernel = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    neighbours = np.array([[1, 4, 2, 5], [3, 6, 0, 0]], np.float32)
    y = neighbours @ kernel
    expected = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    params = {"reduction": {"kernel": kernel}, "norm": {"scale": np.ones(2, "f"), "bias": np.zeros(2, "f")}}
    ours = PatchMerging(Widths(1, 1, 1)).apply({"params": params}, x)
    np.testing.assert_allclose(ours[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_drop_path_drops_whole_examples():
    x = jnp.ones((64, 2, 3))
    dropped = DropPath(0.25).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert {tuple(np.unique(example).tolist()) for example in dropped} == {(0.0,), (float(np.float32(4 / 3)),)}
    assert 0.5 < np.mean(dropped[:, 0, 0] > 0) < 0.95
    np.testing.assert_array_equal(DropPath(0.25).apply({}, x, False), x)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, x, True), x)


@pytest.mark.parametrize("policy", ["blocks", "dots"])
def test_remat_changes_nothing_but_memory(images, variables, policy):
    """With stochastic depth on, so that the recomputed branches must draw the same numbers."""

    def value_and_gradient(model):
        def loss(variables):
            output = model.apply(variables, images, True, rngs={"dropout": jax.random.key(0)})
            return jnp.mean(output**3), output

        return jax.value_and_grad(loss, has_aux=True)

    plain, remat = (value_and_gradient(ONE_STAGE.clone(remat=r)) for r in ("none", policy))
    assert "remat" in str(jax.make_jaxpr(remat)(variables))
    assert "remat" not in str(jax.make_jaxpr(plain)(variables))
    ((_, expected), plain_gradient), ((_, output), gradient) = jax.jit(plain)(variables), jax.jit(remat)(variables)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("shift", "remat"), [(False, "none"), (True, "blocks")])
def test_equal_blocks_as_a_loop_are_the_blocks_one_after_the_other(monkeypatch, shift, remat):
    sizes = {"embed_dim": 8, "depths": (6,), "num_heads": (2,), "windows": (3,), "pretrain_windows": (3,)}
    model = SwinV2(**sizes, use_shift=(shift,), remat=remat)
    images = jax.random.normal(jax.random.key(0), (2, 24, 20, 3))
    variables = model.init(jax.random.key(1), images)

    def loss_and_gradient():
        return jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(model.apply(v, x))))(variables, images)

    assert f"length={3 if shift else 6}" in str(jax.make_jaxpr(loss_and_gradient)())
    looped = jax.jit(loss_and_gradient)()
    monkeypatch.setattr(swin_v2, "SCANNED", 7)
    unrolled = jax.jit(functools.partial(loss_and_gradient))()
    for ours, theirs in zip(jax.tree.leaves(looped), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_looped_blocks_drop_paths_at_their_own_rates():
    sizes = {"embed_dim": 8, "depths": (6,), "num_heads": (2,), "windows": (3,), "pretrain_windows": (3,)}
    model = SwinV2(**sizes, use_shift=(False,), drop_path=1 - 1e-6)
    images = jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
    variables = model.init(jax.random.key(1), images)

    def gradient(rng):
        def loss(v):
            return jnp.sum(jnp.sin(model.apply(v, images, True, rngs={"dropout": rng})))

        return jax.grad(loss)(variables)["params"]["layers_0"]

    found = jax.jit(gradient)(jax.random.key(2))
    norms = [float(jnp.linalg.norm(found[f"blocks_{j}"]["mlp"]["fc2"]["kernel"])) for j in range(6)]
    assert norms[0] > 0  # never dropped
    assert norms[5] == 0  # always


def test_batch_and_dtype(images, variables):
    """Examples do not see each other; bfloat16 computes close to float32 and returns float32."""
    apply = jax.jit(lambda x: TINY.apply(variables, x))
    expected = apply(images)
    assert np.abs(np.diff(expected, axis=0)).max() > 0.01
    other = apply(np.stack([images[0], images[0], images[2]]))
    np.testing.assert_allclose(other, expected[np.array([0, 0, 2])], rtol=1e-4, atol=1e-5)
    rough = jax.jit(lambda x: TINY.clone(dtype=jnp.bfloat16).apply(variables, x))(images)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_errors():
    with pytest.raises(ValueError, match="remat='all' must be one of none, dots, blocks"):
        TINY.clone(remat="all")
    with pytest.raises(ValueError, match=r"one entry a stage .*'windows': 1"):
        TINY.clone(windows=(4,))
    with pytest.raises(ValueError, match=r"num_heads\[1\]=3 must divide .* 16"):
        TINY.clone(num_heads=(2, 3))
