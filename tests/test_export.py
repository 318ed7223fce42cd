"""Exported models: what their files say, in this process and in one that has never heard of this package."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from aitok_jax import export
from aitok_jax.predict.predictor import Predictor
from aitok_jax.tasks import paste

NEEDED = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers")
FOREIGN = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path] + [sys.argv[1]]
try:
    import aitok_jax
except ModuleNotFoundError:
    pass
else:
    sys.exit("aitok_jax can be imported")
import jax, jax.export, numpy as np
folder = sys.argv[2]
program = jax.export.deserialize(bytearray(open(folder + "/predict.jaxexport", "rb").read()))
weights = dict(np.load(folder + "/weights.npz"))
images = np.load(folder + "/images.npy")
np.savez(folder + "/outputs.npz", **jax.jit(program.call)(weights, images))
"""
CASES = {"depth": ("depth", (24, 32)), "joint": ("depth", None), "instances": ("instances", None)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: tiny_runs.write(folder, kind) for kind in tiny_runs.KINDS}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what JAX itself needs, and nothing else, to import from."""
    folder = tmp_path_factory.mktemp("site")
    for name in NEEDED:
        package = Path(importlib.util.find_spec(name).origin).parent
        for place in (package, package.parent / f"{name}.libs"):
            if place.exists():
                (folder / place.name).symlink_to(place)
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export.export(Predictor.load(runs["depth"]), folder)
    return folder


def foreign(site, folder, images):
    """The outputs of the files in `folder`, from a process without this package."""
    np.save(folder / "images.npy", images)
    command = [sys.executable, "-I", "-S", "-c", FOREIGN, str(site), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"JAX_PLATFORMS": "cpu"})
    assert result.returncode == 0, result.stderr
    with np.load(folder / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("kind", CASES)
def test_the_files_say_what_the_predictor_says_without_the_package(runs, site, tmp_path, kind):
    """Parallel and autoregressive depth, and objects, sampled."""
    task, size = CASES[kind]
    predictor = Predictor.load(runs[kind])
    description = export.export(predictor, tmp_path, task, size)
    _, height, width, _ = description["input"]["shape"]
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    outputs = foreign(site, tmp_path, images.astype(np.float32) / 255)
    if task == "depth":
        for i, maps in enumerate(predictor(list(images), "depth")):  # of the model's size, so that nothing is resized
            for name in ("depth", "confidence"):
                assert outputs[name].dtype == np.float32
                np.testing.assert_allclose(outputs[name][i], maps[name], rtol=1e-5, atol=1e-5, err_msg=name)
    else:
        for i, expected in enumerate(predictor.coco_results(list(images), task)):
            row = {name: values[i] for name, values in outputs.items()}
            found = paste.to_results(row, i, [7, 2, 90], np.ones(2), (height, width))
            found.sort(key=lambda result: -result["score"])
            tiny_runs.assert_same_results(found, expected)
        assert sum(map(len, predictor.coco_results(list(images), task)))


def test_any_batch(runs, tmp_path):
    predictor = Predictor.load(runs["depth"])
    description = export.export(predictor, tmp_path)
    assert description["input"]["shape"] == ["batch", 24, 24, 3]
    call = export.load(tmp_path)
    for count in (1, 3):
        assert call(np.zeros((count, 24, 24, 3), np.float32))["depth"].shape == (count, 24, 24)
    assert export.compare(predictor, tmp_path, 3) == pytest.approx({"depth": 0, "confidence": 0}, abs=1e-5)


def test_detection_of_a_model_of_instances_leaves_out_the_masks(runs, tmp_path):
    predictor = Predictor.load(runs["joint"])
    description = export.export(predictor, tmp_path, "detection")
    assert set(description["outputs"]) == {"boxes", "classes", "scores", "valid"}
    assert description["categories"] == tiny_runs.CATEGORIES


def test_description(runs, tmp_path):
    written = export.export(Predictor.load(runs["joint"]), tmp_path, "depth", (96, 72))
    description = json.loads((tmp_path / "export.json").read_text())
    assert description == written
    assert description["task"] == "depth"
    assert description["input"]["shape"] == ["batch", 32, 24, 3]
    assert description["input"]["dtype"] == "float32"
    assert description["input"]["range"] == [0, 1]
    assert description["outputs"]["depth"]["shape"] == ["batch", 32, 24]
    assert "metres" in description["outputs"]["depth"]["meaning"]
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["versions"]["jax"] == jax.__version__
    assert {path.name for path in tmp_path.iterdir()} == {"predict.jaxexport", "weights.npz", "export.json"}


def test_wrong_arguments_are_refused(runs, tmp_path):
    predictor = Predictor.load(runs["joint"])
    with pytest.raises(ValueError, match=r"task='edges'"):
        export.export(predictor, tmp_path, "edges")
    with pytest.raises(ValueError, match=r"size=\(32, 32\) is for maps; instances .*: leave it out"):
        export.export(predictor, tmp_path, "instances", (32, 32))
    with pytest.raises(ValueError, match=r"size=\(0, 32\) must be"):
        export.export(predictor, tmp_path, "depth", (0, 32))
    with pytest.raises(ValueError, match="10x100"):
        export.export(predictor, tmp_path, "depth", (10, 100))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "size", [("a", 4), 5, "44", (4,), (1, 2, 3), (2.5, 4), (np.nan, 4), (True, 4), (0, 4), [[4, 4]]]
)
def test_wrong_sizes(runs, tmp_path, size):
    joint = Predictor.load(runs["joint"])
    with pytest.raises(ValueError, match=r"size=.* must be a height and a width in pixels, at least 1"):
        export.export(joint, tmp_path, "depth", size)


@pytest.mark.parametrize("name", [export.PROGRAM, export.WEIGHTS])
def test_cut_off_exports(exported, tmp_path, name):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (exported / name).read_bytes()
    for length in (0, 1, 4, 100, len(data) // 10, len(data) // 2, len(data) - 100, len(data) - 8):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{name} is damaged.*; export it again"):
            export.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; export it again"):
        export.load(tmp_path)


def test_exports_of_two_models_and_a_broken_description(exported, runs, tmp_path):
    description = json.loads((exported / export.DESCRIPTION).read_text())
    for name in (export.PROGRAM, export.WEIGHTS):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (tmp_path / export.DESCRIPTION).write_text(json.dumps({**description, "sha256": {export.WEIGHTS: "another"}}))
    with pytest.raises(ValueError, match=r"weights\.npz is damaged, or of another export .*; export it again"):
        export.load(tmp_path)
    del description["sha256"]  # as older exports
    (tmp_path / export.DESCRIPTION).write_text(json.dumps(description))
    export.load(tmp_path)
    with np.load(exported / export.WEIGHTS) as file:
        weights = dict(file)
    name, array = weights.popitem()
    for other in (weights, {**weights, name: array[None]}, {**weights, name: array, "more": array}):
        np.savez(tmp_path / export.WEIGHTS, **other)
        with pytest.raises(ValueError, match=r"weights\.npz does not fit predict\.jaxexport .*; export it again"):
            export.load(tmp_path)
    (tmp_path / export.DESCRIPTION).write_text(json.dumps(description)[:30])
    with pytest.raises(ValueError, match=r"export\.json is damaged .*; export it again"):
        export.compare(Predictor.load(runs["depth"]), tmp_path)


def test_images_that_an_export_does_not_take(exported):
    call, images = export.load(exported), np.random.default_rng(0).random((1, 24, 24, 3), np.float32)
    np.testing.assert_array_equal(call(images)["depth"], call(images.astype(np.float64))["depth"])
    wrong = [None, "a.jpg", np.uint8(images), images[0], images[:, :8], images[:0], images * 255, images * np.nan]
    for given in (*wrong, np.ma.array(images, mask=images > 0.5)):
        with pytest.raises(ValueError, match=r"images must be float32\[batch, 24, 24, 3\] in 0..1.*divide by 255"):
            call(given)


def test_command_line(runs, tmp_path, capsys):
    assert export.main([f"--checkpoint={runs['depth']}", f"--out={tmp_path / 'a'}"]) == 0
    shown = capsys.readouterr().out
    assert "depth: differs from the predictor by 0" in shown
    with pytest.raises(SystemExit) as stop:
        export.main([f"--checkpoint={tmp_path / 'nothing'}", f"--out={tmp_path / 'b'}"])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_files_that_say_something_else_are_found(runs, tmp_path, capsys, monkeypatch):
    write = np.savez

    def other_weights(path, **weights):
        name = next(name for name in weights if name.endswith("decoder/layers_0/bias"))
        write(path, **{**weights, name: weights[name] + np.float32(1e-2)})

    monkeypatch.setattr(np, "savez", other_weights)
    assert export.main([f"--checkpoint={runs['depth']}", f"--out={tmp_path}"]) == 1
    assert "do not use" in capsys.readouterr().err
    monkeypatch.setattr(export, "compare", lambda *_: {"depth": float("nan")})
    assert export.main([f"--checkpoint={runs['depth']}", f"--out={tmp_path}"]) == 1
