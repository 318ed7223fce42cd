"""What of somebody's images is for evaluation: whole folders, or whole runs of consecutive names, never neighbours.

Frames of one walk through a room look alike; with one of two twins in training, the other measures nothing.
"""

import itertools
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging
from PIL import Image

from aitok_jax import paths
from aitok_jax.data.sources.files import digest
from aitok_jax.image import ImageError, read_image

LISTS = "train.txt", "val.txt"
MOST = 1.5  # times the share, that whole folders or runs may come to; a third of all where they are larger
ALIKE = 6  # of the 64 bits of two pictures' hashes, that differ at most in near-duplicates
COMPARED = 4000  # images at most, whose hashes take a while


def choose(names: Sequence[str], share: float) -> set[str]:
    """The names to evaluate on, about a `share` of all and at least one, from relative paths.

    Whole folders, where some come near the share; else whole runs of names with consecutive numbers; else the end of
    every folder's names. Which of several is decided by a hash of the name, so that more data changes little.

    Raises:
        ValueError: fewer than two names, or a share outside 0..1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to evaluate on, {share}, must be between 0 and 1; 0.1 is usual")
    if len(names) < 2:
        raise ValueError(f"{len(names)} images are too few to train with some and evaluate on others; add some")
    wanted = share * len(names)
    for group_of in (_folder, _runs(names)):
        for most in (MOST * wanted, len(names) / 3):
            if chosen := _near(names, group_of, wanted, most):
                return chosen
    ends = set()
    for folder in _grouped(names, _folder).values():
        ends |= set(sorted(folder, key=_natural)[len(folder) - round(share * len(folder)) :])
    return ends or {max(names, key=_natural)}


def listed(folder: Path, names: Iterable[str]) -> set[str] | None:
    """The names to evaluate on by FOLDER/val.txt, or those that FOLDER/train.txt leaves; None where there is neither.

    A line begins with the name of an image; what follows it, as in the lists of NYUv2, is ignored.

    Raises:
        ValueError: a line names no image, one name is in both, or one side is empty.
    """
    found, known = {}, {name: name for name in names}
    known |= {PurePosixPath(name).with_suffix("").as_posix(): name for name in known}
    for file in (folder / each for each in LISTS):
        if not file.is_file():
            continue
        entries = [line.split()[0].lstrip("/") for line in paths.read_lines(file)]
        if missing := [entry for entry in entries if entry not in known]:
            raise ValueError(f"{file} lists {paths.listed(missing)}, of which there is no image with a map; correct it")
        found[file.name] = {known[entry] for entry in entries}
    if not found:
        return None
    train, val = (found.get(each) for each in LISTS)
    if train is not None and val is not None and (both := sorted(train & val)):
        raise ValueError(f"{folder}: {paths.listed(both)} in both {' and '.join(LISTS)}; take it off one")
    val = set(known.values()) - train if val is None else val
    if not val or val == set(known.values()):
        side = "train with" if val else "evaluate on"
        raise ValueError(f"{folder}: {' and '.join(found)} leave no image to {side}; correct the lists, or delete them")
    return val


def near_duplicates(train: Sequence[Path], val: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(evaluation image, the training image that it equals nearly, or whose mirror image it does), of each at most one.

    By a difference hash of 8×8 pixels. Broken images are passed over; of many, the first COMPARED of each are compared.
    """
    hashes = [{path: code for path in part[:COMPARED] if (code := _hash(path)) is not None} for part in (train, val)]
    if not all(hashes):
        return []
    trained = np.stack(list(hashes[0].values()))
    found = []
    for path, codes in hashes[1].items():
        apart = np.min([np.sum(trained[:, 0] != code, axis=1) for code in codes], axis=0)
        if apart.min() <= ALIKE:
            found.append((path, list(hashes[0])[int(apart.argmin())]))
    return found


def warn_of_near_duplicates(train: Sequence[Path], val: Sequence[Path]) -> int:
    """Says how many there are across the split, and returns it."""
    found = near_duplicates(train, val)
    if found:
        logging.warning(
            "%d of %d images to evaluate on look like one to train on (%s like %s): the metrics will be too good; "
            "divide the images by lists, %s",
            *(len(found), len(val), paths.shown(found[0][0].name), paths.shown(found[0][1]), " and ".join(LISTS)),
        )
    return len(found)


def _hash(path: Path) -> np.ndarray | None:
    """bool[2,64]: whether the picture, and its mirror image, gets brighter from one pixel of 8 rows to the next."""
    try:
        grey = Image.fromarray(read_image(path)).convert("L").resize((9, 8), Image.Resampling.BOX)
    except (ImageError, OSError):
        return None
    values = np.asarray(grey, np.int16)
    return np.stack([(np.diff(each, axis=1) > 0).ravel() for each in (values, values[:, ::-1])])


def _near(names: Sequence[str], group_of: Callable[[str], Hashable], wanted: float, most: float) -> set[str]:
    """Groups, in the order of their hashes, that together come near the wanted number; none where none do."""
    groups = _grouped(names, group_of)
    chosen: set[str] = set()
    for key in sorted(groups, key=lambda key: digest(str(key).encode())):
        if len(chosen) + len(groups[key]) <= most:
            chosen |= groups[key]
        if len(chosen) >= round(wanted):
            break
    return chosen if len(chosen) >= wanted / MOST and len(chosen) < len(names) else set()


def _grouped(names: Iterable[str], group_of: Callable[[str], Hashable]) -> dict[Hashable, set[str]]:
    groups: dict[Hashable, set[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), set()).add(name)
    return groups


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _runs(names: Iterable[str]) -> Callable[[str], tuple[str, int]]:
    """Text of a name, and which of the runs of its numbers it is in: a step far beyond the usual one ends a run."""
    series: dict[str, list[int]] = {}
    for name in names:
        text, number = _numbered(name)
        series.setdefault(text, []).append(number)
    starts = {}
    for text, numbers in series.items():
        numbers.sort()
        steps = [b - a for a, b in itertools.pairwise(numbers)]
        usual = statistics.median(steps) if steps else 1
        starts[text] = [numbers[0]] + [b for a, b in itertools.pairwise(numbers) if b - a > 3 * usual]

    def run(name: str) -> tuple[str, int]:
        text, number = _numbered(name)
        return text, sum(number >= start for start in starts[text])

    return run


def _numbered(name: str) -> tuple[str, int]:
    """A name without its last number, and that number, -1 where there is none."""
    stem = PurePosixPath(name).with_suffix("").as_posix()
    found = re.search(r"\d+(?=\D*$)", stem)
    return (stem, -1) if found is None else (f"{stem[: found.start()]}#{stem[found.end() :]}", int(found[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
