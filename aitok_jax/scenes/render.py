"""Rendered rooms with exact and sensor-like depth, normals, classes and instance masks: pure functions of a seed."""

from typing import NamedTuple

import numpy as np

from aitok_jax.scenes.furniture import CLASSES
from aitok_jax.scenes.raycast import Frame, trace
from aitok_jax.scenes.rooms import MAX_ASPECT, sample_room

LABELS = ("wall", "floor", "ceiling", *CLASSES)
"""The classes of pixels; doors, windows and pictures are wall, rugs floor, the lamp under the ceiling is ceiling."""
_OF_FACES = np.array([0, 0, 0, 0, 1, 2])  # their places there, in the order of `World.faces`
_HOLES = (0.06, 0.23)  # share of pixels without sensor depth


class Scene(NamedTuple):
    """One rendered room; N visible objects."""

    image: np.ndarray  # uint8[H,W,3], RGB
    depth: np.ndarray  # f32[H,W]: exact distance along the optical axis in metres, 0.5 to 10
    sensor_depth: np.ndarray  # f32[H,W]: the same with 5-25 % of the pixels 0, as a depth sensor loses them
    normals: np.ndarray  # f32[H,W,3]: unit vectors in camera coordinates, x right, y down, z away from the camera
    labels: np.ndarray  # uint8[H,W]: index into LABELS, also of objects too small to have a mask
    masks: np.ndarray  # bool[N,H,W]: visible pixels, disjoint
    boxes: np.ndarray  # f32[N,4]: x0 y0 x1 y1 around the mask; x1 and y1 are the outer edges of the last pixels
    classes: np.ndarray  # int32[N]: index into CLASSES


def render(seed: int, height: int, width: int) -> Scene:
    """Renders the room of a seed.

    A pure function of its arguments; the same seed shows the same room at every size. The vertical field of view is
    fixed (60 degrees across at 4:3). An object counts as visible from max(4, 0.02 % of the image) pixels on.

    Args:
        seed: 0 or more.
        height, width: pixels; at least 16, and at most twice as wide as high.

    Raises:
        ValueError: a size or a seed outside these ranges.
    """
    check_size(height, width)
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    world, classes = sample_room(np.random.default_rng(seed))
    frame = trace(world, height, width)
    # Camera noise takes a draw a pixel: with generators of their own, room and holes are the same at every size.
    image = _develop(np.random.default_rng((seed, 1)), frame.light)
    holes = _holes(np.random.default_rng((seed, 2)), frame, image)
    sensor_depth = np.where(holes, np.float32(0), frame.depth)
    masks, boxes, visible = _instances(frame.objects, len(classes))
    labels = np.where(frame.objects < 0, _OF_FACES[frame.faces], len(set(_OF_FACES)) + classes[frame.objects])
    labels = labels.astype(np.uint8)
    return Scene(image, frame.depth, sensor_depth, frame.normals, labels, masks, boxes, classes[visible])


def check_size(height: int, width: int) -> None:
    if min(height, width) < 16 or width > MAX_ASPECT * height:
        raise ValueError(
            f"height={height}, width={width}: both must be at least 16 and width at most {MAX_ASPECT:g} x height "
            "(a wider view would see things nearer than 0.5 m); choose e.g. 480 and 640"
        )


def _develop(rng: np.random.Generator, light: np.ndarray) -> np.ndarray:
    """uint8[H,W,3] as a camera gives it: exposure, soft highlights, gamma 2, a slight blur and noise."""
    exposure = rng.uniform(0.3, 0.8) / np.maximum(light.mean(), 1e-3)
    noise = np.float32(rng.uniform(0.004, 0.012))
    x = np.sqrt(1 - np.exp(light * -np.float32(exposure)))
    side = np.float32(0.12)
    x[1:-1] += side * (x[2:] + x[:-2] - 2 * x[1:-1])
    x[:, 1:-1] += side * (x[:, 2:] + x[:, :-2] - 2 * x[:, 1:-1])
    x += noise * rng.standard_normal((*light.shape[:2], 1), np.float32)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def _holes(rng: np.random.Generator, frame: Frame, image: np.ndarray) -> np.ndarray:
    """bool[H,W]: pixels a depth sensor loses, most likely at occlusion edges, on dark or shiny surfaces, and in blobs.

    The pixels are ranked and a share drawn beforehand is cut off, so that the share is met whatever is in view.
    """
    height, width = frame.depth.shape
    share = rng.uniform(*_HOLES)
    score = _blobs(rng, height, width)
    score += 1.5 * (frame.shine > 0)
    score += np.clip(1.5 - image.max(-1) / np.float32(40), 0, 1.5)
    thin, wide = max(round(height / 240), 1), max(round(height / 60), 1)  # the shadow of the projector is on one side
    shifts = ((0, thin), (0, -wide), (thin, 0), (-thin, 0))
    score += 4 * np.any([_behind(frame.depth, *shift) for shift in shifts], axis=0)
    lost = round(share * score.size)
    ranked = np.argpartition(score.ravel(), score.size - lost)
    holes = np.zeros(score.size, bool)
    holes[ranked[score.size - lost :]] = True
    return holes.reshape(height, width)


def _blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """f32[H,W]: a smooth random field of variance about 1, the same at every size."""
    frequency, phase = rng.normal(0, 18, (2, 24)), rng.uniform(0, 2 * np.pi, (2, 24))
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5 - width / 2) / height
    rows = np.cos(y[:, None] * frequency[0] + phase[0]).astype(np.float32)
    columns = np.cos(x[:, None] * frequency[1] + phase[1]).astype(np.float32)
    return np.einsum("yk,xk->yx", rows, columns) * np.float32(2 / np.sqrt(24))


def _behind(depth: np.ndarray, down: int, right: int) -> np.ndarray:
    """bool[H,W]: pixels that lie behind the pixel some rows down or columns right, by more than 3 cm and 4 %."""
    height, width = depth.shape
    y, x = np.clip(np.arange(height) + down, 0, height - 1), np.clip(np.arange(width) + right, 0, width - 1)
    return depth > depth[y][:, x] * np.float32(1.04) + np.float32(0.03)


def _instances(objects: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks bool[N,H,W], boxes f32[N,4] and object numbers int[N] of the visible ones of `count` objects."""
    pixels = np.bincount(objects.ravel() + 1, minlength=count + 1)[1:]
    visible = np.nonzero(pixels >= max(4, 0.0002 * objects.size))[0]
    masks = objects[None] == visible[:, None, None]
    boxes = np.zeros((len(visible), 4), np.float32)
    for axis, used in ((0, masks.any(1)), (1, masks.any(2))):
        if len(visible):
            boxes[:, axis] = used.argmax(1)
            boxes[:, axis + 2] = used.shape[1] - used[:, ::-1].argmax(1)
    return masks, boxes, visible
