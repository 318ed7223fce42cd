import colorsys

import numpy as np
import pytest

from aitok_jax.data import map_transforms
from aitok_jax.tasks.modalities import Depth, Normals

DEPTH = Depth()


@pytest.fixture(scope="module")
def tf():
    import tensorflow as tf

    return tf


def tagged(height=6, width=9):
    """Every pixel carries its row and column in both maps: image = (row, column, 7), depth = row + column / 100."""
    row, column = np.mgrid[:height, :width]
    image = np.stack([row, column, np.full_like(row, 7)], -1).astype(np.uint8)
    return {"image": image, "depth": (row + column / 100).astype(np.float32)}


def noise(height=6, width=9, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (height, width, 3), np.uint8),
        "depth": (rng.integers(0, 10000, (height, width)) / 1000).astype(np.float32),
    }


def many(tf, op, example, count=2000):
    """The op's results for `count` seeds, stacked."""

    @tf.autograph.experimental.do_not_convert
    def one(position):
        return op({key: tf.constant(x) for key, x in example.items()}, tf.stack([3, tf.cast(position, tf.int32)]))

    batch = tf.data.Dataset.range(count).map(one, num_parallel_calls=2).batch(count)
    return next(batch.as_numpy_iterator())


def near(share, p, count):
    """Within 4 standard deviations of a binomial share."""
    return abs(share - p) < 4 * np.sqrt(p * (1 - p) / count)


def test_flip_mirrors_all_maps_together(tf):
    example, count = tagged(), 2000
    out = many(tf, lambda example, seed: map_transforms.random_flip(example, seed, DEPTH), example, count)
    flipped = out["image"][:, 0, 0, 1] == 8
    assert near(flipped.mean(), 0.5, count)
    for image, depth, was in zip(out["image"], out["depth"], flipped, strict=True):
        step = -1 if was else 1
        np.testing.assert_array_equal(image, example["image"][:, ::step])
        np.testing.assert_array_equal(depth, example["depth"][:, ::step])


def test_flip_mirrors_what_a_map_means(tf):
    """Of normals, x changes its sign."""
    normals = np.random.default_rng(0).normal(size=(6, 9, 3)).astype(np.float32)
    example, count = {"image": tagged()["image"], "normals": normals}, 50
    out = many(tf, lambda example, seed: map_transforms.random_flip(example, seed, Normals()), example, count)
    flipped = out["image"][:, 0, 0, 1] == 8
    assert 0 < flipped.sum() < count
    for map_, was in zip(out["normals"], flipped, strict=True):
        np.testing.assert_array_equal(map_, normals[:, ::-1] * [-1, 1, 1] if was else normals)


def test_crop_is_the_same_window_of_all_maps_and_uniform(tf):
    count = 3000
    out = many(tf, lambda example, seed: map_transforms.random_crop(example, seed, 5), tagged(), count)
    assert out["image"].shape == (count, 5, 5, 3)
    tops, lefts = out["image"][:, 0, 0, 0], out["image"][:, 0, 0, 1]
    row, column = out["image"][..., 0].astype(int), out["image"][..., 1].astype(int)
    np.testing.assert_array_equal(row, tops[:, None, None] + np.arange(5)[None, :, None] + np.zeros((1, 1, 5), int))
    np.testing.assert_array_equal(column, lefts[:, None, None] + np.arange(5)[None, None] + np.zeros((1, 5, 1), int))
    np.testing.assert_allclose(out["depth"], row + column / 100, rtol=1e-6)
    for top in range(2):
        for left in range(5):
            assert near(np.mean((tops == top) & (lefts == left)), 1 / 10, count)


def test_crop_of_the_whole_image_changes_nothing(tf):
    example = tagged(6, 6)
    out = map_transforms.random_crop(example, [0, 0], 6)
    np.testing.assert_array_equal(out["image"], example["image"])


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(1.13, 0.17, 1.0), (0.81, -0.2, 1.0), (1.0, 0.0, 0.83), (1.2, -0.1, 1.2)]
)
def test_tone_table(tf, alpha, beta, gamma):
    expected = []
    for value in range(256):
        value = int(min(max(value * alpha + beta * 255, 0), 255))
        expected.append(int(255 * (value / 255) ** gamma + 1e-6))
    table = map_transforms.tone_table(alpha, beta, gamma).numpy()
    assert table.dtype == np.uint8
    assert np.abs(table.astype(int) - expected).max() <= 1  # a fraction may fall on either side in the last bit
    assert np.mean(table != expected) < 0.02


def test_tone_table_without_change(tf):
    np.testing.assert_array_equal(map_transforms.tone_table(1.0, 0.0, 1.0), np.arange(256))


@pytest.mark.parametrize("shifts", [(20, 30, -20), (-20, -30, 20), (13.5, 0, 0), (0, 30, 0), (0, 0, -20)])
def test_shift_hsv(tf, shifts):
    image = noise(8, 8)["image"]
    expected = np.empty_like(image)
    for place in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
        hue = (hue + shifts[0] / 360) % 1
        saturation, value = (float(np.clip(x, 0, 1)) for x in (saturation + shifts[1] / 255, value + shifts[2] / 255))
        expected[place] = [round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value)]
    out = map_transforms.shift_hsv(image, np.array(shifts, np.float32)).numpy()
    assert out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 1
    assert np.mean(out != expected) < 0.02


def test_color_changes_come_with_p_one_half_and_in_range(tf):
    count = 2000
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = {"image": np.stack([ramp] * 3, -1), "depth": np.zeros((16, 16), np.float32)}
    out = many(tf, map_transforms.random_color, grey, count)["image"]
    assert near(np.mean(np.all(out == grey["image"], (1, 2, 3))), 1 / 8, count)  # none of the three
    coloured = np.any(out[..., 0] != out[..., 1], (1, 2))  # only a rise in saturation tints grey
    assert near(coloured.mean(), 1 / 4, count)
    plain = out[~coloured][..., 0].reshape(-1, 256).astype(float)
    assert plain[:, 128].min() >= 128 * 0.8 - 0.2 * 255 - 20 - 10
    assert plain[:, 0].max() == pytest.approx(0.2 * 255, abs=25)
    assert plain[:, 255].min() == pytest.approx(255 * 0.6 - 20, abs=25)


def test_color_parts_span_their_ranges(tf):
    count = 2000
    bright = {"image": np.full((1, 2, 3), [[[120, 120, 120]]], np.uint8), "depth": np.zeros((1, 2), np.float32)}
    bright["image"][0, 1] = [200, 40, 40]
    out = many(tf, map_transforms.random_color, bright, count)["image"].astype(float)
    red = out[:, 0, 1] / 255
    hues = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in red])
    degrees = (hues * 360 + 180) % 360 - 180
    turned = np.abs(degrees) > 0.75
    assert near(np.mean(turned), 0.5 * (1 - 0.75 / map_transforms.HUE_DEGREES), count)
    assert map_transforms.HUE_DEGREES == 40  # the published ±20 are half degrees
    assert map_transforms.HUE_DEGREES * 0.95 < np.abs(degrees).max() < map_transforms.HUE_DEGREES * 1.05
    assert np.mean(degrees[turned]) == pytest.approx(0, abs=2)


def test_cut_depth_band_and_values(tf):
    example = noise(4, 40)
    for alpha, beta in [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.99, 0.1), (0.33, 0.9)]:
        start, share = int(np.float32(alpha) * np.float32(40)), int(max((40 - alpha * 40) * beta * 0.75, 1))
        out = map_transforms.cut_depth(example["image"], example["depth"], alpha, beta).numpy()
        millimetres = np.rint(example["depth"] * 1000).astype(int)[..., None] % 256
        band = np.zeros(40, bool)
        band[start : start + share] = True
        np.testing.assert_array_equal(out[:, ~band], example["image"][:, ~band])
        np.testing.assert_array_equal(out[:, band], np.repeat(millimetres, 3, -1)[:, band])


def test_cut_depth_values_of_both_modes(tf):
    depth = np.array([[0, 0.255, 0.256, 1.0, 2.047, 9.999, 10.0, 65.535]], np.float32)
    image = np.zeros((1, 8, 3), np.uint8)
    whole = {"alpha": 0.0, "beta": 4 / 3}  # a band over the whole width
    wrapped = map_transforms.cut_depth(image, depth, mode="published", **whole).numpy()
    np.testing.assert_array_equal(wrapped[0, :, 2], [0, 255, 0, 1000 % 256, 255, 9999 % 256, 10000 % 256, 255])
    metric = map_transforms.cut_depth(image, depth, mode="metric", **whole).numpy()
    np.testing.assert_array_equal(metric[0, :, 2], [0, 6, 6, 25, 52, 254, 255, 255])


def test_cut_depth_comes_with_p_one_quarter(tf):
    count, width = 3000, 64
    example = {"image": np.zeros((1, width, 3), np.uint8), "depth": np.full((1, width), 0.255, np.float32)}
    out = many(tf, map_transforms.random_cut_depth, example, count)["image"]
    shares = (out[:, 0, :, 0] == 255).sum(-1)
    assert near(np.mean(shares > 0), 0.25, count)
    # w is about (1-a) * b * 0.75 of the width: mean 0.75/4, at most 0.75
    assert shares[shares > 0].mean() / width == pytest.approx(0.75 / 4, abs=0.02)
    assert 0.55 * width < shares.max() <= 0.75 * width


def test_tokenizer_recipe_keeps_to_its_columns(tf):
    recipe = map_transforms.tokenizer_train(DEPTH, 4, columns=(2, 7))
    out = many(tf, recipe, {"depth": tagged()["depth"]}, 500)
    assert set(out) == {"depth"}
    assert out["depth"].shape == (500, 4, 4)
    columns = np.rint(out["depth"] * 100 % 100).astype(int)
    assert (columns.min(), columns.max()) == (2, 6)
    rising = columns[:, 0, 1] > columns[:, 0, 0]
    assert near(rising.mean(), 0.5, 500)


def test_tokenizer_recipe_takes_all_columns(tf):
    out = many(tf, map_transforms.tokenizer_train(DEPTH, 6, columns=()), {"depth": tagged()["depth"]}, 200)
    assert np.rint(out["depth"] * 100 % 100).max() == 8


def test_solver_recipe_without_colour_moves_pixels_only(tf):
    out = many(tf, map_transforms.solver_train(DEPTH, 5, color=False, cutdepth="off"), tagged(), 300)
    image = out["image"] * 255
    assert out["image"].dtype == np.float32
    np.testing.assert_allclose(out["depth"], image[..., 0] + image[..., 1] / 100, atol=1e-5)
    assert len({tuple(first) for first in np.rint(image[:, 0, 0, :2]).astype(int)}) > 10


def test_solver_recipe_puts_the_band_where_the_depth_is(tf):
    """The band is cut before flip and crop: wherever it shows it equals the depth beside it."""
    row, column = np.mgrid[:8, :64]
    example = {"image": np.full((8, 64, 3), 255, np.uint8), "depth": ((row + 3 * column) / 1000).astype(np.float32)}
    count = 2000
    out = many(tf, map_transforms.solver_train(DEPTH, 8, color=False), example, count)
    image, millimetres = np.rint(out["image"] * 255), np.rint(out["depth"] * 1000)[..., None]
    assert np.all((image == 255) | (image == millimetres))
    rng = np.random.default_rng(0)
    left, start = rng.integers(0, 57, 10**5), 64 * rng.random(10**5)
    stop = start + (64 - start) * rng.random(10**5) * 0.75
    seen = 0.25 * np.mean((start < left + 8) & (stop > left))
    assert near(np.mean(np.any(image < 255, (1, 2, 3))), seen, count)  # most of the bands are cropped away


def test_colour_leaves_depth_alone_and_stays_in_range(tf):
    with_colour = many(tf, map_transforms.solver_train(DEPTH, 5), noise(), 200)
    without = many(tf, map_transforms.solver_train(DEPTH, 5, color=False), noise(), 200)
    np.testing.assert_array_equal(with_colour["depth"], without["depth"])
    assert with_colour["image"].min() >= 0
    assert with_colour["image"].max() <= 1
    assert np.mean(np.any(with_colour["image"] != without["image"], (1, 2, 3))) > 0.75


def test_evaluation_only_scales(tf):
    example = noise()
    out = map_transforms.evaluation(DEPTH)(example)
    np.testing.assert_allclose(out["image"], example["image"] / 255, rtol=1e-6)
    np.testing.assert_array_equal(out["depth"], example["depth"])


@pytest.mark.parametrize(
    "recipe", [map_transforms.solver_train(DEPTH, 5), map_transforms.tokenizer_train(DEPTH, 4, (1, 8))]
)
def test_eager_and_tf_data_agree(tf, recipe):
    example = noise()
    inside = many(tf, recipe, example, 20)
    for position in range(20):
        eager = recipe({key: tf.constant(x) for key, x in example.items()}, tf.constant([3, position]))
        for key, value in eager.items():
            np.testing.assert_array_equal(value, inside[key][position])


def test_seeds_matter(tf):
    example, recipe = noise(), map_transforms.solver_train(DEPTH, 5)
    out = [recipe(example, tf.constant(seed))["image"].numpy().tobytes() for seed in ([0, 0], [0, 1], [1, 0], [0, 0])]
    assert out[0] == out[3]
    assert len(set(out)) == 3


def test_errors():
    with pytest.raises(ValueError, match="cutdepth='on' must be one of"):
        map_transforms.solver_train(DEPTH, 5, cutdepth="on")
    with pytest.raises(ValueError, match="crop size 0 must be at least 1"):
        map_transforms.solver_train(DEPTH, 0)
    with pytest.raises(ValueError, match=r"columns=\(7, 2\) must be \(\) or \(start, stop\)"):
        map_transforms.tokenizer_train(DEPTH, 4, columns=(7, 2))
    with pytest.raises(ValueError, match=r"a\.jpg: crop size 480 must be at most the 480x400 pixels"):
        map_transforms.solver_train(DEPTH, 480).check(480, 400, "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: columns=\(41, 601\) must lie inside the image, which is 600 wide"):
        map_transforms.tokenizer_train(DEPTH, 480).check(480, 600, "a.jpg")
    with pytest.raises(ValueError, match=r"crop size 561 must be at most the 600x560 pixels"):
        map_transforms.tokenizer_train(DEPTH, 561).check(600, 640, "a.jpg")
    map_transforms.tokenizer_train(DEPTH, 480).check(480, 640, "a.jpg")
    map_transforms.solver_train(DEPTH, 480).check(480, 640, "a.jpg")
