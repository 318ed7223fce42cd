"""Weight files as dictionaries of arrays: .pt/.pth, .safetensors and .npz, told apart by their content."""

import functools
import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from aitok_jax import paths
from aitok_jax.convert import torch_file, weight_sets
from aitok_jax.convert.torch_file import WeightFileError

MAX_HEADER = 25_000_000  # bytes of a .safetensors header
MAX_UNPACKED = 2**28  # bytes of an archive that unpacks to more than 20 times its size
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "BOOL": "?"}
DTYPES |= {f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (8, 4, 2, 1)}
DTYPES = {code: np.dtype(dtype) for code, dtype in DTYPES.items()}
DESCRIPTOR = 24  # bytes that may follow an entry of a zip file: its sizes and checksum, once more
NUMBERS = "leave it out, or save it as floats, integers or booleans of up to 8 bytes"
CODES = {dtype: code for code, dtype in DTYPES.items()}
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_weights(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Name -> array of a weight file; nothing in the file is run.

    Read are PyTorch's .pt and .pth (both formats), .safetensors and .npz, whatever the suffix. The dictionary inside
    {"weights": ...}, {"state_dict": ...}, {"model": ...} or {"module": ...} is taken; what is no array is left out.
    Arrays are in their own dtypes (bfloat16 as `ml_dtypes.bfloat16`); they may be read-only and share memory.

    Args:
      path: the file.
      key: of another dictionary in the file to take, such as 'model_ema' of averaged weights beside the plain ones.

    Raises:
      FileNotFoundError: there is no such file.
      WeightFileError: a ValueError: a damaged file, another format, a pickle that mentions functions of Python itself
        (the message names which), or one that holds no arrays.
    """
    return read_with_notes(path, key)[0]


def read_with_notes(path: str | Path, key: str | None = None) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """`read_weights`, and a line for each thing beside the arrays: other sets of them, and objects passed over."""
    with paths.opened(paths.expand(path)) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            tree, load = _read(file, size)
            chosen, notes = weight_sets.choose(tree, key)
            for name in chosen:
                if not name.isprintable():
                    raise WeightFileError(f"an array with the name {name!a:.80}", "rename it")
            return {name: value.array(load) if load else value for name, value in chosen.items()}, notes
        except WeightFileError as error:
            raise WeightFileError(f"{path}: {error.what}", error.way_out) from error
        except Exception as error:  # the readers of zip, JSON and .npy raise a dozen kinds
            text = f"damaged, cut off or too large: {type(error).__name__}: {error!s:.300}"
            raise WeightFileError(f"{path}: {text}") from error


def _read(file: BinaryIO, size: int) -> tuple[Any, Callable[[str], bytes] | None]:
    """What the file holds, and what gives the bytes of a storage to the tensors in it, where these are not arrays."""
    head = file.read(9)
    file.seek(0)
    if head[8:] == b"{":  # before the others: the length in front of it may look like them
        return _read_safetensors(file, size), None
    if head[:2] == b"PK":
        return _read_zip(file, zipfile.ZipFile(file), size)
    if head[:1] == b"\x80":
        return torch_file.read_legacy(file, size)
    found = f"starts with {head!r}" if head else "is empty"
    formats = "neither a .pt or .pth of torch.save, nor .safetensors, nor .npz"
    raise WeightFileError(f"{found}: {formats}", "give a file of one of these")


def _read_zip(file: BinaryIO, archive: zipfile.ZipFile, size: int) -> tuple[Any, Callable[[str], bytes] | None]:
    entries, read = archive.infolist(), functools.partial(_read_entry, archive)
    names = [entry.filename for entry in entries]
    unpacked, packed = sum(entry.file_size for entry in entries), sum(entry.compress_size for entry in entries)
    if unpacked > max(MAX_UNPACKED, 20 * size):
        raise WeightFileError(f"claims to unpack to {unpacked} bytes, of {size}", "save it uncompressed")
    if packed > size or len({name.removesuffix(".npy") for name in names}) != len(names):
        raise WeightFileError("damaged: entries that overlap, or two of one name")
    _check_directory(file, entries, archive.start_dir)
    is_npz = any(name.endswith(".npy") for name in names)
    ways = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} if is_npz else {zipfile.ZIP_STORED}
    if any(entry.compress_type not in ways or entry.flag_bits & 1 for entry in entries):
        raise WeightFileError("compressed or encrypted as neither torch.save nor np.savez does", "save it with these")
    if is_npz:
        return {name.removesuffix(".npy"): _read_npy(name, read(name)) for name in names}, None
    return torch_file.read_zip(names, read)


def _check_directory(file: BinaryIO, entries: list[zipfile.ZipInfo], end: int) -> None:
    """The entries must follow each other up to the directory: one flipped bit there may drop those after it."""
    at = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        gap, at = entry.header_offset - at, entry.header_offset
        file.seek(at)
        name_and_extra = struct.unpack("<26xHH", file.read(30))
        if not 0 <= gap <= DESCRIPTOR:
            break
        at += 30 + sum(name_and_extra) + entry.compress_size
    else:
        gap = end - at
    if not 0 <= gap <= DESCRIPTOR:
        raise WeightFileError(f"damaged: the directory of the zip file does not fit what lies at byte {at}")


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of an entry, whose checksum is checked; no more are unpacked than it should have."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        data = file.read(size + 1)
    if len(data) != size:
        raise WeightFileError(f"cut off: {name!r:.80} should have {size} bytes, {len(data)} are there")
    return data


def _read_npy(name: str, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    try:
        read_header = NPY_HEADERS[np.lib.format.read_magic(stream)]
        shape, fortran, dtype = read_header(stream, max_header_size=1000)
    except Exception as error:  # the header is Python, which NumPy parses
        raise WeightFileError(f"{name!r:.80} holds no plain numbers: it starts with {data[:100]!r}", NUMBERS) from error
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise WeightFileError(f"{name!r:.80} holds no plain numbers, but {dtype!s:.80}", NUMBERS)
    start = stream.tell()
    return _array(name, shape, dtype, data, start, len(data), "F" if fortran else "C")


def _array(name: str, shape: Any, dtype: np.dtype, data: bytes, start: int, stop: int, order="C") -> np.ndarray:
    if not torch_file.is_shape(shape):
        raise WeightFileError(f"{name!r:.80} has the impossible shape {shape!s:.80}")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise WeightFileError(f"{name!r:.80} is {dtype} of shape {shape}, but has {stop - start} bytes")
    return np.require(np.ndarray(shape, dtype, data, start, order=order), requirements="A")


def _read_safetensors(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise WeightFileError(f"damaged or cut off: a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays, spans, data, end = {}, [], file.read(), 0
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], list(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            known = f"dtype ({', '.join(DTYPES)}), shape or data_offsets"
            raise WeightFileError(f"{name!r:.80} lacks a proper {known}: {entry!s:.200}") from error
        if not torch_file.are_counts((start, stop)) or not start <= stop <= len(data):
            raise WeightFileError(f"cut off: {name!r:.80} lies at {start!s:.40} to {stop!s:.40} of {len(data)} bytes")
        arrays[name] = _array(name, shape, dtype, data, start, stop)
        spans.append((start, stop))
    for start, stop in sorted(spans):
        end = stop if start == end else -1
    if not arrays or end != len(data):
        raise WeightFileError("holds no arrays, or arrays that overlap or leave gaps")
    return arrays


def write_weights(path: str | Path, arrays: Mapping[str, np.ndarray], wrapper: str = "weights") -> None:
    """Writes arrays by name as .safetensors or, where torch is installed, .pt or .pth ({wrapper: arrays}).

    Raises:
      ValueError: another suffix, a dtype that the format lacks, or no torch for .pt and .pth.
    """
    path = paths.expand(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{path}: the suffix must be .safetensors, .pt or .pth")
    with paths.writing(path) as file:
        if path.suffix == ".safetensors":
            _write_safetensors(file, arrays)
        else:
            _write_torch(file, arrays, wrapper)


def _write_safetensors(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # keeps all of them aligned
    header, end = {}, 0
    for name, array in ordered:
        if array.dtype not in CODES:
            raise ValueError(f"{name} is {array.dtype}; .safetensors has {', '.join(map(str, CODES))}")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, array in ordered:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_torch(file: BinaryIO, arrays: Mapping[str, np.ndarray], wrapper: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise ValueError(".pt and .pth need torch (pip install torch); write .safetensors instead") from error

    def tensor(array: np.ndarray):
        array = np.array(array, order="C")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({wrapper: {name: tensor(array) for name, array in arrays.items()}}, file)
