"""Mask crops at boxes against the published system's RoI-align."""

import cases
import numpy as np
import pytest

from aitok_jax.data import object_transforms

pytestmark = cases.find("heads*")


@pytest.fixture
def case(name):
    return cases.load(name)


def sizes(case):
    return [int(key.removeprefix("out/crop_raw_")) for key in case.keys("out/crop_raw_")]


def arguments(case):
    return case["in/masks"], case["in/boxes"], case["in/inds"]


def test_raw_crops(case):
    assert sizes(case)
    for size in sizes(case):
        crops = object_transforms.roi_align(*arguments(case), size)
        assert crops.dtype == np.float32
        cases.check(crops, case[f"out/crop_raw_{size}"])
        np.testing.assert_allclose(crops, case[f"out/crop_raw_{size}"], rtol=0, atol=1e-4)


def test_binary_crops(case):
    assert sizes(case)
    for size in sizes(case):
        crops = object_transforms.crop_masks(*arguments(case), size)
        decided = np.abs(case[f"out/crop_raw_{size}"] - 0.5) >= 1e-5
        np.testing.assert_array_equal(crops[decided], case[f"out/crop_bin_{size}"][decided])
        assert decided.mean() > 0.9
