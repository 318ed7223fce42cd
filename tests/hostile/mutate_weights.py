"""Weight files made to harm: mutations of good ones, the same for the same index.

    PYTHONPATH=.:tests python -m hostile.mutate_weights --count=20000 [--first=0]
    PYTHONPATH=.:tests python -m hostile.mutate_weights --show=17 > weights.bin

The first tries so many and prints what became of them; the second gives one of them.
"""

import encodings.cp437  # noqa: F401  of names in zip files; imported while one is read, it would count as executed
import functools
import io
import json
import pickle
import pickletools
import random
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile import tries
from torch_files import legacy_file, tensor_program, text, torch_save, zip_file

from aitok_jax.convert.weight_files import WeightFileError, read_weights

FIXTURES = Path(__file__).parents[1] / "weights"
NUMBERS = (0, 1, -1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 5 * 2**30, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    *NUMBERS,
    10**30,
    True,
    False,
    None,
    1.5,
    float("nan"),
    "",
    "F32",
    "x" * 3000,
    [],
    {},
    [1] * 40,
    [[]],
    {"a": 1},
)
DESCRIPTIONS = ("<f4", "|O", "<f8", ">f4", "<f2", "|V2", "<U9", "|b1", "<m8[ns]", "(1,1)f4", "f4," * 30, "<c16", "<f16")
NAMES = (
    *(
        "os system",
        "posix system",
        "builtins eval",
        "__builtin__ exec",
        "subprocess Popen",
        "nt system",
        "os.path join",
    ),
    *("torch load", "torch.hub load", "yacs.config CfgNode", "argparse Namespace", "collections defaultdict", "a b"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"),
    *("numpy dtype", "torch FloatStorage", "torch UntypedStorage", "copyreg _reconstructor", "pickle loads", "x y.z"),
)
CENTRAL = (0, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42, 46)  # where the fields of an entry begin
END = (0, 4, 6, 8, 10, 12, 16, 20, 22)
LOCAL = (0, 4, 6, 8, 10, 12, 14, 18, 22, 26, 28, 30)


@functools.cache
def sources() -> tuple[bytes, ...]:
    """Good files, all of them small."""
    files = [path.read_bytes() for path in sorted(FIXTURES.iterdir())]
    arrays = {"w": np.arange(30.0, dtype=np.float32), "v": np.ones((3, 4), np.int8), "e": np.zeros((0, 2))}
    for save in (np.savez, np.savez_compressed):
        save(target := io.BytesIO(), **arrays)
        files.append(target.getvalue())
    files += [torch_save({"w": np.ones((3, 2)), "v": np.ones(3)}, "model", legacy) for legacy in (False, True)]
    return tuple(files)


@functools.cache
def programs() -> tuple[bytes, ...]:
    """Pickles of good files and of harmful ones."""
    with zipfile.ZipFile(FIXTURES / "zip.pth") as archive:
        long = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    system = b"cposix\nsystem\n" + text("touch marker") + b"\x85R"
    placeholder = b"cyacs.config\nCfgNode\n)\x81}" + text("a") + b"K\x01sb"
    around = b"\x80\x02}(" + text("model") + tensor_program((3,), (1,), numel=3)[2:-1] + text("config")
    short = tensor_program((3,), (1,), numel=3)
    return long, short, around + placeholder + b"u.", around + system + b"u.", around + b"N\x93" + system + b"u."


def make(index: int) -> tuple[str, bytes]:
    """The kind and the content of a file."""
    rng = random.Random(index)
    kind, function = KINDS[index % len(KINDS)]
    return kind, function(rng)


def read(path: Path) -> bool:
    """Whether the file was read.

    Raises:
      MemoryError: it was refused for want of memory alone.
    """
    try:
        read_weights(path)
    except WeightFileError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from error
        return False
    return True


def _bytes(rng: random.Random) -> bytes:
    """One to four changes: bytes, numbers, and pieces cut out, doubled or cut off."""
    changed = bytearray(rng.choice(sources()))
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(changed) or 1), rng.randrange(7)
        if kind <= 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b"\0"
        elif kind == 3:
            changed[at : at + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
        elif kind == 4:
            del changed[at : at + rng.randint(1, 40)]
        elif kind == 5:
            start = rng.randrange(len(changed) or 1)
            changed[at:at] = changed[start : start + rng.randint(1, 40)]
        else:
            del changed[max(at, 1) :]
    return bytes(changed)


def _safetensors(rng: random.Random) -> bytes:
    """A header whose fields are of another type or range, or whose length is."""
    data = (FIXTURES / "mixed.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(header))
        entry, value = header[name], rng.choice(VALUES)
        field = rng.choice(["dtype", "shape", "data_offsets", "", "name"])
        if field == "name":
            header[str(value) * rng.choice([1, 1000])] = entry
        elif not field or not isinstance(entry, dict) or not isinstance(entry.get(field), list):
            header[name] = {**entry, field: value} if field and isinstance(entry, dict) else value
        elif entry[field]:
            entry[field][rng.randrange(len(entry[field]))] = value
    changed = json.dumps(header).encode()
    if rng.random() < 0.2:
        at = rng.randrange(len(changed))
        changed = changed[:at] + rng.choice([b"[" * 9000, b"{", b'"', b"9" * 5000, b"\xff", b"1e999,"]) + changed[at:]
    length = rng.choice([len(changed)] * 9 + [rng.choice(NUMBERS) % 2**64])
    return struct.pack("<Q", length) + changed + rest


def _npy(rng: random.Random) -> bytes:
    """A header of an array in an .npz with other types, sizes and signs."""
    size = ", ".join(str(rng.choice(VALUES))[:60] for _ in range(rng.choice([0, 1, 1, 2, 3, 40])))
    shape = rng.choice(
        [f"({size},)", f"({size},)", *["(3,)"] * 4, "(" + "1," * 200 + ")", "(" * rng.choice([5, 300]), "3"]
    )
    order = rng.choice(["False"] * 5 + ["True", "None", "7"])
    dtype = rng.choice(["<f4", rng.choice(DESCRIPTIONS)])
    header = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}}}"
    if rng.random() < 0.3:
        at = rng.randrange(len(header))
        header = (
            header[:at] + rng.choice(["(", "9" * 90, "L", " " * 90, "-" * 300, "'", "#", "\n", "'a'*9"]) + header[at:]
        )
    raw = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    version = rng.choice([b"\x01\x00"] * 8 + [b"\x02\x00", b"\x03\x00", b"\xff\x00"])
    declared = rng.choice([len(raw)] * 8 + [0, 65535, rng.randrange(300)])
    length = struct.pack("<H" if version[0] == 1 else "<I", declared)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        archive.writestr(
            "w.npy", b"\x93NUMPY" + version + length + raw + bytes(rng.choice([0, 4, 12, 12, 12, 24, 10**6]))
        )
    return target.getvalue()


def _zip(rng: random.Random) -> bytes:
    """An archive with one to three fields of its directory changed, or packed in another way."""
    archives = [source for source in sources() if source[:2] == b"PK"]
    changed = bytearray(_packed(rng) if rng.random() < 0.2 else rng.choice(archives))
    for _ in range(rng.randint(1, 3)):
        mark, fields = rng.choice([(b"PK\x01\x02", CENTRAL)] * 4 + [(b"PK\x05\x06", END), (b"PK\x03\x04", LOCAL)])
        places = [match.start() for match in re.finditer(re.escape(mark), changed)]
        if not places:
            break
        place, field = rng.choice(places), rng.randrange(len(fields) - 1)
        start, stop = place + fields[field], place + fields[field + 1]
        if rng.random() < 0.1:
            del changed[place : place + fields[-1] + rng.randrange(30)]
        elif rng.random() < 0.5:
            changed[start:stop] = (rng.choice(NUMBERS) % 2 ** (8 * (stop - start))).to_bytes(stop - start, "little")
        else:
            at = rng.randrange(start, stop)
            changed[at : at + 1] = bytes([(*changed, 0)[at] ^ 1 << rng.randrange(8)])
    return bytes(changed)


def _packed(rng: random.Random) -> bytes:
    """Much of nothing, packed in all ways, whose declared size may be small."""
    ways = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    size, target, name = 10 ** rng.randint(1, 6), io.BytesIO(), rng.choice(["w.npy", "archive/data.pkl"])
    with zipfile.ZipFile(target, "w", rng.choice(ways)) as archive:
        archive.writestr(name, bytes(size))
    lie = rng.choice([size, 1, 12345, 2**32 - 1])
    return target.getvalue().replace(struct.pack("<I", size), struct.pack("<I", lie))


def _pickle(rng: random.Random) -> bytes:
    """A pickle with instructions and arguments exchanged, taken out, doubled and put in."""
    program = rng.choice(programs())
    starts = [position for _, _, position in pickletools.genops(program)] if program.endswith(b".") else [0]
    steps = [program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True)]
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(steps)), rng.randrange(6)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps[at:at] = [steps[at]] * rng.choice([1, 1, 2, 1000])
        elif kind == 2:
            other = rng.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 3:
            steps[at] = _value(rng)
        else:
            steps.insert(at, _step(rng))
        steps = steps or [b"."]
    changed = b"".join(steps)
    if rng.random() < 0.3:
        return legacy_file(changed, {"0": (3, bytes(12))})
    return zip_file(changed, {str(key): bytes(400) for key in range(20)})


def _value(rng: random.Random) -> bytes:
    value = rng.choice(VALUES)
    return pickle.dumps(value, 2)[2:-1] if rng.random() < 0.7 else pickle.dumps((value,) * rng.randint(1, 40), 4)[2:-1]


def _step(rng: random.Random) -> bytes:
    """Instructions that mention, call, make and fill, and those that do much."""
    module, name = rng.choice(NAMES).split(" ")
    mention = rng.choice([f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"])
    memo = bytes([rng.randrange(8)])
    return rng.choice(
        [
            *(mention, mention + b")R", mention + b")\x81", mention + b"}b", b"(" + mention + b"o"),
            *(mention + text("touch marker") + b"\x85R", b"(" + text("x") + f"i{module}\n{name}\n".encode()),
            *(mention + b"]K\x01a", mention + b"K\x01K\x02s", b"\x8f(K\x01\x90", b"(\x91", mention + b")}\x92"),
            *(b"R", b"b", b"\x81", b"o", b"(", b"t", b"0", b"1", b"2", b"u", b"e", b"a", b"s", b"Q", b"\x93", b"\x85"),
            *(
                b"q" + memo,
                b"h" + memo,
                b"\x94",
                b"\x97",
                b"\x98",
                b"\x82\x01",
                b"Px\n",
                b"I01\n",
                b"F1e999\n",
                b"\xff",
            ),
            *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x7f"),
            *(
                b")q\x01" + b"h\x01h\x01\x86q\x01" * 60,
                b"](" + b"K\x01K\x02\x86" * 3000 + b"e",
                b"\x8b\xff\xff\xff\x7f",
            ),
            *(text("x" * 5000) + text("y" * 5000) + b"\x93", b"(" * 3000, b"N" * 3000 + b"\x85" * 3000),
        ]
    )


KINDS: tuple[tuple[str, Callable[[random.Random], bytes]], ...] = (
    ("bytes", _bytes),
    ("safetensors headers", _safetensors),
    ("npy headers", _npy),
    ("zip directories", _zip),
    ("pickles", _pickle),
)


if __name__ == "__main__":
    sys.exit(tries.main("hostile.mutate_weights", 20_000))
