"""Depth in small, on built-in scenes: renders rooms, trains the tokenizer and a solver, evaluates, writes panels.

    python -m aitok_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

About 16 minutes on two CPU cores. Arguments: `configs/quickstart.py:parallel` (all tokens in one pass),
`:smoke` (a few steps of everything, for tests).

WORKDIR/metrics.json then holds depth/… (soft decoding), depth_hard/… (the same weights, hard decoding),
baseline/… (the mean depth map of the training set) and tokenizer/… (tokenize and detokenize the truth).
"""

from ml_collections import ConfigDict

from aitok_jax.config_utils import parse_arg

SIZE, WIDTH = 64, 80  # pixels: training crops are SIZE×SIZE out of SIZE×WIDTH
TOKENIZER = {
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


def data_fields(recipe: str, smoke: bool) -> dict:
    return {
        "name": "nyu",
        "root": "{workdir}/scenes",
        "train_list": "train.txt",
        "test_list": "test.txt",
        "train_subfolder": "",
        "test_subfolder": "",
        "size": SIZE,
        "recipe": recipe,
        "columns": (),
        "color": False,
        "cutdepth": "off",
        "on_error": "raise",
        "cache": True,
        "expected_train": 0,
        "expected_test": 0,
        "render": {
            "train": 96 if smoke else 6000,
            "test": 16 if smoke else 300,
            "height": SIZE,
            "width": WIDTH,
            "seed": 0,
            "format": "nyu",
        },
    }


def stage(name: str, task: dict, recipe: str, steps: int, learning_rate: float, smoke: bool) -> dict:
    steps = 8 if smoke else steps
    return {
        "name": name,
        "seed": 0,
        "task": {"name": "depth_tokenizer" if name == "tokenizer" else name, "image_size": SIZE, **task},
        "data": data_fields(recipe, smoke),
        "batch_size": 32,
        "eval_batch_size": 16 if smoke else 64,
        "train_steps": steps,
        "log_every": 4 if smoke else 50,
        "eval_every": 0,
        "checkpoint_every": 1000,
        "keep_checkpoints": 1,
        "optim": {
            "name": "adamw",
            "learning_rate": learning_rate,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0 if name == "tokenizer" else 0.05,
            "layer_decay": 1.0,
            "clip_norm": 1.0,
            "warmup_steps": min(200, steps // 2),
            "warmup_ratio": 0.01,
            "schedule": {"name": "cosine", "end_factor": 0.02},
        },
        "ema_decay": 0.0 if name == "tokenizer" else 0.999,
        "fsdp": 1,
        "start_from": {},
        "eval_variants": {},
        "eval_baseline": False,
    }


def solver_task(parallel: bool) -> dict:
    return {
        "soft_input": not parallel,
        "aux_weight": 3.0,
        "memory_weight": 1.0,
        "input_noise": 0.0 if parallel else 0.3,
        "normalize_image": True,
        "tokenizer": TOKENIZER,
        "vocabulary": {"num_bins": 64, "num_classes": 9, "num_mask_codes": 16},
        "backbone": {
            "patch": 16,
            "stem": (32, 64, 128, 192),
            "embed_dim": 192,
            "depths": (2,),
            "num_heads": (4,),
            "windows": (4,),
            "pretrain_windows": (4,),
            "use_shift": (False,),
            "drop_path": 0.0,
        },
        "transformer": {
            "dim": 128,
            "num_heads": 4,
            "hidden": 512,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "max_length": (SIZE // TOKENIZER["downsample"]) ** 2,
            "position_temperature": 4.0,
            "parallel": parallel,
            "drop_path": 0.0,
            "dropout": 0.0,
        },
    }


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, parallel=False, smoke=False)
    tokenizer = stage("tokenizer", {"tokenizer": TOKENIZER, "mask_ratio": 0.0}, "tokenizer", 1500, 1e-3, arg.smoke)
    solver = stage("depth", solver_task(arg.parallel), "solver", 4000, 1e-3, arg.smoke)
    solver["start_from"] = {"model_state/depth_tokenizer": "{workdir}/tokenizer"}
    solver["eval_variants"] = {"depth_hard": {"soft_input": False, "soft_detokenize": False}}
    solver["eval_baseline"] = True
    return ConfigDict({"stages": {"tokenizer": tokenizer, "depth": solver}})
