"""How images come to the scale of the model, and maps back."""

import numpy as np
import pytest
from toy_depth import picture

from aitok_jax.data import object_transforms
from aitok_jax.image import fit_square, model_size, resize
from aitok_jax.predict.views import NUM_VIEWS, average_views, view
from aitok_jax.tasks.modalities import Depth, Normals


def test_model_size():
    assert model_size(480, 640, 480) == (480, 640)
    assert model_size(960, 1280, 480) == (480, 640)
    assert model_size(640, 480, 480) == (640, 480)
    assert model_size(333, 333, 96) == (96, 96)
    assert model_size(1080, 1920, 480) == (480, 864)
    assert {model_size(480, width, 480)[1] for width in range(480, 3840)} <= set(range(480, 3841, 32))
    for width in range(100, 800, 7):
        assert abs(model_size(100, width, 480)[1] / 480 - width / 100) <= 1 / 30 + 1e-6
    with pytest.raises(ValueError, match=r"10x81 .* crop"):
        model_size(10, 81, 48)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (30, 17), (200, 333), (500, 100), (64, 64), (1, 300), (3, 1)])
def test_objects_see_what_their_evaluation_sees(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    square, scale = fit_square(image, 64)
    expected = object_transforms.evaluation(64)({"image": image}, np.random.default_rng(0))
    assert square.dtype == np.float32
    np.testing.assert_array_equal(square, expected["image"])
    np.testing.assert_array_equal(scale, expected["scale"])


def test_resize():
    image = picture(30, 40)
    assert resize(image, 30, 40) is image
    np.testing.assert_array_equal(resize(image, 10, 20, (0, 0, 20, 10)), image[:10, :20])
    np.testing.assert_allclose(resize(image, 60, 80)[::2, ::2], image, atol=3)


@pytest.mark.parametrize(("height", "width"), [(44, 66), (77, 44), (30, 30), (8, 61)])
def test_views_are_put_back_where_they_were(height, width):
    """On a picture that holds its own coordinates; a depth of it counts more in the enlarged views."""
    image = picture(3 * height, 2 * width)
    seen = [view(image, number, height, width) for number in range(NUM_VIEWS)]
    assert {one.shape for one in seen} == {(height, width, 3)}
    whole = seen[0].astype(np.float32)
    corners = [(slice(None, 4), slice(None, 4)), (slice(None, 4), slice(-4, None))]
    for number, corner in enumerate([*corners, *((slice(-4, None), columns) for _, columns in corners)], 1):
        np.testing.assert_allclose(seen[number][corner], whole[corner], atol=9)
    maps = [{"depth": one[..., 0].astype(np.float32), "confidence": one[..., 1].astype(np.float32)} for one in seen]
    averaged, zoom = average_views(maps, Depth()), height / round(height / 1.1)
    np.testing.assert_allclose(averaged["depth"], (1 + zoom) / 2 * whole[..., 0], atol=4)
    np.testing.assert_allclose(averaged["confidence"], whole[..., 1], atol=4)
    assert all(map_.dtype == np.float32 for map_ in averaged.values())
    alone = average_views(maps[:1], Depth())
    np.testing.assert_array_equal(alone["depth"], maps[0]["depth"])


def test_views_of_maps_with_axes_of_their_own():
    """Directions do not grow in the enlarged views."""
    map_ = np.array([0.48, 0.6, -0.64]) * np.ones((44, 66, 3))
    maps = [{"normals": map_.astype(np.float32), "confidence": np.ones((44, 66), np.float32)}] * NUM_VIEWS
    np.testing.assert_allclose(average_views(maps, Normals())["normals"], map_, rtol=1e-5)
