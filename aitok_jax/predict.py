"""Prediction of one image or many: `Predictor` and its command line.

    python -m aitok_jax.predict --checkpoint=RUN_OR_DIR --task=depth --image=FILE... --out=DIR

writes for each image NAME.ext, at the image's own size and orientation, NAME_panel.png and

- for depth: NAME_depth.npy (float32 metres), NAME_depth.png (16-bit millimetres, 0 to 65535) and NAME_confidence.npy
  (float32, 0..1);
- for instances and detection: NAME_instances.json, all objects as a list of COCO results with NAME as `image_id`. The
  panel shows those whose score is at least --min_score.

Two images of one NAME are refused. An image that cannot be read is reported, the others are still predicted, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from aitok_jax import checkpoint, paste, tasks, visualize
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.solving import IMAGENET_MEAN

TASKS = ("depth", "instances", "detection")
ASPECT_STEPS = 15  # 32 px at image_size 480
MAX_ASPECT = 8


class Predictor:
    """A trained model, ready to predict.

        predictor = Predictor.load("runs/joint")
        image = np.asarray(Image.open("room.jpg").convert("RGB"))
        predictor(image, task="depth")["depth"]  # float32[H,W], metres
        predictor(image, task="instances", min_score=0.5)["masks"]  # bool[n,H,W]

    Args:
        task: a task with `predict` and `image_size`, the side in pixels of the squares that its model sees, or a joint
            task with such `parts`. One for objects also has `vocabulary` and `tokenizer` (None: it gives no masks).
        params, model_state: its weights.
        name: 'depth' or 'instances', the kind of `task`; a joint task's parts have names of their own.
        categories: `id` and `name` of the object classes, in their order; None numbers them from 1.
    Attributes:
        tasks: what it can be asked for, of `TASKS` and in their order.
        categories: list of {'id': int, 'name': str}, one for each class of objects; empty without objects.
    """

    def __init__(
        self,
        task: Any,
        params: Any,
        model_state: Any,
        name: str = "depth",
        categories: Sequence[Mapping[str, Any]] | None = None,
    ):
        self._parts = _parts(task, name)
        self.tasks = tuple(self._parts)
        self.categories = _categories(self._parts, categories)
        self._weights = jax.device_put((params, model_state))

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Reads a run directory or a directory of converted weights; the classes' names are its config's `categories`.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: a run that does not predict from images, such as a tokenizer's.
        """
        config, weights = checkpoint.load_inference(path)
        task = tasks.build(config.task)
        return cls(task, weights["params"], weights["model_state"], config.task.name, config.get("categories"))

    def __call__(
        self, image: np.ndarray | Sequence[np.ndarray], task: str | None = None, *, min_score: float = 0.0
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Predicts an image, or each of a list of images.

        Depth: the image is resized to the model's scale: short side to the task's `image_size`, aspect ratio (long side
        to short side) rounded to a multiple of 1/15, so that images of any size compile few programs; a 4:3 image keeps
        its aspect, and the error is at most 1/30 of the short side. Resizing is bilinear, with antialiasing
        where it shrinks. The maps are resized back bilinearly. An image that has the model's scale is not resized.
        Depth is metric for cameras like those of the training data: another field of view scales it.

        Instances and detection: see `fit_square`; boxes and masks are brought back to the image. A model of instances
        also does detection, which leaves out the masks.

        Args:
            image: uint8[H,W,3] RGB of any size (depth: at most 8 times longer than its short side), or a list of such.
            task: what to predict, one of `tasks`; None is the first of them.
            min_score: objects of a lower score are left out; 0..1.
        Returns:
            For depth: `depth` float32[H,W] in metres and `confidence` float32[H,W] in 0..1 (1 = sure). For instances
            and detection the n objects, best first: `boxes` float32[n,4] x1 y1 x2 y2 in pixels of the image, `classes`
            int32[n], `names` list[str], `scores` float32[n] in 0..1 and, for instances, `masks` bool[n,H,W]. A list
            of these for a list.
        Raises:
            ValueError: an image of another type or shape, a task that this model does not do, or a score outside 0..1.
        """
        task = _chosen(task, self.tasks)
        if isinstance(image, (list, tuple)):
            return [self._predict(one, task, min_score) for one in image]
        return self._predict(image, task, min_score)

    def coco_results(
        self, image: np.ndarray, task: str | None = None, *, image_id: int | str = 0, min_score: float = 0.0
    ) -> list[dict[str, Any]]:
        """The objects of an image as COCO results, best first; arguments and errors as in `__call__`.

        Without `task` these are instances, or detections where the model gives no masks.

        Returns:
            Dicts ready for JSON: `image_id` as given, `category_id` (see `categories`), `bbox` [x, y, width, height] in
            pixels of the image, `score` and, for instances, `segmentation` (compressed RLE). Left out are objects whose
            box is reversed or lies outside the image, and those of a class that is none of the `categories`.
        """
        task = _chosen(task, [name for name in self.tasks if name != "depth"])
        _check_image(image)
        _check_score(min_score)
        square, scale = fit_square(image, self._parts[task].image_size)
        outputs = self._outputs(task, square)
        if task == "detection":
            outputs.pop("masks", None)
        known = (outputs["scores"] >= min_score) & (outputs["classes"] < len(self.categories))
        outputs["valid"] = outputs["valid"] & known
        category_ids = [category["id"] for category in self.categories]
        results = paste.to_results(outputs, 0, category_ids, scale, image.shape[:2])
        results.sort(key=lambda result: -result["score"])
        return [{**result, "image_id": image_id} for result in results]

    def _outputs(self, task: str, image: np.ndarray) -> dict[str, np.ndarray]:
        """What the model says of float32[H,W,3] in 0..1, on the host."""
        outputs = compiled_predict(self._parts[task])(*self._weights, {"image": image[None]})
        return {name: np.array(values[0]) for name, values in outputs.items()}

    def _predict(self, image: np.ndarray, task: str, min_score: float) -> dict[str, Any]:
        if task == "depth":
            return self._depth(image)
        results = self.coco_results(image, task, min_score=min_score)
        return _arrays(results, self.categories, image.shape[:2] if task == "instances" else None)

    def _depth(self, image: np.ndarray) -> dict[str, np.ndarray]:
        _check_image(image)
        height, width = image.shape[:2]
        resized = _resize(image, *model_size(height, width, self._parts["depth"].image_size))
        outputs = self._outputs("depth", resized.astype(np.float32) / 255)
        depth, confidence = (_resize(outputs[name], height, width) for name in ("depth", "confidence"))
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


def fit_square(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image as models of objects see it, the same as in their evaluation (`data.objects.evaluation`).

    Its longer side becomes `size`; resizing is bilinear, with antialiasing where it shrinks. At the right, or at the
    bottom, it is filled up with the mean of ImageNet's colours.

    Args:
        image: uint8[H,W,3] RGB.
        size: side of the square in pixels.
    Returns:
        float32[size,size,3] in 0..1, and float32[2], the factors of x and y from the image to the square.
    """
    height, width = image.shape[:2]
    factor = size / max(height, width)
    new_height, new_width = (max(int(side * factor + 0.5), 1) for side in (height, width))
    square = np.tile(IMAGENET_MEAN, (size, size, 1))
    square[:new_height, :new_width] = _resize(image, new_height, new_width).astype(np.float32) / 255
    return square, np.array([new_width / width, new_height / height], np.float32)


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
    parser = argparse.ArgumentParser(
        prog="python -m aitok_jax.predict", description="Predicts depth, or objects, from RGB images."
    )
    parser.add_argument("--checkpoint", required=True, help="run directory, or directory of converted weights")
    parser.add_argument("--task", choices=TASKS, help="what to predict (default: the first of these the model does)")
    parser.add_argument("--image", nargs="+", action="extend", required=True, metavar="FILE", help="one or more images")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--min_score", type=float, default=0.5, help="lowest score of an object in the panel (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        stems = _stems(options.image)
        _check_score(options.min_score)
        predictor = Predictor.load(options.checkpoint)
        task = _chosen(options.task, predictor.tasks)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    failed = []
    for path, stem in tqdm(stems.items(), unit="image", disable=len(stems) == 1):
        try:
            image = read_image(path)
            if task == "depth":
                model_size(*image.shape[:2], 1)
        except Exception as error:  # decoders raise many kinds; one bad file must not stop the others
            tqdm.write(f"{path}: cannot be predicted: {error}", file=sys.stderr)
            failed.append(path)
            continue
        target = Path(options.out) / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        if task == "depth":
            _write_depth(target, image, predictor(image, task), path.name)
        else:
            _write_objects(target, image, predictor, task, options.min_score, path.name)
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
                f"{twin} and {path} would both be written as {path.stem}_panel.png; "
                "predict them into two folders (--out), or rename one"
            )
    return stems


def _write_depth(target: Path, image: np.ndarray, maps: dict[str, np.ndarray], title: str) -> None:
    depth, confidence = maps["depth"], maps["confidence"]
    np.save(f"{target}_depth.npy", depth)
    np.save(f"{target}_confidence.npy", confidence)
    millimetres = np.clip(np.round(depth * 1000), 0, 65535).astype(np.uint16)
    visualize.save_png(f"{target}_depth.png", millimetres)
    panel = visualize.depth_panel(image, depth, confidence=confidence, title=title)
    visualize.save_png(f"{target}_panel.png", panel)


def _write_objects(
    target: Path, image: np.ndarray, predictor: Predictor, task: str, min_score: float, title: str
) -> None:
    results = predictor.coco_results(image, task, image_id=target.name)
    Path(f"{target}_instances.json").write_text(json.dumps(results))
    shown = [result for result in results if result["score"] >= min_score]
    objects = _arrays(shown, predictor.categories, image.shape[:2] if task == "instances" else None)
    parts = (objects.get(name) for name in ("boxes", "classes", "scores", "masks"))
    names = [category["name"] for category in predictor.categories]
    visualize.save_png(f"{target}_panel.png", visualize.objects_panel(image, *parts, names, title=title))


def _arrays(
    results: list[dict[str, Any]], categories: Sequence[Mapping[str, Any]], mask_size: tuple[int, int] | None
) -> dict[str, Any]:
    """COCO results of an image as `Predictor` returns them, with masks of `mask_size` (None: without)."""
    arrays: dict[str, Any] = paste.from_results(results, [category["id"] for category in categories])
    arrays["names"] = [categories[label]["name"] for label in arrays["classes"]]
    if mask_size is not None:
        arrays["masks"] = arrays["masks"].view(bool) if results else np.zeros((0, *mask_size), bool)
    return arrays


def _parts(task: Any, name: str) -> dict[str, Any]:
    """What a model can be asked for, in the order of `TASKS`, and the task that predicts it."""
    given = dict(getattr(task, "parts", {name: task}))
    objects = given.get("instances")
    if objects is not None:
        given["detection"] = objects
        if objects.tokenizer is None:
            del given["instances"]
    if unknown := set(given) - set(TASKS):
        known = "depth, instances, joint"
        raise ValueError(f"a model of the task {unknown.pop()!r} cannot predict from images; known are {known}")
    return {name: given[name] for name in TASKS if name in given}


def _chosen(task: str | None, known: Sequence[str]) -> str:
    if not known:
        raise ValueError("this model predicts no objects; load a run of instances, detection or a joint one")
    if task is not None and task not in known:
        raise ValueError(f"task={task!r} is not among what this model can be asked for: {', '.join(map(repr, known))}")
    return task or known[0]


def _categories(parts: Mapping[str, Any], given: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if "detection" not in parts:
        return []
    count = parts["detection"].vocabulary.num_classes
    if not given:
        return [{"id": i + 1, "name": f"class {i}"} for i in range(count)]
    if len(given) > count:
        raise ValueError(f"{len(given)} categories, but the model knows {count} classes; give those it was trained for")
    return [{"id": int(category["id"]), "name": str(category["name"])} for category in given]


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8[H,W,3] or float32[H,W], bilinear and antialiased; as it is where it has the size."""
    if array.shape[:2] == (height, width):
        return array
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def _check_score(min_score: float) -> None:
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score={min_score} must be in 0..1; 0 keeps all objects")


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
