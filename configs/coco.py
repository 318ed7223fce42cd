"""Stage 2: instance segmentation and detection on COCO with the task solver (arXiv 2301.02229, experiments).

    python -m aitok_jax.main --config=configs/coco.py:task=detection --workdir=runs/detection \\
        --config.data.root=DATA/coco
    python -m aitok_jax.main --config=configs/coco.py --workdir=runs/coco --config.data.root=DATA/coco \\
        --config.tokenizer=runs/vqvae_mask --config.detection=runs/detection

Arguments, for example `configs/coco.py:soft=false`:
    task=instances     or detection, which needs no tokenizer
    backbone=swin_b    or swin_l
    soft=true          false: none of the three soft-token uses ("w/o soft")
    dtype=auto, remat=none    see configs/common.py

Published on val2017 (box AP / mask AP): Swin-B 43.3/34.2, soft=false 43.6/31.1. The published evaluation samples, with
top-p 0.3 (detection: 0.4); here instances/... decodes greedily and instances_sampled/... samples, each image with its
own seed.
"""

from ml_collections import ConfigDict

from configs import common, vqvae_mask

SIZE = 640
RECIPES = {
    "instances": {"learning_rate": 1e-4, "clip_norm": 50.0, "batch": 16, "steps": 366_500, "warmup": 14_660},
    "detection": {"learning_rate": 1e-3, "clip_norm": 1.0, "batch": 128, "steps": 183_300, "warmup": 18_330},
}
TOP_P = {"instances": 0.3, "detection": 0.4}
CHOICES = {"task": tuple(RECIPES), "backbone": tuple(common.BACKBONES)}


def shared_fields(arg: ConfigDict, num_spare: int) -> dict:
    """Vocabulary, backbone and transformer of the 640-pixel set-ups: windows shift in all stages."""
    compute = {name: arg[name] for name in common.COMPUTE}
    solver = common.solver(arg.backbone, shift=(True, True, True, True), drop_path=0.3, **compute)
    return {"vocabulary": {"num_spare": num_spare}, **solver}


def instance_fields(soft: bool) -> dict:
    """What instance segmentation has of its own."""
    return {
        "image_size": SIZE,
        "num_objects": 100,
        "mask_size": vqvae_mask.SIZE,
        "mask_weight": 0.2,
        "aux_weight": 5.0 if soft else 0.0,
        "soft_input": soft,
        "soft_detokenize": soft,
        "top_p": 0.0,
        "early_exit": 0,
        "tokenizer": dict(common.TOKENIZER),
    }


def object_data(mask_size: int = vqvae_mask.SIZE) -> dict:
    fields = {"size": SIZE, "num_objects": 100, "jitter": (0.1, 3.0), "order": "random"}
    return common.coco_data("coco", mask_size, **fields)


def variants(soft: bool) -> dict:
    hard = {"instances_hard": common.HARD} if soft else {}
    return hard | {"instances_sampled": {"top_p": TOP_P["instances"]}}


def optimizer(learning_rate: float, clip_norm: float, warmup_steps: int) -> dict:
    """AdamW of all COCO set-ups: layer decay 0.85, linear to 1 %."""
    return common.optimizer(
        learning_rate=learning_rate,
        weight_decay=0.05,
        layer_decay=0.85,
        clip_norm=clip_norm,
        warmup_steps=warmup_steps,
        warmup_ratio=0.1,
        schedule={"name": "linear", "end_factor": 0.01},
    )


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.arguments(arg, CHOICES, task="instances", backbone="swin_b", soft=True, **common.COMPUTE)
    recipe, masks = RECIPES[arg.task], arg.task == "instances"
    task = {"name": "instances", **instance_fields(arg.soft)}
    if not masks:
        task |= {"tokenizer": None, "aux_weight": 0.0, **common.HARD}
    config = common.run(
        tokenizer="",  # run directory of configs/vqvae_mask.py
        detection="",  # run directory of configs/coco.py:task=detection to start from
        backbone="",  # run directory whose backbone to start from; '' starts from random weights
        name=arg.task,
        task={**task, **shared_fields(arg, num_spare=128 if masks else 0)},
        data=object_data() if masks else object_data(0),
        batch_size=recipe["batch"],
        train_steps=recipe["steps"],
        eval_every=recipe["steps"] // 10,
        best_metric=f"{arg.task}/{'mask' if masks else 'box'}_ap",
        best_mode="max",
        optim=optimizer(recipe["learning_rate"], recipe["clip_norm"], recipe["warmup"]),
        eval_variants=variants(arg.soft) if masks else {"detection_sampled": {"top_p": TOP_P["detection"]}},
    )
    config.start_from["params/backbone"] = config.get_ref("backbone")
    if masks:
        config.start_from["params"] = config.get_ref("detection")
        config.start_from["model_state/mask_tokenizer"] = config.get_ref("tokenizer")
    return config
