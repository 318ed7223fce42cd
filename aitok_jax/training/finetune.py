"""A plan for somebody's own data: looks at the folder, divides it, and makes the configuration of all stages.

`configs/finetune.py` asks for it. The model is that of the weights to start from; a tokenizer that they lack is trained
first; sizes and steps follow the amount of data. What is found is written to WORKDIR/data.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aitok_jax import paths, tasks
from aitok_jax.config import check_given, ordered
from aitok_jax.data import own
from aitok_jax.tasks import MODALITIES
from aitok_jax.training import checkpoint, run_dir

LOG = logging.getLogger(__name__)
HARD = {"soft_input": False, "soft_detokenize": False}
OBJECTS = {  # fields of the part, where they are not those of the weights
    "instances": {},
    "detection": {"tokenizer": None, "aux_weight": 0.0, **HARD},
}
TOKENIZER = {  # of a modality that the weights have none of
    "hidden": 16,
    "downsample": 16,
    "num_res_blocks": 2,
    "num_codes": 128,
    "code_dim": 64,
    "use_norm": False,
    "max_value": 10.0,
    "soft_temperature": 1.0,
    "restart_threshold": 0.1,
}
STEPS = {  # of the solver: so many epochs, between these numbers of steps
    "maps": (30, 100, 3000),
    "objects": (1000, 1000, 6000),
}
TOKENIZER_STEPS = 1500
LEARNING_RATES = {"maps": 5e-4, "objects": 1e-3}  # of the solver; twice that of maps forgets scenes unlike one's own
_EVALUATIONS = 8
_KEYS = {  # of the configuration of a plan, and those inside
    "finetune": ("task", "size", "from"),
    "data": ("root", "maps", "annotations", "val", "share", "depth_scale", "first_label", "on_error"),
    **dict.fromkeys(("steps", "batch_size", "learning_rate", "seed"), ()),
}
_DETAILS = ("_small", "_medium", "_large", "_ar1", "_ar10", "_ar100", "confidence_spearman")


def plan(config: ConfigDict, workdir: str | Path) -> ConfigDict:
    """The configuration with `stages`; logs what a person should know of it.

    Args:
      config: `finetune` (task, size, from), `data` (root, maps, annotations, val, share, on_error, and the modalities'
        `file_fields`), `steps`, `batch_size` and `learning_rate`, 0 for what is proposed, and `seed`.

    Raises:
      ValueError: weights that do not do the task, or sizes that do not fit; FileNotFoundError, DataError: see `own`.
    """
    _check_keys(config)
    kind, source = config.finetune.task, config.finetune["from"]
    saved, _ = checkpoint.load_inference(source)
    if saved.task.name != "solver":
        raise ValueError(f"from={source}: it is no run of a solver; give one, or from=builtin")
    found = _find(config, kind, paths.absolute(checkpoint.place(workdir)) / "data")
    size = config.finetune.size or _size_of(saved)
    steps = config.steps or _steps(kind, found.train, config.batch_size)
    stages = {}
    task, taken_over = _task(saved, kind, size, len(found.categories), found.fields)
    if kind in MODALITIES and not taken_over:
        tokenizer = {"tokenizer": task["parts"][kind]["tokenizer"], **found.fields}
        stages["tokenizer"] = _tokenizer_run(config, kind, size, tokenizer, found)
    stages[kind] = _solver_run(config, kind, size, task, found, steps, taken_over)
    LOG.info("the plan:\n  %s", "\n  ".join(_lines(config, kind, found, size, stages)))
    return ordered({"stages": stages})


def _check_keys(config: ConfigDict) -> None:
    check_given("config", config, _KEYS)
    for key, inner in _KEYS.items():
        check_given(f"config.{key}", config[key] if inner else (), inner)


def report(kind: str, folder: Path) -> str:
    """A table of what the evaluations of a solver in `folder` measured, and which weights to predict with."""
    evaluations = run_dir.RunDir(folder).evaluations()
    final = json.loads(paths.read(folder / "metrics.json"))
    name, better = _best(kind)
    pick = {"min": min, "max": max}[better]
    best = pick(evaluations, key=lambda step: evaluations[step].get(name, math.nan))
    columns = {"before": evaluations[0], f"best, step {best}": evaluations[best], f"step {max(evaluations)}": final}
    if baseline := {key.replace("baseline", kind): x for key, x in final.items() if key.startswith("baseline/")}:
        columns["mean map"] = baseline
    shown = [key for key in evaluations[0] if key.startswith(f"{kind}/") and not key.endswith(_DETAILS)]
    lines = [f"{'on the images held out':28}" + "".join(f"{column:>16}" for column in columns)]
    for key in shown:
        cells = (f"{values[key]:16.4f}" if key in values else " " * 16 for values in columns.values())
        lines.append(f"{key:28}" + "".join(cells))
    place = folder / checkpoint.BEST if pick((evaluations[best][name], final[name])) != final[name] else folder
    lines.append(f"python -m aitok_jax.predict --checkpoint={place} --task={kind} --image PHOTOS --out=predicted")
    return "\n  ".join(lines)


def _best(kind: str) -> tuple[str, str]:
    """The metric that the best weights go by, and which way is better."""
    if kind in OBJECTS:
        return f"{kind}/box_ap50", "max"  # that of masks is 0 for long where there are few images
    name, better = MODALITIES[kind].headline
    return f"{kind}/{name}", better


def _find(config: ConfigDict, kind: str, lists: Path) -> own.Found:
    data = config.data
    options = {"val": data.val, "share": data.share}
    if kind in OBJECTS:
        masks = "tokenizer" not in OBJECTS[kind]
        return own.find_objects(data.root, lists, annotations=data.annotations, masks=masks, **options)
    options |= {"maps": data.maps, "on_error": data.on_error}
    options |= {field: data[key] for key, field in MODALITIES[kind].file_fields.items() if data[key]}
    return own.find_maps(kind, data.root, lists, **options)


def _size_of(saved: ConfigDict) -> int:
    return max(part.image_size for part in saved.task.parts.values())


def _steps(kind: str, images: int, batch_size: int) -> int:
    epochs, least, most = STEPS[_family(kind)]
    return min(max(math.ceil(epochs * images / (batch_size or 16)), least), most)


def _family(kind: str) -> str:
    return "objects" if kind in OBJECTS else "maps"


def _task(
    saved: ConfigDict, kind: str, size: int, classes: int, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The fields of a solver of one part, like those of the weights, and whether they have a tokenizer for it.

    `fields` are the modality's, as the data has them; a tokenizer of others is none for it.
    """
    source = saved.to_dict()["task"]
    shared, parts = source["shared"], source["parts"]
    kinds = {part.setdefault("name", name): part for name, part in parts.items()}
    wanted = tasks.OBJECTS if kind in OBJECTS else kind
    same = json.loads(json.dumps(fields))  # tuples are lists in a saved configuration
    taken_over = wanted in kinds and all(kinds[wanted].get(name) == value for name, value in same.items())
    if kind in OBJECTS:
        if not taken_over:
            raise ValueError(f"these weights do {', '.join(kinds)}, and no {kind}; give from= a run of objects")
        part = {**kinds[wanted], **OBJECTS[kind]}
        shared["vocabulary"] = {**shared.get("vocabulary", {}), "num_classes": classes}
    elif taken_over:
        part = dict(kinds[kind])
    else:
        modality = MODALITIES[kind]
        part = next((dict(part) for name, part in kinds.items() if name in MODALITIES), {"normalize_image": True})
        part["tokenizer"] = TOKENIZER | {"objective": modality.objective}
    part |= {**fields, "name": wanted, "image_size": size, "loss_weight": 1.0}
    return {"name": "solver", "shared": shared, "parts": {kind: part}}, taken_over


def _run(config: ConfigDict, name: str, task: Mapping, data: Mapping, steps: int, **fields: Any) -> dict[str, Any]:
    every = max(steps // _EVALUATIONS, 1)
    return {
        "name": name,
        "seed": config.seed,
        "task": task,
        "data": data,
        "train_steps": steps,
        "log_every": max(min(50, steps // 20), 1),
        "checkpoint_every": every,
        "keep_checkpoints": 1,
        **fields,
    }


def _optimizer(name: str, learning_rate: float, steps: int, weight_decay: float) -> dict[str, Any]:
    return {
        "name": name,
        "learning_rate": learning_rate,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": weight_decay,
        "layer_decay": 1.0,
        "clip_norm": 1.0,
        "warmup_steps": min(100, steps // 10),
        "warmup_ratio": 0.01,
        "schedule": {"name": "cosine", "end_factor": 0.02},
    }


def _maps_data(config: ConfigDict, kind: str, size: int, found: own.Found, recipe: str) -> dict[str, Any]:
    return {
        "name": "nyu",
        **_common_data(config),
        "modality": kind,
        **{key: config.data[key] for key in MODALITIES[kind].file_fields},
        "train_list": "",
        "test_list": "",
        "train_subfolder": "",
        "size": size,
        "fit": "scale",
        "recipe": recipe,
        "columns": (),
        "color": True,
        "cutdepth": "off",
        **found.data,
    }


def _common_data(config: ConfigDict) -> dict[str, Any]:
    own_keys = {"on_error": config.data.on_error, "cache": True, "expected_train": 0, "expected_test": 0}
    return own_keys | {"also_root": "", "also_count": 0, "render": {}}


def _tokenizer_run(config: ConfigDict, kind: str, size: int, fields: Mapping, found: own.Found) -> dict[str, Any]:
    part = {"name": kind, "image_size": size, "mask_ratio": 0.0, **fields}
    task = {"name": "tokenizer", "parts": {kind: part}}
    steps = config.steps or TOKENIZER_STEPS
    return _run(
        *(config, "tokenizer", task, {kind: _maps_data(config, kind, size, found, "tokenizer")}, steps),
        batch_size={kind: config.batch_size or 16},
        eval_batch_size={kind: 16},
        eval_every=0,
        optim=_optimizer("adamw", 1e-3, steps, 0.0),
    )


def _solver_run(
    config: ConfigDict, kind: str, size: int, task: Mapping, found: own.Found, steps: int, taken_over: bool
) -> dict[str, Any]:
    (part,) = tasks.build(task).parts.values()
    if kind in OBJECTS:
        masks = part.mask_size if part.mask_tokens else 0
        data = {"name": "coco", **_common_data(config), "size": size, "mask_size": masks}
        data |= {"num_objects": part.num_objects, "jitter": (0.4, 1.6), "order": "left_to_right"}
        data |= {f"{split}_{what}": "" for split in ("train", "test") for what in ("images", "annotations")}
        data |= found.data
    else:
        data = _maps_data(config, kind, size, found, "solver")
    best = _best(kind)
    tokenizer = {} if taken_over else {f"model_state/{kind}_tokenizer": "{workdir}/tokenizer"}
    return _run(
        *(config, kind, task, {kind: data}, steps),
        batch_size={kind: config.batch_size or 16},
        eval_batch_size={kind: 16},
        eval_every=max(steps // _EVALUATIONS, 1),
        best_metric=best[0],
        best_mode=best[1],
        optim=_optimizer("muon", config.learning_rate or LEARNING_RATES[_family(kind)], steps, 0.05),
        ema_decay=0.999,
        start_from={"": config.finetune["from"], **tokenizer},
        eval_first=True,
        eval_baseline=kind not in OBJECTS,
    )


def _lines(config: ConfigDict, kind: str, found: own.Found, size: int, stages: Mapping[str, Mapping]) -> list[str]:
    lines = [f"data: {found.train} images to train, {found.val} to evaluate on"]
    lines += [f"{name}: {', '.join(map(str, value))}" for name, value in found.fields.items()]
    if found.categories:
        lines.append(f"classes: {', '.join(found.categories)}")
    lines.append(f"model: that of {config.finetune['from']}, its weights as far as they fit; images at {size} pixels")
    for name, stage in stages.items():
        what = "tokenizer, from random weights" if name == "tokenizer" else f"solver of {kind}"
        batch = stage["batch_size"][kind]
        lines.append(f"stage {name}: {what}, {stage['train_steps']} steps of {batch} images")
    return lines
