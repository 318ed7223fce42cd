"""Point clouds by hand, and what a reader of PLY files finds."""

import numpy as np
import pytest

from aitok_jax.predict.pointcloud import focal_length, points, write_ply


def read_ply(path):
    """Header lines and vertices, read as the format says."""
    content = path.read_bytes()
    header, _, body = content.partition(b"end_header\n")
    lines = header.decode("ascii").splitlines()
    types = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], types[line.split()[1]]) for line in lines if line.startswith("property")]
    return lines, np.frombuffer(body, fields)


def test_focal_length():
    assert focal_length(640, 90) == pytest.approx(320)
    assert focal_length(640, 63.3) == pytest.approx(519, abs=1)  # the Kinect of NYUv2
    for fov in (0, -60, 180, 360, float("nan")):
        with pytest.raises(ValueError, match=f"{fov} degrees is impossible"):
            focal_length(640, fov)


def test_a_wall_in_front_of_the_camera():
    """4 x 2 pixels at 90 degrees: at 3 m the outer borders lie 3 m left and right, and the pixels are square."""
    place = points(np.full((2, 4), 3.0, np.float32), 90).reshape(2, 4, 3)
    assert place.dtype == np.float32
    np.testing.assert_allclose(place[0, :, 0], [-2.25, -0.75, 0.75, 2.25])
    np.testing.assert_allclose(place[:, 0, 1], [-0.75, 0.75])  # y points down
    np.testing.assert_allclose(place[..., 2], 3)


def test_points_project_back_to_their_pixels():
    depth = np.random.default_rng(0).uniform(0.5, 9, (5, 8)).astype(np.float32)
    x, y, z = points(depth, 70).T
    focal = focal_length(8, 70)
    rows, columns = np.mgrid[:5, :8]
    np.testing.assert_allclose(x / z * focal + 4 - 0.5, columns.ravel(), atol=1e-5)
    np.testing.assert_allclose(y / z * focal + 2.5 - 0.5, rows.ravel(), atol=1e-5)
    with pytest.raises(ValueError, match=r"\[H, W\].*\(1, 5, 8\)"):
        points(depth[None], 70)


def test_ply(tmp_path):
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 9, (5, 8)).astype(np.float32)
    image = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
    depth[0, 0], depth[1, 2], depth[3, 3], depth[4, 4] = 0, np.nan, np.inf, -1
    known = np.isfinite(depth) & (depth > 0)
    assert write_ply(tmp_path / "made" / "x.ply", image, depth, 60) == known.sum() == 36
    lines, vertices = read_ply(tmp_path / "made" / "x.ply")
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert "element vertex 36" in lines
    assert vertices.dtype.names == ("x", "y", "z", "red", "green", "blue")
    np.testing.assert_array_equal(np.stack([vertices[name] for name in "xyz"], -1), points(depth, 60)[known.ravel()])
    np.testing.assert_array_equal(np.stack([vertices[name] for name in ("red", "green", "blue")], -1), image[known])
    with pytest.raises(ValueError, match=r"uint8 \(5, 8, 3\).*uint8 \(5, 7, 3\)"):
        write_ply(tmp_path / "y.ply", image[:, :7], depth, 60)
    with pytest.raises(ValueError, match="float32"):
        write_ply(tmp_path / "y.ply", image / np.float32(255), depth, 60)
