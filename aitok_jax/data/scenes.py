"""Built-in scenes as files: furnished rooms with depth, normals, classes and instance masks, rendered on the CPU.

They stand in for NYUv2 and COCO where no data is at hand: `python -m aitok_jax.data.scenes OUT` writes them in the
layout of NYUv2 and as COCO annotations, so that the readers for real data read them too.

    python -m aitok_jax.data.scenes OUT --train=6000 --test=400 --height=480 --width=640 --seed=0 --workers=2
"""

import argparse
import concurrent.futures.process
import functools
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from aitok_jax import paths
from aitok_jax.command_line.progress import progress_bar
from aitok_jax.scenes.furniture import CLASSES
from aitok_jax.scenes.render import LABELS, Scene, check_size, render

FORMATS = ("nyu", "coco", "both")
VERSION = 1  # of the look of the scenes: raise it when the same seed gives other pixels
_RECORD, _UNFINISHED = "scenes.json", "scenes.unfinished.json"
_FRAMES_PER_FOLDER = 100
_SEEDS_PER_SPLIT = 10_000_000


class _Job(NamedTuple):
    root: str
    split: str
    index: int
    seed: int
    height: int
    width: int
    format: str


def _name(split: str, index: int, kind: str, suffix: str) -> str:
    """The path of a file relative to the root."""
    folder = f"scene_{index // _FRAMES_PER_FOLDER:04d}" if split == "train" else "official_splits/test/room"
    return f"{folder}/{kind}_{index:05d}.{suffix}"


def _scene_seed(split: str, seed: int, index: int) -> int:
    """Seeds of different splits or of different `seed`s never meet."""
    return (2 * seed + (split == "test")) * _SEEDS_PER_SPLIT + index


def _write_scene(job: _Job) -> list[dict]:
    """Writes the files of one scene; returns its COCO annotations without ids."""
    from pycocotools import mask as coco_mask

    scene = render(_scene_seed(job.split, job.seed, job.index), job.height, job.width)
    root = paths.expand(job.root)
    with paths.writing(root / _name(job.split, job.index, "rgb", "jpg")) as file:
        Image.fromarray(scene.image).save(file, format="JPEG", quality=95)
    if job.format != "coco":
        for kind, picture in _maps(scene).items():
            with paths.writing(root / _name(job.split, job.index, kind, "png")) as file:
                Image.fromarray(picture).save(file, format="PNG", compress_level=1)
    if job.format == "nyu":
        return []
    annotations = []
    for mask, (x0, y0, x1, y1), label in zip(scene.masks, scene.boxes.tolist(), scene.classes, strict=True):
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append(
            {
                "image_id": job.index + 1,
                "category_id": int(label) + 1,
                "segmentation": {"size": [job.height, job.width], "counts": code["counts"].decode("ascii")},
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(mask.sum()),
                "iscrowd": 0,
            }
        )
    return annotations


def _maps(scene: Scene) -> dict[str, np.ndarray]:
    """By the beginning of a name: depth in 16-bit millimetres, normals in the usual colours, places in LABELS."""
    millimetres = [np.round(depth * 1000).astype(np.uint16) for depth in (scene.sensor_depth, scene.depth)]
    colors = np.round((scene.normals * np.float32([1, -1, -1]) + 1) * 127.5).astype(np.uint8)
    return dict(
        zip(("sync_depth", "exact_depth", "normals", "semantic"), (*millimetres, colors, scene.labels), strict=True)
    )


def _annotations_file(split: str, count: int, height: int, width: int, annotations: list[list[dict]]) -> dict:
    names = [_name(split, i, "rgb", "jpg") for i in range(count)]
    images = [{"id": i + 1, "file_name": name, "height": height, "width": width} for i, name in enumerate(names)]
    flat = [annotation for per_image in annotations for annotation in per_image]
    return {
        "info": {"description": "built-in scenes of aitok_jax", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": [{"id": i + 1, **annotation} for i, annotation in enumerate(flat)],
        "categories": [{"id": i + 1, "name": name, "supercategory": "object"} for i, name in enumerate(CLASSES)],
    }


def write(
    root: str | os.PathLike,
    *,
    train: int,
    test: int,
    height: int,
    width: int,
    seed: int = 0,
    workers: int = 2,
    format: str = "both",
) -> None:
    """Renders two splits of scenes into a folder; scenes that were there are replaced.

    Training frames are `scene_XXXX/rgb_NNNNN.jpg`, test frames `official_splits/test/room/rgb_NNNNN.jpg`. Format "nyu"
    adds `sync_depth_NNNNN.png` (sensor) and `exact_depth_NNNNN.png`, both 16-bit millimetres, `normals_NNNNN.png` in
    the usual colours, `semantic_NNNNN.png` with places in `classes.txt`, and lists `train.txt` and `test.txt`
    (`/folder/rgb_N.jpg /folder/sync_depth_N.png`, relative to the root); "coco" adds
    `annotations/instances_{train,test}.json`; "both" all of it. `scenes.json` with the settings is written last.

    Args:
        root: folder; must be new, empty, or hold scenes written by this function.
        train, test: number of frames; no frame of one split has the seed of the other.
        height, width: pixels, see `render`.
        seed: another seed gives other scenes.
        workers: processes (started with spawn); 1 renders in this one. Does not change the result.

    Raises:
        ValueError: an option outside its range, or a root that holds other files.
        ChildProcessError: a worker was killed; what is there is incomplete, and the next call renders it anew.
    """
    settings = _settings(train=train, test=test, height=height, width=width, seed=seed, format=format)
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    root = paths.expand(root)
    _clear(root)
    paths.write_text(root / _UNFINISHED, json.dumps(settings))
    for split, count in (("train", train), ("test", test)):
        names = [_name(split, i, "rgb", "jpg") for i in range(count)]
        jobs = [_Job(str(root), split, i, seed, height, width, format) for i in range(count)]
        annotations = _run(jobs, workers, f"scenes: {split}")
        if format != "coco":
            lines = [f"/{name} /{_name(split, i, 'sync_depth', 'png')}\n" for i, name in enumerate(names)]
            paths.write_text(root / f"{split}.txt", "".join(lines))
        if format != "nyu":
            content = _annotations_file(split, count, height, width, annotations)
            paths.write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    if format != "coco":
        paths.write_text(root / "classes.txt", "".join(f"{name}\n" for name in LABELS))
    paths.write_text(root / _RECORD, json.dumps(settings))
    (root / _UNFINISHED).unlink()


def ensure(root: str | os.PathLike, *, seed: int = 0, workers: int = 2, format: str = "both", **scenes: int) -> None:
    """Does what `write` does, with its arguments, unless the root already holds exactly these scenes, complete.

    Raises:
        ValueError: the root holds scenes of other settings; or see `write`.
    """
    settings = _settings(seed=seed, format=format, **scenes)
    record = paths.expand(root) / _RECORD
    if not record.is_file():
        write(root, seed=seed, workers=workers, format=format, **scenes)
        return
    present = json.loads(paths.read(record))
    if present != settings:
        raise ValueError(
            f"{root} holds scenes of other settings: it has {present}, wanted are {settings}; "
            "give another folder, or delete this one to render anew"
        )


def _settings(*, train: int, test: int, height: int, width: int, seed: int, format: str) -> dict:
    """The options as they are recorded, after a check."""
    check_size(height, width)
    for name, count in (("train", train), ("test", test)):
        if not 0 <= count <= _SEEDS_PER_SPLIT:
            raise ValueError(f"{name}={count} must be between 0 and {_SEEDS_PER_SPLIT}")
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    options = {"train": train, "test": test, "height": height, "width": width, "seed": seed, "format": format}
    return {"version": VERSION, **options}


def _clear(root: Path) -> None:
    """Makes the folder, or removes earlier scenes from it; never touches a folder with other content."""
    root.mkdir(parents=True, exist_ok=True)
    if any(root.glob("*")) and not any((root / name).is_file() for name in (_RECORD, _UNFINISHED)):
        raise ValueError(f"{root} holds files that are no built-in scenes; give a new or empty folder")
    if (root / _RECORD).is_file():
        paths.write_text(root / _UNFINISHED, "")  # from here on the scenes are incomplete
        (root / _RECORD).unlink()
    for folder in (*root.glob("scene_*"), root / "official_splits", root / "annotations"):
        paths.remove_tree(folder)
    for name in ("train", "test", "classes"):
        (root / f"{name}.txt").unlink(missing_ok=True)


def _run(jobs: list[_Job], workers: int, title: str) -> list[list[dict]]:
    bar = functools.partial(progress_bar, total=len(jobs), desc=title, unit="scene")
    if workers == 1 or len(jobs) < 2:
        return list(bar(map(_write_scene, jobs)))
    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn) as pool:
            return list(bar(pool.map(_write_scene, jobs, chunksize=4)))
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {workers} processes that render was ended from outside, as happens where memory runs out; "
            "render again, with fewer workers"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m aitok_jax.data.scenes", description="Renders built-in scenes into a folder."
    )
    parser.add_argument("root", help="folder to write; new, empty or with earlier scenes, which are replaced")
    parser.add_argument("--train", type=int, default=6000, help="training frames")
    parser.add_argument("--test", type=int, default=400, help="test frames")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--format", choices=FORMATS, default="both")
    try:
        write(**vars(parser.parse_args()))
    except (ValueError, ChildProcessError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
