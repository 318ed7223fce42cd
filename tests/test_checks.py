"""What can be wrong with a run, of all its stages, is said before the first step of the first one."""

import re
import shutil

import config_files
import numpy as np
import pytest
from PIL import Image

from aitok_jax import evaluators, main
from aitok_jax.command_line import overrides
from aitok_jax.config import format_workdir
from aitok_jax.data import scenes
from aitok_jax.tasks.modalities.depth import METRICS
from aitok_jax.training import checks, loop, setup
from aitok_jax.training.keys import run_options


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    scenes.ensure(root, train=6, test=2, height=64, width=64, seed=0)
    return root


@pytest.fixture
def said(rendered, tmp_path, monkeypatch):
    """What `main.run` says of the quickstart with overrides; nothing may be trained."""

    def train(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(loop, "train", train)

    def run(*given, arg="smoke", root=rendered):
        config = config_files.load("quickstart", arg)
        small = ["all.data.render.train=6", "all.data.render.test=2", f"all.data.root={root}"]
        overrides.override(config, [tuple(each.split("=", 1)) for each in [*small, *given]], run_options)
        with pytest.raises((ValueError, OSError, AssertionError)) as error:
            main.run(config, tmp_path / "run")
        return str(error.value)

    return run


def test_a_configuration_that_can_work_trains(said):
    assert said() == "it trains"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("best_metric=depth/rmze", "stage joint: best_metric: 'depth/rmze' is unknown; did you mean 'depth/rmse'?"),
        ("best_metric=instances/mask_iou", "'instances/mask_iou' is unknown; did you mean"),
        ("best_metric=rmse", "stage joint: best_metric='rmse' must begin with depth/ or instances/"),
        (
            "optim.warmup_steps=9",
            "stage joint: optim.warmup_steps=9 must be at most train_steps=8, or the learning rate never gets to "
            "optim.learning_rate; give --config.stages.joint.optim.warmup_steps=0 too",
        ),
        ("batch_size.depth=0", "stage joint: batch_size.depth=0 must be at least 1"),
        ("eval_batch_size.instances=-1", "stage joint: eval_batch_size.instances=-1 must be at least 1"),
        ("accumulate=0", "stage joint: accumulate=0 must be at least 1"),
        ("data.depth.also_count=2", "stage joint: depth: data.also_count=2 must be between 1 and batch_size - 1 = 1"),
        ("task.parts.depth.image_size=60", "image_size=60 must be a multiple of the tokenizer.downsample, 16"),
        ("task.shared.backbone.patch=12", "patch=12 must be a multiple of 2^3, the stride of the stem"),
        ("task.shared.backbone.windows=(8,8)", "windows, pretrain_windows, use_shift need one entry a stage each"),
        ("task.shared.backbone.windows=0", "windows[0]=0 must be at least 1"),
        (
            "task.shared.vocabulary.num_classes=5",
            "more than vocabulary.num_classes=5; give --config.stages.joint.task.shared.vocabulary.num_classes=9",
        ),
        ("task.shared.transformer.max_length=50", "more than max_length=50"),
        ("data.depth.size=32", "stage joint: depth: data.size=32 must be task.image_size=64; change one of them"),
        ("task.parts.depth.eval_crop=(0,99,0,64)", "eval_crop=(0, 99, 0, 64) does not fit evaluation images of 64x64"),
        ("task.parts.depth.tokenizer.hidden=8", "is of shape"),
        ("task.parts.depth.tokenizer.downsample=8", "is of shape"),
        ("start_from={model_state/depth_tokenizer: '{workdir}/mask_tokenizer'}", "is of shape"),
        ("start_from={params: '{workdir}/tokenizer'}", "stage joint: start_from: nothing of the source fits 'params'"),
        ("start_from={model_state/depth_tokenizer: nowhere}", "no checkpoint in nowhere; give a run directory"),
    ],
)
def test_of_the_last_stage(said, given, message):
    assert message in said(f"stages.joint.{given}")


def test_crops_of_another_size(said):
    found = said("stages.mask_tokenizer.task.image_size=32")
    assert (
        found
        == "stage mask_tokenizer: mask_tokenizer: data.mask_size=16 must be task.image_size=32; change one of them"
    )


@pytest.mark.parametrize(("part", "place"), [("training", "scene_*"), ("evaluation", "official_splits")])
def test_maps_without_a_pixel(said, rendered, tmp_path, part, place):
    """In a unit that makes all of it more than 10 m, or with the sensor off."""
    shutil.copytree(rendered, root := tmp_path / "copy")
    for file in root.glob(f"{place}/**/sync_depth_*.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), 0 if part == "training" else 20_000)).save(file)
    message = said("all.data.render={}", "all.train_steps=8", arg="smoke,parallel", root=root)
    assert re.match(rf"stage tokenizer: none of the \d {part} images has a pixel", message)


def test_values_in_a_file_have_types(tmp_path):
    config = config_files.load("nyu")
    with config.ignore_type():
        config.train_steps, config.optim.weight_decay = 1e3, 1
        assert checks.with_types(config).train_steps == 1000
        for key, value, message in (
            ("train_steps", "1e3", "config.train_steps=1e3 must be a whole number"),
            ("eval_baseline", "yes", "config.eval_baseline=yes must be true or false"),
        ):
            changed = config.copy_and_resolve_references()
            changed[key] = value
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                checks.with_types(changed)
        config.task.soft_input = "no"
    with pytest.raises(ValueError, match=r"^config\.task\.soft_input=no must be true or false$"):
        checks.with_types(config)


def test_a_disk_that_is_too_small(said, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 2**20, 2**20))
    message = said(arg="smoke,parallel")
    assert re.match(r"the checkpoints to come need \d\d\.\d MiB, but .*/run.* has 1\.0 MiB left; make room, ", message)
    checks.check_disk(tmp_path / "not" / "there", 2**20)
    checks.check_disk("gs://bucket/run", 2**50)


def test_what_checkpoints_take(tmp_path, rendered):
    """One more than are kept, while it is written; all stages of the weights together with their optimizer's state."""
    config = format_workdir(config_files.load("quickstart", "smoke,parallel").stages.tokenizer, str(tmp_path))
    with config.unlocked():
        config.data.root, config.data.render = str(rendered), {}
        run = setup.set_up(config, tmp_path)
        one = checks.checkpoint_bytes(run.task, run.config, tmp_path)
        run.config.train_steps, run.config.checkpoint_every, run.config.keep_checkpoints = 100, 10, 3
        assert checks.checkpoint_bytes(run.task, run.config, tmp_path) == 4 * one
        (tmp_path / "checkpoints" / "10").mkdir(parents=True)
        assert checks.checkpoint_bytes(run.task, run.config, tmp_path) == 3 * one


def test_metrics_that_an_evaluation_has():
    parts = setup.tasks.build(config_files.load("joint").task).parts
    assert set(evaluators.metric_names(parts["depth"])) == {*METRICS, "confidence_spearman"}
    names = evaluators.metric_names(parts["instances"])
    assert len(names) == 36
    assert {"box_ap", "mask_ap50", "boundary_ar_small"} < set(names)
    detection = setup.tasks.build(config_files.load("coco", "task=detection").task).parts["instances"]
    assert len(evaluators.metric_names(detection)) == 12
    for name, metric in (("vqvae_depth", "rmse"), ("vqvae_mask", "mask_iou")):
        (part,) = setup.tasks.build(config_files.load(name).task).parts.values()
        assert metric in evaluators.metric_names(part)
        assert "confidence_spearman" not in evaluators.metric_names(part)


def test_steps_that_do_not_follow_train_steps_are_said(caplog):
    config = config_files.load("nyu")
    checks.check_values(checks.with_types(config))
    assert not caplog.records
    config.train_steps = 1000
    checks.check_values(checks.with_types(config))
    assert "optim.schedule.boundaries=(18180,) are not all below train_steps=1000" in caplog.text
    assert "give --config.optim.schedule.boundaries=(750,) too" in caplog.text
