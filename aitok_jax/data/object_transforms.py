"""Transforms of examples with objects, in NumPy on the host: the published recipes for COCO.

An example is what `coco.CocoSource.read` gives. A transform takes it with a `np.random.Generator`, from which it draws
all its numbers, and gives arrays of fixed shapes. Masks stay on the host: what leaves are crops at the boxes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aitok_jax.image import fit_square, fitted, on_canvas, resize

Example = dict[str, np.ndarray]

REAL, DUPLICATE, BAD = 0, 1, 2  # kinds of slots
ORDERS = ("random", "left_to_right")  # of real objects: the published one, or by the left edge, which is learnt sooner
NOISE_CLASS = -1
MIN_SIDE = 1e-2  # pixels: boxes whose width or height is not above this after cropping are dropped
_DUPLICATE_JITTER = 0.1  # of the box's width or height
_CUT = 2.0  # where the normal distribution of the noise ends


@dataclass(frozen=True)
class HostTransform:
    """A recipe that runs in Python: `transform(example, rng) -> {name: array}`.

    Attributes:
      apply: the op; recipes without randomness ignore the generator.
      spec: name -> (dtype, shape) of everything it gives.
    """

    apply: Callable[[Example, np.random.Generator], Example]
    spec: dict[str, tuple[type, tuple[int, ...]]]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return self.apply(example, rng)


class Slots(NamedTuple):
    """What the N slots of a training example hold, real objects first."""

    boxes: np.ndarray  # f32[N,4]: x1 y1 x2 y2 in pixels
    classes: np.ndarray  # int32[N]; NOISE_CLASS for noise
    kind: np.ndarray  # int32[N]: REAL, DUPLICATE or BAD
    origin: np.ndarray  # int[N]: the object whose mask a slot shows; -1 for BAD


class _View(NamedTuple):
    """The part of a resized picture that a crop shows; all in pixels of the resized picture."""

    resized: tuple[int, int]  # height, width of the whole
    top: int
    left: int
    height: int
    width: int


def training(
    size: int,
    num_objects: int = 100,
    mask_size: int = 64,
    jitter: tuple[float, float] = (0.1, 3.0),
    order: str = "random",
) -> HostTransform:
    """Training recipe of detection and instance segmentation.

    Flip with p 1/2; large-scale jitter: the longer side becomes `size` times a uniform number of `jitter`; a uniform
    crop of at most `size` x `size`, which may hold no object; boxes of MIN_SIDE px or less are dropped; padding with
    the mean colour at right and bottom; then the slots are filled up with noise objects. (Flipping before cropping
    gives the same distribution as the published order.)

    Args:
      size: side of the input in pixels.
      num_objects: slots N. More real objects than that: a random N of them.
      mask_size: side of the mask crops; 0 = none, and the source needs no masks.
      jitter: (low, high).
      order: of the real objects, see ORDERS.

    Returns:
      A transform to `image` float32[size,size,3] RGB in 0..1; `objects/boxes` float32[N,4] x1 y1 x2 y2 in pixels of the
      input; `objects/classes` int32[N], NOISE_CLASS for noise; `objects/kind` int32[N]; and `objects/crops`
      uint8[N,mask_size,mask_size] 0/1, each mask cropped at the slot's box, zeros for BAD ones.
    """
    low, high = jitter
    _check(size, num_objects, mask_size)
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}")
    if not 0 < low <= high:
        raise ValueError(f"jitter={tuple(jitter)} must be (low, high) with 0 < low <= high")
    spec = {
        "image": (np.float32, (size, size, 3)),
        "objects/boxes": (np.float32, (num_objects, 4)),
        "objects/classes": (np.int32, (num_objects,)),
        "objects/kind": (np.int32, (num_objects,)),
    }
    if mask_size:
        spec["objects/crops"] = (np.uint8, (num_objects, mask_size, mask_size))

    def apply(example: Example, rng: np.random.Generator) -> Example:
        if rng.random() < 0.5:
            example = flip(example)
        height, width = example["image"].shape[:2]
        view = _random_view(height, width, size, rng.uniform(low, high), rng)
        boxes = _boxes_in(view, example["boxes"], height, width)
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(axis=1))
        slots = fill_slots(boxes[kept], example["classes"][kept], num_objects, view.height, view.width, rng, order)
        result = {
            "image": _picture(example["image"], view, size),
            "objects/boxes": slots.boxes,
            "objects/classes": slots.classes,
            "objects/kind": slots.kind,
        }
        if mask_size:
            shown = np.flatnonzero(slots.origin >= 0)
            rows = _nearest(view.top, view.height, view.resized[0], height)
            columns = _nearest(view.left, view.width, view.resized[1], width)
            crops = np.zeros((num_objects, mask_size, mask_size), np.uint8)
            origins = kept[slots.origin[shown]]
            crops[shown] = crop_masks(example["masks"], slots.boxes[shown], origins, mask_size, rows, columns)
            result["objects/crops"] = crops
        return result

    return HostTransform(apply, spec)


def evaluation(size: int) -> HostTransform:
    """Resized so that it fits `size` x `size` keeping the aspect, then padded; no randomness.

    Gives `image` as `training`; `scale` float32[2], the factors (x, y) from the original to the resized image; and
    `original_size` int32[2] (height, width).
    """
    _check(size)
    spec = {"image": (np.float32, (size, size, 3)), "scale": (np.float32, (2,)), "original_size": (np.int32, (2,))}

    def apply(example: Example, rng: np.random.Generator) -> Example:
        image, scale = fit_square(example["image"], size)
        return {"image": image, "scale": scale, "original_size": np.array(example["image"].shape[:2], np.int32)}

    return HostTransform(apply, spec)


def instance(size: int, train: bool) -> HostTransform:
    """For `coco.MaskSource`: `instance` float32[size,size], mirrored with p 1/2 where `train`."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        mask = example["instance"]
        return {"instance": mask[:, ::-1] if train and rng.random() < 0.5 else mask}

    return HostTransform(apply, {"instance": (np.float32, (size, size))})


def flip(example: Example) -> Example:
    """Image, boxes and masks mirrored left to right."""
    x1, y1, x2, y2 = example["boxes"].T
    width = example["image"].shape[1]
    flipped = {**example, "image": example["image"][:, ::-1], "boxes": np.stack([width - x2, y1, width - x1, y2], 1)}
    if "masks" in example:
        flipped["masks"] = example["masks"][:, :, ::-1]
    return flipped


def fill_slots(
    boxes: np.ndarray,
    classes: np.ndarray,
    num_objects: int,
    height: int,
    width: int,
    rng: np.random.Generator,
    order: str = "random",
) -> Slots:
    """Real objects in the given order, then noise objects up to `num_objects`, as published.

    A uniform random number of the noise objects are duplicates, of any real object alike; the rest are bad boxes.
    Without real objects all are bad. Noise objects are shuffled.

    Args:
      boxes: float32[n,4] real boxes x1 y1 x2 y2 in pixels, inside the image.
      classes: int32[n].
      height, width: of the image, without padding; noise boxes stay inside.
      order: of ORDERS.
    """
    real = rng.permutation(len(boxes))[:num_objects]
    if order == "left_to_right":
        real = real[np.argsort(boxes[real, 0], kind="stable")]
    noise = num_objects - len(real)
    duplicates = rng.integers(noise + 1) if len(real) else 0
    copied = rng.permutation(np.resize(real, (noise // max(len(real), 1) + 1) * len(real)))[:duplicates]
    noise_boxes = np.concatenate(
        [
            duplicate_boxes(boxes[copied], height, width, rng),
            bad_boxes(boxes[real], noise - duplicates, height, width, rng),
        ]
    )
    kinds, origins = np.full(noise, BAD), np.full(noise, -1)
    kinds[:duplicates], origins[:duplicates] = DUPLICATE, copied
    order = rng.permutation(noise)
    return Slots(
        np.concatenate([boxes[real], noise_boxes[order]]).astype(np.float32),
        np.concatenate([classes[real], np.full(noise, NOISE_CLASS)]).astype(np.int32),
        np.concatenate([np.full(len(real), REAL), kinds[order]]).astype(np.int32),
        np.concatenate([real, origins[order]]),
    )


def duplicate_boxes(boxes: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """[n,4]: each side of each box moved by size * 0.1 * N/2, N normal cut at ±2; clipped to the image."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return _clipped(boxes + sides * (_DUPLICATE_JITTER / 2) * _cut_normal(boxes.shape, rng), height, width)


def bad_boxes(boxes: np.ndarray, count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """[count,4] boxes that fit no object, clipped to the image.

    Half of them (in the mean) have half-sizes |N|/4 of the image, N normal cut at ±2; half have the size of one of
    the real `boxes` [n,4]. All have a uniform centre.
    """
    extent = np.array([width, height])
    centres = rng.random((count, 2)) * extent
    halves = np.abs(_cut_normal((count, 2), rng)) / 4 * extent
    if len(boxes):
        moved = rng.permutation(2 * count)[:count] < count  # drawn from a pool of `count` of each sort
        sides = boxes[rng.integers(len(boxes), size=count)]
        halves = np.where(moved[:, None], (sides[:, 2:] - sides[:, :2]) / 2, halves)
    return _clipped(np.concatenate([centres - halves, centres + halves], axis=1), height, width)


def crop_masks(*args: np.ndarray | int) -> np.ndarray:
    """uint8[n,size,size]: `roi_align`, whose arguments it takes, binarised at 1/2."""
    return (roi_align(*args) >= 0.5).astype(np.uint8)


def roi_align(
    masks: np.ndarray,
    boxes: np.ndarray,
    indices: np.ndarray,
    size: int,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """float32[n,size,size]: mask indices[i] cropped at boxes[i] by aligned RoI-align.

    Each of the size x size bins is the mean of bilinear samples, ceil(side / size) of them along either axis; as they
    form a grid, columns and rows are sampled one after the other.

    Args:
      masks: uint8[m,H,W] (0/1), or any numbers.
      boxes: float[n,4] x1 y1 x2 y2; one reversed or without extent gives zeros.
      indices: int[n].
      rows, columns: the boxes refer to a resampled picture, whose pixel (y, x) shows the masks' pixel
        (rows[y], columns[x]), both ascending; it need not be built. None = to the masks themselves.
    """
    rows = np.arange(masks.shape[1]) if rows is None else rows
    columns = np.arange(masks.shape[2]) if columns is None else columns
    crops = np.zeros((len(boxes), size, size), np.float32)
    for crop, (x1, y1, x2, y2), index in zip(crops, np.asarray(boxes, np.float32), indices, strict=True):
        if x1 < x2 and y1 < y2:
            across, down = _samples(x1, x2, size, columns), _samples(y1, y2, size, rows)
            start, stop = down.first[0], down.second[-1] + 1
            sampled_SH = across.means(masks[index, start:stop].T, size)
            crop[:] = down._replace(first=down.first - start, second=down.second - start).means(sampled_SH.T, size)
    return crops


class _Samples(NamedTuple):
    """P bilinear samples along one axis: the two pixels of each, int[P], and their weights in its bin, f32[P,1]."""

    first: np.ndarray
    second: np.ndarray
    first_weight: np.ndarray
    second_weight: np.ndarray

    def means(self, x_LN: np.ndarray, size: int) -> np.ndarray:
        """f32[size,N]: the means of the samples of each bin."""
        values_PN = x_LN[self.first] * self.first_weight
        values_PN += x_LN[self.second] * self.second_weight
        return values_PN.reshape(size, -1, values_PN.shape[1]).sum(axis=1)


def _samples(low: np.float32, high: np.float32, size: int, places: np.ndarray) -> _Samples:
    """The samples of the bins that part low..high, where `places` int[L] says which pixel of the mask is shown.

    Their number takes float32 arithmetic, so that rounding makes it what it is in the published system.
    """
    length = len(places)
    low, high = low - np.float32(0.5), high - np.float32(0.5)
    side = high - low
    grid = max(int(np.ceil(side / np.float32(size))), 1)
    points = low + float(side) / (size * grid) * (np.arange(size * grid) + 0.5)
    weight = ((points >= -1) & (points <= length)) / grid
    points = points.clip(0, length - 1)
    first = points.astype(int)
    second_weight = (points - first) * weight
    weights = (w.astype(np.float32)[:, None] for w in (weight - second_weight, second_weight))
    return _Samples(places[first], places[np.minimum(first + 1, length - 1)], *weights)


def _random_view(height: int, width: int, size: int, factor: float, rng: np.random.Generator) -> _View:
    """The longer side resized to `size * factor`, then a uniform crop of at most size x size."""
    resized = fitted(height, width, max(int(size * factor), 1))
    crop = min(resized[0], size), min(resized[1], size)
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(resized, crop, strict=True))
    return _View(resized, top, left, *crop)


def _picture(image: np.ndarray, view: _View, size: int) -> np.ndarray:
    """float32[size,size,3] in 0..1: what the view shows of uint8[H,W,3], at the top left, the mean colour elsewhere.

    Bilinear, and smoothed where it shrinks (the published system does not smooth; enlarging gives the same).
    """
    (height, width), (resized_height, resized_width) = image.shape[:2], view.resized
    if (height, width) == view.resized:
        return on_canvas(image[view.top : view.top + view.height, view.left : view.left + view.width], size)
    y, x = height / resized_height, width / resized_width
    right, bottom = min((view.left + view.width) * x, width), min((view.top + view.height) * y, height)
    box = (view.left * x, view.top * y, right, bottom)
    return on_canvas(resize(image, view.height, view.width, box), size)


def _boxes_in(view: _View, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [n,4] of the original image in pixels of the crop, clipped to it."""
    factor = np.tile([view.resized[1] / width, view.resized[0] / height], 2)
    return _clipped(boxes * factor - [view.left, view.top, view.left, view.top], view.height, view.width)


def _nearest(start: int, count: int, resized: int, original: int) -> np.ndarray:
    """int[count]: the original pixel that each of `count` resized ones from `start` on shows, by nearest centre."""
    return ((start + np.arange(count) + 0.5) * (original / resized)).astype(int).clip(0, original - 1)


def _clipped(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, [width, height, width, height])


def _cut_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Standard normal numbers within ±_CUT: those outside are drawn again."""
    numbers = rng.standard_normal(shape)
    while (outside := np.abs(numbers) > _CUT).any():
        numbers[outside] = rng.standard_normal(outside.sum())
    return numbers


def _check(size: int, num_objects: int = 1, mask_size: int = 0) -> None:
    if size <= 0:
        raise ValueError(f"size={size} must be at least 1; set data.size to the input side of the model")
    if num_objects <= 0:
        raise ValueError(f"num_objects={num_objects} must be at least 1")
    if mask_size < 0:
        raise ValueError(f"mask_size={mask_size} must be 0 (no mask crops) or the side of the crops")
