"""Stage 2: instance segmentation and detection on COCO with the task solver (AIT.md sections 4-7).

    python -m aitok_jax.main --config=configs/coco.py:task=detection --workdir=runs/detection \\
        --config.data.root=DATA/coco
    python -m aitok_jax.main --config=configs/coco.py --workdir=runs/coco --config.data.root=DATA/coco \\
        --config.tokenizer=runs/vqvae_mask --config.detection=runs/detection

Arguments, for example `configs/coco.py:soft=false`:
    task=instances     or detection, which needs no tokenizer
    backbone=swin_b    or swin_l
    soft=true          false: none of the three soft-token uses ("w/o soft")
    dtype=auto         bfloat16 arithmetic on accelerators, float32 on a CPU; or float32, bfloat16. Softmax, LayerNorm,
                       losses, tokenizers and all parameters are float32 always
    remat=none         or blocks, recomputed in the backward pass: less memory, a third more time; or dots, which
                       keeps the outputs of linear layers: less of both

Published on val2017 (box AP / mask AP): Swin-B 43.3/34.2, soft=false 43.6/31.1. The published evaluation samples with
top-p 0.3; here instances/... decodes greedily and instances_sampled/... samples, each image with its own seed.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg


def _sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nyu, vqvae_mask = _sibling("nyu"), _sibling("vqvae_mask")

RECIPES = {
    "instances": {"learning_rate": 1e-4, "clip_norm": 50.0, "batch": 16, "steps": 366_500, "warmup": 14_660},
    "detection": {"learning_rate": 1e-3, "clip_norm": 1.0, "batch": 128, "steps": 183_300, "warmup": 18_330},
}
TASKS = tuple(RECIPES)


def shared_fields(arg: ConfigDict, drop_path: float = 0.1, num_spare: int = 128) -> ConfigDict:
    """Vocabulary, backbone and transformer of the 640-pixel set-ups: windows shift in all stages."""
    fields = nyu.task_fields(ConfigDict({**arg, "tokenizer": "vqvae", "parallel": False}))
    fields.backbone.use_shift, fields.backbone.drop_path = (True, True, True, True), drop_path
    return ConfigDict(
        {"vocabulary": {"num_spare": num_spare}, "backbone": fields.backbone, "transformer": fields.transformer}
    )


def instance_fields(soft: bool) -> ConfigDict:
    """What instance segmentation has of its own."""
    return ConfigDict(
        {
            "image_size": 640,
            "num_objects": 100,
            "mask_size": 64,
            "mask_weight": 0.2,
            "aux_weight": 5.0 if soft else 0.0,
            "soft_input": soft,
            "soft_detokenize": soft,
            "top_p": 0.0,
            "early_exit": 0,
            "tokenizer": vqvae_mask.tokenizer_fields(),
        }
    )


def variants(soft: bool) -> dict:
    hard = {"instances_hard": {"soft_input": False, "soft_detokenize": False}} if soft else {}
    return hard | {"instances_sampled": {"top_p": 0.3}}


def optimizer(learning_rate: float, clip_norm: float, warmup_steps: int) -> dict:
    """AdamW of all COCO set-ups: layer decay 0.85, linear to 1 %."""
    return {
        "name": "adamw",
        "learning_rate": learning_rate,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "layer_decay": 0.85,
        "clip_norm": clip_norm,
        "warmup_steps": warmup_steps,
        "warmup_ratio": 0.1,
        "schedule": {"name": "linear", "end_factor": 0.01},
    }


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, task="instances", backbone="swin_b", soft=True, dtype="auto", remat="none")
    for name, valid in {"task": TASKS, "backbone": tuple(nyu.BACKBONES)}.items():
        if arg[name] not in valid:
            raise ValueError(f"{name}={arg[name]!r} must be one of {', '.join(valid)}")
    recipe, masks = RECIPES[arg.task], arg.task == "instances"
    task, data = {"name": "instances", **instance_fields(arg.soft)}, vqvae_mask.coco_data()
    if not masks:
        task |= {"tokenizer": None, "aux_weight": 0.0, "soft_input": False, "soft_detokenize": False}
        data.mask_size = 0
    config = ConfigDict(
        {
            "tokenizer": "",  # run directory of configs/vqvae_mask.py
            "detection": "",  # run directory of configs/coco.py:task=detection to start from
            "backbone": "",  # run directory whose backbone to start from; '' starts from random weights
            "name": arg.task,
            "seed": 0,
            "task": {**task, **shared_fields(arg, num_spare=128 if masks else 0)},
            "data": data,
            "batch_size": recipe["batch"],
            "eval_batch_size": 8,
            "train_steps": recipe["steps"],
            "log_every": 50,
            "eval_every": recipe["steps"] // 10,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "best_metric": f"{arg.task}/{'mask' if masks else 'box'}_ap",
            "best_mode": "max",
            "optim": optimizer(recipe["learning_rate"], recipe["clip_norm"], recipe["warmup"]),
            "ema_decay": 0.0,
            "fsdp": 1,
            "accumulate": 1,
            "eval_variants": variants(arg.soft) if masks else {"detection_sampled": {"top_p": 0.3}},
            "eval_baseline": False,
        }
    )
    config.start_from = {"params/backbone": config.get_ref("backbone")}
    if masks:
        config.start_from["params"] = config.get_ref("detection")
        config.start_from["model_state/mask_tokenizer"] = config.get_ref("tokenizer")
    return config
