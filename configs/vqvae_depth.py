"""Stage 1: the depth tokenizer on NYUv2 (AIT.md section 2).

    python -m aitok_jax.main --config=configs/vqvae_depth.py --workdir=runs/vqvae_depth --config.data.root=DATA/nyu

Arguments, for example `configs/vqvae_depth.py:num_codes=64,downsample=16`:
    num_codes=128, hidden=16, downsample=32, res_blocks=2   the paper's ablations of the tokenizer
    mask_ratio=0.5, mask_patch=16                           mask augmentation; mask_ratio=0 is without
    objective=mse_ignore_zero                               or mse, l1, smooth_l1, silog
    learning_rate=3e-4                                      the paper says 1e-3
    faithful=true                                           false restarts dead codes

Published: 20 epochs of 24 231 maps at batch 8; no reconstruction error is published with the weights.
"""

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg

TRAINING_PAIRS, EPOCHS, BATCH = 24231, 20, 8


def nyu_data(recipe: str, size: int = 480) -> ConfigDict:
    """The published folder layout; lists may be given, else the folder is looked through."""
    return ConfigDict(
        {
            "name": "nyu",
            "root": "data/nyu",
            "train_list": "",
            "test_list": "",
            "train_subfolder": "",
            "test_subfolder": "official_splits/test",
            "size": size,
            "recipe": recipe,
            "columns": (41, 601) if recipe == "tokenizer" else (),
            "color": True,
            "cutdepth": "published",
            "on_error": "raise",
            "cache": False,
            "expected_train": 0,
            "expected_test": 0,
            "also_root": "",
            "also_count": 0,
            "render": {},
        }
    )


def tokenizer_fields(**overrides) -> ConfigDict:
    """The fields of the published depth `VQVAE`; numbers are those of the table in AIT.md section 2."""
    fields = {
        "hidden": 16,
        "downsample": 32,
        "num_res_blocks": 2,
        "num_codes": 128,
        "code_dim": 512,
        "objective": "mse_ignore_zero",
        "use_norm": False,
        "max_value": 10.0,
        "soft_temperature": 0.8,
        "restart_threshold": 0.0,
    }
    return ConfigDict(fields | overrides)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        num_codes=128,
        hidden=16,
        downsample=32,
        res_blocks=2,
        mask_ratio=0.5,
        mask_patch=16,
        objective="mse_ignore_zero",
        learning_rate=3e-4,
        faithful=True,
    )
    steps_per_epoch = TRAINING_PAIRS // BATCH
    return ConfigDict(
        {
            "name": "tokenizer",
            "seed": 0,
            "task": {
                "name": "depth_tokenizer",
                "image_size": 480,
                "mask_ratio": arg.mask_ratio,
                "mask_patch": arg.mask_patch,
                "eval_crop": (45, 471, 41, 601),
                "max_depth": 10.0,
                "tokenizer": tokenizer_fields(
                    num_codes=arg.num_codes,
                    hidden=arg.hidden,
                    downsample=arg.downsample,
                    num_res_blocks=arg.res_blocks,
                    objective=arg.objective,
                    restart_threshold=0.0 if arg.faithful else 0.1,
                ),
            },
            "data": nyu_data("tokenizer"),
            "batch_size": BATCH,
            "eval_batch_size": 8,
            "train_steps": steps_per_epoch * EPOCHS,
            "log_every": 100,
            "eval_every": steps_per_epoch,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "best_metric": "tokenizer/rmse",
            "best_mode": "min",
            "optim": {
                "name": "adam",
                "learning_rate": arg.learning_rate,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "layer_decay": 1.0,
                "clip_norm": 0.0,
                "warmup_steps": 0,
                "warmup_ratio": 1.0,
                "schedule": {
                    "name": "exponential",
                    "factor": 0.98,
                    "every": 500,
                    "steps_per_epoch": steps_per_epoch,
                },
            },
            "ema_decay": 0.0,
            "fsdp": 1,
            "accumulate": 1,
            "start_from": {},
            "eval_variants": {},
            "eval_baseline": False,
        }
    )
