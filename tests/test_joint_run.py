"""The whole of joint training on built-in scenes: both tokenizers, one solver, evaluation, prediction."""

import json
import logging
import re

import config_files
import jax
import numpy as np
import pytest
from PIL import Image

from aitok_jax import Predictor, tasks
from aitok_jax.data import scenes
from aitok_jax.scenes.furniture import CLASSES
from aitok_jax.training import loop

SIZE = 64
TOKENIZER = {"hidden": 4, "num_res_blocks": 1, "num_codes": 16, "code_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("joint") / "scenes"
    scenes.ensure(root, train=16, test=4, height=SIZE, width=SIZE + 16)
    return root.parent


def small(name: str):
    """A published configuration, shrunk in every size, on the scenes."""
    config = config_files.load(name)
    for key in ("batch_size", "eval_batch_size"):
        config.update({key: 8 if isinstance(config[key], int) else {"depth": 4, "instances": 16}})  # 4 of 8 devices
    config.train_steps, config.eval_every, config.log_every = 4, 0, 2
    config.optim.warmup_steps = min(config.optim.warmup_steps, 4)
    return config


def depth_data(data, folder):
    data.root, data.test_subfolder = str(folder / "scenes"), ""
    data.train_list, data.test_list = "train.txt", "test.txt"
    data.size, data.columns, data.cache = SIZE, (), True


def coco_data(data, folder):
    data.root, data.train_images, data.test_images = str(folder / "scenes"), "", ""
    data.train_annotations, data.test_annotations = (f"annotations/instances_{part}.json" for part in ("train", "test"))
    data.mask_size = 32


@pytest.fixture(scope="module")
def tokenizers(folder):
    config = small("vqvae_depth")
    depth_data(config.data, folder)
    config.task.update({"image_size": SIZE, "eval_crop": None})
    config.task.tokenizer.update({**TOKENIZER, "downsample": 16})
    loop.train(config, folder / "depth_tokenizer")
    config = small("vqvae_mask")
    coco_data(config.data, folder)
    config.task.image_size = 32
    config.task.tokenizer.update({**TOKENIZER, "downsample": 16})
    return loop.train(config, folder / "mask_tokenizer")


def joint_config(folder):
    config = small("joint")
    depth_data(config.data.depth, folder)
    coco_data(config.data.instances, folder)
    config.data.instances.update({"size": 80, "num_objects": 6, "jitter": (0.8, 1.25)})
    config.task.parts.depth.update({"image_size": SIZE, "pad_to": 80, "eval_crop": None})
    config.task.parts.instances.update({"image_size": 80, "num_objects": 6, "mask_size": 32})
    for part in (config.task.parts.depth, config.task.parts.instances):
        part.tokenizer.update({**TOKENIZER, "downsample": 16})
    shared = config.task.shared
    shared.vocabulary.update({"num_bins": 80, "num_classes": 9, "codes": (("mask", 16), ("depth", 16))})
    shared.backbone.update({"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "patch": 8, "windows": (5, 5)})
    shared.backbone.update({"pretrain_windows": (5, 5), "use_shift": (False, False)})
    shared.transformer.update({"dim": 32, "num_heads": 4, "hidden": 64, "encoder_layers": 1, "decoder_layers": 1})
    shared.transformer.max_length = 60
    config.optim.update({"layer_decay": 1.0, "warmup_steps": 1, "learning_rate": 0.005})
    config.eval_variants = {"depth": {}, "instances": {"instances_sampled": {"top_p": 0.3}}}
    config.train_steps, config.eval_every = 16, 8
    config.depth_tokenizer, config.mask_tokenizer = str(folder / "depth_tokenizer"), str(folder / "mask_tokenizer")
    return config


@pytest.fixture(scope="module")
def compiled():
    """Names of the programs compiled for the joint run, in order."""
    return []


@pytest.fixture(scope="module")
def joint(folder, tokenizers, compiled):
    handler = logging.Handler()
    handler.emit = lambda record: compiled.extend(re.findall(r"^Compiling jit\((\w+)\)", record.getMessage()))
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles():
        metrics = loop.train(joint_config(folder), folder / "joint")
    logger.removeHandler(handler)
    return metrics


def test_a_run_compiles_one_training_step_and_one_prediction_a_task(joint, compiled):
    """Evaluated twice, in between and at the end; the third prediction is the variant's."""
    assert compiled.count("step") == 1
    assert compiled.count("predict") == 3


@pytest.mark.parametrize("field", ["num_objects", "mask_size"])
def test_data_of_other_sizes_than_the_task_reads_is_refused(folder, tokenizers, tmp_path, field):
    config = joint_config(folder)
    wanted = config.task.parts.instances[field]
    config.data.instances[field] = 2 * wanted
    with pytest.raises(ValueError, match=f"instances: data.{field}={2 * wanted} must be task.{field}={wanted}; change"):
        loop.train(config, tmp_path)


def test_mask_tokenizer_is_measured_by_average_precision(tokenizers):
    assert 0 <= tokenizers["mask_tokenizer/mask_ap"] <= 1
    assert 0 <= tokenizers["mask_tokenizer/boundary_ap"] <= 1


def test_joint_run_measures_both_tasks(folder, joint):
    assert json.loads((folder / "joint" / "metrics.json").read_text()) == joint
    assert np.isfinite(joint["depth/rmse"])
    for part in ("instances", "instances_sampled"):
        assert 0 <= joint[f"{part}/box_ap50"] <= 1
        assert 0 <= joint[f"{part}/mask_ap50"] <= 1
    lines = [json.loads(line) for line in (folder / "joint" / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*lines)
    assert {"depth/cross_entropy", "depth/silog", "instances/mask_aux", "instances/box_cross_entropy"} <= logged
    panels = [{path.name for path in (folder / "joint" / "panels" / part).iterdir()} for part in ("depth", "instances")]
    assert panels[0] == panels[1]  # of the same images, which is why they lie in two folders
    assert len(panels[0]) == 4


def test_the_solver_learns_which_tokens_there_are(folder, joint):
    """Untrained, a token has a cross-entropy of log V, 5.5."""
    lines = [json.loads(line) for line in (folder / "joint" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss" in line]
    names = ("depth/cross_entropy", "instances/box_cross_entropy", "instances/class_cross_entropy")
    vocabulary = tasks.build(joint_config(folder).task).vocabulary
    untrained = np.log(vocabulary.size)
    shares = {name: (first[name] / untrained, last[name] / untrained) for name in names}
    assert max(share for _, share in shares.values()) < 0.9, shares


def test_one_set_of_weights_predicts_both(folder, joint):
    image = np.asarray(Image.open(next((folder / "scenes").rglob("rgb_*.jpg"))))
    predictor = Predictor.load(folder / "joint")
    depth = predictor(image, task="depth")
    assert depth["depth"].shape == image.shape[:2]
    objects = predictor(image, task="instances")
    count = len(objects["scores"])
    assert objects["boxes"].shape == (count, 4)
    assert objects["masks"].shape == (count, *image.shape[:2])
    assert set(objects["names"]) <= set(CLASSES)
