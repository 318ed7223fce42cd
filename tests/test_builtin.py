"""The weights that come with the package: small, described, as good as said, and there after an installation."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aitok_jax import DepthTokenizer, MaskTokenizer, Predictor
from aitok_jax.data import scenes
from aitok_jax.scenes.furniture import CLASSES
from aitok_jax.tasks.modalities import Depth
from aitok_jax.training import checkpoint

ROOT = Path(__file__).parents[1]
FOLDER = checkpoint.locate("builtin")


def test_the_files_are_small_and_say_where_they_come_from():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 8e6
    about = json.loads((FOLDER / "about.json").read_text())
    assert "--config=configs/quickstart.py:long" in about["command"]
    assert about["commit"]
    assert not about["commit"].endswith("-dirty")
    assert about["versions"]["jax"]
    assert {"depth/rmse", "depth_hard/rmse", "instances/mask_ap50", "tokenizer/rmse"} < set(about["metrics"])
    config, weights = checkpoint.load_inference("builtin")
    assert config.data.depth.root == "{workdir}/scenes"
    assert {leaf.dtype for leaf in _leaves(weights)} == {np.dtype(np.float32)}


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def test_a_folder_of_that_name_is_meant_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.locate("./builtin") == Path("builtin")
    with pytest.raises(FileNotFoundError, match="builtin"):
        checkpoint.load_inference("./builtin")


def test_it_predicts_unseen_rooms_as_well_as_said():
    """Depth and objects of rooms of another seed than those of training and evaluation."""
    about = json.loads((FOLDER / "about.json").read_text())["metrics"]
    predictor = Predictor.load("builtin")
    assert predictor.tasks == ("depth", "instances", "detection")
    assert tuple(category["name"] for category in predictor.categories) == CLASSES
    rooms = [scenes.render(5_000_000 + i, 64, 64) for i in range(64)]
    results = predictor([room.image for room in rooms], task="depth", batch_size=32)
    depth, truth = np.stack([one["depth"] for one in results]), np.stack([room.depth for room in rooms])
    rmse = float(np.mean(Depth().metrics(depth, truth, Depth().measured(truth))["rmse"]))
    assert rmse == pytest.approx(about["depth/rmse"], rel=0.15)
    assert rmse < 0.6 * about["baseline/rmse"]
    found = predictor([room.image for room in rooms[:32]], task="instances", min_score=0.5, batch_size=32)
    hits = [_overlap(masks, room.masks) for masks, room in zip((f["masks"] for f in found), rooms, strict=False)]
    assert np.mean(np.concatenate(hits)) > 0.4


def _overlap(masks, truth):
    """For each mask the largest IoU with one of the truth."""
    a, b = masks[:, None], truth[None]
    return ((a & b).sum((2, 3)) / np.maximum((a | b).sum((2, 3)), 1)).max(1)


def test_the_tokenizers_load_by_themselves():
    room = scenes.render(5_000_000, 64, 64)
    tokenizer = DepthTokenizer.load("builtin")
    decoded = tokenizer.decode(tokenizer.encode(room.depth))
    assert np.sqrt(np.mean((decoded - room.depth) ** 2)) < 0.6
    masks = MaskTokenizer.load("builtin")
    square = np.zeros((masks.size, masks.size), np.uint8)
    square[:, : masks.size // 2] = 1
    assert ((masks.decode(masks.encode(square)) > 0.5) == square).mean() > 0.85


def test_an_installed_copy_predicts(tmp_path):
    """From a wheel, unpacked to a folder that cannot be written, in a fresh process away from the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("aitok_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("aitok_jax-*.whl"))) as wheel:
        wheel.extractall(site)
    for path in (site, *site.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    program = (
        "import aitok_jax, numpy as np\n"
        "print(aitok_jax.__file__)\n"
        "predictor = aitok_jax.Predictor.load('builtin')\n"
        "print(predictor(np.zeros((48, 64, 3), np.uint8))['depth'].shape)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(site / "aitok_jax" / "__init__.py"), "(48, 64)"]
