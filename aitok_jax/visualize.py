"""Pictures of depth maps and objects as arrays, made with matplotlib's Agg canvas and without its global state."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

DEPTH_COLORS, ERROR_COLORS, CONFIDENCE_COLORS = "turbo", "inferno", "viridis"
HOLE_COLOR = (0.6, 0.6, 0.6)
DPI, TILE_INCHES, OBJECTS_TILE_INCHES = 110, 3.0, 5.0
MASK_OPACITY = 0.5


def depth_panel(
    image: np.ndarray,
    prediction: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    title: str = "",
) -> np.ndarray:
    """One row of labelled pictures with colour bars: image, truth, prediction, absolute error, confidence.

    Truth and prediction share one colour range in metres; pixels without annotation are grey. The RMSE above the error
    is over all annotated pixels, without crop.

    Args:
        image: RGB, uint8[H,W,3] or float[H,W,3] in 0..1.
        prediction: float[H,W] metres.
        truth: float[H,W] metres, 0 = no annotation; adds the truth and the error.
        confidence: float[H,W] in 0..1.
        title: a line above the row.
    Returns:
        uint8[h,w,3] RGB, of a size of its own.
    Raises:
        ValueError: a map has another size than the image, or the image is not [H,W,3] in a known scale.
    """
    image = _displayable(image)
    maps = {"prediction": prediction, "truth": truth, "confidence": confidence}
    for name, map_ in maps.items():
        if map_ is not None and np.shape(map_) != image.shape[:2]:
            raise ValueError(f"{name} must have the size of the image, {image.shape[:2]}, got {np.shape(map_)}")
    prediction = np.asarray(prediction, np.float32)
    tiles = [("image", image, {}, "")]
    if truth is None:
        low, high = _range(prediction[np.isfinite(prediction)])
    else:
        truth = np.asarray(truth, np.float32)
        valid = truth > 0
        low, high = _range(np.concatenate([truth[valid], prediction[np.isfinite(prediction)]]))
    depth_style = {"cmap": DEPTH_COLORS, "vmin": low, "vmax": high}
    if truth is not None:
        tiles.append(("ground truth", np.where(valid, truth, np.nan), depth_style, "depth [m]"))
    tiles.append(("prediction", prediction, depth_style, "depth [m]"))
    if truth is not None:
        error = np.where(valid, np.abs(prediction - truth), np.nan)
        finite = error[np.isfinite(error)]
        label = f"error (RMSE {np.sqrt(np.mean(np.square(finite))):.2f} m)" if finite.size else "error (no annotation)"
        error_style = {"cmap": ERROR_COLORS, "vmin": 0.0, "vmax": _range(finite)[1]}
        tiles.append((label, error, error_style, "|error| [m]"))
    if confidence is not None:
        style = {"cmap": CONFIDENCE_COLORS, "vmin": 0.0, "vmax": 1.0}
        tiles.append(("confidence", np.asarray(confidence, np.float32), style, "0 = unsure, 1 = sure"))
    return _draw(tiles, title, aspect=image.shape[0] / image.shape[1])


def objects_panel(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    masks: np.ndarray | None,
    categories: Sequence[str],
    *,
    truth: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> np.ndarray:
    """The image with predicted objects, beside the ground truth where there is one: boxes, names, scores and masks.

    An object's hue is that of its class, its shade varies; objects of high score lie on top.

    Args:
        image: RGB, uint8[H,W,3] or float[H,W,3] in 0..1.
        boxes: float[n,4], x1 y1 x2 y2 in pixels of the image.
        classes: int[n], index into `categories`; 'unknown' is written where it is outside.
        scores: float[n] in 0..1, written behind the name; None leaves them out.
        masks: [n,H,W] of 0 and 1, drawn half transparent; None leaves them out.
        categories: names of the classes.
        truth: `boxes`, `classes` and, optionally, `masks` of the annotated objects, as above; adds a tile.
        title: a line above the pictures.
    Returns:
        uint8[h,w,3] RGB, of a size of its own.
    Raises:
        ValueError: boxes, classes, scores and masks of different numbers of objects, masks of another size than the
            image, or an image that is not [H,W,3] in a known scale.
    """
    image = _displayable(image)
    parts = [("prediction", boxes, classes, scores, masks)]
    if truth is not None:
        parts.insert(0, ("ground truth", truth["boxes"], truth["classes"], None, truth.get("masks")))
    tiles = []
    for label, *objects in parts:
        boxes_N4, classes_N, scores_N, masks_NHW = _checked_objects(image, label, *objects)
        shown = _with_masks(image, classes_N, scores_N, masks_NHW)
        mark = functools.partial(_mark_boxes, boxes_N4, classes_N, scores_N, categories)
        tiles.append((f"{label} ({len(boxes_N4)})", shown, {}, "", mark))
    return _draw(tiles, title, aspect=image.shape[0] / image.shape[1], inches=OBJECTS_TILE_INCHES)


def colorize(depth: np.ndarray, *, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Depth f32[H,W] in metres as a coloured picture uint8[H,W,3], near = blue, far = red, no annotation (0) = grey.

    `low` and `high` are the ends of the colour range in metres; left out, the 1st and 99th percentile.
    """
    depth = np.asarray(depth, np.float32)
    if depth.ndim != 2:
        raise ValueError(f"depth must be [H, W], got shape {depth.shape}; colour one map at a time")
    valid = np.isfinite(depth) & (depth > 0)
    found_low, found_high = _range(depth[valid])
    low = found_low if low is None else low
    high = found_high if high is None else high
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
    scaled = np.clip((np.where(valid, depth, low) - low) / (high - low), 0, 1)
    colors = matplotlib.colormaps[DEPTH_COLORS](scaled)[..., :3]
    colors[~valid] = HOLE_COLOR
    return np.round(colors * 255).astype(np.uint8)


def png_name(name: str) -> str:
    """The file name of the picture of an example: 'room/rgb_1.jpg' -> 'room_rgb_1.png'."""
    return str(PurePosixPath(name).with_suffix("")).strip("/").replace("/", "_") + ".png"


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8[H,W], uint8[H,W,3] or uint16[H,W] as PNG, making the folder where needed; ValueError otherwise."""
    array = np.asarray(array)
    rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (rgb or grey):
        raise ValueError(
            f"PNG needs uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W], got {array.dtype} {array.shape}; convert first"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format="PNG")


def _checked_objects(image, label, boxes, classes, scores, masks):
    boxes, classes = np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(classes)
    scores = None if scores is None else np.asarray(scores)
    masks = None if masks is None else np.asarray(masks)
    for name, values in {"classes": classes, "scores": scores, "masks": masks}.items():
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{label}: {len(boxes)} boxes but {len(values)} {name}; give one for each object")
    if masks is not None and masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"{label}: masks must have the size of the image, {image.shape[:2]}, got {masks.shape[1:]}")
    return boxes, classes, scores, masks


def _with_masks(image, classes, scores, masks):
    """The image as float in 0..1 with the masks over it, the best last."""
    shown = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.copy()
    if masks is None:
        return shown
    for i in range(len(classes)) if scores is None else np.argsort(scores, kind="stable"):
        inside = masks[i] > 0
        shown[inside] = (1 - MASK_OPACITY) * shown[inside] + MASK_OPACITY * _color(classes[i], i)[None]
    return shown


def _mark_boxes(boxes, classes, scores, categories, axes):
    for i in range(len(boxes)) if scores is None else np.argsort(scores, kind="stable"):
        (x1, y1, x2, y2), color = boxes[i], _color(classes[i], i)
        name = categories[classes[i]] if 0 <= classes[i] < len(categories) else "unknown"
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        # imshow puts the centre of the first pixel at 0; in box coordinates it lies at 0.5
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.2))
        label = axes.text(x1, y1, text, fontsize=6, color="white", verticalalignment="top", clip_on=True)
        label.set_bbox({"facecolor": 0.6 * color, "alpha": 0.8, "pad": 0.8, "linewidth": 0})


def _color(label: int, i: int) -> np.ndarray:
    """RGB in 0..1 of the i-th object: hues of classes a golden section apart, five shades for neighbours of a class."""
    shade = i % 5
    return hsv_to_rgb(((int(label) * 0.618034 + 0.025 * shade) % 1, 1 - 0.13 * shade, 1.0)).astype(np.float32)


def _draw(tiles: list[tuple], title: str, aspect: float, inches: float = TILE_INCHES) -> np.ndarray:
    """Draws tiles of (label, picture or map, imshow's style, unit of the colour bar or '', functions to mark it...)."""
    height = inches * float(np.clip(aspect, 0.3, 2.0)) * 0.85
    size = (inches * len(tiles), height + (0.75 if title else 0.45))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    places = figure.subplots(1, len(tiles), squeeze=False)[0]
    for axes, (label, values, style, unit, *marks) in zip(places, tiles, strict=True):
        axes.set_title(label, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_facecolor(HOLE_COLOR)
        drawn = axes.imshow(values, **style)
        for mark in marks:
            mark(axes)
        if unit:
            bar = figure.colorbar(drawn, ax=axes, fraction=0.046 * max(aspect, 0.5), pad=0.02)
            bar.set_label(unit, fontsize=8)
            bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def _displayable(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be RGB [H, W, 3], got shape {image.shape}")
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image must be uint8 or float in 0..1, got {image.dtype}; convert it to uint8")
    return np.clip(image.astype(np.float32), 0, 1)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Ends of a colour range: 1st and 99th percentile, kept apart."""
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99])
    return float(low), float(max(high, low + 1e-3))
