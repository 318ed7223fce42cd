"""Test-time windows: a long image as overlapping squares and their mirror images, and back (AIT.md section 6.1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def predict_windows(
    predict_fn: Callable[[jax.Array], dict[str, jax.Array]],
    images_BHWC: jax.Array,
    *,
    flip: bool = True,
    count: int | None = None,
    min_value: float | None = None,
) -> dict[str, jax.Array]:
    """Predicts maps of images of any shape with a function of square images (AIT.md section 6.1). Can be jitted.

    The squares have the size of the image's short side S and lie evenly along its long side; the first starts and the
    last ends at the border. They and their mirror images go through `predict_fn` in one batch; mirrored results are
    mirrored back and averaged, and overlaps are averaged.

    Args:
        predict_fn: [n, S, S, C] -> dict of maps [n, S, S], e.g. `depth` and `confidence`. The n images are window 0
            of all B images, window 1 of all, ..., then the mirrored windows in the same order.
        images_BHWC: any float dtype, H and W static.
        flip: average with the mirror images.
        count: number of windows; None takes the smallest number that covers the long side (1 for a square image,
            2 for 480x640). A square image always has one window.
        min_value: clips the map `depth` from below after averaging (the published system: 1e-3); None leaves it.
    Returns:
        f32[B, H, W] for every map of `predict_fn`.
    Raises:
        ValueError: the windows do not cover the image, or `predict_fn` returns something else than maps [n, S, S].
    """
    batch, height, width, _ = images_BHWC.shape
    starts = window_starts(height, width, count)
    windows = shifted_windows(images_BHWC, count)
    size = min(height, width)
    maps = predict_fn(jnp.concatenate([windows, windows[:, :, ::-1]]) if flip else windows)
    expected = (len(starts) * batch * (2 if flip else 1), size, size)
    for name, map_ in maps.items():
        if map_.shape != expected:
            raise ValueError(f"predict_fn must return maps of shape {expected}; {name!r} has {map_.shape}")

    def combine(map_NSS):
        map_NSS = jnp.asarray(map_NSS, jnp.float32)
        if flip:
            straight, mirrored = jnp.split(map_NSS, 2)
            map_NSS = (straight + mirrored[:, :, ::-1]) / 2
        return merge_windows(map_NSS, height, width, count)

    merged = {name: combine(map_) for name, map_ in maps.items()}
    if min_value is not None and "depth" in merged:
        merged["depth"] = jnp.maximum(merged["depth"], min_value)
    return merged


def shifted_windows(images_BHWC: jax.Array, count: int | None = None) -> jax.Array:
    """Cuts images into `window_starts` squares along the long side: [count·B, S, S, C], S = min(H, W), window-major."""
    _, height, width, _ = images_BHWC.shape
    size = min(height, width)
    windows = []
    for start in window_starts(height, width, count):
        stretch = slice(start, start + size)
        windows.append(images_BHWC[:, stretch] if height > width else images_BHWC[:, :, stretch])
    return jnp.concatenate(windows)


def merge_windows(maps_NSS: jax.Array, height: int, width: int, count: int | None = None) -> jax.Array:
    """Undoes `shifted_windows` on maps f32[count·B, S, S]: f32[B, height, width], overlaps averaged."""
    starts = window_starts(height, width, count)
    maps_KBSS = maps_NSS.reshape(len(starts), -1, *maps_NSS.shape[1:])
    size = min(height, width)
    total_BHW = jnp.zeros((maps_KBSS.shape[1], height, width), jnp.float32)
    times_HW = np.zeros((height, width), np.float32)
    for start, map_BSS in zip(starts, maps_KBSS, strict=True):
        rows, columns = slice(0, size), slice(start, start + size)
        if height > width:
            rows, columns = columns, rows
        total_BHW = total_BHW.at[:, rows, columns].add(map_BSS)
        times_HW[rows, columns] += 1
    return total_BHW / times_HW[None]


def window_starts(height: int, width: int, count: int | None = None) -> tuple[int, ...]:
    """First pixel, along the long side, of each square window: evenly spaced from 0 to long - short.

    The published stride (long - short) // (count - 1) is met where it divides; elsewhere the starts are rounded, so
    that the last window still ends at the border.

    Raises:
        ValueError: `count` windows leave gaps or `count` is below 1.
    """
    short, long = sorted((height, width))
    if short == long and (count is None or count >= 1):
        return (0,)
    fewest = -(-long // short)
    if count is None:
        count = fewest
    if count < fewest:
        raise ValueError(
            f"{count} windows of {short}x{short} do not cover a {height}x{width} image; use at least {fewest} (or None)"
        )
    return tuple(round(i * (long - short) / (count - 1)) for i in range(count))
