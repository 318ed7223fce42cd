"""Prepares data: checks every file and writes TFRecords with TensorFlow Datasets, in the order of the raw folder.

    python -m aitok_jax.data.prepare nyu data/nyu OUT
    python -m aitok_jax.data.prepare coco data/coco OUT
    python -m aitok_jax.data.prepare scenes OUT --train=6000 --test=400
    python -m aitok_jax.data.prepare folder photos OUT --depth=depth --semantic=labels --annotations=instances.json

The result is read where `data.root` is OUT. Files are stored as they are. `--beam` runs it with Apache Beam (install
".[prepare]"), on this machine or, with --beam_pipeline_options, on any runner whose workers see the folders under the
same paths.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from aitok_jax import paths
from aitok_jax.data import own
from aitok_jax.data.sources import coco, nyu
from aitok_jax.data.sources.files import DataError
from aitok_jax.tasks.modalities import MODALITIES, Modality
from aitok_jax.tasks.modalities.depth import Depth

COCO_COUNTS = 118287, 5000  # images of train2017 and val2017
_UNFINISHED = "unfinished"


def prepare_nyu(args: argparse.Namespace) -> None:
    source = functools.partial(nyu.NyuSource, Depth(file_scale=args.depth_scale), args.root, on_error="skip")
    train = source(args.train_list, subfolder=args.train_folder, expected_count=args.train_count)
    test = source(args.test_list, subfolder=args.test_folder, expected_count=args.test_count)
    _write_pairs(args, train, test)


def prepare_coco(args: argparse.Namespace) -> None:
    root, source = paths.expand(args.root), functools.partial(coco.CocoSource, on_error="skip")
    train, test = (
        source(paths.inside(root, images), paths.inside(root, annotations), expected_count=count)
        for images, annotations, count in (
            (args.train_images, args.train_annotations, args.train_count),
            (args.test_images, args.test_annotations, args.test_count),
        )
    )
    _write_objects(args, train, test)


def prepare_scenes(args: argparse.Namespace) -> None:
    """The built-in scenes, as pairs and as images with objects; the rendered files are deleted in the end."""
    from aitok_jax.data import scenes

    root = _aside(args) / "scenes"
    options = ("train", "test", "height", "width", "seed", "workers")
    scenes.ensure(root, **{name: getattr(args, name) for name in options})
    _write_pairs(args, nyu.NyuSource(Depth(), root), nyu.NyuSource(Depth(), root, subfolder="official_splits/test"))
    _write_objects(
        args, *(coco.CocoSource(root, root / f"annotations/instances_{split}.json") for split in ("train", "test"))
    )


def prepare_folder(args: argparse.Namespace) -> None:
    """Images with maps of the same names, an instances JSON, or both; see `own.to_evaluate` for the split."""
    folders = {name: getattr(args, name) for name in MODALITIES if getattr(args, name)}
    if not folders and not args.annotations:
        raise ValueError(
            "give --depth=FOLDER or that of other maps, --annotations=JSON, or both; images alone train nothing"
        )
    if args.fov and not 0 < args.fov < 180:
        raise ValueError(f"--fov={args.fov} must be the horizontal field of view in degrees, between 0 and 180")
    if args.fov and (not args.depth or args.normals):
        raise ValueError("--fov makes normals of depth; give --depth=FOLDER with it, and no --normals")
    for folder in (args.images, *folders.values()):
        if not paths.expand(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    annotations = paths.expand(args.annotations) if args.annotations else None
    source = coco.CocoSource(paths.expand(args.images), annotations, on_error="skip") if annotations else None

    images = paths.absolute(paths.expand(args.images))
    kinds = {name: _modality(args, name, paths.expand(folder)) for name, folder in folders.items()}
    pairs = {
        name: own.same_names(kinds[name], images, paths.absolute(paths.expand(folder)))
        for name, folder in folders.items()
    }
    names = list(dict.fromkeys(itertools.chain(*pairs.values(), source.names if source else ())))
    tested = own.to_evaluate(images, names, args.test_share, args.val)
    jobs = [(kind, name, {}) for name, kind in kinds.items()]
    jobs += [
        (kind(), kind.source, {"fov": args.fov, "source_fields": dataclasses.asdict(kinds[kind.source])})
        for name, kind in MODALITIES.items()
        if args.fov and kind.source in kinds and name not in kinds
    ]
    for kind, files, more in jobs:
        lines = [{"name": n, "image": str(images / n), files: str(path), **more} for n, path in pairs[files].items()]
        parts = {
            "train": [line for line in lines if line["name"] not in tested],
            "test": [line for line in lines if line["name"] in tested],
        }
        _build_pairs(args, kind, parts, [])
    if source:
        _write_objects(args, source, source, tested)


def _modality(args: argparse.Namespace, name: str, folder: Path) -> Modality:
    """With the fields that options give and that files beside maps, or in the folder of the images, tell."""
    kind = MODALITIES[name]
    given = {field: getattr(args, key) for key, field in kind.file_fields.items() if getattr(args, key)}
    return kind(**(kind.told(folder) or kind.told(paths.expand(args.images))), **given)


def _write_pairs(args: argparse.Namespace, train: nyu.NyuSource, test: nyu.NyuSource) -> None:
    lines = {
        split: [
            {"name": name} | {kind: str(paths.absolute(path)) for kind, path in source.paths(i).items()}
            for i, name in enumerate(source.names)
        ]
        for split, source in (("train", train), ("test", test))
    }
    broken = [f"{name}: {why}" for part in (train, test) for name, why in part.reasons.items()]
    _build_pairs(args, train.modality, lines, broken)


def _build_pairs(args: argparse.Namespace, modality: Modality, lines: dict[str, list], broken: list[str]) -> None:
    from aitok_jax.data.preparation import map_pairs, write

    description: dict[str, Any] = {"modality": modality.name, "fields": dataclasses.asdict(modality)}
    own_fields = description
    if isinstance(modality, Depth):  # the form of NYUv2
        own_fields, description = {"scale": modality.file_scale}, {"depth_scale": modality.file_scale}
    numbered = {split: _numbered([line | own_fields for line in lines[split]]) for split in lines}
    write.build(_settings(args), map_pairs.builder(modality.name), numbered, broken, description=description)


def _write_objects(
    args: argparse.Namespace,
    train: coco.CocoSource,
    test: coco.CocoSource,
    tested: Collection[str] | None = None,
) -> None:
    """With `tested`, names to evaluate on, both sources are one, whose images it divides."""
    from aitok_jax.data.preparation import write
    from aitok_jax.data.preparation.instances import CocoInstances

    if (train.category_ids, train.categories) != (test.category_ids, test.categories):
        raise DataError(f"{train.path} and {test.path} list other categories; give both the same list")
    lines = {"train": _object_lines(train), "test": _object_lines(test)}
    if tested is not None:
        lines = {
            "train": [line for line in lines["train"] if line["name"] not in tested],
            "test": [line for line in lines["test"] if line["name"] in tested],
        }
    sources = [train, test] if tested is None else [train]
    broken = [f"{source.path}: {label}: {why}" for source in sources for label, why in source.reasons.items()]
    contents = {
        split: (source.content, source.fingerprint()["annotations"])
        for split, source in (("train", train), ("test", test))
    }
    builder = functools.partial(CocoInstances, categories=train.categories)
    write.build(_settings(args), builder, {split: _numbered(lines[split]) for split in lines}, broken, contents)


def _object_lines(source: coco.CocoSource) -> list[dict[str, Any]]:
    """What the builder reads of every image of the JSON."""
    of_image = collections.defaultdict(list)
    for annotation in source.content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    classes = {category: i for i, category in enumerate(source.category_ids)}
    return [
        {
            "name": entry["file_name"],
            "path": str(paths.absolute(source.image_path(entry["file_name"]))),
            "json": str(source.path),
            "entry": entry,
            "annotations": of_image[entry["id"]],
            "labels": [classes[annotation["category_id"]] for annotation in of_image[entry["id"]]],
        }
        for entry in source.content["images"]
    ]


def _numbered(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"index": i, **line} for i, line in enumerate(lines)]


def _settings(args: argparse.Namespace) -> Any:
    from aitok_jax.data.preparation.write import Settings

    options = args.beam_pipeline_options
    return Settings(
        paths.expand(args.out), _aside(args), args.max_broken, args.manifest, args.beam or bool(options), options
    )


def _aside(args: argparse.Namespace) -> Path:
    """Where what is not finished is: in OUT or, for a bucket, on this machine."""
    return (Path(args.aside) if paths.is_url(args.out) else paths.expand(args.out).absolute()) / _UNFINISHED


def _endings(modality: str) -> str:
    first, *others = MODALITIES[modality].suffixes
    return first + (f" ({', '.join(others)})" if others else "")


_DEPTH_SCALE = (0.0, "values a metre in depth files; 0: 1000 of whole numbers (millimetres), 1 of floats")
_COMMON = {
    "max_broken": (0, "broken files and annotations to leave out before it is an error"),
    "manifest": ("", "prepared folder whose names and hashes the files must have"),
    "beam": (False, "run with Apache Beam"),
    "beam_pipeline_options": ("", "the same with options, as in runner=FlinkRunner,parallelism=8"),
}
_KINDS = {  # of each: its function, what it prepares, positional arguments, options with their defaults
    "nyu": (
        prepare_nyu,
        "NYUv2, or any folder in its layout",
        ["root"],
        {
            "train_list": ("", "list of pairs, as the reader takes it; without, the folder is looked through"),
            "test_list": ("", "the same to evaluate on"),
            "train_folder": ("", "folder in ROOT that the training pairs are relative to"),
            "test_folder": ("official_splits/test", "the same to evaluate on"),
            "train_count": (nyu.TRAIN_COUNT, "training pairs that there must be; 0 = any"),
            "test_count": (nyu.TEST_COUNT, "the same to evaluate on"),
            "depth_scale": _DEPTH_SCALE,
        },
    ),
    "coco": (
        prepare_coco,
        "COCO 2017, or any images with instances JSONs",
        ["root"],
        {
            "train_images": ("train2017", "folder in ROOT"),
            "test_images": ("val2017", "folder in ROOT"),
            "train_annotations": ("annotations/instances_train2017.json", "JSON in ROOT"),
            "test_annotations": ("annotations/instances_val2017.json", "JSON in ROOT"),
            "train_count": (COCO_COUNTS[0], "training images that there must be; 0 = any"),
            "test_count": (COCO_COUNTS[1], "the same to evaluate on"),
        },
    ),
    "scenes": (
        prepare_scenes,
        "built-in scenes, rendered first",
        [],
        {
            "train": (6000, "training frames"),
            "test": (400, "frames to evaluate on"),
            "height": (480, "pixels"),
            "width": (640, "pixels"),
            "seed": (0, "another seed gives other scenes"),
            "workers": (os.cpu_count() or 1, "processes that render"),
        },
    ),
    "folder": (
        prepare_folder,
        "your own images",
        ["images"],
        {
            **{name: ("", f"folder of {name} maps: a/b{_endings(name)} for IMAGES/a/b.jpg") for name in MODALITIES},
            "depth_scale": _DEPTH_SCALE,
            "fov": (
                0.0,
                "the camera's horizontal field of view in degrees: also makes normals of the depth, if none are given",
            ),
            "first_label": (0, "of semantic maps, whose classes FOLDER/classes.txt names; 1 where 0 is no class"),
            "annotations": ("", "instances JSON (COCO) with file names relative to IMAGES"),
            "test_share": (0.1, "share of the images to evaluate on: whole folders, or runs of consecutive names"),
            "val": ("", "folder in IMAGES to evaluate on; so do IMAGES/train.txt and val.txt, lists of names, divide"),
        },
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aitok_jax.data.prepare", description="Prepares data as TFRecords.")
    kinds = parser.add_subparsers(required=True, metavar="|".join(_KINDS))
    for name, (run, about, positional, options) in _KINDS.items():
        kind = kinds.add_parser(name, help=about, description=about)
        for argument in [*positional, "out"]:
            kind.add_argument(argument, help="folder")
        for option, (default, meaning) in (options | _COMMON).items():
            how = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
            kind.add_argument(f"--{option}", help=meaning + (f" (default {default})" if default else ""), **how)
        kind.set_defaults(run=run)
    return parser


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="aitok_prepare_") as args.aside:
        try:
            args.run(args)
            shutil.rmtree(_aside(args))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
