"""COCO: images with boxes, classes and instance masks from an instances JSON as published."""

import contextlib
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from aitok_jax.data.sources.files import DataError, File, Skipping, decode_image, digest, read_file

Annotation = dict[str, Any]

_MIN_SIDE = 1.0  # pixels: annotations with a shorter side are no training objects


class CocoSource(Skipping):
    """Random access to images with their objects.

    Classes are numbered 0, 1, … in the order of the category ids of the JSON. Crowd regions (iscrowd = 1) are no
    objects; they only count in the evaluation, through `coco`.

    Args:
      images: the folder that the file names of the JSON are relative to.
      annotations: the instances JSON; masks are polygons or run-length codes, compressed or not.
      with_objects: leave out images without an object, for training (117266 of COCO train2017 remain).
      masks: False gives no masks and needs no `segmentation` in the JSON.
      on_error: 'raise' refuses broken annotations and images; 'skip' leaves out broken annotations, and lets
        `read_readable` (and so the pipeline) go on without broken images.
      cache: keep decoded examples in memory (about 1 MB for a 640x480 image, and 40 kB an object).
      expected_count: the number of images that there must be; 0 = any.

    Attributes:
      names: list[str], file names, one per image.
      ids: list[int], COCO image ids.
      sizes: int32[N,2] (height, width).
      content: dict, the whole JSON, without broken annotations.
      categories: list[str], the name of each class.
      category_ids: list[int], the COCO id of each class.
      skipped: set[str], what was left out so far because it is broken: file names, and 'annotation ID'.

    Raises:
      FileNotFoundError: no such folder or JSON.
      DataError: a malformed JSON, one without images or without objects, another count than expected; an annotation
        with missing fields, an unknown image or category, a degenerate polygon, or a code of another size.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        with_objects: bool = False,
        masks: bool = True,
        on_error: str = "raise",
        cache: bool = False,
        expected_count: int = 0,
    ):
        super().__init__(on_error)
        self.masks, self.path = masks, Path(annotations)
        self._folder, self._cache = Path(images), {} if cache else None
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder}: no such folder of images; set data.root and the image folders")
        self.content, self._digest = _load(self.path)
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.categories = [category["name"] for category in categories]
        self._classes = {category_id: i for i, category_id in enumerate(self.category_ids)}
        of_image = self._objects_by_image()
        kept = [image for image in self.content["images"] if of_image[image["id"]] or not with_objects]
        if expected_count and len(kept) != expected_count:
            raise DataError(
                f"{self.path}: {len(kept)} images{' with objects' * with_objects}, but expected_count={expected_count};"
                " use the published file, or set the expected count to 0"
            )
        self.names = [image["file_name"] for image in kept]
        self.ids = [image["id"] for image in kept]
        self.sizes = np.array([(image["height"], image["width"]) for image in kept], np.int32)
        self._objects = [of_image[image["id"]] for image in kept]

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def coco(self) -> Any:
        """The pycocotools COCO object of the whole JSON, crowd regions included."""
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = self.content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def annotations(self, index: int) -> list[Annotation]:
        """All objects of an image as in the JSON, without crowd regions."""
        return list(self._objects[index])

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Decodes one example with n objects; those with a side under 1 px or without area are left out.

        Returns:
          `image` uint8[H,W,3] RGB; `boxes` float32[n,4] x1 y1 x2 y2 in pixels, inside the image; `classes` int32[n];
          `masks` uint8[n,H,W] 0/1, where the source gives masks.

        Raises FileNotFoundError or DataError (whatever `on_error` says) where the example is broken.
        """
        if self._cache is None:
            return self._decoded(index)
        if index not in self._cache:
            example = self._decoded(index)
            if self.masks:
                example["masks"] = np.packbits(example["masks"], axis=2)
            for array in example.values():
                array.setflags(write=False)
            self._cache[index] = example
        example = dict(self._cache[index])
        if self.masks:
            example["masks"] = np.unpackbits(example["masks"], axis=2, count=self.sizes[index, 1])
        return example

    def mask(self, index: int, annotation: Annotation) -> np.ndarray:
        """uint8[H,W] 0/1 of one of the `annotations` of an image."""
        return decode_masks([annotation], *self.sizes[index].tolist(), self.path)[0]

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a run to go on with this data."""
        names = digest("\n".join(self.names).encode())
        return {"examples": len(self), "names": names, "annotations": self._digest}

    def image_path(self, name: str) -> Path:
        return self._folder / name

    def _file(self, index: int) -> File:
        return read_file(self.image_path(self.names[index]))

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        height, width = self.sizes[index].tolist()
        image = decode_sized(self._file(index), height, width, self.path)
        objects = [annotation for annotation in self._objects[index] if _has_extent(annotation, height, width)]
        example = {
            "image": image,
            "boxes": np.array([_corners(o, height, width) for o in objects], np.float32).reshape(-1, 4),
            "classes": np.array([self._classes[o["category_id"]] for o in objects], np.int32),
        }
        if self.masks:
            example["masks"] = decode_masks(objects, height, width, self.path)
        return example

    def _objects_by_image(self) -> dict[int, list[Annotation]]:
        """The objects of each image id; broken annotations raise, or are taken out of the JSON's content."""
        images = {image["id"]: image for image in self.content["images"]}
        objects, sound = {image_id: [] for image_id in images}, []
        for annotation in self.content["annotations"]:
            problem = _problem(annotation, images, self._classes, self.masks)
            if not problem:
                annotation.setdefault("iscrowd", 0)
                annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
                sound.append(annotation)
                if not annotation["iscrowd"]:
                    objects[annotation["image_id"]].append(annotation)
                continue
            label = f"annotation {annotation.get('id') if isinstance(annotation, dict) else annotation!r}"
            if self.on_error == "raise":
                raise DataError(f"{self.path}: {label}: {problem}; correct it, or set on_error='skip' to leave it out")
            self._skip(label, problem)
        self.content["annotations"] = sound
        if not any(objects.values()):
            raise DataError(
                f"{self.path}: no annotation of an object among {len(images)} images: nothing to train on or to "
                "compare with; use an instances JSON"
            )
        return objects


class MaskSource(Skipping):
    """Each object of a `CocoSource`, for the mask tokenizer: its mask cropped at its box.

    The box is rounded to whole pixels inside the image, at least one (the published evaluation leaves out boxes under
    two); the crop is resized to size x size bilinearly, smoothed where it shrinks, and binarised at 1/2.

    Args:
      source: its images are never opened.
      size: side of the examples in pixels.
      cache: keep the examples in memory, as bits.
      expected_count: the number of objects that there must be; 0 = any.

    Attributes:
      source: as given.
      images: int32[N], the index into `source` of each example's image.
      annotations: list, the JSON's entry of each example.
      boxes: int32[N,4], x1 y1 x2 y2 of the crop in pixels.
      names: list[str], 'FILE#ANNOTATION_ID'.
      skipped: as in `CocoSource`.
    """

    def __init__(self, source: CocoSource, *, size: int = 64, cache: bool = False, expected_count: int = 0):
        super().__init__(source.on_error)
        if size <= 0:
            raise ValueError(f"mask size {size} must be at least 1")
        if not source.masks:
            raise ValueError("the source gives no masks; make it with masks=True")
        self.source, self.size = source, size
        pairs = [(i, annotation) for i in range(len(source)) for annotation in source.annotations(i)]
        if expected_count and len(pairs) != expected_count:
            raise DataError(
                f"{source.path}: {len(pairs)} objects, but expected_count={expected_count}; use the published file, "
                "or set the expected count to 0"
            )
        self.images = np.array([i for i, _ in pairs], np.int32)
        self.annotations = [annotation for _, annotation in pairs]
        self.boxes = np.array([_rounded_box(a, *source.sizes[i].tolist()) for i, a in pairs], np.int32).reshape(-1, 4)
        self.names = [f"{source.names[i]}#{annotation['id']}" for i, annotation in pairs]
        self._cached = np.zeros(len(pairs), bool) if cache else None
        self._bits = np.zeros((len(pairs) if cache else 0, -(-size * size // 8)), np.uint8)

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a run to go on with this data."""
        return self.source.fingerprint()

    def read(self, index: int) -> dict[str, np.ndarray]:
        """`instance` float32[size,size], 0 or 1. Raises DataError where the mask's code is broken."""
        if self._cached is None or not self._cached[index]:
            instance = self._crop(index)
            if self._cached is None:
                return {"instance": instance.astype(np.float32)}
            self._bits[index] = np.packbits(instance)
            self._cached[index] = True
        instance = np.unpackbits(self._bits[index], count=self.size**2).reshape(self.size, self.size)
        return {"instance": instance.astype(np.float32)}

    def _crop(self, index: int) -> np.ndarray:
        mask = self.source.mask(int(self.images[index]), self.annotations[index])
        x1, y1, x2, y2 = self.boxes[index]
        patch = Image.fromarray(np.ascontiguousarray(mask[y1:y2, x1:x2]) * np.uint8(255))
        return np.asarray(patch.resize((self.size, self.size), Image.Resampling.BILINEAR)) >= 128


def decode_sized(file: File, height: int, width: int, path: str | Path) -> np.ndarray:
    """uint8[height,width,3] RGB; DataError where it is broken or not of the size that the JSON at `path` says."""
    image = decode_image(file)
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{file.name} is {image.shape[0]}x{image.shape[1]} but {path} says {height}x{width}; "
            "restore the image, or set on_error='skip'"
        )
    return image


def _load(path: Path) -> tuple[dict[str, list], str]:
    """The content of an instances JSON, after a check of everything but the annotations, and the digest of the file."""
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotations file; set data.root and the annotation files") from None
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON ({error}); download it again") from error
    fields = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ()}
    for name, keys in fields.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{path}: no list {name!r}; an instances JSON has the lists {', '.join(fields)}")
        for entry in entries if keys else ():
            if not isinstance(entry, dict) or not all(key in entry for key in keys):
                raise DataError(f"{path}: {name} must have {', '.join(keys)}, but one is {entry!r}; correct it")
        if keys and not entries:
            raise DataError(f"{path}: no {name}; use an instances JSON as published")
        if keys and len({entry["id"] for entry in entries}) != len(entries):
            raise DataError(f"{path}: two {name} have one id; give each its own")
    return content, digest(text)


def _problem(annotation: Any, images: dict[int, dict], classes: dict[int, int], masks: bool) -> str:
    """What is wrong with an annotation; '' = nothing."""
    needed = ("id", "image_id", "category_id", "bbox", *(("segmentation",) if masks else ()))
    missing = [key for key in needed if not isinstance(annotation, dict) or key not in annotation]
    if missing:
        return f"it has no {', '.join(missing)}"
    if annotation["image_id"] not in images:
        return f"its image_id={annotation['image_id']} is not among the images of the JSON"
    if annotation["category_id"] not in classes:
        return f"unknown category_id={annotation['category_id']}, the JSON lists {len(classes)} categories"
    if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
        return f"bbox={annotation['bbox']} must be x, y, width, height"
    image = images[annotation["image_id"]]
    return _mask_problem(annotation, image["height"], image["width"]) if masks else ""


def _mask_problem(annotation: Annotation, height: int, width: int) -> str:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            return f"its mask has size={size}, but its image is {height}x{width} (height, width)"
        if not isinstance(counts, str | list) or (isinstance(counts, list) and sum(counts) != height * width):
            return f"the counts of its mask must be a string, or numbers that add up to {height * width} pixels"
        return ""
    if not isinstance(segmentation, list) or not segmentation:
        return "its segmentation must be a list of polygons or a run-length code"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return f"degenerate polygon {polygon}: it needs an x and a y for each of at least 3 points"
    if _has_extent(annotation, height, width) and not any(_polygon_area(polygon) for polygon in segmentation):
        return f"degenerate polygon of zero area, though area={annotation.get('area')} and bbox={annotation['bbox']}"
    return ""


def _polygon_area(polygon: list[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(a * d - b * c for a, b, c, d in zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True))) / 2


def _corners(annotation: Annotation, height: int, width: int) -> tuple[float, float, float, float]:
    """The box as x1 y1 x2 y2, clipped to the image."""
    x, y, w, h = annotation["bbox"]
    return min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)


def _has_extent(annotation: Annotation, height: int, width: int) -> bool:
    """Whether it is a training object: sides of 1 px or more, an area, and some of its box inside the image."""
    x1, y1, x2, y2 = _corners(annotation, height, width)
    return min(annotation["bbox"][2:]) >= _MIN_SIDE and annotation.get("area", 1.0) > 0 and x1 < x2 and y1 < y2


def _rounded_box(annotation: Annotation, height: int, width: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (round(v) for v in _corners(annotation, height, width))
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def run_length_code(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The compressed run-length code (pycocotools) of polygons or of a code; TypeError or ValueError where broken."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def decode_masks(annotations: list[Annotation], height: int, width: int, path: str | Path) -> np.ndarray:
    """uint8[n,H,W] 0/1, in memory in the order of pycocotools, not C; DataError, which names `path`, where broken."""
    masks_NWH = np.empty((len(annotations), width, height), np.uint8)
    for mask_WH, annotation in zip(masks_NWH, annotations, strict=True):
        try:
            code = run_length_code(annotation["segmentation"], height, width)
            mask_WH[:] = coco_mask.decode(code).T
            if mask_WH.max() > 1 or mask_WH.sum() != coco_mask.area(code):  # a code that ends early leaves pixels unset
                raise ValueError(f"its counts are not those of {height}x{width} pixels")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: annotation {annotation['id']}: broken mask ({error}); correct it, or set on_error='skip'"
            ) from error
    return masks_NWH.swapaxes(1, 2)
