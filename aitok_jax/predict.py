"""Prediction of one image or many: `Predictor` and its command line.

    python -m aitok_jax.predict --checkpoint=RUN_OR_DIR --task=depth --image=FILE... --out=DIR

writes for each image NAME.ext: NAME_depth.npy (float32 metres), NAME_depth.png (16-bit millimetres, 0 to 65535),
NAME_confidence.npy (float32, 0..1) and NAME_panel.png; the maps have the image's own size and orientation. Two images
of one NAME are refused. An image that cannot be read is reported, the others are still predicted, and the exit code
is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from aitok_jax import checkpoint, tasks, visualize
from aitok_jax.tasks.base import compiled_predict

TASKS = ("depth",)
ASPECT_STEPS = 15  # 32 px at image_size 480
MAX_ASPECT = 8


class Predictor:
    """A trained model, ready to predict.

        predictor = Predictor.load("runs/nyu")
        maps = predictor(np.asarray(Image.open("room.jpg").convert("RGB")))
        maps["depth"]  # float32[H,W], metres

    Args:
        task: a task with `predict` and `image_size`, the side in pixels of the squares that its model sees.
        params, model_state: its weights.
        name: the task that this model does, one of `TASKS`.
    """

    def __init__(self, task: Any, params: Any, model_state: Any, name: str = "depth"):
        if name not in TASKS:
            raise ValueError(f"a model of the task {name!r} cannot predict from images; known are {', '.join(TASKS)}")
        self._task, self._name = task, name
        self._weights = jax.device_put((params, model_state))

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Reads a run directory or a directory of converted weights."""
        config, weights = checkpoint.load_inference(path)
        return cls(tasks.build(config.task), weights["params"], weights["model_state"], config.task.name)

    def __call__(
        self, image: np.ndarray | Sequence[np.ndarray], task: str = "depth"
    ) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        """Predicts an image, or each of a list of images.

        The image is resized to the model's scale: short side to the task's `image_size`, aspect ratio (long side to
        short side) rounded to a multiple of 1/15, so that images of any size compile few programs; a 4:3 image keeps
        its aspect, and the error is at most 1/30 of the short side. Resizing is bilinear, with antialiasing
        where it shrinks. The maps are resized back bilinearly. An image that has the model's scale is not resized.

        Depth is metric for cameras like those of the training data: another field of view scales it.

        Args:
            image: uint8[H,W,3] RGB of any size, at most 8 times longer than its short side; or a list of such.
            task: what to predict; 'depth'.
        Returns:
            `depth` float32[H,W] in metres and `confidence` float32[H,W] in 0..1 (1 = sure); a list of these for a list.
        Raises:
            ValueError: an image of another type or shape, or a task that this model does not do.
        """
        if task != self._name:
            raise ValueError(f"task={task!r}: this model predicts {self._name!r}; pass task={self._name!r}")
        if isinstance(image, (list, tuple)):
            return [self._predict(one) for one in image]
        return self._predict(image)

    def _predict(self, image: np.ndarray) -> dict[str, np.ndarray]:
        _check_image(image)
        height, width = image.shape[:2]
        model_height, model_width = model_size(height, width, self._task.image_size)
        resized = image
        if (model_height, model_width) != (height, width):
            resized = np.asarray(Image.fromarray(image).resize((model_width, model_height), Image.Resampling.BILINEAR))
        batch = {"image": resized[None].astype(np.float32) / 255}
        outputs = compiled_predict(self._task)(*self._weights, batch)
        depth, confidence = (_resize_map(outputs[name][0], height, width) for name in ("depth", "confidence"))
        return {"depth": depth, "confidence": np.clip(confidence, 0, 1)}


def model_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which an image of height x width is predicted; see `Predictor.__call__`.

    Raises:
        ValueError: the long side is more than 8 times the short side.
    """
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        raise ValueError(f"a {height}x{width} image is longer than {MAX_ASPECT} times its short side; crop it")
    model_long = round(image_size * round(ASPECT_STEPS * long / short) / ASPECT_STEPS)
    return (image_size, model_long) if height <= width else (model_long, image_size)


def read_image(path: str | Path) -> np.ndarray:
    """An image file of any format Pillow reads as uint8[H,W,3] RGB, turned as its EXIF orientation says.

    Grey, palette and transparent images are converted (transparency is dropped); 16-bit grey keeps its upper 8 bits.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 where an image could not be read."""
    parser = argparse.ArgumentParser(prog="python -m aitok_jax.predict", description="Predicts depth from RGB images.")
    parser.add_argument("--checkpoint", required=True, help="run directory, or directory of converted weights")
    parser.add_argument("--task", choices=TASKS, default="depth", help="what to predict (default: %(default)s)")
    parser.add_argument("--image", nargs="+", action="extend", required=True, metavar="FILE", help="one or more images")
    parser.add_argument("--out", required=True, help="folder for the results")
    options = parser.parse_args(argv)
    try:
        stems = _stems(options.image)
        predictor = Predictor.load(options.checkpoint)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    failed = []
    for path, stem in tqdm(stems.items(), unit="image", disable=len(stems) == 1):
        try:
            image = read_image(path)
            model_size(*image.shape[:2], 1)
        except Exception as error:  # decoders raise many kinds; one bad file must not stop the others
            tqdm.write(f"{path}: cannot be predicted: {error}", file=sys.stderr)
            failed.append(path)
            continue
        _write(Path(options.out), stem, image, predictor(image, options.task), title=path.name)
    if failed:
        print(f"{len(failed)} of {len(stems)} images failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _stems(names: Sequence[str]) -> dict[Path, str]:
    """File -> NAME of its results; a file given twice counts once, two files of one NAME are an error."""
    stems: dict[Path, str] = {}
    for path in map(Path, names):
        twin = next((other for other, stem in stems.items() if stem.lower() == path.stem.lower()), None)
        if twin is None:
            stems[path] = path.stem
        elif twin.resolve() != path.resolve():
            raise ValueError(
                f"{twin} and {path} would both be written as {path.stem}_depth.npy; "
                "predict them into two folders (--out), or rename one"
            )
    return stems


def _write(folder: Path, stem: str, image: np.ndarray, maps: dict[str, np.ndarray], title: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    depth, confidence = maps["depth"], maps["confidence"]
    np.save(folder / f"{stem}_depth.npy", depth)
    np.save(folder / f"{stem}_confidence.npy", confidence)
    millimetres = np.clip(np.round(depth * 1000), 0, 65535).astype(np.uint16)
    visualize.save_png(folder / f"{stem}_depth.png", millimetres)
    panel = visualize.depth_panel(image, depth, confidence=confidence, title=title)
    visualize.save_png(folder / f"{stem}_panel.png", panel)


def _resize_map(map_HW: jax.Array, height: int, width: int) -> np.ndarray:
    values = np.array(map_HW, np.float32)
    if values.shape == (height, width):
        return values
    return np.array(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise ValueError(f"image must be a NumPy array uint8[H, W, 3] (RGB) or a list of them, got {kind}")
    if image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 with values 0..255, got {image.dtype}; convert it to uint8")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be RGB [H, W, 3], got shape {image.shape}; pass several images as a list")


if __name__ == "__main__":
    sys.exit(main())
