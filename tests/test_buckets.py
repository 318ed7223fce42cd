"""Runs, data, weights and results in a bucket of Google Cloud Storage, for which an emulator stands in."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_objects
import tiny_runs
from ml_collections import ConfigDict
from PIL import Image
from test_prepared import command, raw_coco, write_coco
from toy_depth import picture

from aitok_jax import Predictor, main, paths
from aitok_jax.convert import __main__ as convert
from aitok_jax.convert import weight_files
from aitok_jax.data import datasets, own, scenes
from aitok_jax.data.sources import prepared
from aitok_jax.predict.__main__ import main as predict
from aitok_jax.training import checkpoint, events, lock
from configs.common import maps_data

gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("storage_emulator")
ROOT = Path(__file__).parents[1]
CONFIG = """
from configs import quickstart

def get_config():
    config = quickstart.get_config("smoke,parallel")
    del config.stages["depth"]
    stage = config.stages.tokenizer
    stage.update({"batch_size": 8, "eval_batch_size": 8, "log_every": 1, "checkpoint_every": 2})
    stage.data.render.update({"train": 16, "test": 4})
    stage.task.tokenizer.update({"hidden": 4, "num_res_blocks": 0})
    return config
"""


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket; this process and those that it starts take the emulator for Google's own."""
    with pytest.MonkeyPatch.context() as patch, emulator.running() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield f"gs://{emulator.BUCKET}"
    gcsfs.GCSFileSystem.clear_instance_cache()
    paths._check_bucket.cache_clear()


def start(config, workdir, output):
    line = [sys.executable, "-m", "aitok_jax.main", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with output.open("w") as file:
        return subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=file, env=environment)


def logged(workdir):
    lines = [json.loads(line) for line in paths.read(workdir / "tokenizer" / "metrics.jsonl").splitlines()]
    return [{name: value for name, value in line.items() if "per_sec" not in name} for line in lines]


@pytest.fixture(scope="module")
def killed(bucket, tmp_path_factory):
    """Two finished runs: a local one, and one in the bucket that was killed on its way."""
    folder = tmp_path_factory.mktemp("killed")
    config, local, remote = folder / "config.py", folder / "run", paths.expand(f"{bucket}/killed/run")
    config.write_text(CONFIG)
    process = start(config, remote, folder / "first.log")
    deadline = time.monotonic() + 300
    while not list((remote / "tokenizer" / "checkpoints").glob("*/commit_success.txt")):
        assert process.poll() is None, (folder / "first.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -9
    assert not (remote / "tokenizer" / "metrics.json").exists()
    for workdir, output in ((remote, folder / "second.log"), (local, folder / "local.log")):
        assert start(config, workdir, output).wait(timeout=300) == 0, output.read_text()
    return local, remote, (folder / "second.log").read_text()


def test_a_run_in_a_bucket_that_was_killed_is_the_local_one(killed):
    local, remote, _ = killed
    assert json.loads(paths.read(remote / "metrics.json")) == json.loads((local / "metrics.json").read_text())
    assert logged(remote) == logged(local)
    assert [line["step"] for line in logged(remote) if "loss" in line] == list(range(1, 9))


def test_a_run_leaves_the_same_files_in_a_bucket(killed):
    def names(workdir):
        files = [path.relative_to(workdir).as_posix() for path in paths.files(workdir)]
        return {name for name in files if "/checkpoints/" not in name and "tfevents" not in name}

    local, remote, _ = killed
    assert names(remote) == names(local)
    assert {"scenes/train.txt", "run.lock", "tokenizer/data.json", "tokenizer/env.json"} <= names(remote)
    assert checkpoint.latest_step(str(remote / "tokenizer")) == 8
    folder = remote / "tokenizer" / "checkpoints"
    assert {path.relative_to(folder).parts[0] for path in paths.files(folder)} == {"8"}


def shown(folder, tag):
    """The steps of a tag in TensorBoard's files."""
    import tensorflow as tf

    steps = []
    with tempfile.NamedTemporaryFile() as copy:
        for file in folder.glob("events.out.tfevents.*"):
            Path(copy.name).write_bytes(paths.read(file))
            records = tf.compat.v1.io.tf_record_iterator(copy.name)
            for event in map(tf.compat.v1.Event.FromString, records):
                steps += [event.step for value in event.summary.value if value.tag == tag]
    return sorted(steps)


def test_every_step_is_shown_once(killed):
    _, remote, _ = killed
    assert shown(remote / "tokenizer", "train/loss") == list(range(1, 9))


def test_events_after_the_step_are_dropped(bucket):
    folder = paths.expand(f"{bucket}/events")
    for start in (0, 2):
        log = events.Events(folder, start)
        for step in range(start + 1, 5 - start // 2):
            log.scalars(step, {"x": 1.0})
        log.close()
    assert shown(folder, "x") == [1, 2, 3]


def test_what_is_written_appears_as_a_whole(bucket):
    target = paths.expand(f"{bucket}/whole.txt")
    paths.write_text(target, "old")

    def broken():
        with paths.writing(target) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert paths.read(target) == b"old"
    with pytest.raises(FileNotFoundError) as error:
        paths.read(target.with_name("none"))
    assert error.value.filename == f"{bucket}/none"


def test_files_are_found_as_in_a_folder(bucket, tmp_path):
    folder = paths.expand(f"{bucket}/found")
    for name in ("a.JPG", "b/c.png", "b/.d.png", ".e/f.png", "g.txt"):
        paths.write_text(tmp_path / name, "x")
        paths.write_text(folder / name, "x")
    for below in (True, False):
        local, remote = (paths.find(root, {".jpg", ".png"}, below) for root in (tmp_path, folder))
        for here, there in zip(local, remote, strict=True):
            assert [path.relative_to(folder) for path in there] == [
                type(folder)(path.relative_to(tmp_path)) for path in here
            ]


def test_a_checkpoint_that_is_damaged_or_not_whole(bucket):
    folder = paths.expand(f"{bucket}/damaged")
    for step in (1, 2, 3):
        with checkpoint.open_manager(folder, keep=5) as manager:
            manager.save(step, args=checkpoint.ocp.args.Composite(**_items(step)), force=True)
    (folder / "checkpoints" / "3" / "commit_success.txt").unlink()
    assert checkpoint.latest_step(folder) == 2
    assert checkpoint.load_inference(folder)[1]["params"]["x"] == 2
    data = next(path for path in paths.files(folder / "checkpoints" / "2" / "inference") if "/d/" in str(path))
    data.write_bytes(bytes([paths.read(data)[0] ^ 1]) + paths.read(data)[1:])
    assert checkpoint.load_inference(folder)[1]["params"]["x"] == 1
    with checkpoint.open_manager(folder, keep=5) as manager:
        manager.save(4, args=checkpoint.ocp.args.Composite(**_items(4)), force=True)
    assert not (folder / "checkpoints" / "3").exists()
    assert checkpoint.load_inference(folder)[1]["params"]["x"] == 4
    paths.move(folder / "checkpoints" / "4", folder / "checkpoints" / "4.damaged")
    assert checkpoint.load_inference(folder)[1]["params"]["x"] == 1


def _items(step):
    config = ConfigDict({"task": tiny_objects.CONFIG})
    return checkpoint._inference_items({"params": {"x": np.float32(step)}, "model_state": {}}, config)


def test_prediction(bucket, tmp_path, capsys):
    folder = paths.expand(f"{bucket}/prediction")
    for place in (tmp_path, folder):
        tiny_runs.write(place, "depth")
    for name in ("a", "b"):
        Image.fromarray(picture(30, 40)).save(tmp_path / f"{name}.png")
        (folder / "photos" / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes())
    local = [f"--checkpoint={tmp_path / 'depth'}", f"--image={tmp_path / '*.png'}", f"--out={tmp_path / 'out'}"]
    assert predict(local) == 0
    names = [path.name for path in paths.files(tmp_path / "out")]
    for images in ("photos", "photos/*.png", "photos"):  # the last one replaces its own results
        given = [f"--checkpoint={folder / 'depth'}", f"--image={folder / images}", f"--out={folder / 'out'}"]
        assert predict(given) == 0
        assert [path.name for path in paths.files(folder / "out")] == names
    for name in names:
        assert paths.read(folder / "out" / name) == (tmp_path / "out" / name).read_bytes(), name
    (folder / "mine" / "a_panel.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        predict([*given[:2], f"--out={folder / 'mine'}"])
    assert "no results of ours and would be written over: a_panel.png" in capsys.readouterr().err


def test_prepared_data(bucket, tmp_path):
    write_coco(tmp_path)
    folder = paths.expand(f"{bucket}/prepared")
    for file in paths.files(tmp_path):
        (folder / file.relative_to(tmp_path).as_posix()).write_bytes(file.read_bytes())
    (tmp_path / "maps").mkdir()
    for file in paths.files(tmp_path / "train_images"):
        Image.fromarray(np.full((30, 40), 1500, np.uint16)).save(tmp_path / "maps" / f"{file.stem}.png")
        content = (tmp_path / "maps" / f"{file.stem}.png").read_bytes()
        (folder / "maps" / f"{file.stem}.png").write_bytes(content)
    for root in (tmp_path, folder):
        given = (f"--depth={root / 'maps'}", f"--annotations={root / 'train.json'}", "--test_share=0.4")
        command("folder", root / "train_images", root / "out", *given)
    for kind in ("nyu_pairs", "coco_instances"):
        (place,) = (tmp_path / "out" / kind).iterdir()
        for file in paths.files(place):
            assert (folder / "out" / kind / place.name / file.name).exists(), file
    there, here = (datasets.build(raw_coco(root / "out")).eval for root in (folder, tmp_path))
    assert there.fingerprint() == here.fingerprint()
    for index in range(len(here)):
        np.testing.assert_equal(there.read(index), here.read(index))
    maps = prepared.nyu_sources(prepared.find(folder / "out", "nyu"), train_images=True, counts=(0, 0))
    assert maps[0].read(0)["depth"][3, 4] == 1.5
    raw = datasets.build(raw_coco(folder))
    assert [raw.train.read(i)["image"].tolist() for i in range(len(raw.train))] == [
        image["image"].tolist() for image in map(datasets.build(raw_coco(tmp_path)).train.read, range(len(raw.train)))
    ]


@pytest.mark.parametrize("images", ["local", "bucket"])
@pytest.mark.parametrize("maps", ["local", "bucket"])
def test_maps_elsewhere_than_images(images, maps, bucket, tmp_path, monkeypatch):
    places = {"local": tmp_path, "bucket": paths.expand(f"{bucket}/elsewhere_{images}_{maps}")}
    for i in range(6):
        picture = np.full((24, 32, 3), 40 * i, np.uint8), np.full((24, 32), 1000 + i, np.uint16)
        for kind, place, array in zip(("images", "maps"), (images, maps), picture, strict=True):
            with paths.writing(places[place] / kind / f"room {i // 2}" / f"{i}.png") as file:
                Image.fromarray(array).save(file, format="PNG")
    monkeypatch.chdir(tmp_path)
    folder = "maps" if maps == "local" else str(places[maps] / "maps")
    found = own.find_maps("depth", str(places[images] / "images"), tmp_path / "lists", maps=folder)
    monkeypatch.chdir("/")
    data = datasets.build(ConfigDict(maps_data("depth", size=16, recipe="solver", **found.data)))
    by_url = images == "bucket" and maps == "local"
    assert {"://" in name for name in data.train.names} == {by_url}
    read = [source.read(i) for source in (data.train, data.eval) for i in range(len(source))]
    assert (len(data.train), len(data.eval), len(read)) == (found.train, found.val, 6)
    for example in read:
        i = round(float(example["depth"].max()) * 1000) - 1000
        assert (example["image"] == 40 * i).all()


def test_conversion(bucket, tmp_path):
    run, config = tiny_runs.write(tmp_path, "instances"), ConfigDict({"task": tiny_runs.KINDS["instances"]})
    file, folder = f"{bucket}/converted/weights.safetensors", f"{bucket}/converted/run"
    names = convert.to_file(run, file)
    assert names.keys() == weight_files.read_weights(file).keys()
    assert not convert.to_directory(file, folder, config).missing
    image = picture(32, 32)
    found, expected = (Predictor.load(place)(image, "detection") for place in (folder, run))
    np.testing.assert_array_equal(found["boxes"], expected["boxes"])


def test_scenes_are_made_once(bucket):
    root, options = f"{bucket}/scenes", {"train": 2, "test": 1, "height": 32, "width": 32, "workers": 1}
    scenes.ensure(root, **options)
    before = {path: path.stat().mtime for path in paths.files(paths.expand(root))}
    scenes.ensure(root, **options)
    assert {path: path.stat().mtime for path in paths.files(paths.expand(root))} == before
    scenes.write(root, **options | {"train": 1})
    assert len(paths.files(paths.expand(root))) == len(before) - 5  # an image and four maps


def test_a_folder_in_a_bucket_belongs_to_one_process(bucket, monkeypatch):
    monkeypatch.setattr(lock, "SETTLED", 0.1)
    folder = paths.expand(f"{bucket}/locked")
    with lock.held(folder):
        other = lock._me() | {"process": os.getppid(), "started": lock._started(os.getppid())}
        paths.write_text(folder / lock.FILE, json.dumps(other))
        with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"), lock.held(folder):
            pass
    monkeypatch.setattr(time, "sleep", lambda _: paths.write_text(folder / lock.FILE, json.dumps(other)))
    paths.write_text(folder / lock.FILE, "")
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()}"), lock.held(folder):
        pass  # the other one wrote after this one


def test_of_a_new_folder_nothing_stays(bucket):
    folder = paths.expand(f"{bucket}/new")
    with lock.held(folder):
        assert (folder / lock.FILE).exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://nowhere/run", "gs://nowhere: no such bucket"),
        ("ftp://host/run", r"ftp://host: ftp:// is not known; give a local path, or one of gs:// or s3://"),
        ("s3://bucket/run", "s3://bucket: s3fs, which reads s3://, is not installed: pip install s3fs"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_at_once(url, message, bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for use in (lambda: main.run(ConfigDict({}), url), lambda: Predictor.load(url)):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_bucket_that_lets_nobody_in(bucket, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("401, log in")

    monkeypatch.setattr(paths, "_system", lambda _: SimpleNamespace(info=refuse))
    with pytest.raises(ValueError, match=r"gs://closed cannot be used \(.*401.*\); log in with `gcloud auth"):
        paths.expand("gs://closed/run")


def test_checkpoints_lie_under_gs_alone(monkeypatch):
    monkeypatch.setattr(paths, "_check_bucket", lambda *_: None)
    with pytest.raises(ValueError, match="s3://bucket/run: Orbax keeps checkpoints in local folders and under gs://"):
        main.run(ConfigDict({}), "s3://bucket/run")
