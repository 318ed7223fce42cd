"""Test-time windows: a long image as overlapping squares and their mirror images, and back.

The published system predicts 480x640 images as two squares of 480, at columns 0 and 160, and their mirror images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Maps = dict[Any, jax.Array]


def predict_windows(
    predict_fn: Callable[[jax.Array], Maps],
    images_BHWC: jax.Array,
    *,
    flip: bool = True,
    blend: bool = False,
    mirror: Callable[[Maps], Maps] = lambda maps: maps,
) -> Maps:
    """Predicts maps of images of any shape with a function of square images. Can be jitted.

    The squares have the size of the image's short side S and lie evenly along its long side; the first starts and the
    last ends at the border. They and their mirror images go through `predict_fn` in one batch; mirrored results are
    mirrored back and averaged, and so are overlaps, or blended.

    Args:
        predict_fn: [n, S, S, C] -> dict of maps [n, S, S, ...]. The n images are window 0 of all B images, window 1 of
            all, ..., then the mirrored windows in the same order.
        images_BHWC: any float dtype, H and W static.
        flip: average with the mirror images.
        blend: in overlaps, the weight of a window falls to its border; else all have one weight, as published, and an
            edge is seen where a window ends.
        mirror: what the maps of mirrored images become, after their columns were reversed.
    Returns:
        f32[B, H, W, ...] for every map of `predict_fn`.
    Raises:
        ValueError: `predict_fn` returns something else than maps [n, S, S, ...].
    """
    batch, height, width, _ = images_BHWC.shape
    starts, size = window_starts(height, width), min(height, width)
    windows = cut(images_BHWC, starts)
    maps = predict_fn(jnp.concatenate([windows, windows[:, :, ::-1]]) if flip else windows)
    expected = (len(starts) * batch * (2 if flip else 1), size, size)
    for name, map_ in maps.items():
        if map_.shape[:3] != expected:
            raise ValueError(f"predict_fn must return maps of shape {expected}; {name!r} has {map_.shape}")
    maps = {name: jnp.asarray(map_, jnp.float32) for name, map_ in maps.items()}
    if flip:
        straight, mirrored = ({name: map_[part] for name, map_ in maps.items()} for part in _halves(expected[0]))
        back = mirror({name: map_[:, :, ::-1] for name, map_ in mirrored.items()})
        maps = {name: (straight[name] + back[name]) / 2 for name in straight}
    return {name: merge(map_, height, width, starts, blend) for name, map_ in maps.items()}


def _halves(count: int) -> tuple[slice, slice]:
    return slice(count // 2), slice(count // 2, count)


def cut(images_BHWC: jax.Array, starts: Sequence[int]) -> jax.Array:
    """Cuts images into squares along the long side: [windows·B, S, S, C], S = min(H, W), window-major."""
    _, height, width, _ = images_BHWC.shape
    windows = []
    for start in starts:
        stretch = slice(start, start + min(height, width))
        windows.append(images_BHWC[:, stretch] if height > width else images_BHWC[:, :, stretch])
    return jnp.concatenate(windows)


def merge(maps_NSS: jax.Array, height: int, width: int, starts: Sequence[int], blend: bool = False) -> jax.Array:
    """Undoes `cut` on maps f32[windows·B, S, S, ...]: f32[B, height, width, ...], overlaps averaged or blended."""
    maps_KBSS = maps_NSS.reshape(len(starts), -1, *maps_NSS.shape[1:])
    size, channels = min(height, width), maps_NSS.shape[3:]
    total_BHW = jnp.zeros((maps_KBSS.shape[1], height, width, *channels), jnp.float32)
    weight_HW = np.zeros((height, width), np.float32)
    along_S = np.arange(size, dtype=np.float32) + 0.5
    weight_S = np.minimum(along_S, size - along_S) if blend else np.ones_like(along_S)
    weight_SS = np.broadcast_to(weight_S[:, None] if height > width else weight_S[None], (size, size))
    for start, map_BSS in zip(starts, maps_KBSS, strict=True):
        rows, columns = slice(0, size), slice(start, start + size)
        if height > width:
            rows, columns = columns, rows
        weighted_BSS = map_BSS * weight_SS.reshape(1, size, size, *(1 for _ in channels)) if blend else map_BSS
        total_BHW = total_BHW.at[:, rows, columns].add(weighted_BSS)
        weight_HW[rows, columns] += weight_SS
    return total_BHW / weight_HW.reshape(1, height, width, *(1 for _ in channels))


def window_starts(height: int, width: int) -> tuple[int, ...]:
    """First pixel, along the long side, of each square window: as few as cover it, evenly from 0 to long - short."""
    short, long = sorted((height, width))
    last = -(-long // short) - 1
    return tuple(round(i * (long - short) / last) for i in range(last + 1)) if last else (0,)
