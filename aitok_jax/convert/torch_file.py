"""Reads PyTorch's .pt and .pth files, the zip and the older stream format, without PyTorch.

A pickle is a program. It is carried out by the standard library's own machine, cut down to what makes tensors, numbers,
strings and containers. Nothing is imported, and nothing of the file's choice is called. A name in the pickle is one of:

- known, in `CALLS` or `STORAGES`: ours is taken in its place;
- of Python's standard library and not in `PLAIN` (os.system, builtins.eval): the file is refused as soon as it is
  mentioned, for no weights need it;
- any other (yacs.config.CfgNode, argparse.Namespace): a `Placeholder`. To call it, make an object of it or fill that
  gives the same placeholder, and what it was given is dropped.
"""

import dataclasses
import functools
import io
import math
import pickle
import pickletools
import sys
from collections.abc import Callable, Collection, Iterable, Sized
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAX_PICKLE = 2**22  # bytes of a file's pickles; those of ten thousand tensors take 3 MB
MAX_GIVEN = 2**20  # values given to a pickle's calls, over and over maybe; those of ten thousand tensors are 200,000
MAX_NAME = 200  # characters of a class or function that a pickle mentions
LEGACY = {"magic number": 0x1950A86A20F9469CFC6C, "protocol": 1001}
BYTE_ORDER = "its values are not little-endian", "save it again on a little-endian machine"
_NAMES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Bool": "?"}
_NAMES |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _NAMES.items()}
_PLAIN = """
    argparse.Namespace types.SimpleNamespace pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath
    pathlib.PureWindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath uuid.UUID decimal.Decimal
    datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone fractions.Fraction
    collections.defaultdict collections.deque collections.Counter collections.UserDict collections.UserList
    builtins.object builtins.set builtins.frozenset builtins.complex builtins.slice builtins.range builtins.bytearray
    builtins.bytes builtins.str builtins.int builtins.float builtins.bool builtins.list builtins.tuple builtins.dict
    typing.Any typing.Union typing.Optional typing.Dict typing.List typing.Tuple operator.getitem _operator.getitem
    copyreg._reconstructor copyreg.__newobj__ _codecs.encode
"""
PLAIN = frozenset(_PLAIN.split())  # the standard library's names of objects that hold values
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 PERSID BINPERSID
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS SETITEM SETITEMS
"""
INSTRUCTIONS = [getattr(pickle, name)[0] for name in _INSTRUCTIONS.split()]  # as the standard library carries them out


class WeightFileError(ValueError):
    """A file that is damaged, is none of the formats, or holds what a weight file must not; and what to do then."""

    def __init__(self, what: str, way_out: str = "get the file again, or save it again"):
        super().__init__(f"{what}; {way_out}")
        self.what, self.way_out = what, way_out


def are_counts(numbers: Iterable) -> bool:
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def is_shape(shape: Collection) -> bool:
    """Whether an array, which may be empty, can have this shape."""
    return len(shape) <= 32 and are_counts(shape) and math.prod(n for n in shape if n) < 2**48


class Dict(dict):
    """A dictionary of a pickle; entries whose key may take forever to hash (tuples, endless numbers) are left out."""

    def __init__(self, pairs: Iterable = ()):
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | float | None) or (isinstance(key, int) and -(2**63) <= key < 2**64):
            super().__setitem__(key, value)


class Placeholder:
    """Stands for an object of an unknown class, and for all that is made of it; what it is given is dropped."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, value: Any) -> None: ...


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
            raise WeightFileError(
                "a tensor of impossible storage, size, stride or offset: these are up to 32 whole numbers each, from 0"
            )
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


def _is_refused(module: str, name: str) -> bool:
    names, modules = pickle._compat_pickle.NAME_MAPPING, pickle._compat_pickle.IMPORT_MAPPING  # Python 2's to ours
    module, name = names.get((module, name), (modules.get(module, module), name))
    return module.split(".")[0] in sys.stdlib_module_names and f"{module}.{name}" not in PLAIN


class _Dispatch(dict):
    def __missing__(self, code: int):
        raise WeightFileError(f"refused: the pickle instruction {pickletools.code2op[chr(code)].name}")


class _Machine(pickle._Unpickler):  # not the C one, which makes room for the largest index that a file names
    """Carries out one pickle; `dtypes` (key -> dtype) gets the storages that it mentions."""

    def __init__(self, file: io.BytesIO, dtypes: dict[str, np.dtype]):
        super().__init__(file, encoding="latin1")
        self._dtypes, self._given = dtypes, 0

    def find_class(self, module: str, name: str) -> Callable | np.dtype | Placeholder:
        if len(module) + len(name) > MAX_NAME:
            raise WeightFileError(f"refused: it wants {module[:80]!r}…, a name of more than {MAX_NAME} characters")
        full = f"{module}.{name}"
        if full in CALLS or full in STORAGES:
            return CALLS.get(full) or STORAGES[full]
        if _is_refused(module, name):
            raise WeightFileError(
                f"refused: it wants {full!r}, but a weight file may hold tensors, numbers, strings and containers "
                "only. Nothing was run",
                "if you trust the file, load it with PyTorch and save its state dict alone",
            )
        return Placeholder(full)

    def persistent_load(self, pid: Any) -> Storage | Placeholder:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, _, int() as numel, *view) if not any(view):
                if self._dtypes.setdefault(key, dtype) != dtype or not are_counts((numel,)):
                    raise WeightFileError(f"storage {key!r:.80} is of two dtypes, or of no proper size")
                return Storage(dtype, key, numel)
            case ("module", Placeholder() as kind, *_):  # the class of a module, with its source, in the stream format
                return kind
            case ("storage", Placeholder(name=name), *_):
                known = ", ".join(STORAGES)
                raise WeightFileError(f"a tensor in a {name!r}, but only {known} are read", "save it as one of them")
        named = f"{pid!r:.200}" if isinstance(pid, str) else _kind(pid)
        raise WeightFileError(
            f"refused: a reference to {named} that is no storage, or a view of one",
            "save it with PyTorch 1.6 or later",
        )

    def load_reduce(self) -> None:
        given, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Placeholder):
            self.append(function)
            return
        if not callable(function) or not isinstance(given, tuple):
            raise WeightFileError(f"refused: it calls {_kind(function)} with {_kind(given)}")
        self._given += len(given) + sum(len(part) for part in given if isinstance(part, Sized))
        if self._given > MAX_GIVEN:
            raise WeightFileError(f"a pickle that gives its calls more than {MAX_GIVEN} values")
        self.append(function(*given))

    def load_build(self) -> None:  # state dicts carry a version table as an attribute, which is left out
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Placeholder) and not (isinstance(target, dict) and isinstance(state, dict)):
            raise WeightFileError(f"refused: it sets the state of {_kind(target)}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(Dict(zip(items[::2], items[1::2], strict=True)))

    def load_newobj(self) -> None:
        self.stack.pop()
        self._make(self.stack.pop(), "NEWOBJ")

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def load_obj(self) -> None:
        self._make(self.pop_mark()[0], "OBJ")

    def load_inst(self) -> None:
        self.load_global()
        kind = self.stack.pop()
        self.pop_mark()
        self._make(kind, "INST")

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Placeholder("builtins.frozenset"))

    def load_additems(self) -> None:
        self.pop_mark()
        self._make(self.stack.pop(), "ADDITEMS")

    def _make(self, kind: Any, instruction: str) -> None:
        if not isinstance(kind, Placeholder):
            raise WeightFileError(f"refused: the pickle instruction {instruction} with {_kind(kind)}")
        self.append(kind)

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in INSTRUCTIONS})
    dispatch |= {
        pickle.EMPTY_DICT[0]: lambda self: self.append(Dict()),
        pickle.DICT[0]: load_dict,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.OBJ[0]: load_obj,
        pickle.INST[0]: load_inst,
        pickle.EMPTY_SET[0]: lambda self: self.append(Placeholder("builtins.set")),
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
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


def read_zip(names: Collection[str], read: Callable[[str], bytes]) -> tuple[Any, Callable[[str], bytes]]:
    """What a zip-format file holds, with a `Tensor` for each; `read` gives an entry, the result's a storage.

    Raises:
      WeightFileError: as the class says.
    """
    pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightFileError("a zip file without data.pkl: not one that torch.save has written")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and read(f"{folder}byteorder") != b"little":
        raise WeightFileError(*BYTE_ORDER)
    value = _run(io.BytesIO(read(pickles[0])[:MAX_PICKLE]), {})
    return value, functools.cache(lambda key: read(f"{folder}data/{key}"))


def read_legacy(file: BinaryIO, size: int) -> tuple[Any, Callable[[str], bytes]]:
    """What a file of the stream format (PyTorch before 1.6) holds, as `read_zip`."""
    head, dtypes, records = io.BytesIO(file.read(MAX_PICKLE)), {}, {}
    for name, expected in LEGACY.items():
        found = _run(head, {})
        if not isinstance(found, int) or found != expected:
            raise WeightFileError(f"a pickle, but without the {name} of torch.save")
    system = _run(head, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightFileError(*BYTE_ORDER)
    value, keys = _run(head, dtypes), _run(head, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*dtypes}:
        raise WeightFileError("its list of storages does not fit its tensors")
    file.seek(head.tell())
    for key in keys:
        length = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        left = size - file.tell()
        if length > left:
            raise WeightFileError(f"cut off: storage {key!r:.80} should have {length} bytes, {left} are there")
        records[key] = file.tell(), length
        file.seek(length, io.SEEK_CUR)

    @functools.cache
    def load(key: str) -> bytes:
        start, length = records[key]
        file.seek(start)
        return file.read(length)

    return value, load
