"""Stage 1: the mask tokenizer on COCO's instance masks (AIT.md section 2).

    python -m aitok_jax.main --config=configs/vqvae_mask.py --workdir=runs/vqvae_mask --config.data.root=DATA/coco

Arguments, for example `configs/vqvae_mask.py:num_codes=64`:
    num_codes=128, hidden=16, downsample=16, res_blocks=2   the paper's ablations of the tokenizer
    objective=mse                                           or l1, smooth_l1
    faithful=true                                           false restarts dead codes

Published: 20 epochs of the training masks at batch 512. Evaluated by mask AP and boundary AP of the validation masks
after tokenizing and detokenizing; no number is published with the weights.
"""

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg

TRAINING_MASKS, EPOCHS, BATCH = 849_947, 20, 512


def coco_data(name: str = "coco", size: int = 640) -> ConfigDict:
    """COCO 2017 as published. `name` is 'coco' (images with objects) or 'coco_masks' (masks cropped at their boxes)."""
    fields = {
        "name": name,
        "root": "data/coco",
        "train_images": "train2017",
        "train_annotations": "annotations/instances_train2017.json",
        "test_images": "val2017",
        "test_annotations": "annotations/instances_val2017.json",
        "mask_size": 64,
        "on_error": "raise",
        "cache": False,
        "expected_train": 0,
        "expected_test": 0,
        "also_root": "",
        "also_count": 0,
        "render": {},
    }
    if name == "coco":
        fields |= {"size": size, "num_objects": 100, "jitter": (0.1, 3.0), "order": "random"}
    return ConfigDict(fields)


def tokenizer_fields(**overrides) -> ConfigDict:
    """The fields of the published mask `VQVAE`; numbers are those of the table in AIT.md section 2."""
    fields = {
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
    return ConfigDict(fields | overrides)


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, num_codes=128, hidden=16, downsample=16, res_blocks=2, objective="mse", faithful=True)
    steps_per_epoch = TRAINING_MASKS // BATCH
    return ConfigDict(
        {
            "name": "mask_tokenizer",
            "seed": 0,
            "task": {
                "name": "mask_tokenizer",
                "image_size": 64,
                "tokenizer": tokenizer_fields(
                    num_codes=arg.num_codes,
                    hidden=arg.hidden,
                    downsample=arg.downsample,
                    num_res_blocks=arg.res_blocks,
                    objective=arg.objective,
                    restart_threshold=0.0 if arg.faithful else 0.1,
                ),
            },
            "data": coco_data("coco_masks"),
            "batch_size": BATCH,
            "eval_batch_size": 512,
            "train_steps": steps_per_epoch * EPOCHS,
            "log_every": 50,
            "eval_every": steps_per_epoch,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "best_metric": "mask_tokenizer/mask_ap",
            "best_mode": "max",
            "optim": {
                "name": "adam",
                "learning_rate": 3e-4,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "layer_decay": 1.0,
                "clip_norm": 0.0,
                "warmup_steps": 500,
                "warmup_ratio": 1e-3,
                "schedule": {"name": "cosine", "end_factor": 1e-6 / 3e-4, "lag": 1},
            },
            "ema_decay": 0.0,
            "fsdp": 1,
            "accumulate": 1,
            "start_from": {},
            "eval_variants": {},
            "eval_baseline": False,
        }
    )
