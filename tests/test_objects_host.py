import jax
import numpy as np
import pytest
from PIL import Image
from test_roi_align import ellipse

from aitok_jax.data import object_transforms
from aitok_jax.image import IMAGENET_MEAN

NAMES = ("image", "objects/boxes", "objects/classes", "objects/kind", "objects/crops")


def example(height=60, width=80, boxes=((10, 12, 40, 50), (50, 5, 72, 20))):
    """An image whose boxes are painted in bright green on dark noise, with masks that fill the boxes."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (height, width, 3), np.uint8)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[y1:y2, x1:x2] = (0, 255, 0)
    classes = np.arange(len(boxes), dtype=np.int32)
    return {"image": image, "boxes": np.array(boxes, np.float32).reshape(-1, 4), "classes": classes, "masks": masks}


def run(transform, data, seed=0):
    return transform(data, np.random.default_rng((seed, 7)))


def test_outputs_are_as_the_spec_says():
    for transform in (
        object_transforms.training(64, 20, 16),
        object_transforms.training(64, 20, 0),
        object_transforms.evaluation(64),
    ):
        result = run(transform, example())
        assert {name: (x.dtype, x.shape) for name, x in result.items()} == {
            name: (np.dtype(dtype), shape) for name, (dtype, shape) in transform.spec.items()
        }
    assert set(object_transforms.training(64, 20, 16).spec) == set(NAMES)
    assert "objects/crops" not in object_transforms.training(64, 20, 0).spec
    without = {name: x for name, x in example().items() if name != "masks"}
    with_crops, boxes_only = (
        run(object_transforms.training(64, 20, 16), example()),
        run(object_transforms.training(64, 20, 0), without),
    )
    for name in boxes_only:
        np.testing.assert_array_equal(boxes_only[name], with_crops[name])


def test_same_seed_same_example():
    transform = object_transforms.training(64, 20, 16)
    first, again, other = (run(transform, example(), seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["image"], other["image"])
    assert not np.array_equal(first["objects/boxes"], other["objects/boxes"])


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.3, 0.6), (1.5, 3.0)])
def test_painted_boxes_end_where_the_boxes_say(jitter):
    """Flip, jitter and crop move image, boxes and masks together."""
    transform = object_transforms.training(64, 8, 16, jitter)
    seen = 0
    for seed in range(30):
        result = run(transform, example(), seed)
        real = result["objects/kind"] == object_transforms.REAL
        painted = (result["image"][..., 1] > 0.5) & (result["image"][..., 0] < 0.45)
        covered = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in result["objects/boxes"][real]:
            inner = painted[int(np.ceil(y1 + 1)) : int(y2 - 1), int(np.ceil(x1 + 1)) : int(x2 - 1)]
            assert inner.all()
            seen += inner.size > 0
            covered[max(int(y1 - 1), 0) : int(np.ceil(y2 + 1)), max(int(x1 - 1), 0) : int(np.ceil(x2 + 1))] = True
        assert not (painted & ~covered).any()
        wide = (result["objects/boxes"][:, 2:] - result["objects/boxes"][:, :2] > 8).all(axis=1)
        assert (result["objects/crops"][real & wide].mean(axis=(1, 2)) > 0.87).all()  # nearest pixels: 1/2 px a side
    assert seen > 20


def test_crops_are_those_of_the_resized_cropped_masks():
    """The crop of a shape at its own box shows the whole shape, mirrored with the image, at any scale."""
    height, width = 90, 120
    shape = ellipse(height, width, 60, 45, 30, 20)
    shape[:45, 60:] = 0  # so that mirroring shows
    data = {**example(height, width, ()), "boxes": np.array([(30, 25, 90, 65)], np.float32)}
    data |= {"classes": np.zeros(1, np.int32), "masks": shape[None]}
    upright = object_transforms.crop_masks(shape[None], data["boxes"], np.array([0]), 32)[0]
    flips = 0
    for seed in range(12):
        result = run(object_transforms.training(128, 2, 32, (0.9, 1.0)), data, seed)
        assert result["objects/kind"][0] == object_transforms.REAL
        agree = [np.mean(result["objects/crops"][0] == crop) for crop in (upright, upright[:, ::-1])]
        assert max(agree) > 0.97 > 0.9 > min(agree)
        flips += agree[1] > agree[0]
    assert 1 < flips < 11


def test_flip_is_its_own_inverse():
    data = example()
    flipped = object_transforms.flip(data)
    np.testing.assert_array_equal(flipped["boxes"][0], [40, 12, 70, 50])
    assert flipped["masks"][0, 12:50, 40:70].all()
    assert flipped["masks"][0].sum() == data["masks"][0].sum()
    jax.tree.map(np.testing.assert_array_equal, object_transforms.flip(flipped), data)


def test_half_of_the_images_are_mirrored():
    data = example(16, 16, ())
    data["image"][:, :8] = 255
    transform = object_transforms.training(16, 1, 0, (1.0, 1.0))
    left = [run(transform, data, seed)["image"][0, 0, 0] == 1 for seed in range(400)]
    assert abs(np.mean(left) - 0.5) < 0.1


def test_jitter_is_uniform_and_crops_anywhere():
    """An image all of one colour: what is not padding tells the scale."""
    data = example(50, 100, ())
    data["image"][:] = 255
    sides, tops = [], []
    for seed in range(400):
        shown = run(object_transforms.training(100, 1, 0, (0.5, 1.0)), data, seed)["image"][..., 0] == 1
        height, width = shown.any(1).sum(), shown.any(0).sum()
        assert shown[:height, :width].all()
        assert abs(height - width / 2) <= 0.5
        sides.append(width)
    assert (min(sides), max(sides)) >= (50, 97)
    assert abs(np.mean(sides) - 74.75) < 2.5
    data["image"][:] = (np.arange(50) * 5)[:, None, None]
    for seed in range(200):
        image = run(object_transforms.training(100, 1, 0, (2.0, 2.0)), data, seed)["image"]
        tops.append(image[0, 0, 0] * 255)
    assert max(tops) < 5  # 100 x 200 in 100 x 100: the height fits
    data["image"][:] = np.arange(100)[None, :, None]
    lefts = [
        run(object_transforms.training(100, 1, 0, (2.0, 2.0)), data, seed)["image"][0].min() * 255
        for seed in range(300)
    ]
    assert min(lefts) < 3
    assert max(lefts) > 46
    assert abs(np.mean(lefts) - 24.75) < 3
    assert abs(np.std(lefts) - 50 / 12**0.5) < 2


def test_padding_is_the_mean_colour_and_vanishes_when_normalised():
    image = run(object_transforms.evaluation(64), example(32, 64))["image"]
    np.testing.assert_array_equal(image[32:], np.broadcast_to(IMAGENET_MEAN, (32, 64, 3)))
    image = run(object_transforms.training(64, 2, 0, (0.5, 0.5)), example(32, 64))["image"]
    np.testing.assert_array_equal(image[:, 32:], np.broadcast_to(IMAGENET_MEAN, (64, 32, 3)))
    np.testing.assert_array_equal(image[16:], np.broadcast_to(IMAGENET_MEAN, (48, 64, 3)))


@pytest.mark.parametrize(("height", "width"), [(60, 80), (81, 40), (640, 427), (1, 500)])
def test_evaluation_fits_the_image(height, width):
    data = example(height, width, ())
    result = run(object_transforms.evaluation(64), data)
    scale = 64 / max(height, width)
    new = [max(int(side * scale + 0.5), 1) for side in (height, width)]
    assert max(new) == 64
    np.testing.assert_array_equal(result["original_size"], [height, width])
    np.testing.assert_allclose(result["scale"], [new[1] / width, new[0] / height], rtol=1e-6)
    picture = Image.fromarray(data["image"]).resize(new[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        result["image"][: new[0], : new[1]], np.asarray(picture, np.float32) / np.float32(255)
    )


def test_evaluation_keeps_an_image_that_fits():
    data = example(60, 64, ())
    result = run(object_transforms.evaluation(64), data)
    np.testing.assert_array_equal(result["image"][:60], data["image"] / np.float32(255))
    np.testing.assert_array_equal(result["scale"], 1)


def slots(boxes, num=20, seed=0, height=50, width=90):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    classes = np.arange(len(boxes), dtype=np.int32)
    return object_transforms.fill_slots(boxes, classes, num, height, width, np.random.default_rng(seed))


BOXES = [(0, 0, 30, 20), (40, 10, 90, 50), (12.5, 7, 13, 8)]


def test_slots_real_first_then_noise():
    orders = set()
    for seed in range(50):
        boxes, classes, kind, origin = slots(BOXES, seed=seed)
        assert sorted(classes[:3]) == [0, 1, 2]
        np.testing.assert_array_equal(kind[:3], object_transforms.REAL)
        np.testing.assert_array_equal(boxes[:3], np.array(BOXES, np.float32)[classes[:3]])
        np.testing.assert_array_equal(origin[:3], classes[:3])
        np.testing.assert_array_equal(classes[3:], object_transforms.NOISE_CLASS)
        assert (kind[3:] > 0).all()
        np.testing.assert_array_equal(origin[3:] >= 0, kind[3:] == object_transforms.DUPLICATE)
        assert np.isfinite(boxes).all()
        orders.add(tuple(classes[:3]))
    assert len(orders) == 6


def test_noise_is_shuffled():
    kinds = np.array([slots(BOXES, seed=seed).kind[3:] for seed in range(300)])
    mixed = kinds[[len(set(k)) == 2 for k in kinds]]
    first, last = mixed[:, :8].mean(), mixed[:, -8:].mean()
    assert abs(first - last) < 0.15


def test_noise_boxes_lie_inside_the_image():
    for seed in range(200):
        x1, y1, x2, y2 = slots(BOXES, seed=seed).boxes.T
        assert min(x1.min(), y1.min()) >= 0
        assert x2.max() <= 90
        assert y2.max() <= 50
        assert (x1 <= x2).all()
        assert (y1 <= y2).all()


def test_number_of_duplicates_is_uniform():
    count = np.array([(slots(BOXES, seed=seed).kind == object_transforms.DUPLICATE).sum() for seed in range(3600)])
    frequencies = np.bincount(count, minlength=18) / len(count)
    assert len(frequencies) == 18  # 0..17 of 17 noise objects
    np.testing.assert_allclose(frequencies, 1 / 18, atol=0.02)


def test_duplicates_come_from_all_objects_and_stay_near():
    counts = np.zeros(3)
    moves = []
    for seed in range(300):
        boxes, _, kind, origin = slots(BOXES, seed=seed)
        copies = kind == object_transforms.DUPLICATE
        counts += np.bincount(origin[copies], minlength=3)
        real = np.array(BOXES)[origin[copies]]
        side = np.tile(real[:, 2:] - real[:, :2], 2)
        moves.append(((boxes[copies] - real) / side)[origin[copies] == 2])  # that box is far from the border
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.04)
    moves = np.concatenate(moves)
    assert 0.098 < np.abs(moves).max() < 0.1001
    np.testing.assert_allclose(moves.std(axis=0), 0.05 * 0.8796, rtol=0.1)  # 0.8796: of a normal cut at 2


def test_bad_boxes_are_random_or_moved():
    rng = np.random.default_rng(0)
    real = np.array([(10, 10, 20, 14)], np.float32)
    boxes = object_transforms.bad_boxes(real, 4000, 100, 200, rng)
    sides = boxes[:, 2:] - boxes[:, :2]
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < [200, 100]).all(1)
    moved = inside & (np.abs(sides - [10, 4]) < 1e-4).all(1)
    assert 0.4 < moved.sum() / len(boxes) < 0.5
    assert abs(object_transforms.bad_boxes(real[:0], 4000, 100, 200, rng).shape[0] - 4000) == 0
    centres = (boxes[moved, :2] + boxes[moved, 2:]) / 2
    np.testing.assert_allclose(centres.mean(0), [100, 50], rtol=0.1)
    random = object_transforms.bad_boxes(real[:0], 4000, 1e6, 1e6, rng)  # a real box far smaller than these
    whole = (random[:, :2] > 0).all(1) & (random[:, 2:] < 1e6).all(1)
    halves = (random[whole, 2:] - random[whole, :2]) / 2 / 1e6
    assert abs(whole.mean() - (1 - 2 * 0.7228 / 4) ** 2) < 0.03  # 0.7228: the mean of |N|
    assert halves.max() < 0.5
    assert 0.1 < halves.mean() < 0.2


def test_without_real_objects_all_slots_are_bad():
    boxes, classes, kind, origin = slots([])
    assert (len(boxes), set(classes), set(kind), set(origin)) == (20, {-1}, {object_transforms.BAD}, {-1})
    result = run(object_transforms.training(64, 20, 16), example(60, 80, ()))
    assert (result["objects/kind"] == object_transforms.BAD).all()
    assert not result["objects/crops"].any()


def test_more_objects_than_slots_are_chosen_at_random():
    many = [(i, i, i + 10, i + 10) for i in range(30)]
    chosen = [slots(many, seed=seed).classes for seed in range(100)]
    assert all(len(set(c)) == 20 and min(c) >= 0 for c in chosen)
    assert set(np.concatenate(chosen)) == set(range(30))
    assert all((slots(many, seed=seed).kind == object_transforms.REAL).all() for seed in range(5))


def test_noise_crops():
    """A duplicate shows its object's mask at its own box; a bad box shows nothing."""
    result = run(object_transforms.training(64, 40, 16, (0.9, 1.0)), example(64, 64, ((20, 20, 44, 40),)), 1)
    kind, crops = result["objects/kind"], result["objects/crops"]
    assert set(kind) == {object_transforms.REAL, object_transforms.DUPLICATE, object_transforms.BAD}
    assert set(np.unique(crops)) == {0, 1}
    assert not crops[kind == object_transforms.BAD].any()
    real = result["objects/boxes"][0]
    for crop, box in zip(
        crops[kind == object_transforms.DUPLICATE],
        result["objects/boxes"][kind == object_transforms.DUPLICATE],
        strict=True,
    ):
        shared = np.minimum(box[2:], real[2:]) - np.maximum(box[:2], real[:2])
        assert abs(crop.mean() - np.prod(shared) / np.prod(box[2:] - box[:2])) < 0.12


def test_small_boxes_are_dropped():
    """A strip that the crop leaves 1e-2 px of is no object any more."""
    data = example(64, 64, ((0, 0, 64, 64), (10, 10, 20, 20)))
    data["boxes"][1] = (10, 10, 10.009, 20)
    result = run(object_transforms.training(64, 6, 0, (1.0, 1.0)), data)
    assert (result["objects/kind"] == object_transforms.REAL).sum() == 1
    data["boxes"][1] = (10, 10, 10.011, 20)
    assert (
        run(object_transforms.training(64, 6, 0, (1.0, 1.0)), data)["objects/kind"] == object_transforms.REAL
    ).sum() == 2


def test_crops_show_the_kept_objects():
    data = example(64, 64, ((0, 0, 64, 64), (10, 10, 50, 50)))
    data["boxes"][0] = (10, 10, 10.005, 20)
    data["masks"][1, 30:] = 0
    result = run(object_transforms.training(64, 6, 16, (1.0, 1.0)), data)
    real = result["objects/crops"][result["objects/kind"] == object_transforms.REAL]
    np.testing.assert_array_equal(real, np.repeat([1, 0], 8)[None, :, None] * np.ones((1, 16, 16)))


def test_noise_stays_out_of_the_padding():
    transform = object_transforms.training(64, 30, 0, (1.0, 1.0))
    boxes = np.concatenate([run(transform, example(32, 64), seed)["objects/boxes"] for seed in range(30)])
    assert boxes.min() == 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (64, 32)


def test_crops_without_objects_happen():
    data = example(64, 64, ((0, 0, 24, 24),))
    kinds = [run(object_transforms.training(64, 4, 16, (3.0, 3.0)), data, seed)["objects/kind"] for seed in range(40)]
    assert 0 < sum((kind == object_transforms.REAL).any() for kind in kinds) < 40


def test_instance_transform():
    data = {"instance": np.arange(16, dtype=np.float32).reshape(4, 4)}
    kept = [run(object_transforms.instance(4, train=False), data, seed)["instance"] for seed in range(10)]
    assert all(np.array_equal(x, data["instance"]) for x in kept)
    mirrored = [
        run(object_transforms.instance(4, train=True), data, seed)["instance"][0, 0] == 3 for seed in range(400)
    ]
    assert abs(np.mean(mirrored) - 0.5) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "size=0 must be at least 1"),
        ((64, 0), "num_objects=0 must be at least 1"),
        ((64, 10, -1), "mask_size=-1 must be 0"),
        ((64, 10, 16, (2.0, 1.0)), r"jitter=\(2.0, 1.0\) must be \(low, high\)"),
        ((64, 10, 16, (0.0, 1.0)), r"jitter=\(0.0, 1.0\) must be"),
        ((64, 10, 16, (1.0, 1.0), "size"), "order='size' must be one of random, left_to_right"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        object_transforms.training(*arguments)
