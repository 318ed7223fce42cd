"""NYUv2 and folders in its layout: `<scene>/rgb_NNNNN.jpg` with `sync_depth_NNNNN.png` (AIT.md section 8)."""

import abc
import hashlib
import io
import struct
import threading
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

TRAIN_COUNT, TEST_COUNT = 24231, 654  # pairs of the published lists

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DataError(ValueError):
    """A file of a data set is broken or does not fit; the message names the file and says what to do."""


READ_ERRORS = (DataError, FileNotFoundError)  # what `read` of a source raises for a broken example


class File(NamedTuple):
    """An encoded file, on the disk or in a record; the name is the one that errors say."""

    name: str
    content: bytes


class Skipping:
    """Access past broken examples, for sources with `names`, `read` and `len`."""

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'")
        self.on_error, self.reasons = on_error, {}
        self._lock = threading.Lock()

    @property
    def skipped(self) -> set[str]:
        """Names left out so far because they are broken; `reasons` says why."""
        return set(self.reasons)

    def read_readable(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """Like `read`, with the index that was read: under on_error='skip' the first readable one of index, index+1, …

        Every broken example is logged once with the reason and added to `skipped`.
        """
        if self.on_error == "raise":
            return index, self.read(index)
        reason = None
        for candidate in (*range(index, len(self)), *range(index)):
            if self.names[candidate] in self.reasons:
                continue
            try:
                return candidate, self.read(candidate)
            except READ_ERRORS as error:
                reason = error
                self._skip(self.names[candidate], error)
        raise DataError(f"all {len(self)} examples are broken; see the log for each") from reason

    def _skip(self, name: str, reason: object) -> None:
        with self._lock:  # the pipeline reads in threads
            known = name in self.reasons
            self.reasons.setdefault(name, str(reason))
        if not known:
            logging.warning("skipped %s: %s", name, reason)


class DepthSource(Skipping, abc.ABC):
    """Random access to pairs of an RGB image and a depth map; subclasses give `names` and `_file`."""

    names: list[str]

    def __init__(self, on_error: str, *, cache: bool, images: bool):
        super().__init__(on_error)
        self.images = images
        self._cache = {} if cache else None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Decodes one example: `image` uint8[H,W,3] RGB, `depth` float32[H,W] metres (0 = missing).

        Raises FileNotFoundError or DataError (whatever `on_error` says) where the example is broken.
        """
        if self._cache is not None and index in self._cache:
            return dict(self._cache[index])
        example = self._decoded(index)
        if self._cache is not None:
            for array in example.values():
                array.setflags(write=False)
            self._cache[index] = example
        return dict(example)

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a run to go on with this data."""
        return {"examples": len(self), "names": digest("\n".join(self.names).encode())}

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        return decode_pair(self._file(index, "depth"), self._file(index, "image") if self.images else None)

    @abc.abstractmethod
    def _file(self, index: int, kind: str) -> File:
        """The encoded 'image' or 'depth' of an example."""


class NyuSource(DepthSource):
    """Random access to pairs of an RGB image and a depth map.

    Args:
      root: the data folder.
      list_file: a text file (absolute, or relative to `root`) with one pair a line, `/scene/rgb_x.jpg
        /scene/sync_depth_x.png`, paths relative to `root/subfolder`; further columns (a focal length) are ignored.
        '' looks for `rgb_*.jpg` under `root/subfolder` instead, sorted, leaving out `official_splits` of `root`.
      subfolder: the folder inside `root` that the pairs are relative to ('official_splits/test' for the test part).
      on_error: 'raise' refuses a broken example; 'skip' lets `read_readable` (and so the pipeline) go on without it.
      cache: keep decoded examples in memory (about 2.2 MB for a 640x480 pair).
      images: False reads depth only and never opens an image.
      expected_count: the number of pairs that there must be (24231 and 654 for the published lists); 0 = any.

    Attributes:
      names: list[str], the path of each image relative to `root/subfolder`.
      skipped: set[str], names left out so far because they are broken (on_error='skip').

    Raises:
      FileNotFoundError: no such folder or list.
      DataError: an empty folder or list, a malformed line, or another count than expected.
    """

    def __init__(
        self,
        root: str | Path,
        list_file: str = "",
        *,
        subfolder: str = "",
        on_error: str = "raise",
        cache: bool = False,
        images: bool = True,
        expected_count: int = 0,
    ):
        super().__init__(on_error, cache=cache, images=images)
        self._folder = Path(root) / subfolder
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder}: no such data folder; set data.root (and the subfolder) to the folder of the scenes"
            )
        origin = Path(root) / list_file if list_file else self._folder
        pairs = self._from_list(origin) if list_file else self._from_folder(leave_out_test=not subfolder)
        if not pairs:
            raise DataError(
                f"{origin}: no pairs found; "
                + ("the list is empty" if list_file else "expected <scene>/rgb_*.jpg with <scene>/sync_depth_*.png")
            )
        if expected_count and len(pairs) != expected_count:
            raise DataError(
                f"{origin}: {len(pairs)} pairs, but expected_count={expected_count}; use the published list files "
                f"({TRAIN_COUNT} pairs to train, {TEST_COUNT} to test), or set the expected count to 0"
            )
        self.names = [image for image, _ in pairs]
        self._depth_names = [depth for _, depth in pairs]

    def paths(self, index: int) -> dict[str, Path]:
        """Where the 'image' and the 'depth' of an example are."""
        return {"image": self._folder / self.names[index], "depth": self._folder / self._depth_names[index]}

    def _file(self, index: int, kind: str) -> File:
        return read_file(self.paths(index)[kind])

    def _from_list(self, path: Path) -> list[tuple[str, str]]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such list file; give its absolute path, or one relative to data.root")
        pairs = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            columns = line.split()
            if not columns:
                continue
            if len(columns) < 2 or columns[1] == "None":
                problem = (
                    f"{path}:{number}: no depth map in {line!r}; expected '/scene/rgb_x.jpg /scene/sync_depth_x.png'"
                )
                if self.on_error == "raise":
                    raise DataError(f"{problem}; take the line off the list, or set on_error='skip'")
                self._skip(columns[0].lstrip("/"), problem)
                continue
            pairs.append((columns[0].lstrip("/"), columns[1].lstrip("/")))
        return pairs

    def _from_folder(self, leave_out_test: bool) -> list[tuple[str, str]]:
        pairs = []
        for image in sorted(self._folder.rglob("rgb_*.jpg")):
            name = image.relative_to(self._folder)
            if leave_out_test and name.parts[0] == "official_splits":
                continue
            depth = name.with_name("sync_depth_" + name.stem.removeprefix("rgb_") + ".png")
            if not (self._folder / depth).is_file():
                if self.on_error == "raise":
                    raise FileNotFoundError(
                        f"{self._folder / depth}: missing depth map of {name}; restore it, or set on_error='skip'"
                    )
                self._skip(name.as_posix(), "it has no depth map")
                continue
            pairs.append((name.as_posix(), depth.as_posix()))
        return pairs


def read_image(path: str | Path) -> np.ndarray:
    """uint8[H,W,3] RGB from an image file; DataError where it is broken, FileNotFoundError where it is missing."""
    return decode_image(read_file(path))


def read_depth(path: str | Path) -> np.ndarray:
    """float32[H,W] metres (0 = missing) from a 16-bit grey PNG in millimetres; errors as in `read_image`."""
    return decode_depth(read_file(path))


def read_file(path: str | Path) -> File:
    try:
        return File(str(path), Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing file; restore it, take it off the list, or set on_error='skip'"
        ) from None


def decode_image(file: File) -> np.ndarray:
    """As `read_image`."""
    return np.array(_decoded(file).convert("RGB"))


def decode_depth(file: File) -> np.ndarray:
    """As `read_depth`."""
    image = _decoded(file)
    if not (image.mode == "I" or image.mode.startswith("I;16")):
        raise DataError(
            f"{file.name}: depth must be a 16-bit grey PNG in millimetres, but Pillow reads mode {image.mode!r}; "
            "write it again with 16 bits (an 8-bit or colour file is a picture of depth, not depth)"
        )
    return np.asarray(image).astype(np.float32) / np.float32(1000)


def decode_pair(depth: File, image: File | None) -> dict[str, np.ndarray]:
    """`depth` float32[H,W] and, where given, `image` uint8[H,W,3], of one size; errors as in `read_image`."""
    example = {"depth": decode_depth(depth)}
    if image is not None:
        example["image"] = decode_image(image)
        if example["image"].shape[:2] != example["depth"].shape:
            raise DataError(
                f"{image.name} is {_size(example['image'])} but {depth.name} is {_size(example['depth'])}; "
                "image and depth must have one size: restore the pair or take it off the list"
            )
    return example


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def mean_depth_map(source: NyuSource, limit: int = 0) -> np.ndarray:
    """float32[H,W] metres: at each pixel the mean of the annotated (> 0) depths, the baseline that sees no image.

    Pixels that no example annotates get the mean of all annotated values.

    Args:
      source: NyuSource or any source whose maps have one size; broken examples are left out under on_error='skip'.
      limit: use the first `limit` examples; 0 = all.
    """
    total = count = np.float64(0)
    for index in range(min(limit, len(source)) if limit else len(source)):
        try:
            depth = source.read(index)["depth"].astype(np.float64)
        except READ_ERRORS:
            if getattr(source, "on_error", "raise") == "raise":
                raise
            continue
        if np.ndim(total) and depth.shape != total.shape:
            raise DataError(
                f"{source.names[index]} is {_size(depth)} but the maps before it are {_size(total)}; "
                "a mean depth map needs maps of one size"
            )
        total, count = total + depth, count + (depth > 0)
    if not np.any(count):
        raise DataError("no annotated pixel in any depth map; a mean depth map needs some depth > 0")
    return np.where(count > 0, total / np.maximum(count, 1), total.sum() / count.sum()).astype(np.float32)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _decoded(file: File) -> Image.Image:
    """Decodes an image whole, so that a truncated file is found here and named."""
    try:
        image = Image.open(io.BytesIO(file.content))
        image.load()
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{file.name}: broken image file ({error}); restore it, take it off the list, or set on_error='skip'"
        ) from error
    return image
