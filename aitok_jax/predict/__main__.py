"""The command line of the predictor.

    python -m aitok_jax.predict --checkpoint=RUN_OR_DIR --task=depth --image FILE_OR_FOLDER_OR_PATTERN... --out=DIR

writes for each image NAME.ext, at the image's own size and orientation, NAME_panel.png and

- for depth: NAME_depth.npy (float32 metres), NAME_depth.png (16-bit millimetres, 0 to 65535), NAME_confidence.npy
  (float32, 0..1) and, where --ply_fov gives the camera's horizontal field of view in degrees, NAME_points.ply;
- for instances and detection: NAME_instances.json, all objects as a list of COCO results with NAME as `image_id`. The
  panel shows those whose score is at least --min_score.

Two images of one NAME are refused. An image that cannot be read is reported, the others are still predicted, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from aitok_jax import visualize
from aitok_jax.predict import pointcloud
from aitok_jax.predict.predictor import BATCH_SIZE, TASKS, Predictor, model_size, read_image
from aitok_jax.tasks import paste

PANEL_SIDE = 1600  # pixels; larger images are shown smaller


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts what `argv` says; returns the exit code: 0, or 1 where an image could not be read."""
    options = _parser().parse_args(argv)
    try:
        stems = name_results(find_images(options.image))
        predictor = Predictor.load(options.checkpoint)
        task = _checked(options, predictor)
    except (ValueError, OSError) as error:
        _parser().error(str(error))

    failed: list[Path] = []
    with tqdm(total=len(stems), unit="image", disable=len(stems) == 1) as bar:
        for images in _read(list(stems), task, options.batch_size, failed, bar):
            targets = [Path(options.out) / stems[path] for path in images]
            Path(options.out).mkdir(parents=True, exist_ok=True)
            titles = [path.name for path in images]
            if task == "depth":
                _predict_depth(predictor, list(images.values()), targets, titles, options)
            else:
                _predict_objects(predictor, task, list(images.values()), targets, titles, options)
            bar.update(len(images))
    if failed:
        print(f"{len(failed)} of {len(stems)} images failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aitok_jax.predict", description="Predicts depth, or objects, from RGB images."
    )
    parser.add_argument("--checkpoint", required=True, help="run directory, directory of converted weights, or builtin")
    parser.add_argument("--task", choices=TASKS, help="what to predict (default: the first of these the model does)")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="images, folders of images, or quoted patterns such as 'photos/*.jpg' ('**' for all folders below)",
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--min_score", type=float, default=0.5, help="lowest score of an object in the panel (default: %(default)s)"
    )
    parser.add_argument("--augment", action="store_true", help="average depth over mirror image and zoom")
    parser.add_argument("--ply_fov", type=float, metavar="DEGREES", help="write point clouds for this field of view")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=BATCH_SIZE,
        help="images of one size predicted together (default: %(default)s)",
    )
    return parser


def _checked(options: argparse.Namespace, predictor: Predictor) -> str:
    """The task to predict. ValueError for options that do not fit it."""
    task = predictor.choose(options.task)
    if not 0 <= options.min_score <= 1:
        raise ValueError(f"--min_score={options.min_score} must be in 0..1; 0 keeps all objects")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size} must be at least 1")
    for name in ("augment", "ply_fov"):
        if task != "depth" and getattr(options, name):
            raise ValueError(f"--{name} is for --task=depth, not for {task!r}; leave it out")
    if options.ply_fov is not None:
        pointcloud.focal_length(1, options.ply_fov)
    return task


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


def _read(
    paths: Sequence[Path], task: str, count: int, failed: list[Path], bar: tqdm
) -> Iterator[dict[Path, np.ndarray]]:
    """The images, `count` files at a time; those that cannot be predicted are reported and added to `failed`."""
    for start in range(0, len(paths), count):
        images = {}
        for path in paths[start : start + count]:
            try:
                image = read_image(path)
                if task == "depth":
                    model_size(*image.shape[:2], 1)
            except Exception as error:  # decoders raise many kinds; one bad file must not stop the others
                tqdm.write(f"{path}: cannot be predicted: {error}", file=sys.stderr)
                failed.append(path)
                bar.update()
            else:
                images[path] = image
        if images:
            yield images


def _predict_depth(
    predictor: Predictor, images: list[np.ndarray], targets: list[Path], titles: list[str], options: argparse.Namespace
) -> None:
    results = predictor(images, "depth", augment=options.augment, batch_size=options.batch_size)
    for image, maps, target, title in zip(images, results, targets, titles, strict=True):
        depth, confidence = maps["depth"], maps["confidence"]
        np.save(f"{target}_depth.npy", depth)
        np.save(f"{target}_confidence.npy", confidence)
        millimetres = np.clip(np.round(depth * 1000), 0, 65535).astype(np.uint16)
        visualize.save_png(f"{target}_depth.png", millimetres)
        if options.ply_fov is not None:
            pointcloud.write_ply(f"{target}_points.ply", image, depth, options.ply_fov)
        small, step = _for_panel(image)
        panel = visualize.depth_panel(small, depth[::step, ::step], confidence=confidence[::step, ::step], title=title)
        visualize.save_png(f"{target}_panel.png", panel)


def _predict_objects(
    predictor: Predictor,
    task: str,
    images: list[np.ndarray],
    targets: list[Path],
    titles: list[str],
    options: argparse.Namespace,
) -> None:
    names = [target.name for target in targets]
    found = predictor.coco_results(images, task, image_id=names, batch_size=options.batch_size)
    for image, results, target, title in zip(images, found, targets, titles, strict=True):
        Path(f"{target}_instances.json").write_text(json.dumps(results))
        shown = [result for result in results if result["score"] >= options.min_score]
        panel = _objects_panel(image, shown, predictor.categories, title)
        visualize.save_png(f"{target}_panel.png", panel)


def _objects_panel(
    image: np.ndarray, shown: list[dict[str, Any]], categories: Sequence[Mapping[str, Any]], title: str
) -> np.ndarray:
    small, step = _for_panel(image)
    objects = paste.from_results(shown, [category["id"] for category in categories], step)
    parts = (objects.get(name) for name in ("boxes", "classes", "scores", "masks"))
    return visualize.objects_panel(small, *parts, [category["name"] for category in categories], title=title)


def _for_panel(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image as a panel shows it, and of how many pixels it shows one."""
    step = -(-max(image.shape[:2]) // PANEL_SIDE)
    return np.asarray(Image.fromarray(image).reduce(step)), step


if __name__ == "__main__":
    sys.exit(main())
