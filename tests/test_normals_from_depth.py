"""Normals that the depth tells: of the scenes, where something is missing, and prepared from a folder."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_prepare_data import fails
from test_prepared import command

from aitok_jax.data import datasets
from aitok_jax.scenes.render import render
from aitok_jax.tasks.modalities import Normals
from aitok_jax.tasks.modalities.normals import from_depth
from configs import common

NORMALS = Normals()


def angles(found, expected):
    known = NORMALS.valid(found)
    return np.asarray(NORMALS.error(found, expected))[known], known


def plane(normal, distance, height, width, fov):
    """Depth of the plane of points p with p · normal = -distance."""
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    return (-distance / (rays @ normal)).astype(np.float32)


@pytest.mark.parametrize("fov", [40, 60])
def test_normals_of_planes(fov):
    for normal in ([0, 0, -1], [0.6, 0, -0.8], [0, -0.6, -0.8], [-0.48, 0.6, -0.64]):
        found = from_depth(plane(np.array(normal), 5, 30, 40, fov), fov)
        np.testing.assert_allclose(found, np.broadcast_to(normal, found.shape), atol=2e-3)


@pytest.mark.parametrize("size", [(96, 128), (480, 640)])
def test_normals_of_scenes(size):
    """Nearly all pixels have the scene's own, also at edges, from depth in millimetres; none has another's side."""
    for seed in range(3):
        scene = render(seed, *size)
        found, known = angles(from_depth(np.round(scene.depth * 1000) / 1000, 60), scene.normals)
        assert known.mean() > 0.99
        assert np.median(found) < 2
        assert np.mean(found < 11.25) > 0.9


def test_missing_depth_has_no_normal():
    """Nor has a pixel whose neighbours on both sides are missing; one neighbour is enough."""
    depth = plane(np.array([0.6, 0, -0.8]), 5, 30, 40, 60)
    depth[10:20, 10:20] = 0
    depth[15, 15] = 5
    found = from_depth(depth, 60)
    np.testing.assert_array_equal(found[10:20, 10:20], 0)
    outside = np.ones(depth.shape, bool)
    outside[10:20, 10:20] = False
    np.testing.assert_allclose(found[outside], np.broadcast_to([0.6, 0, -0.8], found[outside].shape), atol=2e-3)
    np.testing.assert_array_equal(from_depth(np.zeros((5, 6), np.float32), 60), 0)


def test_prepared_from_depth(tmp_path):
    """Files of another scale; what is missing in the depth is in the normals too."""
    depth = plane(np.array([0.6, 0, -0.8]), 2, 24, 32, 60)
    depth[:5] = 0
    for name in ("a/1", "a/2", "b/1"):
        for kind in ("photos", "depths"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24)).save(tmp_path / f"photos/{name}.png")
        Image.fromarray(np.round(depth * 5000).astype(np.uint16)).save(tmp_path / f"depths/{name}.png")
    words = ("folder", tmp_path / "photos", tmp_path / "out", f"--depth={tmp_path / 'depths'}", "--depth_scale=5000")
    assert "--fov=180.0 must be the horizontal field of view in degrees" in fails(*words, "--fov=180")
    for more in (f"--normals={tmp_path / 'depths'}", "--depth="):
        assert "give --depth=FOLDER with it, and no --normals" in fails(
            *words, "--fov=60", f"--semantic={tmp_path}", more
        )
    command(*words, "--fov=60", "--test_share=0.3")
    for name in ("normals", "depth"):
        data = datasets.build(ConfigDict(common.maps_data(name, str(tmp_path / "out"), 4, "solver")))
        assert (len(data.train), len(data.eval)) == (2, 1)
        map_ = data.train.read(0)[name]
        np.testing.assert_array_equal(map_[:5], 0)
        if name == "normals":
            found, known = angles(map_[5:], np.broadcast_to(np.float32([0.6, 0, -0.8]), (19, 32, 3)))
            assert known.all()
            assert found.max() < 1.5
