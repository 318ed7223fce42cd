"""Pickles of PyTorch's files: nothing in them runs, and what they claim is checked."""

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import pickle
import pickletools
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest
from torch_files import legacy_file, tensor, tensor_program, text, zip_file

from aitok_jax.convert.weight_files import WeightFileError, read_weights, read_with_notes


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


TOUCH = "touch marker"
MALICIOUS = {
    "os.system": (pickle.dumps({"weights": Call(os.system, TOUCH)}, 2), "wants 'posix.system'"),
    "protocol 4": (pickle.dumps({"weights": Call(os.system, TOUCH)}, 4), "wants 'posix.system'"),
    "protocol 0": (b"\x80\x00" + pickle.dumps(Call(os.system, TOUCH), 0), "wants 'posix.system'"),
    "eval": (pickle.dumps(Call(eval, "open('marker', 'w')"), 4), "wants 'builtins.eval'"),
    "old name of eval": (pickle.dumps(Call(eval, "open('marker', 'w')"), 2), "wants '__builtin__.eval'"),
    "torch hub": (b"\x80\x02ctorch.hub\nload\n" + text("evil/repo") + text("model") + b"\x86R.", "'torch.hub.load'"),
    "torch load": (b"\x80\x02ctorch\nload\n" + text("other.pth") + b"\x85R.", "'torch.load'"),
    "getattr": (pickle.dumps(Call(getattr, Call(__import__, "os"), "system"), 4), "wants 'builtins.getattr'"),
    "only named": (b"\x80\x02cos\nsystem\n0}.", "wants 'os.system'"),
    "argument of an allowed call": (
        b"\x80\x02ccollections\nOrderedDict\n(cos\nsystem\n" + text(TOUCH) + b"\x85RtR.",
        "wants 'os.system'",
    ),
    "call of a call's result": (b"\x80\x02ccollections\nOrderedDict\n)R" + text(TOUCH) + b"\x85R.", "calls a Dict"),
    "call of a string": (b"\x80\x02" + text("os.system") + text(TOUCH) + b"\x85R.", "calls a str"),
    "call of a dtype": (b"\x80\x02ctorch\nFloatStorage\n" + text(TOUCH) + b"\x85R.", "calls a Float32DType"),
    "attribute of an allowed name": (
        b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
        "'torch._utils._rebuild_tensor_v2.__globals__'",
    ),
    "through the memo": (
        b"\x80\x02ccollections\nOrderedDict\nq\x000cos\nsystem\nq\x000h\x00" + text(TOUCH) + b"\x85R.",
        "wants 'os.system'",
    ),
    "state of an allowed name": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + text(TOUCH) + b"sb.",
        "sets the state of a type",
    ),
    "state of a dict": (b"\x80\x02}" + text(TOUCH) + b"b.", "sets the state of a Dict"),
    "new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "instance": (b"\x80\x02(" + text(TOUCH) + b"ios\nsystem\n.", "wants 'os.system'"),
    "object": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
    "a placeholder alone": (b"\x80\x02cyacs.config\nCfgNode\n)\x81.", "an object, 'yacs.config.CfgNode'"),
    "what a placeholder is given": (
        b"\x80\x02cyacs.config\nCfgNode\ncposix\nsystem\n" + text(TOUCH) + b"\x85R\x85R.",
        "wants 'posix.system'",
    ),
    "state of a placeholder": (
        b"\x80\x02cyacs.config\nCfgNode\n)\x81}" + text("__reduce__") + b"cos\nsystem\nsb.",
        "wants 'os.system'",
    ),
    "nt": (b"\x80\x02cnt\nsystem\n" + text(TOUCH) + b"\x85R.", "wants 'nt.system'"),
    "old name of subprocess": (
        b"\x80\x02ccommands\ngetoutput\n" + text(TOUCH) + b"\x85R.",
        "wants 'commands.getoutput'",
    ),
    "a name with a dot": (b"\x80\x04" + text("argparse") + text("Namespace.__init__") + b"\x93.", "__init__'"),
    "a long name": (b"\x80\x04" + text("a" * 300) + text("b") + b"\x93.", "of more than 200 characters"),
    "items of no set": (b"\x80\x04](K\x01\x90.", "ADDITEMS"),
    "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
    "text reference": (b"\x80\x02Pos.system\n.", "a reference to 'os.system'"),
    "reference to no storage": (b"\x80\x02" + text("os.system") + b"\x85Q.", "reference"),
    "computed name": (b"\x80\x04" + b"]" + text("system") + b"\x93.", "STACK_GLOBAL requires str"),
    "numpy": (pickle.dumps({"w": np.ones(3)}, 2), r"numpy\._?core.*_reconstruct"),
}


@pytest.mark.parametrize("wrap", [zip_file, legacy_file])
@pytest.mark.parametrize("case", MALICIOUS)
def test_nothing_in_a_pickle_runs(case, wrap, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    program, message = MALICIOUS[case]
    assert list(pickletools.genops(program))  # a whole pickle
    with pytest.raises(WeightFileError, match=message):
        read_weights(write(wrap(program)))
    assert not (tmp_path / "marker").exists()
    assert not {name for name in set(sys.modules) - modules if not name.startswith("encodings.")}


def stand_in(name: str, *bases: type, **attributes: object) -> type:
    """A class that pickles under a name of a package that is not there."""
    module, _, short = name.rpartition(".")
    return type(short, bases, {"__module__": module, **attributes})


CfgNode = stand_in("yacs.config.CfgNode", dict)
Metadata = stand_in("omegaconf.base.Metadata", __slots__=("a",))
STAND_INS = {
    **{name: types.ModuleType(name) for name in ("yacs", "omegaconf")},
    "yacs.config": types.SimpleNamespace(CfgNode=CfgNode),
    "omegaconf.base": types.SimpleNamespace(Metadata=Metadata),
}
(node := CfgNode(a=1, b=[CfgNode(c=np.float64(2))])).frozen = True
(metadata := Metadata()).a = 1
OBJECTS = {
    "yacs.config.CfgNode": node,
    "omegaconf.base.Metadata": metadata,
    "argparse.Namespace": argparse.Namespace(path=pathlib.PurePosixPath("runs"), epochs=3),
    "pathlib.PurePosixPath": pathlib.PurePosixPath("runs/1"),
    "types.SimpleNamespace": types.SimpleNamespace(a=1),
    "datetime.datetime": datetime.datetime(2024, 1, 2),
    "decimal.Decimal": decimal.Decimal("1.5"),
    "collections.defaultdict": collections.defaultdict(list, a=[1]),
    "collections.Counter": collections.Counter("aab"),
    "collections.deque": collections.deque([1, 2]),
    "set": {1, 2},
    "frozenset": frozenset([1, 2]),
    "complex": 1 + 2j,
    "slice": slice(1, 2),
    "bytearray": bytearray(b"abc"),
    "multiarray.scalar": np.float64(1.5),
    "_reconstruct": np.arange(3),
}
DATA = np.arange(3, dtype=np.float32).tobytes()


def around(inner: bytes, key: str = "config") -> bytes:
    """The pickle of {key: inner, "model": {"w": tensor}}."""
    model = tensor_program((3,), (1,), numel=3)[2:-1]
    return b"\x80\x02}" + text(key) + inner + b"s" + text("model") + model + b"s."


@pytest.mark.parametrize(
    ("name", "protocol"),
    [(name, p) for name in OBJECTS for p in range(6) if p > 1 or name != "omegaconf.base.Metadata"],  # slots need 2
)
def test_objects_beside_the_weights_are_passed_over(name, protocol, write):
    with mock.patch.dict(sys.modules, STAND_INS):
        program = around(pickle.dumps(OBJECTS[name], protocol)[2 if protocol > 1 else 0 : -1])
    for content in (zip_file(program, {"0": DATA}), legacy_file(program, {"0": (3, DATA)})):
        arrays, notes = read_with_notes(write(content))
        assert arrays.keys() == {"w"}
        np.testing.assert_array_equal(arrays["w"], [0, 1, 2])
        if 2 <= protocol <= 4:  # before, they are made in a roundabout way, and later bytearrays are plain
            assert [note for note in notes if note.startswith("passed over: config: ") and note.endswith(name)]
    assert "yacs" not in sys.modules


def test_harm_beside_the_weights_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = around(
        b"cyacs.config\nCfgNode\n)\x81}" + text("a") + pickle.dumps(Call(os.system, TOUCH), 2)[2:-1] + b"sb"
    )
    with pytest.raises(WeightFileError, match=r"it wants 'posix\.system'.*Nothing was run"):
        read_weights(write(zip_file(program, {"0": DATA})))
    assert not (tmp_path / "marker").exists()


def test_a_tensor_in_an_object_is_not_read(write):
    """Its storage is not even in the file."""
    inner = b"cmine\nConfig\n)\x81}" + text("a") + tensor((9,), (1,), numel=9, key="lost") + b"sb"
    assert read_weights(write(zip_file(around(inner), {"0": DATA}))).keys() == {"w"}


def test_a_tensor_of_another_kind_is_no_object(write):
    quantized = b"ctorch._utils\n_rebuild_qtensor\n(K\x01tR"
    program = b"\x80\x02}" + text("w") + quantized + b"s" + text("v") + tensor((3,), (1,), numel=3) + b"s."
    with pytest.raises(
        WeightFileError, match=r"'w' is a tensor of a kind that is not read \('torch\._utils\._rebuild_q"
    ):
        read_weights(write(zip_file(program, {"0": DATA})))


def test_the_source_of_a_module_is_passed_over(write):
    """As PyTorch before 1.6 stored a whole module."""
    reference = b"(" + text("module") + b"cmine\nNet\n" + text("net.py") + text("class Net: ...") + b"tQ"
    program = around(reference + b")\x81}b", "net")
    _, notes = read_with_notes(write(legacy_file(program, {"0": (3, DATA)})))
    assert notes == ("passed over: net: mine.Net",)


def test_the_malicious_pickles_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(MALICIOUS["os.system"][0])
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (4,), "stride": (1,), "numel": 3}, "beyond its storage of 3"),
        ({"size": (2,), "stride": (1,), "numel": 3, "offset": 2}, "beyond its storage of 3"),
        ({"size": (2, 2), "stride": (2, 1), "numel": 3}, "beyond its storage of 3"),
        ({"size": (10**9,), "stride": (0,), "numel": 3}, "beyond its storage of 3"),
        ({"size": (2,), "stride": (-1,), "numel": 3}, "impossible"),
        ({"size": (2,), "stride": (1, 1), "numel": 3}, "impossible"),
        ({"size": (0, 2**62), "stride": (1, 1), "numel": 3}, "impossible"),
        ({"size": (1.5,), "stride": (1,), "numel": 3}, "impossible"),
        ({"size": (2,) * 40, "stride": (0,) * 40, "numel": 3}, "impossible"),
        ({"size": (1,) * 100_000, "stride": (1,) * 100_000, "numel": 3}, "impossible"),
        ({"size": (True,), "stride": (1,), "numel": 3}, "impossible"),
        ({"size": (2,), "stride": (2**62,), "numel": 3}, "beyond its storage of 3"),
        ({"size": (2,), "stride": (1,), "numel": 3, "offset": 2**62}, "beyond its storage of 3"),
        ({"size": (2**24, 2**24), "stride": (0, 0), "numel": 3}, "impossible"),
        ({"size": (2,), "stride": (1,), "numel": True}, "no proper size"),
        ({"size": (4,), "stride": (1,), "numel": 4}, "has only 12 bytes"),
        ({"size": (5 * 2**28,), "stride": (1,), "numel": 5 * 2**28}, "has only 12 bytes"),
        ({"size": (3,), "stride": (1,), "numel": 3, "storage": "QInt8Storage"}, r"'torch\.QInt8Storage'"),
        ({"size": (3,), "stride": (1,), "numel": 3, "storage": "DoubleStorage"}, "3 float64 values has only 12 bytes"),
        ({"size": (3,), "stride": (1,), "numel": 3, "key": "../1"}, r"archive/data/\.\./1"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(options, message, write):
    content = zip_file(tensor_program(**options), {"0": bytes(12)})
    with pytest.raises(WeightFileError, match=message):
        read_weights(write(content))


def test_the_stride_of_an_axis_of_length_one_has_no_part(write):
    content = zip_file(tensor_program((1, 3), (2**62, 1), numel=3), {"0": np.arange(3, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read_weights(write(content))["w"], [[0, 1, 2]])


def test_pairs_of_an_ordered_dict(write):
    """As Python 2 saved them."""
    pair = b"](" + text("w") + tensor((3,), (1,), numel=3) + b"e"
    program = b"\x80\x02ccollections\nOrderedDict\n]" + pair + b"a\x85R."
    data = np.arange(3, dtype=np.float32).tobytes()
    np.testing.assert_array_equal(read_weights(write(zip_file(program, {"0": data})))["w"], [0, 1, 2])


@pytest.mark.parametrize(
    "program",
    [
        b"ccollections\nOrderedDict\nq\x01](" + b"K\x00K\x01\x86" * 100_000 + b"eq\x02" + b"h\x01h\x02\x85R0" * 100_000,
        b"ccollections\nOrderedDict\nq\x01(" + b"N" * 1_000_000 + b"tq\x020(" + b"h\x01h\x02R0" * 100_000,
        b")q\x01" + b"h\x01h\x01\x86q\x01" * 100 + b"0" * 99 + b"}h\x01Ns",
        b")q\x01" + b"h\x01h\x01\x86q\x01" * 100 + b"Q",
        b"\x85".join([b")"] * 1_000_000),
        b"}q\x01" + (b"}" + text("a")) * 500_000 + b"N" + b"s" * 500_000,
    ],
    ids=["pairs", "arguments", "key", "reference", "tuples", "dictionaries"],
)
@pytest.mark.parametrize("wrap", [zip_file, legacy_file])
def test_small_programs_with_much_to_do_end(program, wrap, write):
    start = time.process_time()
    with pytest.raises(WeightFileError):
        read_weights(write(wrap(b"\x80\x02" + program + b".")))
    assert time.process_time() - start < 30


def test_legacy_claims(write):
    program = tensor_program((3,), (1,), numel=3)
    with pytest.raises(WeightFileError, match="should have 5368709120 bytes, 12 are there"):
        read_weights(write(legacy_file(program, {"0": (5 * 2**28, bytes(12))})))
    with pytest.raises(WeightFileError, match="does not fit its tensors"):
        read_weights(write(legacy_file(program, {"1": (3, bytes(12))})))
    twice = program[:-1] + text("v") + tensor((3,), (1,), numel=3, storage="IntStorage") + b"s."
    with pytest.raises(WeightFileError, match="'0' is of two dtypes"):
        read_weights(write(legacy_file(twice, {"0": (3, bytes(12))})))
    with pytest.raises(WeightFileError, match="without the magic number"):
        read_weights(write(pickle.dumps({"weights": 1}, 2)))
