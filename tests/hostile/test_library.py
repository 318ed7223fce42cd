"""The package as a library: values of every wrong kind, other libraries' numbers, processes and 64-bit mode."""

import functools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_objects
import tiny_runs

from aitok_jax import export, tasks
from aitok_jax.models.decode_objects import decode_objects
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks import paste
from aitok_jax.tasks.arguments import check_process
from aitok_jax.tokenizers import DepthTokenizer, MaskTokenizer, parse_text, write_text

ROOT = Path(__file__).parents[2]
IMAGE = np.random.default_rng(0).integers(0, 256, (45, 80, 3), dtype=np.uint8)
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
BATCH = tiny_objects.batch(1)
NO_NUMBERS = ["4", 2.5, np.float32(4), float("nan"), None, True, np.ma.masked, [4], -1, 0]
BOX = [0, 0, 10, 10]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("depth", "joint"):
        tiny_runs.write(folder, kind)
    return folder


@pytest.fixture(scope="module")
def joint(runs):
    return Predictor.load(runs / "joint")


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export.export(Predictor.load(runs / "depth"), folder)
    return folder


def tokenizer(cls, **fields):
    model = VQVAE(hidden=4, downsample=4, num_res_blocks=0, num_codes=8, code_dim=4, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    rng = np.random.default_rng(3)
    return cls(model, jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), shapes), 8)


@pytest.fixture(scope="module")
def depth():
    return tokenizer(DepthTokenizer)


@pytest.fixture(scope="module")
def masks():
    return tokenizer(MaskTokenizer, objective="mse", use_norm=True, max_value=1.0)


class Tensor:
    """As of another library that does not give NumPy its values."""

    def __array__(self, *_, **__):
        raise RuntimeError("can't convert a tensor on a GPU")


IN_64_BITS = """
import sys, numpy as np
sys.path[:0] = ["tests"]
from hostile import test_library
test_library.answers(*sys.argv[1:])
"""


def answers(runs, exported, file):
    """Writes what a joint model, the tokenizers of its run and an export say."""
    predictor = Predictor.load(Path(runs) / "joint")
    found = {"objects": json.dumps(predictor.coco_results(IMAGE, image_id="a")), **predictor(IMAGE, "depth")}
    for cls, maps in ((DepthTokenizer, np.full((1, 16, 16), 2.5)), (MaskTokenizer, np.eye(16)[None])):
        one = cls.load(Path(runs) / "joint")
        ids = found[f"{cls.__name__} ids"] = one.encode(maps)
        found[f"{cls.__name__} maps"] = one.decode(ids)
        found[f"{cls.__name__} soft"] = one.decode_soft(np.eye(one.num_codes)[ids])
    found["export"] = export.load(exported)(np.full((1, 24, 24, 3), 0.5))["depth"]
    np.savez(file, **found)


def test_64_bit_mode_changes_nothing(runs, exported, tmp_path):
    command = [sys.executable, "-c", IN_64_BITS, *map(str, (runs, exported, tmp_path / "wide.npz"))]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUICK, "JAX_ENABLE_X64": "1"}, check=False)
    assert ended.returncode == 0
    answers(runs, exported, tmp_path / "plain.npz")
    with np.load(tmp_path / "wide.npz") as wide, np.load(tmp_path / "plain.npz") as plain:
        assert json.loads(str(plain["objects"]))
        for name, values in plain.items():
            assert wide[name].dtype == values.dtype, name
            np.testing.assert_array_equal(wide[name], values, err_msg=name)


def test_objects_are_decoded_in_64_bit_mode():
    part = tasks.build(tiny_objects.CONFIG).parts["instances"]
    params = jax.eval_shape(tasks.build(tiny_objects.CONFIG).init, jax.random.key(0), {"instances": BATCH})[0]
    memory = [(jax.ShapeDtypeStruct((2, 2, 9, 8), np.float32),) * 2]
    options = {"task": 0, "num_objects": 4, "mask_tokens": 4, "soft_input": True, "early_exit": 2}
    run = functools.partial(decode_objects, part.solver.transformer, vocabulary=part.vocabulary, **options)
    with jax.enable_x64(True):
        found = jax.eval_shape(run, params["transformer"], memory)
    assert (found.scores.dtype, found.mask_logits.dtype, found.tokens.dtype) == (np.float32, np.float32, np.int32)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (7, 7),
        ("a", "a"),
        (np.int64(7), 7),
        (np.uint8(7), 7),
        (np.array(7), 7),
        (np.str_("a"), "a"),
        ([np.int32(7)], 7),
        (np.array(["a"]), "a"),
        (np.array([7]), 7),
        (range(7, 8), 7),
        (-1, -1),
    ],
)
def test_ids_of_any_library_become_python_s(joint, given, plain):
    results = joint.coco_results(IMAGE, image_id=given)
    assert {result["image_id"] for result in json.loads(json.dumps(results))} == {plain}
    assert {type(result["image_id"]) for result in results} == {type(plain)}


@pytest.mark.parametrize(
    "given",
    [2.5, float("nan"), True, np.bool_(True), np.ma.masked, b"a", b"ab", [None], [[1]], {1}, {1: 2}, [1, 2], []],
)
def test_what_is_no_id(joint, given):
    with pytest.raises(ValueError, match=r"image_id"):
        joint.coco_results(IMAGE, image_id=given)
    if not isinstance(given, (list, set, dict)):
        with pytest.raises(ValueError, match=r"image_id=.* must be a whole number or a text"):
            paste.plain_id(given)


def test_results_that_json_has_no_number_for_are_left_out():
    boxes = np.tile(np.float32([0, 0, 4, 4]), (3, 1))
    outputs = {"boxes": boxes, "classes": np.zeros(3, int), "scores": np.float32([0.5, np.nan, np.inf])}
    results = paste.to_results({**outputs, "valid": np.ones(3, bool)}, np.int64(1), [np.int64(9)], np.ones(2), (8, 8))
    assert json.dumps(results, allow_nan=False) == (
        '[{"image_id": 1, "category_id": 9, "bbox": [0.0, 0.0, 4.0, 4.0], "score": 0.5}]'
    )


WRONG_ARRAYS = [np.float32(IMAGE) / 255, IMAGE[..., 0], IMAGE.transpose(2, 0, 1), IMAGE.astype(object)]
WRONG_ARRAYS += [np.ma.array(IMAGE, mask=IMAGE > 9), [IMAGE, None], (IMAGE, "a"), IMAGE.tolist()]


@pytest.mark.parametrize("image", [None, "room.jpg", Path("room.jpg"), Tensor(), 3, {}, b"x", *WRONG_ARRAYS])
def test_wrong_images(joint, image):
    for call in (joint, joint.coco_results):
        with pytest.raises(ValueError, match=r"image (must|has).*(; |pass)"):
            call(image)


WRONG_OPTIONS = {
    "batch_size": (NO_NUMBERS, "must be a whole number, at least 1"),
    "min_score": (["a", "0.5", np.nan, None, [0.5], True, -0.1, 1 + 0j], "must be in 0..1"),
    "task": ([3, "", ["depth"], np.array(["depth", "depth"]), b"depth"], "is not among"),
    "augment": (["no", None, 2, np.nan, [True]], "must be True or False"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options(joint, name):
    values, message = WRONG_OPTIONS[name]
    for value in values:
        for image in (IMAGE, [IMAGE, IMAGE]):
            with pytest.raises(ValueError, match=f"(?s){name}=.* {message}"):
                joint(image, **{name: value})


def test_numbers_of_numpy_are_numbers(joint):
    plain = joint(IMAGE, "detection", min_score=0.25, batch_size=2)
    found = joint(IMAGE, np.str_("detection"), min_score=np.float32(0.25), batch_size=np.int64(2), augment=np.bool_(0))
    np.testing.assert_array_equal(found["boxes"], plain["boxes"])


@pytest.mark.parametrize(
    "categories", [["cup"], [{"id": 1}], [{"id": "a", "name": "cup"}], [{"id": np.nan, "name": "cup"}]]
)
def test_wrong_categories(joint, categories):
    task = SimpleNamespace(parts={"objects": joint.parts["instances"]})
    with pytest.raises(ValueError, match="category"):
        Predictor(task, {}, {}, categories)
    with pytest.raises(ValueError, match=r"two categories have one id in \[7, 7\]"):
        Predictor(task, {}, {}, [{"id": 7, "name": "cup"}, {"id": np.int64(7), "name": "dog"}])


@pytest.mark.parametrize("path", [None, 3, "", b"runs", ["runs"], np.nan])
def test_what_is_no_path(joint, path):
    for load in (
        Predictor.load,
        DepthTokenizer.load,
        MaskTokenizer.load,
        export.load,
        lambda x: export.export(joint, x),
    ):
        with pytest.raises(ValueError, match=r"(path|folder)=.* must be a path"):
            load(path)


def test_depth_without_annotation(depth):
    maps = np.random.default_rng(0).uniform(1, 9, (2, 8, 8)).astype(np.float32)
    unknown = maps > 5
    zeros = depth.encode(np.where(unknown, np.float32(0), maps))
    assert np.any(zeros != depth.encode(maps))
    masked = np.ma.array(np.where(unknown, np.nan, maps), mask=unknown)
    np.testing.assert_array_equal(depth.encode(masked), zeros)
    np.testing.assert_array_equal(depth.encode(list(masked)), zeros)
    for value in (np.nan, np.inf, -np.inf, -1):
        with pytest.raises(ValueError, match=r"finite and at least 0, got float32 in .*without annotation to 0"):
            depth.encode(np.where(unknown, np.float32(value), maps))


@pytest.mark.parametrize("value", [255, -1, np.nan])
def test_values_that_are_no_mask(masks, value):
    squares = np.eye(8, dtype=np.float32)
    np.testing.assert_array_equal(masks.encode(squares > 0), masks.encode(squares))
    with pytest.raises(ValueError, match=r"masks must lie in 0..1, got .*; divide by 255, or compare; .*unknown"):
        masks.encode(np.where(squares > 0, value, 0))
    with pytest.raises(ValueError, match="masks must have no masked values"):
        masks.encode(np.ma.array(squares, mask=squares > 0))


@pytest.mark.parametrize("maps", [None, "room.png", Tensor(), 3, [[1.0], [1.0, 2.0]], {}, b"x", np.zeros((0, 8)), [[]]])
def test_what_is_no_map(depth, masks, maps):
    for one in (depth, masks):
        with pytest.raises(ValueError, match="must be"):
            one.encode(maps)


@pytest.mark.parametrize(
    "ids", [None, "ids", Tensor(), 3, [[1], [1, 2]], [1.0] * 4, [True] * 4, [None] * 4, [], {}, [9] * 4]
)
def test_what_are_no_tokens(depth, masks, ids):
    for call in (depth.decode, masks.decode, depth.decode_soft, masks.decode_soft):
        with pytest.raises(ValueError, match=r"(ids|probabilities|grid|tokens)"):
            call(ids)


def test_masked_tokens(depth):
    with pytest.raises(ValueError, match="ids must have no masked values"):
        depth.decode(np.ma.array([1, 2, 3, 99], mask=[0, 0, 0, 1]))
    p = np.eye(8, dtype=np.float32)[:4]
    with pytest.raises(ValueError, match="probabilities must have no masked values"):
        depth.decode_soft(np.ma.array(p, mask=p > 0))
    with pytest.raises(ValueError, match="probabilities must"):
        depth.decode_soft(np.where(p > 0, np.nan, p))


@pytest.mark.parametrize(
    "grid", [4, "22", "ab", (2,), (1, 2, 2), (2.0, 2.0), (-2, -2), (np.nan, 2), (True, 4), Tensor()]
)
def test_wrong_grids(depth, grid):
    with pytest.raises(ValueError, match="grid"):
        depth.decode([1, 2, 3, 4], grid)
    np.testing.assert_array_equal(depth.decode([1, 2, 3, 4], np.array([2, 2])), depth.decode([1, 2, 3, 4]))


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_wrong_sizes(depth, value):
    calls = [lambda: depth.grid(value, 8), lambda: depth.grid(8, value)]
    calls += [lambda: parse_text("", value, 8), lambda: write_text(BOX, None, 20, value)]
    for call in calls:
        with pytest.raises(ValueError, match=r"(height|width)=.* must be a whole number, at least 1"):
            call()


@pytest.mark.parametrize(
    "options",
    [{"box": box} for box in (None, 3, "0 0 1 1", [*"0011"], [None] * 4, [BOX], [0, 0, np.inf, 1], Tensor())]
    + [{"ids": ids} for ids in (3, "a" * 16, [np.nan] * 16, [1.5] * 16, [-1] * 16, [None] * 16, Tensor())]
    + [{"label": label} for label in (None, 3, b"cat", ["cat"])],
)
def test_what_is_no_object(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.*(must|in 0..127)"):
        write_text(**{"box": BOX, "ids": None, "height": 20, "width": 20, **options})


@pytest.mark.parametrize("text", [None, 3, b"<loc0000>", ["<loc0000>"], np.nan])
def test_what_is_no_text(text):
    with pytest.raises(ValueError, match=r"text=.* must be a str"):
        parse_text(text, 10, 10)


def forked(function):
    """What `function` says in a forked process; 'hangs' where it has not ended within a minute."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def tell():
        try:
            theirs.send(f"returned {type(function()).__name__}")
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=tell)
    process.start()
    said = ours.recv() if ours.poll(60) else "hangs"
    process.kill()
    process.join()
    return said


@pytest.mark.filterwarnings("ignore:os.fork")
def test_forked_workers(joint, depth, masks, exported, runs):
    maps, call = np.ones((8, 8), np.float32), export.load(exported)
    uses = {
        "image": lambda: joint(IMAGE),
        "results": lambda: joint.coco_results(IMAGE),
        "depth": lambda: depth.encode(maps),
        "masks": lambda: masks.decode([1, 2, 3, 4]),
        "soft": lambda: masks.decode_soft(np.eye(8)[:4]),
        "export": lambda: call(np.zeros((1, 24, 24, 3), np.float32)),
        "load": lambda: Predictor.load(runs / "joint"),
        "load tokenizer": lambda: DepthTokenizer.load(runs / "joint"),
        "load export": lambda: export.load(exported),
        "write export": lambda: export.export(joint, exported / "new"),
    }
    said = {name: forked(use) for name, use in uses.items()}
    wanted = r"RuntimeError: a model was loaded before this process was forked.*only in the workers.*by 'spawn'"
    for name, answer in said.items():
        assert re.match(wanted, answer), (name, answer)
    check_process()  # here all is well


LOADS_IN_THE_WORKER = """
import sys
sys.path[:0] = ["tests"]
import numpy as np
from hostile.test_library import forked
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tokenizers import DepthTokenizer
said = forked(lambda: Predictor.load(sys.argv[1])(np.zeros((24, 24, 3), np.uint8)))
assert said == "returned dict", said
"""


def test_a_model_loaded_in_the_forked_worker_predicts(runs):
    command = [sys.executable, "-c", LOADS_IN_THE_WORKER, str(runs / "depth")]
    environment, pipes = {**os.environ, **QUICK}, {"capture_output": True, "text": True}
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=120, **pipes)
    assert ended.returncode == 0, ended.stderr


def predict_shape(predictor):
    return predictor(IMAGE)["depth"].shape


def test_a_spawned_worker_predicts(runs, monkeypatch):
    """With a predictor that is sent to it."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    predictor = Predictor.load(runs / "depth")
    assert predict_shape(pickle.loads(pickle.dumps(predictor))) == (45, 80)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(predict_shape, (predictor,)).get(120) == (45, 80)
