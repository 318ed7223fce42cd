"""Somebody's folder: which images have maps or annotations, and which of these are for evaluation."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from aitok_jax import paths
from aitok_jax.command_line.progress import progress_bar
from aitok_jax.data import splits
from aitok_jax.data.sources import coco, prepared
from aitok_jax.data.sources.files import READ_ERRORS, DataError, read_file
from aitok_jax.data.sources.pairs import decode_pair
from aitok_jax.tasks.modalities import MODALITIES, Modality
from aitok_jax.tasks.modalities.modality import Layout


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is to train on.

    Attributes:
      data: what `datasets.build` reads it by: root, and lists or JSONs.
      train, val: how many images.
      categories: names of the classes of objects.
      fields: of the modality, that the folder tells.
    """

    data: Mapping[str, Any]
    train: int
    val: int
    categories: Sequence[str] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_maps(
    modality: str,
    root: str,
    lists: Path,
    *,
    maps: str = "",
    val: str = "",
    share: float = 0.15,
    on_error: str = "raise",
    **options: Any,
) -> Found:
    """Images with maps of a modality, all read once and divided; the lists are written into the folder `lists`.

    They are prepared data; or in the layout of NYUv2, or of a public data set that the modality knows; or images with
    maps of the same names, which are in the folder `maps`, or in ROOT/MODALITY beside ROOT/images, or beside the
    images. `options` are the modality's, before what the folder tells.

    Raises:
      FileNotFoundError: no such folder; DataError: no pairs in it, or broken ones, which on_error='skip' leaves out.
    """
    folder = _folder(root)
    if place := prepared.find(folder, prepared.kind_of(modality)):
        train, test = prepared.nyu_sources(place, train_images=False, counts=(0, 0))
        fields = {name: getattr(train.modality, name) for name in prepared.told_fields(place)}
        return Found({"root": str(place), "test_subfolder": ""}, len(train), len(test), fields=fields)
    layout = None if maps else _layout(modality, folder)
    told = {**(layout.fields if layout else {}), **MODALITIES[modality].told(folder)}
    kind = MODALITIES[modality](**{**told, **options})
    images = folder / "images" if (folder / "images").is_dir() and not maps else folder
    other = paths.expand(maps) if maps else folder / modality if images != folder else folder
    if layout:
        images, other = folder / layout.images, folder / layout.maps
        val = val or layout.val
    if maps and not other.is_absolute() and not other.is_dir():
        other = folder / maps
    if not other.is_dir():
        raise FileNotFoundError(f"{other}: no such folder of {modality} maps; give it by --config.data.maps")
    pairs = _nyu_names(kind, images) if other == images else {}
    endings = layout.endings if layout else ("", "")
    pairs = pairs or {name: path for name, path in same_names(kind, images, other, endings).items() if path.is_file()}
    if not pairs:
        raise DataError(
            f"{folder}: no image with a {modality} map; expected are {kind.pair.format('NAME')} beside rgb_NAME.jpg, "
            f"or maps of the images' names ({', '.join(kind.suffixes)}) in {folder}/{modality} beside {folder}/images, "
            "or in the folder that --config.data.maps names"
        )
    _drop_broken(kind, images, pairs, on_error)
    chosen = to_evaluate(images, list(pairs), share, val)
    parts = {"train": [], "val": []}
    local = paths.is_url(images) and not paths.is_url(other)  # the maps alone; lists name local files from their root
    base = paths.absolute(other) if local else images
    for name, path in pairs.items():
        places = [_place(each, base) for each in (images / name, path)]
        parts["val" if name in chosen else "train"].append("\t".join(places))
    for part, lines in parts.items():
        paths.write_text(lists / f"{part}.txt", "\n".join(lines) + "\n")
    data = {"root": str(base), "train_list": str(lists / "train.txt"), "test_list": str(lists / "val.txt")}
    data |= {"test_subfolder": "", **{key: getattr(kind, field) for key, field in kind.file_fields.items()}}
    fields = {name: value for name, value in told.items() if name not in kind.file_fields.values()}
    return Found(data, len(parts["train"]), len(parts["val"]), fields=fields)


def find_objects(
    root: str, lists: Path, *, annotations: str = "", val: str = "", share: float = 0.15, masks: bool = True
) -> Found:
    """Images with an instances JSON, divided; or prepared data.

    The JSON is `annotations`, or the only one of its kind in ROOT or ROOT/annotations; its images are in ROOT, or in
    ROOT/images.

    Raises:
      FileNotFoundError: no such folder or JSON; DataError: several, or annotations that are broken.
    """
    folder = _folder(root)
    if place := prepared.find(folder, "coco"):
        train, test = (prepared.PreparedCoco(place, split, masks=masks) for split in ("train", "test"))
        return Found({"root": str(place)}, len(train), len(test), train.categories)
    file = paths.expand(annotations) if annotations else _instances(folder)
    images = next((each for each in (folder, folder / "images", file.parent) if _has_images(each, file)), folder)
    source = coco.CocoSource(images, file, masks=masks)
    names = [entry["file_name"] for entry in source.content["images"]]
    chosen = to_evaluate(images, names, share, val)
    counts = {}
    for part in ("train", "val"):
        kept = [e for e in source.content["images"] if (e["file_name"] in chosen) == (part == "val")]
        ids, counts[part] = {entry["id"] for entry in kept}, len(kept)
        own = [each for each in source.content["annotations"] if each["image_id"] in ids]
        content = {**source.content, "images": kept, "annotations": own}
        paths.write_text(lists / f"instances_{part}.json", json.dumps(content))
    data = {"root": str(images), "train_images": "", "test_images": ""}
    data |= {"train_annotations": str(lists / "instances_train.json")}
    data |= {"test_annotations": str(lists / "instances_val.json")}
    return Found(data, counts["train"], counts["val"], source.categories)


def to_evaluate(images: Path, names: Sequence[str], share: float, val: str = "") -> set[str]:
    """The names to evaluate on: those of the folder `val` in `images`, or by lists there, or by `splits.choose`.

    Near-duplicates across the split are counted, and said.
    """
    if val:
        chosen = {name for name in names if Path(name).is_relative_to(val)}
        if not chosen or len(chosen) == len(names):
            raise ValueError(
                f"val={val!r} holds {len(chosen)} of {len(names)} images in {images}; give one of its folders"
            )
    else:
        chosen = splits.listed(images, names)
        chosen = splits.choose(names, share) if chosen is None else chosen
    splits.warn_of_near_duplicates(
        [images / name for name in names if name not in chosen], [images / n for n in chosen]
    )
    return chosen


def same_names(modality: Modality, images: Path, maps: Path, endings: tuple[str, str] = ("", "")) -> dict[str, Path]:
    """The map of every image, by the image's name; it has the same name in the other folder, or none and is missing.

    But for `endings`, of the image's name without suffix and of the map's; names of other endings are passed over.
    """
    found, others = paths.find(images, paths.IMAGE_SUFFIXES)
    at_maps, more = paths.find(maps, modality.suffixes)
    found, at_maps = (
        [p for p in each if p.stem.endswith(e)] for each, e in zip((found, at_maps), endings, strict=True)
    )
    companions = paths.Companions([*at_maps, *more], modality.suffixes)
    pairs, used = {}, set()
    for path in found:
        name = path.relative_to(images)
        stem = name.stem.removesuffix(endings[0]) + endings[1]
        expected = maps / name.with_name(stem + modality.suffixes[0])
        map_path = companions.of(expected) or expected
        if map_path == path or (maps != images and path.is_relative_to(maps)):  # it is a map itself
            continue
        used.add(map_path)
        pairs[name.as_posix()] = map_path
    for kind, passed in {
        "no image": others,
        f"no {modality.name} map of an image": [path for path in at_maps if path not in used],
    }.items():
        if passed:
            logging.warning("passed over what is %s: %s", kind, paths.listed(passed))
    return pairs


def _drop_broken(modality: Modality, images: Path, pairs: dict[str, Path], on_error: str) -> None:
    """Reads every pair; broken ones are an error, or with on_error='skip' are dropped and said."""
    broken = {}
    for name, map_path in progress_bar(pairs.items(), desc="check", unit="pair", leave=False):
        try:
            decode_pair(modality, read_file(map_path), read_file(images / name))
        except READ_ERRORS as error:
            broken[name] = str(error)
    if not broken:
        return
    said = f"{len(broken)} of {len(pairs)} pairs cannot be read, the first because {next(iter(broken.values()))}"
    if on_error == "raise":
        raise DataError(f"{said} (of all of them: --config.data.on_error=skip)")
    logging.warning("left out %s: %s", paths.listed(broken), said)
    for name in broken:
        del pairs[name]


def _layout(modality: str, folder: Path) -> Layout | None:
    """That of the public data set in a folder, if it is one: both have the folder that is evaluated on."""
    for layout in MODALITIES[modality].layouts:
        if all((folder / name / layout.val).is_dir() for name in (layout.images, layout.maps)):
            return layout
    return None


def _nyu_names(modality: Modality, folder: Path) -> dict[str, Path]:
    """Images rgb_NAME with their maps, in the layout of NYUv2."""
    found, others = paths.find(folder, paths.IMAGE_SUFFIXES)
    companions = paths.Companions([*found, *others], modality.suffixes)
    pairs = {}
    for path in found:
        if path.name.startswith("rgb_"):
            map_path = companions.of(path.with_name(modality.pair.format(path.stem.removeprefix("rgb_"))))
            if map_path:
                pairs[path.relative_to(folder).as_posix()] = map_path
    return pairs


def _place(path: Path, base: Path) -> str:
    """A path from a folder, or the URL of what lies elsewhere in a bucket."""
    if paths.is_url(path):
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
    return Path(os.path.relpath(path, base)).as_posix()


def _folder(root: str) -> Path:
    if not root:
        raise ValueError("data.root is empty; give your folder, as in --config.data.root=my_frames")
    folder = paths.absolute(paths.expand(root))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; set --config.data.root to your folder of images")
    return folder


def _instances(folder: Path) -> Path:
    files = sorted(file for place in (folder, folder / "annotations") for file in place.glob("*.json"))
    found = [file for file in files if {"images", "annotations", "categories"} <= _keys(file)]
    if len(found) != 1:
        what = f"several instances JSONs ({paths.listed(found)})" if found else "no instances JSON"
        raise FileNotFoundError(f"{folder}: {what}; name one by --config.data.annotations=FILE")
    return found[0]


def _keys(file: Path) -> Collection[str]:
    try:
        content = json.loads(paths.read(file))
    except ValueError:  # a JSON of somebody else
        return set()
    return content.keys() if isinstance(content, dict) else set()


def _has_images(folder: Path, annotations: Path) -> bool:
    content = json.loads(paths.read(annotations)) if annotations.is_file() else {}
    entries = content["images"][:1] if isinstance(content, dict) and isinstance(content.get("images"), list) else []
    return any(isinstance(e, dict) and (folder / str(e.get("file_name", ""))).is_file() for e in entries)
