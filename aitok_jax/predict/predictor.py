"""Prediction of one image or many: `Predictor`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aitok_jax import tasks
from aitok_jax.config import from_json, translated_task
from aitok_jax.image import fit_square, model_size, resize
from aitok_jax.predict.views import NUM_VIEWS, average_views, view
from aitok_jax.tasks import paste
from aitok_jax.tasks.arguments import check_path, check_process, whole_number
from aitok_jax.tasks.base import compiled_predict
from aitok_jax.tasks.maps import MapsTogether, seen_alike
from aitok_jax.training import checkpoint

BATCH_SIZE = 4


class Predictor:
    """A trained model, ready to predict.

        predictor = Predictor.load("runs/joint")
        predictor.tasks  # what it can be asked for
        image = np.asarray(Image.open("room.jpg").convert("RGB"))
        predictor(image)  # the first of them
        predictor(image, task="instances", min_score=0.5)["masks"]  # bool[n,H,W]

    Args:
        task: made of parts that predict from images (`answers`).
        params, model_state: its weights.
        categories: `id` and `name` of the object classes, in their order; () numbers them from 1.
    Attributes:
        tasks: what it can be asked for: the names of dense maps, 'instances', 'detection'.
        parts: for each of these the part that predicts it.
        weights: (params, model_state), on the device.
        categories: list of {'id': int, 'name': str}, one for each class of objects; empty without objects.
    """

    def __init__(self, task: Any, params: Any, model_state: Any, categories: Sequence[Mapping[str, Any]] = ()):
        check_process()
        self.parts = _parts(task)
        self.tasks = tuple(self.parts)
        self.categories = _categories(self.parts, categories)
        self.weights = jax.device_put((params, model_state))

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Reads a run directory, a directory of converted weights, or 'builtin', the small model that comes along.

        Of a run of several stages it takes the one that predicts. The classes' names are its config's `categories`.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: a run that does not predict from images, such as a tokenizer's, or of which several stages do;
                no path.
            RuntimeError: in a process forked after a model was loaded; as by every call.
        """
        check_path("path", path)
        check_process()
        config, weights = checkpoint.load_inference(_stage(checkpoint.locate(path)))
        categories = config.categories if "categories" in config else ()
        return cls(tasks.build(config.task), weights["params"], weights["model_state"], categories)

    def choose(self, task: str | None) -> str:
        """The task that is predicted for `task`: itself, or the first of `tasks` for None; ValueError for others."""
        return _chosen(task, self.tasks)

    def __call__(
        self,
        image: np.ndarray | Sequence[np.ndarray],
        task: str | tuple[str, ...] | None = None,
        *,
        min_score: float = 0.0,
        augment: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Predicts an image, or a list of images.

        A tuple of tasks gives what each of them gives, by its name: `predictor(image, predictor.tasks)`.
        Maps that see images alike cost one pass of the backbone together.

        Maps: the image is resized to the model's scale: short side to the part's `image_size`, aspect ratio (long side
        to short side) rounded to a multiple of 1/15, so that images of any size compile few programs; a 4:3 image keeps
        its aspect, and the error is at most 1/30 of the short side. Resizing is bilinear, with antialiasing
        where it shrinks. The maps are resized back bilinearly. An image that has the model's scale is not resized.
        Distances are metric for cameras like those of the training data: another field of view scales them.

        Instances and detection: see `fit_square`; boxes and masks are brought back to the image. A model of instances
        also does detection, which leaves out the masks.

        The images of a list that the model sees at one size are predicted together, `batch_size` at a time. What is
        left of them fills a batch up with copies if it is more than half of one, and goes one by one if not, so that
        a size compiles two programs at most. An image's result does not depend on the others but for rounding.

        Args:
            image: uint8[H,W,3] RGB of any size (maps: at most 8 times longer than its short side), or a list of such.
            task: what to predict, one of `tasks`, or a tuple of them; None is the first of them.
            min_score: objects of a lower score are left out; 0..1.
            augment: for maps, average over the mirror image, whatever the part's `flip`, and over enlarged corners
                (see `views.average_views`); takes five times as long, or ten where `flip` is off.
            batch_size: images that go through the model together; at least 1.
        Returns:
            For a map, under its name [H,W,...], as its modality says, with the modality's legend (the `names` of
            classes), and `confidence` float32[H,W] in 0..1: 1 / (1 + s), s the spread of the values that the token
            there may stand for, under its probabilities; 1 is sure of one value, 1/2 wavers by one unit (a metre). It
            is no probability of being right.
            For instances and detection the n objects, best first: `boxes` float32[n,4] x1 y1 x2 y2 in pixels of the
            image, `classes` int32[n], `names` list[str], `scores` float32[n] in 0..1, the probability of the class
            among all classes and the noise label, and, for instances, `masks` bool[n,H,W]. A list of these for a list.
        Raises:
            ValueError: an image of another type or shape or with masked pixels, a task that this model does not do, a
                score outside 0..1, a batch size below 1, or `augment` for objects.
        """
        several = isinstance(task, tuple)
        chosen = [self.choose(each) for each in task] if several else [self.choose(task)]
        if not chosen:
            raise ValueError(f"task={task!r} names nothing; give one or more of {', '.join(map(repr, self.tasks))}")
        _check_score(min_score)
        if not isinstance(augment, (bool, np.bool_)):
            raise ValueError(f"augment={augment!r} must be True or False")
        images, many = _listed(image)
        maps = {each: self.parts[each] for each in chosen if self.parts[each].kind == "maps"}
        objects = [each for each in chosen if each not in maps]
        if augment and objects:
            raise ValueError(f"augment=True is for maps, not for task={objects[0]!r}; leave it out")
        found = {each: self._objects(each, images, min_score, batch_size) for each in objects}
        for parts in seen_alike(maps.values()):
            found |= self._maps(parts, images, augment, batch_size)
        results = [{each: found[each][i] for each in chosen} for i in range(len(images))]
        if not several:
            results = [result[chosen[0]] for result in results]
        return results if many else results[0]

    def coco_results(
        self,
        image: np.ndarray | Sequence[np.ndarray],
        task: str | None = None,
        *,
        image_id: int | str | Sequence[int | str] | None = None,
        min_score: float = 0.0,
        batch_size: int = BATCH_SIZE,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """The objects of an image as COCO results, best first; a list of these for a list of images.

        Arguments and errors are those of `__call__`. Without `task` these are instances, or detections where the model
        gives no masks.

        Args:
            image_id: of the image, or of each image of the list; None is its place, counted from 0.
        Returns:
            Dicts ready for JSON: `image_id` as given (Python's int or str for any library's), `category_id` (see
            `categories`), `bbox` [x, y, width, height] in pixels of the image, `score` and, for instances,
            `segmentation` (compressed RLE). Left out are objects whose box is reversed or lies outside the image, and
            those of a class that is none of the `categories`.
        """
        task = _chosen(task, [name for name, part in self.parts.items() if part.kind == "objects"])
        _check_score(min_score)
        images, many = _listed(image)
        ids = _ids(image_id, len(images))
        part, scales = self.parts[task], {}

        def seen(i):
            square, scales[i] = fit_square(images[i], part.image_size)
            return square

        results: list[list[dict[str, Any]]] = [[] for _ in images]
        for i, outputs in self._outputs(part, [part.image_size for _ in images], seen, batch_size):
            if task == "detection":
                outputs.pop("masks", None)
            known = (outputs["scores"] >= min_score) & (outputs["classes"] < len(self.categories))
            outputs["valid"] = outputs["valid"] & known
            category_ids = [category["id"] for category in self.categories]
            found = paste.to_results(outputs, ids[i], category_ids, scales[i], images[i].shape[:2])
            results[i] = sorted(found, key=lambda result: -result["score"])
        return results if many else results[0]

    def _objects(
        self, task: str, images: Sequence[np.ndarray], min_score: float, batch_size: int
    ) -> list[dict[str, Any]]:
        found = self.coco_results(images, task, min_score=min_score, batch_size=batch_size)
        sizes = [image.shape[:2] if task == "instances" else None for image in images]
        return [_arrays(*args, self.categories) for args in zip(found, sizes, strict=True)]

    def _maps(
        self, parts: Sequence[Any], images: Sequence[np.ndarray], augment: bool, batch_size: int
    ) -> dict[str, list[dict[str, Any]]]:
        """Of maps that see images alike, by name, the results of all images."""
        if augment:
            parts = [dataclasses.replace(part, flip=True) for part in parts]
        count, (first, *others) = NUM_VIEWS if augment else 1, parts
        together = MapsTogether(tuple(parts)) if others else first
        sizes = [model_size(*image.shape[:2], first.image_size) for image in images]

        def seen(k):
            i, number = divmod(k, count)
            return view(images[i], number, *sizes[i]).astype(np.float32) / 255

        modalities = {part.modality.name: part.modality for part in parts}
        results: dict[str, list[dict[str, Any]]] = {name: [{} for _ in images] for name in modalities}
        views: list[list[dict[str, Any]]] = [[] for _ in images]
        for k, outputs in self._outputs(together, [size for size in sizes for _ in range(count)], seen, batch_size):
            i = k // count
            views[i].append(outputs if others else {first.modality.name: outputs})  # in order: all have one size
            if len(views[i]) == count:
                for name, modality in modalities.items():
                    own = [each[name] for each in views[i]]
                    results[name][i] = _whole(modality, own, images[i].shape[:2])
                views[i] = []
        return results

    def _outputs(
        self, part: Any, sizes: Sequence[Any], seen: Callable[[int], np.ndarray], batch_size: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(i, what the model says of `seen(i)`) for every image; those of one size come after each other.

        JAX's 64-bit mode is off: what the model was trained with is 32 bits wide.
        """
        check_process()
        predict = compiled_predict(part)
        for indices, rows in plan_batches(sizes, batch_size):
            images = np.stack([seen(i) for i in indices])
            images = np.pad(images, ((0, rows - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
            # one seed for all, so that sampling does not depend on an image's place in the batch
            with jax.enable_x64(False):
                outputs = predict(*self.weights, {"image": images, "id": np.zeros(rows, np.int32)})
            outputs = jax.tree.map(np.asarray, outputs)
            for row, i in enumerate(indices):
                yield i, jax.tree.map(lambda values, row=row: values[row].copy(), outputs)


def plan_batches(sizes: Sequence[Any], batch_size: int) -> list[tuple[list[int], int]]:
    """(indices of images of one size, rows of the batch that they go into) for images of these sizes.

    The rows are `batch_size` or, for what is left of a size where that is at most half a batch, 1.

    Raises:
        ValueError: `batch_size` is no whole number or below 1.
    """
    batch_size = whole_number("batch_size", batch_size)
    groups: dict[Any, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    parts = (group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size))
    planned: list[tuple[list[int], int]] = []
    for part in parts:
        planned += [(part, batch_size)] if 2 * len(part) > batch_size else [([i], 1) for i in part]
    return planned


def _whole(modality: Any, views: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int]) -> dict[str, Any]:
    """A map and its confidence at the size of its image, from those of the image's views."""
    maps = average_views(views, modality)
    return {
        modality.name: modality.resized(maps[modality.name], *size),
        "confidence": np.clip(resize(maps["confidence"], *size), 0, 1),
        **modality.legend,
    }


def _arrays(
    results: list[dict[str, Any]], mask_size: tuple[int, int] | None, categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """COCO results of an image as `Predictor` returns them, with masks of `mask_size` (None: without)."""
    arrays: dict[str, Any] = paste.from_results(results, [category["id"] for category in categories])
    arrays["names"] = [categories[label]["name"] for label in arrays["classes"]]
    if mask_size is not None:
        arrays["masks"] = arrays["masks"].view(bool) if results else np.zeros((0, *mask_size), bool)
    return arrays


def _stage(run: Path) -> Path:
    """The folder of the stage that predicts from images, where it is a run of several; else the run itself."""
    file = run / "config.json"
    config = from_json(file.read_text(), str(file)) if file.is_file() else {}
    if "stages" not in config:
        return run
    found = [name for name, stage in config.stages.items() if translated_task(stage.task)["name"] != "tokenizer"]
    if len(found) != 1:
        which = " or ".join(str(run / name) for name in found or config.stages)
        count = "several of its stages predict" if found else "none of its stages predicts"
        raise ValueError(f"{run} is a run of {', '.join(config.stages)}, and {count} from images; give {which}")
    return run / found[0]


def _parts(task: Any) -> dict[str, Any]:
    """What a model can be asked for, maps first, and the part that predicts it."""
    parts = sorted(task.parts.values(), key=lambda part: part.kind)
    parts = [dataclasses.replace(part, blend=True) if part.kind == "maps" and part.answers else part for part in parts]
    answers = {answer: part for part in parts for answer in part.answers}
    if not answers:
        raise ValueError(f"a run of {', '.join(task.parts)} does not predict from images; load that of a solver")
    return answers


def _chosen(task: str | None, known: Sequence[str]) -> str:
    if not known:
        raise ValueError("this model predicts no objects; load a run of instances, detection or a joint one")
    if task is None:
        return known[0]
    if not isinstance(task, str) or task not in known:
        raise ValueError(f"task={task!r} is not among what this model can be asked for: {', '.join(map(repr, known))}")
    return str(task)


def _categories(parts: Mapping[str, Any], given: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if "detection" not in parts:
        return []
    count = parts["detection"].vocabulary.num_classes
    if given is None or not len(given):
        return numbered(count)
    if len(given) > count:
        raise ValueError(f"{len(given)} categories, but the model knows {count} classes; give those it was trained for")
    for category in given:
        if not isinstance(category, Mapping) or not {"id", "name"} <= set(category):
            raise ValueError(f"category {category!r} must be a dict with 'id' (a whole number) and 'name'")
    ids = [whole_number("a category's id", category["id"], None) for category in given]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two categories have one id in {ids}; give each its own")
    return [{"id": i, "name": str(category["name"])} for i, category in zip(ids, given, strict=True)]


def numbered(count: int) -> list[dict[str, Any]]:
    """The categories of a model whose classes have no names."""
    return [{"id": i + 1, "name": f"class {i}"} for i in range(count)]


def _ids(image_id: Any, count: int) -> list[int | str]:
    """An id for each of `count` images, as plain Python values; ValueError where they are none or not so many."""
    if image_id is None:
        return list(range(count))
    if isinstance(image_id, (set, frozenset, Mapping)):
        raise ValueError(f"image_id={image_id!r:.200} has no order; give a list with an id for each image")
    try:
        ids = [image_id] if isinstance(image_id, (str, bytes)) else list(image_id)
    except TypeError:  # a scalar
        ids = [image_id]
    if len(ids) != count:
        raise ValueError(f"{len(ids)} values of image_id for {count} images; give one for each, or None")
    return [paste.plain_id(one) for one in ids]


def _listed(image: Any) -> tuple[Sequence[np.ndarray], bool]:
    """The images, all checked, and whether they were given as a list."""
    many = isinstance(image, (list, tuple))
    images = image if many else [image]
    for one in images:
        _check_image(one)
    return images, many


def _check_score(min_score: float) -> None:
    number = isinstance(min_score, (int, float, np.integer, np.floating)) and not isinstance(min_score, bool)
    if not number or not 0 <= min_score <= 1:
        raise ValueError(f"min_score={min_score!r:.200} must be in 0..1; 0 keeps all objects")


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        given = repr(image) if isinstance(image, (str, os.PathLike, type(None))) else type(image).__name__
        raise ValueError(
            f"image must be a NumPy array uint8[H, W, 3] (RGB) or a list of them, got {given:.200}; "
            "aitok_jax.image.read_image reads a file, np.asarray(image) converts a picture or a tensor"
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 with values 0..255, got {image.dtype}; convert it to uint8 "
            "(of floats in 0..1: np.uint8(255 * image + 0.5))"
        )
    if np.ma.is_masked(image):
        raise ValueError("image has masked pixels, and a model sees all of them; give image.filled(0), or crop it")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be RGB [H, W, 3], got shape {image.shape}; pass several images as a list")
