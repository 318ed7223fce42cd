"""Masks of annotations, polygons and run-length codes, checked before pycocotools' C code sees them.

That code believes what it is given: coordinates decide how much memory it takes, and a code that ends early is read
past its end. The checks are of many masks at once, since COCO has 900,000.
"""

import itertools
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Segmentation = list[list[float]] | dict[str, Any]

FAR = 10  # so many times the image's longer side may a coordinate lie outside the image
_MAX_OUTLINE = 4_000_000  # pixels around all polygons of a mask: pycocotools takes up to 80 bytes for each
_MAX_CHARACTERS = 6  # of a number in a compressed code, 5 bits each; pycocotools shifts an int by them
MAX_PIXELS = 2 ** (5 * _MAX_CHARACTERS - 1) - 1
_CONTINUES, _NEGATIVE = 32, 16
_NUMBERS = frozenset((int, float))

_shown = reprlib.Repr()
_shown.maxlist, _shown.maxdict, _shown.maxlevel, _shown.maxstring, _shown.maxother = 8, 6, 3, 60, 60
shown = _shown.repr
"""A value as messages say it, however long or deep it is."""


class Wrong(ValueError):
    """What is wrong with an entry: the kind of fault, for counting, and a sentence."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def number(value: Any) -> float:
    """A finite number, also one written as text; ValueError for anything else."""
    kind = type(value)
    try:
        if kind in (int, float) or (kind is str and value.isascii() and "_" not in value):
            read = float(value)
            if math.isfinite(read):
                return read if kind is str else value
    except (OverflowError, ValueError):
        raise ValueError(shown(value)) from None
    raise ValueError(shown(value))


def finite(values: list[float]) -> bool:
    """Whether all are; False too for a whole number beyond all floats."""
    try:
        return all(map(math.isfinite, values))
    except OverflowError:
        return False


def whole(value: Any) -> int:
    """A whole number, also one written as 2.0 or as text; ValueError for anything else, and beyond 64 bits."""
    read = value if type(value) is int else number(value)
    if type(value) is str and value.strip().lstrip("+-").isdecimal():
        read = int(value)
    if read != int(read) or not -(2**63) <= read < 2**63 or (type(read) is float and abs(read) > 2**53):
        raise ValueError(shown(value))
    return int(read)


def formed(segmentation: Any, height: int, width: int) -> Segmentation:
    """The segmentation as pycocotools takes it: lists of x, y, x, y, … or a run-length code of the image's size.

    Polygons as lists of points, one polygon or one code without or with a list around it, and numbers as text are read.
    Raises Wrong where there is not one way to read it; values are for `check` to see.
    """
    if type(segmentation) is dict:
        return _code(segmentation, height, width)
    if type(segmentation) is not list or not segmentation:
        raise Wrong(
            "segmentation missing" if segmentation in (None, []) else "segmentation of no known form",
            f"its segmentation must be a list of polygons or a run-length code, but is {shown(segmentation)}",
        )
    for polygon in segmentation:
        if (
            type(polygon) is not list
            or len(polygon) < 6
            or len(polygon) % 2
            or not _NUMBERS.issuperset(map(type, polygon))
        ):
            return _rare(segmentation, height, width)
    return segmentation


def _rare(segmentation: list, height: int, width: int) -> Segmentation:
    if len(segmentation) == 1 and type(segmentation[0]) is dict:
        return _code(segmentation[0], height, width)
    alone = not any(isinstance(part, list | dict) for part in segmentation) or _are_points(segmentation)
    return [_polygon(polygon) for polygon in ([segmentation] if alone else segmentation)]


def _are_points(polygon: Any) -> bool:
    if type(polygon) is not list or not all(type(point) is list and len(point) == 2 for point in polygon):
        return False
    return not any(isinstance(value, list) for point in polygon for value in point)


def _polygon(polygon: Any) -> list[float]:
    values = list(itertools.chain.from_iterable(polygon)) if _are_points(polygon) else polygon
    if type(values) is not list or len(values) < 6 or len(values) % 2:
        raise Wrong(
            "degenerate polygon",
            f"degenerate polygon {shown(polygon)}: it needs an x and a y for each of at least 3 points",
        )
    try:
        return [number(value) for value in values]
    except ValueError as error:
        raise Wrong("polygon with a value that is no number", f"its polygon {shown(polygon)} holds {error}") from None


def _code(code: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = code.get("size"), code.get("counts")
    try:
        fits = type(size) is list and [whole(side) for side in size] == [height, width]
    except ValueError:
        fits = False
    if not fits:
        raise Wrong(
            "mask of another size",
            f"its mask has size={shown(size)}, but its image is {height}x{width} (height, width)",
        )
    if type(counts) is list:
        try:
            counts = counts if set(map(type, counts)) <= {int} else [whole(count) for count in counts]
        except ValueError as error:
            raise _uncountable(f"one is {error}", height, width) from None
    elif type(counts) is not str:
        raise _uncountable(f"they are {shown(counts)}", height, width)
    same = size == [height, width] and set(map(type, size)) == {int} and counts is code["counts"]
    return code if same else {**code, "size": [height, width], "counts": counts}


def _uncountable(but: str, height: int, width: int) -> Wrong:
    return Wrong(
        "mask whose counts do not fit",
        f"the counts of its mask must be a string, or numbers that add up to {height * width} pixels, but {but}",
    )


def weight(segmentation: Segmentation) -> int:
    """How much there is to check."""
    return len(segmentation["counts"]) if type(segmentation) is dict else sum(map(len, segmentation))


def check(
    segmentations: Sequence[Segmentation], sizes: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, dict[int, Wrong]]:
    """Checks the values of what `formed` gave, for images of (height, width).

    Returns:
      float64[n], area in square pixels; bool[n], whether some of it is inside the image; and what is wrong, by index.
    """
    areas, inside, wrong = np.zeros(len(segmentations)), np.ones(len(segmentations), bool), {}
    packed = []
    for i, (segmentation, (height, width)) in enumerate(zip(segmentations, sizes, strict=True)):
        if type(segmentation) is list:
            continue
        counts = segmentation["counts"]
        if type(counts) is list:
            areas[i] = _counted(i, counts, height, width, wrong)
        elif not counts.isascii() or not 0 < len(counts) <= 2 * height * width + _MAX_CHARACTERS:
            wrong[i] = Wrong(
                "broken compressed mask", f"broken mask: its counts {shown(counts)} are no compressed code"
            )
        else:
            packed.append(i)
    if packed:
        _check_codes(packed, segmentations, sizes, areas, wrong)
    if drawn := [i for i, segmentation in enumerate(segmentations) if type(segmentation) is list]:
        _check_polygons(drawn, segmentations, sizes, areas, inside, wrong)
    return areas, inside, wrong


def check_all(segmentations: Sequence[Any], height: int, width: int) -> list[Segmentation]:
    """Those of one image as pycocotools takes them; Wrong where one is broken."""
    read = [formed(segmentation, height, width) for segmentation in segmentations]
    for problem in check(read, [(height, width)] * len(read))[2].values():
        raise problem
    return read


def _counted(i: int, counts: list[int], height: int, width: int, wrong: dict[int, Wrong]) -> float:
    if counts and min(counts) >= 0 and sum(counts) == height * width:
        return float(sum(counts[1::2]))
    but = f"one is {shown(min(counts))}" if counts and min(counts) < 0 else f"add up to {shown(sum(counts))}"
    wrong[i] = _uncountable(but, height, width)
    return 0.0


def _check_codes(
    places: list[int],
    segmentations: Sequence[Segmentation],
    sizes: Sequence[tuple[int, int]],
    areas: np.ndarray,
    wrong: dict[int, Wrong],
) -> None:
    """Compressed codes: numbers of 1 to 6 characters from '0' (48) on, those from the fourth on as differences."""

    def refuse(bad: np.ndarray, why: str) -> None:
        for i in np.array(places)[bad]:
            text = f"broken mask: {why.format(*sizes[i])} (counts={shown(segmentations[i]['counts'])})"
            wrong[int(i)] = Wrong("broken compressed mask", text)

    starts, values = _characters([segmentations[i]["counts"] for i in places])
    strange = np.logical_or.reduceat(values > 63, starts)
    refuse(strange, "its counts hold characters that no compressed code has")
    open_ended = ~strange & (values[np.append(starts[1:], len(values)) - 1] & _CONTINUES > 0)
    refuse(open_ended, "its counts end within a number")
    places = [i for i, bad in zip(places, strange | open_ended, strict=True) if not bad]
    if not places:
        return
    starts, values = _characters([segmentations[i]["counts"] for i in places])
    firsts, runs, odd, lengths = _decoded(starts, values)
    long = np.maximum.reduceat(lengths, firsts) > _MAX_CHARACTERS
    refuse(long, f"its counts hold a number of more than {_MAX_CHARACTERS} characters")
    negative = ~long & (np.minimum.reduceat(runs, firsts) < 0)
    refuse(negative, "one of its counts is negative")
    pixels = np.array([height * width for height, width in (sizes[i] for i in places)])
    other = ~long & ~negative & (np.add.reduceat(runs, firsts) != pixels)
    refuse(other, "its counts are not those of {0}x{1} pixels")
    areas[places] = np.add.reduceat(np.where(odd, runs, 0), firsts)


def _characters(codes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where each code begins, and the values of all their characters; those above 63 are of none."""
    lengths = np.fromiter(map(len, codes), np.int64, len(codes))
    return np.cumsum(lengths) - lengths, np.frombuffer("".join(codes).encode(), np.uint8) - np.uint8(48)


def _decoded(starts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the runs of each code begin, all the runs, whether they are of ones, and the length of each as written."""
    last = np.flatnonzero(values & _CONTINUES == 0)
    begin = np.concatenate([[0], last[:-1] + 1])
    lengths = last - begin + 1
    shifts = 5 * np.minimum(np.arange(len(values)) - np.repeat(begin, lengths), _MAX_CHARACTERS)
    read = np.add.reduceat((values & 31).astype(np.int64) << shifts, begin)
    read -= (values[last] & _NEGATIVE > 0).astype(np.int64) << 5 * np.minimum(lengths, _MAX_CHARACTERS + 1)
    firsts = np.searchsorted(begin, starts)
    sizes = np.diff(np.append(firsts, len(begin)))
    owner, place = np.repeat(np.arange(len(starts)), sizes), np.arange(len(begin)) - np.repeat(firsts, sizes)
    runs, odd = read.copy(), place % 2 == 1
    for part in (odd, ~odd & (place > 0)):
        where = np.flatnonzero(part)
        if where.size:
            total = np.cumsum(read[where])
            edges = np.flatnonzero(np.diff(owner[where], prepend=-1))
            before = (total - read[where])[edges]
            runs[where] = total - np.repeat(before, np.diff(np.append(edges, len(where))))
    return firsts, runs, odd, lengths


def _check_polygons(
    places: list[int],
    segmentations: Sequence[Segmentation],
    sizes: Sequence[tuple[int, int]],
    areas: np.ndarray,
    inside: np.ndarray,
    wrong: dict[int, Wrong],
) -> None:
    polygons = list(itertools.chain.from_iterable(segmentations[i] for i in places))
    parts = np.array([len(segmentations[i]) for i in places])
    firsts = np.cumsum(parts) - parts
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
    starts = np.cumsum(lengths) - lengths
    x, y = _flat(polygons).reshape(-1, 2).T
    following = np.arange(1, len(x) + 1)
    following[starts + lengths - 1] = starts
    begin = starts[firsts]  # of each mask
    heights, widths = np.array([sizes[i] for i in places]).T
    with np.errstate(invalid="ignore", over="ignore"):
        (x1, x2), (y1, y2) = ((np.minimum.reduceat(v, begin), np.maximum.reduceat(v, begin)) for v in (x, y))
        far = FAR * np.maximum(heights, widths)
        near = (np.minimum(x1, y1) >= -far) & (x2 <= widths + far) & (y2 <= heights + far)  # False where NaN
        outline = np.add.reduceat(np.maximum(abs(x[following] - x), abs(y[following] - y)), begin)
        cross = np.add.reduceat(x * y[following] - y * x[following], starts)
        measured = np.add.reduceat(abs(cross) / 2, firsts)
        inside[places] = (x1 < widths) & (y1 < heights) & (x2 > 0) & (y2 > 0)
    exact = np.flatnonzero(near & (measured < 1e-3))  # where rounding could hide that there is none
    measured[exact] = [sum(map(polygon_area, segmentations[places[i]])) for i in exact]
    areas[places] = np.where(near, measured, 0)
    for i in np.flatnonzero(~near | (outline > _MAX_OUTLINE)):
        wrong[places[i]] = _too_far(segmentations[places[i]], *sizes[places[i]])


def _flat(polygons: list[list[float]]) -> np.ndarray:
    values = itertools.chain.from_iterable(polygons)
    try:
        return np.fromiter(values, np.float64)
    except OverflowError:
        return np.array([math.inf if abs(v) > 1e300 else v for polygon in polygons for v in polygon], np.float64)


def _too_far(polygons: list[list[float]], height: int, width: int) -> Wrong:
    for value in itertools.chain.from_iterable(polygons):
        if value != value or value in (math.inf, -math.inf):  # isnan takes no large ints
            return Wrong("polygon with a value that is no number", f"its polygon has the coordinate {value}")
    far = FAR * max(height, width)
    for polygon in polygons:
        for value, side in zip(polygon, itertools.cycle((width, height)), strict=False):
            if not -far <= value <= side + far:
                where = f"its polygon has the coordinate {shown(value)}, far outside its image of {height}x{width}"
                return Wrong("polygon far outside the image", where)
    return Wrong("polygon far outside the image", f"its polygons are more than {_MAX_OUTLINE} pixels around")


def polygon_area(polygon: list[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(a * d - b * c for a, b, c, d in zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True))) / 2
