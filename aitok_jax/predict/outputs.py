"""What the command line of the predictor reads and writes: which images, under which names, in which files."""

import argparse
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aitok_jax import visualize
from aitok_jax.image import save_png
from aitok_jax.predict import pointcloud
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks import paste

PANEL_SIDE = 1600  # pixels; larger images are shown smaller


def find_images(names: Sequence[str]) -> list[Path]:
    """The files that names stand for: a file is itself, a folder its images, a pattern what it matches; in order.

    A folder's images are the files directly in it whose suffix Pillow knows.

    Raises:
        ValueError: a folder without images, or a pattern that matches no file.
    """
    files = []
    for name in names:
        found = [Path(name)]
        if found[0].is_dir():
            known = Image.registered_extensions()
            found = sorted(path for path in found[0].iterdir() if path.is_file() and path.suffix.lower() in known)
        elif glob.has_magic(name) and not found[0].exists():
            found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
        if not found:
            kind = "folder" if Path(name).is_dir() else "pattern"
            raise ValueError(f"--image={name}: no image in this {kind}; give files, a folder or a quoted pattern")
        files += found
    return files


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
                f"{twin} and {path} would both be written as {path.stem}_panel.png; "
                "predict them into two folders (--out), or rename one"
            )
        stems[twin] = twin.stem
    return stems


def write(
    predictor: Predictor,
    task: str,
    images: Mapping[Path, np.ndarray],
    stems: Mapping[Path, str],
    options: argparse.Namespace,
) -> None:
    """Predicts images of files and writes OUT/NAME_..., NAME as `stems` has it; see `predict.__main__`."""
    arrays, names = list(images.values()), [stems[path] for path in images]
    if predictor.parts[task].kind == "maps":
        results = predictor(arrays, task, augment=options.augment, batch_size=options.batch_size)
        write_one = _write_map
    else:
        results = predictor.coco_results(arrays, task, image_id=names, batch_size=options.batch_size)
        write_one = _write_objects
    Path(options.out).mkdir(parents=True, exist_ok=True)
    for path, name, result in zip(images, names, results, strict=True):
        target = Path(options.out) / name
        panel = write_one(predictor, task, images[path], result, target, path.name, options)
        save_png(f"{target}_panel.png", panel)


def _write_map(predictor, task, image, maps, target, title, options) -> np.ndarray:
    """Writes a map as TARGET_... and returns its panel."""
    modality, map_, confidence = predictor.parts[task].modality, maps[task], maps["confidence"]
    modality.write(target, map_)
    np.save(f"{target}_confidence.npy", confidence)
    if options.ply_fov is not None:
        pointcloud.write_ply(f"{target}_points.ply", image, modality.distance(map_), options.ply_fov)
    small, step = _for_panel(image)
    shown = {"prediction": map_[::step, ::step], "confidence": confidence[::step, ::step]}
    return visualize.map_panel(modality, small, **shown, title=title)


def _write_objects(predictor, task, image, results, target, title, options) -> np.ndarray:
    """Writes objects as TARGET_... and returns their panel."""
    Path(f"{target}_instances.json").write_text(json.dumps(results))
    small, step = _for_panel(image)
    shown = [result for result in results if result["score"] >= options.min_score]
    objects = paste.from_results(shown, [category["id"] for category in predictor.categories], step)
    parts = (objects.get(name) for name in ("boxes", "classes", "scores", "masks"))
    return visualize.objects_panel(small, *parts, [category["name"] for category in predictor.categories], title=title)


def _for_panel(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image as a panel shows it, and of how many pixels it shows one."""
    step = -(-max(image.shape[:2]) // PANEL_SIDE)
    return np.asarray(Image.fromarray(image).reduce(step)), step
