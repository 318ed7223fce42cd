"""The skeleton of a run, with every key and its default, and what several families share.

A run of one part may give its task, data and sizes flat, as `run` has them; one of several gives each by part (see
configs/joint.py).
"""

from typing import Any

from ml_collections import ConfigDict

from aitok_jax.config import ordered, parse_arg

COMPUTE = {"dtype": "auto", "remat": "none"}
"""Arguments of all solvers. dtype: auto is bfloat16 arithmetic on accelerators and float32 on a CPU; or float32,
bfloat16. Softmax, LayerNorm, losses, tokenizers and all parameters are float32 always. remat: none, or blocks,
recomputed in the backward pass: less memory, a third more time; or dots, which keeps the outputs of linear layers: less
of both."""

BACKBONES = {  # widths, and the learning rate and weight decay of depth
    "swin_b": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "learning_rate": 2e-4, "weight_decay": 0.05},
    "swin_l": {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "learning_rate": 1e-4, "weight_decay": 0.075},
}
HARD = {"soft_input": False, "soft_detokenize": False}  # the two uses of soft tokens in inference, off
TOKENIZER = {  # the published VQ-VAE of masks; that of depth differs in what configs/vqvae_depth.py says
    "hidden": 16,
    "downsample": 16,
    "num_res_blocks": 2,
    "num_codes": 128,
    "code_dim": 512,
    "objective": "mse",
    "use_norm": True,
    "max_value": 1.0,
    "soft_temperature": 1.0,
    "restart_threshold": 0.0,
}


def run(**fields: Any) -> ConfigDict:
    """A run; keys that the skeleton lacks come first (paths that flags set)."""
    skeleton = {
        "name": "",  # first part of its metrics' names
        "seed": 0,
        "task": {},
        "data": {},
        "batch_size": 8,  # of all devices and hosts together
        "eval_batch_size": 8,
        "train_steps": 1,
        "log_every": 50,
        "eval_every": 0,  # 0: only at the end
        "checkpoint_every": 1000,
        "keep_checkpoints": 2,
        "best_metric": "",  # of the evaluation whose weights are kept in RUN/best; '' keeps none
        "best_mode": "min",
        "optim": optimizer(),
        "ema_decay": 0.0,  # of the parameters' moving average, which is evaluated; 0 is off
        "fsdp": 1,  # devices that large arrays are split over
        "accumulate": 1,  # micro-batches of a step
        # a run, or 'builtin', whose weights are taken as far as they fit; or '/'-joined paths in the state, each with
        # the run to take it from, one after the other, '' for nothing
        "start_from": {},
        "eval_variants": {},  # name -> fields of the part to evaluate once more with, at the end
        "eval_first": False,  # also before the first step: before/...
        "eval_baseline": False,  # also measure the prediction that sees no image
        "categories": (),  # of objects; written by the run
    }
    return ordered({**{key: value for key, value in fields.items() if key not in skeleton}, **skeleton, **fields})


def optimizer(**fields: Any) -> dict[str, Any]:
    """AdamW, constant, without warm-up, decay or clipping."""
    return {
        "name": "adamw",
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "clip_norm": 0.0,
        "warmup_steps": 0,
        "warmup_ratio": 1.0,
        "schedule": {"name": "constant"},
        **fields,
    }


def data(name: str, root: str, **fields: Any) -> dict[str, Any]:
    """What all readers take; see `aitok_jax.data.datasets.build`."""
    return {
        "name": name,
        "root": root,
        "on_error": "raise",  # or skip
        "cache": False,  # keep decoded examples in memory
        "expected_train": 0,  # examples that there must be; 0 = any
        "expected_test": 0,
        "also_root": "",  # a second data set of the same kind, of which every batch has
        "also_count": 0,  # so many examples
        "render": {},  # built-in scenes to render into root, where it has none
        **fields,
    }


def maps_data(modality: str, root: str, size: int, recipe: str, **fields: Any) -> dict[str, Any]:
    """Images with maps of a modality in the layout of NYUv2; lists may be given, else the folder is looked through."""
    own = {"train_list": "", "test_list": "", "train_subfolder": "", "test_subfolder": "official_splits/test"}
    own |= {"modality": modality, "size": size, "recipe": recipe, "columns": (), "color": False, "cutdepth": "off"}
    own["fit"] = "crop"  # or scale: frames of any size are brought to the model's scale first
    own["depth_scale"] = 0.0  # values a metre in depth files; 0: 1000 of whole numbers, 1 of floats
    own["first_label"] = 0  # the number of the first class in semantic maps; 1 where 0 is none, as in ADE20K
    return data("nyu", root, **{**own, **fields})


def coco_data(name: str, mask_size: int, **fields: Any) -> dict[str, Any]:
    """COCO 2017. `name` is 'coco' (images with objects) or 'coco_masks' (masks cropped at their boxes)."""
    own = {
        "train_images": "train2017",
        "train_annotations": "annotations/instances_train2017.json",
        "test_images": "val2017",
        "test_annotations": "annotations/instances_val2017.json",
        "mask_size": mask_size,
    }
    return data(name, **{"root": "data/coco", **own, **fields})


def solver(backbone: str, *, shift: tuple[bool, ...], drop_path: float, dtype: str, remat: str, **own: Any) -> dict:
    """Backbone and transformer of the published set-ups; `own` are fields of the transformer."""
    widths = BACKBONES[backbone]
    return {
        "backbone": {
            "embed_dim": widths["embed_dim"],
            "depths": (2, 2, 18, 2),
            "num_heads": widths["num_heads"],
            "windows": (30, 30, 30, 15),
            "pretrain_windows": (12, 12, 12, 6),
            "use_shift": shift,
            "drop_path": drop_path,
            "remat": remat,
            "dtype": dtype,
        },
        "transformer": {
            "dim": 256,
            "num_heads": 8,
            "hidden": 1024,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "max_length": 2100,
            "num_tasks": 4,
            "parallel": False,
            "drop_path": 0.1,
            "dropout": 0.1,
            "remat": remat,
            "dtype": dtype,
            **own,
        },
    }


def arguments(arg: str | None, choices: dict[str, tuple[str, ...]], **defaults: Any) -> ConfigDict:
    """`parse_arg`, with the words that some arguments may be; ValueError for others."""
    parsed = parse_arg(arg, **defaults)
    for name, valid in choices.items():
        if parsed[name] not in valid:
            raise ValueError(f"{name}={parsed[name]!r} must be one of {', '.join(valid)}")
    return parsed
