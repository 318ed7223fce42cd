"""COCO's average precision of boxes, masks and mask boundaries, measured with pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from aitok_jax.data.sources import segmentations

KINDS = {"box": "bbox", "mask": "segm", "boundary": "boundary"}
AREA_RANGES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""Square pixels of an object's annotated area, as COCO has them."""

LIMITS = (1, 10, 100)
"""Best detections of an image and category that count for recall; the last holds for everything else."""

DILATION_RATIO = 0.02
"""Width of a mask's boundary as a share of the image's diagonal (Cheng et al., Boundary IoU, CVPR 2021)."""


@dataclass(frozen=True)
class Curves:
    """What pycocotools accumulates, for each IoU threshold T (0.50:0.05:0.95), category K, area range A (all objects
    first, then the named ranges) and limit M on the detections per image and category; -1 = no ground truth there.

    Attributes:
        precision: f64[T,R,K,A,M], at the recalls 0:0.01:1.
        recall: f64[T,K,A,M].
    """

    precision: np.ndarray
    recall: np.ndarray

    def summary(self, ranges: Sequence[str]) -> dict[str, float]:
        """The 12 numbers that COCO reports (for its 3 area ranges), -1 where there is no ground truth."""
        precision, recall = self.precision, self.recall
        numbers = {"ap": precision[..., 0, -1], "ap50": precision[0, ..., 0, -1], "ap75": precision[5, ..., 0, -1]}
        numbers |= {f"ap_{name}": precision[..., a + 1, -1] for a, name in enumerate(ranges)}
        numbers |= {f"ar{limit}": recall[..., 0, m] for m, limit in enumerate(LIMITS)}
        numbers |= {f"ar_{name}": recall[..., a + 1, -1] for a, name in enumerate(ranges)}
        return {name: _mean(values) for name, values in numbers.items()}


class CocoScorer:
    """Collects the results of one image after the other and measures them against the ground truth.

        scorer = CocoScorer(coco)
        for image_id in coco.getImgIds():
            scorer.add(image_id, results_of(image_id))
        scorer.result(("box", "mask"))["mask_ap50"]

    Args:
        coco: pycocotools' COCO with the ground truth; it is not changed.
        image_ids: the images to measure on, each of which must get its results; None takes all. Results of others are
            checked and left out.
        area_ranges: name -> (low, high) in square pixels, both included.
    Raises:
        ValueError: `image_ids` that are not in the ground truth.
    """

    def __init__(
        self,
        coco: Any,
        image_ids: Sequence[int] | None = None,
        *,
        area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
    ):
        self._coco = coco
        self._ids = sorted(coco.imgs if image_ids is None else set(image_ids))
        if unknown := [i for i in self._ids if i not in coco.imgs]:
            raise ValueError(
                f"no image of the ground truth has the id {_list(unknown)}; it has {len(coco.imgs)} images"
            )
        self._results: dict[int, list[dict[str, Any]]] = {}
        self._area_ranges = dict(area_ranges)
        self._curves: dict[str, Curves] = {}

    @classmethod
    def of(cls, coco: Any, results: Sequence[Mapping[str, Any]], **options: Any) -> CocoScorer:
        """A scorer with a whole list of results, as results files hold them; images without any have found nothing.

        Args:
            coco, options: as of the class.
            results: of any images, in any order.
        """
        scorer = cls(coco, **options)
        of_image: dict[int, list] = {image_id: [] for image_id in scorer._ids}
        for result in results:
            of_image.setdefault(result["image_id"], []).append(result)
        for image_id, its_results in of_image.items():
            scorer.add(image_id, its_results)
        return scorer

    def add(self, image_id: int, results: Sequence[Mapping[str, Any]]) -> None:
        """Adds the COCO results of one image, once; an empty list says that nothing was found.

        Args:
            image_id: COCO's id of the image.
            results: dicts with image_id, category_id, score, bbox [x, y, width, height] in pixels for box AP and
                segmentation (compressed RLE) for mask and boundary AP.
        Raises:
            ValueError: an image or category that the ground truth does not have, an image that was added before, a mask
                whose size is not the image's or whose code is broken, or a score that is not finite.
        """
        if image_id not in self._coco.imgs:
            raise ValueError(f"results for image id {image_id}, which is not among the {len(self._coco.imgs)} images")
        if image_id in self._results:
            raise ValueError(f"results for image id {image_id} were added before; add those of an image together")
        for result in results:
            self._check(image_id, result)
        self._check_masks(image_id, results)
        self._results[image_id] = [dict(result) for result in results]

    def leave_out_missing(self) -> int:
        """Measures only on the images whose results were added; returns how many are left out."""
        left = [image_id for image_id in self._ids if image_id in self._results]
        count = len(self._ids) - len(left)
        self._ids = left
        return count

    def result(self, kinds: Sequence[str] = ("box", "mask")) -> dict[str, float]:
        """COCO's 12 numbers for each of `kinds`: 'box', 'mask' and 'boundary', for example `mask_ap50`.

        Names: ap (IoU 0.50:0.95), ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100 (recall with so many
        detections), ar_small, ar_medium, ar_large. -1 means that there is no ground truth to measure on. The boundary
        numbers take the smaller one of the IoU of the masks and that of their boundaries.

        Raises:
            ValueError: an unknown kind, images whose results were never added, or results without bbox or segmentation.
        """
        numbers = {}
        for kind in kinds:
            summary = self.curves(kind).summary(tuple(self._area_ranges))
            numbers |= {f"{kind}_{name}": value for name, value in summary.items()}
        return numbers

    def curves(self, kind: str) -> Curves:
        """Precision and recall before averaging; raises as `result`."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        if missing := [i for i in self._ids if i not in self._results]:
            raise ValueError(
                f"{len(missing)} of {len(self._ids)} images have no results: {_list(missing)}; add an empty list for "
                "an image where nothing was found, or leave them out (leave_out_missing)"
            )
        if kind not in self._curves:
            truth, results = self._truth(kind), self._detections(kind)
            evaluation = _Evaluation(kind, truth, results)
            self._curves[kind] = _run(evaluation, self._coco, self._ids, self._area_ranges)
        return self._curves[kind]

    def _check(self, image_id, result) -> None:
        where = f"a result of image {image_id}"
        if result["image_id"] != image_id:
            raise ValueError(f"{where} says image_id {result['image_id']}")
        if result["category_id"] not in self._coco.cats:
            known = sorted(self._coco.cats)
            raise ValueError(
                f"{where} has category_id {result['category_id']}, which the ground truth does not have; its "
                f"{len(known)} categories are {_list(known)}"
            )
        if not np.isfinite(result["score"]):
            raise ValueError(f"{where} has the score {result['score']}; scores must be finite")
        image = self._coco.imgs[image_id]
        size = [image["height"], image["width"]]
        if "segmentation" in result and list(result["segmentation"]["size"]) != size:
            raise ValueError(
                f"{where} has a mask of size {list(result['segmentation']['size'])}, but the image has the size {size} "
                "(height, width); paste masks at the size of the original image"
            )

    def _check_masks(self, image_id, results) -> None:
        """pycocotools would read past the end of a broken code."""
        image, codes = self._coco.imgs[image_id], []
        for result in results:
            if "segmentation" in result:
                code = dict(result["segmentation"])
                if isinstance(code["counts"], bytes):
                    code["counts"] = code["counts"].decode("latin-1")
                codes.append(code | {"size": list(code["size"])})
        self._checked(f"a result of image {image_id}", codes, image)

    def _checked(self, where, masks, image) -> list[Any]:
        try:
            return segmentations.check_all(masks, image["height"], image["width"])
        except segmentations.Wrong as problem:
            raise ValueError(f"{where}: {problem}; encode the mask with pycocotools") from None

    def _truth(self, kind) -> list[dict[str, Any]]:
        """Copies of the annotations: pycocotools writes into them, and takes the id 0 for 'no match'."""
        annotations = [a for i in self._ids for a in self._coco.imgToAnns.get(i, ())]
        truth = []
        for number, annotation in enumerate(annotations, start=1):
            crowd = int(annotation.get("iscrowd", 0))
            entry = {**annotation, "id": number, "iscrowd": crowd, "ignore": crowd}
            entry.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
            if kind != "box":
                where, image = f"annotation {annotation['id']}", self._coco.imgs[annotation["image_id"]]
                (entry["segmentation"],) = self._checked(where, [annotation.get("segmentation")], image)
                entry["segmentation"] = self._coco.annToRLE(entry)
            truth.append(entry)
        return truth

    def _detections(self, kind) -> list[dict[str, Any]]:
        """The results as pycocotools' annotations; their area is that of what is measured, box or mask."""
        shape = "bbox" if kind == "box" else "segmentation"
        results = [result for i in self._ids for result in self._results[i]]
        detections = []
        for number, result in enumerate(results, start=1):
            if shape not in result:
                raise ValueError(
                    f"a result of image {result['image_id']} has no {shape!r}, which {kind} AP is measured on"
                )
            entry = {name: result[name] for name in ("image_id", "category_id", "score", shape)}
            area = coco_mask.area(result[shape]) if kind != "box" else result["bbox"][2] * result["bbox"][3]
            detections.append({**entry, "id": number, "area": float(area), "iscrowd": 0})
        return detections


def names_of(kinds: Sequence[str]) -> list[str]:
    """The names of the numbers that `CocoScorer.result` gives."""
    shape = (10, 1, 1 + len(AREA_RANGES), len(LIMITS))
    summary = Curves(np.zeros((10, 1, *shape[1:])), np.zeros(shape)).summary(tuple(AREA_RANGES))
    return [f"{kind}_{name}" for kind in kinds for name in summary]


def mask_boundary(mask_HW: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """The pixels of a mask near its edge: those that an erosion by the boundary's width takes away.

    The width is `dilation_ratio` of the image's diagonal, rounded, at least 1 pixel, measured in steps to any of the 8
    neighbours; the image's border is an edge.

    Args:
        mask_HW: 0 or 1 for each pixel of the whole image.
    Returns:
        uint8[H,W] of 0 and 1.
    """
    mask_HW = np.asarray(mask_HW, np.uint8)
    if mask_HW.ndim != 2:
        raise ValueError(f"mask must be [H, W], got shape {mask_HW.shape}; take the boundary of one mask at a time")
    width = max(1, round(dilation_ratio * float(np.hypot(*mask_HW.shape))))
    boundary_HW = mask_HW.copy()
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    if rows.size:
        around = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = mask_HW[around]
        boundary_HW[around] -= ndimage.minimum_filter(part, size=2 * width + 1, mode="constant", cval=0)
    return boundary_HW


class _Evaluation(COCOeval):
    """pycocotools' evaluation of given lists of annotations, also by boundaries."""

    def __init__(self, kind, truth, detections):
        super().__init__(iouType="bbox" if kind == "box" else "segm")
        self._by_boundary = kind == "boundary"
        self._lists = truth, detections
        self._boundaries = {}

    def _prepare(self):
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for groups, entries in zip((self._gts, self._dts), self._lists, strict=True):
            for entry in entries:
                groups[entry["image_id"], entry["category_id"]].append(entry)
        for group in self._dts.values():
            group.sort(key=lambda detection: -detection["score"])
            del group[self.params.maxDets[-1] :]

    def computeIoU(self, imgId, catId):
        """IoU of the best detections (rows) with the objects (columns) of one image and category.

        The boundaries' IoU lowers that of the masks where the masks overlap enough to match at all, and not for crowds.
        """
        ious = super().computeIoU(imgId, catId)
        if not self._by_boundary or len(ious) == 0:
            return ious
        truth, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        crowd = np.array([annotation["iscrowd"] for annotation in truth], bool)
        close = (ious >= self.params.iouThrs[0]) & ~crowd[None]
        rows, columns = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
        if rows.size:
            found = [self._boundary("dt", detections[row]) for row in rows]
            wanted = [self._boundary("gt", truth[column]) for column in columns]
            place = np.ix_(rows, columns)
            ious[place] = np.minimum(ious[place], coco_mask.iou(found, wanted, [0] * len(wanted)))
        return ious

    def _boundary(self, side, annotation):
        key = side, annotation["id"]
        if key not in self._boundaries:
            boundary_HW = mask_boundary(coco_mask.decode(annotation["segmentation"]))
            self._boundaries[key] = coco_mask.encode(np.asfortranarray(boundary_HW))
        return self._boundaries[key]


def _run(evaluation, coco, ids, area_ranges) -> Curves:
    parameters = evaluation.params
    parameters.imgIds, parameters.catIds, parameters.maxDets = list(ids), sorted(coco.cats), list(LIMITS)
    parameters.areaRng = [[0, 1e10], *(list(ends) for ends in area_ranges.values())]
    parameters.areaRngLbl = ["all", *area_ranges]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(*(np.asarray(evaluation.eval[name]) for name in ("precision", "recall")))


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def _list(items: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
