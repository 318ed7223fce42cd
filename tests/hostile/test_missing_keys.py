"""A configuration that lacks a key, or has something else there than a mapping: one sentence that names it."""

import re

import pytest
from config_files import load
from ml_collections import ConfigDict

from aitok_jax import main
from aitok_jax.command_line import overrides
from aitok_jax.config import translated
from aitok_jax.data import datasets
from aitok_jax.training import keys

GIVEN = "must be given; the files in configs/ have all keys"


def without(config, place):
    """A copy that lacks the key at a dotted place."""
    copy = ConfigDict(config.to_dict())
    *parents, key = place.split(".")
    inner = copy
    for name in parents:
        inner = inner[name]
    del inner[key]
    return copy


def refused(config, workdir, mode="train"):
    with pytest.raises(ValueError, match=r"^[^\n]*\Z") as error:
        main.run(config, workdir, mode)
    assert not workdir.exists()
    return str(error.value)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("place", [*keys.REQUIRED, *(f"optim.{key}" for key in keys.OPTIM), "task.name"])
def test_of_a_run(place, mode, tmp_path):
    config = without(load("nyu"), place)
    parent, _, key = place.rpartition(".")
    said = f"{f'config.{parent}'.rstrip('.')}: {key} {GIVEN}"
    assert refused(config, tmp_path / "w", mode) == said
    stages = ConfigDict({"stages": {"first": load("vqvae_depth"), "second": config}})
    assert refused(stages, tmp_path / "w", mode) == f"stage second: {said}"


@pytest.mark.parametrize("place", ["data.depth", "batch_size.instances", "eval_batch_size.depth", "task.parts"])
def test_of_a_part(place, tmp_path):
    parent, _, key = place.partition(".")
    assert refused(without(_joint(tmp_path), place), tmp_path / "w") == f"config.{parent}: {key} {GIVEN}"


def _joint(tmp_path):
    config = load("joint").copy_and_resolve_references()
    for data in config.data.values():
        data.root = str(tmp_path)
    return config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (8, "config.batch_size=8 must be a mapping, such as {} or {key: value}"),
        (None, f"config.batch_size: depth, instances {GIVEN}"),
    ],
)
def test_no_mapping_of_parts(value, message, tmp_path):
    config = _joint(tmp_path)
    with config.ignore_type():
        config.batch_size = value
    assert refused(config, tmp_path / "w") == message


UNUSED = {
    "nyu": {"columns", "first_label"},
    "vqvae_depth": {"color", "cutdepth", "first_label"},
    "coco": set(),
    "vqvae_mask": {"size", "num_objects", "jitter", "order"},
}


@pytest.mark.parametrize("name", UNUSED)
def test_of_data(name, tmp_path):
    (data,) = translated(load(name)).data.values()
    data.root = str(tmp_path)
    every = set(datasets.KEYS[data.name])
    assert UNUSED[name] | set(data) == every
    for key in every - UNUSED[name]:
        with pytest.raises(ValueError, match=f"^config.data: {key} {GIVEN}"):
            datasets.build(without(data, key))
    less = ConfigDict({key: value for key, value in data.items() if key not in UNUSED[name]})
    with pytest.raises((OSError, datasets.DataError), match="no "):
        datasets.build(less)


@pytest.mark.parametrize("key", ["train", "test", "height", "width"])
def test_of_scenes_to_render(key, tmp_path):
    data = load("quickstart", "smoke").stages.tokenizer.data
    data.root = str(tmp_path / "scenes")
    with pytest.raises(ValueError, match=f"^config.data.render: {key} {GIVEN}"):
        datasets.build(without(data, f"render.{key}"))
    assert not (tmp_path / "scenes").exists()


PLAN = load("finetune", "depth")


@pytest.mark.parametrize(
    "place",
    [
        *(key for key in PLAN if key != "finetune"),
        *(f"{outer}.{key}" for outer in ("data", "finetune") for key in PLAN[outer]),
    ],
)
def test_of_a_plan(place, tmp_path):
    parent, _, key = place.rpartition(".")
    said = f"{f'config.{parent}'.rstrip('.')}: {key} {GIVEN}"
    assert refused(without(PLAN, place), tmp_path / "w") == said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": 3}, "config.task=3 must be a mapping, {key: value}"),
        ({"optim": None}, "config.optim=None must be a mapping, {key: value}"),
        ({"stages": {"a": {"data": "x"}}}, "config.data='x' must be a mapping, {key: value}"),
        ({"stages": {"a": 3}}, "mine.py: stages.a=3 must be a run, {key: value}"),
        ({"stages": 3}, "mine.py: stages must be a mapping of at least one run, {name: {key: value}}"),
        ({"stages": {}}, "mine.py: stages must be a mapping of at least one run, {name: {key: value}}"),
    ],
)
def test_no_mapping(values, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    return {values}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        overrides.load(str(tmp_path / "mine.py"))


def test_no_mapping_by_an_override(tmp_path):
    config = load("nyu")
    overrides.override(config, [("optim", "none")], keys.run_options)
    assert refused(config, tmp_path / "w") == "config.optim=None must be a mapping, {key: value}"


def test_a_mapping_in_the_place_of_a_number(tmp_path):
    config = load("nyu")
    with config.ignore_type():
        config.batch_size = {"a": 3}
    assert refused(config, tmp_path / "w") == "config.batch_size={'a': 3} must be a whole number"
