"""The whole method in small, on built-in scenes: two tokenizers and one solver for depth and instances.

    python -m aitok_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: `configs/quickstart.py:parallel` (depth alone, all tokens in one pass; objects need steps), `:normals`
(surface normals alone), `:semantic` (the classes of pixels alone), `:all` (depth, normals, classes and instances by one
set of weights), `:soft=false` (none of the three soft-token uses), `:long` (more scenes and steps, for better weights),
`:smoke` (a few steps of everything, for tests).

WORKDIR/metrics.json then holds depth/… and instances/… (soft decoding), depth_hard/… and instances_hard/… (the same
weights, hard decoding), baseline/… (the mean map of the training set), tokenizer/… and mask_tokenizer/… (tokenize and
detokenize the truth).
"""

from ml_collections import ConfigDict

from aitok_jax.config import ordered, parse_arg
from aitok_jax.scenes.render import LABELS
from configs import common

SIZE = 64  # pixels, of images and maps
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
NORMALS_TOKENIZER = DEPTH_TOKENIZER | {"objective": "mse_annotated", "soft_temperature": 1.0}
SEMANTIC_TOKENIZER = NORMALS_TOKENIZER | {"objective": "cross_entropy", "downsample": 8}  # things are small
MASK_TOKENIZER = DEPTH_TOKENIZER | {
    "hidden": 8,
    "downsample": 8,
    "objective": "mse",
    "use_norm": True,
    "max_value": 1.0,
    "soft_temperature": 1.0,
}
MAPS = {  # their tokenizers, and the fields of the modality
    "depth": (DEPTH_TOKENIZER, {}),
    "normals": (NORMALS_TOKENIZER, {}),
    "semantic": (SEMANTIC_TOKENIZER, {"classes": LABELS}),
}
ALONE = ("normals", "semantic")
BATCHES = {"depth": 2, "normals": 2, "semantic": 2, "instances": 8}  # images of a batch in a joint model
MAP_WEIGHT = 0.3  # of the loss of each map there, beside that of instances
TOKENS = OBJECTS * (5 + (CROP // MASK_TOKENIZER["downsample"]) ** 2)  # of an image's objects; its maps have fewer
QUICK = {"scenes": 9000, "test_scenes": 300, "eval_batch_size": 64, "log_every": 50}
QUICK |= {
    "tokenizer": 1500,
    "mask_tokenizer": 2000,
    "joint": 6000,
    "depth": 5000,
    "normals": 5000,
    "semantic": 5000,
    "all": 6000,
}  # steps of the stages
LONG = QUICK | {"scenes": 24000, "tokenizer": 4000, "mask_tokenizer": 4000}
LONG |= {"joint": 18000, "all": 18000, "depth": 15000, "normals": 15000, "semantic": 15000}
SMOKE = {"scenes": 96, "test_scenes": 16, "eval_batch_size": 16, "log_every": 4}
SMOKE |= dict.fromkeys(("tokenizer", "mask_tokenizer", "joint", "all", "depth", "normals", "semantic"), 8)


def rendered(budget: dict) -> dict:
    """Of all readers, which read the same scenes."""
    scenes = {"train": budget["scenes"], "test": budget["test_scenes"], "height": SIZE, "width": SIZE, "seed": 0}
    return {"root": "{workdir}/scenes", "cache": True, "render": {**scenes, "format": "both"}}


def map_data(modality: str, recipe: str, budget: dict) -> dict:
    lists = {"train_list": "train.txt", "test_list": "test.txt", "test_subfolder": ""} if modality == "depth" else {}
    return common.maps_data(modality, size=SIZE, recipe=recipe, **rendered(budget), **lists)


def object_data(name: str, budget: dict, **fields) -> dict:
    annotations = {f"{part}_annotations": f"annotations/instances_{part}.json" for part in ("train", "test")}
    folders = {"train_images": "", "test_images": ""}
    return common.coco_data(name, CROP, **rendered(budget), **annotations, **folders, **fields)


def stage(name: str, task: dict, data: dict, batch_size: int | dict, budget: dict, **fields) -> dict:
    tokenizer, evaluated = "tokenizer" in name, budget["eval_batch_size"]
    steps = budget[name if name in budget else "tokenizer"]  # those of all maps have as many
    return common.run(
        name=name,
        task=task,
        data=data,
        batch_size=batch_size,
        eval_batch_size=dict.fromkeys(batch_size, evaluated) if isinstance(batch_size, dict) else evaluated,
        train_steps=steps,
        log_every=budget["log_every"],
        keep_checkpoints=1,
        optim=common.optimizer(
            name="adamw" if tokenizer else "muon",
            learning_rate=1e-3 if tokenizer else 3e-3,
            weight_decay=0.0 if tokenizer else 0.05,
            clip_norm=1.0,
            warmup_steps=min(200, steps // 2),
            warmup_ratio=0.01,
            schedule={"name": "cosine", "end_factor": 0.02},
        ),
        ema_decay=0.0 if tokenizer else 0.999,
        **fields,
    ).to_dict()


def shared_fields(parallel: bool) -> dict:
    return {
        "init_variance": 0.5,
        "vocabulary": {"num_bins": SIZE, "num_classes": 9, "codes": (("mask", MASK_TOKENIZER["num_codes"]),)},
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


def map_fields(tokenizer: dict, parallel: bool) -> dict:
    return {
        "image_size": SIZE,
        "soft_input": not parallel,
        "aux_weight": 3.0,
        "memory_weight": 1.0,
        "input_noise": 0.0 if parallel else 0.3,
        "normalize_image": True,
        "tokenizer": tokenizer,
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


def map_tokenizer(modality: str, budget: dict, name: str = "tokenizer") -> dict:
    tokenizer, fields = MAPS[modality]
    task = {"name": f"{modality}_tokenizer", "image_size": SIZE, "mask_ratio": 0.0, "tokenizer": tokenizer, **fields}
    return stage(name, task, map_data(modality, "tokenizer", budget), 16, budget)


def mask_tokenizer(budget: dict) -> dict:
    task = {"name": "mask_tokenizer", "image_size": CROP, "tokenizer": MASK_TOKENIZER}
    return stage("mask_tokenizer", task, object_data("coco_masks", budget), 64, budget)


def map_solver(modality: str, parallel: bool, budget: dict) -> dict:
    """One modality alone."""
    tokenizer, fields = MAPS[modality]
    task = {"name": modality, **shared_fields(parallel), **map_fields(tokenizer, parallel), **fields}
    return stage(
        modality,
        task,
        map_data(modality, "solver", budget),
        8,
        budget,
        start_from={f"model_state/{modality}_tokenizer": "{workdir}/tokenizer"},
        eval_variants={f"{modality}_hard": common.HARD},
        eval_baseline=True,
    )


def joint_solver(name: str, tokenizers: dict, budget: dict) -> dict:
    """Instances and the modalities whose tokenizers are in these stages, by one set of weights."""
    parts = {}
    for modality in tokenizers:
        tokenizer, fields = MAPS[modality]
        parts[modality] = {**map_fields(tokenizer, False), **fields, "loss_weight": MAP_WEIGHT}
    parts["instances"] = instance_fields()
    objects = {"size": SIZE, "num_objects": OBJECTS, "jitter": (1.0, 1.0), "order": "left_to_right"}
    data = {modality: map_data(modality, "solver", budget) for modality in tokenizers}
    places = {**tokenizers, "mask": "mask_tokenizer"}
    return stage(
        name,
        {"name": "solver", "shared": shared_fields(False), "parts": parts},
        {**data, "instances": object_data("coco", budget, **objects)},
        {part: BATCHES[part] for part in parts},
        budget,
        start_from={f"model_state/{kind}_tokenizer": f"{{workdir}}/{place}" for kind, place in places.items()},
        eval_variants={part: {f"{part}_hard": common.HARD} for part in parts},
        eval_baseline=True,
    )


def without_soft_tokens(solver: dict) -> dict:
    """The stage of a solver without any of their three uses."""
    task, hard = solver["task"], {**common.HARD, "aux_weight": 0.0}
    if "parts" not in task:
        return {**solver, "task": {**task, **hard}, "eval_variants": {}}
    parts = {name: {**part, **hard} for name, part in task["parts"].items()}
    return {**solver, "task": {**task, "parts": parts}, "eval_variants": {part: {} for part in parts}}


def get_config(arg: str | None = None) -> ConfigDict:
    models = dict.fromkeys(("parallel", *ALONE, "all"), False)
    arg = parse_arg(arg, **models, soft=True, long=False, smoke=False)
    budget = SMOKE if arg.smoke else LONG if arg.long else QUICK
    chosen = [name for name in (*ALONE, "all") if arg[name]]
    if len(chosen) > 1 or (arg.all and arg.parallel):
        names = [*chosen, *(["parallel"] if arg.parallel else [])]
        raise ValueError(f"config arguments {' and '.join(names)}: each is another model; give one")
    if chosen and not arg.all:
        (name,) = chosen
        stages = {"tokenizer": map_tokenizer(name, budget), name: map_solver(name, arg.parallel, budget)}
    elif arg.parallel:
        stages = {"tokenizer": map_tokenizer("depth", budget), "depth": map_solver("depth", True, budget)}
    else:
        places = {"depth": "tokenizer"}
        if arg.all:
            places |= {name: f"{name}_tokenizer" for name in ALONE}
        stages = {place: map_tokenizer(name, budget, place) for name, place in places.items()}
        stages["mask_tokenizer"] = mask_tokenizer(budget)
        solver = "all" if arg.all else "joint"
        stages[solver] = joint_solver(solver, places, budget)
    if not arg.soft:
        *_, solver = stages
        stages[solver] = without_soft_tokens(stages[solver])
    return ordered({"stages": stages})
