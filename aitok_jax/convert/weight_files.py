"""Weight files as dictionaries of arrays: .pt/.pth, .safetensors and .npz, told apart by their content."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aitok_jax.convert import torch_file
from aitok_jax.convert.unpickle import MAX_DIMS, Tensor, WeightFileError

WRAPPERS = ("weights", "state_dict", "model")
MAX_HEADER = 25_000_000  # bytes of a .safetensors header
MAX_UNPACKED = 2**30  # bytes of an .npz that unpacks to more than 20 times its size
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|]?(?:f[248]|[iu][1248]|b1))', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15},? ?)*)\),? ?\} *\n?"
)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, OverflowError, RuntimeError, EOFError, OSError)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a weight file; nothing in the file is run.

    Read are PyTorch's .pt and .pth (both formats), .safetensors and .npz, whatever the suffix. The dictionary inside
    {"weights": ...}, {"state_dict": ...} or {"model": ...} is taken; what is no array is left out. Arrays are read-only
    and may be views of the file, in their own dtypes (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
      FileNotFoundError: there is no such file.
      WeightFileError: a ValueError: a damaged file, another format, a pickle that wants anything but tensors, numbers,
        strings and containers (the message names what), or one that holds no arrays.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    try:
        arrays = _read(data)
        for name in arrays:
            if not name.isprintable():
                raise WeightFileError(f"an array with the name {name!a:.80}")
        return arrays
    except WeightFileError as error:
        raise WeightFileError(f"{path}: {error}") from error


def _read(data: memoryview) -> dict[str, np.ndarray]:
    head = bytes(data[:9])
    if head[8:] == b"{":  # before the others: the length in front of it may look like them
        return _read_safetensors(data)
    if head[:2] == b"PK":
        try:
            return _read_zip(data)
        except WeightFileError:
            raise
        except _ZIP_ERRORS as error:
            raise WeightFileError(f"damaged or cut off: {error}") from error
    if head[:1] == b"\x80":
        return _arrays(torch_file.read_legacy(data))
    raise WeightFileError(f"starts with {head!r}: neither a .pt or .pth of torch.save, nor .safetensors, nor .npz")


def _arrays(value: Any) -> dict[str, np.ndarray]:
    """The tensors of the innermost wrapped dictionary."""
    for _ in WRAPPERS:
        inner = [value[key] for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)]
        value = inner[0] if inner else value
    tensors = value if isinstance(value, dict) else {}
    arrays = {k: v.array() for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not arrays:
        raise WeightFileError(f"holds no arrays by name, nor a dictionary of them under {', '.join(WRAPPERS)}")
    return arrays


def _read_zip(data: memoryview) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(torch_file.Reader(data)) as archive:
        if not any(name.endswith(".npy") for name in archive.namelist()):
            return _arrays(torch_file.read_zip(data, archive))
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(MAX_UNPACKED, 20 * len(data)):
            raise WeightFileError(f"claims to unpack to {unpacked} bytes, of {len(data)}")
        return {entry.filename.removesuffix(".npy"): _read_npy(archive, entry) for entry in entries}


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    data = memoryview(archive.read(entry))
    version = bytes(data[:8])
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(version)
    if width is None:
        raise WeightFileError(f"{entry.filename!r} starts with {version!r}, not as .npy of version 1 or 2")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = _NPY_HEADER.fullmatch(bytes(data[8 + width : start]))
    if not header:
        raise WeightFileError(f"{entry.filename!r} holds no plain numbers: {bytes(data[8 + width : start])!r:.200}")
    dtype, fortran, shape = (part.decode() for part in header.groups())
    shape = tuple(int(n) for n in shape.split(",") if n.strip())
    _check_size(entry.filename, shape, np.dtype(dtype), len(data) - min(start, len(data)))
    return np.frombuffer(data[start:], dtype).reshape(shape, order="F" if fortran == "True" else "C")


def _check_size(name: str, shape: Any, dtype: np.dtype, size: int) -> None:
    sizes_ok = all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if len(shape) > MAX_DIMS or not sizes_ok or math.prod(n for n in shape if n) >= 2**48:
        raise WeightFileError(f"{name!r} has the impossible shape {shape!s:.80}")
    if math.prod(shape) * dtype.itemsize != size:
        raise WeightFileError(f"{name!r} is {dtype} of shape {shape}, but has {size} bytes")


def _read_safetensors(data: memoryview) -> dict[str, np.ndarray]:
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise WeightFileError(f"damaged or cut off: a header of {length} bytes in a file of {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"damaged: its header is not JSON: {error}") from error
    header.pop("__metadata__", None)
    arrays = {name: _read_entry(data[8 + length :], name, entry) for name, entry in header.items()}
    if not arrays or sum(array.nbytes for array in arrays.values()) > len(data) - 8 - length:
        raise WeightFileError("holds no arrays, or arrays that overlap")
    return {name: np.require(array, requirements="A") for name, array in arrays.items()}


def _read_entry(data: memoryview, name: str, entry: Any) -> np.ndarray:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise WeightFileError(f"damaged: {name!r} lacks dtype, shape or data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise WeightFileError(f"{name!r} is of dtype {code!r:.80}; read are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise WeightFileError(f"damaged: {name!r} has no proper shape or data_offsets")
    if not all(type(n) is int for n in span) or not 0 <= span[0] <= span[1] <= len(data):
        raise WeightFileError(f"cut off: {name!r} lies at {span!s:.80} of {len(data)} bytes")
    dtype = np.dtype(_DTYPES[code])
    _check_size(name, shape, dtype, span[1] - span[0])
    return np.frombuffer(data[span[0] : span[1]], dtype).reshape(shape)


def write_weights(path: str | Path, arrays: Mapping[str, np.ndarray], wrapper: str = "weights") -> None:
    """Writes arrays by name as .safetensors or, where torch is installed, .pt or .pth ({wrapper: arrays}).

    Raises:
      ValueError: another suffix, a dtype that the format lacks, or no torch for .pt and .pth.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{path}: the suffix must be .safetensors, .pt or .pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".safetensors":
        _write_safetensors(part, arrays)
    else:
        _write_torch(part, arrays, wrapper)
    part.replace(path)


def _write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # keeps all of them aligned
    header, end = {}, 0
    for name, array in ordered:
        if array.dtype not in _CODES:
            raise ValueError(f"{name} is {array.dtype}; .safetensors has {', '.join(map(str, _CODES))}")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_torch(path: Path, arrays: Mapping[str, np.ndarray], wrapper: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise ValueError(".pt and .pth need torch (pip install torch); write .safetensors instead") from error

    def tensor(array: np.ndarray):
        array = np.array(array, order="C")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({wrapper: {name: tensor(array) for name, array in arrays.items()}}, path)
