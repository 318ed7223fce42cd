"""Images and depth maps made to harm: mutations of good ones, the same for the same index.

    PYTHONPATH=.:tests python -m hostile.mutate_images --count=5000 [--first=0]
    PYTHONPATH=.:tests python -m hostile.mutate_images --show=17 > image

The first tries so many, as an image and as a depth map, and prints what became of them; the second gives one of them.
"""

import encodings.cp437  # noqa: F401  imported while a file is read, these would count as executed
import functools
import io
import random
import struct
import sys
import unicodedata  # noqa: F401  imported while a file is read too, this would count as executed
import zlib
from pathlib import Path

import numpy as np
from hostile import tries
from PIL import Image

from aitok_jax.image import read_image
from aitok_jax.tasks.modalities import Depth

Image.init()  # likewise
SIZES = (0, 1, 2, 7, 255, 256, 4096, 13_300, 65_535, 65_536, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = (*SIZES, 2**15, 2**16 - 1, 100, 3, 4, 5, 12)


@functools.cache
def sound() -> dict[str, bytes]:
    """A file of every format and mode that people have."""
    rng = np.random.default_rng(0)
    photo, depth = rng.integers(0, 256, (24, 32, 3), np.uint8), rng.integers(0, 9000, (24, 32), np.uint16)
    tags = Image.Exif()
    for tag, value in {0x0112: 6, 0x010F: "maker", 0x0110: "model"}.items():
        tags[tag] = value
    tags.get_ifd(0x8769)[0x829A] = 0.02
    found = {}

    def put(name, array, kind, **options):
        file = io.BytesIO()
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, kind, **options)
        found[name] = file.getvalue()

    put("png", photo, "PNG")
    put("png of 16 bits", depth, "PNG")
    put("png of a palette", Image.fromarray(photo).quantize(16), "PNG", transparency=3)
    put("jpeg", photo, "JPEG", exif=tags)
    put("jpeg in parts", photo, "JPEG", progressive=True)
    put("cmyk", Image.fromarray(photo).convert("CMYK"), "JPEG")
    put("webp", photo, "WEBP", exif=tags)
    put("tiff", photo, "TIFF", compression="tiff_lzw", exif=tags)
    put("tiff of 16 bits", depth, "TIFF")
    put("tiff of floats", depth.astype(np.float32) / 9000, "TIFF")
    put("gif", Image.fromarray(photo).quantize(16), "GIF")
    put("bmp", photo, "BMP")
    for name, save in (("npy", np.save), ("npz", np.savez_compressed)):
        file = io.BytesIO()
        save(file, depth.astype(np.float32) / 1000)
        found[name] = file.getvalue()
    return found


def make(index: int) -> tuple[str, bytes]:
    """The kind and the content of a file."""
    rng, kinds = random.Random(index), sorted(sound())
    kind = kinds[index % len(kinds)]
    content = sound()[kind]
    for _ in range(rng.randint(1, 3)):
        content = rng.choice([_flipped, _flipped, _number, _number, _cut, _moved])(rng, content)
    return kind, _with_checksums(content) if rng.random() < 0.5 else content


def read(path: Path) -> bool:
    """Whether the file was read, in one of the two ways."""
    done = False
    for way in (read_image, Depth().read):
        try:
            way(path.read_bytes())
            done = True
        except ValueError as error:
            if not str(error):
                raise AssertionError("an error that says nothing") from error
    return done


def _place(rng: random.Random, content: bytes) -> int:
    """Mostly in the header."""
    return rng.randrange(max(min(len(content), rng.choice([64, 200, len(content)])), 1))


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice([1, 1, 4, 30])):
        changed[_place(rng, changed)] = rng.randrange(256)
    return bytes(changed)


def _number(rng: random.Random, content: bytes) -> bytes:
    at, kind = _place(rng, content), rng.choice(["<H", ">H", "<I", ">I"])
    value = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(kind))
    return content[:at] + struct.pack(kind, value) + content[at + struct.calcsize(kind) :]


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)] + rng.choice([b"", b"", bytes(100), rng.randbytes(50)])


def _moved(rng: random.Random, content: bytes) -> bytes:
    start, stop, at = sorted(_place(rng, content) for _ in range(3))
    return content[:at] + content[start:stop] + content[at:]


def _with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them, so that they are looked at."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = bytearray(content[:8]), 8
    while at + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        body = content[at + 4 : at + 8 + length]
        out += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


if __name__ == "__main__":
    sys.exit(tries.main("hostile.mutate_images", 5000))
