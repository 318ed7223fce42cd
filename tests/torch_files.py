"""Writes the two file formats of torch.save around a given pickle."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def zip_file(program: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """The zip format: data.pkl and the storages' bytes under data/."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in (records or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return target.getvalue()


def legacy_file(program: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> bytes:
    """The stream format; storages are key -> (number of values, bytes)."""
    storages = storages or {}
    head = b"".join(pickle.dumps(value, 2) for value in (LEGACY_MAGIC, LEGACY_PROTOCOL, SYSTEM))
    keys = pickle.dumps(list(storages), 2)
    return head + program + keys + b"".join(struct.pack("<q", n) + data for n, data in storages.values())


def value(v: object) -> bytes:
    """The instructions that put a plain value on the stack."""
    return pickle.dumps(v, 2)[2:-1]  # without PROTO and STOP


def tensor(
    size: tuple, stride: tuple, *, numel: int, offset: int = 0, storage: str = "FloatStorage", key: str = "0"
) -> bytes:
    """The instructions that put a tensor on the stack."""
    reference = b"(" + value("storage") + f"ctorch\n{storage}\n".encode() + value(key) + value("cpu") + value(numel)
    arguments = b"(" + reference + b"tQ" + value(offset) + value(size) + value(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"


def tensor_program(size: tuple, stride: tuple, **options) -> bytes:
    """The pickle of {"w": tensor}."""
    return b"\x80\x02}" + value("w") + tensor(size, stride, **options) + b"s."


def torch_save(arrays: Mapping[str, np.ndarray], wrapper: str, legacy: bool = False) -> bytes:
    """{wrapper: float32 arrays} as a file of either format."""
    program, storages = b"\x80\x02}" + value(wrapper) + b"}", {}
    for i, (name, array) in enumerate(arrays.items()):
        array = np.ascontiguousarray(array, np.float32)
        stride = tuple(step // 4 for step in array.strides)
        program += value(name) + tensor(array.shape, stride, numel=array.size, key=str(i)) + b"s"
        storages[str(i)] = (array.size, array.tobytes())
    if legacy:
        return legacy_file(program + b"s.", storages)
    return zip_file(program + b"s.", {key: data for key, (_, data) in storages.items()})


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()
