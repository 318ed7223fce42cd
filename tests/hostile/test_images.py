"""Images and depth maps as people have them: the values that a viewer shows, or a sentence."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from absl import logging
from hostile import mutate_images, tries
from PIL import Image, PngImagePlugin

from aitok_jax import image as images
from aitok_jax.data.preparation import map_pairs
from aitok_jax.data.sources import coco, nyu
from aitok_jax.data.sources.files import DataError, File, decode_image
from aitok_jax.image import ImageError, read_image
from aitok_jax.predict.__main__ import _read
from aitok_jax.tasks.modalities import Depth, depth_files

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores that was held so, by the meaning of the tag: where the first row and column are."""
    flip = upright[:, ::-1]
    return {
        1: upright,
        2: flip,
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, *more: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block, written by hand: entries of (tag, type, count, four bytes)."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *more]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_training_preparation_and_prediction(kind, orientation, tmp_path):
    stored = Image.fromarray(np.ascontiguousarray(turned(PHOTO, orientation)))
    options = {"lossless": True} if kind == "WEBP" else {}
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = tmp_path / f"rgb_1.{kind.lower()}"
    path.write_bytes(encoded(stored, kind, exif=tags, **options))
    Image.fromarray(np.full((6, 8), 1500, np.uint16)).save(tmp_path / "sync_depth_1.png")
    instances = tmp_path / "instances.json"
    instances.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": path.name, "height": 6, "width": 8}],
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
            }
        )
    )
    (predicted,) = next(_read([path], "maps", 1, [], None)).values()
    prepared, _ = map_pairs.load({"image": path, "depth": tmp_path / "sync_depth_1.png", "scale": 0.0})
    readings = [
        decode_image(File("a record", prepared["image"])),  # as `sources.prepared` reads it
        nyu.NyuSource(Depth(), tmp_path).read(0)["image"],
        coco.CocoSource(tmp_path, instances, masks=False).read(0)["image"],
        predicted,
    ]
    for reading in readings:
        if kind == "JPEG":  # not quite the photo
            np.testing.assert_array_equal(turned(reading, orientation), np.asarray(Image.open(path)))
        else:
            np.testing.assert_array_equal(reading, PHOTO)


@pytest.mark.parametrize(
    "more",
    [
        (0x829A, 5, 1, struct.pack("<I", 0xFFFFFF00)),  # exposure time, beyond the block
        (0x9286, 7, 2**31 - 1, b"abcd"),  # a comment of 2 GB
        (0x0110, 99, 1, b"abcd"),  # a camera model of a type that is none
        (0x8769, 4, 1, struct.pack("<I", 8)),  # the sub-directory is this directory
    ],
)
def test_an_invalid_tag_does_not_hide_the_orientation(more):
    read = read_image(encoded(np.ascontiguousarray(turned(PHOTO, 6)), exif=exif(6, more)))
    np.testing.assert_array_equal(read, PHOTO)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0no TIFF at all", exif(0), exif(9), exif(65535)])
def test_an_orientation_that_is_none_does_not_turn(block):
    np.testing.assert_array_equal(read_image(encoded(PHOTO, exif=block)), PHOTO)


def transparent(mode: str) -> Image.Image:
    """White where it is transparent, though black lies there, and half grey where it is half."""
    grey, alpha = np.array([[0, 0, 200]], np.uint8), np.array([[0, 128, 255]], np.uint8)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0, 200, 200, 200])
        image.info["transparency"] = bytes([0, 128, 255])
        return image
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).convert(mode)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_what_is_transparent_lies_on_white(mode):
    read = read_image(encoded(transparent(mode), **({"transparency": bytes([0, 128, 255])} if mode == "P" else {})))
    np.testing.assert_array_equal(read[0, :, 0], [255, 127, 200])


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


SHOWN = {
    "grey": (encoded(GREY), rgb(GREY)),
    "1 bit": (encoded(Image.fromarray(GREY > 100)), rgb(np.where(GREY > 100, 255, 0))),
    "palette": (
        encoded(Image.fromarray(PHOTO[:1]).quantize(8)),
        np.array(Image.fromarray(PHOTO[:1]).quantize(8).convert("RGB")),
    ),
    "16 bits": (encoded(GREY.astype(np.uint16) * 257), rgb(GREY)),
    "16 bits TIFF": (encoded(GREY.astype(np.uint16) * 257, "TIFF"), rgb(GREY)),
    "16 bits big-endian": (
        encoded(Image.frombytes("I;16B", (8, 6), (GREY.astype(">u2") * 257).tobytes()), "TIFF"),
        rgb(GREY),
    ),
    "32 bits with 16": (encoded(GREY.astype(np.int32) * 257, "TIFF"), rgb(GREY)),
    "floats in 0..1": (encoded(GREY.astype(np.float32) / 255, "TIFF"), rgb(GREY)),
    "CMYK": (encoded(Image.new("CMYK", (8, 6), (255, 0, 0, 0)), "TIFF"), np.full((6, 8, 3), (0, 255, 255))),
}


@pytest.mark.parametrize("name", SHOWN)
def test_values_are_those_that_a_viewer_shows(name):
    content, expected = SHOWN[name]
    read = read_image(content)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)


NAN = np.full((2, 2), np.nan, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            encoded(np.full((2, 2), 7.5, np.float32), "TIFF"),
            "grey floats of 7.5 to 7.5 are no colours; scale them to 0..1",
        ),
        (encoded(-np.ones((2, 2), np.float32), "TIFF"), "grey floats of -1 to -1"),
        (encoded(NAN, "TIFF"), "grey floats of nan"),
        (encoded(np.full((2, 2), 70_000, np.int32), "TIFF"), "grey values of 70000 to 70000 are beyond 16 bits"),
        (b"", "broken image file"),
        (b"no image", "broken image file"),
        (encoded(PHOTO)[:-30], "broken image file"),
    ],
)
def test_what_has_no_colours_is_refused(content, message):
    with pytest.raises(ImageError, match=message):
        read_image(content)


@pytest.mark.parametrize("error", [TypeError, IndexError, AssertionError, KeyError, OverflowError, MemoryError])
def test_whatever_a_decoder_raises_is_a_broken_file(error, monkeypatch, tmp_path):
    def load(self):
        raise error("inside")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageError, match=f"broken image file \\({error.__name__}: .*inside"):
        read_image(encoded(PHOTO))
    Image.fromarray(PHOTO).save(tmp_path / "rgb_1.jpg")
    (tmp_path / "sync_depth_1.png").write_bytes(encoded(np.full((6, 8), 1500, np.uint16)))
    with pytest.raises(DataError, match=r"sync_depth_1\.png: broken image file"):
        nyu.NyuSource(Depth(), tmp_path).read(0)


def bomb(side: int) -> bytes:
    """A 16-bit grey PNG of side² pixels, 60 kB for 13,300."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + 2 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_300, 20_000])
def test_more_pixels_than_the_bound(side):
    with pytest.raises(ImageError, match="AITOK_MAX_PIXELS"):
        read_image(bomb(side))


def test_the_bound_can_be_raised(tmp_path):
    (tmp_path / "x.png").write_bytes(bomb(300))
    program = f"from aitok_jax.image import read_image; print(read_image({str(tmp_path / 'x.png')!r}).shape)"
    for bound, expected in (("89999", "AITOK_MAX_PIXELS=90000"), ("90000", "(300, 300, 3)")):
        environment = {"AITOK_MAX_PIXELS": bound, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert expected in done.stdout + done.stderr
    assert images.max_pixels() == 100_000_000


def test_a_bound_that_is_no_number(monkeypatch):
    monkeypatch.setenv("AITOK_MAX_PIXELS", "1e9")
    with pytest.raises(ValueError, match="AITOK_MAX_PIXELS='1e9' in the environment must be a whole number of pixels"):
        read_image(encoded(PHOTO))


METRES = np.array([[0, 0.5, 1.25], [2, 3.75, 6]], np.float32)
MILLIMETRES = (METRES * 1000).astype(np.uint16)


def saved(array, **arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, array, **arrays) if arrays else np.save(file, array)
    return file.getvalue()


def zipped(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "scale"),
    [
        (encoded(MILLIMETRES), 0),
        (encoded(MILLIMETRES, "TIFF"), 0),
        (encoded((METRES * 256).astype(np.uint16)), 256),
        (encoded(METRES, "TIFF"), 0),
        (saved(METRES), 0),
        (saved(np.asfortranarray(METRES, np.float64)), 0),
        (saved(METRES[..., None].astype(np.float16)), 0),
        (saved(METRES[None] * 1000), 1000),
        (saved(MILLIMETRES), 0),
        (saved(np.where(METRES > 0, METRES, np.nan)), 0),
        (saved(np.where(METRES > 0, METRES, -1)), 0),
        (saved(np.where(METRES > 0, METRES, np.inf)), 0),
        (zipped(anything=METRES), 0),
        (zipped(depth=METRES, mask=METRES > 0), 0),
    ],
)
def test_depth_in_what_people_have(content, scale):
    depth = depth_files.read(content, scale)
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, METRES)


HUGE = (
    b"\x93NUMPY\x01\x00"
    + struct.pack("<H", 118)
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }".ljust(117) % (10**6, 10**6)
    + b"\n"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x76\x2f\x31\x01" + bytes(100), r"an OpenEXR file cannot be read here: convert it, as in numpy\.save"),
        (encoded(GREY), "mode 'L'"),
        (encoded(PHOTO), "mode 'RGB'"),
        (saved(PHOTO), r"depth must be \[H, W\], but the file has \[6, 8, 3\]"),
        (saved(np.zeros((0, 4))), r"\[0, 4\]"),
        (saved(np.array([["a"]])), "depth must be whole numbers or floats"),
        (saved(np.array([[{}]], object)), "depth must be whole numbers or floats"),
        (saved(METRES)[:-1], r"broken \.npy file"),
        (HUGE, r"broken \.npy file: float32 of shape \(1000000, 1000000\)"),
        (b"\x93NUMPY\x01\x00\xff\xff{", r"broken \.npy file"),
        (zipped(a=METRES, b=METRES), r"several arrays \(a\.npy, b\.npy\); name the one of depth 'depth'"),
        (zipped(a=METRES)[:-5], r"broken \.npz file"),
    ],
)
def test_depth_that_is_none(content, message):
    with pytest.raises(ValueError, match=message):
        depth_files.read(content)


@pytest.mark.parametrize(("factor", "advice"), [(0.004, "give depth_scale=1,"), (4000.0, "give depth_scale=1000,")])
def test_a_unit_that_cannot_be_is_a_warning_that_names_the_scale(factor, advice, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "log_first_n", lambda level, text, n, *args: said.append(text % args))
    raw = np.full((16, 16), 4, np.uint16) if factor < 1 else np.full((16, 16), 4000, np.float32)
    depth = depth_files.read(encoded(raw) if factor < 1 else saved(raw))
    assert depth[0, 0] == np.float32(factor)
    assert len(said) == 1
    assert f"a median of {factor:.3g} m" in said[0]
    assert advice in said[0]
    depth_files.read(saved(METRES))
    assert len(said) == 1


def test_mutated_files():
    tried = tries.run("hostile.mutate_images", 600)
    assert not [one for one in tried if one.verdict in tries.WRONG], tries.table(tried)
    assert len({one.kind for one in tried}) == len(mutate_images.sound())
    assert min(sum(one.verdict == verdict for one in tried) for verdict in ("read", "refused")) > 50
