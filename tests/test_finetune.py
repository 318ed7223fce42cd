"""`configs/finetune.py`: a plan for every task, and the README's commands for somebody's own frames."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import config_files
import numpy as np
import pytest
from PIL import Image

from aitok_jax.config import format_workdir, ordered
from aitok_jax.data import scenes
from aitok_jax.training import finetune, setup

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Frames with depth, normals, classes and objects."""
    folder = tmp_path_factory.mktemp("rooms")
    scenes.ensure(folder, train=12, test=4, height=60, width=80, seed=5, workers=2, format="both")
    return folder


def planned(task, root, workdir, **changes):
    config = config_files.load("finetune", task)
    config.data.root = str(root)
    config.update(changes)
    return finetune.plan(ordered(config), workdir)


@pytest.mark.parametrize(
    ("task", "stages"),
    [
        ("depth", ["depth"]),
        ("depth,size=128", ["depth"]),
        ("normals", ["tokenizer", "normals"]),
        ("semantic", ["tokenizer", "semantic"]),
        ("instances", ["instances"]),
        ("detection", ["detection"]),
    ],
)
def test_a_plan_for_every_task_stands_the_checks(rooms, tmp_path, task, stages):
    root = rooms
    if task in ("instances", "detection"):
        root = tmp_path / "photos"
        (root / "images").mkdir(parents=True)
        for scene in rooms.glob("scene_*"):
            (root / "images" / scene.name).symlink_to(scene)
        content = json.loads((rooms / "annotations/instances_train.json").read_text())
        for category in content["categories"]:
            category["name"] = f"my {category['name']}"
        (root / "mine.json").write_text(json.dumps(content))
    config = planned(task, root, tmp_path / "run")
    assert list(config.stages) == stages
    runs = setup.check_all(
        {
            tmp_path / f"run/{name}": format_workdir(stage, str(tmp_path / "run"))
            for name, stage in config.stages.items()
        }
    )
    run = runs[tmp_path / f"run/{stages[-1]}"]
    (part,) = run.task.parts.values()
    assert part.image_size == (128 if "128" in task else 64)
    (data,) = run.data.values()
    assert len(data.train) >= 6
    assert len(data.eval) >= 1
    assert not set(data.train.names) & set(data.eval.names)


def test_steps_follow_the_data():
    assert finetune._steps("depth", 20, 0) == 100
    assert finetune._steps("depth", 400, 0) == 750
    assert finetune._steps("depth", 400, 8) == 1500
    assert finetune._steps("depth", 10**6, 0) == 3000
    assert finetune._steps("instances", 40, 0) == 2500


@pytest.mark.parametrize(
    ("kind", "name", "values", "column", "place"),
    [
        ("depth", "rmse", [0.9, 0.7, 0.8], "best, step 5", "best"),
        ("depth", "rmse", [0.9, 0.8, 0.7], "best, step 9", ""),
        ("instances", "box_ap50", [0.0, 0.2, 0.1], "best, step 5", "best"),
        ("instances", "box_ap50", [0.0, 0.0, 0.0], "best, step 0", ""),  # the start knows none of the new classes
    ],
)
def test_which_weights_the_report_names(tmp_path, kind, name, values, column, place):
    lines = [{"step": step, f"{kind}/{name}": value} for step, value in zip((0, 5, 9), values, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.json").write_text(json.dumps({f"{kind}/{name}": values[-1]}))
    report = finetune.report(kind, tmp_path)
    assert column in report.splitlines()[0]
    assert f"--checkpoint={tmp_path / place} " in report


def test_what_to_predict_must_be_said():
    for wrong in (None, "size=64", "depth,normals"):
        with pytest.raises(ValueError, match=r"one of depth, normals, .*as in configs/finetune\.py:depth"):
            config_files.load("finetune", wrong)
    with pytest.raises(ValueError, match="'deph' is unknown; did you mean 'depth'"):
        config_files.load("finetune", "deph")


def test_weights_without_objects(rooms, tmp_path):
    with pytest.raises(ValueError, match="these weights do depth, and no instances"):
        finetune._task(_saved("depth"), "instances", 64, 3, {})


def test_a_tokenizer_of_other_classes_is_trained_anew():
    saved = _saved("depth")
    with saved.unlocked():
        saved.task.parts["semantic"] = {**saved.task.parts.depth, "classes": ["wall", "floor"]}
    own = [finetune._task(saved, "semantic", 64, 0, {"classes": names}) for names in (("wall", "floor"), ("wall", "x"))]
    assert [taken_over for _, taken_over in own] == [True, False]
    assert own[1][0]["parts"]["semantic"]["classes"] == ("wall", "x")
    assert own[1][0]["parts"]["semantic"]["tokenizer"]["objective"] == "cross_entropy"


def _saved(*kinds):
    saved, _ = finetune.checkpoint.load_inference("builtin")
    saved = saved.copy_and_resolve_references()
    with saved.unlocked():
        for name in [name for name in saved.task.parts if name not in kinds]:
            del saved.task.parts[name]
    return saved


def test_the_readme_s_commands(rooms, tmp_path):
    """In a folder of frames of two sizes; the first command with few steps."""
    block = re.search(r"<!-- own data -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    train, predict = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line)
    for scene in ("kitchen", "hall", "office"):
        for i, path in enumerate(sorted(rooms.glob("scene_*/rgb_*.jpg"))[:4]):
            depth = path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
            target = tmp_path / "my_frames" / scene
            target.mkdir(parents=True, exist_ok=True)
            size = (80, 60) if scene == "hall" else (64, 64)
            Image.open(path).resize(size).save(target / f"rgb_{i}.jpg")
            Image.open(depth).resize(size, Image.Resampling.NEAREST).save(target / f"sync_depth_{i}.png")
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "my_frames/hall").glob("*.jpg"):
        (tmp_path / "photos" / path.name).symlink_to(path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    outputs = [run_as_written(command, tmp_path) for command in ([*train, "--config.steps=2"], predict)]
    assert "8 images to train, 4 to evaluate on" in outputs[0]
    assert re.search(r"on the images held out +before +best, step \d +step 2 +mean map\n +depth/abs_rel", outputs[0])
    metrics = json.loads((tmp_path / "runs/mine/metrics.json").read_text())
    assert {"depth/rmse", "before/depth/rmse", "baseline/rmse"} <= metrics.keys()
    assert metrics["before/depth/rmse"] != metrics["depth/rmse"]
    predicted = sorted((tmp_path / "predicted").rglob("*_depth.npy"))
    assert [np.load(path).shape for path in predicted] == 4 * [(60, 80)]


def run_as_written(command, folder):
    assert command[0] == "python"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr
