"""Modalities: what they are for the VQ-VAE, metrics and errors by hand, mirror images, files, and scenes' normals."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aitok_jax.data import scenes
from aitok_jax.scenes.raycast import FOCAL
from aitok_jax.scenes.render import render
from aitok_jax.tasks.modalities import MODALITIES, Depth, Normals, Semantic

DEPTH, NORMALS = Depth(), Normals()
HALF, THIRD = np.sqrt(0.5), np.sqrt(1 / 3)


def normals(*vectors):
    """f32[1,1,n,3]"""
    return np.array([[vectors]], np.float32)


def test_every_modality_has_a_place_of_its_own():
    """Rows of the solver's tables, where 0 and 1 are those of objects, and names of files."""
    assert [kind.name for kind in MODALITIES.values()] == list(MODALITIES)
    task_ids = [kind.task_id for kind in MODALITIES.values()]
    assert len({0, 1, *task_ids}) == 2 + len(MODALITIES)
    assert len({kind.pair for kind in MODALITIES.values()}) == len(MODALITIES)
    for kind in MODALITIES.values():
        own = kind(**({"classes": ("a", "b")} if kind is Semantic else {}))
        map_ = np.ones((2, 4, 5, *own.map_axes), np.float32)
        seen = own.encode(map_)
        assert seen.shape == (2, 4, 5, own.channels)
        assert own.finish(jnp.asarray(seen)).shape == map_.shape
        assert own.valid(map_).shape == own.measured(map_).shape == (2, 4, 5)
        assert not np.any(own.valid(np.full_like(map_, own.missing)))
        means = {name: np.mean(column, 0) for name, column in own.metrics(map_, map_, own.valid(map_)).items()}
        assert set(own.overall(means)) >= {own.headline[0]}


def test_depth_for_the_vqvae():
    depth = np.array([[[0, 0.0005, 2, 11]]], np.float32)
    np.testing.assert_array_equal(DEPTH.encode(depth), depth[..., None])
    np.testing.assert_allclose(DEPTH.finish(jnp.array([[[[-3.0], [0.0], [2.5]]]])), [[[1e-3, 1e-3, 2.5]]])
    np.testing.assert_array_equal(DEPTH.valid(depth)[0, 0], [False, True, True, True])
    np.testing.assert_array_equal(DEPTH.measured(depth)[0, 0], [False, False, True, False])
    np.testing.assert_array_equal(Depth(max_depth=20).measured(depth)[0, 0], [False, False, True, True])


def test_depths_auxiliary_loss_is_silog():
    """e = log 2 at half of the pixels; what is not annotated does not count, what is negative is 1 mm."""
    raw, depth = np.array([1, 1, 5, 9], np.float32), np.array([2, 1, 0, 0], np.float32)
    loss = DEPTH.auxiliary(jnp.asarray(raw.reshape(1, 2, 2, 1)), depth.reshape(1, 2, 2))
    e = np.log(2)
    np.testing.assert_allclose(loss["silog"], np.sqrt(e**2 / 2 - (e / 2) ** 2 / 2), rtol=1e-5)
    broken = DEPTH.auxiliary(jnp.full((1, 1, 1, 1), -4.0), np.ones((1, 1, 1), np.float32))
    np.testing.assert_allclose(broken["silog"], np.log(1000) * np.sqrt(0.5), rtol=1e-5)


def test_depth_of_other_views():
    depth = np.float32([[1, 2], [3, 4]])
    assert DEPTH.mirror(depth) is depth
    np.testing.assert_allclose(DEPTH.zoomed(depth, 1.1), 1.1 * depth)
    np.testing.assert_array_equal(DEPTH.resized(depth, 2, 2), depth)
    np.testing.assert_allclose(DEPTH.resized(depth, 1, 1), [[2.5]])
    assert DEPTH.distance(depth) is depth


def test_depth_files(tmp_path):
    depth = np.array([[0.0, 1.2344, 9.9], [65.5, 70.0, 0.001]], np.float32)
    DEPTH.write(tmp_path / "room", depth)
    assert {path.name for path in tmp_path.iterdir()} == {"room_depth.npy", "room_depth.png"}
    np.testing.assert_array_equal(np.load(tmp_path / "room_depth.npy"), depth)
    read = DEPTH.read((tmp_path / "room_depth.png").read_bytes())
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, [[0, 1.234, 9.9], [65.5, 65.535, 0.001]], rtol=1e-6)


def test_depth_tiles_share_a_range_and_leave_holes_blank():
    a, b = DEPTH.tiles([np.float32([[0, 1], [2, 3]]), np.float32([[4, 5], [0, 6]])])
    assert a.style == b.style
    assert (a.style["vmin"], a.style["vmax"]) == pytest.approx((1.05, 5.95), abs=0.02)
    np.testing.assert_array_equal(np.isnan(a.values), [[True, False], [False, False]])
    assert (a.unit, b.unit) == ("depth [m]", "depth [m]")
    (empty,) = DEPTH.tiles([np.zeros((2, 2), np.float32)])
    assert np.isnan(empty.values).all()


def test_normals_for_the_vqvae():
    map_ = normals([0, 0, -1], [0, 0, 0], [0.6, 0, -0.8])
    np.testing.assert_array_equal(NORMALS.encode(map_), map_)
    np.testing.assert_array_equal(NORMALS.valid(map_)[0, 0], [True, False, True])
    np.testing.assert_array_equal(NORMALS.measured(map_)[0, 0], [True, False, True])
    raw = normals([0, 0, -5], [3, 0, -4], [1e-3, 0, 0], [0, 0, 0])
    expected = normals([0, 0, -1], [0.6, 0, -0.8], [1, 0, 0], [0, 0, 0])
    np.testing.assert_allclose(NORMALS.finish(jnp.asarray(raw)), expected, atol=1e-6)


def test_normals_auxiliary_loss_is_one_minus_the_cosine():
    map_ = normals([0, 0, -1], [0, -1, 0], [0, 0, 0])
    raw = normals([0, 0, -7], [0, -2, -2], [1, 0, 0])
    np.testing.assert_allclose(NORMALS.auxiliary(jnp.asarray(raw), map_)["cosine"], (0 + 1 - HALF) / 2, rtol=1e-5)
    assert NORMALS.auxiliary(jnp.asarray(raw), 0 * map_)["cosine"] == 0


def test_errors_of_normals_are_angles_whatever_the_length():
    a = normals([0, 0, -1], [0, 0, -1], [0, 0, -1], [2, 0, 0], [np.sin(1e-3), 0, -np.cos(1e-3)])
    b = normals([0, 0, -3], [0, -1, -1], [0, 0, 1], [0, 5, 0], [0, 0, -1])
    np.testing.assert_allclose(NORMALS.error(a, b)[0, 0], [0, 45, 180, 90, np.degrees(1e-3)], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(NORMALS.error(b, a), NORMALS.error(a, b), rtol=1e-6)


def test_metrics_of_normals():
    """Angles of 0, 15, 25 and 90 degrees, and one that is not annotated; an image without any is NaN."""
    degrees = np.radians([0, 15, 25, 90, 180])
    prediction = np.stack([np.sin(degrees), 0 * degrees, -np.cos(degrees)], -1)[None, None].astype(np.float32)
    truth = np.broadcast_to(np.float32([0, 0, -1]), prediction.shape).copy()
    truth[..., 4, :] = 0
    both = [np.concatenate([map_, map_]) for map_ in (prediction, truth)]
    both[1][1] = 0
    metrics = NORMALS.metrics(*both, NORMALS.valid(both[1]))
    expected = {"mean_angle": 32.5, "median_angle": 20, "within_11.25": 0.25, "within_22.5": 0.5, "within_30": 0.75}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], [value, np.nan], rtol=1e-3, err_msg=name)


def test_normals_of_the_mirror_image():
    """x changes its sign, of maps and of what the VQ-VAE gives; twice is nothing."""
    map_ = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    for library in (np.asarray, jnp.asarray):
        mirrored = NORMALS.mirror(library(map_))
        np.testing.assert_array_equal(mirrored, map_ * [-1, 1, 1])
        np.testing.assert_array_equal(NORMALS.mirror(mirrored), map_)
    np.testing.assert_array_equal(NORMALS.mirror(map_[0]), map_[0] * [-1, 1, 1])


def test_normals_of_other_views():
    map_ = normals([0, 0, -1], [0, -1, 0])[0]
    assert NORMALS.zoomed(map_, 1.1) is map_
    assert NORMALS.distance(map_) is None
    np.testing.assert_allclose(NORMALS.resized(map_, 1, 1)[0, 0], [0, -HALF, -HALF], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(NORMALS.resized(map_, 3, 7), axis=-1), 1, rtol=1e-5)


def test_normals_files(tmp_path):
    """In the usual colours; a pixel of grey 128 is none, and what is written comes back."""
    map_ = normals([1, 0, 0], [0, -1, 0], [0, 0, -1], [THIRD, THIRD, -THIRD], [0, 0, 0])[0]
    NORMALS.write(tmp_path / "room", map_)
    assert {path.name for path in tmp_path.iterdir()} == {"room_normals.npy", "room_normals.png"}
    np.testing.assert_array_equal(np.load(tmp_path / "room_normals.npy"), map_)
    picture = np.asarray(Image.open(tmp_path / "room_normals.png"))
    np.testing.assert_array_equal(picture[0, :3], [[255, 128, 128], [128, 255, 128], [128, 128, 255]])
    read = NORMALS.read((tmp_path / "room_normals.png").read_bytes())
    assert (read.shape, read.dtype) == ((1, 5, 3), np.float32)
    assert NORMALS.error(read, map_)[0, :4].max() < 0.6
    np.testing.assert_array_equal(read[0, 4], 0)
    np.testing.assert_allclose(np.linalg.norm(read[0, :4], axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_normals_need_three_channels(mode):
    content = io.BytesIO()
    Image.new(mode, (4, 4)).save(content, "png")
    with pytest.raises(ValueError, match=rf"normals must be a picture of 3 x 8 bits, but Pillow reads mode '{mode}'"):
        NORMALS.read(content.getvalue())


def test_normals_tiles_are_their_colours():
    (tile,) = NORMALS.tiles([normals([1, 0, 0], [0, 0, -1])[0]])
    assert (tile.values.dtype, tile.unit) == (np.uint8, "")
    np.testing.assert_array_equal(tile.values[0], [[255, 128, 128], [128, 128, 255]])


@pytest.mark.parametrize("modality", [DEPTH, NORMALS])
def test_spread_is_the_standard_deviation_of_the_codes_values(modality):
    """Two values 2 m apart, or opposite directions, and a third that none believes in; codes of one value agree."""
    values = np.array([[1, 0, 0], [-1, 0, 0], [0, 9, 9], [1, 0, 0]], np.float32)[:, : modality.channels]
    chances = np.array([[[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.5, 0, 0, 0.5], [0.9, 0.1, 0, 0]]], np.float32)
    spread = modality.spread(jnp.asarray(chances), jnp.asarray(values))
    np.testing.assert_allclose(spread, [[1, 0, 0, 0.6]], atol=1e-6)
    everything = np.full((1, 1, 4), 0.25, np.float32)
    by_hand = np.sqrt(np.square(values - values.mean(0)).sum(-1).mean())
    np.testing.assert_allclose(modality.spread(jnp.asarray(everything), jnp.asarray(values)), by_hand, rtol=1e-5)


def of_depth(depth):
    """Normals from differences between neighbouring points, f32[H-2,W-2,3]; and where the surface is flat there.

    Of a plane, the inverse of depth is linear in rows and columns.
    """
    height, width = depth.shape
    focal, (y, x) = FOCAL * height, np.mgrid[:height, :width] + 0.5
    points = depth[..., None] * np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    normal = np.cross(down, across)
    inverse = 1 / depth.astype(np.float64)
    bends = [
        inverse[1:-1, 2:] + inverse[1:-1, :-2] - 2 * inverse[1:-1, 1:-1],
        inverse[2:, 1:-1] + inverse[:-2, 1:-1] - 2 * inverse[1:-1, 1:-1],
    ]
    flat = (np.abs(bends) < 1e-5).all(0)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True), flat


@pytest.fixture(scope="module")
def rooms():
    return [render(seed, 96, 128) for seed in range(12)]


def one_thing(scene):
    """bool[H-2,W-2]: all around the pixel is of one object, or of none."""
    owner = np.where(scene.masks.any(0), scene.masks.argmax(0), -1)
    around = [owner[i : owner.shape[0] - 2 + i, j : owner.shape[1] - 2 + j] for i, j in np.ndindex(3, 3)]
    return np.all(np.array(around) == around[0], axis=0)


def test_normals_of_scenes_are_those_of_their_depth(rooms):
    """Where surfaces are flat: of walls, floors and the faces of furniture; all of them are unit vectors to the eye."""
    angles, shares, on_objects = [], [], 0
    for scene in rooms:
        assert scene.normals.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-4)
        expected, flat = of_depth(scene.depth)
        flat &= one_thing(scene)
        shares.append(flat.mean())
        on_objects += (flat & scene.masks.any(0)[1:-1, 1:-1]).sum()
        angles.append(np.asarray(NORMALS.error(scene.normals[1:-1, 1:-1], expected.astype(np.float32)))[flat])
    assert np.mean(shares) > 0.5
    assert on_objects > 2000
    angles = np.concatenate(angles)
    assert np.mean(angles < 2) > 0.99
    assert np.median(angles) < 0.2


def test_normals_of_scenes_face_the_camera(rooms):
    """The angle between a normal and the ray to the pixel is never less than 90 degrees."""
    height, width = rooms[0].depth.shape
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - width / 2) / (FOCAL * height), (y - height / 2) / (FOCAL * height), np.ones_like(x)], -1)
    for scene in rooms:
        assert (scene.normals * rays).sum(-1).max() < 1e-3


def test_the_mirror_image_is_that_of_the_mirrored_scene(rooms):
    for scene in rooms[:4]:
        expected, flat = of_depth(scene.depth[:, ::-1])
        flat &= one_thing(scene)[:, ::-1]
        mirrored = NORMALS.mirror(scene.normals[:, ::-1])
        angles = np.asarray(NORMALS.error(mirrored[1:-1, 1:-1], expected.astype(np.float32)))[flat]
        assert np.mean(angles < 2) > 0.99
        unchanged = NORMALS.error(scene.normals[:, ::-1][1:-1, 1:-1], expected.astype(np.float32))
        assert np.mean(np.asarray(unchanged)[flat] < 2) < 0.9, "the test needs surfaces that face sideways"


def test_normals_that_scenes_write_come_back(tmp_path):
    scenes.write(tmp_path, train=3, test=1, height=48, width=64, seed=2, workers=1)
    for index, path in enumerate(sorted(tmp_path.glob("scene_*/normals_*.png"))):
        scene = render(scenes._scene_seed("train", 2, index), 48, 64)
        read = NORMALS.read(path.read_bytes())
        assert NORMALS.error(read, scene.normals).max() < 0.6
    assert index == 2
