"""Random access to the TFRecord files of one split that TensorFlow Datasets (TFDS) prepared.

A record is a length (uint64), its masked CRC-32C (uint32), that many bytes, and their masked CRC-32C. The headers are
read once for the places of the records; every read checks the sum of what it gives.
"""

import concurrent.futures
import json
import os
import struct
from pathlib import Path

import numpy as np

from aitok_jax import paths
from aitok_jax.data.sources.files import DataError

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_SCANNED_AT_ONCE = 16  # files
_ADVICE = "copy it anew from where it was prepared, prepare the data again, or set on_error='skip'"


class Records:
    """The records of a split in the order of its files.

    Args:
      folder: of a prepared data set, with dataset_info.json; in a bucket, its files are gone through once.
      split: a split of it.
      on_error: 'raise' refuses files that end early or whose headers are broken at once; 'skip' only when one of the
        records that cannot be found there is read.

    Raises:
      ValueError: another file format than TFRecord, or no such split.
      FileNotFoundError: a file is missing.
      DataError: see `on_error`.
    """

    def __init__(self, folder: str | Path, split: str, on_error: str = "raise"):
        self._shards = _shards(paths.expand(folder), split)
        starts, stops, self._problems = [], [], {}
        with concurrent.futures.ThreadPoolExecutor(_SCANNED_AT_ONCE) as pool:
            scans = list(pool.map(_scan, *zip(*self._shards, strict=True)))
        for shard, ((_, count), (places, problem)) in enumerate(zip(self._shards, scans, strict=True)):
            if problem and on_error == "raise":
                raise DataError(problem)
            self._problems[shard] = problem
            places += [(-1, -1)] * (count - len(places))
            starts += [start for start, _ in places]
            stops += [stop for _, stop in places]
        self._starts, self._stops = np.array(starts, np.int64), np.array(stops, np.int64)
        self._ends = np.cumsum([count for _, count in self._shards])

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """What errors call a record: its file, its number in it, and the byte where it starts."""
        shard, number = self._place(index)
        return f"{self._shards[shard][0]}, record {number} (byte {self._starts[index]})"

    def read(self, index: int) -> bytes:
        """A record's bytes. Raises DataError where they are not the ones that were written."""
        if self._starts[index] < 0:
            raise DataError(self._problems[self._place(index)[0]])
        path, start, stop = self._shards[self._place(index)[0]][0], int(self._starts[index]), int(self._stops[index])
        record = paths.read_range(path, start, stop)
        content, footer = record[_HEADER.size : -_FOOTER.size], record[-_FOOTER.size :]
        whole = len(record) == stop - start and _length(record[: _HEADER.size]) == len(content)
        if not whole or _FOOTER.unpack(footer)[0] != _masked_sum(content):
            raise DataError(f"{self.name(index)} is corrupt: its checksum does not fit; {_ADVICE}")
        return content

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a record and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._shards[shard][1])


def read_info(folder: Path) -> dict:
    """The content of a prepared data set's dataset_info.json."""
    path = folder / "dataset_info.json"
    try:
        return json.loads(paths.read(path))
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON ({error}); prepare the data again") from error


def _shards(folder: Path, split: str) -> list[tuple[Path, int]]:
    """The files of a split, each with the number of its records."""
    info = read_info(folder)
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise ValueError(f"{folder}: files in the format {kind!r} cannot be read; prepare with file_format='tfrecord'")
    splits = {entry["name"]: entry for entry in info.get("splits", ())}
    if split not in splits:
        raise ValueError(f"{folder}: no split {split!r} among {', '.join(sorted(splits)) or '(none)'}; prepare it")
    counts = [int(count) for count in splits[split]["shardLengths"]]
    template = splits[split].get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    names = {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": kind}
    shards = [
        (folder / template.format(**names, SHARD_X_OF_Y=f"{i:05}-of-{len(counts):05}"), count)
        for i, count in enumerate(counts)
    ]
    for path, _ in shards:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing file of prepared data; copy it anew, or prepare the data again")
    return shards


def _scan(path: Path, count: int) -> tuple[list[tuple[int, int]], str]:
    """Where the records of a file start and end, and what is wrong where they are not `count` ('' = nothing)."""
    places, place = [], 0
    with path.open("rb", **{} if paths.is_url(path) else {"buffering": 0}) as file:
        size = file.seek(0, os.SEEK_END)
        while len(places) < count:
            file.seek(place)
            length = _length(file.read(_HEADER.size))
            end = place + _HEADER.size + (length or 0) + _FOOTER.size
            if length is None or end > size:
                why = "ends there" if place >= size or length is not None else "its length is corrupt"
                return places, (
                    f"{path}, record {len(places)} (byte {place}): {why}, so that {count - len(places)} of the "
                    f"file's {count} records cannot be read; {_ADVICE}"
                )
            places.append((place, end))
            place = end
    return places, ""


def _length(header: bytes) -> int | None:
    """The length that a record's header says; None where the header is broken."""
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    return length if checksum == _masked_sum(header[:8]) else None


def _masked_sum(content: bytes) -> int:
    import google_crc32c

    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
