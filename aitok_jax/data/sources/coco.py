"""COCO: images with boxes, classes and instance masks from an instances JSON as published."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from pycocotools import mask as coco_mask

from aitok_jax import paths
from aitok_jax.data.sources.annotations import MIN_SIDE, Annotation, corners, counted, has_extent, load
from aitok_jax.data.sources.files import DataError, File, Skipping, decode_image, digest, read_file


class CocoSource(Skipping):
    """Random access to images with their objects.

    Classes are numbered 0, 1, … in the order of the category ids of the JSON. Crowd regions (iscrowd = 1) are no
    objects; they only count in the evaluation, through `coco`.

    Args:
      images: the folder that the file names of the JSON are relative to.
      annotations: the instances JSON; masks are polygons or run-length codes, compressed or not.
      with_objects: leave out images without an object, for training (117266 of COCO train2017 remain).
      masks: False gives no masks and needs no `segmentation` in the JSON.
      on_error: 'raise' refuses broken annotations and images; 'skip' leaves out broken entries of the JSON, counted in
        the log, and lets `read_readable` (and so the pipeline) go on without broken images.
      cache: keep decoded examples in memory (about 1 MB for a 640x480 image, and 40 kB an object).
      expected_count: the number of images that there must be; 0 = any.

    Attributes:
      names: list[str], file names, one per image.
      ids: list[int], COCO image ids.
      sizes: int32[N,2] (height, width).
      content: dict, the whole JSON, without broken entries, and with those numbers as numbers that are text there.
      categories: list[str], the name of each class.
      category_ids: list[int], the COCO id of each class.
      skipped: set[str], what was left out so far because it is broken: file names, 'annotation ID' and 'image ID',
        or 'annotation [0]', the first of the list, where its id is broken.

    Raises:
      FileNotFoundError: no such folder or JSON.
      DataError: a malformed JSON, one without images or without objects, another count than expected; categories or,
        with on_error='raise', images and annotations with a missing field, or one of another type or range.
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
        self.masks, self.path = masks, paths.expand(annotations)
        self._folder, self._cache = paths.expand(images), {} if cache else None
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder}: no such folder of images; set data.root and the image folders")
        self.content, self._digest, faults = load(self.path, self._folder, masks=masks, on_error=on_error)
        self.reasons |= {fault.label: fault.text for fault in faults}
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.categories = [category["name"] for category in categories]
        self._classes = {category_id: i for i, category_id in enumerate(self.category_ids)}
        of_image = self._objects_by_image(counted(faults))
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
        self._log_unused()

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
        return read_image_file(self.image_path(self.names[index]))

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        height, width = self.sizes[index].tolist()
        image = decode_sized(self._file(index), height, width, self.path)
        objects = [annotation for annotation in self._objects[index] if has_extent(annotation, height, width)]
        example = {
            "image": image,
            "boxes": np.array([corners(o, height, width) for o in objects], np.float32).reshape(-1, 4),
            "classes": np.array([self._classes[o["category_id"]] for o in objects], np.int32),
        }
        if self.masks:
            example["masks"] = decode_masks(objects, height, width, self.path)
        return example

    def _objects_by_image(self, left_out: str) -> dict[int, list[Annotation]]:
        """The objects of each image id."""
        objects = {image["id"]: [] for image in self.content["images"]}
        for annotation in self.content["annotations"]:
            if not annotation["iscrowd"]:
                objects[annotation["image_id"]].append(annotation)
        if not any(objects.values()):
            raise DataError(
                f"{self.path}: no annotation of an object among {len(objects)} images: nothing to train on or to "
                f"compare with{f' ({left_out} left out)' * bool(left_out)}; use an instances JSON"
            )
        return objects

    def _log_unused(self) -> None:
        """Says what is in order but gives no example: images without objects, and objects without extent."""
        images = len(self.content["images"]) - len(self)
        small = sum(min(o["bbox"][2:]) < MIN_SIDE or not o["area"] for objects in self._objects for o in objects)
        for count, what in ((images, "images without an object (or with crowds alone)"), (small, "objects below 1 px")):
            if count:
                logging.info("%s: %d %s are not trained on", self.path.name, count, what)


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


def read_image_file(path: str | Path) -> File:
    """An image file as an instances JSON names it: whatever keeps it from being read is an error that names it."""
    try:
        if not paths.is_url(path) and Path(path).exists() and not Path(path).is_file():
            raise DataError(f"{path} is no file; correct its file_name, or set on_error='skip'")
        return read_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend it, or set on_error='skip'") from error


def decode_sized(file: File, height: int, width: int, path: str | Path) -> np.ndarray:
    """uint8[height,width,3] RGB; DataError where it is broken or not of the size that the JSON at `path` says."""
    image = decode_image(file)
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{file.name} is {image.shape[0]}x{image.shape[1]} but {path} says {height}x{width}; "
            "restore the image, or set on_error='skip'"
        )
    return image


def _rounded_box(annotation: Annotation, height: int, width: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (round(v) for v in corners(annotation, height, width))
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
