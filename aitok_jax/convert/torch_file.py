"""Reads PyTorch's .pt and .pth files, the zip and the older stream format, without PyTorch; see `unpickle`."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from aitok_jax.convert.unpickle import MAX_PICKLE, Storage, WeightFileError, run

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_zip(data: memoryview, archive: zipfile.ZipFile) -> Any:
    """What a zip-format file holds: plain values and containers, tensors as `Tensor`.

    Raises:
      WeightFileError: as the class says.
    """
    names = archive.namelist()
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightFileError("a zip file without data.pkl: not one that torch.save has written")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and bytes(_record(data, archive, f"{folder}byteorder")) != b"little":
        raise WeightFileError("its values are not little-endian; save it again on a little-endian machine")
    records: dict[str, memoryview] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> Storage:
        def load():
            if key not in records:
                records[key] = _aligned(_record(data, archive, f"{folder}data/{key}"))
            return records[key]

        return Storage(dtype, numel, load)

    return run(Reader(_record(data, archive, pickles[0])), storage)


def _record(data: memoryview, archive: zipfile.ZipFile, name: str) -> memoryview:
    """The bytes of an entry, which PyTorch never compresses, without copying them."""
    if name not in archive.NameToInfo:
        raise WeightFileError(f"its archive lacks {name!r}")
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise WeightFileError(f"{name!r} is compressed or encrypted, which torch.save never does")
    header = bytes(data[info.header_offset : info.header_offset + 30]) if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise WeightFileError(f"damaged: no entry where {name!r} should be")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    record = data[start : start + info.file_size]
    if len(record) != info.file_size:
        raise WeightFileError(f"cut off: {name!r} should have {info.file_size} bytes, {len(record)} are there")
    if zlib.crc32(record) != info.CRC:
        raise WeightFileError(
            f"damaged: the checksum of {name!r} is wrong; get the file again (one saved after "
            "torch.serialization.set_crc32_options(False) has none: save it with checksums)"
        )
    return record


def read_legacy(data: memoryview) -> Any:
    """What a file of the stream format (PyTorch before 1.6) holds, as `read_zip`."""
    spans: dict[str, memoryview] = {}
    dtypes: dict[str, np.dtype] = {}

    def storage(dtype: np.dtype, key: str, numel: int) -> Storage:
        if dtypes.setdefault(key, dtype) != dtype:
            raise WeightFileError(f"storage {key!r} is {dtypes[key]} at one place and {dtype} at another")

        def load():
            if key not in spans:
                raise WeightFileError(f"storage {key!r} is not in the file")
            spans[key] = _aligned(spans[key])
            return spans[key]

        return Storage(dtype, numel, load)

    file = Reader(data)
    for name, expected in (("magic number", LEGACY_MAGIC), ("protocol", LEGACY_PROTOCOL)):
        found = run(file, storage)
        if not isinstance(found, int) or found != expected:
            raise WeightFileError(f"a pickle, but without the {name} of torch.save")
    system = run(file, storage)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightFileError("its values are not little-endian; save it again on a little-endian machine")
    value, keys = run(file, storage), run(file, storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in dtypes for key in keys):
        raise WeightFileError("its list of storages does not fit its tensors")
    for key in keys:
        numel = int.from_bytes(file.read(8), "little")
        size = numel * dtypes[key].itemsize
        spans[key] = file.view(size)
        if len(spans[key]) != size:
            raise WeightFileError(f"cut off: storage {key!r} should have {size} bytes, {len(spans[key])} are there")
    return value


def _aligned(data: memoryview) -> memoryview:
    """The same bytes where an array of any dtype may start; copied only where they do not lie so."""
    values = np.frombuffer(data, np.uint8)
    return data if values.ctypes.data % 16 == 0 else memoryview(values.copy())


class Reader:
    """A binary file over a buffer that never makes room for more than is there, however much is asked for."""

    def __init__(self, data: memoryview):
        self._data, self._position = data, 0

    def view(self, size: int) -> memoryview:
        part = self._data[self._position : self._position + size]
        self._position += len(part)
        return part

    def read(self, size: int = -1) -> bytes:
        return bytes(self.view(len(self._data) if size < 0 else size))

    def readline(self) -> bytes:
        size, newline = 128, b""
        while not newline and size < 2 * MAX_PICKLE:
            size *= 2
            line, newline, _ = bytes(self._data[self._position : self._position + size]).partition(b"\n")
        return self.read(len(line) + len(newline))

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position
