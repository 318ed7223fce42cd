import sys

import coco_files
import numpy as np
import pytest
from test_nyu import write_pair
from test_pipeline import SOLVER, assert_same, data_config, take

from aitok_jax.data import datasets, pipeline, prepare
from aitok_jax.data.sources import mixture, nyu
from aitok_jax.tasks.modalities import Depth

DEPTH = Depth()


@pytest.fixture
def roots(tmp_path):
    for root, count, size in (("a", 5, (12, 16)), ("b", 3, (13, 20))):
        for i in range(count):
            write_pair(tmp_path / root / "room", i, size=size, seed=i)
        write_pair(tmp_path / root / "official_splits/test/den", size=size)
    return tmp_path / "a", tmp_path / "b"


def mixed(roots, count=1, **options):
    return mixture.Mixture(*(nyu.NyuSource(DEPTH, root, **options) for root in roots), count)


def test_every_batch_has_its_shares_and_every_epoch_all_examples(roots):
    batches = take(pipeline.train_batches(mixed(roots, 2), SOLVER, batch_size=6, seed=1), 15)
    ids = np.stack([batch["id"] for batch in batches])
    first, second = ids[:, :4].ravel(), ids[:, 4:].ravel()
    assert [set(epoch) for epoch in first.reshape(-1, 5)] == [set(range(5))] * 12
    assert [set(epoch) for epoch in second.reshape(-1, 3)] == [{5, 6, 7}] * 10
    assert len({tuple(epoch) for epoch in first.reshape(-1, 5)}) > 6


def test_the_first_source_is_read_as_if_alone(roots):
    alone = take(pipeline.train_batches(nyu.NyuSource(DEPTH, roots[0]), SOLVER, batch_size=4, seed=1), 5)
    both = take(pipeline.train_batches(mixed(roots, 2), SOLVER, batch_size=6, seed=1), 5)
    for a, b in zip(alone, both, strict=True):
        np.testing.assert_array_equal(a["id"], b["id"][:4])


def test_a_function_of_seed_and_step_on_any_number_of_hosts(roots):
    options = {"batch_size": 6, "seed": 5}
    whole = take(pipeline.train_batches(mixed(roots, 2), SOLVER, **options), 9)[7:]
    shares = [
        take(
            pipeline.train_batches(mixed(roots, 2), SOLVER, **options, start_step=7, process_index=i, process_count=3),
            2,
        )
        for i in range(3)
    ]
    for step, batch in enumerate(whole):
        assert_same(batch, {key: np.concatenate([share[step][key] for share in shares]) for key in batch})


def test_examples_are_those_of_the_sources(roots):
    source = mixed(roots)
    second = nyu.NyuSource(DEPTH, roots[1])
    assert source.names == [*nyu.NyuSource(DEPTH, roots[0]).names, *second.names]
    assert_same(source.read(6), second.read(1))
    (roots[1] / "room/rgb_00002.jpg").write_bytes(b"broken")
    used, example = mixed(roots, on_error="skip").read_readable(7)
    assert used == 5  # the first of the second source, not of the first
    assert_same(example, second.read(0))
    with pytest.raises(nyu.DataError, match="rgb_00002"):
        mixed(roots).read_readable(7)


def test_built_from_a_config(roots):
    options = {"root": str(roots[0]), "also_root": str(roots[1]), "also_count": 1, "expected_train": 5}
    data = datasets.build(data_config(**options))
    assert (len(data.train), len(data.eval)) == (8, 1)
    assert data.fingerprint()["train"]["count"] == 1
    for size in (1, 0):
        with pytest.raises(
            ValueError, match=rf"also_count=1 must be between 1 and batch_size - 1 = 0|batch_size={size}"
        ):
            pipeline.train_batches(data.train, SOLVER, batch_size=size, seed=0)
    tokens = datasets.build(data_config(**options, recipe="tokenizer"))
    (batch,) = take(pipeline.train_batches(tokens.train, tokens.train_transform, batch_size=2, seed=0), 1)
    assert set(batch) == {"depth", "id", "mask"}


def test_a_list_is_not_for_prepared_data_beside_it(roots, tmp_path, monkeypatch):
    (roots[0] / "train.txt").write_text(
        "".join(f"/room/rgb_{i:05}.jpg /room/sync_depth_{i:05}.png\n" for i in range(2))
    )
    prepared = tmp_path / "prepared"
    arguments = ["prepare", "nyu", str(roots[1]), str(prepared), "--train_count=0", "--test_count=0"]
    monkeypatch.setattr(sys, "argv", arguments)
    prepare.main()
    options = {"root": str(roots[0]), "train_list": "train.txt", "also_root": str(prepared), "also_count": 1}
    assert len(datasets.build(data_config(**options)).train) == 2 + 3


def test_classes_must_be_the_same(tmp_path):
    sources = []
    for i, categories in enumerate((coco_files.CATEGORIES, [*coco_files.CATEGORIES, {"id": 9, "name": "cat"}])):
        images, path = coco_files.write(tmp_path / str(i), [coco_files.annotation(1)], categories=categories)
        sources.append(coco_files.coco.CocoSource(images, path))
    with pytest.raises(nyu.DataError, match="list other categories; give both the same list"):
        mixture.Mixture(*sources, 1)
    assert mixture.Mixture(sources[0], sources[0], 1).categories == ["dog", "cup"]
