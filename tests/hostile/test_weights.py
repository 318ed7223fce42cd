"""Weight files made to harm: each is read or refused in one way, in little time and memory, and runs nothing."""

import io
import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile import limits, tries
from torch_files import tensor_program, text, torch_save, zip_file

from aitok_jax.convert.weight_files import read_weights

ENDS = ("read", "refused", *tries.WRONG)


def test_mutated_files():
    tried = tries.run("hostile.mutate_weights", 2000)
    assert len(tried) == 2000
    assert [one for one in tried if one.verdict in tries.WRONG] == []
    verdicts = {(one.kind, one.verdict) for one in tried}
    assert len(verdicts) == 10, tries.table(tried)  # of each kind some are read and some refused


def make(index: int) -> tuple[str, bytes]:
    return ENDS[index], ENDS[index].encode()


def read(path: Path) -> bool:
    """Ends as the file says."""
    end = path.read_text()
    match end:
        case "crash":
            os.abort()
        case "hang":
            time.sleep(60)
        case "traceback":
            raise KeyError(end)
        case "memory":
            return bool(np.ones(2**26).any())
        case "executed":
            os.system("true")
    return end != "refused"


def test_whatever_goes_wrong_is_noticed():
    tried = tries.run("hostile.test_weights", len(ENDS), seconds=1, memory=2**28)
    assert [one.kind for one in tried] == list(ENDS)
    assert [one.verdict for one in tried] == list(ENDS)
    rows = tries.table(tried).splitlines()
    assert rows[-1].split()[:9] == ["all", "7", "1", "1", "1", "1", "1", "1", "1"]


def test_what_ends_a_process_is_noticed():
    assert limits.run("print(sys.argv[1])", "given").output == "given\n"
    assert limits.run("while True: pass", seconds=0.5).kind == "hang"
    assert limits.run("full = bytes(10**9).replace(b'a', b'b') + b'c'", memory=2**28).kind == "memory"
    assert limits.run("import os; os.abort()").kind == "crash"
    failed = limits.call(read_weights, "nowhere.pth")
    assert failed.kind == "traceback"
    assert "FileNotFoundError" in failed.error


def packed(way: int, name: str, size: int = 150_000_000) -> bytes:
    """An archive that unpacks to `size` bytes and declares one."""
    with zipfile.ZipFile(target := io.BytesIO(), "w", way) as archive:
        archive.writestr(name, bytes(size))
    return target.getvalue().replace(struct.pack("<I", size), struct.pack("<I", 1))


def npy(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(12))
    return target.getvalue()


MAKE = b"cyacs.config\nCfgNode\n)\x81q\x01"
LARGE = {
    "shape of 198 bytes": npy("(" + "3 , " * 35 + "x)"),
    "digits and commas": npy("(" + "1" * 120 + ",,)"),
    "descr of commas": npy("(3,)", "(1,1)" * 20 + "f4," * 20),
    "shared pairs": zip_file(
        b"\x80\x02ccollections\nOrderedDict\nq\x01](" + b"K\x00K\x01\x86" * 20_000 + b"eq\x02"
        b"0" + b"h\x01h\x02\x85R0" * 20_000 + b"N."
    ),
    "100 000 sizes": zip_file(tensor_program((1,) * 100_000, (1,) * 100_000, numel=3)),
    "shared sizes": zip_file(
        b"\x80\x02(" + b"K\x01" * 100_000 + b"tq\x020ctorch._utils\n_rebuild_tensor_v2\nq\x010"
        b"" + b"h\x01(NK\x00h\x02h\x02tR0" * 20_000 + b"N."
    ),
    "long names": zip_file(
        b"\x80\x04" + text("x" * 10**6) + b"q\x01" + text("y" * 10**6) + b"q\x020"
        b"" + b"h\x01h\x02\x930" * 100_000 + b"N."
    ),
    "placeholders": zip_file(b"\x80\x02" + MAKE + b"h\x01)Rh\x01N\x81N]b0" * 300_000 + b"."),
    "a placeholder that is filled": zip_file(b"\x80\x02" + MAKE + b"](" + b"N" * 10**6 + b"e" + b"eh\x01."),
    "one dictionary beside many names": zip_file(
        b"\x80\x02}q\x01("
        b"" + b"".join(text(str(i)) + b"N" for i in range(150_000)) + b"u0}("
        b"" + b"".join(text(f"{i}.") + b"h\x01" for i in range(150_000)) + b"u."
    ),
    "bz2": (zipfile.ZIP_BZIP2, "w.npy"),
    "lzma": (zipfile.ZIP_LZMA, "w.npy"),
    "deflate": (zipfile.ZIP_DEFLATED, "w.npy"),
    "bz2 of a pickle": (zipfile.ZIP_BZIP2, "archive/data.pkl"),
}


@pytest.mark.parametrize("name", LARGE)
def test_small_files_with_much_in_them(name, write):
    """Each would take minutes or hundreds of megabytes, were it done as it says."""
    content = LARGE[name] if isinstance(LARGE[name], bytes) else packed(*LARGE[name])
    outcome = limits.call(read_weights, str(write(content)), seconds=30, memory=150 * 2**20)
    assert outcome.kind == "traceback", outcome
    assert "aitok_jax.convert.torch_file.WeightFileError: " in outcome.error


REWRITE = """
import threading
from pathlib import Path
from aitok_jax.convert.weight_files import WeightFileError, read_weights

path, content, ends = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes(), set()
done = threading.Event()

def rewrite():
    while not done.is_set():
        path.write_bytes(content[: len(content) // 3])
        path.write_bytes(content)

thread = threading.Thread(target=rewrite)
thread.start()
for _ in range(500):
    try:
        ends.add(str({name: array.sum() for name, array in read_weights(path).items()}))
    except WeightFileError:
        ends.add("refused")
done.set()
thread.join()
path.write_bytes(content)
print(ends <= {"refused", str({name: array.sum() for name, array in read_weights(path).items()})})
"""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_rewritten_while_it_is_read(legacy, write):
    path = write(torch_save({"w": np.ones(50_000), "v": np.ones(50_000)}, "model", legacy))
    outcome = limits.run(REWRITE, path)
    assert outcome.kind == "ok", outcome
    assert outcome.output == "True\n"
