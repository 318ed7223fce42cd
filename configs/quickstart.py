"""The whole method in small, on built-in scenes: two tokenizers and one solver for depth and instances.

    python -m aitok_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: `configs/quickstart.py:parallel` (depth alone, all tokens in one pass; objects need steps), `:long` (more
scenes and steps, for better weights), `:smoke` (a few steps of everything, for tests).

WORKDIR/metrics.json then holds depth/… and instances/… (soft decoding), depth_hard/… and instances_hard/… (the same
weights, hard decoding), baseline/… (the mean depth map of the training set), tokenizer/… and mask_tokenizer/… (tokenize
and detokenize the truth).
"""

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg

SIZE = 64  # pixels, of images and depth maps
OBJECTS, CROP = 10, 16  # objects of a sequence, pixels of a mask crop
DEPTH_TOKENIZER = {
    "hidden": 16,
    "downsample": 16,
    "num_res_blocks": 2,
    "num_codes": 128,
    "code_dim": 64,
    "objective": "mse_ignore_zero",
    "use_norm": False,
    "max_value": 10.0,
    "soft_temperature": 0.8,
    "restart_threshold": 0.1,
}
MASK_TOKENIZER = DEPTH_TOKENIZER | {
    "hidden": 8,
    "downsample": 8,
    "objective": "mse",
    "use_norm": True,
    "max_value": 1.0,
    "soft_temperature": 1.0,
}
TOKENS = OBJECTS * (5 + (CROP // MASK_TOKENIZER["downsample"]) ** 2)  # of an image's objects; its depth has fewer
QUICK = {"scenes": 9000, "test_scenes": 300, "eval_batch_size": 64, "log_every": 50}
QUICK |= {"tokenizer": 1500, "mask_tokenizer": 2000, "joint": 6000, "depth": 5000}  # steps of the stages
LONG = QUICK | {"scenes": 24000, "tokenizer": 4000, "mask_tokenizer": 4000, "joint": 18000, "depth": 15000}
SMOKE = {"scenes": 96, "test_scenes": 16, "eval_batch_size": 16, "log_every": 4}
SMOKE |= {"tokenizer": 8, "mask_tokenizer": 8, "joint": 8, "depth": 8}
HARD = {"soft_input": False, "soft_detokenize": False}


def data_fields(name: str, budget: dict, **fields) -> dict:
    """Of one reader; all read the same scenes."""
    return {
        "name": name,
        "root": "{workdir}/scenes",
        "on_error": "raise",
        "cache": True,
        "expected_train": 0,
        "expected_test": 0,
        "render": {
            "train": budget["scenes"],
            "test": budget["test_scenes"],
            "height": SIZE,
            "width": SIZE,
            "seed": 0,
            "format": "both",
        },
        **fields,
    }


def depth_data(recipe: str, budget: dict) -> dict:
    fields = {"train_list": "train.txt", "test_list": "test.txt", "train_subfolder": "", "test_subfolder": ""}
    fields |= {"size": SIZE, "recipe": recipe, "columns": (), "color": False, "cutdepth": "off"}
    return data_fields("nyu", budget, **fields)


def object_data(name: str, budget: dict, **fields) -> dict:
    annotations = {f"{part}_annotations": f"annotations/instances_{part}.json" for part in ("train", "test")}
    folders = {"train_images": "", "test_images": ""}
    return data_fields(name, budget, mask_size=CROP, **annotations, **folders, **fields)


def stage(name: str, task: dict, data: dict, batch_size: int | dict, budget: dict) -> dict:
    tokenizer, steps, evaluated = "tokenizer" in name, budget[name], budget["eval_batch_size"]
    return {
        "name": name,
        "seed": 0,
        "task": task,
        "data": data,
        "batch_size": batch_size,
        "eval_batch_size": dict.fromkeys(batch_size, evaluated) if isinstance(batch_size, dict) else evaluated,
        "train_steps": steps,
        "log_every": budget["log_every"],
        "eval_every": 0,
        "checkpoint_every": 1000,
        "keep_checkpoints": 1,
        "best_metric": "",
        "best_mode": "min",
        "optim": {
            "name": "adamw" if tokenizer else "muon",
            "learning_rate": 1e-3 if tokenizer else 3e-3,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0 if tokenizer else 0.05,
            "layer_decay": 1.0,
            "clip_norm": 1.0,
            "warmup_steps": min(200, steps // 2),
            "warmup_ratio": 0.01,
            "schedule": {"name": "cosine", "end_factor": 0.02},
        },
        "ema_decay": 0.0 if tokenizer else 0.999,
        "fsdp": 1,
        "accumulate": 1,
        "start_from": {},
        "eval_variants": {},
        "eval_baseline": False,
    }


def shared_fields(parallel: bool) -> dict:
    return {
        "init_variance": 0.5,
        "vocabulary": {"num_bins": SIZE, "num_classes": 9, "num_mask_codes": MASK_TOKENIZER["num_codes"]},
        "backbone": {
            "patch": 8,
            "stem": (32, 64, 128),
            "stem_blocks": 2,
            "embed_dim": 128,
            "depths": (1,),
            "num_heads": (4,),
            "windows": (8,),
            "pretrain_windows": (8,),
            "use_shift": (False,),
            "drop_path": 0.0,
        },
        "transformer": {
            "dim": 128,
            "num_heads": 4,
            "hidden": 512,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "max_length": TOKENS,
            "position_temperature": 4.0,
            "parallel": parallel,
            "drop_path": 0.0,
            "dropout": 0.0,
        },
    }


def depth_fields(parallel: bool) -> dict:
    return {
        "image_size": SIZE,
        "soft_input": not parallel,
        "aux_weight": 3.0,
        "memory_weight": 1.0,
        "input_noise": 0.0 if parallel else 0.3,
        "normalize_image": True,
        "tokenizer": DEPTH_TOKENIZER,
    }


def instance_fields() -> dict:
    return {
        "image_size": SIZE,
        "num_objects": OBJECTS,
        "mask_size": CROP,
        "class_weight": 4.0,
        "mask_weight": 1.0,
        "aux_objects": 5,
        "memory_weight": 1.0,
        "tokenizer": MASK_TOKENIZER,
    }


def parallel_depth(budget: dict) -> dict:
    task = {"name": "depth", **shared_fields(True), **depth_fields(True)}
    solver = stage("depth", task, depth_data("solver", budget), 8, budget)
    solver["start_from"] = {"model_state/depth_tokenizer": "{workdir}/tokenizer"}
    solver["eval_variants"] = {"depth_hard": HARD}
    solver["eval_baseline"] = True
    return solver


def joint(budget: dict) -> dict:
    parts = {"depth": {**depth_fields(False), "loss_weight": 0.3}, "instances": instance_fields()}
    objects = {"size": SIZE, "num_objects": OBJECTS, "jitter": (1.0, 1.0), "order": "left_to_right"}
    data = {"depth": depth_data("solver", budget), "instances": object_data("coco", budget, **objects)}
    task = {"name": "joint", "shared": shared_fields(False), **parts}
    solver = stage("joint", task, data, {"depth": 2, "instances": 8}, budget)
    solver["start_from"] = {
        "model_state/depth_tokenizer": "{workdir}/tokenizer",
        "model_state/mask_tokenizer": "{workdir}/mask_tokenizer",
    }
    solver["eval_variants"] = {"depth": {"depth_hard": HARD}, "instances": {"instances_hard": HARD}}
    solver["eval_baseline"] = True
    return solver


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, parallel=False, long=False, smoke=False)
    budget = SMOKE if arg.smoke else LONG if arg.long else QUICK
    task = {"name": "depth_tokenizer", "image_size": SIZE, "mask_ratio": 0.0, "tokenizer": DEPTH_TOKENIZER}
    stages = {"tokenizer": stage("tokenizer", task, depth_data("tokenizer", budget), 16, budget)}
    if arg.parallel:
        stages["depth"] = parallel_depth(budget)
    else:
        task = {"name": "mask_tokenizer", "image_size": CROP, "tokenizer": MASK_TOKENIZER}
        stages["mask_tokenizer"] = stage("mask_tokenizer", task, object_data("coco_masks", budget), 64, budget)
        stages["joint"] = joint(budget)
    return ConfigDict({"stages": stages})
