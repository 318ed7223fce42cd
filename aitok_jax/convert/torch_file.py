"""Reads PyTorch's .pt and .pth files, the zip and the older stream format, without PyTorch.

A pickle is a program. It is carried out by the standard library's own machine, cut down to what makes tensors, numbers,
strings and containers. Nothing is imported, and nothing of the file's choice is called: a name that is neither in
`CALLS` nor in `STORAGES` is refused as soon as it is mentioned.
"""

import dataclasses
import functools
import io
import math
import pickle
import pickletools
from collections.abc import Callable, Collection, Iterable, Sized
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

WRAPPERS = ("weights", "state_dict", "model")
MAX_PICKLE = 2**22  # bytes of a file's pickles; those of ten thousand tensors take 3 MB
MAX_GIVEN = 2**20  # values given to a pickle's calls, over and over maybe; those of ten thousand tensors are 200,000
LEGACY = {"magic number": 0x1950A86A20F9469CFC6C, "protocol": 1001}
BYTE_ORDER = "its values are not little-endian; save it again on a little-endian machine"
_NAMES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Bool": "?"}
_NAMES |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _NAMES.items()}
_STANDARD = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 PERSID BINPERSID
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS SETITEM SETITEMS
"""
INSTRUCTIONS = [getattr(pickle, name)[0] for name in _STANDARD.split()]  # as the standard library carries them out


class WeightFileError(ValueError):
    """A file that is damaged, is none of the formats, or holds what a weight file must not."""


def are_counts(numbers: Iterable) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def is_shape(shape: Collection) -> bool:
    """Whether an array, which may be empty, can have this shape."""
    return len(shape) <= 32 and are_counts(shape) and math.prod(n for n in shape if n) < 2**48


class Dict(dict):
    """A dictionary of a pickle; what takes forever to hash (tuples in tuples, endless numbers) is no key of it."""

    def __init__(self, pairs: Iterable = ()):
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float | None) or (isinstance(key, int) and not -(2**63) <= key < 2**64):
            raise WeightFileError(f"a dictionary with {_kind(key)} as a key")
        super().__setitem__(key, value)


@dataclasses.dataclass(frozen=True)
class Storage:
    dtype: np.dtype
    key: str
    numel: int


class Tensor:
    """A tensor whose values are not read yet; offset and strides count values of the storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, *_):
        kinds_ok = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
        if not kinds_ok or not is_shape(size) or len(stride) != len(size) or not are_counts((offset, *stride)):
            raise WeightFileError("a tensor of impossible storage, size, stride or offset")
        end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and max(math.prod(size), end) > storage.numel:
            where = f"size {size}, stride {stride} and offset {offset}"
            raise WeightFileError(f"a tensor of {where} reaches beyond its storage of {storage.numel} values")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def array(self, load: Callable[[str], bytes]) -> np.ndarray:
        dtype, numel = self.storage.dtype, self.storage.numel
        if 0 in self.size:
            return np.zeros(self.size, dtype)
        data = load(self.storage.key)
        if numel * dtype.itemsize > len(data):
            raise WeightFileError(f"a storage of {numel} {dtype} values has only {len(data)} bytes")
        steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(self.size, self.stride, strict=True)]
        return np.ndarray(self.size, dtype, data, self.offset * dtype.itemsize, steps)


CALLS = {
    "torch._utils._rebuild_tensor": Tensor,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": Dict,
}


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


class _Dispatch(dict):
    def __missing__(self, code: int):
        raise WeightFileError(f"refused: the pickle instruction {pickletools.code2op[chr(code)].name}")


class _Machine(pickle._Unpickler):  # not the C one, which makes room for the largest index that a file names
    """Carries out one pickle; `dtypes` (key -> dtype) gets the storages that it mentions."""

    def __init__(self, file: io.BytesIO, dtypes: dict[str, np.dtype]):
        super().__init__(file, encoding="latin1")
        self._dtypes, self._given = dtypes, 0

    def find_class(self, module: str, name: str) -> Callable | np.dtype:
        full = f"{module}.{name}"
        if full not in CALLS and full not in STORAGES:
            raise WeightFileError(
                f"refused: it wants {full!r:.200}, but a weight file may hold tensors, numbers, strings and containers "
                "only. Nothing was run; if you trust the file, load it with PyTorch and save its state dict alone"
            )
        return CALLS.get(full) or STORAGES[full]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, _, int() as numel, *view) if not any(view):
                if self._dtypes.setdefault(key, dtype) != dtype or not are_counts((numel,)):
                    raise WeightFileError(f"storage {key!r:.80} is of two dtypes, or of no proper size")
                return Storage(dtype, key, numel)
        named = f"{pid!r:.200}" if isinstance(pid, str) else _kind(pid)
        raise WeightFileError(
            f"refused: a reference to {named} that is no storage, or a view of one: save it with PyTorch 1.6 or later"
        )

    def load_reduce(self) -> None:
        given, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(given, tuple):
            raise WeightFileError(f"refused: it calls {_kind(function)} with {_kind(given)}")
        self._given += len(given) + sum(len(part) for part in given if isinstance(part, Sized))
        if self._given > MAX_GIVEN:
            raise WeightFileError(f"a pickle that gives its calls more than {MAX_GIVEN} values")
        self.append(function(*given))

    def load_build(self) -> None:  # state dicts carry a version table as an attribute, which is left out
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict) or not isinstance(state, dict):
            raise WeightFileError(f"refused: it sets the state of {_kind(target)}")

    def load_inst(self) -> None:
        self.load_global()  # says what is wanted
        raise WeightFileError("refused: the pickle instruction INST")

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in INSTRUCTIONS})
    dispatch |= {
        pickle.EMPTY_DICT[0]: lambda self: self.append(Dict()),
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.INST[0]: load_inst,
    }


def _run(file: io.BytesIO, dtypes: dict[str, np.dtype]) -> Any:
    """What the pickle at the file's position makes; the position is left behind its end."""
    try:
        return _Machine(file, dtypes).load()
    except WeightFileError:
        raise
    except Exception as error:
        if file.tell() >= MAX_PICKLE:
            raise WeightFileError(f"a pickle of more than {MAX_PICKLE} bytes") from error
        raise WeightFileError(f"broken pickle: {type(error).__name__}: {error!s:.200}") from error


def _arrays(value: Any, load: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    """The tensors of the innermost wrapped dictionary; `load` gives the bytes of a storage."""
    for _ in WRAPPERS:
        inner = [value[key] for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)]
        value = inner[0] if inner else value
    tensors, load = value if isinstance(value, dict) else {}, functools.cache(load)
    arrays = {k: v.array(load) for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not arrays:
        raise WeightFileError(f"holds no arrays by name, nor a dictionary of them under {', '.join(WRAPPERS)}")
    return arrays


def read_zip(names: Collection[str], read: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    """The arrays of a zip-format file, whose entries `read` gives.

    Raises:
      WeightFileError: as the class says.
    """
    pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightFileError("a zip file without data.pkl: not one that torch.save has written")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and read(f"{folder}byteorder") != b"little":
        raise WeightFileError(BYTE_ORDER)
    return _arrays(_run(io.BytesIO(read(pickles[0])[:MAX_PICKLE]), {}), lambda key: read(f"{folder}data/{key}"))


def read_legacy(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """The arrays of a file of the stream format (PyTorch before 1.6), as `read_zip`."""
    head, dtypes, records = io.BytesIO(file.read(MAX_PICKLE)), {}, {}
    for name, expected in LEGACY.items():
        found = _run(head, {})
        if not isinstance(found, int) or found != expected:
            raise WeightFileError(f"a pickle, but without the {name} of torch.save")
    system = _run(head, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightFileError(BYTE_ORDER)
    value, keys = _run(head, dtypes), _run(head, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*dtypes}:
        raise WeightFileError("its list of storages does not fit its tensors")
    file.seek(head.tell())
    for key in keys:
        length = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        left = size - file.tell()
        if length > left:
            raise WeightFileError(f"cut off: storage {key!r:.80} should have {length} bytes, {left} are there")
        records[key] = file.read(length)
    return _arrays(value, records.__getitem__)
