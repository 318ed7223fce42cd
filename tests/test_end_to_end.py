"""Whole runs through the ordinary entry points: built-in scenes, stop and go on, the predictor."""

import json

import config_files
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from aitok_jax import Predictor, main, tasks
from aitok_jax.config import format_workdir
from aitok_jax.training import checkpoint, loop


def small_quickstart(arg="smoke"):
    """The quickstart's smoke run with narrow networks, and enough steps for the solver to learn something."""
    config = config_files.load("quickstart", arg)
    config.stages.joint.train_steps = 20
    for name, stage in config.stages.items():
        sizes = {"depth": 8, "instances": 8} if name == "joint" else 8
        stage.update({"batch_size": sizes, "eval_batch_size": sizes})
        for data in stage.data.values() if name == "joint" else [stage.data]:
            data.render.train, data.render.test = 24, 4
        task = stage.task
        for part in task.parts.values() if name == "joint" else (task,):
            part.tokenizer.hidden = 4
        if "tokenizer" not in name:
            shared = task.shared if name == "joint" else task
            shared.backbone.update({"stem": (8, 8, 16), "stem_blocks": 0, "embed_dim": 16})
            shared.transformer.update({"dim": 32, "hidden": 64, "decoder_layers": 1})
    return config


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")
    return workdir, main.run(small_quickstart(), workdir)


def test_quickstart_leaves_everything_a_user_expects(quickstart):
    workdir, metrics = quickstart
    assert json.loads((workdir / "metrics.json").read_text()) == metrics
    depth = [f"{part}/{name}" for part in ("depth", "baseline") for name in ("rmse", "abs_rel", "d1")]
    objects = [f"{part}/{kind}_ap50" for part in ("instances", "instances_hard") for kind in ("box", "mask")]
    for name in (*depth, *objects, "depth_hard/rmse", "tokenizer/rmse", "mask_tokenizer/mask_ap"):
        assert np.isfinite(metrics[name]), name
    for stage in ("tokenizer", "mask_tokenizer", "joint"):
        for file in ("config.json", "env.json", "metrics.jsonl", "metrics.json"):
            assert (workdir / stage / file).stat().st_size
        assert list((workdir / stage).glob("events.out.tfevents*"))
        assert list((workdir / stage / "panels").rglob("*.png"))


def test_the_solver_learns_which_tokens_there_are(quickstart):
    """Untrained, a token has a cross-entropy of log V, 5.8; after 20 steps it has 0.93 of that or less."""
    workdir, _ = quickstart
    lines = [json.loads(line) for line in (workdir / "joint" / "metrics.jsonl").read_text().splitlines()]
    *_, last = [line for line in lines if "loss" in line]
    config, _ = checkpoint.load_inference(workdir / "joint")
    untrained = np.log(tasks.build(config.task).vocabulary.size)
    weights = {"depth/cross_entropy": 1, "instances/class_cross_entropy": 4, "instances/mask_cross_entropy": 1}
    shares = {name: last[name] / weight / untrained for name, weight in weights.items()}
    assert max(shares.values()) < 0.96, shares


def test_baseline_is_the_mean_training_map(quickstart):
    workdir, metrics = quickstart

    def maps(split):
        lines = (workdir / "scenes" / f"{split}.txt").read_text().split("\n")
        return [np.asarray(Image.open(workdir / "scenes" / line.split()[1][1:])) / 1000 for line in lines if line]

    train_maps, errors = np.stack(maps("train")), []
    known = train_maps > 0
    mean = train_maps.sum(0) / np.maximum(known.sum(0), 1)
    mean[~known.any(0)] = train_maps[known].mean()
    for truth in maps("test"):
        valid = truth > 0
        errors.append(np.sqrt(np.mean((mean - truth)[valid] ** 2)))
    np.testing.assert_allclose(metrics["baseline/rmse"], np.mean(errors), rtol=1e-4)


def test_predictor_reads_the_run(quickstart):
    workdir, _ = quickstart
    image = np.asarray(Image.open(next((workdir / "scenes").rglob("rgb_*.jpg"))))
    predictor = Predictor.load(workdir / "joint")
    result = predictor(image, task="depth")
    assert result["depth"].shape == result["confidence"].shape == image.shape[:2]
    assert result["depth"].dtype == np.float32
    assert (result["depth"] >= 1e-3).all()
    assert 0 <= result["confidence"].min() <= result["confidence"].max() <= 1
    result = predictor(image, task="instances")
    assert result["masks"].shape == (len(result["boxes"]), *image.shape[:2])


def test_wrong_tokenizer_is_refused(quickstart, tmp_path):
    """The checkpoint of another one: the sizes of its layers differ."""
    workdir, _ = quickstart
    config = format_workdir(small_quickstart().stages.joint, str(workdir))
    config.start_from["model_state/depth_tokenizer"] = str(workdir / "mask_tokenizer")
    expected = r"start_from: most of .* does not fit, .* model_state/depth_tokenizer.* in the source but .* here"
    with pytest.raises(ValueError, match=expected):
        loop.train(config, tmp_path)


def test_solver_without_tokenizer_is_refused(quickstart, tmp_path):
    workdir, _ = quickstart
    config = format_workdir(small_quickstart().stages.joint, str(workdir))
    config.start_from["model_state/depth_tokenizer"] = ""
    with pytest.raises(ValueError, match=r"never trained.*tokenizer"):
        loop.train(config, tmp_path)


@pytest.mark.parametrize("stage", ["tokenizer", "mask_tokenizer", "joint"])
def test_stop_and_go_on_is_bit_for_bit(quickstart, tmp_path, monkeypatch, stage):
    """N + N steps with a restart equal 2N steps: parameters, optimizer, codebook, EMA and the logged losses."""
    workdir, _ = quickstart
    config = format_workdir(small_quickstart().stages[stage], str(workdir))
    config.log_every, config.eval_variants, config.eval_baseline = 1, {}, False
    monkeypatch.setattr(loop, "evaluate_all", lambda *_: {})
    half = config.train_steps // 2
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "reached_preemption", lambda self, step: step == half)
        with pytest.raises(SystemExit):
            loop.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == half
    loop.train(config, tmp_path)

    def state(folder):
        step_dir = folder / "checkpoints" / str(config.train_steps)
        return ocp.StandardCheckpointer().restore((step_dir / "state").resolve())

    whole, parts = state(workdir / stage), state(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
