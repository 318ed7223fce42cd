"""Weight files: what torch.save writes is read, nothing in a pickle runs, and damage is a clear error."""

import io
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_files import legacy_file, tensor_program, text, torch_save, zip_file

from aitok_jax.convert import torch_file
from aitok_jax.convert.weight_files import WeightFileError, read_weights, read_with_notes, write_weights

FIXTURES = Path(__file__).parent / "weights"  # written by PyTorch 2.13 and safetensors 0.8
GENUINE = ("zip.pth", "legacy.pth", "protocol4.pth", "mixed.safetensors")
DTYPES = ("bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.mark.parametrize("name", GENUINE)
def test_files_of_torch_itself(name):
    arrays = read_weights(FIXTURES / name)
    table = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "strided": table[:, 1:5:2],
        "transposed": table.T,
        "shared": table[1],
        "scalar": np.float32(7.5),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": np.array([1.5, -2.5], np.float32),
    }
    assert arrays.keys() == {"weight", "bias", *expected, *DTYPES}
    for key, value in expected.items():
        assert arrays[key].dtype == np.float32
        np.testing.assert_array_equal(arrays[key], value)
    for dtype in DTYPES:
        assert str(arrays[dtype].dtype) == dtype
        np.testing.assert_array_equal(arrays[dtype].astype(np.float64), [0, 1, 0, 1 if dtype == "bool" else 3])
    np.testing.assert_array_equal(arrays["weight"], read_weights(FIXTURES / "zip.pth")["weight"])


@pytest.mark.parametrize("wrapper", [None, "weights", "state_dict", "model", "module"])
def test_wrappers(write, wrapper):
    program = tensor_program((3,), (1,), numel=3)
    if wrapper:
        inner = program[2:-1]
        program = b"\x80\x02}" + pickle.dumps(wrapper, 2)[2:-1] + inner + b"s."
    data = np.arange(3, dtype=np.float32).tobytes()
    for content in (zip_file(program, {"0": data}), legacy_file(program, {"0": (3, data)})):
        arrays = read_weights(write(content))
        assert arrays.keys() == {"w"}
        np.testing.assert_array_equal(arrays["w"], [0, 1, 2])


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "ema_state_dict", "teacher"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("wrap", [zip_file, legacy_file])
def test_weights_beside_the_plain_ones(key, nested, wrap, write):
    """As timm, SimMIM and others save averaged ones; those may be wrapped in their turn."""

    def one(size: int) -> bytes:
        return tensor_program((size,), (1,), numel=3)[2:-1]

    inner = b"}" + text("module") + one(2) + b"s" if nested else one(2)
    program = b"\x80\x02}" + text(key) + inner + b"s" + text("epoch") + b"K\x07s" + text("model") + one(3) + b"s."
    data = np.arange(3, dtype=np.float32).tobytes()
    path = write(wrap(program, {"0": data if wrap is zip_file else (3, data)}))
    arrays, notes = read_with_notes(path)
    assert arrays["w"].shape == (3,)
    assert notes == (f"beside: {key}: 1 arrays; --key={key} takes them",)
    assert read_weights(path, key)["w"].shape == (2,)
    assert read_weights(path, "model")["w"].shape == (3,)
    with pytest.raises(WeightFileError, match=f"no dictionary under the key 'other' .beside: {key}: 1 arrays"):
        read_weights(path, "other")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.npz"])
def test_weights_beside_the_plain_ones_in_a_flat_file(name, tmp_path):
    arrays = {"w": np.ones(3), "model_ema.w": np.ones(2), "_vq_vae._ema_w": np.ones(4), "_ema_w": np.ones(5)}
    if name.endswith(".npz"):
        np.savez(tmp_path / name, **arrays)
    else:
        write_weights(tmp_path / name, arrays)
    plain, notes = read_with_notes(tmp_path / name)
    assert plain.keys() == {"w", "_vq_vae._ema_w", "_ema_w"}
    assert notes == ("beside: model_ema: 1 arrays; --key=model_ema takes them",)
    assert {key: array.shape for key, array in read_weights(tmp_path / name, "model_ema").items()} == {"w": (2,)}


def test_averaged_weights_alone_are_named(write):
    program = b"\x80\x02}" + text("model_ema") + tensor_program((3,), (1,), numel=3)[2:-1] + b"s."
    path = write(zip_file(program, {"0": bytes(12)}))
    with pytest.raises(WeightFileError, match=r"nor a dictionary of them under .*model_ema: 1 arrays; --key=model_ema"):
        read_weights(path)
    assert read_weights(path, "model_ema").keys() == {"w"}


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_pytorch_loads_what_is_written(suffix, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {"0.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3), "0.bias": np.ones(2, np.float32)}
    arrays |= {"1.weight": np.ones((3, 2), np.float32).T.copy().T, "1.bias": np.zeros(3, np.float32)}
    write_weights(tmp_path / f"w{suffix}", arrays, "state_dict")
    loaded = torch.load(tmp_path / f"w{suffix}", weights_only=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    model.load_state_dict(loaded["state_dict"], strict=True)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    assert read_weights(tmp_path / f"w{suffix}").keys() == arrays.keys()


@pytest.mark.parametrize("name", GENUINE)
def test_every_cut_is_noticed(name, write):
    data = (FIXTURES / name).read_bytes()
    for length in range(0, len(data) - 1, 37):
        with pytest.raises(WeightFileError, match=r"weights\.pth: "):
            read_weights(write(data[:length]))


def test_a_flipped_bit_of_a_value_is_noticed(write):
    data = bytearray(zip_file(tensor_program((3,), (1,), numel=3), {"0": b"twelve bytes"}))
    data[data.index(b"twelve")] ^= 1
    with pytest.raises(
        WeightFileError, match=r"Bad CRC-32 for file 'archive/data/0'; get the file again, or save it again"
    ):
        read_weights(write(bytes(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"starts with b'\\x89PNG.*neither a \.pt or \.pth"),
        (zip_file(pickle.dumps({"epoch": 3}, 2)), "holds no arrays"),
        (zip_file(pickle.dumps(7, 2)), "holds no arrays"),
        (zip_file(b"\x80\x02}" + text("model") + b"q\x00h\x00."), "holds no arrays"),
        (zip_file(b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b"."), "holds no arrays"),
        (zip_file(b"\x80\x02(" + b"\x85" * 100_000), "broken pickle"),
        (zip_file(b"\x80\x02}(" + b"\x8a\x01\x05" * 3 + b"u."), "broken pickle: IndexError"),
        (zip_file(b"\x80\x02}])s."), "holds no arrays"),
        (zip_file(b"\x80\x02})Ns."), "holds no arrays"),
        (zip_file(b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"Ns."), "holds no arrays"),
        (zip_file(b"\x80\x02]XY."), "broken pickle: error"),
        (zip_file(b"\x80\x02X\x01\x00\x00\x00\xff."), "broken pickle: UnicodeDecodeError"),
        (zip_file(b"\x80\x02I" + b"9" * 5000 + b"\n."), "broken pickle: ValueError"),
        (zip_file(b"\x80\x02N\xff."), "broken pickle: KeyError"),
        (zip_file(b"\x80\x02Na."), "broken pickle: IndexError"),
        (zip_file(b"\x80\x02NNa."), "broken pickle: AttributeError"),
        (zip_file(b"\x80\x02ccollections\nOrderedDict\nN\x85R."), "broken pickle: TypeError"),
        (zip_file(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "broken pickle: EOFError"),
        (zip_file(b"\x80\x05\x97."), "refused: the pickle instruction NEXT_BUFFER"),
        (zip_file(b"\x80\x02r\xff\xff\xff\x7fj\x00\x00\x00\x7f."), "broken pickle: IndexError"),
        (zip_file(b"\x80\x02N\x94r\xff\xff\xff\x7fj\x00\x00\x00\x7f."), "Memo value not found at index 2130706432"),
        (b"PK\x05\x06" + bytes(18), "without data.pkl"),
    ],
)
def test_other_content(data, message, write):
    with pytest.raises(WeightFileError, match=message):
        read_weights(write(data))


@pytest.mark.parametrize("wrap", [zip_file, legacy_file])
def test_endless_pickles_are_given_up(wrap, write, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 1000)
    with pytest.raises(WeightFileError, match="a pickle of more than 1000 bytes"):
        read_weights(write(wrap(b"\x80\x02" + b"N" * 2000 + b".")))


def test_a_dictionary_inside_itself_ends(write):
    loop = b"\x80\x02}q\x00" + text("model") + b"h\x00s."
    with pytest.raises(WeightFileError, match="holds no arrays"):
        read_weights(write(zip_file(loop)))


def test_compressed_torch_files_are_refused(write):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(WeightFileError, match="compressed"):
        read_weights(write(target.getvalue()))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_more_is_unpacked_than_declared(compression, write):
    size, declared = struct.pack("<I", 60_000_128), struct.pack("<I", 12345)
    content = npz("{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}", bytes(60_000_000), compression=compression)
    assert content.count(size) in (2, 4)
    path = write(content.replace(size, declared), "weights.npz")
    tracemalloc.start()
    with pytest.raises(WeightFileError, match=r"Bad CRC-32|the directory of the zip file does not fit"):
        read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_entries_on_top_of_each_other(write):
    """Ten names of the same million bytes."""
    content = zip_file(tensor_program((3,), (1,), numel=3), {str(i): bytes(10**6) for i in range(10)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        first, last = archive.getinfo("archive/data/1"), archive.getinfo("archive/version")
        directory = content[archive.start_dir :]
    cut = content[: first.header_offset] + content[last.header_offset : archive.start_dir]
    with pytest.raises(WeightFileError, match="overlap"):
        read_weights(write(cut + directory[:-6] + struct.pack("<I", len(cut)) + directory[-2:]))


def test_two_entries_of_one_name(write):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("w.npy", b"")
        archive.writestr("w", b"")
    with pytest.raises(WeightFileError, match="two of one name"):
        read_weights(write(target.getvalue(), "weights.npz"))


@pytest.mark.parametrize("name", GENUINE)
def test_a_file_that_changes_while_its_arrays_are_used(name, write):
    path = write((FIXTURES / name).read_bytes())
    arrays = read_weights(path)
    path.write_bytes(b"")
    np.testing.assert_array_equal(arrays["parameter"], [1.5, -2.5])


@pytest.mark.parametrize("name", ["weights.pth", "weights.npz"])
def test_every_bit_of_a_directory(name, write):
    """Whatever is flipped in it, all of the arrays are read or none; a third of the bits of each byte are tried."""
    arrays = {key: np.arange(6.0) for key in "abc"}
    np.savez(target := io.BytesIO(), **arrays)
    data = target.getvalue() if name.endswith(".npz") else torch_save(arrays, "model")
    whole = read_weights(write(data, name))
    for at in range(data.index(b"PK\x01\x02"), len(data)):
        for bit in range(at % 3, 8, 3):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                read = read_weights(write(bytes(changed), name))
            except WeightFileError:
                continue
            assert len(read) == len(whole), (at, bit)


def test_an_array_that_the_directory_leaves_out(write):
    np.savez(target := io.BytesIO(), **{key: np.arange(6.0) for key in "abc"})
    data = target.getvalue()
    for mark in (b"a.npy", b"b.npy", b"c.npy"):
        start = data.rindex(b"PK\x01\x02", 0, data.rindex(mark))
        stop = data.rindex(mark) + 5
        end = struct.pack("<HHI", 2, 2, int.from_bytes(data[-10:-6], "little") - (stop - start))
        shorter = data[:start] + data[stop:-14] + end + data[-6:]
        with zipfile.ZipFile(io.BytesIO(shorter)) as archive:
            assert len(archive.namelist()) == 2
        with pytest.raises(WeightFileError, match="the directory of the zip file does not fit what lies at byte"):
            read_weights(write(shorter, "weights.npz"))


def safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(3,), offsets=(0, 12)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 5 * 2**30) + b"{}", "a header of 5368709120 bytes in a file of 10"),
        (safetensors(entry(), bytes(11)), "lies at .* of 11 bytes"),
        (safetensors(entry(offsets=(0, 5 * 2**30), shape=(5 * 2**28,)), bytes(12)), "lies at"),
        (safetensors(entry(shape=(5 * 2**28,)), bytes(12)), "has 12 bytes"),
        (safetensors(entry("F8_E4M3", (12,)), bytes(12)), r"a proper dtype \(F64, .*'F8_E4M3'"),
        (safetensors(entry(shape=(-3,)), bytes(12)), "impossible shape"),
        (safetensors(entry(shape=(True, 3)), bytes(12)), "impossible shape"),
        (safetensors(entry(offsets=(12, 0)), bytes(12)), "lies at"),
        (safetensors({**entry(), "v": entry()["w"]}, bytes(12)), "overlap"),
        (safetensors(entry(), bytes(13)), "leave gaps"),
        (safetensors({**entry(), "v": entry(offsets=(16, 28))["w"]}, bytes(28)), "leave gaps"),
        (safetensors(entry(shape="abc"), bytes(12)), "impossible shape"),
        (safetensors(entry(shape=[1] * 33 + [3]), bytes(12)), "impossible shape"),
        (safetensors({"w": [1]}, bytes(12)), "lacks a proper dtype"),
        (safetensors({}), "holds no arrays"),
        (safetensors(b"{" * 100_000), "JSONDecodeError"),
        (safetensors(b'{"w": ' + b"[" * 100_000), "RecursionError"),
        (safetensors(b'{"w": nope}'), "JSONDecodeError"),
    ],
)
def test_safetensors_that_do_not_fit(data, message, write):
    with pytest.raises(WeightFileError, match=message):
        read_weights(write(data, "weights.safetensors"))


@pytest.mark.parametrize("length", [0x80, 0x4B50])  # as a pickle and as a zip file begin
def test_safetensors_are_known_whatever_their_length(length, write):
    header = json.dumps(entry()).encode().ljust(length)
    assert read_weights(write(safetensors(header, bytes(12)))).keys() == {"w"}


def npz(header: str, data: bytes = bytes(12), **options) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", **options) as archive:
        text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return target.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (1342177280,)}"), "has 12 bytes"),
        (npz("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"), "holds no plain numbers, but object"),
        (npz("{'descr': '<U3', 'fortran_order': False, 'shape': (1,)}"), "holds no plain numbers"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"), "impossible shape"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}"), "impossible shape"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 33 + ")}", bytes(4)), "impossible shape"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1" * 5000), "holds no plain numbers"),
        (npz("-" * 900 + "1"), "holds no plain numbers"),
        (npz("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}"), "holds no plain numbers"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", compression=zipfile.ZIP_LZMA), "compressed"),
        (npz("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 999999999999999)}"), "impossible shape"),
        (npz("(" * 5000), "holds no plain numbers"),
        (
            npz("{'descr': '|u1', 'fortran_order': False, 'shape': (3,)}", bytes(2**30 + 9), compression=8),
            "claims to unpack to",
        ),
    ],
)
def test_npz_that_do_not_fit(data, message, write):
    with pytest.raises(WeightFileError, match=message):
        read_weights(write(data, "weights.npz"))


def test_npz(tmp_path):
    arrays = {"a.weight": np.arange(6.0).reshape(2, 3).T, "b": np.float32(3), "c": np.zeros((0, 2), np.int64)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "weights.npz", **arrays)
        read = read_weights(tmp_path / "weights.npz")
        assert read.keys() == arrays.keys()
        for name, array in read.items():
            assert array.dtype == arrays[name].dtype
            np.testing.assert_array_equal(array, arrays[name])


def test_safetensors_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {str(dtype): rng.integers(0, 2, (2, 3)).astype(dtype) for dtype in ("f4", "f8", "f2", "i8", "i1", "?")}
    arrays |= {
        "bf16": np.ones(3, ml_dtypes.bfloat16),
        "scalar": np.float32(2)[()] * np.ones(()),
        "t": np.ones((2, 3)).T,
    }
    write_weights(tmp_path / "new" / "weights.safetensors", arrays)
    read = read_weights(tmp_path / "new" / "weights.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in read.items():
        assert array.dtype == arrays[name].dtype
        assert array.flags.aligned
        np.testing.assert_array_equal(array, arrays[name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


def test_writing_needs_a_known_format(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"\.pt and \.pth need torch"):
        write_weights(tmp_path / "weights.pth", {"w": np.ones(3)})
    with pytest.raises(ValueError, match=r"must be \.safetensors, \.pt or \.pth"):
        write_weights(tmp_path / "weights.ckpt", {"w": np.ones(3)})
    with pytest.raises(ValueError, match="w is complex128"):
        write_weights(tmp_path / "weights.safetensors", {"w": np.ones(3, complex)})


def test_a_name_that_could_steer_a_terminal_is_refused(write):
    content = zip_file(tensor_program((3,), (1,), numel=3).replace(b"w", b"\x1b", 1), {"0": bytes(12)})
    with pytest.raises(WeightFileError, match=r"the name '\\x1b'"):
        read_weights(write(content))
