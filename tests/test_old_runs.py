"""Runs that version 7896a26 began, stopped after 3 of 6 steps, mean the same: predictions, and all that follows.

What that version said and went on to log, on one device, lies beside them; here are eight.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from aitok_jax import Predictor, tasks
from aitok_jax.config import ordered
from aitok_jax.data import scenes
from aitok_jax.training import checkpoint, loop

RUNS = Path(__file__).parent / "runs" / "7896a26"
GOLDEN = json.loads((RUNS / "golden.json").read_text())
ROOT = "/tmp/fixture"  # where these runs were


@pytest.fixture(scope="module")
def said():
    """Images, and what was predicted of them."""
    with np.load(RUNS / "predictions.npz") as predictions, np.load(RUNS / "logits.npz") as logits:
        return {**predictions, **logits}


@pytest.mark.parametrize("run", ["joint", "depth"])
def test_predictions_are_the_same(said, run):
    predictor = Predictor.load(RUNS / run)
    averaging = dataclasses.replace(predictor.parts["depth"], blend=False)  # as that version did
    predictor.parts["depth"] = averaging
    for i in range(2):
        image = said[f"image{i}"]
        maps = predictor(image, "depth")
        for name in ("depth", "confidence"):
            np.testing.assert_allclose(maps[name], said[f"{run}/{name}/{i}"], atol=1e-5, err_msg=name)
        if run == "joint":
            found = predictor(image, "instances")
            assert found["boxes"].shape == said[f"joint/boxes/{i}"].shape
            for name in ("boxes", "classes", "scores"):
                np.testing.assert_allclose(found[name], said[f"joint/{name}/{i}"], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("run", ["joint", "depth"])
def test_tokens_and_their_logits_are_the_same(said, run):
    """Maps of models so young are nearly constant, and they find no objects: what they are made of tells more."""
    config, weights = checkpoint.load_inference(RUNS / run)
    params, image = weights["params"], said["image0"][None].astype(np.float32) / 255
    for name, part in tasks.build(config.task).parts.items():
        memory = jax.jit(part.memory)(params, image)
        decoded = jax.jit(part.decode)(params, memory)
        expected = {key.rpartition("/")[2]: value for key, value in said.items() if key.startswith(f"{run}/{name}/")}
        masks = expected.pop("masks", None)
        kept = {field: expected[field] for field in expected if hasattr(decoded, field)}
        assert {"tokens"} < set(kept)
        for field, values in kept.items():
            np.testing.assert_allclose(getattr(decoded, field), values, atol=1e-4, err_msg=f"{name} {field}")
        if masks is not None:
            found = part.detokenize(weights["model_state"], decoded)["masks"]
            np.testing.assert_allclose(found, masks, atol=1e-5)


def moved(value, folder):
    """With the folder in the place of the one where the run was."""
    if isinstance(value, dict):
        return {key: moved(item, folder) for key, item in value.items()}
    return value.replace(ROOT, str(folder)) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The scenes that all runs read, rendered anew."""
    folder = tmp_path_factory.mktemp("old")
    config = json.loads((RUNS / "depth" / "config.json").read_text())
    scenes.ensure(folder / "scenes", **config["data"]["render"], workers=1)
    return folder


def test_an_evaluation_is_of_the_runs_own_model(folder, tmp_path):
    """Another width, and in a process of its own another task."""
    run = shutil.copytree(RUNS / "depth", tmp_path / "run")
    (run / "metrics.json").write_text("{}")
    config = ordered(moved(json.loads((run / "config.json").read_text()), folder))
    config.task.backbone.embed_dim *= 2
    with pytest.raises(ValueError, match=r"run does not fit this configuration:\n  params/backbone/.* in"):
        loop.evaluate(ConfigDict(config).lock(), run)
    words = ["--config=configs/vqvae_mask.py", f"--workdir={run}", "--mode=eval"]
    command = [sys.executable, "-m", "aitok_jax.main", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert re.match(r"error: .*run is a run of depth \(depth\), but the configuration is of", said)
    assert "Traceback" not in done.stderr
    assert (run / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize("run", ["tokenizer", "depth", "joint"])
def test_a_run_goes_on_as_it_would_have(folder, run):
    """With its own config.json, whose keys are those of that version."""
    shutil.copytree(RUNS / run, folder / run)
    config = ordered(moved(json.loads((RUNS / run / "config.json").read_text()), folder))
    metrics = loop.train(ConfigDict(config).lock(), folder / run)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    expected = GOLDEN[run]["lines"]
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [*range(1, 7), 6]
    for ours, theirs in zip(lines, expected, strict=True):
        assert {name for name in ours if not name.endswith("_per_sec")} == set(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-6, err_msg=f"step {ours['step']} {name}")
    assert metrics.keys() == GOLDEN[run]["metrics"].keys()
    for name, value in GOLDEN[run]["metrics"].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
