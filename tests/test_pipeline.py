import itertools
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import aitok_jax.data
from aitok_jax.data import datasets, map_transforms, pipeline
from aitok_jax.data.sources import nyu
from aitok_jax.tasks.modalities import Depth

DEPTH = Depth()


class Frames:
    """Example i is noise whose depth starts with i + 1 metres at every pixel's floor."""

    def __init__(self, count, sizes=((12, 16),)):
        self.names = [f"frame_{i}" for i in range(count)]
        rng = np.random.default_rng(0)
        self.frames = []
        for i in range(count):
            size = sizes[i % len(sizes)]
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            self.frames.append({"image": image, "depth": (i + 1 + rng.random(size) / 2).astype(np.float32)})

    def __len__(self):
        return len(self.names)

    def read(self, index):
        return self.frames[index]


class PickyFrames(Frames):
    """Frames whose `bad` examples raise."""

    def __init__(self, count, bad):
        super().__init__(count)
        self.bad = bad

    def read(self, index):
        if index in self.bad:
            raise nyu.DataError(f"{self.names[index]}: broken image file; restore it")
        return super().read(index)


def write_folder(root, count, subfolder="", size=(12, 16)):
    rng = np.random.default_rng(1)
    folder = root / subfolder / "room"
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"rgb_{i:05}.jpg")
        Image.fromarray(rng.integers(500, 10000, size, np.uint16)).save(folder / f"sync_depth_{i:05}.png")
    return folder


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


SOLVER = map_transforms.solver_train(DEPTH, 10)


def test_batch_contract():
    source = Frames(5)
    (batch,) = take(pipeline.train_batches(source, SOLVER, batch_size=4, seed=0), 1)
    shapes = {key: (x.shape, x.dtype) for key, x in batch.items()}
    assert shapes == {
        "image": ((4, 10, 10, 3), np.float32),
        "depth": ((4, 10, 10), np.float32),
        "id": ((4,), np.int32),
        "mask": ((4,), np.float32),
    }
    np.testing.assert_array_equal(batch["mask"], 1)
    np.testing.assert_array_equal(np.floor(batch["depth"]), (batch["id"] + 1)[:, None, None] * np.ones((1, 10, 10)))


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_resume_is_bitwise(start):
    source = Frames(7)
    options = {"batch_size": 4, "seed": 5}
    whole = take(itertools.islice(pipeline.train_batches(source, SOLVER, **options), start, None), 4)
    resumed = take(pipeline.train_batches(source, SOLVER, start_step=start, **options), 4)
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("hosts", "shards", "rows"), [(1, 8, 8), (2, 4, 8), (2, 6, 6), (4, 8, 8), (8, 8, 8)])
def test_batches_are_filled_up_for_the_devices(hosts, shards, rows):
    """At the end of all hosts' rows, by repeated ones; 5 examples, of which some hosts may have none."""
    source, options = Frames(7), {"batch_size": 5, "seed": 5, "start_step": 2}
    plain = take(pipeline.train_batches(source, SOLVER, **options), 2)
    shares = [
        take(pipeline.train_batches(source, SOLVER, **options, process_index=i, process_count=hosts, shards=shards), 2)
        for i in range(hosts)
    ]
    for step, batch in enumerate(plain):
        assert {len(share[step]["id"]) for share in shares} == {rows // hosts}
        joined = {key: np.concatenate([share[step][key] for share in shares]) for key in shares[0][step]}
        np.testing.assert_array_equal(joined.pop("weight"), np.arange(rows) < 5)
        assert joined["id"].max() < 7
        assert_same({key: values[:5] for key, values in joined.items()}, batch)
        for values in joined.values():
            assert all((row == values[4]).all() for row in values[5:])
    assert "weight" not in take(pipeline.train_batches(source, SOLVER, **options, shards=5), 1)[0]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_the_batch_of_one(hosts):
    source = Frames(7)
    train = {"batch_size": 6, "seed": 5, "start_step": 2}
    for call, options in ((pipeline.train_batches, train), (pipeline.eval_batches, {"batch_size": 6})):
        transform = SOLVER if call is pipeline.train_batches else map_transforms.evaluation(DEPTH)
        one = take(call(source, transform, **options), 2)
        shares = [
            take(call(source, transform, **options, process_index=i, process_count=hosts), 2) for i in range(hosts)
        ]
        for step, batch in enumerate(one):
            joined = {key: np.concatenate([share[step][key] for share in shares]) for key in batch}
            assert_same(batch, joined)


def test_every_epoch_sees_every_example_once_in_another_order():
    count = 10
    batches = take(pipeline.train_batches(Frames(count), SOLVER, batch_size=4, seed=1), 10)
    epochs = np.concatenate([batch["id"] for batch in batches]).reshape(4, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seed_changes_order_and_augmentation():
    first, again, other = (
        take(pipeline.train_batches(Frames(10), SOLVER, batch_size=10, seed=seed), 2) for seed in (0, 0, 1)
    )
    assert_same(first[1], again[1])
    assert not np.array_equal(first[0]["id"], other[0]["id"])
    (a,), (b,) = (take(pipeline.train_batches(Frames(1), SOLVER, batch_size=1, seed=seed), 1) for seed in (0, 1))
    assert not np.array_equal(a["image"], b["image"])


def test_augmentation_changes_with_the_position():
    (batch,) = take(pipeline.train_batches(Frames(1), SOLVER, batch_size=16, seed=0), 1)
    assert len({image.tobytes() for image in batch["image"]}) == 16


def test_large_seeds_and_single_examples_work():
    (batch,) = take(pipeline.train_batches(Frames(1), SOLVER, batch_size=2, seed=2**40 + 3), 1)
    np.testing.assert_array_equal(batch["id"], 0)


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(5, 4, 2), (4, 4, 1), (2, 4, 1), (9, 4, 3)])
def test_eval_covers_everything_once_and_pads(count, batch_size, steps):
    source = Frames(count)
    batches = list(pipeline.eval_batches(source, map_transforms.evaluation(DEPTH), batch_size=batch_size))
    assert len(batches) == steps
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(joined["mask"], np.arange(steps * batch_size) < count)
    np.testing.assert_array_equal(joined["id"][:count], np.arange(count))
    np.testing.assert_array_equal(joined["id"][count:], 0)
    for i in range(steps * batch_size):
        expected = source.read(i if i < count else 0)
        np.testing.assert_array_equal(joined["depth"][i], expected["depth"])
        np.testing.assert_allclose(joined["image"][i], expected["image"] / 255, rtol=1e-6)


def test_depth_only_source(tmp_path):
    write_folder(tmp_path, 3)
    source = nyu.NyuSource(DEPTH, tmp_path, images=False)
    (batch,) = take(
        pipeline.train_batches(source, map_transforms.tokenizer_train(DEPTH, 8, ()), batch_size=2, seed=0), 1
    )
    assert set(batch) == {"depth", "id", "mask"}
    assert batch["depth"].shape == (2, 8, 8)


def test_reader_errors_come_out_as_they_were_raised():
    batches = pipeline.train_batches(PickyFrames(6, {4}), SOLVER, batch_size=3, seed=0)
    with pytest.raises(nyu.DataError, match=r"^frame_4: broken image file; restore it$"):
        take(batches, 2)
    with pytest.raises(nyu.DataError, match=r"^frame_2: "):
        list(pipeline.eval_batches(PickyFrames(6, {2, 4}), map_transforms.evaluation(DEPTH), batch_size=2))


def test_batches_before_the_broken_one_arrive():
    batches = pipeline.eval_batches(PickyFrames(6, {4}), map_transforms.evaluation(DEPTH), batch_size=2)
    assert [batch["id"].tolist() for batch in take(batches, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(nyu.DataError, match="frame_4"):
        next(batches)


def test_missing_file_is_named(tmp_path):
    folder = write_folder(tmp_path, 2)
    source = nyu.NyuSource(DEPTH, tmp_path)
    (folder / "rgb_00001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"room/rgb_00001\.jpg: missing file"):
        list(pipeline.eval_batches(source, map_transforms.evaluation(DEPTH), batch_size=2))


def test_an_image_truncated_in_the_middle_of_an_epoch(tmp_path):
    folder = write_folder(tmp_path, 40)
    options = {"batch_size": 2, "seed": 6}
    whole = take(pipeline.train_batches(nyu.NyuSource(DEPTH, tmp_path), SOLVER, **options), 20)
    bad = int(whole[17]["id"][1])
    path = folder / f"rgb_{bad:05}.jpg"
    batches = pipeline.train_batches(nyu.NyuSource(DEPTH, tmp_path), SOLVER, **options)
    take(batches, 2)
    path.write_bytes(path.read_bytes()[:300])
    for a, b in zip(take(batches, 15), whole[2:17], strict=True):
        assert_same(a, b)
    with pytest.raises(nyu.DataError, match=rf"rgb_{bad:05}\.jpg: broken image file"):
        next(batches)
    source = nyu.NyuSource(DEPTH, tmp_path, on_error="skip")
    ids, expected = (
        np.concatenate([batch["id"] for batch in part])
        for part in (take(pipeline.train_batches(source, SOLVER, **options), 20), whole)
    )
    np.testing.assert_array_equal(ids, np.where(expected == bad, (bad + 1) % 40, expected))
    assert source.skipped == {f"room/rgb_{bad:05}.jpg"}


def test_too_small_images_are_named():
    batches = pipeline.train_batches(Frames(2), map_transforms.solver_train(DEPTH, 13), batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"frame_[01]: crop size 13 must be at most the 12x16 pixels"):
        next(batches)


def test_mixed_sizes():
    source = Frames(4, sizes=((12, 16), (11, 17)))
    (batch,) = take(pipeline.train_batches(source, SOLVER, batch_size=4, seed=0), 1)
    assert batch["image"].shape == (4, 10, 10, 3)
    with pytest.raises(nyu.DataError, match=r"frame_\d is \d\dx\d\d but frame_\d is \d\dx\d\d; .*one size"):
        list(pipeline.eval_batches(source, map_transforms.evaluation(DEPTH), batch_size=4))


def skipping(tmp_path, count, bad):
    folder = write_folder(tmp_path, count)
    for i in bad:
        (folder / f"rgb_{i:05}.jpg").write_bytes(b"broken")
    return nyu.NyuSource(DEPTH, tmp_path, on_error="skip")


def test_skip_in_training_takes_the_next_one(tmp_path):
    source = skipping(tmp_path, 5, {1, 4})
    options = {"batch_size": 5, "seed": 0}
    (batch,) = take(pipeline.train_batches(source, SOLVER, **options), 1)
    assert sorted(batch["id"].tolist()) == [0, 0, 2, 2, 3]  # 1 -> 2 and 4 -> 0
    np.testing.assert_array_equal(batch["mask"], 1)
    assert source.skipped == {"room/rgb_00001.jpg", "room/rgb_00004.jpg"}
    (again,) = take(pipeline.train_batches(source, SOLVER, **options), 1)
    assert_same(batch, again)


def test_skip_in_evaluation_masks_out(tmp_path):
    source = skipping(tmp_path, 5, {0, 3})
    batches = list(pipeline.eval_batches(source, map_transforms.evaluation(DEPTH), batch_size=4))
    assert np.concatenate([batch["mask"] for batch in batches]).tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert np.concatenate([batch["id"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_all_broken(tmp_path):
    source = skipping(tmp_path, 2, {0, 1})
    with pytest.raises(nyu.DataError, match="all 2 examples are broken"):
        next(pipeline.train_batches(source, SOLVER, batch_size=2, seed=0))


@pytest.mark.parametrize("call", [lambda **k: pipeline.train_batches(seed=0, **k), pipeline.eval_batches])
def test_wrong_arguments(call):
    arguments = {"source": Frames(3), "transform": SOLVER}
    with pytest.raises(ValueError, match="batch_size=5 must be a positive multiple of the 2 hosts"):
        call(**arguments, batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive multiple"):
        call(**arguments, batch_size=0)
    with pytest.raises(ValueError, match=r"process_index=2 must be in 0\.\.1"):
        call(**arguments, batch_size=4, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="the source has no examples"):
        call(source=Frames(0), transform=SOLVER, batch_size=1)


def test_negative_start():
    with pytest.raises(ValueError, match="start_step=-1 must not be negative"):
        pipeline.train_batches(Frames(3), SOLVER, batch_size=1, seed=0, start_step=-1)


def data_config(root, **changes):
    values = dict(name="nyu", root=str(root), train_list="", test_list="", train_subfolder="", cache=False, size=12)
    values |= dict(
        test_subfolder="official_splits/test", recipe="solver", columns=(), fit="crop", color=True, cutdepth="published"
    )
    values |= dict(modality="depth", depth_scale=0.0, also_root="", also_count=0)
    values |= dict(on_error="raise", expected_train=0, expected_test=0, render={})
    return ConfigDict({**values, **changes})


def test_build_solver_and_tokenizer(tmp_path):
    write_folder(tmp_path, 4)
    write_folder(tmp_path, 2, "official_splits/test")
    data = datasets.build(data_config(tmp_path, expected_train=4, expected_test=2))
    assert (len(data.train), len(data.eval)) == (4, 2)
    (batch,) = take(pipeline.train_batches(data.train, data.train_transform, batch_size=2, seed=0), 1)
    assert batch["image"].shape == (2, 12, 12, 3)
    (batch,) = pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2)
    assert batch["image"].shape == (2, 12, 16, 3)

    data = datasets.build(data_config(tmp_path, recipe="tokenizer", columns=(3, 16)))
    assert not data.train.images
    (batch,) = take(pipeline.train_batches(data.train, data.train_transform, batch_size=2, seed=0), 1)
    assert set(batch) == {"depth", "id", "mask"}
    (batch,) = pipeline.eval_batches(data.eval, data.eval_transform, batch_size=2)
    assert set(batch) == {"image", "depth", "id", "mask"}


def test_build_errors(tmp_path):
    write_folder(tmp_path, 4)
    write_folder(tmp_path, 2, "official_splits/test")
    for changes, message in (
        ({"name": "kitti"}, r"data\.name='kitti' must be 'nyu'"),
        ({"modality": "dept"}, r"data\.modality: 'dept' is unknown; did you mean 'depth'"),
        ({"recipe": "mask"}, r"data\.recipe='mask' must be one of \('tokenizer', 'solver'\)"),
        ({"cutdepth": "no"}, "cutdepth='no' must be one of"),
        ({"expected_train": 24231}, "4 pairs, but expected_count=24231"),
        ({"expected_test": 654}, "2 pairs, but expected_count=654"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.build(data_config(tmp_path, **changes))


def test_build_renders_first(tmp_path, monkeypatch):
    calls = []

    def ensure(root, **options):
        calls.append(options)
        write_folder(Path(root), options["train"])
        write_folder(Path(root), options["test"], "official_splits/test")

    fake = types.SimpleNamespace(ensure=ensure)
    monkeypatch.setitem(sys.modules, "aitok_jax.data.scenes", fake)
    monkeypatch.setattr(aitok_jax.data, "scenes", fake, raising=False)
    render = {"train": 3, "test": 1, "height": 12, "width": 16, "seed": 7}
    data = datasets.build(data_config(tmp_path / "new", render=render))
    assert (len(data.train), len(data.eval)) == (3, 1)
    assert calls[0].pop("workers") >= 1
    assert calls == [render]


def test_tensorflow_gets_no_accelerator():
    import tensorflow as tf

    next(pipeline.train_batches(Frames(1), SOLVER, batch_size=1, seed=0))
    assert all(device.device_type == "CPU" for device in tf.config.get_visible_devices())


def test_leaving_with_an_open_iterator_does_not_hang():
    code = """if True:
        import sys, time
        sys.path.insert(0, "tests")
        import test_pipeline as t

        class Slow(t.Frames):
            def read(self, index):
                time.sleep(0.03)
                return super().read(index)

        batches = t.pipeline.train_batches(Slow(50), t.SOLVER, batch_size=4, seed=0)
        next(batches)
        print("done")
    """
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_real_frames_solver_batch(nyu_frames):
    source = nyu.NyuSource(DEPTH, nyu_frames, "list.txt")
    (batch,) = take(pipeline.train_batches(source, map_transforms.solver_train(DEPTH, 480), batch_size=4, seed=0), 1)
    assert batch["image"].shape == (4, 480, 480, 3)
    assert 0.1 < batch["image"].mean() < 0.9
    seen = batch["depth"][batch["depth"] > 0]
    assert 0.3 < seen.min() < seen.max() <= 10
    assert 1 < np.median(seen) < 5
