"""The set-ups that rows of the tables change: by scale, name -> config of one run.

`{NAME}` in `start_from` stands for the run of the set-up NAME that belongs to the same row, `{workdir}` for the work
directory. Scale 'scenes' is in small what 'nyu' and 'coco' are as published: two tokenizers, a detection model that
the objects start from, one solver a task or one for both. In place of the published SimMIM weights its solvers start
from backbone and encoder of the built-in weights, which have seen scenes of the same kind, but none of the evaluation.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict
from tables import LENGTH

sys.path.insert(0, str(Path(__file__).parents[1]))
from aitok_jax.config import ordered
from configs import coco, joint, nyu, quickstart, vqvae_depth, vqvae_mask

STEPS = {"depth_tokenizer": 600, "mask_tokenizer": 1000, "detection": 1500}
STEPS |= {"depth": 400, "instances": 500, "joint": 500}
BUDGET = {"scenes": 6000, "test_scenes": 300, "eval_batch_size": 50, "log_every": 50} | STEPS
SMOKE = {"scenes": 16, "test_scenes": 2, "eval_batch_size": 2, "log_every": 1} | dict.fromkeys(STEPS, 2)
ENCODER = ("stem_ln", "input_proj", "encoder", "encout_ln", "proj", "proj_ln", "proj_mlp_ln", "proj_mlp")
IMAGE_ENCODER = ("params/backbone", *(f"params/transformer/{name}" for name in ENCODER))  # all that knows no token
NO_CODES = {"codes": (("mask", 0), ("depth", 0))}


def scenes(smoke: bool = False) -> dict[str, ConfigDict]:
    """The built-in scenes of configs/quickstart.py; `smoke` takes two steps of each run, with smaller solvers."""
    small, budget = quickstart, SMOKE if smoke else BUDGET
    own = {"memory_weight": 0.0, "soft_input": True, "soft_detokenize": True}  # as published
    depth = {**small.map_fields(small.DEPTH_TOKENIZER, parallel=False), **own, "input_noise": 0.0}
    objects = {**small.instance_fields(), **own, "aux_weight": 5.0}
    hard = {"tokenizer": None, "aux_weight": 0.0, "soft_input": False, "soft_detokenize": False}

    def shared(**vocabulary):
        fields = small.shared_fields(parallel=False)
        fields["transformer"]["max_length"] = LENGTH
        if smoke:  # compiles in half the time
            fields["transformer"]["decoder_layers"] = 1
            fields["backbone"] |= {"stem": (), "stem_blocks": 0}
        return {**fields, "vocabulary": {"num_bins": small.SIZE, "num_classes": 9, **vocabulary}}

    def object_data(mask_size):
        fields = {"size": small.SIZE, "num_objects": small.OBJECTS, "jitter": (1.0, 1.0), "order": "left_to_right"}
        return {**small.object_data("coco", budget), **fields, "mask_size": mask_size}

    def run(name, task, data, batch_size):
        config = ordered(small.stage(name, {"name": name, **task}, data, batch_size, budget))
        config.ema_decay = min(config.ema_decay, 0.98)  # remembers 50 steps
        config.optim.name = "adamw" if smoke else config.optim.name
        config.checkpoint_every = 200
        return config

    depth_data = small.map_data("depth", "solver", budget)
    each = {
        "depth_tokenizer": run(
            "depth_tokenizer",
            {"image_size": small.SIZE, "mask_ratio": 0.0, "mask_patch": 8, "tokenizer": small.DEPTH_TOKENIZER},
            small.map_data("depth", "tokenizer", budget),
            16,
        ),
        "mask_tokenizer": run(
            "mask_tokenizer",
            {"image_size": small.CROP, "tokenizer": small.MASK_TOKENIZER},
            small.object_data("coco_masks", budget),
            64,
        ),
        "detection": run("detection", {**shared(**NO_CODES), **objects, **hard}, object_data(0), 8),
        "depth": run("depth", {**shared(codes=(("mask", 0),)), **depth}, depth_data, 8),
        "instances": run("instances", {**shared(codes=(("depth", 0),)), **objects}, object_data(small.CROP), 8),
        "joint": run(
            "joint",
            {
                "name": "solver",
                "shared": shared(),
                "parts": {"depth": {**depth, "loss_weight": 0.3}, "instances": objects},
            },
            {"depth": depth_data, "instances": object_data(small.CROP)},
            {"depth": 2, "instances": 8},
        ),
    }
    bins = {"kind": "bins", "downsample": small.DEPTH_TOKENIZER["downsample"], "num_codes": 128, "max_value": 10.0}
    each["bins"] = ordered(each["depth"])
    each["bins"].task.tokenizer = bins
    each["detection"].task.name = "instances"  # without masks
    return _start(each, {} if smoke else dict.fromkeys(IMAGE_ENCODER, "builtin"))


def published(smoke: bool = False) -> dict[str, ConfigDict]:
    """The published set-ups with Swin-B on NYUv2 and COCO."""
    if smoke:
        raise ValueError("smoke runs are for --scale=scenes; NYUv2 and COCO are not at hand everywhere")
    each = {
        "depth_tokenizer": vqvae_depth.get_config(),
        "mask_tokenizer": vqvae_mask.get_config(),
        "detection": coco.get_config("task=detection"),
        "depth": nyu.get_config(),
        "bins": nyu.get_config("tokenizer=bins"),
        "instances": coco.get_config(),
        "joint": joint.get_config(),
    }
    each["depth_tokenizer"].name, each["depth_tokenizer"].best_metric = "depth_tokenizer", "depth_tokenizer/rmse"
    return _start(each, {"params/backbone": "{backbone}"})


def _start(each: dict[str, ConfigDict], pretrained: dict[str, str]) -> dict[str, ConfigDict]:
    """Says what every run starts from: backbone, detection model, tokenizers."""
    detection = {"params": "{detection}"}
    depth = {"model_state/depth_tokenizer": "{depth_tokenizer}"}
    masks = {"model_state/mask_tokenizer": "{mask_tokenizer}"}
    sources = {"detection": pretrained, "depth": pretrained | depth, "bins": pretrained}
    sources |= {"instances": detection | masks, "joint": detection | depth | masks}
    for name, source in sources.items():
        each[name].start_from = ordered(source)
    return each


RUNS = ("depth_tokenizer", "mask_tokenizer", "detection", "depth", "bins", "instances", "joint")
SCALES = {  # the set-ups, and which of them rows may ask for; what those start from comes with them
    "scenes": (scenes, RUNS),
    "nyu": (published, ("depth_tokenizer", "depth", "bins")),
    "coco": (published, ("mask_tokenizer", "detection", "instances", "joint")),
}
