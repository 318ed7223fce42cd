"""Reads the pickles of PyTorch files without running them.

A pickle is a program. Its instructions are read here with `pickletools` and carried out by a small machine that knows
tensors, numbers, strings and containers. It imports nothing and calls nothing of the file's choice: a name that is
neither in `CALLS` nor in `STORAGES` is refused as soon as it is mentioned.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

MAX_PICKLE = 2**22  # bytes of a pickle's instructions; those of ten thousand tensors take 3 MB
MAX_DIMS = 32
STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class WeightFileError(ValueError):
    """A file that is damaged, is none of the formats, or holds what a weight file must not."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """`numel` values of one dtype; `load` gives the bytes, aligned and perhaps more of them."""

    dtype: np.dtype
    numel: int
    load: Callable[[], memoryview]

    def values(self) -> np.ndarray:
        data = self.load()
        if self.numel * self.dtype.itemsize > len(data):
            raise WeightFileError(f"a storage of {self.numel} {self.dtype} values has only {len(data)} bytes")
        return np.frombuffer(data, self.dtype, self.numel)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose values are not read yet; offset and strides count elements of the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.size, *self.stride)
        too_big = not _all_sizes(numbers) or math.prod(n for n in self.size if n) >= 2**48
        if too_big or len(self.size) != len(self.stride) or len(self.size) > MAX_DIMS:
            raise WeightFileError("a tensor of impossible size, stride or offset")
        count = math.prod(self.size)
        end = self.offset + 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if count and max(count, end) > self.storage.numel:
            raise WeightFileError(f"{self._text()} reaches beyond its storage of {self.storage.numel} values")

    def _text(self) -> str:
        return f"a tensor of size {self.size}, stride {self.stride} and offset {self.offset}"

    def array(self) -> np.ndarray:
        """The values: read-only, a view of the file where it can be one."""
        if not math.prod(self.size):
            return np.zeros(self.size, self.storage.dtype)
        values = self.storage.values()
        strides = [step * values.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.size, strides, writeable=False)


def _all_sizes(numbers: tuple) -> bool:
    return all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)


class _Call:
    """A function that a pickle may call, by its name."""

    def __init__(self, name: str, make: Callable[..., Any]):
        self.name, self.make = name, make


def _tensor_v2(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise WeightFileError("a tensor without storage, size or stride")
    return Tensor(storage, offset, size, stride)


def _parameter(tensor, requires_grad=False, hooks=None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise WeightFileError(f"a parameter made of {_kind(tensor)}")
    return tensor


def _ordered_dict(pairs=()) -> dict:
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise WeightFileError("an OrderedDict that is not made of pairs")
    return _fill({}, [item for pair in pairs for item in pair])


CALLS = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
}


def _named(name: str) -> _Call | np.dtype:
    if name in STORAGES:
        return STORAGES[name]
    if name in CALLS:
        return _Call(name, CALLS[name])
    raise WeightFileError(
        f"refused: it wants {name!r}, but a weight file may hold tensors, numbers, strings and containers only. "
        "Nothing was run; if you trust the file, load it with PyTorch and save its state dict alone"
    )


def _fill(target: Any, items: list) -> dict:
    if not isinstance(target, dict) or len(items) % 2:
        raise WeightFileError(f"broken pickle: key and value for {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise WeightFileError(f"a dictionary with {_kind(key)} as a key")
        target[key] = value
    return target


def _extend(target: Any, items: list) -> list:
    if not isinstance(target, list):
        raise WeightFileError(f"broken pickle: items for {_kind(target)}")
    target.extend(items)
    return target


def _kind(value: Any) -> str:
    return value.name if isinstance(value, _Call) else f"a {type(value).__name__}"


_PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine of one pickle."""

    def __init__(self, storage: Callable[[np.dtype, str, int], Storage]):
        self._storage = storage
        self._stack: list = []
        self._outer: list[list] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """Carries out one instruction other than STOP."""
        push = self._stack.append
        if name in _PUSH:
            push(arg)
        elif name in _CONSTANT:
            push(_CONSTANT[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in _TUPLES:
            push(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self._recall(arg))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else arg] = self._top()
        elif name == "GLOBAL":
            push(_named(arg.replace(" ", ".", 1)))
        elif name not in ("PROTO", "FRAME"):
            self._act(name, arg)

    def _act(self, name: str, arg: Any) -> None:
        if name == "MARK":
            self._outer.append(self._stack)
            self._stack = []
        elif name == "POP":
            self.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            self._stack.append(self._top())
        elif name in ("TUPLE", "LIST"):
            items = self._to_mark()
            self._stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = self._to_mark()
            self._stack.append(_fill({}, items))
        elif name == "SETITEMS":
            items = self._to_mark()
            _fill(self._top(), items)
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            _fill(self._top(), [key, value])
        elif name == "APPENDS":
            items = self._to_mark()
            _extend(self._top(), items)
        elif name == "APPEND":
            item = self.pop()
            _extend(self._top(), [item])
        else:
            self._make(name, arg)

    def _make(self, name: str, arg: Any) -> None:
        """What would run code in an ordinary pickle."""
        if name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise WeightFileError(f"refused: it wants {_kind(attribute)} of {_kind(module)}")
            self._stack.append(_named(f"{module}.{attribute}"))
        elif name == "REDUCE":
            args, function = self.pop(), self.pop()
            if not isinstance(function, _Call) or not isinstance(args, tuple):
                raise WeightFileError(f"refused: it calls {_kind(function)} with {_kind(args)}")
            try:
                value = function.make(*args)
            except TypeError as error:
                raise WeightFileError(f"{function.name} with {len(args)} arguments") from error
            self._stack.append(value)
        elif name == "BUILD":  # state dicts carry a version table as an attribute, which is left out
            state, target = self.pop(), self._top()
            if not isinstance(target, dict) or not isinstance(state, dict):
                raise WeightFileError(f"refused: it sets the state of {_kind(target)}")
        elif name == "BINPERSID":
            self._stack.append(self._persistent(self.pop()))
        else:
            given = arg.replace(" ", ".", 1) if isinstance(arg, str) else arg
            raise WeightFileError(f"refused: the pickle instruction {name} of {given!r:.200}")

    def _persistent(self, reference: Any) -> Storage:
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise WeightFileError("refused: a reference that is not to a storage")
        _, dtype, key, _, numel, *view = reference
        if not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _all_sizes((numel,)):
            raise WeightFileError("a storage without dtype, name or size")
        if any(view):
            raise WeightFileError("a storage that is a view of another; save the file again with PyTorch 1.6 or later")
        return self._storage(dtype, key, numel)

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise WeightFileError(f"broken pickle: nothing was stored as {index}")
        return self._memo[index]

    def _top(self) -> Any:
        if not self._stack:
            raise WeightFileError("broken pickle: its stack is empty")
        return self._stack[-1]

    def pop(self) -> Any:
        value = self._top()
        del self._stack[-1]
        return value

    def _to_mark(self) -> list:
        if not self._outer:
            raise WeightFileError("broken pickle: no mark")
        items, self._stack = self._stack, self._outer.pop()
        return items


def run(file: Any, storage: Callable[[np.dtype, str, int], Storage]) -> Any:
    """Carries out the pickle at the file's position, which is left behind its end."""
    machine, start = _Machine(storage), file.tell()
    try:
        for opcode, arg, position in pickletools.genops(file):
            if position - start > MAX_PICKLE:
                raise WeightFileError(f"a pickle of more than {MAX_PICKLE} bytes")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except WeightFileError:
        raise
    except ValueError as error:
        raise WeightFileError(f"broken pickle: {error}") from error
    raise WeightFileError("broken pickle: no end")
