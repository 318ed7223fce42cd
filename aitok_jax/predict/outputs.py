"""What the command line of the predictor reads and writes: which images, under which names, in which files."""

import argparse
import glob
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aitok_jax import paths, visualize
from aitok_jax.image import save_npy, save_png
from aitok_jax.predict import pointcloud
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks import paste

PANEL_SIDE = 1600  # pixels; larger images are shown smaller
TOGETHER = ("results.json", "categories.json")  # of the objects of all images


class Results:
    """A folder of results, and which files in it are ours: `aitok_results.jsonl` there names them, one a line.

    Args:
        folder: need not exist.
        overwrite: whether files that are not ours may be replaced.
    Attributes:
        written: names of the files that were claimed.
    Raises:
        OSError: the folder cannot be one, or may not be written to.
    """

    INDEX = "aitok_results.jsonl"

    def __init__(self, folder: str | Path, overwrite: bool = False):
        self.folder, self._overwrite, self.written = paths.expand(folder), overwrite, set()
        if not paths.is_url(folder):
            self._check_local()
        self._ours = self.of(self.folder)

    def _check_local(self) -> None:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"--out={self.folder}: {there} is a file; give a folder for the results")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"--out={self.folder}: {there} may not be written to; give another folder")

    @classmethod
    def of(cls, folder: Path) -> set[str]:
        """The names of the results in a folder."""
        try:
            lines = paths.read(folder / cls.INDEX).decode().splitlines()
        except FileNotFoundError:
            return set()
        return {json.loads(line) for line in lines if line.endswith('"')}  # a kill may leave half a line

    def check(self, names: Iterable[str]) -> None:
        """ValueError where one of these names is that of a file which is not ours."""
        others = [name for name in names if name not in self._ours and (self.folder / name).exists()]
        if others and not self._overwrite:
            raise ValueError(
                f"{self.folder} holds files that are no results of ours and would be written over: "
                f"{paths.listed(others)}; give another --out, or --overwrite to replace them"
            )

    def claim(self, names: Sequence[str]) -> None:
        """Notes that these files, about to be written, are ours."""
        self.check(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(name) + "\n" for name in names if name not in self._ours]
        paths.append(self.folder / self.INDEX, "".join(lines))
        self._ours |= set(names)
        self.written |= set(names)


def find_images(names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The images that names stand for, in order, and what was passed over.

    A file is itself, a folder the images directly in it, a pattern what it matches. Passed over are files of a folder
    whose suffix is that of no image, hidden ones, and our own results.

    Raises:
        ValueError: a folder or a pattern without an image, or nothing but results.
    """
    files, passed_over = [], []
    for name in names:
        path, others = paths.expand(name), []
        found = [path]
        if path.is_dir():
            found, others = paths.find(path, paths.IMAGE_SUFFIXES, below=False)
            others = [other for other in others if other.name != Results.INDEX]
        elif glob.has_magic(name) and not path.exists():
            found = paths.matches(path)
        ours = {folder: Results.of(folder) for folder in {file.parent for file in found}}
        results = [file for file in found if file.name in ours[file.parent]]
        files += [file for file in found if file.name not in ours[file.parent]]
        if len(results) == len(found):
            kind = "folder" if path.is_dir() else "pattern"
            why = "nothing but results of ours" if results else f"no image in this {kind}"
            raise ValueError(f"--image={name}: {why}; give files, a folder or a quoted pattern")
        passed_over += others + results
    return files, passed_over


def name_results(files: Sequence[Path]) -> dict[Path, str]:
    """File -> NAME of its results; a file given twice counts once.

    Raises:
        ValueError: two files of one NAME, which may differ in case.
    """
    stems: dict[Path, str] = {}
    owners: dict[str, Path] = {}
    for path in files:
        twin = owners.setdefault(path.stem.lower(), path)
        if twin.resolve() != path.resolve():
            raise ValueError(
                f"{paths.listed([twin, path])} would both be written as {paths.shown(path.stem)}_panel.png; "
                "predict them into two folders (--out), or rename one"
            )
        stems[twin] = twin.stem
    return stems


def result_names(predictor: Predictor, tasks: Sequence[str], stem: str, options: argparse.Namespace) -> list[str]:
    """The files that `write` makes of an image."""
    names = []
    for task in tasks:
        shared, part = _shared(stem, task, tasks), predictor.parts[task]
        if part.kind == "maps":
            names += [f"{stem}_{task}{suffix}" for suffix in part.modality.writes]
            names += [f"{shared}_confidence.npy", *[f"{shared}_points.ply"] * _has_points(part, options)]
        else:
            names.append(f"{stem}_instances.json")
        names.append(f"{shared}_panel.png")
    return names


def tells_distances(part: Any) -> bool:
    """Whether point clouds can be made of what it predicts."""
    return part.kind == "maps" and part.modality.distance(np.zeros((1, 1), np.float32)) is not None


def _has_points(part: Any, options: argparse.Namespace) -> bool:
    return options.ply_fov is not None and tells_distances(part)


def _shared(target: str | Path, task: str, tasks: Sequence[str]) -> str:
    """What files begin with that every task makes one of."""
    return f"{target}_{task}" if len(tasks) > 1 else str(target)


def write(
    predictor: Predictor,
    tasks: Sequence[str],
    images: Mapping[Path, np.ndarray],
    stems: Mapping[Path, str],
    ids: Mapping[Path, int | str],
    results: Results,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Predicts images of files and writes OUT/NAME_..., NAME as `stems` has it; see `predict.__main__`.

    Returns the objects of all of them as COCO results, `image_id` as `ids` has it.
    """
    arrays, batch_size = list(images.values()), options.batch_size
    maps = tuple(task for task in tasks if predictor.parts[task].kind == "maps")
    of_maps = predictor(arrays, maps, augment=options.augment, batch_size=batch_size) if maps else [{} for _ in arrays]
    of_objects = {
        task: predictor.coco_results(arrays, task, image_id=[ids[path] for path in images], batch_size=batch_size)
        for task in tasks
        if task not in maps
    }
    for i, (path, image) in enumerate(images.items()):
        results.claim(result_names(predictor, tasks, stems[path], options))
        for task in tasks:
            target, shared = (results.folder / name for name in (stems[path], _shared(stems[path], task, tasks)))
            if task in maps:
                panel = _write_map(
                    predictor.parts[task], task, image, of_maps[i][task], target, shared, path.name, options
                )
            else:
                panel = _write_objects(predictor, image, of_objects[task][i], target, path.name, options)
            save_png(f"{shared}_panel.png", panel)
    return list(itertools.chain(*itertools.chain(*of_objects.values())))


def write_together(found: Sequence[dict], categories: Sequence[dict], results: Results) -> None:
    """Writes the objects of all images and their classes into the files `TOGETHER`."""
    results.claim(TOGETHER)
    for name, content in zip(TOGETHER, (found, categories), strict=True):
        paths.write_text(results.folder / name, json.dumps(content))
    if not found:
        print(f"no objects: {TOGETHER[0]} is [], which pycocotools' COCO.loadRes does not take", file=sys.stderr)


def _write_map(part, task, image, maps, target, shared, title, options) -> np.ndarray:
    """Writes a map as TARGET_..., what every map has as SHARED_..., and returns its panel."""
    modality, map_, confidence = part.modality, maps[task], maps["confidence"]
    modality.write(target, map_)
    save_npy(f"{shared}_confidence.npy", confidence)
    if _has_points(part, options):
        pointcloud.write_ply(f"{shared}_points.ply", image, modality.distance(map_), options.ply_fov)
    small, step = _for_panel(image)
    shown = {"prediction": map_[::step, ::step], "confidence": confidence[::step, ::step]}
    return visualize.map_panel(modality, small, **shown, title=title)


def _write_objects(predictor, image, found, target, title, options) -> np.ndarray:
    """Writes objects as TARGET_... and returns their panel."""
    paths.write_text(f"{target}_instances.json", json.dumps(found))
    small, step = _for_panel(image)
    shown = [result for result in found if result["score"] >= options.min_score]
    objects = paste.from_results(shown, [category["id"] for category in predictor.categories], step)
    parts = (objects.get(name) for name in ("boxes", "classes", "scores", "masks"))
    return visualize.objects_panel(small, *parts, [category["name"] for category in predictor.categories], title=title)


def _for_panel(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image as a panel shows it, and of how many pixels it shows one."""
    step = -(-max(image.shape[:2]) // PANEL_SIDE)
    return np.asarray(Image.fromarray(image).reduce(step)), step
