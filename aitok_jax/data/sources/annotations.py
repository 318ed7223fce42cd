"""Instances JSONs (COCO): every value that is used is checked by type and range when the file is loaded.

What can be read in one way only is read: 2.0 or "2" as 2, an area that is missing or 0 from the mask, another form of
the same mask. The rest is a fault, with a label that names the entry.
"""

import collections
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from aitok_jax import image, paths
from aitok_jax.data.sources import segmentations
from aitok_jax.data.sources.files import DataError, digest
from aitok_jax.data.sources.segmentations import Wrong, shown

Annotation = dict[str, Any]

MIN_SIDE = 1.0  # pixels: annotations with a shorter side are no training objects
_NO_AREA = 1e-6  # rounding gives flat polygons as much
_MAX_AREA = 1e10  # pycocotools counts no larger objects
_INT64, _NUMBERS = 2**63, (int, float)
_MAX_PART, _MAX_PATH = 255, 4000  # bytes
_CHUNK = 500_000  # numbers or characters of masks to check at once
_LISTED = 5  # ids of each kind of fault in the log
_WITHOUT_MASKS = "; boxes alone do where mask_size is 0"
_LISTS = "images", "categories", "annotations"
_OF_IMAGES, _OF_CATEGORIES = ("id", "file_name", "height", "width"), ("id", "name")


class Fault(NamedTuple):
    """An entry that is left out: its label, the kind of the fault, for counting, and a sentence."""

    label: str
    kind: str
    text: str


def load(path: Path, folder: Path, *, masks: bool, on_error: str) -> tuple[dict[str, Any], str, list[Fault]]:
    """The content of a JSON as pycocotools takes it, the digest of the file, and what was left out of the content.

    Args:
      folder: of the images.
      masks: False needs no masks; broken ones are taken off their annotations.
      on_error: 'raise' refuses a file with faults; 'skip' leaves them out, counted in the log.
    """
    content, file_digest = _read(path)
    images, faults = _checked(path, "image", content["images"], _image_reader(folder), on_error)
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    if not sizes:
        raise DataError(f"{path}: no images that can be used: {counted(faults)}; correct them")
    if len(sizes) != len(images):
        raise DataError(f"{path}: two images have one id; give each its own")
    gone, categories = {fault.label for fault in faults}, _categories(content["categories"], path)
    reader = _AnnotationReader(sizes, gone, categories, masks)
    sound, more = _checked(path, "annotation", content["annotations"], reader.read, on_error, reader.finish)
    content |= {"images": images, "annotations": sound}
    for count, what in ((reader.areas, "areas computed from the mask or box"), (reader.bare, "broken masks not used")):
        if count:
            logging.info("%s: %d %s", path.name, count, what)
    return content, file_digest, faults + more


def counted(faults: list[Fault]) -> str:
    """How many faults there are of each kind, and the first ids."""
    groups = collections.defaultdict(list)
    for fault in faults:
        groups[fault.kind].append(fault.label.split(" ", 1)[-1])
    parts = []
    for kind, ids in sorted(groups.items(), key=lambda group: -len(group[1])):
        first = ", ".join([*ids[:_LISTED], *["..."] * (len(ids) > _LISTED)])
        parts.append(f"{len(ids)} {kind} (id{'s' * (len(ids) > 1)} {first})")
    return ", ".join(parts)


def corners(annotation: Annotation, height: int, width: int) -> tuple[float, float, float, float]:
    """The box as x1 y1 x2 y2, clipped to the image."""
    x, y, w, h = annotation["bbox"]
    return min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)


def has_extent(annotation: Annotation, height: int, width: int) -> bool:
    """Whether it is a training object: sides of 1 px or more, an area, and some of its box inside the image."""
    x1, y1, x2, y2 = corners(annotation, height, width)
    return min(annotation["bbox"][2:]) >= MIN_SIDE and annotation.get("area", 1.0) > 0 and x1 < x2 and y1 < y2


def _read(path: Path) -> tuple[dict[str, list], str]:
    """The lists of a JSON, entries unchecked, and the digest of the file."""
    try:
        text = paths.read(path)
        content = _parsed(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotations file; set data.root and the annotation files") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give an instances JSON") from error
    except RecursionError:
        raise DataError(f"{path}: its JSON is nested too deep; use an instances JSON") from None
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON ({error}); download it again") from error
    for name in _LISTS:
        if type(content) is not dict or type(content.get(name)) is not list:
            raise DataError(f"{path}: no list {name!r}; an instances JSON has the lists {', '.join(_LISTS)}")
    if not content["images"]:
        raise DataError(f"{path}: no images; use an instances JSON as published")
    return content, digest(text)


def _parsed(text: bytes, margin: int = 50) -> Any:
    """Refuses what is nested so deep that it could not be written again a few calls further down."""
    return _parsed(text, margin - 1) if margin else json.loads(text)


def _checked(
    path: Path,
    what: str,
    entries: list[Any],
    read: Callable[[Any], None],
    on_error: str,
    finish: Callable[[list[Any]], dict[int, Wrong]] = lambda entries: {},
) -> tuple[list[Any], list[Fault]]:
    """The sound ones of a list, and the faults of the others, which are an error or are counted in the log.

    Args:
      read: raises Wrong for an entry, or corrects it in place; `finish` does so for the sound ones together.
    """
    wrong, ids, twice = {}, set(), set()
    for i, entry in enumerate(entries):
        try:
            read(entry)
            if what == "annotation" and entry["id"] in ids:
                twice.add(i)
                raise Wrong("id given before", f"another one has the id={entry['id']}")
            ids.add(entry["id"])
        except Wrong as problem:
            wrong[i] = problem
    left = [i for i in range(len(entries)) if i not in wrong] if wrong else range(len(entries))
    sound = [entries[i] for i in left]
    if late := finish(sound):
        wrong |= {left[i]: problem for i, problem in late.items()}
        sound = [entry for i, entry in enumerate(sound) if i not in late]
    if not wrong:
        return sound, []
    faults = [Fault(_label(what, i, entries[i], i in twice), wrong[i].kind, str(wrong[i])) for i in sorted(wrong)]
    if on_error == "raise":
        more = f"; {len(faults) - 1} more are broken" if len(faults) > 1 else ""
        raise DataError(
            f"{path}: {faults[0].label}: {faults[0].text}; correct it, or set on_error='skip' to leave it out{more}"
        )
    logging.warning("%s: %d of %d %ss left out: %s", path.name, len(faults), len(entries), what, counted(faults))
    return sound, faults


def _label(what: str, place: int, entry: Any, twice: bool) -> str:
    """'annotation 5', or 'annotation [0]', the first of the list, where that names none."""
    value = entry.get("id") if type(entry) is dict else None
    return f"{what} {shown(value)}" if type(value) is int and not twice else f"{what} [{place}]"


def _replace(entry: dict[str, Any], name: str, read: Callable[[Any], Any], wanted: str) -> Any:
    """Reads a field in place; Wrong where it is not what is wanted."""
    value = entry[name]
    try:
        found = read(value)
    except ValueError:
        raise Wrong(f"{name} that is not {wanted}", f"its {name}={shown(value)} must be {wanted}") from None
    if found is not value:
        entry[name] = found
    return found


def _need(entry: Any, names: tuple[str, ...], plural: str = "") -> None:
    missing = [name for name in names if type(entry) is not dict or name not in entry]
    if missing:
        alone = missing == ["segmentation"]
        rule = f"{plural} must have {', '.join(names)}, but " if plural else ""
        kind = "segmentation missing" if alone else f"without {', '.join(missing)}"
        text = f"{rule}it has no {', '.join(missing)}" + _WITHOUT_MASKS * alone
        raise Wrong(kind, text + f" ({shown(entry)})" * (type(entry) is not dict))


def _categories(entries: list[Any], path: Path) -> set[int]:
    """Their ids. Faults are always an error, since without a category the others would have other class numbers."""
    if not entries:
        raise DataError(f"{path}: no categories; use an instances JSON as published")
    names = collections.Counter()
    for i, entry in enumerate(entries):
        try:
            _need(entry, _OF_CATEGORIES, "categories")
            _replace(entry, "id", segmentations.whole, "a whole number")
            names[_replace(entry, "name", _name, "a text or a whole number")] += 1
        except Wrong as problem:
            raise DataError(f"{path}: {_label('category', i, entry, False)}: {problem}; correct it") from None
    ids = {entry["id"] for entry in entries}
    if len(ids) != len(entries):
        raise DataError(f"{path}: two categories have one id; give each its own")
    name, count = names.most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {count} categories have the name {shown(name)}; give each its own, or merge them")
    return ids


def _name(value: Any) -> str:
    if type(value) is int:
        return str(value)
    if type(value) is not str or not value.strip() or value.splitlines() != [value]:
        raise ValueError(value)
    value.encode()  # what cannot be is a ValueError
    return value


def _image_reader(folder: Path) -> Callable[[Any], None]:
    bound = min(image.max_pixels(), segmentations.MAX_PIXELS)

    def read(entry: Any) -> None:
        _need(entry, _OF_IMAGES, "images")
        _replace(entry, "id", segmentations.whole, "a whole number")
        for name in ("height", "width"):
            _replace(entry, name, _side, "a whole number of pixels, at least 1")
        if entry["height"] * entry["width"] > bound:
            size = f"its height={entry['height']} and width={entry['width']} are more than {bound} pixels"
            raise Wrong("size of too many pixels", f"{size} (AITOK_MAX_PIXELS)")
        entry["file_name"] = _file_name(entry["file_name"], folder)

    return read


def _side(value: Any) -> int:
    if (side := segmentations.whole(value)) < 1:
        raise ValueError(value)
    return side


def _file_name(name: Any, folder: Path) -> str:
    """The name; one with backslashes, as of Windows, with slashes where that is the file there is."""
    if type(name) is not str or not name.strip() or "\0" in name:
        raise Wrong("file_name that is no name", f"its file_name={shown(name)} must be a text that names a file")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise Wrong("file_name that is no name", f"its file_name={shown(name)} has characters of no file") from None
    if len(encoded) > _MAX_PATH or max(map(len, encoded.split(b"/"))) > _MAX_PART:
        bounds = f"{_MAX_PATH} bytes of a path, or a part of it than {_MAX_PART}"
        raise Wrong("file_name that is too long", f"its file_name={shown(name)} is longer than the {bounds}")
    if "\\" in name and not os.path.lexists(folder / name) and os.path.exists(folder / name.replace("\\", "/")):
        return name.replace("\\", "/")
    return name


class _AnnotationReader:
    """Reads annotations in place: first each one's fields, then all masks.

    Attributes:
      areas: how many areas were computed.
      bare: how many masks were taken off because they are broken, where none are needed.
    """

    def __init__(self, sizes: dict[int, tuple[int, int]], gone: set[str], categories: set[int], masks: bool):
        self.areas = self.bare = 0
        self._sizes, self._gone, self._categories, self._masks = sizes, gone, categories, masks
        self._names = ("id", "image_id", "category_id", "bbox", *(("segmentation",) if masks else ()))
        self._needed = frozenset(self._names)

    def read(self, entry: Any) -> None:
        if type(entry) is not dict or not self._needed <= entry.keys():
            _need(entry, self._names)
        for name in ("id", "image_id", "category_id"):
            if type(entry[name]) is not int or not -_INT64 <= entry[name] < _INT64:
                _replace(entry, name, segmentations.whole, "a whole number")
        image_id, category_id = entry["image_id"], entry["category_id"]
        if image_id not in self._sizes:
            if f"image {image_id}" in self._gone:
                raise Wrong("image left out", f"its image_id={image_id} is of an image that is left out")
            raise Wrong("image unknown", f"its image_id={image_id} is not among the images of the JSON")
        if category_id not in self._categories:
            text = f"unknown category_id={category_id}, the JSON lists {len(self._categories)} categories"
            raise Wrong("category unknown", text)
        crowd = entry.setdefault("iscrowd", 0)
        if type(crowd) is not int or crowd not in (0, 1):
            _replace(entry, "iscrowd", _flag, "0 or 1")
        if type(area := entry.get("area", 0)) not in _NUMBERS or not 0 <= area <= _MAX_AREA:
            if area is None:
                del entry["area"]
            else:
                _replace(entry, "area", _area, f"a number from 0 to {_MAX_AREA:g}")
        height, width = self._sizes[image_id]
        _read_box(entry, height, width)
        self._form(entry, height, width)

    def _form(self, entry: Annotation, height: int, width: int) -> None:
        try:
            if self._masks or entry.get("segmentation"):
                entry["segmentation"] = segmentations.formed(entry["segmentation"], height, width)
                return
        except Wrong as problem:
            if not self._masks:
                self.bare += 1
            elif problem.kind == "segmentation missing":
                raise Wrong(problem.kind, f"{problem}{_WITHOUT_MASKS}") from None
            else:
                raise
        entry.pop("segmentation", None)

    def finish(self, entries: list[Annotation]) -> dict[int, Wrong]:
        """Checks the masks, and fills in areas."""
        wrong = {}
        for chunk in _chunks(entries):
            sizes = [self._sizes[entries[i]["image_id"]] for i in chunk]
            areas, inside, found = segmentations.check([entries[i]["segmentation"] for i in chunk], sizes)
            for place, (i, area, seen) in enumerate(zip(chunk, areas.tolist(), inside.tolist(), strict=True)):
                problem = found.get(place) or self._fill(entries[i], area, seen, *sizes[place])
                if problem and self._masks:
                    wrong[i] = problem
                elif problem:
                    self.bare += 1
                    del entries[i]["segmentation"]
        for entry in entries:
            if "segmentation" not in entry and not entry.get("area"):
                self.areas += 1
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        return wrong

    def _fill(self, entry: Annotation, area: float, inside: bool, height: int, width: int) -> Wrong | None:
        """Fills in an area that is missing or 0; or what is wrong with a mask that its box says to be there."""
        given = entry.get("area")
        if min(entry["bbox"][2:]) >= MIN_SIDE and (given is None or given > 0 or area > 0):
            if not inside:
                return Wrong("polygons outside the image", f"its polygons are outside its image of {height}x{width}")
            if area == 0:
                kind = "degenerate mask" if type(entry["segmentation"]) is dict else "degenerate polygon"
                return Wrong(kind, f"{kind} of zero area, though area={given} and bbox={shown(entry['bbox'])}")
        if not given and area < _NO_AREA:
            entry.setdefault("area", 0.0)
        elif not given:
            self.areas += 1
            entry["area"] = area
        return None


def _chunks(entries: list[Annotation]) -> Iterator[list[int]]:
    """Indices of those with a mask."""
    chunk, total = [], 0
    for i, entry in enumerate(entries):
        if "segmentation" in entry:
            chunk.append(i)
            total += segmentations.weight(entry["segmentation"])
            if total > _CHUNK:
                yield chunk
                chunk, total = [], 0
    if chunk:
        yield chunk


def _flag(value: Any) -> int:
    """JSON's null is none, true is 1."""
    if (read := int(value or 0) if value is None or type(value) is bool else segmentations.whole(value)) not in (0, 1):
        raise ValueError(value)
    return read


def _area(value: Any) -> float:
    if not 0 <= (read := segmentations.number(value)) <= _MAX_AREA:
        raise ValueError(value)
    return read


def _read_box(entry: Annotation, height: int, width: int) -> None:
    box = entry["bbox"]
    if type(box) is not list or len(box) != 4:
        raise _box_fault(box, "that is not 4 numbers", " must be x, y, width, height")
    if not {int, float}.issuperset(map(type, box)) or not segmentations.finite(box):
        try:
            box = entry["bbox"] = [segmentations.number(value) for value in box]
        except ValueError as error:
            but = f" must be x, y, width, height, but {error} is no finite number"
            raise _box_fault(box, "that is not 4 numbers", but) from None
    x, y, w, h = box
    if w < 0 or h < 0:
        raise _box_fault(box, "with a negative side", " must be x, y, width, height, but a side is negative")
    far = (1 + segmentations.FAR) * max(height, width)
    if not (-far <= x <= far and -far <= y <= far and w <= 2 * far and h <= 2 * far):
        raise _box_fault(box, "far outside the image", f" is far outside its image of {height}x{width}")
    if w >= MIN_SIDE <= h and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
        raise _box_fault(box, "outside the image", f" is outside its image of {height}x{width}")


def _box_fault(box: Any, kind: str, text: str) -> Wrong:
    return Wrong(f"bbox {kind}", f"bbox={shown(box)}{text}")
