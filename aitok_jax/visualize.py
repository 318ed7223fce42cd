"""Pictures of maps and objects as arrays, made with matplotlib's Agg canvas and without its global state."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from aitok_jax.paths import shown
from aitok_jax.tasks.modalities import Modality
from aitok_jax.tasks.modalities.modality import color_range

ERROR_COLORS, CONFIDENCE_COLORS = "inferno", "viridis"
HOLE_COLOR = (0.6, 0.6, 0.6)
DPI, TILE_INCHES, OBJECTS_TILE_INCHES = 110, 3.0, 5.0
MASK_OPACITY = 0.5


def map_panel(
    modality: Modality,
    image: np.ndarray,
    prediction: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    title: str = "",
) -> np.ndarray:
    """One row of labelled pictures: image, truth, prediction, error, confidence.

    Truth and prediction are drawn as the modality says; pixels without annotation are grey. What is said above the
    error is of all annotated pixels, without crop.

    Args:
        modality: of the maps.
        image: RGB, uint8[H,W,3] or float[H,W,3] in 0..1.
        prediction: the map.
        truth: the annotated map; adds the truth and the error.
        confidence: float[H,W] in 0..1.
        title: a line above the row.
    Returns:
        uint8[h,w,3] RGB, of a size of its own.
    Raises:
        ValueError: a map has another size than the image, or the image is not [H,W,3] in a known scale.
    """
    image = _displayable(image)
    maps = {"ground truth": truth, "prediction": prediction}
    maps = {name: np.asarray(map_, np.float32) for name, map_ in maps.items() if map_ is not None}
    for name, map_ in {**maps, "confidence": confidence}.items():
        if map_ is not None and np.shape(map_)[:2] != image.shape[:2]:
            raise ValueError(f"{name} must have the size of the image, {image.shape[:2]}, got {np.shape(map_)}")
    tiles = [("image", image, {}, "")]
    for name, tile in zip(maps, modality.tiles(list(maps.values())), strict=True):
        tiles.append((name, *tile[:3], functools.partial(_name_colors, tile.names)))
    if truth is not None:
        tiles.append(_error_tile(modality, maps["prediction"], maps["ground truth"]))
    if confidence is not None:
        style = {"cmap": CONFIDENCE_COLORS, "vmin": 0.0, "vmax": 1.0}
        tiles.append(("confidence", np.asarray(confidence, np.float32), style, "0 = unsure, 1 = sure"))
    return _draw(tiles, title, aspect=image.shape[0] / image.shape[1])


def _name_colors(names: Mapping[str, Sequence[int]], axes) -> None:
    if names:
        patches = [Patch(color=np.asarray(color) / 255, label=shown(name)) for name, color in names.items()]
        style = {"loc": "upper left", "bbox_to_anchor": (0, -0.01), "ncols": 3, "fontsize": 7, "frameon": False}
        for text in axes.legend(handles=patches, handlelength=1, columnspacing=1, **style).get_texts():
            text.set_parse_math(False)


def _error_tile(modality: Modality, prediction: np.ndarray, truth: np.ndarray) -> tuple:
    error = np.where(modality.valid(truth), modality.error(prediction, truth), np.nan)
    finite = error[np.isfinite(error)]
    said = modality.summary(finite) if finite.size else "no annotation"
    style = {"cmap": ERROR_COLORS, "vmin": 0.0, "vmax": color_range(finite)[1]}
    return f"error ({said})", error, style, f"|error| [{modality.unit}]"


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


def png_name(name: str) -> str:
    """The file name of the picture of an example: 'room/rgb_1.jpg' -> 'room_rgb_1.png'."""
    return str(PurePosixPath(name).with_suffix("")).strip("/").replace("/", "_") + ".png"


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
        style = {"fontsize": 6, "color": "white", "verticalalignment": "top", "clip_on": True, "parse_math": False}
        label = axes.text(x1, y1, shown(text), **style)
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
        figure.suptitle(shown(title), fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # a box stands for it
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
