"""Instances JSONs made to harm: mutations of a good one, the same for the same index.

    PYTHONPATH=.:tests python -m hostile.mutate_annotations --count=5000 [--first=0]
    PYTHONPATH=.:tests python -m hostile.mutate_annotations --show=17 > instances.json

The first tries so many and prints what became of them; the second gives one of them.
"""

import copy
import functools
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pycocotools.coco  # noqa: F401  imported while a file is read, it would count as executed
from absl import logging

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from coco_files import BOX_MASK, CATEGORIES, annotation, compressed, counts, write
from hostile import tries

from aitok_jax.data.sources import coco
from aitok_jax.data.sources.files import READ_ERRORS
from aitok_jax.evaluators.average_precision import CocoScorer

IMAGES = 4
FOLDER = tempfile.TemporaryDirectory(prefix="mutate_annotations_")
NUMBERS = (
    *(0, 1, 2, -1, 7, 30, 40, 1200, 0.5, 2.0, -0.0, 80.5, 255, 10_000, 1e5, 1e7, 2e8, 1e20, 1e300, -1e300, 5e-324),
    *(2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**32 + 600, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(math.nan, math.inf, -math.inf),
)
TEXTS = (
    "",
    " ",
    "3",
    "2.0",
    "-1",
    "nan",
    "1e5",
    "1_0",
    "٣",
    "a\\b.jpg",
    "a/b.jpg",
    "..",
    "../x",
    "/",
    "/dev/zero",
    ".",
)
TEXTS += (
    "000000000002.jpg",
    "\0",
    "a\0b",
    "\ud800",
    "é" * 200,
    "x" * 5000,
    "a/" * 3000,
    "P\0",
    "zzzz",
    "PPPPPP0",
    "[]",
)
VALUES = (
    *(
        None,
        True,
        False,
        [],
        {},
        [0],
        [[]],
        [None],
        {"a": 1},
        [1] * 40,
        [[1, 2]] * 4,
        [[[1, 2]] * 4],
        {"size": [30, 40]},
    ),
    *({"counts": "P\0", "size": [30, 40]}, {"counts": [1200], "size": [30, 40]}, [[1, 1, 9, 1, 9, 9]], [1, 1, 9, 9]),
)
CHARACTERS = "".join(map(chr, range(48, 112))) + "\0\n /p~\x7fé"
TOKENS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"true", b"[" * 5000, b'{"a":' * 3000, b"9" * 5000)
TOKENS += (b"-", b"1e-400", b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xef\xbb\xbf", b"", b'"id":1,', b"[],", b"0x10")


@functools.cache
def sound() -> str:
    """A JSON with masks of all forms, crowds, and an image without objects."""
    forms = [
        {},
        {"segmentation": compressed(BOX_MASK)},
        {"segmentation": {"size": [30, 40], "counts": counts(BOX_MASK)}},
        {"segmentation": [[20, 5, 26.5, 5, 26.5, 15, 20, 15], [26, 5, 32, 5, 32, 15]]},
        {"iscrowd": 1, "segmentation": compressed(BOX_MASK)},
        {"category_id": 2, "box": (1, 2, 9, 29)},
    ]
    entries = [annotation(i + 1, 1 + i % (IMAGES - 1), **form) for i, form in enumerate(forms)]
    _, path = write(FOLDER.name, entries, IMAGES, CATEGORIES)
    return path.read_text()


def make(index: int) -> tuple[str, bytes]:
    """The kind and the content of a file."""
    rng = random.Random(index)
    kind, function = KINDS[index % len(KINDS)]
    return kind, function(rng)


def read(path: Path) -> bool:
    """Whether the file was read to the end, with nothing left out; it is read in every way that there is."""
    _read(path, "skip", masks=False)
    _read(path, "skip")
    return _read(path, "raise")


def _read(path: Path, on_error: str, **options: Any) -> bool:
    whole = True
    try:
        source = coco.CocoSource(Path(FOLDER.name) / "images", path, on_error=on_error, **options)
    except READ_ERRORS:
        return False
    for one in (source, coco.MaskSource(source)) if source.masks else (source,):
        for i in range(len(one)):
            try:
                one.read(i)
            except READ_ERRORS:
                whole = False
    source.fingerprint()
    CocoScorer.of(source.coco, []).result(("box", "mask", "boundary") if source.masks else ("box",))
    return whole


def _value(rng: random.Random) -> Any:
    return rng.choice([rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS), copy.deepcopy(rng.choice(VALUES))])


def _entry(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """Mostly an annotation."""
    name = rng.choice(["images", "annotations", "annotations", "annotations", "categories"])
    entries = [entry for entry in content[name] if isinstance(entry, dict) and entry]
    return rng.choice(entries) if entries else {"id": 0}


def _values(rng: random.Random) -> bytes:
    """Fields, and members of those that are lists, of another type or range."""
    content = json.loads(sound())
    for _ in range(rng.randint(1, 2)):
        entry = _entry(rng, content)
        field = rng.choice(list(entry))
        part, value = entry[field], _value(rng)
        if rng.random() < 0.2 and isinstance(part, int | float):
            value = rng.choice([str(part), float(part), [part], {"value": part}, -part, part + 1])
        if isinstance(part, list) and part and rng.random() < 0.7:
            part[rng.randrange(len(part))] = value
        else:
            entry[field] = value
    return json.dumps(content).encode()


def _fields(rng: random.Random) -> bytes:
    """Fields and entries that are taken out, exchanged, doubled and nested."""
    content = json.loads(sound())
    for _ in range(rng.randint(1, 3)):
        entry, other, kind = _entry(rng, content), _entry(rng, content), rng.randrange(7)
        field = rng.choice(list(entry))
        entries = content[rng.choice(list(content))]
        if kind == 0:
            del entry[field]
        elif kind == 1:
            other[field] = copy.deepcopy(entry[field])
        elif kind == 2:
            one, two = rng.choice(list(entry)), field
            entry[one], entry[two] = entry[two], entry[one]
        elif kind == 3:
            entries.insert(rng.randrange(len(entries) + 1), copy.deepcopy(rng.choice([entry, _value(rng)])))
        elif kind == 4 and entries:
            del entries[rng.randrange(len(entries))]
        elif kind == 5:
            entry[field] = rng.choice([[entry[field]], {field: entry[field]}, [[entry[field]]] * 2])
        else:
            entry["more"] = _value(rng)
    if rng.random() < 0.1:
        content[rng.choice(list(content))] = _value(rng)
    return json.dumps(content).encode()


def _masks(rng: random.Random) -> bytes:
    """Coordinates, counts and the characters of codes."""
    content = json.loads(sound())
    for entry in rng.sample(content["annotations"], rng.randint(1, 3)):
        mask = entry["segmentation"]
        if isinstance(mask, list):
            polygon, kind = rng.choice(mask), rng.randrange(4)
            if kind == 0:
                polygon[rng.randrange(len(polygon))] = rng.choice(NUMBERS)
            elif kind == 1:
                scale, shift = rng.choice([-1, 0, 1, 30, 1e4, 1e7]), rng.choice([0, 0.3, -50, 40, 1e8, 2e9])
                polygon[:] = [scale * value + shift for value in polygon]
            elif kind == 2:
                polygon[:] = [rng.uniform(-500, 500) for _ in range(2 * rng.choice([1, 2, 3, 500, 20_000]))]
            else:
                entry["segmentation"] = [polygon[i : i + rng.choice([1, 2, 4])] for i in range(0, len(polygon), 2)]
        elif isinstance(mask["counts"], str):
            mask["counts"] = _characters(rng, mask["counts"])
        else:
            mask["counts"] = _runs(rng, mask["counts"])
    return json.dumps(content).encode()


def _characters(rng: random.Random, code: str) -> str:
    if rng.random() < 0.3:
        return "".join(rng.choices(CHARACTERS, k=rng.choice([1, 2, 5, 60])))
    at, new = rng.randrange(len(code)), rng.choice(CHARACTERS) * rng.choice([1, 1, 2, 8])
    return code[:at] + rng.choice(["", new, code]) + code[at + rng.choice([0, 1, 3]) :]


def _runs(rng: random.Random, runs: list[int]) -> list[Any]:
    at, by = rng.randrange(len(runs)), rng.choice([1, -1, 2**31, 2**32, -(2**32), 10**6])
    if rng.random() < 0.3:
        runs[at] = _value(rng)
    else:
        runs[at] += by
        runs[at - 1] -= rng.choice([by, by, 0])
    return runs * rng.choice([1, 1, 1, 2])


def _tokens(rng: random.Random) -> bytes:
    """Values of the text that Python's json reads, or does not."""
    text = sound().encode()
    for _ in range(rng.randint(1, 2)):
        at = rng.choice([i for i, byte in enumerate(text) if byte in b":,["]) + 1
        stop = at + min(i for i in (text.find(mark, at) - at for mark in (b",", b"]", b"}")) if i >= 0)
        text = text[:at] + rng.choice(TOKENS) + text[rng.choice([stop, at]) :]
    return text


def _bytes(rng: random.Random) -> bytes:
    """Bytes changed, cut out, doubled and cut off."""
    changed = bytearray(sound().encode())
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(changed)), rng.randrange(5)
        if kind <= 1:
            changed[at] = rng.choice([rng.randrange(256), rng.choice(b'0123456789,[]{}:".-e')])
        elif kind == 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del changed[at : at + rng.choice([1, 1, 2, 40])]
        else:
            changed[at:at] = changed[at : at + rng.choice([1, 1, 2, 40])]
    return bytes(changed[: rng.choice([len(changed)] * 9 + [rng.randrange(len(changed))])])


KINDS: tuple[tuple[str, Callable[[random.Random], bytes]], ...] = (
    ("values", _values),
    ("fields", _fields),
    ("masks", _masks),
    ("tokens", _tokens),
    ("bytes", _bytes),
)
logging.set_verbosity(logging.ERROR)
sound()
read(Path(FOLDER.name) / "instances.json")  # what it imports is no deed of a hostile one


if __name__ == "__main__":
    sys.exit(tries.main("hostile.mutate_annotations", 5000))
